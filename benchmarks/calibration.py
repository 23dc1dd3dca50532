"""What the choice of calibration text is worth: one method, the defaults of `prune` at 20%, calibrated on other texts.

On C4, WikiText-2 train, both, text that the model writes from nothing or in answer to instructions, and conversations
written by others; measured on held-out WikiText-2, C4, conversations, and answers of the dense model to other
instructions (perplexity, and KL divergence from the dense model). Writes `results/calibration.json`; interrupted, it
goes on where it stopped. Run it by `python -m benchmarks.calibration`.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

import hifiprune as hp
from benchmarks.gemma import fetch_gemma
from hifiprune.commands.demo import fetch_smollm2
from hifiprune.evaluation.fidelity import Reference, measure_windows
from hifiprune.evaluation.text import held_windows
from hifiprune.io.atomic import replacing
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.run_record import describe_environment

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "calibration.json"
DATA = ROOT.parent / "shared" / "data"
MODELS = {"smollm2": fetch_smollm2, "gemma3-270m": fetch_gemma}
RATIO, LEARNED = 0.2, 700
"""Fraction of the parameters that is removed, and rows of instructions to calibrate on; the others are held out."""
Windows = Int[Tensor, "windows positions"]


@dataclass(frozen=True)
class Bench:
    """A model, the sizes of texts, and where finished parts are kept."""

    checkpoint: Checkpoint
    count: int
    held: int
    positions: int
    folder: Path

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a part that is there from before, or make it."""
        path = self.folder / f"{name.replace(' ', '-')}.json"
        if not path.is_file():
            made = make()
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(made))
        return json.loads(path.read_text())

    def draw(self, *sources: str, prompts: Path | None = None, held: bool = False) -> Windows:
        """Return windows of sources in equal shares, by the command's own reader, or of the model's answers."""
        count, mixed = self.held if held else self.count, tuple((source, 1 / len(sources)) for source in sources[1:])
        calibration = hp.Calibration(sources[0], count, self.positions, int(held), "stream", mixed=mixed)
        if prompts:
            calibration = replace(calibration, prompts=str(prompts))
        model = self.dense if calibration.is_sampled else None
        return hp.load_windows(calibration, self.checkpoint.tokenizer(), model)

    def read(self, path: Path) -> Windows:
        """Return held-out windows of a text."""
        return held_windows(hp.Text(str(path), self.positions, self.held), self.checkpoint.tokenizer())

    def windows(self, name: str, make: Callable[[], Windows]) -> Windows:
        """Return windows that are there from before, or make them."""
        return torch.tensor(self.kept(f"windows {name}", lambda: make().tolist()))

    @cached_property
    def dense(self) -> PreTrainedModel:
        """The dense model, which is not cut."""
        return self.checkpoint.load(torch.float32)

    @cached_property
    def instructions(self) -> dict[str, Path]:
        """Instructions, and conversations as the chat template writes them, to calibrate on and held out."""
        tokenizer, paths = self.checkpoint.tokenizer(), {}
        rows = [json.loads(line) for line in (DATA / "instruct" / "alpaca_demo.jsonl").read_text().splitlines()]
        for part, some in (("learned", rows[:LEARNED]), ("held", rows[LEARNED:])):
            chats = []
            for row in some:
                asked = "\n\n".join(filter(None, (row["instruction"], row["input"])))
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
                has_template = tokenizer.chat_template is not None
                plain = f"{asked}\n\n{row['output']}"
                chats.append({"text": tokenizer.apply_chat_template(turns, tokenize=False) if has_template else plain})
            for kind, written in (("prompts", some), ("chats", chats)):
                paths[f"{part} {kind}"] = self.folder / f"{part}-{kind}.jsonl"
                paths[f"{part} {kind}"].write_text("".join(json.dumps(row) + "\n" for row in written))
        return paths


