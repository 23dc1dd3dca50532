"""What each idea beyond the papers is worth on SmolLM2-135M-Instruct, without any training.

HFPrune's exact method against other scores, widths that differ, repair in its forms, and the best of them together:
calibrated on C4, measured on WikiText-2 test (perplexity) and other documents of C4 (KL divergence), over draws of
calibration windows.
Writes `results/quality.json`. Takes hours on 2 cores; interrupted, it goes on where it stopped.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

import hifiprune as hp
from hifiprune.checkpoint import find_checkpoint
from hifiprune.demonstration import fetch_smollm2
from hifiprune.evaluation import measure_windows
from hifiprune.output import replacing
from hifiprune.repair import cut_and_repair_
from hifiprune.search import search, search_windows

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DATA = ROOT.parent / "shared" / "data"
RATIOS, SEEDS = (0.2, 0.3), 3


@dataclass(frozen=True)
class Variant:
    """A criterion, how widths are decided, and how the cut is repaired, if at all."""

    criterion: str
    allocation: str = "uniform"
    repair: dict[str, Any] | None = None


SEQUENTIAL: dict[str, Any] = {}
VARIANTS = {
    "hfprune": Variant("hfprune"),
    "entropy-square": Variant("entropy-square"),
    "fisher": Variant("fisher"),
    "hfprune, repaired": Variant("hfprune", repair=SEQUENTIAL),
    "entropy-square, repaired": Variant("entropy-square", repair=SEQUENTIAL),
    "fisher, repaired": Variant("fisher", repair=SEQUENTIAL),
    "entropy-square, repaired in parallel": Variant("entropy-square", repair={"sequential": False}),
    "entropy-square, repaired, tokens alike": Variant("entropy-square", repair={"weighted": False}),
    "entropy-square, repaired, attention too": Variant("entropy-square", repair={"attention": True}),
    "fisher, global": Variant("fisher", "global"),
    "fisher, global, repaired": Variant("fisher", "global", SEQUENTIAL),
    "fisher, searched": Variant("fisher", "searched"),
    "fisher, searched, repaired": Variant("fisher", "searched", SEQUENTIAL),
}
"""By name; all but the last four have one width for all layers."""


@dataclass(frozen=True)
class Bench:
    """The model's folder, the texts to measure on, and where finished parts are kept."""

    model: Path
    wikitext: Int[Tensor, "windows positions"]
    c4: Int[Tensor, "windows positions"]
    reference: hp.Reference
    folder: Path

    def dense(self) -> PreTrainedModel:
        """A fresh copy."""
        return find_checkpoint(str(self.model)).load()

    def scores(self, windows: Int[Tensor, "windows positions"], seed: int) -> dict[str, hp.Scores]:
        """By every criterion of `VARIANTS`."""
        names = list(dict.fromkeys(variant.criterion for variant in VARIANTS.values()))
        paths = {name: self.folder / f"scores-{name}-{len(windows)}-{seed}.safetensors" for name in names}
        if not all(path.is_file() for path in paths.values()):
            made = hp.score_all(self.dense(), windows, [(name, hp.Options(seed=seed)) for name in names])
            for path, scores in zip(paths.values(), made, strict=True):
                scores.save(path)
        return {name: hp.Scores.load(path) for name, path in paths.items()}

    def plan(
        self, variant: Variant, ratio: float, seed: int, windows: Int[Tensor, "windows positions"]
    ) -> tuple[hp.Plan, float]:
        """What a variant keeps, and the seconds that a search took."""
        scores, budget = self.scores(windows, seed)[variant.criterion], hp.Budget(ratio=ratio)
        if variant.allocation != "searched":
            return hp.allocate(scores, budget, round_to=1, sharing=hp.Sharing(variant.allocation)), 0.0
        path = self.folder / f"plan-{variant.criterion}-{ratio:g}-{len(windows)}-{seed}.json"
        if not path.is_file():
            start = time.perf_counter()
            search(self.dense(), scores, budget, search_windows(windows), round_to=1).save(path)
            path.with_suffix(".seconds").write_text(str(time.perf_counter() - start))
        return hp.Plan.load(path), float(path.with_suffix(".seconds").read_text())

    def cell(self, name: str, ratio: float, seed: int, windows: Int[Tensor, "windows positions"]) -> dict[str, float]:
        """Log perplexity on WikiText-2, KL divergence on C4, and seconds of search and repair."""
        path = self.folder / f"{name.replace(', ', '-').replace(' ', '-')}-{ratio:g}-{len(windows)}-{seed}.json"
        if not path.is_file():
            variant, model = VARIANTS[name], self.dense()
            plan, search_seconds = self.plan(variant, ratio, seed, windows)
            start = time.perf_counter()
            if variant.repair is None:
                hp.cut_(model, plan)
            else:
                cut_and_repair_(model, plan, windows, **variant.repair)
            seconds = time.perf_counter() - start
            loss = measure_windows(model, self.wikitext)["perplexity"].mean()
            divergence = measure_windows(model, self.c4, self.reference)["kl"].mean()
            found = {"loss": float(loss), "kl": float(divergence)}
            found |= {"search_seconds": search_seconds, "repair_seconds": seconds}
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(found))
        cell: dict[str, float] = json.loads(path.read_text())
        return cell


