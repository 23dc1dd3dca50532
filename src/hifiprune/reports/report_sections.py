"""All sections of the report, in their order; those on measurements have a module of their own."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from json import dumps, loads

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hifiprune.deployment.compatibility import remark_on_mixed
from hifiprune.formatting import megabytes, repaired, short_names, width_range
from hifiprune.plan import Plan
from hifiprune.records import PruneRun, RecoverRun
from hifiprune.recovery.callback import perplexity
from hifiprune.reports.figures import (
    add_legend,
    draw_heat,
    draw_stacks,
    label,
    log_scale,
    new_axes,
    write_shares,
)
from hifiprune.reports.measurement_sections import criteria, quality, speed, tasks
from hifiprune.reports.runs import Run
from hifiprune.reports.sections import Plot, Section, new_plot


def sections_of(runs: Sequence[Run]) -> list[Section]:
    """Return all sections of the page that are not empty."""
    makers = (summary, quality, tasks, training, criteria, layers, overlap, tokens, speed, cost, records)
    return [section for maker in makers if (section := maker(runs)).filled]


def summary(runs: Sequence[Run]) -> Section:
    """List the checkpoints, one row each."""
    rows = [["checkpoint", "parameters", "removed", "MLP width", "criterion", "repair", "trained"]]
    for run in runs:
        if pruning := run.made:
            results, record, trained = pruning.results, run.record, "no"
            if isinstance(record, RecoverRun):
                trained = f"{record.arguments.training.method}, {record.results.best_step} steps"
            rows.append(
                [
                    run.name,
                    f"{results.parameters.after:,} of {results.parameters.before:,}",
                    f"{results.ratio.reached:.1%}",
                    f"{width_range(results.width.after)} of {results.width.before:,}",
                    results.criterion,
                    repaired(pruning.arguments.repair),
                    trained,
                ]
            )
    return Section("Checkpoints", table=rows)


def training(runs: Sequence[Run]) -> Section:
    """Plot the held-out perplexity during recovery training."""
    section, axes = Section("Recovery training"), new_axes("optimizer step", "held-out perplexity")
    looks = {run.name: run.record.results.held_out_losses for run in runs if isinstance(run.record, RecoverRun)}
    table = [["run", "optimizer step", "held-out perplexity"]]
    for name, losses in looks.items():
        steps, values = [step for step, _ in losses], [perplexity(loss) for _, loss in losses]
        axes.plot(steps, values, "o-", label=label(name))
        table += [[name, str(step), f"{value:.4g}"] for step, value in zip(steps, values, strict=True)]
    if looks:
        add_legend(axes)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        alt = "Perplexity of the rows that were held out of the training data, as training went on; lower is better."
        section.plots.append(new_plot("training", alt, axes, table))
    return section


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
    return new_plot(id_, alt, axes, [["layer", *columns], *([str(layer), *row] for layer, row in enumerate(cells))])


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
        name: {(layer, neuron) for layer, neurons in enumerate(plan.kept) for neuron in neurons.tolist()}
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
    section.plots.append(new_plot("overlap", alt, axes, table))
    return section


def tokens(runs: Sequence[Run]) -> Section:
    """Show passages, coloured by the divergence of the two models."""
    said = (
        "The redder a token, the more the two models differed in what they predicted at its position (KL divergence of "
        "their distributions). Point at a token, or reach it with the tab key, to see what each of them predicted."
    )
    passages = [named for run in runs for named in zip(short_names(run.passages), run.passages.values(), strict=True)]
    return Section("Token by token", [said], passages=passages)


def cost(runs: Sequence[Run]) -> Section:
    """Plot the seconds of every stage of the runs that made checkpoints."""
    section = Section("Cost")
    stages = {run.name: run.record.stages for run in runs if isinstance(run.record, PruneRun | RecoverRun)}
    if not stages:
        return section
    names = [*dict.fromkeys(stage.name for steps in stages.values() for stage in steps)]
    parts: dict[str, list[float]] = {
        name: [sum(stage.seconds for stage in steps if stage.name == name) for steps in stages.values()]
        for name in names
    }
    table = [["run", *names, "peak memory"]]
    for (run, steps), seconds in zip(stages.items(), zip(*parts.values(), strict=True), strict=True):
        peak = max(stage.peak_gpu_memory_bytes or stage.peak_memory_bytes for stage in steps)
        table.append([run, *(f"{taken:.1f} s" for taken in seconds), megabytes(peak)])
    axes = new_axes("seconds", "")
    draw_stacks(axes, [*stages], parts)
    section.plots.append(new_plot("cost", "Seconds that each stage of each run took.", axes, table))
    return section


def records(runs: Sequence[Run]) -> Section:
    """Show the full record of each run."""
    return Section("Records", records=[(run.name, dumps(loads(run.text), indent=2)) for run in runs])
