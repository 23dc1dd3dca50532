"""The story of `bench`: how fast pruned checkpoints are beside the dense one, and how much of the promise that is."""

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
from hifiprune.evaluation.speed import Workload, operations, request
from hifiprune.formatting import short_names
from hifiprune.io.atomic import replacing
from hifiprune.io.output_paths import check_target, exclusive
from hifiprune.io.processes import run_program
from hifiprune.io.resume import ResumeFolder, kept
from hifiprune.models.checkpoint import Checkpoint, find_checkpoint
from hifiprune.models.lineage import commits_of, read_with
from hifiprune.models.mlp import count_parameters, find_mlps
from hifiprune.progress import how_many, logger, track
from hifiprune.pruning.cut_checkpoint import hash_stored, stored_plainly
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
) -> RunRecord:
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
    record = RunRecord("bench", {"dense": dense, "pruned": list(pruned), **to_dict(config)})
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
    unfinished = ResumeFolder.beside(target, "bench") if target else None
    with record.stage("timing"):
        for number, checkpoint in track([*product(range(rounds), checkpoints)], "timing"):
            asked = request(checkpoint.exact_name, compute, workloads, config.repeats)
            facts = ["turns", number, asked, _stamps(checkpoint), version("hifiprune")]
            turn = kept(unfinished, facts, partial(_timed, checkpoint.name, asked))
            runs[checkpoint.name].append(turn)
    counted = [[operations(skeleton, work) for skeleton in skeletons] for work in workloads]
    troubles = [_trouble(runs, number) for number in range(len(workloads))]
    record.results = {
        "models": {checkpoint.name: _facts(checkpoint, runs[checkpoint.name]) for checkpoint in checkpoints},
        "workloads": [
            _compared(work, names, [_timings(runs[name], number) for name in names], counted[number])
            for number, work in enumerate(workloads)
            if not troubles[number]
        ],
        **{fact: runs[dense][0][fact] for fact in ("threads", "device", "dtype")},
    }
    record.results["remarks"] = [*crowd, *dict.fromkeys(filter(None, troubles)), *_remarks(record.results, rounds)]
    if target and unfinished:
        record.reused_parts = len(unfinished.reused)
        with replacing(target, overwrite=config.overwrite) as new:
            new.mkdir()
            record.save(new / "run.json")
        unfinished.remove()
    return record


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
    """Size and time of each weight file: which files they are, without reading them."""
    return [[found.st_size, found.st_mtime_ns] for found in map(Path.stat, checkpoint.weight_files)]


def _trouble(runs: dict[str, list[dict[str, Any]]], number: int) -> str:
    """Why a workload could not be timed, if it could not."""
    found = (f"{name}: {each}" for name, own in runs.items() for run in own if (each := _told(run, number)))
    first = next(found, "")
    return f"torch.compile does not work here: {first}" if first else ""


def _told(run: dict[str, Any], number: int) -> str:
    return str(run["timings"][number].get("trouble", ""))


def _timed(name: str, asked: str) -> dict[str, Any]:
    """What a fresh process finds."""
    command = [sys.executable, "-m", "hifiprune.evaluation.speed", asked]
    done = run_program(command)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise (UserError if done.returncode == UserError.exit_code else RunError)(
            f"{name} could not be timed: {lines[-1]}"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _facts(checkpoint: Checkpoint, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Sizes, and medians over the rounds."""
    skeleton = checkpoint.skeleton()
    medians: dict[str, float] = {
        name: median(run[name] for run in runs)
        for name in ("loading", "peak_memory_bytes", "peak_gpu_memory_bytes")
        if name in runs[0]
    }
    widths = sorted({mlp.neurons for mlp in find_mlps(skeleton)})
    return {
        "parameters": count_parameters(skeleton),
        "weight_bytes": checkpoint.weight_bytes,
        "widths": [widths[0], widths[-1]],
        "unaligned": [width for width in widths if width % ALIGNED],
        **medians,
    }


def _timings(runs: list[dict[str, Any]], number: int) -> dict[str, list[float]]:
    """The median of the repeats of a workload in every round."""
    return {part: [median(run["timings"][number][part]) for run in runs] for part in ("first", "later")}


def _compared(
    work: Workload, names: list[str], timings: list[dict[str, list[float]]], counted: list[dict[str, float]]
) -> dict[str, Any]:
    """Every model on a workload: medians with the lowest and highest round, and the gain on the dense model."""
    rows: dict[str, dict[str, Any]] = {}
    for name, own, needed in zip(names, timings, counted, strict=True):
        rows[name] = {}
        for part in ("first", "later"):
            dense, seconds = timings[0][part], own[part]
            ratios = [theirs / ours for theirs, ours in zip(dense, seconds, strict=True)]  # of one round
            hoped = counted[0][part] / needed[part]
            rows[name][part] = {
                "seconds": _spread(seconds),
                "operations": needed[part],
                "speedup": _spread(ratios),
                "told_apart": told_apart(ratios),
                "promised": hoped,
                "share": (1 - 1 / median(ratios)) / (1 - 1 / hoped) if hoped > 1 else None,
            }
    noise = max((max(each[part]) - min(each[part])) / median(each[part]) for each in timings for part in each)
    return {"workload": vars(work), "noise": noise, "models": rows}


def told_apart(speedups: Sequence[float]) -> bool:
    """Return whether speed-ups, one of each round, show a difference from 1 that is more than noise.

    All must lie on one side of 1, and so must the 95% interval of the mean of their logarithms.
    """
    logarithms = [math.log(each) for each in speedups]
    if len(logarithms) < 2 or min(logarithms) <= 0 <= max(logarithms):
        return False
    quantile = QUANTILES[min(len(logarithms) - 1, len(QUANTILES)) - 1]
    return abs(mean(logarithms)) > quantile * stdev(logarithms) / math.sqrt(len(logarithms))


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def _remarks(results: dict[str, Any], rounds: int) -> list[str]:
    """What a reader should know of these figures."""
    known = dict(zip(results["models"], short_names(results["models"]), strict=True))
    remarks = [
        f"{known[name]}: widths such as {facts['unaligned'][0]:,} are no multiples of {ALIGNED}, "
        f"which many kernels want; the nearest is {max(1, round(facts['unaligned'][0] / ALIGNED)) * ALIGNED:,}."
        for name, facts in results["models"].items()
        if facts["unaligned"]
    ]
    noise = max((each["noise"] for each in results["workloads"]), default=0.0)
    if noise > NOISY:
        remarks.append(
            f"The timings of one model differ by up to {noise:.0%} between rounds: smaller gains are not significant."
        )
    if rounds < ENOUGH:
        few = "1 round does" if rounds == 1 else f"{rounds} rounds do"
        remarks.append(f"{few} not tell how noisy the machine is: give --rounds {ENOUGH} or more.")
    gains = {
        known[name]: each["speedup"]
        for found in results["workloads"]
        for name, row in found["models"].items()
        for each in row.values()
        if each["speedup"]["low"] < 1 < each["speedup"]["high"]
    }
    remarks += [
        f"{name} is faster in some rounds and slower in others: the difference is not significant." for name in gains
    ]
    return remarks
