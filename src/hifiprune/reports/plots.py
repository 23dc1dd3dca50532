"""Plots of comparisons and ablations, each as PNG and SVG."""

import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hifiprune.evaluation.fidelity import METRICS
from hifiprune.reports.figures import draw_heat, write_shares
from hifiprune.study_results import AblateResults, AblationTrial, CompareResults, Correlations, Overlap, Summary

QUALITY = ("perplexity", "kl")
MARKERS = "osD^vP*X<>hp8d"
FAR = 2.0  # times the best at the same ratio: what is worse would flatten the plot


def draw_comparison(results: CompareResults, folder: Path) -> None:
    """Draw quality against ratio, the share of the score in each layer, and the overlap of kept neurons."""
    for name, rows in _by_text(results.summary):
        _save(_quality(rows, results), folder / name)
    if results.mass:
        _save(_mass(results.mass), folder / "mass")
    _save(_overlap(results.overlap), folder / "overlap")


def draw_ablation(results: AblateResults, folder: Path) -> None:
    """Draw the measured damage of each trial against each criterion's score."""
    for kind in ("single", "groups"):
        trials = [trial for trial in results.trials if (len(trial.neurons) == 1) == (kind == "single")]
        if trials:
            _save(_damage(trials, results.correlations, kind), folder / f"ablation-{kind}")


def _by_text(summary: list[Summary]) -> Iterator[tuple[str, list[Summary]]]:
    """Yield the rows of each plotted metric on each text, with a name for the plot."""
    for metric in QUALITY:
        texts = sorted({row.text for row in summary if row.metric == metric})
        for text in texts:
            rows = [row for row in summary if (row.metric, row.text) == (metric, text)]
            yield metric if len(texts) == 1 else f"{metric}-{text + 1}", rows


def _quality(rows: list[Summary], results: CompareResults) -> Figure:
    figure, axes = _figure(7.5, 5.0)
    draw_criteria(axes, rows, results)
    axes.set_yscale("log")
    axes.set_xlabel("parameters removed")
    axes.set_ylabel(f"{METRICS[rows[0].metric][0]} on {Path(results.texts[rows[0].text].source).name}")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_criteria(axes: Axes, rows: list[Summary], results: CompareResults) -> None:
    """Draw one line per criterion, with the standard deviation over draws; those far above the best are only named.

    Args:
        axes: to draw on.
        rows: of one metric on one text, from the results of `compare`.
        results: of `compare`.
    """
    metric, text = rows[0].metric, rows[0].text
    ratios = sorted({row.ratio for row in rows})
    ceiling = {ratio: FAR * min(row.mean for row in rows if row.ratio == ratio) for ratio in ratios}
    for number, name in enumerate(dict.fromkeys(row.criterion for row in rows)):
        points = sorted((row.ratio, row.mean, row.spread or 0.0) for row in rows if row.criterion == name)
        shown = [point for point in points if point[1] <= ceiling[point[0]]]
        label = name if len(shown) == len(points) else f"{name} (far above)"
        x, y, spread = zip(*shown, strict=True) if shown else ((), (), ())
        color, marker = mpl.colormaps["tab20"](number % 20), MARKERS[number % len(MARKERS)]
        axes.errorbar(x, y, spread, label=label, capsize=3, color=color, marker=marker)
    if metric == "perplexity":
        axes.axhline(results.dense[text][metric].value, color="black", linestyle=":", label="dense")
    axes.set_xticks(ratios, [f"{ratio:.0%}" for ratio in ratios])


def _mass(mass: dict[str, list[float]]) -> Figure:
    figure, axes = _figure(8.0, 1.5 + 0.3 * len(mass))
    draw_heat(axes, list(mass.values()), list(mass))
    axes.set_title("share of the score in each layer", fontsize=9)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _overlap(overlap: dict[str, Overlap]) -> Figure:
    """Draw the overlap for each ratio: between criteria off the diagonal, between seeds of a criterion on it."""
    criteria = list(next(iter(overlap.values())).seeds)
    size = 2.5 + 0.35 * len(criteria)
    figure = Figure(figsize=(size * len(overlap), size), layout="constrained")
    for number, (ratio, similarity) in enumerate(overlap.items()):
        axes = figure.add_subplot(1, len(overlap), number + 1)
        table = [list(row.values()) for row in similarity.criteria.values()]
        for place, between_seeds in enumerate(similarity.seeds.values()):
            table[place][place] = math.nan if between_seeds is None else between_seeds
        draw_heat(axes, table, criteria, (0.0, 1.0))
        axes.set_title(f"ratio {ratio}", fontsize=9)
        write_shares(axes, table, criteria, 6)
    figure.suptitle("Jaccard similarity of kept neurons; on the diagonal between draws", fontsize=9)
    return figure


def _damage(trials: list[AblationTrial], correlations: dict[str, dict[str, Correlations]], kind: str) -> Figure:
    columns = min(4, len(correlations))
    rows = -(-len(correlations) // columns)
    figure = Figure(figsize=(3.2 * columns, 3 * rows), layout="constrained")
    for number, (name, by_kind) in enumerate(correlations.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        points = ((trial.scores[name], trial.kl, trial.layer) for trial in trials)
        scores, damage, layers = zip(*points, strict=True)
        shown = axes.scatter(scores, damage, c=layers, s=12)
        rank = by_kind[kind].within_layers.value if kind in by_kind else None
        axes.set_title(f"{name}: rank correlation {'none' if rank is None else f'{rank:.2f}'}", fontsize=9)
        axes.set(xscale="log" if min(scores) > 0 else "linear", yscale="log")
        axes.tick_params(labelsize=7)
    figure.supxlabel("score", fontsize=9)
    figure.supylabel("KL divergence once removed, nats", fontsize=9)
    figure.colorbar(shown, ax=figure.axes, label="layer")
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Figure, path: Path) -> None:
    """Write both formats; the same figure gives the same SVG."""
    figure.savefig(path.with_name(f"{path.name}.png"), dpi=150)
    with mpl.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path.with_name(f"{path.name}.svg"), metadata={"Date": None})
