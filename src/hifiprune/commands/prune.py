"""The story of each command, told in order: what is checked, what is computed, what is written."""

from functools import partial
from pathlib import Path
from statistics import mode
from typing import Any

from hifiprune.calibration import Calibration
from hifiprune.commands.inspect import shape_of
from hifiprune.commands.messages import announce_plan, remark_on_blocks, remark_on_options, remark_on_unused
from hifiprune.commands.preflight import (
    check_compensation,
    check_data,
    check_steps,
    kept_resident,
    scored_by,
    settle_system,
    stability_of,
    text_for,
    width_for,
)
from hifiprune.commands.prepare import plain_arguments, prepare
from hifiprune.commands.stages import Stages
from hifiprune.defaults import DEFAULT_CRITERION
from hifiprune.engine.compute import Compute
from hifiprune.errors import UserError
from hifiprune.io.atomic import check_shard_size, check_space, replacing
from hifiprune.io.distributed import rank
from hifiprune.io.output_paths import exclusive
from hifiprune.io.resume import Unfinished
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.plan import Budget, Plan
from hifiprune.progress import note
from hifiprune.pruning.allocate import Sharing, allocate
from hifiprune.pruning.iterative import Course
from hifiprune.reports.model_card import Base, describe_base, write_card
from hifiprune.run_record import RunRecord
from hifiprune.scores import Scores
from hifiprune.scoring.criteria import Options
from hifiprune.scoring.early_stopping import Stability
from hifiprune.scoring.load_scores import load_scores


@exclusive
def score_checkpoint(
    model: str,
    output: str | Path,
    calibration: Calibration | None = None,
    *,
    criterion: str = DEFAULT_CRITERION,
    options: Options | None = None,
    until_stable: float | None = None,
    ratio: float | None = None,
    compute: Compute = Compute(),
    overwrite: bool = False,
    dry_run: bool = False,
) -> RunRecord:
    """Score a checkpoint and write the scores, from which it can be pruned at any ratio in seconds.

    Args:
        model: local folder, hub id or GGUF file.
        output: safetensors file to be made.
        calibration: what to score on; not needed for criteria that look at weights alone.
        criterion: how to score; see `CRITERIA`.
        options: what the criterion leaves open.
        until_stable: stop once the set kept at `ratio` would agree so well with that of all windows; see
            `hifiprune.scoring.early_stopping`.
        ratio: for which the scores will be used.
        compute: device and arithmetic.
        overwrite: replace an existing output.
        dry_run: stop once it is known what the run will cost, which the record then says.

    Raises:
        UserError: something asked for cannot be done, found before the weights are loaded where possible.
        RunError: numbers, memory or disk failed.
    """
    if (until_stable is None) != (ratio is None):
        raise UserError("until-stable and ratio go together: stable is what is kept at a ratio")
    stability = None
    if until_stable is not None:
        stability = Stability(until_stable, partial(allocate, budget=Budget(ratio=ratio), round_to=1))
        stability.check([criterion])
    request = (criterion, options or Options(seed=calibration.seed if calibration else 0))
    record = RunRecord(
        "score",
        plain_arguments(
            model=model, output=output, calibration=calibration, criterion=criterion, options=request[1],
            until_stable=until_stable, ratio=ratio, compute=compute,
        ),
    )  # fmt: skip
    check_data(criterion, calibration)
    checkpoint, target, skeleton = prepare(
        model, output, [calibration], compute=compute, folder=False, overwrite=overwrite
    )
    if ratio is not None:
        shape_of(skeleton).width_at(Budget(ratio=ratio), 1)
    unfinished = Unfinished.beside(target, "score")
    stages = Stages(checkpoint, calibration, compute, record, unfinished, kept_resident(calibration))
    stages.read()
    stages.foresee(request)
    if dry_run:
        return record
    scores = stages.score(request, stability=stability)
    if rank() > 0:
        return record
    scores.save(target, overwrite=overwrite)
    record.results |= _describe_scores(scores)
    stages.finish()
    return record


