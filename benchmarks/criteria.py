"""Twelve criteria on SmolLM2-135M-Instruct, or `--model gemma3-270m`: compared by quality, tested by true removals.

Calibrated on C4, perplexity on WikiText-2 test, fidelity on other documents of C4, 3 draws of the calibration windows.
Writes `results/criteria.json` and `results/ablation.json`, with the model's name for Gemma. Takes about three hours on
2 cores; interrupted, it goes on where it stopped. What it made is kept in `.cache/criteria` and `.cache/ablation`:
remove these to make it anew.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.quality import MODELS
from hifiprune.cli.console import speaking
from hifiprune.commands.ablate import ablate
from hifiprune.commands.compare import compare
from hifiprune.config.study import AblateConfig, CompareConfig
from hifiprune.config.texts import Calibration, Text

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DATA = ROOT.parent / "shared" / "data"
CRITERIA = (
    "hfprune", "entropy-square", "cross-entropy", "cross-entropy-square", "self-distillation", "fisher", "wanda-sp",
    "flap", "minitron", "magnitude", "ppm", "random",
)  # fmt: skip
RATIOS = (0.2, 0.3, 0.4)
WINDOWS, SEEDS = 12, 3
CORRELATIONS = (("single", "within_layers"), ("groups", "all_layers"))
HELD_OUT = Text(str(DATA / "c4" / "c4_short.jsonl"), 512, 8)


def main() -> None:
    """Run or go on with both; keep the figures without the values by window."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", choices=list(MODELS))
    name = parser.parse_args().model
    suffix = "" if name == "smollm2" else f"-{name}"
    model = str(MODELS[name](ROOT / ".cache" / name))
    compared, ablated = ROOT / ".cache" / f"criteria{suffix}", ROOT / ".cache" / f"ablation{suffix}"
    if not compared.exists():
        calibration = Calibration(str(DATA / "c4" / "c4_documents.jsonl"), WINDOWS, 1024)
        texts = (Text(str(DATA / "wikitext-2" / "wiki.test.raw"), 1024, 24, fidelity=False), HELD_OUT)
        compare(model, compared, CompareConfig(calibration, texts, CRITERIA, RATIOS, seeds=SEEDS, round_to=1))
    names = [f"{name}-0.2" if name == "self-distillation" else name for name in CRITERIA]
    scores = [compared / "scores" / f"{name}-seed0.safetensors" for name in names]
    text = Text(HELD_OUT.source, HELD_OUT.seq_len, 2)
    if not ablated.exists():
        ablate(model, ablated, AblateConfig(tuple(scores), text, neurons=96, groups=48))
    for name, file in (("criteria", compared / "compare.json"), ("ablation", ablated / "ablate.json")):
        record = json.loads(file.read_text().replace(f"{ROOT.parent}/", ""))
        record["results"] = {key: value for key, value in record["results"].items() if key not in ("cells", "trials")}
        (RESULTS / f"{name}{suffix}.json").write_text(json.dumps(record, indent=1) + "\n")
    if suffix:
        return
    for plot, name in (("perplexity-1", "perplexity"), ("kl", "kl")):
        shutil.copy(compared / f"{plot}.svg", ROOT / "docs" / "figures" / f"criteria-{name}.svg")


def table(document: dict[str, Any], ablation: dict[str, Any]) -> str:
    """Return mean and standard deviation over draws, and rank correlations, as Markdown."""
    rows = document["results"]["summary"]
    values = {(row["criterion"], row["metric"], row["text"], row["ratio"]): row for row in rows}
    heads = [f"{what} at {ratio:.0%}" for ratio in RATIOS for what in ("perplexity", "KL")]
    heads += ["neurons", "groups"]
    lines = [f"| criterion | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    order = sorted(CRITERIA, key=lambda name: float(values[name, "kl", 1, RATIOS[0]]["mean"]))
    for name in order:
        cells = [values[name, *metric, ratio] for ratio in RATIOS for metric in (("perplexity", 0), ("kl", 1))]
        shown = [_shown(cell["mean"], cell["spread"]) for cell in cells]
        found = ablation["results"]["correlations"][name]
        shown += [f"{found[kind][where]['value']:.2f}" for kind, where in CORRELATIONS]
        lines.append(f"| `{name}` | {' | '.join(shown)} |")
    return "\n".join(lines)


def _shown(mean: float, spread: float) -> str:
    if mean >= 10_000:
        return "over 10,000"
    return " ± ".join(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in (mean, float(f"{spread:.2g}")))


if __name__ == "__main__":
    with speaking():
        main()
