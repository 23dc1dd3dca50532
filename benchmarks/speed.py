"""How fast SmolLM2-135M-Instruct is after cuts of 20 and 30%, beside what its operations promise, and where time stays.

Speed does not depend on which neurons go, so they are those of smallest weights. `hifiprune bench` times the models in
turn, in fresh processes; then the time of reading and of writing is taken apart, the models in turn again. Writes
`results/speed.json`. Takes half an hour on 2 cores with nothing else to do; interrupted, it goes on where it stopped.
"""

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import hifiprune as hp
from hifiprune.cli.console import speaking
from hifiprune.commands.demo import fetch_smollm2
from hifiprune.evaluation.speed import write
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.mlp import find_blocks, find_mlps
from hifiprune.results import Workload

ROOT = Path(__file__).parent.parent
PRUNED = {
    "20%": hp.PruneConfig(hp.Budget(ratio=0.2), criterion="magnitude", repair="none"),
    "20%, `--round-to 1`": hp.PruneConfig(hp.Budget(ratio=0.2), criterion="magnitude", repair="none", round_to=1),
    "30%": hp.PruneConfig(hp.Budget(ratio=0.3), criterion="magnitude", repair="none"),
}
NEW, ROUNDS = 32, 7
TAKEN_APART = [Workload(batch_size=1, length=512, new_tokens=NEW), Workload(batch_size=8, length=128, new_tokens=NEW)]


def main() -> None:
    """Run or go on."""
    folder = ROOT / ".cache" / "speed"
    models = {"dense": fetch_smollm2(ROOT / ".cache" / "smollm2")} | {
        name: folder / re.sub(r"\W+", "-", name).strip("-") for name in PRUNED
    }
    for name, config in PRUNED.items():
        if not models[name].exists():
            hp.prune(str(models["dense"]), models[name], config)
    dense, *pruned = map(str, models.values())
    timed = folder / "timed"
    if not timed.exists():
        timing = hp.BenchConfig((1, 8), (128, 512), new_tokens=NEW, rounds=ROUNDS, repeats=1)
        hp.bench(dense, pruned, timing, timed)
    record = json.loads((timed / "run.json").read_text())
    names = {str(path): name for name, path in models.items()}
    found = record["results"]
    facts = {
        "environment": record["environment"],
        "threads": found["threads"],
        "models": {names[path]: each for path, each in found["models"].items()},
        "workloads": [
            {**each, "models": {names[path]: row for path, row in each["models"].items()}}
            for each in found["workloads"]
        ],
        "noise": max(each["noise"] for each in found["workloads"]),
        "parts": [],
    }
    loaded = {name: find_checkpoint(str(path)).load(torch.float32) for name, path in models.items()}
    for work in TAKEN_APART:
        facts["parts"].append({"workload": asdict(work), "models": parts(loaded, work)})
    (ROOT / "benchmarks" / "results" / "speed.json").write_text(json.dumps(facts, indent=1) + "\n")


def parts(models: dict[str, PreTrainedModel], work: Workload) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of reading and, for each token, of writing, by model and part; medians over rounds after a first one."""
    seen: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for number in range(ROUNDS + 1):
        for name, model in models.items():
            tokens = torch.randint(
                model.config.vocab_size, (work.batch_size, work.length), generator=torch.Generator().manual_seed(0)
            )
            with spent(model) as seconds:
                first, later = write(model, model, tokens, work)[1:]
            for phase, whole, count in (("reading", first, 1), ("writing", later, NEW - 1)):
                own = {
                    part: sum(each[:1] if phase == "reading" else each[1:]) / count for part, each in seconds.items()
                }
                for part, value in (own | {"rest": whole - sum(own.values())}).items():
                    if number:
                        seen[name, phase, part].append(value)
    return {
        name: {
            phase: {part: median(each) for (one, when, part), each in seen.items() if (one, when) == (name, phase)}
            for phase in ("reading", "writing")
        }
        for name in models
    }


@contextmanager
def spent(model: PreTrainedModel) -> Iterator[dict[str, list[float]]]:
    """Seconds in the MLPs, in attention and in the head, one after the other for each call of the model within."""
    seconds: dict[str, list[float]] = {"mlp": [], "attention": [], "head": []}
    modules: dict[str, list[nn.Module]] = {
        "mlp": [model.get_submodule(mlp.name) for mlp in find_mlps(model)],
        "attention": [block.get_submodule("self_attn") for block in find_blocks(model)],
        "head": [model.get_output_embeddings()],
    }
    starts: list[float] = []

    def begin(*_: Any) -> None:
        for each in seconds.values():
            each.append(0.0)

    handles = [model.register_forward_pre_hook(begin)]
    for part, some in modules.items():

        def stop(*_: Any, part: str = part) -> None:
            seconds[part][-1] += time.perf_counter() - starts.pop()

        for module in some:
            handles.append(module.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter())))
            handles.append(module.register_forward_hook(stop))
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def table(facts: dict[str, Any]) -> str:
    """Return speed-ups as Markdown: measured, theoretical, and the share of the theoretical time saving reached."""
    pruned = [name for name in facts["models"] if name != "dense"]
    lines = [f"| | dense | {' | '.join(pruned)} |", "|" + "---|" * (2 + len(pruned))]
    for part, verb in (("first", "prefill"), ("later", "decode")):
        for found in facts["workloads"]:
            work, rows = found["workload"], found["models"]
            size, length = work["batch_size"], work["length"]
            what = f"{verb} {size} x {length}" if part == "first" else f"{verb} batch of {size}, after {length} tokens"
            speed = size * (length if part == "first" else 1) / rows["dense"][part]["seconds"]["median"]
            cells = [
                f"x{row['speedup']['median']:.2f} of x{row['promised']:.2f} ({row['share']:.0%})"
                for row in (rows[name][part] for name in pruned)
            ]
            lines.append(f"| {what} | {speed:,.0f} tokens/s | {' | '.join(cells)} |")
    return "\n".join(lines)


def reasons(facts: dict[str, Any]) -> str:
    """Return milliseconds of each part of prefill and of decoding one token, as Markdown."""
    names = list(facts["models"])
    lines = [f"| | {' | '.join(names)} |", "|" + "---|" * (1 + len(names))]
    for each in facts["parts"]:
        work, found = each["workload"], each["models"]
        size = f"{work['batch_size']} x {work['length']}"
        for phase, what in (("reading", f"prefill {size}"), ("writing", f"decode, batch of {work['batch_size']}")):
            for part in found["dense"][phase]:
                cells = [f"{1000 * found[name][phase][part]:.1f}" for name in names]
                lines.append(f"| {what}: {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with speaking():
        main()
