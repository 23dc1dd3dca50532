"""`bench`: time the dense and the pruned checkpoints in turn, and compare with what their operations promise."""

import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from transformers import PreTrainedModel

from hifiprune.commands.prepare import check_model
from hifiprune.config.bench import BenchConfig
from hifiprune.config.files import to_dict
from hifiprune.config.groups import ComputeConfig
from hifiprune.engine.compute import resolved_device
from hifiprune.engine.context import check_names
from hifiprune.engine.machine import Machine
from hifiprune.errors import RunError, UserError
from hifiprune.evaluation.speed import operations, request
from hifiprune.formatting import short_names
from hifiprune.io.atomic import replacing
from hifiprune.io.output_paths import check_target, exclusive
from hifiprune.io.processes import run_program
from hifiprune.io.resume import ResumeFolder, kept
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.lineage import commits_of, read_with
from hifiprune.models.mlp import count_parameters, find_mlps
from hifiprune.progress import how_many, logger, track
from hifiprune.pruning.cut_checkpoint import hash_stored, stored_plainly
from hifiprune.results import BenchedModel, BenchResults, Spread, TimedWorkload, Timing, Timings, Workload
from hifiprune.run_record import RunRecord

ALIGNED = 64
"""Widths that this divides keep the matrix units of GPUs, and the vector units of CPUs, busy."""
NOISY = 0.1
"""Spread of a model's timings, relative to their median, above which small gains cannot be told."""
ENOUGH = 3
"""Rounds that show a spread."""
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantiles of Student's t distribution with 1, 2, ... degrees of freedom; the last serves for more."""


@exclusive
def bench(
    dense: str, pruned: Sequence[str], config: BenchConfig = BenchConfig(), output: str | Path | None = None
) -> RunRecord[BenchResults]:
    """Time prefill and decode, the models in turn, each time in a fresh process.

    Args:
        dense: local folder, hub id or GGUF file of the dense model.
        pruned: those of the models to compare with it.
        config: options.
        output: folder to be made, with the results in `run.json`.

    Raises:
        UserError: something asked for cannot be done.
        RunError: a model could not be timed.
    """
    names, compute, rounds = [dense, *pruned], config.compute, config.rounds
    record: RunRecord[BenchResults] = RunRecord("bench", {"dense": dense, "pruned": list(pruned), **to_dict(config)})
    check_names(names)
    checkpoints = [find_checkpoint(name) for name in names]
    record.commits = commits_of(*checkpoints)
    skeletons = [check_model(checkpoint, compute) for checkpoint in checkpoints]
    check_positions(checkpoints, skeletons, config)
    inputs = [path for checkpoint in checkpoints for path in read_with(checkpoint)]
    target = None if output is None else check_target(output, folder=True, overwrite=config.overwrite, inputs=inputs)
    for checkpoint in checkpoints:
        checkpoint.fetch()
        if stored_plainly(checkpoint):
            hash_stored(checkpoint)  # which refuses NaN: what is computed with it takes another time
    workloads = [
        Workload(size, length, config.new_tokens, fast)
        for fast, size, length in product(
            [False, True] if config.compiled else [False], config.batch_sizes, config.lengths
        )
    ]
    logger.info(
        f"Timing {len(names)} models on {how_many(len(workloads), 'workload')} in {how_many(rounds, 'round')}, each "
        f"time in a fresh process on {resolved_device(compute)}; leave the machine alone meanwhile. The time left is "
        "told as it goes."
    )
    crowd = _crowd(compute)
    for remark in crowd:
        logger.info(remark)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    resume_folder = ResumeFolder.beside(target, "bench") if target else None
    with record.stage("timing"):
        for number, checkpoint in track([*product(range(rounds), checkpoints)], "timing"):
            asked = request(checkpoint.exact_name, compute, workloads, config.repeats)
            facts = ["turns", number, asked, _stamps(checkpoint), version("hifiprune")]
            turn = kept(resume_folder, facts, partial(_timed, checkpoint.name, asked))
            runs[checkpoint.name].append(turn)
    models = {checkpoint.name: describe_model(checkpoint, runs[checkpoint.name]) for checkpoint in checkpoints}
    record.results = compare_models(models, skeletons, workloads, runs, crowd)
    if target and resume_folder:
        record.reused_parts = len(resume_folder.reused)
        with replacing(target, overwrite=config.overwrite) as new:
            new.mkdir()
            record.save(new / "run.json")
        resume_folder.remove()
    return record


def compare_models(
    models: dict[str, BenchedModel],
    skeletons: Sequence[PreTrainedModel],
    workloads: Sequence[Workload],
    runs: dict[str, list[dict[str, Any]]],
    remarks: list[str],
) -> BenchResults:
    """Return the gains of all models on every workload that could be timed, with what a reader should know of them."""
    troubles = [_trouble(runs, number) for number in range(len(workloads))]
    timed = []
    for number, work in enumerate(workloads):
        if not troubles[number]:
            seconds = [_timings(rounds, number) for rounds in runs.values()]
            timed.append(compare_timings(work, [*models], seconds, [operations(model, work) for model in skeletons]))
    turns = next(iter(runs.values()))
    return BenchResults(
        models,
        timed,
        **{fact: turns[0][fact] for fact in ("threads", "device", "dtype")},
        remarks=[*remarks, *dict.fromkeys(filter(None, troubles)), *_remarks(models, timed, len(turns))],
    )


def check_positions(
    checkpoints: Sequence[Checkpoint], skeletons: Sequence[PreTrainedModel], config: BenchConfig
) -> None:
    """Refuse more tokens than a model has positions."""
    longest = max(config.lengths)
    for checkpoint, skeleton in zip(checkpoints, skeletons, strict=True):
        most = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
        if most and longest + config.new_tokens > most:
            raise UserError(
                f"{longest} tokens and {config.new_tokens} new ones exceed the {most} positions of {checkpoint.name}; "
                "use a smaller --lengths"
            )