def main() -> None:
    """Run or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=41, help="calibration windows of 1,024 tokens")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--wikitext", type=int, default=24, help="windows of 1,024 tokens to measure on")
    asked = parser.parse_args()
    model = fetch_smollm2(ROOT / ".cache" / "smollm2")
    tokenizer = find_checkpoint(str(model)).tokenizer()
    wikitext = hp.Text(str(DATA / "wikitext-2" / "wiki.test.raw"), 1024, asked.wikitext).held(tokenizer).windows
    c4 = hp.Text(str(DATA / "c4" / "c4_short.jsonl"), 512, 8).held(tokenizer).windows
    folder = ROOT / ".cache" / f"quality-{asked.wikitext}"
    folder.mkdir(exist_ok=True)
    dense = find_checkpoint(str(model)).load()
    bench = Bench(model, wikitext, c4, hp.Reference.of(dense, c4), folder)
    source = str(DATA / "c4" / "c4_documents.jsonl")
    draws = [hp.load_windows(hp.Calibration(source, asked.windows, 1024, k), tokenizer) for k in range(asked.seeds)]
    console, rows = Console(width=140), []
    for ratio in asked.ratios:
        for name in asked.variants:
            cells = []
            for seed, windows in enumerate(draws):
                cells.append(bench.cell(name, ratio, seed, windows))
            rows.append(summary(name, ratio, cells))
            console.print(rows[-1])
    papers = {row["ratio"]: row for row in rows if row["variant"] == "hfprune"}
    for row in rows:
        for metric in ("perplexity", "kl"):
            if row["ratio"] in papers:
                row[f"{metric}_to_hfprune"] = row[metric] / papers[row["ratio"]][metric]
    (RESULTS / "quality.json").write_text(json.dumps({"arguments": vars(asked), "results": rows}, indent=1) + "\n")


def summary(name: str, ratio: float, cells: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and standard deviation over draws."""
    perplexities = [float(torch.tensor(cell["loss"]).exp()) for cell in cells]
    divergences = [cell["kl"] for cell in cells]
    return {
        "variant": name,
        "ratio": ratio,
        "perplexity": mean(perplexities),
        "perplexity_spread": stdev(perplexities) if len(cells) > 1 else None,
        "kl": mean(divergences),
        "kl_spread": stdev(divergences) if len(cells) > 1 else None,
        "search_seconds": mean(cell["search_seconds"] for cell in cells),
        "repair_seconds": mean(cell["repair_seconds"] for cell in cells),
    }


if __name__ == "__main__":
    main()
