"""Print results as tables on standard output, each followed by the next step."""

import shlex
from pathlib import Path
from typing import Any

from rich.table import Table

from hifiprune.commands.export import ExportResults
from hifiprune.commands.generate import GenerateResults
from hifiprune.commands.inspect import InspectResults
from hifiprune.commands.next_steps import (
    next_is_measuring,
    next_is_pruning,
    next_is_without_dry_run,
    next_step,
    program,
    sources_of,
)
from hifiprune.commands.push import PushResults
from hifiprune.evaluation.fidelity import METRICS
from hifiprune.formatting import format_interval, megabytes, width_range
from hifiprune.io.atomic import disk_size
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.lineage import dense_of, pruning_of, record_of
from hifiprune.progress import console, duration
from hifiprune.results import DemoResults, PruneResults, RecoverResults, ScoreResults
from hifiprune.run_record import RunRecord
from hifiprune.width_table import WidthTable


def pruned(record: RunRecord[PruneResults], output: Path) -> None:
    """Print the result of `prune`."""
    results, table = record.results, new_table("", "dense", "pruned")
    parameters, width, size = results.parameters, results.width, results.weight_bytes
    table.add_row("parameters", f"{parameters.before:,}", f"{parameters.after:,}")
    table.add_row("MLP width", f"{width.before:,}", width_range(width.after))
    table.add_row("weight files", megabytes(size.before), megabytes(size.after))
    table.add_row("asked", "", results.asked)
    table.add_row("parameters removed", "", f"{results.ratio.reached:.2%}")
    table.add_row("neurons removed", "", f"{results.neuron_ratio_reached:.2%}")
    if refits := results.repair:
        repaired = sum(refit.damping is not None for refit in refits)
        table.add_row("projections repaired", "", f"{repaired} of {len(refits)}")
        left, plain = sum(refit.error for refit in refits), sum(refit.plain_error for refit in refits)
        if plain > 0:  # what was removed did something
            table.add_row(
                "residual error after repair",
                "",
                f"{left / plain:.1%} of the unrepaired cut's, on held-out windows (lower is better)",
            )
    if blocks := results.reconstruction:
        trained = sum(block.step > 0 for block in blocks)
        table.add_row("blocks better by training", "", f"{trained} of {len(blocks)}")
        shares = [block.error / block.before for block in blocks if block.before]
        table.add_row("error after training", "", f"{sum(shares) / max(1, len(shares)):.2%} of the refit's, on average")
    console().print(table)
    show_costs(record)
    next_is_measuring(output, record.arguments["model"], sources_of(record.arguments["calibration"]))


def scored(record: RunRecord[ScoreResults], model: str, output: Path) -> None:
    """Print the result of `score`."""
    results, table = record.results, new_table("", "")
    table.add_row("criterion", results.criterion)
    if "windows" in results.scoring:
        table.add_row("windows x tokens", f"{results.scoring['windows']} x {results.scoring['positions']}")
    if results.objective_nats is not None:
        table.add_row("mean objective", f"{results.objective_nats:.4f} nats")
    console().print(table)
    show_costs(record)
    next_is_pruning(model, scores=output, calibration=record.arguments["calibration"])


def widths_measured(record: RunRecord[WidthTable], model: str, output: Path) -> None:
    """Print the result of `table`: KL divergences in nats, by share of an MLP's own width."""
    results = record.results
    shares = [width / results.widths[0][-1] for width in results.widths[0][:-1]]
    table = new_table("MLP", *(f"{share:.0%}" for share in shares))
    for name, costs in zip(results.names, results.costs, strict=True):
        table.add_row(name, *(f"{cost:.3g}" for cost in costs[:-1]))
    console().print(table)
    console().print("KL divergence in nats where one MLP alone has this share of its width, refitted.")
    source, scores = record.arguments["calibration"], record.arguments["scores"]
    next_is_pruning(model, scores=scores, calibration=source, more=["--table", output])


def foreseen(record: RunRecord[Any]) -> None:
    """Print the estimated costs of a run."""
    table = new_table("stage", "seconds", "memory", "disk")
    for cost in record.expected:
        memory, disk = megabytes(cost.memory), megabytes(cost.disk) if cost.disk else ""
        table.add_row(cost.step, f"{cost.seconds:.1f} s", memory, disk)
    console().print(table)
    console().print("Dry run: nothing written.")
    next_is_without_dry_run()


def recovered(record: RunRecord[RecoverResults], output: Path) -> None:
    """Print the result of `recover`."""
    results, table = record.results, new_table("", "before", "after")
    looks = (results.held_out_perplexity.before, results.held_out_perplexity.after)
    table.add_row("held-out perplexity", *("not looked at" if look is None else f"{look:.4g}" for look in looks))
    table.add_row("optimizer steps", "", f"{results.steps}, best at {results.best_step}")
    console().print(table)
    show_costs(record)
    written = record_of(Checkpoint(str(output), output))
    pruning, dense = pruning_of(written), record.arguments["teacher"] or dense_of(written)
    calibration = pruning.arguments.calibration if pruning else None
    next_is_measuring(output, dense, calibration.sources if calibration else [])


def settings(facts: dict[str, Any]) -> None:
    """Print settings by name."""
    table = new_table("setting", "value")
    for name, value in facts.items():
        table.add_row(name.replace("_", "-"), ", ".join(value) if isinstance(value, tuple) else str(value))
    console().print(table)