def calibrations(bench: Bench) -> dict[str, Callable[[], Windows]]:
    """Return what makes the windows of each text to calibrate on."""
    c4, wikitext = str(DATA / "c4" / "c4_documents.jsonl"), str(DATA / "wikitext-2" / "wiki.train.head.txt")
    asked, chats = bench.instructions["learned prompts"], str(bench.instructions["learned chats"])
    return {
        "C4": partial(bench.draw, c4),
        "WikiText-2 train": partial(bench.draw, wikitext),
        "C4 and WikiText-2 train": partial(bench.draw, c4, wikitext),
        "self": partial(bench.draw, "self"),
        "self, prompts": partial(bench.draw, "self", prompts=asked),
        "conversations": partial(bench.draw, chats),
        "C4 and self, prompts": partial(bench.draw, c4, "self", prompts=asked),
    }


def held_out(bench: Bench) -> dict[str, Callable[[], Windows]]:
    """Return what makes the windows of each text to measure on."""
    return {
        "WikiText-2": partial(bench.read, DATA / "wikitext-2" / "wiki.test.raw"),
        "C4": partial(bench.read, DATA / "c4" / "c4_short.jsonl"),
        "conversations": partial(bench.read, bench.instructions["held chats"]),
        "own answers": partial(bench.draw, "self", prompts=bench.instructions["held prompts"], held=True),
    }


def pruned(bench: Bench, windows: Windows) -> PreTrainedModel:
    """Return the model that the defaults of `prune` make, but for exact widths."""
    model = bench.checkpoint.load(torch.float32)
    plan = hp.allocate(hp.score(model, windows), hp.Budget(ratio=RATIO), round_to=1)
    hp.cut_and_repair_(model, plan, windows)
    return model


def measured(model: PreTrainedModel, texts: dict[str, Windows], references: dict[str, Reference]) -> dict[str, Any]:
    """Return perplexity and KL divergence on every text."""
    results = {}
    for name, windows in texts.items():
        values = measure_windows(model, windows, references.get(name))
        results[name] = {"perplexity": float(values["perplexity"].mean().exp())}
        if "kl" in values:
            results[name]["kl"] = float(values["kl"].mean())
    return results


def main() -> None:
    """Measure what is not yet known, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", choices=list(MODELS))
    parser.add_argument("--windows", type=int, default=16, help="windows to calibrate on")
    parser.add_argument("--held-out", type=int, default=8, help="windows of each text to measure on")
    parser.add_argument("--positions", type=int, default=512)
    asked = parser.parse_args()
    folder = ROOT / ".cache" / f"calibration-{asked.model}-{asked.windows}-{asked.held_out}-{asked.positions}"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = find_checkpoint(str(MODELS[asked.model](ROOT / ".cache" / asked.model)))
    bench = Bench(checkpoint, asked.windows, asked.held_out, asked.positions, folder)
    held = {name: bench.windows(f"held {name}", make) for name, make in held_out(bench).items()}
    cells = {"dense": bench.kept("dense", lambda: measured(bench.dense, held, {}))}
    references: dict[str, Reference] = {}
    for name, make in calibrations(bench).items():

        def cell(name: str = name, make: Callable[[], Windows] = make) -> dict[str, Any]:
            for text, windows in held.items():
                references[text] = references.get(text) or Reference.of(bench.dense, windows)
            return measured(pruned(bench, bench.windows(name, make)), held, references)

        cells[name] = bench.kept(name, cell)
        print(f"{name}: {cells[name]}", flush=True)
        known = json.loads(RESULTS.read_text())["models"] if RESULTS.is_file() else {}
        facts = {"windows": asked.windows, "held_out_windows": asked.held_out, "positions": asked.positions}
        known[asked.model] = {**facts, "ratio": RATIO, "environment": describe_environment(), "results": cells}
        RESULTS.write_text(json.dumps({"models": known}, indent=1) + "\n")
    print(table(cells))


def table(results: dict[str, Any]) -> str:
    """Return perplexity and KL divergence as Markdown, a row for each text that was calibrated on."""
    texts = list(results["dense"])
    lines = [f"| calibrated on | {' | '.join(f'{text}: perplexity | KL' for text in texts)} |"]
    lines.append("|---|" + "--:|" * (2 * len(texts)))
    for name, cell in results.items():
        values = [f"{cell[text]['perplexity']:.3g} | {cell[text].get('kl', 0):.3f}" for text in texts]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
