"""What each idea beyond the papers is worth on SmolLM2-135M-Instruct or Gemma 3 270M, without training end to end.

HFPrune's exact method against other scores, widths that differ, repair in its forms, text of the target's domain, and
the best of them together: calibrated on C4, measured on WikiText-2 test (perplexity) and other documents of C4 (KL
divergence), over draws of calibration windows.
Writes `results/quality.json`, with the model's name for Gemma. Takes hours on 2 cores; interrupted, it goes on where it
stopped. What the parts cost is measured by `repair.py` and `scoring.py`, zero-shot accuracy by `zero_shot.py`.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

import hifiprune as hp
from benchmarks.gemma import fetch_gemma
from hifiprune.commands.demo import fetch_smollm2
from hifiprune.config import AllocationConfig, CriterionOptions
from hifiprune.evaluation.fidelity import Reference, measure_windows
from hifiprune.evaluation.text import held_windows
from hifiprune.io.atomic import replacing
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.pruning.reconstruct import Training
from hifiprune.pruning.repair import cut_and_repair_, residual_stream
from hifiprune.scoring.score import score_all

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DATA = ROOT.parent / "shared" / "data"
RATIOS, SEEDS = (0.2, 0.3, 0.4), 3
MODELS = {"smollm2": fetch_smollm2, "gemma3-270m": fetch_gemma}


@dataclass(frozen=True)
class Variant:
    """A criterion, how widths are decided, and how the cut is repaired, if at all.

    Attributes:
        texts: how many times as many windows are repaired on as are scored on.
        target: whether half of the windows are of WikiText-2's training text.
        alone: one idea by itself, looked at in one draw and at the lowest ratio only.
    """

    criterion: str
    allocation: str = "uniform"
    repair: dict[str, Any] | None = None
    texts: int = 1
    target: bool = False
    alone: bool = False


SEQUENTIAL: dict[str, Any] = {}
LOCAL: dict[str, Any] = {"training": Training()}
VARIANTS = {
    "hfprune": Variant("hfprune"),
    "entropy-square, repaired": Variant("entropy-square", repair=SEQUENTIAL),
    "fisher, global, repaired": Variant("fisher", "global", SEQUENTIAL),
    "entropy-square, local": Variant("entropy-square", repair=LOCAL),
    "fisher, global, local": Variant("fisher", "global", LOCAL),
    "entropy-square, local, target text": Variant("entropy-square", repair=LOCAL, target=True),
    "fisher, global, local, target text": Variant("fisher", "global", LOCAL, target=True),
    "entropy-square": Variant("entropy-square", alone=True),
    "hfprune, repaired": Variant("hfprune", repair=SEQUENTIAL, alone=True),
    "fisher, repaired": Variant("fisher", repair=SEQUENTIAL, alone=True),
    "entropy-square, repaired in parallel": Variant("entropy-square", repair={"sequential": False}, alone=True),
    "entropy-square, repaired, tokens alike": Variant("entropy-square", repair={"weighted": False}, alone=True),
    "fisher, global": Variant("fisher", "global", alone=True),
    "entropy-square, repaired, 3 x text": Variant("entropy-square", repair=SEQUENTIAL, texts=3, alone=True),
    "fisher, global, repaired, 3 x text": Variant("fisher", "global", SEQUENTIAL, texts=3, alone=True),
}
"""By name; those called global have widths that differ from layer to layer."""


@dataclass(frozen=True)
class Bench:
    """The model's folder, the texts to measure on, and where finished parts are kept."""

    model: Path
    wikitext: Int[Tensor, "windows positions"]
    c4: Int[Tensor, "windows positions"]
    folder: Path

    def calibration(
        self, seed: int, count: int, sampler: str = "documents", *, target: bool = False
    ) -> Int[Tensor, "windows positions"]:
        """A draw of windows of C4, half of them of WikiText-2's training text if that is asked for."""
        mixed = ((str(DATA / "wikitext-2" / "wiki.train.head.txt"), 0.5),) if target else ()
        source = hp.Calibration(
            str(DATA / "c4" / "c4_documents.jsonl"), count, 1024, seed, sampler=sampler, mixed=mixed
        )
        return hp.load_windows(source, find_checkpoint(str(self.model)).tokenizer())

    def dense(self) -> PreTrainedModel:
        """A fresh copy."""
        return find_checkpoint(str(self.model)).load()

    @cached_property
    def reference(self) -> Reference:
        """The dense model on C4."""
        return Reference.of(self.dense(), self.c4)


