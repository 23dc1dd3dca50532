"""What half an hour of recovery training on one core wins back on SmolLM2-135M-Instruct, for each variant.

The model is pruned by 20 and 30% with the best training-free setting (`fisher`, one threshold for all layers, repaired;
`quality.py`), calibrated on C4; then trained on labels (instructions) or distilled from
the dense model (C4), by LoRA or all weights, and the dense model alike as the control. Measured on WikiText-2 test
(perplexity) and documents of C4 that nothing was trained on (KL divergence). Writes `results/recovery.json` and
`docs/figures/recovery.svg`. Takes hours; interrupted, it goes on where it stopped. Processes can share variants:

    OMP_NUM_THREADS=1 python benchmarks/recovery.py --variants "20%, LoRA, labels" "20%, LoRA, distilled"
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console

import hifiprune as hp
from hifiprune.cli.console import speaking
from hifiprune.commands.demo import fetch_smollm2
from hifiprune.config import AllocationConfig, TrainingConfig
from hifiprune.evaluation.fidelity import Reference, measure_windows
from hifiprune.evaluation.text import held_windows
from hifiprune.io.atomic import replacing
from hifiprune.models.find_checkpoint import find_checkpoint

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
C4, ANSWERS = DATA / "c4" / "c4_documents.jsonl", DATA / "instruct"
CALIBRATION = hp.Calibration(str(C4), 41)
BASE = TrainingConfig(  # until time is up
    learning_rate=5e-4, epochs=100.0, seq_len=512, gradient_accumulation_steps=2, evaluate_every=20, held_out=0.02
)


@dataclass(frozen=True)
class Variant:
    """What is trained, on what, and how."""

    ratio: float
    training: TrainingConfig | None = None
    data: Path = C4
    more: dict[str, Any] = field(default_factory=dict)


LORA, FULL = BASE, replace(BASE, method="full", learning_rate=1e-4)
LABELS = replace(BASE, distill_weight=0.0)
VARIANTS = {
    "20%, not trained": Variant(0.2),
    "20%, LoRA, labels": Variant(0.2, LABELS, ANSWERS),
    "20%, LoRA, distilled": Variant(0.2, LORA),
    "20%, all weights, distilled": Variant(0.2, FULL),
    "30%, not trained": Variant(0.3),
    "30%, all weights, distilled": Variant(0.3, FULL),
    "dense, all weights, labels of C4": Variant(0.2, replace(FULL, distill_weight=0.0), more={"control": True}),
}


def main() -> None:
    """Run or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="of training for each variant")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    asked = parser.parse_args()
    dense_folder = fetch_smollm2(ROOT / ".cache" / "smollm2")
    folder = ROOT / ".cache" / f"recovery-{asked.minutes:g}"
    folder.mkdir(exist_ok=True)
    checkpoint = find_checkpoint(str(dense_folder))
    tokenizer = checkpoint.tokenizer()
    wikitext = held_windows(hp.Text(str(DATA / "wikitext-2" / "wiki.test.raw"), 1024, 24), tokenizer)
    held = held_windows(hp.Text(str(DATA / "c4" / "c4_short.jsonl"), 512, 8), tokenizer)
    dense = checkpoint.load()
    reference, start = Reference.of(dense, held), float(measure_windows(dense, wikitext)["perplexity"].mean())
    rows: list[dict[str, Any]] = []
    for name in asked.variants:
        path = folder / f"{name.replace('%', '').replace(', ', '-').replace(' ', '-')}.json"
        if not path.is_file():
            row = run(VARIANTS[name], dense_folder, folder, path.with_suffix(""), asked.minutes)
            model = find_checkpoint(row.pop("folder")).load()
            row["log_perplexity"] = float(measure_windows(model, wikitext)["perplexity"].mean())
            row["kl"] = float(measure_windows(model, held, reference)["kl"].mean())
            with replacing(path) as temporary:
                temporary.write_text(json.dumps({"variant": name, **row}))
        rows.append(json.loads(path.read_text()))
        Console().print(name, math.exp(rows[-1]["log_perplexity"]), rows[-1]["kl"])
    before = {row["ratio"]: row["log_perplexity"] for row in rows if "not trained" in row["variant"]}
    for row in rows:
        row["perplexity"] = math.exp(row["log_perplexity"])
        if row["ratio"] in before and "dense" not in row["variant"]:
            gap = before[row["ratio"]] - start
            row["gap_closed"] = (before[row["ratio"]] - row["log_perplexity"]) / gap
    facts = {"arguments": vars(asked), "dense_perplexity": math.exp(start), "results": rows}
    (ROOT / "benchmarks" / "results" / "recovery.json").write_text(json.dumps(facts, indent=1) + "\n")
    draw(rows)


def run(variant: Variant, dense: Path, folder: Path, output: Path, minutes: float) -> dict[str, Any]:
    """Prune, unless that was done, and train; where the result is, and how it went."""
    pruned, scores = folder / f"pruned-{variant.ratio:g}", folder / "pruned-0.2" / "hifiprune" / "scores.safetensors"
    if not pruned.exists():
        budget, known = hp.Budget(ratio=variant.ratio), scores if scores.exists() else None
        hp.prune(
            str(dense),
            pruned,
            hp.PruneConfig(budget, CALIBRATION, round_to=1, allocation=AllocationConfig("global"), scores=known),
        )
    if variant.training is None:
        return {"ratio": variant.ratio, "folder": str(pruned)}
    training = replace(variant.training, max_minutes=minutes)
    if not output.exists():
        hp.recover(str(pruned), output, str(variant.data), hp.RecoverConfig(training, **variant.more))
    results = json.loads((output / "run.json").read_text())["results"]
    kept = ("held_out_perplexity", "steps", "best_step", "trouble", "losses", "held_out_losses")
    facts = {"threads": torch.get_num_threads(), "data": variant.data.name, "training": asdict(training)}
    return {"ratio": variant.ratio, "folder": str(output), **facts, **{name: results[name] for name in kept}}


def table(facts: dict[str, Any]) -> str:
    """Results as Markdown."""
    lines = ["| | optimizer steps | perplexity | gap closed | KL |", "|---|---|---|---|---|"]
    for row in facts["results"]:
        steps = f"{row['best_step']} of {row['steps']}" if "steps" in row else ""
        closed = f"{row['gap_closed']:.0%}" if row.get("gap_closed") else ""
        lines.append(f"| {row['variant']} | {steps} | {row['perplexity']:.1f} | {closed} | {row['kl']:.3f} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]]) -> None:
    """Held-out perplexity over the steps, relative to that at the start, a line for each variant."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for row in rows:
        if "held_out_losses" in row:
            steps, losses = zip(*row["held_out_losses"], strict=True)
            axes.plot(steps, [math.exp(loss - losses[0]) for loss in losses], label=row["variant"])
    axes.set(xlabel="optimizer step", ylabel="perplexity of held-out rows, relative to the start")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(ROOT / "docs" / "figures" / "recovery.svg", metadata={"Date": None}, bbox_inches="tight")


if __name__ == "__main__":
    with speaking():
        main()
