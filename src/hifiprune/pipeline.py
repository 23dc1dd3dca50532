"""The story of each command, told in order: what is checked, what is computed, what is written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hifiprune import DEFAULT_CRITERION
from hifiprune.allocation import Budget, Sharing
from hifiprune.announcements import announce_plan, remark_on_blocks, remark_on_options, remark_on_unused
from hifiprune.calibration import Calibration
from hifiprune.cards import write_card
from hifiprune.checkpoint import Checkpoint
from hifiprune.compute import Compute
from hifiprune.criteria import Options, find_criterion
from hifiprune.errors import UserError, unknown
from hifiprune.inspection import shape_of
from hifiprune.neurons import find_mlps
from hifiprune.output import check_shard_size, check_space, replacing
from hifiprune.parallel import rank
from hifiprune.plan import Plan
from hifiprune.preparation import plain_arguments, prepare
from hifiprune.presets import Preset, settle
from hifiprune.reading import SELF
from hifiprune.record import RunRecord
from hifiprune.scores import Scores
from hifiprune.stability import Stability
from hifiprune.stages import Stages
from hifiprune.steps import Course
from hifiprune.surgery import require_bias
from hifiprune.unfinished import Unfinished
from hifiprune.voice import SILENT, Voice

REPAIRS = ("none", "ridge")


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
    voice: Voice = SILENT,
) -> RunRecord:
    """Score a checkpoint and write the scores, from which it can be pruned at any ratio in seconds.

    Args:
        model: local folder, hub id or GGUF file.
        output: safetensors file to be made.
        calibration: what to score on; not needed for criteria that look at weights alone.
        criterion: how to score; see `CRITERIA`.
        options: what the criterion leaves open.
        until_stable: stop once the set kept at `ratio` would agree so well with that of all windows; see
            `hifiprune.stability`.
        ratio: for which the scores will be used.
        compute: device and arithmetic.
        overwrite: replace an existing output.
        dry_run: stop once it is known what the run will cost, which the record then says.
        voice: tells of progress.

    Raises:
        UserError: something asked for cannot be done, found before the weights are loaded where possible.
        RunError: numbers, memory or disk failed.
    """
    if (until_stable is None) != (ratio is None):
        raise UserError("until-stable and ratio go together: stable is what is kept at a ratio")
    stability = None
    if until_stable is not None:
        stability = Stability(until_stable, Budget(ratio=ratio), round_to=1, voice=voice)
        stability.check([criterion])
    request = (criterion, options or Options(seed=calibration.seed if calibration else 0))
    record = RunRecord(
        "score",
        plain_arguments(
            model=model, output=output, calibration=calibration, criterion=criterion, options=request[1],
            until_stable=until_stable, ratio=ratio, compute=compute,
        ),
    )  # fmt: skip
    _check_data(criterion, calibration)
    checkpoint, target, skeleton = prepare(model, output, [calibration], folder=False, overwrite=overwrite)
    if ratio is not None:
        shape_of(skeleton).width_at(Budget(ratio=ratio), 1)
    unfinished = Unfinished.beside(target, "score", voice)
    stages = Stages(checkpoint, calibration, compute, record, voice, unfinished, _resident(calibration))
    stages.read()
    stages.foresee(request)
    if dry_run:
        return record
    scores = stages.score(request, stability=stability)
    if rank() > 0:
        return record
    scores.save(target)
    record.results |= _describe_scores(scores)
    stages.finish()
    return record


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
    voice: Voice = SILENT,
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
            `sdmprune`; see `hifiprune.presets`.
        criterion: how to score; see `CRITERIA`.
        options: what the criterion leaves open; by default alpha and temperature follow the ratio, as in the papers.
        allocation: `uniform` widths, which a stock configuration holds; by one `global` threshold on the scores; or
            `searched`. Checkpoints whose widths differ load with `trust_remote_code=True`, or by this library.
        floor: fraction of the uniform width that every MLP keeps where widths differ.
        trials: plans that the search tries.
        steps: how often to score; the model is cut, and repaired where that is asked for, by as much between.
        until_stable: stop scoring once the kept set would agree so well with that of all windows; see
            `hifiprune.stability`.
        repair: `ridge` refits each MLP's output map to what the dense model computes, in closed form; or `none`, the
            default where there is no calibration, or biases are compensated.
        bias_compensation: put the mean output of the removed neurons into the bias of each output map, as FLAP does;
            only for architectures that have one, with criteria that collect mean activations.
        round_to: widths become the nearest multiple of it.
        compute: device and arithmetic of scoring.
        shard_size: largest weight file, such as `5GB`.
        overwrite: replace an existing output.
        dry_run: stop once it is known what the run will cost, which the record then says.
        voice: tells of progress.

    Raises:
        UserError: something asked for cannot be done, found before the weights are loaded where possible.
        RunError: numbers, memory or disk failed.
    """
    asked = {"criterion": criterion, "allocation": allocation, "repair": repair, "round_to": round_to}
    system = _settle(preset, asked, calibration, voice, scored=bool(scores), bias_compensation=bias_compensation)
    if calibration and not scores and not _reads_text(system):
        voice.say(f"Criterion '{system.criterion}' needs no text and nothing is repaired: the text is not read.")
        calibration = None
    path = scores if isinstance(scores, str | Path) else None
    used = Scores.load(scores) if isinstance(scores, str | Path) else scores
    if used:
        system = _scored_by(used, system, asked=bool(criterion) or preset != "default")
    criterion, repair, round_to = system.criterion, system.repair, system.round_to
    sharing = Sharing(system.allocation, floor, trials)
    course = Course(steps, budget, round_to, sharing, repair=repair != "none")
    _check_steps(course, used, calibration)
    stability = _until_stable(until_stable, course, criterion, scored=used is not None, voice=voice)
    remark_on_unused(None if used else options, criterion, sharing, voice)
    sources = plain_arguments(model=model, output=output, budget=budget, calibration=calibration, compute=compute)
    settings = plain_arguments(
        scores=path, criterion=criterion, options=options, preset=preset,
        sharing=sharing, steps=steps, until_stable=until_stable, round_to=round_to, repair=repair,
        bias_compensation=bias_compensation, shard_size=shard_size, overwrite=overwrite,
    )  # fmt: skip
    record = RunRecord("prune", sources | settings)
    check_shard_size(shard_size)
    checkpoint, target, skeleton = prepare(model, output, [calibration], [path], folder=True, overwrite=overwrite)
    shape = shape_of(skeleton)
    if bias_compensation:
        _check_compensation(checkpoint, used, criterion)
    width = shape.width_at(budget, round_to)
    check_space(target, int(checkpoint.dtype().itemsize * shape.total_parameters * (1 - shape.ratio_at(width))))
    voice.say(announce_plan(budget, shape, width, round_to, sharing.allocation))
    remark_on_blocks(budget, shape, width, sharing, voice)
    ratio = budget.ratio or shape.ratio_at(width)
    if used:
        remark_on_options(used, ratio, voice)

    unfinished, resident = Unfinished.beside(target, "prune", voice), _resident(calibration, course, bias_compensation)
    stages = Stages(checkpoint, calibration, compute, record, voice, unfinished, resident)
    stages.read()
    settled = options or Options(seed=calibration.seed if calibration else 0)
    request = None if used else (criterion, settled.for_ratio(ratio))
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
    with replacing(target) as folder:
        with record.stage("writing"):
            stages.save(changed, plan, folder, shard_size)
        _write_decisions(folder, target, checkpoint, used, plan, record)
    stages.finish()
    return record