@dataclass(frozen=True)
class Draw:
    """One draw of the calibration windows, of C4 alone or with text of the target's domain."""

    bench: Bench
    seed: int
    count: int
    target: bool = False

    @cached_property
    def windows(self) -> Int[Tensor, "windows positions"]:
        """The windows."""
        return self.bench.calibration(self.seed, self.count, target=self.target)

    def path(self, what: str) -> Path:
        """A file of this draw."""
        stem, dot, suffix = what.rpartition(".")
        return self.bench.folder / f"{stem}{'-target' * self.target}-{self.count}-{self.seed}{dot}{suffix}"

    @cached_property
    def stream(self) -> tuple[Float[Tensor, "blocks windows positions hidden"], float]:
        """Of the dense model, which every repair in sequence aims at, and the seconds it took."""
        start = time.perf_counter()
        return residual_stream(self.bench.dense(), self.windows), time.perf_counter() - start

    def scores(self, criterion: str) -> tuple[hp.Scores, float]:
        """By a criterion, made with all that are looked at in several draws or by itself, and the seconds it took."""
        path = self.path(f"scores-{criterion}.safetensors")
        if not path.is_file():
            own = [each for each in VARIANTS.values() if not each.alone and each.target == self.target]
            names = list(dict.fromkeys(each.criterion for each in own))
            names = names if criterion in names else [criterion]
            start = time.perf_counter()
            made = score_all(
                self.bench.dense(), self.windows, [(name, CriterionOptions(seed=self.seed)) for name in names]
            )
            seconds = (time.perf_counter() - start) / len(names)
            for name, scores in zip(names, made, strict=True):
                self.path(f"scores-{name}.seconds").write_text(str(seconds))
                scores.save(self.path(f"scores-{name}.safetensors"))
        return hp.Scores.load(path), float(path.with_suffix(".seconds").read_text())

    def build(self, name: str, ratio: float) -> tuple[PreTrainedModel, dict[str, float]]:
        """The model that a variant makes, and seconds of scoring and repair."""
        variant, model = VARIANTS[name], self.bench.dense()
        scores, scoring = self.scores(variant.criterion)
        allocation = AllocationConfig(variant.allocation)
        plan = hp.allocate(scores, hp.Budget(ratio=ratio), round_to=1, allocation=allocation)
        windows, dense, before = self.windows, None, 0.0
        if variant.texts > 1:
            windows = self.bench.calibration(self.seed, variant.texts * len(windows), "stream")
        elif variant.repair in (SEQUENTIAL, LOCAL):
            dense, before = self.stream
        start = time.perf_counter()
        if variant.repair is None:
            hp.cut_(model, plan)
        else:
            cut_and_repair_(model, plan, windows, dense=dense, **variant.repair)
        repairing = before + time.perf_counter() - start
        return model, {"scoring_seconds": scoring, "repair_seconds": repairing}

    def cell(self, name: str, ratio: float) -> dict[str, float]:
        """Log perplexity on WikiText-2, KL divergence on C4, and the seconds of each part."""
        path = self.path(f"{file_name(name)}-{ratio:g}.json")
        if not path.is_file():
            model, seconds = self.build(name, ratio)
            loss = measure_windows(model, self.bench.wikitext)["perplexity"].mean()
            divergence = measure_windows(model, self.bench.c4, self.bench.reference)["kl"].mean()
            write(path, {"loss": float(loss), "kl": float(divergence)} | seconds)
        cell: dict[str, float] = json.loads(path.read_text())
        return cell


def file_name(variant: str) -> str:
    """A variant's name without what file names should not have."""
    return variant.replace(", ", "-").replace(" ", "-")


