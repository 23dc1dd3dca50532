"""Print results as tables on standard output, each followed by the next step."""

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from hifiprune.commands.next_steps import (
    free_name,
    next_is_measuring,
    next_is_pruning,
    next_is_showing,
    next_is_without_dry_run,
    next_step,
)
from hifiprune.evaluation.fidelity import METRICS
from hifiprune.formatting import (
    accuracies,
    format_accuracy,
    format_interval,
    format_items,
    format_speedup,
    megabytes,
    short_names,
    width_range,
)
from hifiprune.io.atomic import disk_size
from hifiprune.models.lineage import dense_of, pruning_of
from hifiprune.progress import console, duration, how_many
from hifiprune.reports.card_metadata import CARD
from hifiprune.run_record import RunRecord


def pruned(record: RunRecord, output: Path) -> None:
    """Print the result of `prune`."""
    results, table = record.results, _table("", "dense", "pruned")
    parameters, width, size = results["parameters"], results["width"], results["weight_bytes"]
    table.add_row("parameters", f"{parameters['before']:,}", f"{parameters['after']:,}")
    table.add_row("MLP width", f"{width['before']:,}", width_range(width["after"]))
    table.add_row("weight files", megabytes(size["before"]), megabytes(size["after"]))
    table.add_row("asked", "", results["asked"])
    table.add_row("parameters removed", "", f"{results['ratio']['reached']:.2%}")
    table.add_row("neurons removed", "", f"{results['neuron_ratio_reached']:.2%}")
    if "repair" in results:
        taken = [refit for refit in results["repair"] if refit["damping"] is not None]
        table.add_row("maps repaired", "", f"{len(taken)} of {len(results['repair'])}")
        left, plain = (sum(refit[name] for refit in results["repair"]) for name in ("error", "plain_error"))
        if plain > 0:  # what was removed did something
            table.add_row(
                "residual error after repair",
                "",
                f"{left / plain:.1%} of the unrepaired cut's, on held-out windows (lower is better)",
            )
    _show(table)
    _costs(record)
    next_is_measuring(output, record.arguments["model"], record.arguments["calibration"])


def scored(record: RunRecord, model: str, output: Path) -> None:
    """Print the result of `score`."""
    results, table = record.results, _table("", "")
    table.add_row("criterion", results["criterion"])
    if "windows" in results["scoring"]:
        table.add_row("windows x tokens", f"{results['scoring']['windows']} x {results['scoring']['positions']}")
    if results["objective_nats"] is not None:
        table.add_row("mean objective", f"{results['objective_nats']:.4f} nats")
    _show(table)
    _costs(record)
    next_is_pruning(model, scores=output, calibration=record.arguments["calibration"])


def foreseen(record: RunRecord) -> None:
    """Print the estimated costs of a run."""
    table = _table("stage", "seconds", "memory", "disk")
    for cost in record.expected:
        memory, disk = megabytes(cost["memory"]), megabytes(cost["disk"]) if cost["disk"] else ""
        table.add_row(cost["step"], f"{cost['seconds']:.1f} s", memory, disk)
    _show(table)
    console().print("Dry run: nothing written.")
    next_is_without_dry_run()


def recovered(record: RunRecord, output: Path) -> None:
    """Print the result of `recover`."""
    results, table = record.results, _table("", "before", "after")
    looks = [results["held_out_perplexity"][name] for name in ("before", "after")]
    table.add_row("held-out perplexity", *("not looked at" if look is None else f"{look:.4g}" for look in looks))
    table.add_row("optimizer steps", "", f"{results['steps']}, best at {results['best_step']}")
    _show(table)
    _costs(record)
    dense = record.arguments["teacher"] or dense_of(results["pruning"])
    next_is_measuring(output, dense, (pruning_of(results["pruning"]) or {}).get("arguments", {}).get("calibration"))


def settings(facts: dict[str, Any]) -> None:
    """Print settings by name."""
    table = _table("setting", "value")
    for name, value in facts.items():
        table.add_row(name.replace("_", "-"), ", ".join(value) if isinstance(value, tuple) else str(value))
    _show(table)