def _resident(calibration: Calibration | None, course: Course | None = None, compensate: bool = False) -> str:
    """What of this is done with weights in memory only."""
    if calibration and any(part.source == SELF for part in calibration.parts):
        return "text is sampled from the model"
    if course and course.sharing.allocation == "searched":
        return "widths are searched"
    if course and course.steps > 1:
        return "models are scored in steps"
    return "biases are compensated" if compensate else ""


def _write_decisions(
    folder: Path, target: Path, checkpoint: Checkpoint, scores: Scores, plan: Plan, record: RunRecord
) -> None:
    """What the checkpoint in a folder was decided from, and its card."""
    (folder / "hifiprune").mkdir()
    scores.save(folder / "hifiprune" / "scores.safetensors")
    plan.save(folder / "hifiprune" / "plan.json")
    after = Checkpoint(str(target), folder).weight_bytes
    record.results["weight_bytes"] = {"before": checkpoint.weight_bytes, "after": after}
    record.save(folder / "run.json")
    write_card(folder, record.to_dict(), checkpoint, target.name)


def _check_data(criterion: str, calibration: Calibration | None) -> None:
    if find_criterion(criterion).statistic and calibration is None:
        raise UserError(f"criterion '{criterion}' needs data: give --calibration, or --scores made before")