def write(path: Path, facts: dict[str, float]) -> None:
    """All or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(facts))


def main() -> None:
    """Run or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=41, help="calibration windows of 1,024 tokens")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--model", default="smollm2", choices=list(MODELS))
    parser.add_argument("--wikitext", type=int, default=24, help="windows of 1,024 tokens to measure on")
    asked = parser.parse_args()
    model = MODELS[asked.model](ROOT / ".cache" / asked.model)
    tokenizer = find_checkpoint(str(model)).tokenizer()
    wikitext = held_windows(hp.Text(str(DATA / "wikitext-2" / "wiki.test.raw"), 1024, asked.wikitext), tokenizer)
    c4 = held_windows(hp.Text(str(DATA / "c4" / "c4_short.jsonl"), 512, 8), tokenizer)
    suffix = "" if asked.model == "smollm2" else f"-{asked.model}"
    folder = ROOT / ".cache" / f"quality-{asked.wikitext}{suffix}"
    folder.mkdir(exist_ok=True)
    bench = Bench(model, wikitext, c4, folder)

    cells: dict[tuple[str, float], list[dict[str, float]]] = {}
    console = Console(width=140)
    for seed in range(asked.seeds):
        draws = [Draw(bench, seed, asked.windows, target) for target in (False, True)]
        for ratio in asked.ratios:
            for name in asked.variants:
                if not VARIANTS[name].alone or (seed, ratio) == (0, min(asked.ratios)):
                    cells.setdefault((name, ratio), []).append(draws[VARIANTS[name].target].cell(name, ratio))
                    console.print(f"draw {seed}, {ratio:g}, {name}: {cells[name, ratio][-1]}", highlight=False)
    rows = [summary(name, ratio, own) for (name, ratio), own in cells.items()]
    papers = {ratio: own for (name, ratio), own in cells.items() if name == "hfprune"}
    for row in rows:
        own = cells[row["variant"], row["ratio"]]
        paper = summary("", 0.0, papers.get(row["ratio"], [])[: len(own)] or own)  # of the same draws
        for metric in ("perplexity", "kl"):
            row[f"{metric}_to_hfprune"] = row[metric] / paper[metric]
    dense = float(measure_windows(bench.dense(), wikitext)["perplexity"].mean())
    facts: dict[str, Any] = {"arguments": vars(asked), "dense_perplexity": math.exp(dense), "results": rows}
    (RESULTS / f"quality{suffix}.json").write_text(json.dumps(facts, indent=1) + "\n")


def summary(name: str, ratio: float, cells: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and standard deviation over draws."""
    perplexities = [math.exp(cell["loss"]) for cell in cells]
    divergences = [cell["kl"] for cell in cells]
    return {
        "variant": name,
        "ratio": ratio,
        "draws": len(cells),
        "perplexity": mean(perplexities),
        "perplexity_spread": stdev(perplexities) if len(cells) > 1 else None,
        "kl": mean(divergences),
        "kl_spread": stdev(divergences) if len(cells) > 1 else None,
    }


def table(facts: dict[str, Any], *, alone: bool) -> str:
    """Results as Markdown, of ideas alone or of the others: perplexity and KL at each ratio, and both to HFPrune's."""
    together = [name for name, variant in VARIANTS.items() if not variant.alone]
    rows = [row for row in facts["results"] if (row["variant"] not in together) == alone]
    ratios = sorted({row["ratio"] for row in rows})
    lines = ["| | " + " | ".join(f"perplexity at {ratio:.0%} | KL at {ratio:.0%}" for ratio in ratios) + " |"]
    lines.append("|" + "---|" * (1 + 2 * len(ratios)))
    for name in dict.fromkeys(row["variant"] for row in rows):
        cells = []
        for ratio in ratios:
            row = next((row for row in rows if (row["variant"], row["ratio"]) == (name, ratio)), None)
            cells += ["", ""] if row is None else [_cell(row, "perplexity", ".3g"), _cell(row, "kl", ".3f")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], metric: str, form: str) -> str:
    share = row[f"{metric}_to_hfprune"]
    return f"{row[metric]:{form}}" + ("" if share == 1 else f" (x{share:.2f})")


if __name__ == "__main__":
    main()