@exclusive
def prune(
    model: str,
    output: str | Path,
    budget: Budget,
    calibration: Calibration | None = None,
    *,
    scores: Scores | str | Path | None = None,
    preset: str = "default",
    criterion: str | None = None,
    options: Options | None = None,
    allocation: str | None = None,
    floor: float = Sharing.floor,
    trials: int = Sharing.trials,
    steps: int = 1,
    until_stable: float | None = None,
    repair: str | None = None,
    bias_compensation: bool = False,
    round_to: int | None = None,
    compute: Compute = Compute(),
    shard_size: str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
) -> RunRecord:
    """Prune a checkpoint into the new folder `output`, from calibration data or from scores made before.

    The folder holds an ordinary checkpoint, `run.json`, and the scores and the plan in its folder `hifiprune`.

    Args:
        model: local folder, hub id or GGUF file.
        output: folder to be made; written beside and renamed when whole.
        budget: how much to remove.
        calibration: what to score, search and repair on; with `scores` for the latter two, and not needed without
            them for criteria that look at weights alone.
        scores: scores of this very model, or the file of them.
        preset: what stands for all that is not given: `default`, or one of the papers' systems, `hfprune` or
            `sdmprune`; see `hifiprune.commands.presets`.
        criterion: how to score; see `CRITERIA`.
        options: what the criterion leaves open; by default alpha and temperature follow the ratio, as in the papers.
        allocation: `uniform` widths, which a stock configuration holds; by one `global` threshold on the scores; or
            `searched`. Checkpoints whose widths differ load with `trust_remote_code=True`, or by this library.
        floor: fraction of the uniform width that every MLP keeps where widths differ.
        trials: plans that the search tries.
        steps: how often to score; the model is cut, and repaired where that is asked for, by as much between.
        until_stable: stop scoring once the kept set would agree so well with that of all windows; see
            `hifiprune.scoring.early_stopping`.
        repair: `ridge` refits each MLP's output map to what the dense model computes, in closed form; or `none`, the
            default where there is no calibration, or biases are compensated.
        bias_compensation: put the mean output of the removed neurons into the bias of each output map, as FLAP does;
            only for architectures that have one, with criteria that collect mean activations.
        round_to: widths become the nearest multiple of it.
        compute: device and arithmetic of scoring.
        shard_size: largest weight file, such as `5GB`.
        overwrite: replace an existing output.
        dry_run: stop once it is known what the run will cost, which the record then says.

    Raises:
        UserError: something asked for cannot be done, found before the weights are loaded where possible.
        RunError: numbers, memory or disk failed.
    """
    asked = {"criterion": criterion, "allocation": allocation, "repair": repair, "round_to": round_to}
    system = settle_system(preset, asked, calibration, scored=bool(scores), bias_compensation=bias_compensation)
    calibration = text_for(system, calibration, scored=bool(scores))
    path = scores if isinstance(scores, str | Path) else None
    used = load_scores(scores) if isinstance(scores, str | Path) else scores
    if used:
        system = scored_by(used, system, asked=bool(criterion) or preset != "default")
    criterion, repair, round_to = system.criterion, system.repair, system.round_to
    sharing = Sharing(system.allocation, floor, trials)
    course = Course(steps, budget, round_to, sharing, repair=repair != "none")
    check_steps(course, used, calibration)
    stability = stability_of(until_stable, course, criterion, scored=used is not None)
    remark_on_unused(None if used else options, criterion, sharing)
    sources = plain_arguments(model=model, output=output, budget=budget, calibration=calibration, compute=compute)
    settings = plain_arguments(
        scores=path, criterion=criterion, options=options, preset=preset,
        sharing=sharing, steps=steps, until_stable=until_stable, round_to=round_to, repair=repair,
        bias_compensation=bias_compensation, shard_size=shard_size, overwrite=overwrite,
    )  # fmt: skip
    record = RunRecord("prune", sources | settings)
    check_shard_size(shard_size)
    checkpoint, target, skeleton = prepare(
        model, output, [calibration], [path], compute=compute, folder=True, overwrite=overwrite
    )
    if bias_compensation:
        check_compensation(checkpoint, used, criterion)
    base = describe_base(checkpoint)
    shape, width = width_for(skeleton, course, used)
    check_space(target, int(checkpoint.dtype().itemsize * shape.total_parameters * (1 - shape.ratio_at(width))))
    note(announce_plan(budget, shape, width, round_to, sharing.allocation))
    remark_on_blocks(budget, shape, width, sharing)
    ratio = budget.ratio or shape.ratio_at(width)
    remark_on_options(used, ratio)
    unfinished = Unfinished.beside(target, "prune")
    resident = kept_resident(calibration, course, bias_compensation)
    stages = Stages(checkpoint, calibration, compute, record, unfinished, resident)
    stages.read()
    if used and not dry_run and checkpoint.is_here and stages.stored_plainly:
        stages.check(used)  # before anything is said
    options = options or Options(seed=calibration.seed if calibration else 0)
    request = None if used else (criterion, options.for_ratio(ratio))
    stages.foresee(request, 1 - shape.ratio_at(width), width, course, compensate=bias_compensation)
    if dry_run:
        return record
    if request:
        used = stages.score(request, course, stability)
    assert used
    if rank() > 0:
        return record  # the first process does the rest
    plan = stages.plan(used, budget, round_to, sharing)
    record.results |= _describe_plan(plan, str(budget)) | _describe_scores(used)
    changed = stages.change(used, plan, repair=repair != "none", compensate=bias_compensation)
    with replacing(target, overwrite=overwrite) as folder:
        with record.stage("writing"):
            stages.save(changed, plan, folder, shard_size)
        _write_decisions(folder, target, checkpoint, used, plan, record, base)
    stages.finish()
    return record


def _write_decisions(
    folder: Path, target: Path, checkpoint: Checkpoint, scores: Scores, plan: Plan, record: RunRecord, base: Base
) -> None:
    """What the checkpoint in a folder was decided from, and its card."""
    (folder / "hifiprune").mkdir()
    scores.save(folder / "hifiprune" / "scores.safetensors")
    plan.save(folder / "hifiprune" / "plan.json")
    after = Checkpoint(str(target), folder).weight_bytes
    record.results["weight_bytes"] = {"before": checkpoint.weight_bytes, "after": after}
    record.save(folder / "run.json")
    write_card(folder, record.to_dict(), base, target.name)


def _describe_scores(scores: Scores) -> dict[str, Any]:
    return {
        "criterion": scores.criterion,
        "objective_nats": scores.objective,
        "model_hash": scores.model_hash,
        "data_hash": scores.data_hash,
        "scoring": scores.settings,
    }


def _describe_plan(plan: Plan, asked: str) -> dict[str, Any]:
    kept, neurons = sum(plan.widths), sum(plan.neurons)
    widths = [width for before, width in zip(plan.neurons, plan.widths, strict=True) if before == mode(plan.neurons)]
    return {
        "width": {"before": mode(plan.neurons), "after": plan.widths if len({*widths}) > 1 else widths[0]},
        "parameters": {"before": plan.parameters_before, "after": plan.parameters_after},
        "asked": asked,
        "ratio": {"asked": plan.ratio_asked, "reached": plan.ratio_reached},
        "neuron_ratio_reached": 1 - kept / neurons,
    }
