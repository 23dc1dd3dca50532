"""Draw the README's figure and print its table from the recorded results; nothing is measured here.

Reads `results/quality.json`, `results/recovery.json`, `results/speed.json` and `results/demo.json`; writes
`docs/figures/quality-size.svg`. Run it as `python -m benchmarks.figures`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

ROOT = Path(__file__).parent.parent
RESULTS, FIGURE = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures" / "quality-size.svg"
PAPER, DEFAULT, GLOBAL, TRAINED = (
    "HFPrune, as in the paper",
    "hifiprune, default",
    "hifiprune, `--allocation global`",
    "such a model after half an hour of `recover`",
)
VARIANTS = {PAPER: "hfprune", DEFAULT: "entropy-square, repaired", GLOBAL: "fisher, global, repaired"}
STYLE = {PAPER: ("#888888", "s"), DEFAULT: ("#2a78b5", "o"), GLOBAL: ("#c4492d", "D"), TRAINED: ("#3a8f3a", "*")}
TICKS = (25, 50, 100, 200, 400, 800)


def load(name: str) -> dict[str, Any]:
    """Read one file of results."""
    facts: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return facts


def quality() -> dict[str, dict[float, dict[str, float]]]:
    """Return perplexity and KL divergence by method and ratio."""
    rows = load("quality")["results"]
    cells = {
        method: {row["ratio"]: row for row in rows if row["variant"] == variant} for method, variant in VARIANTS.items()
    }
    trained = (row for row in load("recovery")["results"] if row["variant"].endswith("%, all weights, distilled"))
    return cells | {TRAINED: {row["ratio"]: row for row in trained}}


def table(ratio: float = 0.2) -> str:
    """Return the README's table: perplexity and KL divergence of each method at one ratio, as Markdown."""
    lines = ["| 20% of all parameters removed | perplexity | KL divergence |", "|---|---|---|"]
    lines.append(f"| dense model | {load('quality')['dense_perplexity']:.1f} | 0 |")
    for method, cells in quality().items():
        lines.append(f"| {method} | {cells[ratio]['perplexity']:.1f} | {cells[ratio]['kl']:.2f} |")
    return "\n".join(lines)


def sentences() -> list[str]:
    """Return the figures that the README's text states."""
    demo, dense, cells = load("demo")["results"], load("quality")["dense_perplexity"], quality()
    metrics, size = demo["metrics"], demo["parameters"]
    near = metrics["perplexity"]["value"] / metrics["dense_perplexity"]["value"]
    far, wide, trained = (cells[method][0.2]["perplexity"] / dense for method in (DEFAULT, GLOBAL, TRAINED))
    (prefill,) = (
        workload["models"]["20%"]["first"]["speedup"]["median"]
        for workload in load("speed")["workloads"]
        if (workload["workload"]["batch_size"], workload["workload"]["length"]) == (1, 512)
    )
    answers = demo["continuations"][0]
    return [
        f"{size['before'] / 1e6:.1f} to {size['after'] / 1e6:.1f} million parameters",
        f"The default multiplies perplexity by {far:.1f}, `--allocation global` by {wide:.1f}",
        f"by {trained:.1f} after half an hour of training",
        f"by {near:.1f} in the demo, on text like its calibration text",
        f"a prompt of 512 tokens is read {prefill:.2f} times as fast",
        f"the same next token in {metrics['top1_agreement']['value']:.0%} of all positions",
        f'"{answers["prompt"]}" with "{answers["dense"].partition(".")[0]}."',
        f'the pruned one with "{answers["pruned"].partition(".")[0]}."',
    ]


def draw() -> Figure:
    """Draw perplexity against size: a line a method, the dense model as a point."""
    dense, size = load("quality")["dense_perplexity"], load("demo")["results"]["parameters"]["before"] / 1e6
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for method, cells in quality().items():
        color, marker = STYLE[method]
        line = "" if method == TRAINED else "-"
        x, y = [size * (1 - ratio) for ratio in cells], [cell["perplexity"] for cell in cells.values()]
        size_of_marker = 11 if method == TRAINED else 6
        axes.plot(x, y, marker + line, color=color, label=method.replace("`", ""), markersize=size_of_marker)
    axes.plot([size], [dense], "o", color="black", label="dense model")
    axes.axhline(dense, color="black", linewidth=0.6, linestyle=":")
    axes.set_yscale("log")
    axes.set_yticks(TICKS, [f"{tick:,}" for tick in TICKS])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("million parameters kept (SmolLM2-135M-Instruct)")
    axes.set_ylabel("perplexity on WikiText-2, lower is better")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Write the figure and print the table and the sentences."""
    FIGURE.parent.mkdir(exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": FIGURE.stem}):
        draw().savefig(FIGURE, metadata={"Date": None}, facecolor="white")
    sys.stdout.write("\n".join([table(), *sentences(), ""]))


if __name__ == "__main__":
    main()
