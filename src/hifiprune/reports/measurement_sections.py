"""Sections on what was measured: quality against size, accuracy on tasks, criteria compared, and speed."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from hifiprune.evaluation.fidelity import METRICS
from hifiprune.formatting import format_items, format_speedup, short_names
from hifiprune.records import BenchRun, CompareRun, EvaluateRun
from hifiprune.reports.figures import (
    BLACK,
    add_legend,
    draw_bars,
    error_bars,
    label,
    log_scale,
    new_axes,
)
from hifiprune.reports.plots import draw_criteria
from hifiprune.reports.runs import Run
from hifiprune.reports.sections import Plot, Section, new_plot
from hifiprune.results import BenchResults, Estimate, EvaluateResults, Measured
from hifiprune.study_results import CompareResults

QUALITY = ("perplexity", "kl")


def quality(runs: Sequence[Run]) -> Section:
    """Plot perplexity and divergence against size, for all models measured on the same text."""
    section = Section("Quality against size")
    texts: dict[str, list[EvaluateResults]] = {}
    for run in runs:
        if isinstance(run.record, EvaluateRun) and run.record.results.windows:
            texts.setdefault(run.record.measured_on, []).append(run.record.results)
    for measured_on, group in texts.items():
        rows = {name: row for results in group for name, row in _measured(results)}
        labels = dict(zip(rows, short_names(rows), strict=True))
        for metric in QUALITY:
            points = {
                labels[name]: (row.parameters / 1e6, row.metrics[metric])
                for name, row in rows.items()
                if row.metrics and metric in row.metrics
            }
            if points:
                section.plots.append(_against_size(metric, points, measured_on, f"{metric}-{len(section.plots)}"))
    return section


def _measured(results: EvaluateResults) -> Iterator[tuple[str, Measured]]:
    """Yield parameters and metrics of every model by name, and of the dense reference."""
    rows = {name: row for name, row in results.models.items() if row.metrics}
    if results.dense:
        (first, *_) = (row.metrics for row in rows.values() if row.metrics)
        metrics = {"perplexity": first["dense_perplexity"], "kl": Estimate(0.0, None, None)}
        yield results.dense.name, Measured(results.dense.parameters, metrics)
    yield from rows.items()


def _against_size(metric: str, points: dict[str, tuple[float, Estimate]], measured_on: str, id_: str) -> Plot:
    """Plot one marker per model."""
    title = METRICS[metric][0]
    axes = new_axes("million parameters", title)
    table = [["checkpoint", "million parameters", title, "95% interval"]]
    for name, (size, estimate) in points.items():
        axes.errorbar([size], [estimate.value], error_bars([estimate]), fmt="o", capsize=3, label=label(name))
        table.append([name, f"{size:,.1f}", f"{estimate.value:.4g}", _interval(estimate)])
    add_legend(axes)
    alt = f"{title}: each checkpoint against its parameters, with 95% intervals, on {measured_on}."
    return new_plot(id_, alt, axes, table)


def tasks(runs: Sequence[Run]) -> Section:
    """Plot the accuracy on every task, one bar per model."""
    section = Section("Zero-shot accuracy", ["No examples in the prompts. Error bars are 95% intervals."])
    for run in runs:
        if isinstance(run.record, EvaluateRun) and run.record.results.items:
            section.plots.append(_tasks(run.name, run.record.results, run.record.results.items))
    return section


def _tasks(run: str, results: EvaluateResults, items: dict[str, tuple[int, int]]) -> Plot:
    """Plot the accuracies of one evaluation."""
    models = dict(zip(short_names(results.models), results.models.values(), strict=True))
    accuracies = {name: model.accuracies for name, model in models.items() if model.tasks}
    names = [*next(iter(accuracies.values()))]
    axes, table = new_axes("accuracy", ""), [["task", "items", *accuracies]]
    draw_bars(axes, names, {model: [*by_task.values()] for model, by_task in accuracies.items()})
    for task in names:
        cells = [f"{by_task[task].value:.3f} ({_interval(by_task[task])})" for by_task in accuracies.values()]
        table.append([task, format_items(items, task.partition("/")[0]), *cells])
    alt = f"Accuracy of {', '.join(accuracies)} on each task, as bars with 95% intervals."
    if any(asked != there for asked, there in items.values()):
        most = max(asked for asked, _ in items.values())
        alt += f" Of each task at most {most:,} items were asked, a random choice, the same of every model."
    return new_plot(f"tasks-{run}", alt, axes, table)


def criteria(runs: Sequence[Run]) -> Section:
    """Plot quality against ratio from `compare`."""
    section = Section("Criteria compared", ["Error bars are standard deviations over draws of the calibration text."])
    for run in runs:
        if isinstance(run.record, CompareRun):
            results = run.record.results
            for text in range(len(results.texts)):
                measured = {row.metric for row in results.summary if row.text == text}
                section.plots += [_criteria(run.name, results, text, one) for one in QUALITY if one in measured]
    return section


def _criteria(run: str, results: CompareResults, text: int, metric: str) -> Plot:
    """Plot one line per criterion."""
    title = METRICS[metric][0]
    rows = [row for row in results.summary if (row.text, row.metric) == (text, metric)]
    axes, table = new_axes("parameters removed", title), [["criterion", "parameters removed", title, "over draws"]]
    draw_criteria(axes, rows, results)
    log_scale(axes)
    add_legend(axes)
    for name in dict.fromkeys(row.criterion for row in rows):
        for row in (row for row in rows if row.criterion == name):
            spread = "" if row.spread is None else f"± {row.spread:.2g}"
            table.append([name, f"{row.ratio:.0%}", f"{row.mean:.4g}", spread])
    alt = f"{title}: on {Path(results.texts[text].source).name}, a line a criterion; lower is better."
    if metric == "perplexity":
        alt += " The dotted line is the dense model."
    return new_plot(f"{metric}-{run}-{text}", alt, axes, table)


def speed(runs: Sequence[Run]) -> Section:
    """Show speed-ups of prefill and decode beside the theoretical ones."""
    section = Section("Speed")
    for run in runs:
        if isinstance(run.record, BenchRun):
            section.texts += run.record.results.remarks
            section.plots.append(_speed(run.name, run.record.results))
    return section


def _speed(run: str, results: BenchResults) -> Plot:
    """Plot the speed-ups of one benchmark, a bar for each workload, prefill and decode."""
    table = [["workload", "checkpoint", "speed-up, lowest to highest", "theoretical", "share"]]
    names, bars = short_names(results.models)[1:], {}
    for part in ("prefill", "decode"):
        for timed in results.workloads:
            work, (_, *models) = timed.workload, timed.models.values()
            where = f"{part}, {work.batch_size} x {work.length}" + ", compiled" * work.compiled
            timings = [model.first if part == "prefill" else model.later for model in models]
            bars[where] = [Estimate(one.speedup.median, one.speedup.low, one.speedup.high) for one in timings]
            for name, timing in zip(names, timings, strict=True):
                speedup, share = format_speedup(timing)
                table.append([where, name, speedup, f"{timing.promised:.2f}", share])
    axes = new_axes("times as fast as dense", "")
    draw_bars(axes, names, bars)
    axes.axvline(1, color=BLACK, linestyle=":")
    alt = "Prefill and decode of each checkpoint, times as fast as the dense model; error bars span the rounds."
    return new_plot(f"speed-{run}", alt, axes, table)


def _interval(estimate: Estimate) -> str:
    return "" if estimate.low is None else f"{estimate.low:.4g} to {estimate.high:.4g}"
