"""Sections of a report: tables and plots; each plot comes with alternative text and a table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.colors import qualitative
from torch import Tensor

from hifiprune.deployment.compatibility import remark_on_mixed
from hifiprune.evaluation.fidelity import METRICS
from hifiprune.formatting import accuracies, format_items, format_speedup, megabytes, short_names, width_range
from hifiprune.plan import Plan
from hifiprune.recovery.callback import perplexity
from hifiprune.reports.runs import Run

Rows = list[list[str]]
QUALITY = ("perplexity", "kl")
GREY, COLORS = "#888888", qualitative.D3


@dataclass(frozen=True)
class Plot:
    """A plot with its description and its values."""

    id: str
    alt: str
    figure: Any
    table: Rows


@dataclass
class Section:
    """A section of the page."""

    title: str
    texts: list[str] = field(default_factory=list)
    table: Rows | None = None
    plots: list[Plot] = field(default_factory=list)
    passages: list[dict[str, Any]] = field(default_factory=list)
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
    figure, label = go.Figure(), METRICS[metric][0]
    for name, (size, each) in points.items():
        figure.add_trace(_estimates(go.Scatter, [size], [each], name=name, mode="markers", marker_size=11))
    figure.update_xaxes(title="million parameters").update_yaxes(title=label)
    table = [["checkpoint", "million parameters", label, "95% interval"]]
    for name, (size, each) in points.items():
        table.append([name, f"{size:,.1f}", f"{each['value']:.4g}", _interval(each)])
    alt = f"{label}: each checkpoint against its parameters, with 95% intervals, on {measured_on}."
    return _plot(id_, alt, figure, table, showlegend=True)


def tasks(runs: Sequence[Run]) -> Section:
    """Plot the accuracy on every task, one bar per model."""
    section = Section("Zero-shot accuracy", ["No examples in the prompts. Error bars are 95% intervals."])
    for run in (run for run in runs if run.command == "evaluate"):
        rows = {name: row for name, row in run.models.items() if "tasks" in row}
        found = {name: accuracies(row) for name, row in rows.items()}
        if not found:
            continue
        names, items = [*next(iter(found.values()))], run.facts["results"].get("items", {})
        bars = [_estimates(go.Bar, names, [*each.values()], name=name) for name, each in found.items()]
        figure = go.Figure(bars).update_yaxes(title="accuracy")
        table = [["task", "items", *found]]
        for task in names:
            size = format_items(items, task.partition("/")[0])
            cells = [f"{each[task]['value']:.3f} ({_interval(each[task])})" for each in found.values()]
            table.append([task, size, *cells])
        alt = f"Accuracy of {', '.join(found)} on each task, as bars with 95% intervals."
        if any(asked != there for asked, there in items.values()):
            most = max(asked for asked, _ in items.values())
            alt += f" Of each task at most {most:,} items were asked, a random choice, the same of every model."
        section.plots.append(_plot(f"tasks-{run.name}", alt, figure, table, barmode="group"))
    return section


def training(runs: Sequence[Run]) -> Section:
    """Plot the held-out perplexity during recovery training."""
    section, figure = Section("Recovery training"), go.Figure()
    looks = {run.name: run.facts["results"]["held_out_losses"] for run in runs if run.command == "recover"}
    table = [["run", "optimizer step", "held-out perplexity"]]
    for name, found in looks.items():
        steps, values = [step for step, _ in found], [perplexity(loss) for _, loss in found]
        figure.add_trace(go.Scatter(x=steps, y=values, name=name, mode="lines+markers"))
        table += [[name, str(step), f"{value:.4g}"] for step, value in zip(steps, values, strict=True)]
    if looks:
        figure.update_xaxes(title="optimizer step").update_yaxes(title="held-out perplexity")
        alt = "Perplexity of the rows that were held out of the training data, as training went on; lower is better."
        section.plots.append(_plot("training", alt, figure, table, showlegend=True))
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
    results, label = run.facts["results"], METRICS[metric][0]
    rows = [row for row in results["summary"] if (row["text"], row["metric"]) == (text, metric)]
    figure, table = go.Figure(), [["criterion", "parameters removed", label, "over draws"]]
    for name in dict.fromkeys(row["criterion"] for row in rows):
        own = [row for row in rows if row["criterion"] == name]
        ratios, means, spreads = ([row[key] for row in own] for key in ("ratio", "mean", "spread"))
        error = {"array": [spread or 0.0 for spread in spreads], "thickness": 1}
        figure.add_trace(go.Scatter(x=ratios, y=means, name=name, error_y=error))
        for ratio, mean, spread in zip(ratios, means, spreads, strict=True):
            table.append([name, f"{ratio:.0%}", f"{mean:.4g}", "" if spread is None else f"± {spread:.2g}"])
    alt = f"{label}: on {Path(results['texts'][text]['source']).name}, a line a criterion; lower is better."
    if metric == "perplexity":
        figure.add_hline(y=results["dense"][text][metric]["value"], line_dash="dot", line_color=GREY)
        alt += " The dotted line is the dense model."
    figure.update_xaxes(title="parameters removed", tickformat=".0%", tickvals=sorted({row["ratio"] for row in rows}))
    figure.update_yaxes(title=label, type="log")
    return _plot(f"{metric}-{run.name}-{text}", alt, figure, table, showlegend=True)


def layers(runs: Sequence[Run]) -> Section:
    """Plot widths, and score quantiles, by layer."""
    section, widths, curves = Section("Layer by layer"), go.Figure(), go.Figure()
    for run in runs:
        if run.plan and run.scores:
            numbers, color = [*range(len(run.plan.widths))], COLORS[len(widths.data) % len(COLORS)]
            widths.add_trace(go.Bar(x=numbers, y=run.plan.widths, name=run.name, marker_color=color))
            unit = _rank(torch.cat([*run.scores.values]), 0.5) or 1.0
            for share, width in ((0.5, 2.5), (0.1, 1), (0.9, 1)):
                middle, values = share == 0.5, [_rank(scores, share) / unit for scores in run.scores.values]
                how = {"name": run.name if middle else f"{run.name}, {share:.0%}", "showlegend": middle}
                line = {"color": color, "width": width, "dash": "solid" if middle else "dot"}
                curves.add_trace(go.Scatter(x=numbers, y=values, line=line, legendgroup=run.name, **how))
    if not widths.data:
        return section
    mixed = any(run.plan and len({*run.plan.widths}) > 1 for run in runs)
    if mixed:
        section.texts.append(remark_on_mixed())
    else:  # bars of one height would show nothing
        section.texts += [_uniform(run.name, run.plan) for run in runs if run.plan and run.scores]
    widths.update_yaxes(title="neurons kept").update_xaxes(title="layer")
    curves.update_yaxes(title="score, to the median", type="log", dtick=1).update_xaxes(title="layer")
    kept = "Neurons that each layer keeps."
    ranks = "Scores in units of the run's median: the median of each layer, dotted what lies above 10 and 90%."
    for id_, alt, figure in [("widths", kept, widths)] * mixed + [("scores", ranks, curves)]:
        table = [["layer", *(trace.name for trace in figure.data)]]
        for number in range(max(len(trace.y) for trace in figure.data)):
            cells = [f"{trace.y[number]:.5g}" if number < len(trace.y) else "" for trace in figure.data]
            table.append([str(number), *cells])
        section.plots.append(_plot(id_, alt, figure, table, barmode="group"))
    return section


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
    colours = {"zmin": 0, "zmax": 1, "colorscale": "Teal"}
    figure = go.Figure(go.Heatmap(z=shares, x=names, y=names, text=written, texttemplate="%{text}", **colours))
    figure.update_yaxes(automargin=True)
    table = [["", *names], *([name, *row] for name, row in zip(names, written, strict=True))]
    alt = "Neurons that two runs both keep, as a share of those that either keeps."
    section.plots.append(_plot("overlap", alt, figure, table))
    return section


def tokens(runs: Sequence[Run]) -> Section:
    """Show passages, coloured by the divergence of the two models."""
    said = (
        "The redder a token, the more the two models differed in what they predicted at its position (KL divergence of "
        "their distributions). Point at a token, or reach it with the tab key, to see what each of them predicted."
    )
    passages = [
        {"id": f"{run.name}-{number}", "title": name, "texts": texts}
        for run in runs
        for number, (name, texts) in enumerate(zip(short_names(run.passages), run.passages.values(), strict=True))
    ]
    return Section("Token by token", [said], passages=passages)


def speed(runs: Sequence[Run]) -> Section:
    """Show speed-ups of prefill and decode beside the theoretical ones."""
    section = Section("Speed")
    for run in (run for run in runs if run.command == "bench"):
        figure, table = go.Figure(), [["workload", "checkpoint", "speed-up, lowest to highest", "theoretical", "share"]]
        for part, what in (("first", "prefill"), ("later", "decode")):
            for found in run.facts["results"]["workloads"]:
                work, (_, *rows) = found["workload"], found["models"].items()
                where = f"{what}, {work['batch_size']} x {work['length']}" + ", compiled" * work["compiled"]
                names, timed = [*run.models][1:], [row[part] for _, row in rows]
                gains = [each["speedup"] | {"value": each["speedup"]["median"]} for each in timed]
                figure.add_trace(_estimates(go.Bar, names, gains, name=where))
                for name, each in zip(names, timed, strict=True):
                    speedup, share = format_speedup(each)
                    table.append([where, name, speedup, f"{each['promised']:.2f}", share])
        figure.add_hline(y=1, line_dash="dot", line_color=GREY).update_yaxes(title="times as fast as dense")
        alt = "Prefill and decode of each checkpoint, times as fast as the dense model; error bars span the rounds."
        section.texts += run.facts["results"]["remarks"]
        section.plots.append(_plot(f"speed-{run.name}", alt, figure, table, barmode="group"))
    return section


def cost(runs: Sequence[Run]) -> Section:
    """Plot the seconds of every stage of the runs that made checkpoints."""
    section, figure = Section("Cost"), go.Figure()
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
    names = [run.name for run in made]
    for stage in stages:
        figure.add_trace(go.Bar(y=names, x=[total[stage] for total in totals], name=stage, orientation="h"))
    figure.update_xaxes(title="seconds").update_yaxes(autorange="reversed")
    section.plots.append(_plot("cost", "Seconds that each stage of each run took.", figure, table, barmode="stack"))
    return section


def records(runs: Sequence[Run]) -> Section:
    """Show the full record of each run."""
    return Section("Records", records=[(run.name, dumps(run.facts, indent=2)) for run in runs])


def _plot(id_: str, alt: str, figure: Any, table: Rows, **layout: Any) -> Plot:
    """Return a figure in the page's style."""
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "traceorder": "normal"}
    top = 60 if len(figure.data) > 1 else 20
    if "barmode" in layout:
        layout["bargap"] = 1 - _filled(figure, layout["barmode"] == "group")
    figure.update_layout(margin={"l": 60, "r": 12, "t": top, "b": 50}, legend=legend, template="none", **layout)
    figure.update_yaxes(automargin=True)
    return Plot(id_.replace(" ", "-"), alt[0].upper() + alt[1:], figure, table)


def _filled(figure: Any, grouped: bool) -> float:
    """Return the share of the axis that bars fill: less where there are few, or one would fill the page."""
    bars = [trace for trace in figure.data if trace.type == "bar"]
    places = {place for trace in bars for place in (trace.y if trace.orientation == "h" else trace.x)}
    share = 0.06 * (len(bars) if grouped else 2) * len(places)
    return min(0.8, share)


def _estimates(kind: Any, x: Sequence[Any], estimates: Sequence[dict[str, Any]], **how: Any) -> Any:
    """Return a trace of estimates with their intervals."""
    values = [each["value"] for each in estimates]
    above = [(each["high"] if each["high"] is not None else each["value"]) - each["value"] for each in estimates]
    below = [each["value"] - (each["low"] if each["low"] is not None else each["value"]) for each in estimates]
    error = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.5}
    if kind is go.Bar:
        error["color"] = GREY
    return kind(x=list(x), y=values, error_y=error, **how)


def _interval(estimate: dict[str, Any]) -> str:
    return "" if estimate["low"] is None else f"{estimate['low']:.4g} to {estimate['high']:.4g}"