def exported(results: ExportResults, output: Path) -> None:
    """Print the file that `export` made."""
    kinds = ", ".join(f"{count} {name}" for name, count in results.tensors.items())
    lines = [f"Wrote {output}: {results.bytes / 1e6:,.1f} MB, tensors: {kinds}."]
    lines += [f"Note: {remark}" for remark in results.remarks]
    lines.append(f"Next: llama-cli -m {shlex.quote(str(output))} -p 'The capital of France is' -n 32")
    console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def generated(results: GenerateResults) -> None:
    """Print the continuations, and where they part."""
    lines = [f"{found.model}:\n{found.text.strip()}\n" for found in results.continuations]
    if results.same_tokens is not None:
        ours, theirs = (found.tokens for found in results.continuations)
        same = results.same_tokens
        if ours == theirs:
            lines.append(f"The same {same} tokens.")
        else:
            one, other = (repr(part[same]) if same < len(part) else "the end" for part in (ours, theirs))
            until = f"The first {same} tokens are the same; then the first" if same else "From the start the first"
            lines.append(f"{until} model says {one} and the second {other}.")
    console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def pushed(results: PushResults, folder: str) -> None:
    """Print the files that `push` uploaded, or would upload."""
    table = new_table("file", "size")
    for name, size in results.files.items():
        table.add_row(name, disk_size(size))
    console().print(table)
    for remark in results.remarks:
        console().print(f"Note: {remark}.", markup=False, soft_wrap=True)
    if results.uploaded:
        console().print(f"Uploaded to {results.repository}.", markup=False)
    else:
        console().print("Nothing was uploaded: this was a dry run.")
        next_step("push", folder, results.repository, "--upload")


def criteria_listed(facts: list[dict[str, str]]) -> None:
    """Print a line per criterion."""
    for row in facts:
        source = f" [{row['reference']}]" if row["reference"] else ""
        line = f"{row['name']:<28}{row['needs']:<24}{row['summary']}{source}"
        console().print(line, highlight=False, soft_wrap=True, markup=False)


def inspected(results: InspectResults) -> None:
    """Print the result of `inspect`."""
    table = new_table(results.architecture, results.model_type)
    table.add_row("MLPs x neurons", f"{results.mlps} x {width_range(results.neurons_per_mlp)}")
    for part, count in results.parameters.items():
        table.add_row(f"parameters: {part.replace('_', ' ')}", f"{count:,}")
    table.add_row("weight files", megabytes(results.weight_bytes))
    console().print(table)
    widths = new_table("--ratio", "width with --round-to 1", "width with --round-to 128", "ratio reached")
    for percent, possible in results.widths.items():
        exact, rounded = (
            "impossible" if width is None else f"{width:,}" for width in (possible.width, possible.width_rounded_to_128)
        )
        reached = "" if possible.ratio_reached is None else f"{possible.ratio_reached:.2%}"
        widths.add_row(percent, exact, rounded, reached)
    console().print(widths)
    next_is_pruning(results.model)


def demonstrated(record: RunRecord[DemoResults], output: str) -> None:
    """Print the results of the demo in the folder `output`, and how to try its models."""
    results, table = record.results, new_table("", "dense", "pruned")
    for row in demo_rows(record):
        table.add_row(*row)
    console().print(table)
    console().print(f"Metrics on {results.measured_on}, with 95% intervals: compare them with each other only.")
    samples = new_table("prompt", "dense", "pruned", lines=True)
    for sample in results.continuations:
        samples.add_row(sample["prompt"], sample["dense"], sample["pruned"])
    console().print(samples)
    if results.dense:
        both = shlex.join([*program(), "generate", str(Path(output, "pruned")), "--against", results.dense])
        console().print(
            f"A prompt of yours, by both: {both} --prompt TEXT", highlight=False, soft_wrap=True, markup=False
        )
        next_is_pruning(results.dense, ratio=0.3, calibration=results.calibration)


def demo_rows(record: RunRecord[DemoResults]) -> list[tuple[str, str, str]]:
    """Return the rows of the demo's table: quantity, dense, pruned."""
    results = record.results
    parameters, width, size = results.parameters, results.width, results.weight_bytes
    metrics = {name: format_interval(estimate) for name, estimate in results.metrics.items()}
    seconds = {stage.name: stage.seconds for stage in record.stages}
    return [
        ("parameters", f"{parameters.before:,}", f"{parameters.after:,}"),
        ("MLP width", f"{width.before:,}", width_range(width.after)),
        ("weight files", megabytes(size.before), megabytes(size.after)),
        ("perplexity", metrics.pop("dense_perplexity"), metrics.pop("perplexity")),
        *((METRICS[name][0], "", text) for name, text in metrics.items() if name != "entropy"),
        ("scoring", "", duration(seconds["scoring"])),
        ("repair", "", duration(seconds["cutting and repairing"])),
        ("all stages", "", duration(sum(stage.seconds for stage in record.stages))),
        ("peak memory", "", megabytes(max(stage.peak_memory_bytes for stage in record.stages))),
    ]


def show_costs(record: RunRecord[Any]) -> None:
    """Print what each stage took, beside what was expected."""
    expected = {cost.step: f"{cost.seconds:.1f} s" for cost in record.expected}
    table = new_table("stage", "seconds", "expected", "memory")
    for stage in record.stages:
        memory = f"peak {megabytes(stage.peak_memory_bytes)}"
        table.add_row(stage.name, f"{stage.seconds:.1f} s", expected.get(stage.name, ""), memory)
    console().print(table)
    if record.reused_parts:
        console().print(f"Not included: {record.reused_parts} parts reused from an interrupted run.")


def new_table(*columns: str, lines: bool = False, title: str | None = None) -> Table:
    """Return an empty table; without a header where no column has a name."""
    table = Table(show_header=any(columns), show_lines=lines, title=title)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "criterion")
    return table
