"""Time and memory beyond what fits: streamed against resident weights, cutting on the disk, and growth with every size.

Random checkpoints in the shapes of Llama-3.2-1B and Llama-2-7B are made on the disk (17 GB for the time being) and go
through the commands, each in a process of its own whose peak resident memory the system tells. Writes
`results/scale.json` and `docs/figures/scale.svg`; `--parts` measures some parts anew. Takes about an hour on 2 cores.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hifiprune as hp
from hifiprune.commands.demo import fetch_smollm2
from hifiprune.io.atomic import replacing
from hifiprune.io.safetensors_stream import Piece, write_shard
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.run_record import describe_environment

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".cache" / "scale"
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    },
}  # fmt: skip
POOL = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()


def make(shape: dict[str, Any], folder: Path) -> Path:
    """A random bfloat16 checkpoint with a tokenizer of bytes, written a piece at a time."""
    if folder.exists():
        return folder
    config = LlamaConfig(dtype="bfloat16", bos_token_id=None, eos_token_id=None, **shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    pieces = {
        name: Piece("BF16", tuple(parameter.shape), partial(_values, tuple(parameter.shape)))
        for name, parameter in model.named_parameters()
    }
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    with replacing(folder) as new:
        new.mkdir()
        config.save_pretrained(new)
        PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(new)
        write_shard(new / "model.safetensors", pieces)
    return folder


def _values(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Rows of a matrix from the pool, a random part of it each; ones for a norm."""
    if len(shape) == 1:
        yield torch.ones(shape, dtype=torch.bfloat16)
        return
    rows, width = max(1, 2**22 // shape[1]), shape[1]
    chance = random.Random(str(shape))
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first) * width
        start = chance.randrange(len(POOL) - count)
        yield POOL[start : start + count].view(-1, width)


def text(folder: Path) -> Path:
    """Random letters, enough for every window here."""
    path = folder / "text.txt"
    if not path.exists():
        path.write_text("".join(random.Random(0).choices("etaoin shrdlu", k=100_000)))
    return path


def run(*words: object) -> dict[str, Any]:
    """Seconds, peak resident bytes and the record of a command in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "hifiprune", *map(str, words), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return {"seconds": time.perf_counter() - start, "peak": usage.ru_maxrss * 1024, "record": json.loads(out)}


def large(name: str) -> dict[str, Any]:
    """A checkpoint of billions of parameters: scored streamed, and pruned by the scores."""
    model, windows, positions = make(SHAPES[name], FOLDER / name), 4, 512
    scored = run(
        "score", model, "--output", FOLDER / "scores", "--overwrite", "--calibration", text(FOLDER), "--stream",
        "--num-samples", windows, "--seq-len", positions, "--scratch", FOLDER,
    )  # fmt: skip
    bytes_there = find_checkpoint(str(model)).weight_bytes
    pruned = run("prune", model, "--output", FOLDER / "pruned", "--scores", FOLDER / "scores", "--ratio", 0.2)
    shutil.rmtree(FOLDER / "pruned")
    parameters = bytes_there // 2
    return {
        "parameters": parameters,
        "weight_bytes": bytes_there,
        "windows": windows,
        "positions": positions,
        "scoring": _brief(scored),
        "resident_bytes": 4 * parameters,
        "pruning": _brief(pruned),
    }


def _brief(found: dict[str, Any]) -> dict[str, Any]:
    """Of a run: seconds and peak memory, those of its stages, and what was expected of these."""
    record = found["record"]
    stages = {
        each["name"]: {"seconds": each["seconds"], "memory": each["peak_memory_bytes"]} for each in record["stages"]
    }
    expected = {each.pop("step"): each for each in record["expected"]}
    return {"seconds": found["seconds"], "peak_bytes": found["peak"], "stages": stages, "expected": expected}


def cutting() -> dict[str, Any]:
    """The same checkpoints cut by 20% on the disk, and a plain copy of their weights, in turn."""
    found: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        model = make(shape, FOLDER / name)
        width, neurons = hp.inspect(str(model)).widths["20%"].width_rounded_to_128, shape["intermediate_size"]
        layers, chance = range(shape["num_hidden_layers"]), torch.Generator().manual_seed(0)
        kept = [torch.randperm(neurons, generator=chance)[:width].sort().values for _ in layers]
        names = [f"model.layers.{layer}.mlp" for layer in layers]
        hp.Plan(kept, [neurons] * len(kept), names, 0.2, 0.2, 0, 0).save(FOLDER / "plan.json")
        found[name] = [{"copy": _copied(model), "cut": _cut(model)} for _ in range(5)]
    return found


def _copied(model: Path) -> float:
    """Seconds of a plain copy, until it is on the disk."""
    start = time.perf_counter()
    shutil.copyfile(model / "model.safetensors", FOLDER / "copy")
    os.sync()
    seconds = time.perf_counter() - start
    (FOLDER / "copy").unlink()
    return seconds


def _cut(model: Path) -> dict[str, float]:
    """Seconds of `cut_checkpoint`, until it is on the disk, and before it those of starting Python; peak memory."""
    code = """
