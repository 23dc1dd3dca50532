"""Sections of a report: tables and plots; each plot comes with alternative text and a table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hifiprune.deployment.compatibility import remark_on_mixed
from hifiprune.evaluation.fidelity import METRICS
from hifiprune.formatting import accuracies, format_items, format_speedup, megabytes, short_names, width_range
from hifiprune.plan import Plan
from hifiprune.recovery.callback import perplexity
from hifiprune.reports.figures import (
    BLACK,
    add_legend,
    draw_bars,
    draw_heat,
    draw_stacks,
    error_bars,
    figure_of,
    inline_svg,
    label,
    log_scale,
    new_axes,
    write_shares,
)
from hifiprune.reports.plots import draw_criteria
from hifiprune.reports.runs import Run

Rows = list[list[str]]
QUALITY = ("perplexity", "kl")


@dataclass(frozen=True)
class Plot:
    """A plot with its description and its values.

    Attributes:
        id: unique name.
        alt: description in words.
        axes: of its figure.
        table: values, the names of the columns first.
    """

    id: str
    alt: str
    axes: Axes
    table: Rows

    @property
    def svg(self) -> str:
        """Return the figure as part of a page."""
        return inline_svg(figure_of(self.axes), self.id)


@dataclass
class Section:
    """A section of the page."""

    title: str
    texts: list[str] = field(default_factory=list)
    table: Rows | None = None
    plots: list[Plot] = field(default_factory=list)
    passages: list[tuple[str, list[list[dict[str, Any]]]]] = field(default_factory=list)
    records: list[tuple[str, str]] = field(default_factory=list)

    @property
    def filled(self) -> bool:
        """Return whether the section has content."""
        return bool((self.table and self.table[1:]) or self.plots or self.passages or self.records)


def sections_of(runs: Sequence[Run]) -> list[Section]:
    """Return all sections of the page that are not empty."""
    makers = (summary, quality, tasks, training, criteria, layers, overlap, tokens, speed, cost, records)
    return [section for maker in makers if (section := maker(runs)).filled]


def summary(runs: Sequence[Run]) -> Section:
    """List the checkpoints, one row each."""
    rows = [["checkpoint", "parameters", "removed", "MLP width", "criterion", "output projections", "trained"]]
    for run in runs:
        if pruning := run.made:
            results, training = pruning["results"], run.facts["arguments"].get("training")
            sizes, widths = results["parameters"], results["width"]
            rows.append(
                [
                    run.name,
                    f"{sizes['after']:,} of {sizes['before']:,}",
                    f"{results['ratio']['reached']:.1%}",
                    f"{width_range(widths['after'])} of {widths['before']:,}",
                    results["criterion"],
                    "refitted" if pruning["arguments"]["repair"] == "ridge" else "as cut",
                    f"{training['method']}, {run.facts['results']['best_step']} steps" if training else "no",
                ]
            )
    return Section("Checkpoints", table=rows)


def quality(runs: Sequence[Run]) -> Section:
    """Plot perplexity and divergence against size, for all models measured on the same text."""
    section = Section("Quality against size")
    texts: dict[str, list[Run]] = {}
    for run in runs:
        if run.command == "evaluate" and "windows" in run.facts["results"]:
            texts.setdefault(run.measured_on, []).append(run)
    for measured_on, group in texts.items():
        rows = {name: row for run in group for name, row in _measured(run)}
        labels = dict(zip(rows, short_names(rows), strict=True))
        for metric in QUALITY:
            found = {
                labels[name]: (row["parameters"] / 1e6, row["metrics"][metric])
                for name, row in rows.items()
                if metric in row["metrics"]
            }
            if found:
                section.plots.append(_against_size(metric, found, measured_on, f"{metric}-{len(section.plots)}"))
    return section


def _measured(run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return parameters and metrics of every model by name, and of the dense reference."""
    results = run.facts["results"]
    rows = {name: row for name, row in results["models"].items() if "metrics" in row}
    dense = results.get("dense")
    if dense:
        beside = next(iter(rows.values()))["metrics"]["dense_perplexity"]
        metrics = {"perplexity": beside, "kl": {"value": 0.0, "low": None, "high": None}}
        yield dense["name"], {"parameters": dense["parameters"], "metrics": metrics}
    yield from rows.items()


