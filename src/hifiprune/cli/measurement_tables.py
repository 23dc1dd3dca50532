"""Print what `evaluate`, `bench`, `compare` and `ablate` measured, each followed by the next step."""

import math
from pathlib import Path

from rich.table import Table

from hifiprune.cli.tables import new_table, show_costs
from hifiprune.commands.next_steps import free_name, next_is_pruning, next_is_showing, next_step
from hifiprune.evaluation.fidelity import METRICS
from hifiprune.formatting import (
    format_accuracy,
    format_interval,
    format_items,
    format_speedup,
    megabytes,
    short_names,
    width_range,
)
from hifiprune.progress import console, how_many
from hifiprune.reports.card_metadata import CARD
from hifiprune.results import Accuracy, BenchResults, Estimate, EvaluateResults, Measured, TimedWorkload, Timing
from hifiprune.run_record import RunRecord
from hifiprune.study_results import AblateResults, CompareResults, Summary


def evaluated(record: RunRecord[EvaluateResults], output: str | Path | None, *, card: bool) -> None:
    """Print the results of `evaluate`, and where they are stored."""
    results = record.results
    measured = {name: model.metrics for name, model in results.models.items() if model.metrics}
    if measured:
        table = new_table("metric", *(short_names(measured) if len(measured) > 1 else ["value"]), "meaning")
        for metric in next(iter(measured.values())):
            label, meaning = METRICS[metric]
            table.add_row(label, *(format_interval(metrics[metric], ".4g") for metrics in measured.values()), meaning)
        console().print(table)
        size = f"{results.windows} windows of {results.positions} tokens"
        console().print(f"{size}; in brackets 95% intervals by bootstrap over windows")
    if results.items is not None:
        _answered(results.models, results.items)
    models = record.arguments["models"]
    written = [str(output)] * bool(output) + [f"{name}/{CARD}" for name in models if card]
    if written:
        console().print(f"Wrote {', '.join(written)}.", markup=False, soft_wrap=True, highlight=False)
    next_is_showing(models, output, card=card)


def _answered(models: dict[str, Measured], items: dict[str, tuple[int, int]]) -> None:
    """Print task results: a row per task, a column per model."""
    table = new_table("task", "metric", "items", *short_names(models))
    for key in next(iter(models.values())).accuracies:
        task, _, metric = key.partition("/")
        cells = [_accuracy(model.accuracies[key], (model.differences or {}).get(key)) for model in models.values()]
        table.add_row(task, metric, format_items(items, task), *cells)
    console().print(table)
    remarks = ["No examples in the prompts; accuracy with its standard error."]
    if any(asked != there for asked, there in items.values()):
        remarks.append("Of larger tasks a random choice of items was asked, the same of every model.")
    if len(models) > 1:
        reference, *_ = short_names(models)
        remarks.append(f"In brackets the difference to {reference} on the same items, with its 95% interval.")
    console().print(" ".join(remarks), markup=False)


def _accuracy(accuracy: Accuracy, gain: Estimate | None) -> str:
    interval = "" if gain is None or gain.low is None else f", {gain.low:+.3f} to {gain.high:+.3f}"
    return format_accuracy(accuracy) + ("" if gain is None else f" ({gain.value:+.3f}{interval})")


def benched(record: RunRecord[BenchResults]) -> None:
    """Print the results of `bench`."""
    results = record.results
    names, models = short_names(results.models), results.models.values()
    table = new_table("", *names)
    table.add_row("parameters", *(f"{model.parameters:,}" for model in models))
    table.add_row("weight files", *(megabytes(model.weight_bytes) for model in models))
    table.add_row("MLP width", *(width_range(model.widths) for model in models))
    table.add_row(
        "peak memory", *(megabytes(model.peak_gpu_memory_bytes or model.peak_memory_bytes) for model in models)
    )
    console().print(table)
    for timed in results.workloads:
        console().print(_timed_table(timed, names))
    rounds = record.arguments["rounds"]
    said = f"Medians over {how_many(rounds, 'round')} in fresh processes, "
    said += f"{results.dtype} on {results.device}, {how_many(results.threads, 'thread')}; in brackets the "
    remarks = [f"{said}speed-up that operations promise, and the share of the promised saving that was reached."]
    console().print("\n".join([*remarks, *results.remarks]), markup=False, soft_wrap=True)


def _timed_table(timed: TimedWorkload, names: list[str]) -> Table:
    """Return the table of one workload: prefill and decode, a column per model."""
    work, models = timed.workload, list(timed.models.values())
    title = f"prefill {work.batch_size} x {work.length} tokens, decode {work.new_tokens}"
    table = new_table("", *names, title=title + (", compiled" if work.compiled else ""))
    parts = {
        "prefill": (work.batch_size * work.length, [model.first for model in models]),
        "decode": (work.batch_size, [model.later for model in models]),
    }
    for part, (tokens, timings) in parts.items():
        table.add_row(f"{part}, operations a token", *(f"{one.operations / tokens / 1e9:.3g} G" for one in timings))
        table.add_row(f"{part}, tokens a second", *(f"{tokens / one.seconds.median:,.1f}" for one in timings))
        table.add_row("  speed-up", "", *(_gain(timing) for timing in timings[1:]))
    table.add_row("to the first token", *(f"{model.first.seconds.median:.3g} s" for model in models))
    return table