def evaluated(record: RunRecord, output: str | Path | None, *, card: bool) -> None:
    """Print the results of `evaluate`, and where they are stored."""
    results = record.results
    measured = {name: row["metrics"] for name, row in results["models"].items() if "metrics" in row}
    if measured:
        table = _table("metric", *(short_names(measured) if len(measured) > 1 else ["value"]), "meaning")
        for metric in next(iter(measured.values())):
            label, meaning = METRICS[metric]
            table.add_row(label, *(format_interval(metrics[metric], ".4g") for metrics in measured.values()), meaning)
        _show(table)
        size = f"{results['windows']} windows of {results['positions']} tokens"
        console().print(f"{size}; in brackets 95% intervals by bootstrap over windows")
    if "items" in results:
        _answered(results["models"], results["items"])
    models = record.arguments["models"]
    written = [str(output)] * bool(output) + [f"{name}/{CARD}" for name in models if card]
    if written:
        console().print(f"Wrote {', '.join(written)}.", markup=False, soft_wrap=True, highlight=False)
    next_is_showing(models, output, card=card)


def _answered(models: dict[str, dict[str, Any]], items: dict[str, list[int]]) -> None:
    """Print task results: a row per task, a column per model."""
    rows = {name: accuracies(row) for name, row in models.items()}
    table = _table("task", "metric", "items", *short_names(rows))
    for key in next(iter(rows.values())):
        task, _, metric = key.partition("/")
        gains = [models[name].get("differences", {}).get(key) for name in rows]
        cells = [_accuracy(row[key], gain) for row, gain in zip(rows.values(), gains, strict=True)]
        table.add_row(task, metric, format_items(items, task), *cells)
    _show(table)
    remarks = ["No examples in the prompts; accuracy with its standard error."]
    if any(asked != there for asked, there in items.values()):
        remarks.append("Of larger tasks a random choice of items was asked, the same of every model.")
    if len(rows) > 1:
        reference, *_ = short_names(rows)
        remarks.append(f"In brackets the difference to {reference} on the same items, with its 95% interval.")
    console().print(" ".join(remarks), markup=False)


def _accuracy(estimate: dict[str, float | None], gain: dict[str, float] | None) -> str:
    interval = "" if gain is None or gain["low"] is None else f", {gain['low']:+.3f} to {gain['high']:+.3f}"
    return format_accuracy(estimate) + ("" if gain is None else f" ({gain['value']:+.3f}{interval})")


def benched(record: RunRecord) -> None:
    """Print the results of `bench`."""
    results = record.results
    names = list(results["models"])
    table = _table("", *short_names(names))
    facts = list(results["models"].values())
    table.add_row("parameters", *(f"{each['parameters']:,}" for each in facts))
    table.add_row("weight files", *(megabytes(each["weight_bytes"]) for each in facts))
    table.add_row("MLP width", *(width_range(each["widths"]) for each in facts))
    memory = "peak_gpu_memory_bytes" if "peak_gpu_memory_bytes" in facts[0] else "peak_memory_bytes"
    table.add_row("peak memory", *(megabytes(each[memory]) for each in facts))
    _show(table)
    for found in results["workloads"]:
        work = found["workload"]
        size, rows = work["batch_size"], found["models"]
        rates = {"first": size * work["length"], "later": size}
        title = f"prefill {size} x {work['length']} tokens, decode {work['new_tokens']}"
        table = _table("", *short_names(names), title=title + (", compiled" if work["compiled"] else ""))
        for part, what in (("first", "prefill"), ("later", "decode")):
            rate = rates[part]
            needs = (rows[name][part]["operations"] / rate for name in names)
            table.add_row(f"{what}, operations a token", *(f"{each / 1e9:.3g} G" for each in needs))
            table.add_row(
                f"{what}, tokens a second", *(f"{rate / rows[name][part]['seconds']['median']:,.1f}" for name in names)
            )
            table.add_row("  speed-up", *("" if name == names[0] else _gain(rows[name][part]) for name in names))
        table.add_row("to the first token", *(f"{rows[name]['first']['seconds']['median']:.3g} s" for name in names))
        _show(table)
    rounds = record.arguments["rounds"]
    said = f"Medians over {how_many(rounds, 'round')} in fresh processes, "
    said += f"{results['dtype']} on {results['device']}, {how_many(results['threads'], 'thread')}; in brackets the "
    remarks = [f"{said}speed-up that operations promise, and the share of the promised saving that was reached."]
    console().print("\n".join([*remarks, *results["remarks"]]), markup=False, soft_wrap=True)


def _gain(found: dict[str, Any]) -> str:
    speedup, share = format_speedup(found)
    return f"{speedup} ({found['promised']:.2f}{', ' * bool(share)}{share})"