import sys, time
import hifiprune as hp
from hifiprune.pruning.cut_checkpoint import cut_checkpoint
plan = hp.Plan.load(sys.argv[3])
print(time.monotonic(), flush=True)
cut_checkpoint(*sys.argv[1:3], plan)
"""
    words = [sys.executable, "-c", code, str(model), str(FOLDER / "cut"), str(FOLDER / "plan.json")]
    start = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    started = float(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"cutting failed: {status}")
    os.sync()
    end = time.monotonic()
    shutil.rmtree(FOLDER / "cut")
    return {"start": started - start, "seconds": end - started, "peak_bytes": usage.ru_maxrss * 1024}


def streamed() -> dict[str, Any]:
    """SmolLM2-135M scored with its weights on the disk and in memory, in turn."""
    model = fetch_smollm2(ROOT / ".cache" / "smollm2")
    found: dict[str, list[dict[str, Any]]] = {"--in-memory": [], "--stream": []}
    for _ in range(3):
        for how, each in found.items():
            words = ("--calibration", "python-docs", "--num-samples", 4, "--recompute", how)
            each.append(_brief(run("score", model, "--output", FOLDER / "scores", "--overwrite", *words)))
    return {"windows": 4, "positions": 1024, "rounds": found}


BASE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 8192, "tie_word_embeddings": False,
}  # fmt: skip
GROWN: dict[str, dict[int, dict[str, Any]]] = {
    "blocks": {count: {"num_hidden_layers": count} for count in (4, 8, 16, 32)},
    "hidden size": {size: {"hidden_size": size, "intermediate_size": 3 * size} for size in (256, 512, 1024, 2048)},
    "vocabulary": {size: {"vocab_size": size} for size in (8192, 32768, 131072)},
    "tokens a window": {positions: {"positions": positions} for positions in (128, 256, 512, 1024)},
}
HOW = {"in memory": ("--in-memory", "--recompute"), "streamed": ("--stream", "--scratch", FOLDER)}


def growth() -> list[dict[str, Any]]:
    """Time and memory of scoring 8 windows where one size of the model or the windows grows, and what was expected."""
    found = []
    for what, sizes in GROWN.items():
        for size, change in sizes.items():
            shape = BASE | change
            positions = shape.pop("positions", 256)
            model = make(shape, FOLDER / "grown")
            for how, flags in HOW.items():
                words = ("--calibration", text(FOLDER), "--num-samples", 8, "--seq-len", positions, *flags)
                each = _brief(run("score", model, "--output", FOLDER / "scores", "--overwrite", *words))
                found.append({"what": what, "size": size, "how": how, **each})
            shutil.rmtree(model)
    return found


def predictions(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Every stage whose cost was foreseen and took a second: what was measured, and what was expected."""
    runs = list(facts.get("growth", []))
    for name in ("1B", "7B", "steps"):
        runs += [found for key, found in facts.get(name, {}).items() if isinstance(found, dict) and "expected" in found]
    runs += [each for rounds in facts.get("streamed", {}).get("rounds", {}).values() for each in rounds]
    return [
        {"stage": stage, "measured": run["stages"][stage], "expected": expected}
        for run in runs
        for stage, expected in run["expected"].items()
        if run["stages"].get(stage, {"seconds": 0})["seconds"] >= 1
    ]


def spared(facts: dict[str, Any]) -> str:
    """What streaming costs a model that would fit, and spares."""
    rounds = facts["streamed"]["rounds"]
    seconds = {how: [each["stages"]["scoring"]["seconds"] for each in found] for how, found in rounds.items()}
    peaks = {how: max(each["peak_bytes"] for each in found) / 1e9 for how, found in rounds.items()}
    ratio = median(one / other for one, other in zip(seconds["--stream"], seconds["--in-memory"], strict=True))
    return (
        f"{ratio:.2f} times the time of weights in memory, and {peaks['--stream']:.2f} GB at the peak instead of "
        f"{peaks['--in-memory']:.2f} GB"
    )