def _crowd(compute: ComputeConfig) -> list[str]:
    """Return a warning if other work would disturb the timings."""
    machine = Machine.now()
    if resolved_device(compute) != "cpu" or not machine.busy:
        return []
    return [
        f"The machine was busy before the first timing ({machine}): timings then tell of the other work, not of the "
        "models; wait until it has ended."
    ]


def _stamps(checkpoint: Checkpoint) -> list[list[int]]:
    """Return size and time of each weight file, which tell files apart without reading them."""
    return [[file.st_size, file.st_mtime_ns] for file in map(Path.stat, checkpoint.weight_files)]


def _trouble(runs: dict[str, list[dict[str, Any]]], number: int) -> str:
    """Return why a workload could not be timed; empty if it could."""
    for name, turns in runs.items():
        for turn in turns:
            if trouble := turn["timings"][number].get("trouble"):
                return f"torch.compile does not work here: {name}: {trouble}"
    return ""


def _timed(name: str, asked: str) -> dict[str, Any]:
    """Time a checkpoint in a fresh process."""
    command = [sys.executable, "-m", "hifiprune.evaluation.speed", asked]
    done = run_program(command)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise (UserError if done.returncode == UserError.exit_code else RunError)(
            f"{name} could not be timed: {lines[-1]}"
        )
    timings: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return timings


def describe_model(checkpoint: Checkpoint, runs: list[dict[str, Any]]) -> BenchedModel:
    """Return the sizes of a model, and medians over the rounds."""
    skeleton = checkpoint.skeleton()
    widths = sorted({mlp.neurons for mlp in find_mlps(skeleton)})
    medians: dict[str, float] = {
        name: median(run[name] for run in runs)
        for name in ("loading", "peak_memory_bytes", "peak_gpu_memory_bytes")
        if name in runs[0]
    }
    return BenchedModel(
        parameters=count_parameters(skeleton),
        weight_bytes=checkpoint.weight_bytes,
        widths=[widths[0], widths[-1]],
        unaligned=[width for width in widths if width % ALIGNED],
        **medians,
    )


def _timings(runs: list[dict[str, Any]], number: int) -> dict[str, list[float]]:
    """Return the median of the repeats of a workload in every round."""
    return {part: [median(run["timings"][number][part]) for run in runs] for part in ("first", "later")}


def compare_timings(
    work: Workload, names: list[str], timings: list[dict[str, list[float]]], counted: list[dict[str, float]]
) -> TimedWorkload:
    """Return every model on a workload: medians with the lowest and highest round, and the gain on the dense model."""
    rows = {
        name: Timings(
            *(gain(timings[0][part], seconds[part], counted[0][part], needed[part]) for part in ("first", "later"))
        )
        for name, seconds, needed in zip(names, timings, counted, strict=True)
    }
    noise = max((max(part) - min(part)) / median(part) for seconds in timings for part in seconds.values())
    return TimedWorkload(work, noise, rows)


def gain(dense: list[float], seconds: list[float], dense_operations: float, operations: float) -> Timing:
    """Return the timing of a model by round, beside that of the dense model in the same rounds."""
    ratios = [theirs / ours for theirs, ours in zip(dense, seconds, strict=True)]
    promised = dense_operations / operations
    return Timing(
        seconds=_spread(seconds),
        operations=operations,
        speedup=_spread(ratios),
        promised=promised,
        share=(1 - 1 / median(ratios)) / (1 - 1 / promised) if promised > 1 else None,
        told_apart=told_apart(ratios),
    )


def told_apart(speedups: Sequence[float]) -> bool:
    """Return whether speed-ups, one of each round, show a difference from 1 that is more than noise.

    All must lie on one side of 1, and so must the 95% interval of the mean of their logarithms.
    """
    logarithms = [math.log(each) for each in speedups]
    if len(logarithms) < 2 or min(logarithms) <= 0 <= max(logarithms):
        return False
    quantile = QUANTILES[min(len(logarithms) - 1, len(QUANTILES)) - 1]
    return abs(mean(logarithms)) > quantile * stdev(logarithms) / math.sqrt(len(logarithms))


def _spread(values: list[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def _remarks(models: dict[str, BenchedModel], timed: list[TimedWorkload], rounds: int) -> list[str]:
    """Return remarks on how these figures can be read."""
    shown = dict(zip(models, short_names(models), strict=True))
    remarks = [
        f"{shown[name]}: widths such as {model.unaligned[0]:,} are no multiples of {ALIGNED}, "
        f"which many kernels want; the nearest is {max(1, round(model.unaligned[0] / ALIGNED)) * ALIGNED:,}."
        for name, model in models.items()
        if model.unaligned
    ]
    noise = max((workload.noise for workload in timed), default=0.0)
    if noise > NOISY:
        remarks.append(
            f"The timings of one model differ by up to {noise:.0%} between rounds: smaller gains are not significant."
        )
    if rounds < ENOUGH:
        few = "1 round does" if rounds == 1 else f"{rounds} rounds do"
        remarks.append(f"{few} not tell how noisy the machine is: give --rounds {ENOUGH} or more.")
    unclear = dict.fromkeys(
        shown[name]
        for workload in timed
        for name, row in workload.models.items()
        for part in (row.first, row.later)
        if part.speedup.low < 1 < part.speedup.high
    )
    remarks += [
        f"{name} is faster in some rounds and slower in others: the difference is not significant." for name in unclear
    ]
    return remarks