def pushed(facts: dict[str, Any], folder: str) -> None:
    """Print the files that `push` uploaded, or would upload."""
    table = _table("file", "size")
    for name, size in facts["files"].items():
        table.add_row(name, disk_size(size))
    _show(table)
    for remark in facts["remarks"]:
        console().print(f"Note: {remark}.", markup=False, soft_wrap=True)
    if facts["uploaded"]:
        console().print(f"Uploaded to {facts['repository']}.", markup=False)
    else:
        console().print("Nothing was uploaded: this was a dry run.")
        next_step("push", folder, facts["repository"], "--upload")


def criteria_listed(facts: list[dict[str, str]]) -> None:
    """Print a line per criterion."""
    for row in facts:
        source = f" [{row['reference']}]" if row["reference"] else ""
        line = f"{row['name']:<28}{row['needs']:<24}{row['summary']}{source}"
        console().print(line, highlight=False, soft_wrap=True, markup=False)


def compared(record: RunRecord, model: str, output: Path) -> None:
    """Print the results of `compare`: for each ratio a table per text, and one of the tasks."""
    results, seeds = record.results, record.arguments["seeds"]
    criteria = list(dict.fromkeys(row["criterion"] for row in results["summary"]))
    texts = [f"{text['source']}, {' x '.join(map(str, text['windows']))} tokens" for text in results["texts"]]
    tasks = {name: {"value": value} for name, value in results["dense_tasks"].items()}
    titles, dense = [*texts, *["zero-shot tasks"] * bool(tasks)], [*results["dense"], *[tasks] * bool(tasks)]
    for number, title in enumerate(titles):
        console().print(f"{title}: mean and standard deviation over {seeds} draws", markup=False, soft_wrap=True)
        for ratio, (width, reached) in results["widths"].items():
            rows = [row for row in results["summary"] if (row["text"], f"{row['ratio']:g}") == (number, ratio)]
            _show(compared_table(rows, dense[number], f"ratio {ratio}: width {width:,}, {reached:.2%} removed"))
    if criteria[1:]:
        console().print(
            f"In brackets the paired difference to {criteria[0]}, of perplexity as a factor, with its 95% interval "
            "over draws and windows; compare.json has those of all metrics."
        )
    _costs(record)
    ratio = min(row["ratio"] for row in results["summary"])
    measured = [row for row in results["summary"] if (row["text"], row["ratio"]) == (0, ratio)]
    metric = "kl" if any(row["metric"] == "kl" for row in measured) else "perplexity"
    best = min((row for row in measured if row["metric"] == metric), key=lambda row: row["mean"])["criterion"]
    seed = record.arguments["calibration"]["seed"]
    files = [output / "scores" / f"{label}-seed{seed}.safetensors" for label in (f"{best}-{ratio:g}", best)]
    scores = next(file for file in files if file.is_file())
    rounding = record.arguments["round_to"]
    options = [] if rounding == 128 else ["--round-to", rounding]
    next_step("prune", model, "--scores", scores, "--ratio", f"{ratio:g}", *options, "--output", free_name("smaller"))


def compared_table(rows: list[dict[str, Any]], dense: dict[str, Any], title: str) -> Table:
    """Print a row for the dense model and each criterion, a column per metric."""
    wanted = ("perplexity", "kl", "js_distance", "top1_agreement")
    metrics = [m for m in dict.fromkeys(row["metric"] for row in rows) if m in wanted or m not in METRICS]
    table = _table("criterion", *(METRICS[m][0] if m in METRICS else m for m in metrics), title=title)
    table.add_row("dense", *(f"{dense[metric]['value']:.4g}" for metric in metrics))
    cells = {(row["criterion"], row["metric"]): compared_cell(row) for row in rows}
    for criterion in dict.fromkeys(row["criterion"] for row in rows):
        table.add_row(criterion, *(cells[criterion, metric] for metric in metrics))
    return table


def compared_cell(row: dict[str, Any]) -> str:
    """Format mean and spread; for the main metrics also the difference to the first criterion, on a second line."""
    text = f"{row['mean']:.4g}" + ("" if row["spread"] is None else f" ± {row['spread']:.2g}")
    bounds = [row["difference"][name] for name in ("value", "low", "high")]
    if row["metric"] not in ("perplexity", "kl") or not any(bounds) or bounds[1] is None:
        return text
    if row["metric"] == "perplexity":
        value, low, high = (math.exp(bound) for bound in bounds)
        return f"{text}\n(x{value:.3g}, {low:.3g} to {high:.3g})"
    value, low, high = bounds
    return f"{text}\n({value:+.2g}, {low:+.2g} to {high:+.2g})"