def foreseen(facts: dict[str, Any]) -> str:
    """How many of the stages took as many seconds, and as much memory, as was expected to within 30%, as Markdown."""
    found = predictions(facts)
    lines = [
        "| | stages | seconds within 30% | memory within 30% | seconds, median | seconds, worst |",
        "|" + "---|" * 6,
    ]
    for stage in dict.fromkeys(each["stage"] for each in found):
        own = [each for each in found if each["stage"] == stage]
        close, ratios = [], []
        for unit in ("seconds", "memory"):
            each_ratio = [each["measured"][unit] / each["expected"][unit] for each in own if each["expected"].get(unit)]
            close.append(f"{sum(1 / 1.3 <= ratio <= 1.3 for ratio in each_ratio)} of {len(each_ratio)}")
            ratios.append(each_ratio)
        furthest = max(ratios[0], key=lambda ratio: abs(math.log(ratio)))
        lines.append(f"| {stage} | {len(own)} | {' | '.join(close)} | x{median(ratios[0]):.2f} | x{furthest:.2f} |")
    return "\n".join(lines)


def settling(facts: dict[str, Any]) -> str:
    """How the kept set of SmolLM2-135M settled, as Markdown."""
    lines = ["| windows | agreement of two halves | extrapolated to all 1,000 |", "|---|---|---|"]
    for each in facts["stability"]["curve"]:
        lines.append(f"| {each['windows']} | {each['halves']:.1%} | {each['extrapolated']:.1%} |")
    return "\n".join(lines)


def power(facts: dict[str, Any]) -> tuple[float, float]:
    """The power of the windows with which the halves' disagreement falls, and its factor."""
    curve = facts["stability"]["curve"]
    windows, apart = zip(*((math.log(each["windows"]), math.log(1 - each["halves"])) for each in curve), strict=True)
    slope, factor = linear_regression(windows, apart)
    return slope, math.exp(factor)


def others(facts: dict[str, Any]) -> str:
    """How many of the 1,000 windows other targets would take, if the disagreement goes on falling by that power."""
    (slope, factor), of = power(facts), 1000

    def reached(windows: int) -> float:
        return 1 - factor * math.exp(slope * math.log(windows)) / 2 * math.sqrt(1 - windows / of)

    needed = {
        asked: next(n for n in range(8, of + 1) if reached(n) >= asked) for asked in (0.9, 0.95, 0.97, 0.98, 0.99)
    }
    return ", ".join(f"{windows} for {asked:g}" for asked, windows in needed.items())


def draw(facts: dict[str, Any]) -> None:
    """Measured time and memory against each size, lines for what was expected."""
    figure, axes = plt.subplots(2, len(GROWN), figsize=(13, 6), squeeze=False)
    for column, what in enumerate(GROWN):
        for color, how in enumerate(HOW):
            rows = [each for each in facts["growth"] if (each["what"], each["how"]) == (what, how)]
            sizes = [each["size"] for each in rows]
            for line, (unit, scale) in enumerate((("seconds", 1.0), ("memory", 1e9))):
                measured = [each["stages"]["scoring"][unit] / scale for each in rows]
                expected = [each["expected"]["scoring"][unit] / scale for each in rows]
                axes[line, column].plot(sizes, measured, "o", color=f"C{color}", label=f"{how}, measured")
                axes[line, column].plot(sizes, expected, color=f"C{color}", label=f"{how}, expected")
        for line, unit in enumerate(("seconds", "peak memory, GB")):
            axes[line, column].set(xscale="log", yscale="log", xlabel=what, ylabel="" if column else unit)
            axes[line, column].set_xticks(list(GROWN[what]), [f"{size:,}" for size in GROWN[what]])
            axes[line, column].minorticks_off()
            axes[line, column].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes[line, column].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / "scale.svg", metadata={"Date": None})