def _against_size(metric: str, points: dict[str, tuple[float, dict[str, Any]]], measured_on: str, id_: str) -> Plot:
    """Plot one marker per model."""
    title = METRICS[metric][0]
    axes = new_axes("million parameters", title)
    table = [["checkpoint", "million parameters", title, "95% interval"]]
    for name, (size, estimate) in points.items():
        axes.errorbar([size], [estimate["value"]], error_bars([estimate]), fmt="o", capsize=3, label=label(name))
        table.append([name, f"{size:,.1f}", f"{estimate['value']:.4g}", _interval(estimate)])
    add_legend(axes)
    alt = f"{title}: each checkpoint against its parameters, with 95% intervals, on {measured_on}."
    return _plot(id_, alt, axes, table)


def tasks(runs: Sequence[Run]) -> Section:
    """Plot the accuracy on every task, one bar per model."""
    section = Section("Zero-shot accuracy", ["No examples in the prompts. Error bars are 95% intervals."])
    for run in (run for run in runs if run.command == "evaluate"):
        rows = {name: row for name, row in run.models.items() if "tasks" in row}
        found = {name: accuracies(row) for name, row in rows.items()}
        if not found:
            continue
        names, items = [*next(iter(found.values()))], run.facts["results"].get("items", {})
        axes = new_axes("accuracy", "")
        draw_bars(axes, names, {name: [*estimates.values()] for name, estimates in found.items()})
        table = [["task", "items", *found]]
        for task in names:
            size = format_items(items, task.partition("/")[0])
            cells = [f"{each[task]['value']:.3f} ({_interval(each[task])})" for each in found.values()]
            table.append([task, size, *cells])
        alt = f"Accuracy of {', '.join(found)} on each task, as bars with 95% intervals."
        if any(asked != there for asked, there in items.values()):
            most = max(asked for asked, _ in items.values())
            alt += f" Of each task at most {most:,} items were asked, a random choice, the same of every model."
        section.plots.append(_plot(f"tasks-{run.name}", alt, axes, table))
    return section