def _check_compensation(checkpoint: Checkpoint, scores: Scores | None, criterion: str) -> None:
    require_bias(find_mlps(checkpoint.skeleton()))
    if not (scores.means if scores else find_criterion(criterion).collects_means):
        raise UserError(f"criterion '{criterion}' has no mean activations for biases; use flap")


def _settle(
    preset: str,
    asked: dict[str, Any],
    calibration: Calibration | None,
    voice: Voice,
    *,
    scored: bool,
    bias_compensation: bool,
) -> Preset:
    """What a preset, and what is asked for in place of its parts, come to with this text."""
    if asked["repair"] is None and (calibration is None or bias_compensation):
        asked = asked | {"repair": "none"}  # the default gives way
        if calibration is None and settle(preset).repair != "none":
            voice.say("Without --calibration there is no text to repair with: the cut stays a plain one.")
    system = settle(preset, **asked)
    _check_texts(system, calibration, scored=scored, bias_compensation=bias_compensation)
    return system


def _scored_by(scores: Scores, system: Preset, *, asked: bool) -> Preset:
    """The same with scores that were made before, which a criterion that was asked for must have made."""
    if asked and scores.criterion != system.criterion:
        raise UserError(
            f"the scores were made by '{scores.criterion}', and '{system.criterion}' is asked for: leave out --scores, "
            "or --criterion and --preset"
        )
    return replace(system, criterion=scores.criterion)


def _check_texts(system: Preset, calibration: Calibration | None, *, scored: bool, bias_compensation: bool) -> None:
    """Whether there is a text for each step that reads one, and a use for the one that is given."""
    if system.repair not in REPAIRS:
        raise unknown("repair", system.repair, REPAIRS)
    fits = system.repair != "none" or system.allocation == "searched"
    if not scored:
        _check_data(system.criterion, calibration)
    elif calibration and not fits:
        raise UserError("give one of --calibration and --scores, not both; both only to repair or search")
    if system.repair != "none" and calibration and calibration.num_samples < 2:
        raise UserError("repair needs at least 2 windows, of which it holds one out: --num-samples 2, or --repair none")
    if system.repair != "none" and calibration is None:
        raise UserError("repair needs text to fit to: give --calibration, or --repair none")
    if fits and calibration is None:
        raise UserError("a search for widths needs text to measure on: give --calibration, or another --allocation")
    if system.repair != "none" and bias_compensation:
        raise UserError("repair refits biases itself: give one of --repair and --bias-compensation, not both")


def _reads_text(system: Preset) -> bool:
    needs_data = find_criterion(system.criterion).statistic is not None
    return needs_data or system.repair != "none" or system.allocation == "searched"


def _check_steps(course: Course, scores: Scores | None, calibration: Calibration | None) -> None:
    if course.steps > 1 and scores:
        raise UserError(f"{course.steps} steps score the model anew: leave out --scores")
    if course.steps > 1 and calibration is None:
        raise UserError(f"{course.steps} steps need text to score on anew: give --calibration")


def _until_stable(
    wanted: float | None, course: Course, criterion: str, *, scored: bool, voice: Voice
) -> Stability | None:
    """What ends scoring early, where that is asked for; widths that will be searched are judged by one threshold."""
    if wanted is None:
        return None
    if scored or course.steps > 1:
        raise UserError("until-stable is for one scoring of the model: leave it out, or --scores and --steps")
    sharing = (
        replace(course.sharing, allocation="global") if course.sharing.allocation == "searched" else course.sharing
    )
    stability = Stability(wanted, course.budget, course.round_to, sharing, voice)
    stability.check([criterion])
    return stability


def _describe_scores(scores: Scores) -> dict[str, Any]:
    return {
        "criterion": scores.criterion,
        "objective_nats": scores.objective,
        "model_hash": scores.model_hash,
        "data_hash": scores.data_hash,
        "scoring": scores.settings,
    }


def _describe_plan(plan: Plan, asked: str) -> dict[str, Any]:
    kept, neurons, uniform = sum(plan.widths), sum(plan.neurons), len(set(plan.widths)) == 1
    return {
        "width": {"before": plan.neurons[0], "after": plan.widths[0] if uniform else plan.widths},
        "parameters": {"before": plan.parameters_before, "after": plan.parameters_after},
        "asked": asked,
        "ratio": {"asked": plan.ratio_asked, "reached": plan.ratio_reached},
        "neuron_ratio_reached": 1 - kept / neurons,
    }