def ablated(record: RunRecord, model: str, scores: list[Path]) -> None:
    """Print the results of `ablate`."""
    correlations = record.results["correlations"]
    kinds = list(next(iter(correlations.values())))
    headings = [f"{kind}, {'within layers' if inside else 'all layers'}" for kind in kinds for inside in (True, False)]
    table = _table("criterion", *headings)
    for name, found in correlations.items():
        parts = [found[kind][where] for kind in kinds for where in ("within_layers", "all_layers")]
        table.add_row(name, *(format_interval(part) for part in parts))
    _show(table)
    console().print("Spearman's rank correlation of scores with the measured KL divergence, with 95% intervals")
    _costs(record)
    known = [found[kinds[0]]["within_layers"]["value"] if kinds else None for found in correlations.values()]
    best = known.index(max((value for value in known if value is not None), default=None))
    next_is_pruning(model, scores=scores[best])


def inspected(facts: dict[str, Any]) -> None:
    """Print the result of `inspect`."""
    table = _table(facts["architecture"], facts["model_type"])
    table.add_row("MLPs x neurons", f"{facts['mlps']} x {width_range(facts['neurons_per_mlp'])}")
    for part, count in facts["parameters"].items():
        table.add_row(f"parameters: {part.replace('_', ' ')}", f"{count:,}")
    table.add_row("weight files", megabytes(facts["weight_bytes"]))
    _show(table)
    widths = _table("--ratio", "width with --round-to 1", "width with --round-to 128", "ratio reached")
    for percent, row in facts["widths"].items():
        exact, rounded = (
            "impossible" if width is None else f"{width:,}" for width in (row["width"], row["width_rounded_to_128"])
        )
        widths.add_row(percent, exact, rounded, "" if row["ratio_reached"] is None else f"{row['ratio_reached']:.2%}")
    _show(widths)
    next_is_pruning(facts["model"])


def demonstrated(summary: dict[str, Any]) -> None:
    """Print the results of the demo."""
    table = _table("", "dense", "pruned")
    for row in demo_rows(summary):
        table.add_row(*row)
    _show(table)
    results = summary["results"]
    console().print(f"Metrics on {results['measured_on']}, with 95% intervals: compare them with each other only.")
    samples = _table("prompt", "dense", "pruned", lines=True)
    for sample in results["continuations"]:
        samples.add_row(sample["prompt"], sample["dense"], sample["pruned"])
    _show(samples)
    if "dense" in results:  # records of earlier versions do not say where the dense model is
        next_is_pruning(results["dense"], ratio=0.3, calibration=results["calibration"])


def demo_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of the demo's table: quantity, dense, pruned."""
    results = summary["results"]
    parameters, width, size = results["parameters"], results["width"], results["weight_bytes"]
    metrics = {name: format_interval(estimate) for name, estimate in results["metrics"].items()}
    seconds = sum(stage["seconds"] for stage in summary["stages"])
    scoring, repair = (
        next(stage for stage in summary["stages"] if stage["name"] == name)
        for name in ("scoring", "cutting and repairing")
    )
    return [
        ("parameters", f"{parameters['before']:,}", f"{parameters['after']:,}"),
        ("MLP width", f"{width['before']:,}", f"{width['after']:,}"),
        ("weight files", megabytes(size["before"]), megabytes(size["after"])),
        ("perplexity", metrics.pop("dense_perplexity"), metrics.pop("perplexity")),
        *((METRICS[name][0], "", text) for name, text in metrics.items() if name != "entropy"),
        ("scoring", "", duration(scoring["seconds"])),
        ("repair", "", duration(repair["seconds"])),
        ("all stages", "", duration(seconds)),
        ("peak memory", "", megabytes(max(stage["peak_memory_bytes"] for stage in summary["stages"]))),
    ]


def _cost(stage: dict[str, Any]) -> tuple[str, str]:
    return f"{stage['seconds']:.1f} s", f"peak {megabytes(stage['peak_memory_bytes'])}"


def _costs(record: RunRecord) -> None:
    expected = {cost["step"]: f"{cost['seconds']:.1f} s" for cost in record.expected}
    table = _table("stage", "seconds", "expected", "memory")
    for stage in record.stages:
        seconds, memory = _cost(stage)
        table.add_row(stage["name"], seconds, expected.get(stage["name"], ""), memory)
    _show(table)
    if record.reused_parts:
        console().print(f"Not included: {record.reused_parts} parts reused from an interrupted run.")


def _table(*columns: str, lines: bool = False, title: str | None = None) -> Table:
    table = Table(show_header=any(columns[1:]) or bool(columns[0]), show_lines=lines, title=title)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "criterion")
    return table


def _show(table: Table) -> None:
    console().print(table)