def training(runs: Sequence[Run]) -> Section:
    """Plot the held-out perplexity during recovery training."""
    section, axes = Section("Recovery training"), new_axes("optimizer step", "held-out perplexity")
    looks = {run.name: run.facts["results"]["held_out_losses"] for run in runs if run.command == "recover"}
    table = [["run", "optimizer step", "held-out perplexity"]]
    for name, losses in looks.items():
        steps, values = [step for step, _ in losses], [perplexity(loss) for _, loss in losses]
        axes.plot(steps, values, "o-", label=label(name))
        table += [[name, str(step), f"{value:.4g}"] for step, value in zip(steps, values, strict=True)]
    if looks:
        add_legend(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        alt = "Perplexity of the rows that were held out of the training data, as training went on; lower is better."
        section.plots.append(_plot("training", alt, axes, table))
    return section


def criteria(runs: Sequence[Run]) -> Section:
    """Plot quality against ratio from `compare`."""
    section = Section("Criteria compared", ["Error bars are standard deviations over draws of the calibration text."])
    for run in (run for run in runs if run.command == "compare"):
        for text in range(len(run.facts["results"]["texts"])):
            known = {row["metric"] for row in run.facts["results"]["summary"] if row["text"] == text}
            section.plots += [_criteria(run, text, metric) for metric in QUALITY if metric in known]
    return section


def _criteria(run: Run, text: int, metric: str) -> Plot:
    """Plot one line per criterion."""
    results, title = run.facts["results"], METRICS[metric][0]
    rows = [row for row in results["summary"] if (row["text"], row["metric"]) == (text, metric)]
    axes, table = new_axes("parameters removed", title), [["criterion", "parameters removed", title, "over draws"]]
    draw_criteria(axes, rows, results)
    log_scale(axes)
    add_legend(axes)
    for name in dict.fromkeys(row["criterion"] for row in rows):
        for row in (row for row in rows if row["criterion"] == name):
            spread = "" if row["spread"] is None else f"± {row['spread']:.2g}"
            table.append([name, f"{row['ratio']:.0%}", f"{row['mean']:.4g}", spread])
    alt = f"{title}: on {Path(results['texts'][text]['source']).name}, a line a criterion; lower is better."
    if metric == "perplexity":
        alt += " The dotted line is the dense model."
    return _plot(f"{metric}-{run.name}-{text}", alt, axes, table)


def layers(runs: Sequence[Run]) -> Section:
    """Plot widths, and score quantiles, by layer."""
    section = Section("Layer by layer")
    plans = {run.name: run.plan for run in runs if run.plan}
    if any(len({*plan.widths}) > 1 for plan in plans.values()):
        section.texts.append(remark_on_mixed())
        axes = new_axes("layer", "neurons kept")
        for name, plan in plans.items():
            axes.plot(plan.widths, marker=".", drawstyle="steps-mid", label=label(name))
        axes.set_ylim(bottom=0)
        alt = "Neurons that each layer keeps."
        section.plots.append(_by_layer("widths", alt, axes, {name: plan.widths for name, plan in plans.items()}))
    else:  # a line at one height would show nothing
        section.texts += [_uniform(name, plan) for name, plan in plans.items()]
    axes, columns = new_axes("layer", "score, to the median"), {}
    log_scale(axes)
    for number, run in enumerate(run for run in runs if run.scores):
        assert run.scores
        unit = _rank(torch.cat([*run.scores.values]), 0.5) or 1.0
        for share, style in ((0.5, ".-"), (0.1, ":"), (0.9, ":")):
            name = run.name if share == 0.5 else f"{run.name}, {share:.0%}"
            columns[name] = [_rank(scores, share) / unit for scores in run.scores.values]
            axes.plot(columns[name], style, color=f"C{number}", label=label(name) if share == 0.5 else None)
    if columns:
        alt = "Scores in units of the run's median: the median of each layer, dotted what lies above 10 and 90%."
        section.plots.append(_by_layer("scores", alt, axes, columns))
    return section


def _by_layer(id_: str, alt: str, axes: Axes, columns: Mapping[str, Sequence[float]]) -> Plot:
    """Return a plot of values by layer, with a column for each name in its table."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legend(axes)
    cells = zip_longest(*([f"{value:.5g}" for value in values] for values in columns.values()), fillvalue="")
    return _plot(id_, alt, axes, [["layer", *columns], *([str(layer), *row] for layer, row in enumerate(cells))])


def _uniform(name: str, plan: Plan) -> str:
    """Return a sentence on a plan that keeps as many neurons in every layer."""
    return f"{name} keeps {plan.widths[0]:,} of {plan.neurons[0]:,} neurons in each of {len(plan.widths)} layers."


def _rank(scores: Tensor, share: float) -> float:
    """Return a quantile of the scores."""
    return float(np.quantile(scores.double().numpy(), share))


def overlap(runs: Sequence[Run]) -> Section:
    """Plot the overlap of the kept sets, for runs on dense models of one shape."""
    section = Section("Neuron overlap")
    plans = {run.name: run.plan for run in runs if run.plan}
    first = next(iter(plans.values()), None)
    kept = {
        name: {(layer, neuron) for layer, each in enumerate(plan.kept) for neuron in each.tolist()}
        for name, plan in plans.items()
        if first and plan.neurons == first.neurons
    }
    if len(kept) < 2:
        return section
    names = [*kept]
    shares = [[len(one & other) / len(one | other) for other in kept.values()] for one in kept.values()]
    written = [[f"{share:.2f}" for share in row] for row in shares]
    axes = new_axes("", "", 1.5 + 0.6 * len(names))
    axes.grid(visible=False)
    draw_heat(axes, shares, [label(name, 20) for name in names], (0.0, 1.0))
    write_shares(axes, shares, [label(name, 20) for name in names], 9)
    table = [["", *names], *([name, *row] for name, row in zip(names, written, strict=True))]
    alt = "Neurons that two runs both keep, as a share of those that either keeps."
    section.plots.append(_plot("overlap", alt, axes, table))
    return section


def tokens(runs: Sequence[Run]) -> Section:
    """Show passages, coloured by the divergence of the two models."""
    said = (
        "The redder a token, the more the two models differed in what they predicted at its position (KL divergence of "
        "their distributions). Point at a token, or reach it with the tab key, to see what each of them predicted."
    )
    passages = [named for run in runs for named in zip(short_names(run.passages), run.passages.values(), strict=True)]
    return Section("Token by token", [said], passages=passages)


def speed(runs: Sequence[Run]) -> Section:
    """Show speed-ups of prefill and decode beside the theoretical ones."""
    section = Section("Speed")
    for run in (run for run in runs if run.command == "bench"):
        table = [["workload", "checkpoint", "speed-up, lowest to highest", "theoretical", "share"]]
        names, bars = [*run.models][1:], {}
        for part, what in (("first", "prefill"), ("later", "decode")):
            for measured in run.facts["results"]["workloads"]:
                work, (_, *rows) = measured["workload"], measured["models"].values()
                where = f"{what}, {work['batch_size']} x {work['length']}" + ", compiled" * work["compiled"]
                timed = [row[part] for row in rows]
                bars[where] = [gain["speedup"] | {"value": gain["speedup"]["median"]} for gain in timed]
                for name, gain in zip(names, timed, strict=True):
                    speedup, share = format_speedup(gain)
                    table.append([where, name, speedup, f"{gain['promised']:.2f}", share])
        axes = new_axes("times as fast as dense", "")
        draw_bars(axes, names, bars)
        axes.axvline(1, color=BLACK, linestyle=":")
        alt = "Prefill and decode of each checkpoint, times as fast as the dense model; error bars span the rounds."
        section.texts += run.facts["results"]["remarks"]
        section.plots.append(_plot(f"speed-{run.name}", alt, axes, table))
    return section


def cost(runs: Sequence[Run]) -> Section:
    """Plot the seconds of every stage of the runs that made checkpoints."""
    section = Section("Cost")
    made = [run for run in runs if run.made]
    if not made:
        return section
    stages = [*dict.fromkeys(stage["name"] for run in made for stage in run.facts["stages"])]
    table = [["run", *stages, "peak memory"]]
    totals = [dict.fromkeys(stages, 0.0) for _ in made]
    for run, total in zip(made, totals, strict=True):
        for stage in run.facts["stages"]:
            total[stage["name"]] += stage["seconds"]
        peak = max(stage.get("peak_gpu_memory_bytes", stage["peak_memory_bytes"]) for stage in run.facts["stages"])
        table.append([run.name, *(f"{total[name]:.1f} s" for name in stages), megabytes(peak)])
    axes = new_axes("seconds", "")
    draw_stacks(axes, [run.name for run in made], {name: [total[name] for total in totals] for name in stages})
    section.plots.append(_plot("cost", "Seconds that each stage of each run took.", axes, table))
    return section


def records(runs: Sequence[Run]) -> Section:
    """Show the full record of each run."""
    return Section("Records", records=[(run.name, dumps(run.facts, indent=2)) for run in runs])


def _plot(id_: str, alt: str, axes: Axes, table: Rows) -> Plot:
    return Plot(id_.replace(" ", "-"), alt[0].upper() + alt[1:], axes, table)


def _interval(estimate: dict[str, Any]) -> str:
    return "" if estimate["low"] is None else f"{estimate['low']:.4g} to {estimate['high']:.4g}"