FAR: dict[str, dict[str, Any]] = {
    "1B": SHAPES["1B"],
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "405B": {
        "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
WINDOWS, POSITIONS = 128, 1024
OPERATIONS, DISK = 60e12, 3e9
"""What is assumed: operations of a GPU in bfloat16 a second, bytes of the disk a second."""


def predicted(shape: dict[str, Any], gpus: int, memory: float) -> dict[str, float]:
    """Seconds and bytes of scoring by one objective, streamed in bfloat16 with scratch, by the cost model."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    hidden, width, layers, vocabulary = (shape[name] for name in names)
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    block = 3 * hidden * width + 2 * hidden * (hidden + keys)
    ends = (1 if shape["tie_word_embeddings"] else 2) * hidden * vocabulary
    tokens = math.ceil(WINDOWS / gpus) * POSITIONS
    state = 2 * hidden * tokens
    graph, slices = 2 * POSITIONS * (4 * width + 14 * hidden), 4 * 4 * 128 * vocabulary
    groups = math.ceil(3 * state / (memory / 4))
    return {
        "weights": 2.0 * (layers * block + ends),
        "resident": 2.0 * (layers * block + ends) + 2 * graph + 2 * layers * 2 * hidden * POSITIONS + slices,
        "gpu": max(2.0 * block + 2 * graph, slices + 2 * hidden * vocabulary) + 3 * state / groups,
        "scratch": float(gpus * layers * state / groups),
        "computing": tokens * (6.0 * layers * block + 4.0 * hidden * vocabulary) / OPERATIONS,
        "reading": (groups * 2.0 * (2 * layers * block + hidden * vocabulary) + 2.0 * gpus * layers * state) / DISK,
    }


def far() -> str:
    """What is predicted, as Markdown."""
    lines = [
        "| | weights | resident | streamed | scratch | 1 GPU of 24 GB | 8 GPUs of 80 GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, shape in FAR.items():
        one, eight = predicted(shape, 1, 24e9), predicted(shape, 8, 80e9)
        sizes = [f"{one[part] / 1e9:,.1f} GB" for part in ("weights", "resident", "gpu", "scratch")]
        times = [
            f"{each['computing'] / 60:,.1f} min computing, {each['reading'] / 60:,.1f} min reading"
            for each in (one, eight)
        ]
        lines.append(f"| {name} | {' | '.join(sizes + times)} |")
    return "\n".join(lines)


def table(facts: dict[str, Any]) -> str:
    """The checkpoints that were made, as Markdown: what was measured, beside what resident weights would take."""
    lines = ["| | 1B | 7B |", "|---|---|---|"]
    found = [facts["1B"], facts["7B"]]

    def row(name: str, cells: list[str]) -> None:
        lines.append(f"| {name} | {' | '.join(cells)} |")

    row("parameters", [f"{each['parameters']:,}" for each in found])
    row("weights in float32, resident", [f"{each['resident_bytes'] / 1e9:.1f} GB" for each in found])
    scored = [f"{each['scoring']['peak_bytes'] / 1e9:.2f} GB" for each in found]
    row(f"peak memory of scoring {found[0]['windows']} windows of {found[0]['positions']} tokens, streamed", scored)
    row("seconds, scoring", [f"{each['scoring']['stages']['scoring']['seconds']:,.0f}" for each in found])
    rounds = [facts["cutting"][name] for name in ("1B", "7B")]
    row("peak memory of cutting 20%", [f"{max(_all(each, 'peak_bytes')) / 1e9:.2f} GB" for each in rounds])
    row("seconds, cutting, once Python has started", [f"{median(_all(each, 'seconds')):.1f}" for each in rounds])
    row("seconds, plain copy of the files", [f"{median(one['copy'] for one in each):.1f}" for each in rounds])
    return "\n".join(lines)


def _all(rounds: list[dict[str, Any]], what: str) -> list[float]:
    return [each["cut"][what] for each in rounds]


def steps() -> dict[str, Any]:
    """SmolLM2-135M pruned by the defaults: every stage beside what was expected of it."""
    model = fetch_smollm2(ROOT / ".cache" / "smollm2")
    found = {}
    for how, flags in {"pruned": (), "pruned, streamed": ("--stream",)}.items():
        text = ("--calibration", "python-docs", "--sampler", "stream", "--num-samples", 12, "--seq-len", 512)
        found[how] = _brief(run("prune", model, "--output", FOLDER / "pruned", "--ratio", 0.2, *text, *flags))
        shutil.rmtree(FOLDER / "pruned")
    return found


def stability() -> dict[str, Any]:
    """How many of 1,000 windows, as many as the papers read, SmolLM2-135M needs for 95% of the kept set."""
    model, data = fetch_smollm2(ROOT / ".cache" / "smollm2"), ROOT.parent / "shared" / "data" / "c4"
    words = ("--calibration", data, "--sampler", "stream", "--num-samples", 1000, "--seq-len", 512)
    settled = ("--ratio", 0.2, "--until-stable", 0.95)
    found = run("score", model, "--output", FOLDER / "scores", "--overwrite", *words, *settled)
    return {"curve": found["record"]["results"]["stability"], **_brief(found)}


PARTS: dict[str, Callable[[], Any]] = {
    "streamed": streamed,
    "1B": partial(large, "1B"),
    "7B": partial(large, "7B"),
    "cutting": cutting,
    "growth": growth,
    "steps": steps,
    "stability": stability,
}


def main() -> None:
    """Measure all parts, or some anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    asked = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = ROOT / "benchmarks" / "results" / "scale.json"
    facts = json.loads(path.read_text()) if path.exists() else {}
    for name in asked.parts:
        facts["environment"] = describe_environment()
        facts[name] = PARTS[name]()
        path.write_text(json.dumps(facts, indent=1) + "\n")
    if "growth" in facts:
        draw(facts)


if __name__ == "__main__":
    main()