def _gain(timing: Timing) -> str:
    speedup, share = format_speedup(timing)
    return f"{speedup} ({timing.promised:.2f}{', ' * bool(share)}{share})"


def compared(record: RunRecord[CompareResults], model: str, output: Path) -> None:
    """Print the results of `compare`: for each ratio a table per text, and one of the tasks."""
    results, seeds = record.results, record.arguments["seeds"]
    criteria = list(dict.fromkeys(row.criterion for row in results.summary))
    titles = [f"{text.source}, {' x '.join(map(str, text.windows))} tokens" for text in results.texts]
    dense = [{name: metric.value for name, metric in metrics.items()} for metrics in results.dense]
    if results.dense_tasks:
        titles, dense = [*titles, "zero-shot tasks"], [*dense, results.dense_tasks]
    for number, title in enumerate(titles):
        console().print(f"{title}: mean and standard deviation over {seeds} draws", markup=False, soft_wrap=True)
        for ratio, (width, reached) in results.widths.items():
            rows = [row for row in results.summary if (row.text, f"{row.ratio:g}") == (number, ratio)]
            heading = f"ratio {ratio}: width {width:,}, {reached:.2%} removed"
            console().print(compared_table(rows, dense[number], heading))
    if criteria[1:]:
        console().print(
            f"In brackets the paired difference to {criteria[0]}, of perplexity as a factor, with its 95% interval "
            "over draws and windows; compare.json has those of all metrics."
        )
    show_costs(record)
    next_is_best(results, record.arguments["calibration"]["seed"], record.arguments["round_to"], model, output)


def next_is_best(results: CompareResults, seed: int, rounding: int, model: str, output: Path) -> None:
    """Tell how to prune by the scores that did best at the lowest ratio."""
    ratio = min(row.ratio for row in results.summary)
    measured = [row for row in results.summary if (row.text, row.ratio) == (0, ratio)]
    metric = "kl" if any(row.metric == "kl" for row in measured) else "perplexity"
    best = min((row for row in measured if row.metric == metric), key=lambda row: row.mean).criterion
    files = [output / "scores" / f"{label}-seed{seed}.safetensors" for label in (f"{best}-{ratio:g}", best)]
    scores = next(file for file in files if file.is_file())
    options = [] if rounding == 128 else ["--round-to", rounding]
    next_step("prune", model, "--scores", scores, "--ratio", f"{ratio:g}", *options, "--output", free_name("smaller"))


def compared_table(rows: list[Summary], dense: dict[str, float], title: str) -> Table:
    """Return a row for the dense model and each criterion, a column per metric."""
    wanted = ("perplexity", "kl", "js_distance", "top1_agreement")
    metrics = [m for m in dict.fromkeys(row.metric for row in rows) if m in wanted or m not in METRICS]
    table = new_table("criterion", *(METRICS[m][0] if m in METRICS else m for m in metrics), title=title)
    table.add_row("dense", *(f"{dense[metric]:.4g}" for metric in metrics))
    cells = {(row.criterion, row.metric): compared_cell(row) for row in rows}
    for criterion in dict.fromkeys(row.criterion for row in rows):
        table.add_row(criterion, *(cells[criterion, metric] for metric in metrics))
    return table


def compared_cell(row: Summary) -> str:
    """Format mean and spread; for the main metrics also the difference to the first criterion, on a second line."""
    text = f"{row.mean:.4g}" + ("" if row.spread is None else f" ± {row.spread:.2g}")
    value, low, high = row.difference.value, row.difference.low, row.difference.high
    if row.metric not in ("perplexity", "kl") or low is None or high is None or not any((value, low, high)):
        return text
    if row.metric == "perplexity":
        return f"{text}\n(x{math.exp(value):.3g}, {math.exp(low):.3g} to {math.exp(high):.3g})"
    return f"{text}\n({value:+.2g}, {low:+.2g} to {high:+.2g})"


def ablated(record: RunRecord[AblateResults], model: str, scores: list[Path]) -> None:
    """Print the results of `ablate`."""
    correlations = record.results.correlations
    kinds = list(next(iter(correlations.values())))
    headings = [f"{kind}, {'within layers' if inside else 'all layers'}" for kind in kinds for inside in (True, False)]
    table = new_table("criterion", *headings)
    for name, by_kind in correlations.items():
        parts = [part for kind in kinds for part in (by_kind[kind].within_layers, by_kind[kind].all_layers)]
        table.add_row(name, *(format_interval(part) for part in parts))
    console().print(table)
    console().print("Spearman's rank correlation of scores with the measured KL divergence, with 95% intervals")
    show_costs(record)
    within = [by_kind[kinds[0]].within_layers.value if kinds else None for by_kind in correlations.values()]
    best = within.index(max((value for value in within if value is not None), default=None))
    next_is_pruning(model, scores=scores[best])
