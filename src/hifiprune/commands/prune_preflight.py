"""Resolve a `prune` run: fill in defaults, and check everything before weights are loaded."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from hifiprune.bounds import size_in_bytes
from hifiprune.commands.inspect import shape_of
from hifiprune.commands.job import PruneJob
from hifiprune.commands.messages import (
    announce_plan,
    remark_on_amount,
    remark_on_blocks,
    remark_on_ignored,
    remark_on_options,
    remark_on_unused,
)
from hifiprune.commands.prepare import prepare
from hifiprune.commands.score import SAMPLED, batches_of, check_data, check_resident, options_of
from hifiprune.config.files import to_dict
from hifiprune.config.groups import AUTO, DECI, Budget
from hifiprune.config.presets import ACROSS_LAYERS, PRESETS, Preset
from hifiprune.config.prune import PruneConfig
from hifiprune.config.texts import Calibration
from hifiprune.errors import UserError
from hifiprune.io.atomic import check_space, disk_size
from hifiprune.io.resume import ResumeFolder
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.configuration_deci import MULTIPLE
from hifiprune.models.detect import family_of
from hifiprune.models.layouts import deci_obstacle, settled_layout
from hifiprune.models.lineage import commits_of
from hifiprune.models.mlp import find_mlps
from hifiprune.plan import ModelShape
from hifiprune.progress import note
from hifiprune.pruning.allocate import allocate
from hifiprune.pruning.cut import require_bias
from hifiprune.reports.model_card import describe_base
from hifiprune.results import PruneResults
from hifiprune.run_record import RunRecord
from hifiprune.scores import Scores
from hifiprune.scoring.criteria import find_criterion
from hifiprune.scoring.early_stopping import Stability
from hifiprune.scoring.load_scores import check_layout, load_scores
from hifiprune.width_table import WidthTable


def resolve(model: str, output: str | Path, config: PruneConfig, scores: Scores | None = None) -> PruneJob:
    """Settle all that is left open, and check everything that can be checked before weights are loaded.

    Args:
        model: local folder, hub id or GGUF file.
        output: folder to be made.
        config: options.
        scores: scores of the model, in place of the file that the options name.

    Raises:
        UserError: something asked for cannot be done.
    """
    scored = scores is not None or config.scores is not None
    asked_system = settle_system(config, scored=scored)
    calibration = text_for(asked_system, config, scored=scored)
    if scores is None and config.scores:
        scores = load_scores(config.scores)
    if config.allocation.table:
        table = WidthTable.load(config.allocation.table)
        if scores:
            table.require_scores(scores)
    system = scored_by(scores, asked_system, config) if scores else asked_system
    stability = stability_of(config, system, scored=scored)
    options = options_of(replace(config, calibration=calibration))
    settled = replace(
        config,
        calibration=calibration,
        criterion=system.criterion,
        repair=system.repair,
        round_to=system.round_to,
        options=options,
    )
    remark_on_unused(None if scores else options, settled)
    if scores:
        remark_on_ignored(settled)
    size_in_bytes("shard size", config.shard_size)
    record: RunRecord[PruneResults] = RunRecord("prune", {"model": model, "output": str(output), **to_dict(settled)})
    checkpoint, target, skeleton = prepare(
        model,
        output,
        [calibration],
        [config.scores, config.allocation.table],
        compute=config.compute,
        folder=True,
        overwrite=config.overwrite,
    )
    record.commits = commits_of(checkpoint)
    if config.budget.max_size:
        budget = budget_of_size(config.budget.max_size, checkpoint, shape_of(skeleton), system.round_to)
        config, settled = replace(config, budget=budget), replace(settled, budget=budget)
    if config.bias_compensation:
        check_compensation(checkpoint, scores, system.criterion)
    base = describe_base(checkpoint)
    shape, width = width_for(skeleton, config, system, scores)
    check_output_layout(skeleton, settled, width)
    check_space(target, int(checkpoint.dtype().itemsize * shape.total_parameters * (1 - shape.ratio_at(width))))
    note(announce_plan(config.budget, shape, width, system.round_to, config.allocation.method))
    remark_on_blocks(config.budget, shape, width, config.allocation)
    if calibration and system.repair != "none":
        remark_on_amount(calibration, width)
    ratio = config.budget.ratio or shape.ratio_at(width)
    remark_on_options(scores, ratio)
    resident = resident_for(config, calibration)
    check_resident(resident, config.compute)
    return PruneJob(
        checkpoint=checkpoint,
        target=target,
        calibration=calibration,
        compute=batches_of(config.compute, calibration),
        record=record,
        resume_folder=ResumeFolder.beside(target, "prune"),
        resident=resident,
        request=None if scores else (system.criterion, options.for_ratio(ratio)),
        stability=stability,
        config=settled,
        system=system,
        shape=shape,
        width=width,
        scores=scores,
        base=base,
    )


def settle_system(config: PruneConfig, *, scored: bool) -> Preset:
    """Return what the preset, and what is given in place of its parts, come to with this text."""
    preset, repair = PRESETS[config.preset], config.repair
    if repair is None and (config.calibration is None or config.bias_compensation):
        repair = "none"  # the default gives way
        if config.calibration is None and preset.repair != "none":
            note("No --calibration: repair is skipped.")
    compares_layers = config.preset == "default" and config.allocation.method != "uniform"
    round_to = MULTIPLE if config.layout == DECI else preset.round_to
    system = replace(
        preset,
        criterion=config.criterion or (ACROSS_LAYERS if compares_layers else preset.criterion),
        repair=repair or preset.repair,
        round_to=round_to if config.round_to is None else config.round_to,
    )
    check_texts(system, config, scored=scored)
    return system


def check_texts(system: Preset, config: PruneConfig, *, scored: bool) -> None:
    """Check that there is a text for each step that reads one, and a use for the one that is given."""
    calibration, repairs = config.calibration, system.repair != "none"
    if not scored:
        check_data(system.criterion, calibration)
    elif calibration and not repairs:
        raise UserError("--scores replaces scoring: drop --calibration, or use it with --repair ridge")
    if repairs and calibration and calibration.num_samples < 2:
        raise UserError("repair needs at least 2 windows, of which it holds one out: --num-samples 2, or --repair none")
    if repairs and calibration is None:
        raise UserError("repair needs text to fit to: give --calibration, or --repair none")
    if repairs and config.bias_compensation:
        raise UserError("repair refits biases itself: give one of --repair and --bias-compensation, not both")


def text_for(system: Preset, config: PruneConfig, *, scored: bool) -> Calibration | None:
    """Return the text with windows begun as the system's are, if anything reads it; tell where nothing does."""
    scores_text = find_criterion(system.criterion).statistic is not None
    read = scored or scores_text or system.repair != "none"
    if config.calibration and not read:
        note(f"Criterion '{system.criterion}' needs no text and repair is off: --calibration is ignored.")
        return None
    return config.calibration and replace(config.calibration, bos=config.calibration.bos and system.bos)


def scored_by(scores: Scores, system: Preset, config: PruneConfig) -> Preset:
    """Return the same with scores that were made before, which a criterion that was asked for must have made.

    Raises:
        UserError: another criterion made them.
    """
    if (config.criterion or config.preset != "default") and scores.criterion != system.criterion:
        raise UserError(
            f"the scores were made by '{scores.criterion}', and '{system.criterion}' is asked for: leave out --scores, "
            "or --criterion and --preset"
        )
    return replace(system, criterion=scores.criterion)


def stability_of(config: PruneConfig, system: Preset, *, scored: bool) -> Stability | None:
    """Return what ends scoring early, where that is asked for."""
    if config.until_stable is None:
        return None
    if config.budget.max_size:
        raise UserError("until-stable needs a --ratio, --neuron-ratio or --width, in place of --max-size")
    if scored:
        raise UserError("until-stable cannot be combined with --scores: drop one")
    select = partial(allocate, budget=config.budget, round_to=system.round_to, allocation=config.allocation)
    stability = Stability(config.until_stable, select)
    stability.check([system.criterion])
    return stability


def resident_for(config: PruneConfig, calibration: Calibration | None) -> str:
    """Return what of this is done with weights in memory only, if anything is."""
    if calibration and calibration.is_sampled:
        return SAMPLED
    return "biases are compensated" if config.bias_compensation else ""


def budget_of_size(max_size: str, checkpoint: Checkpoint, shape: ModelShape, round_to: int) -> Budget:
    """Return the largest width, a multiple of `round_to`, whose weight files take no more than a size.

    Raises:
        UserError: the dense model takes no more, or none does.
    """
    most, removable = size_in_bytes("max-size", max_size), checkpoint.dtype().itemsize * shape.total_parameters
    dense = checkpoint.weight_bytes if checkpoint.is_here else removable
    if dense <= most:
        raise UserError(f"max-size {max_size}: the dense model's weight files take no more, {disk_size(dense)}")
    sizes = {
        width: dense - round(removable * shape.ratio_at(width)) for width in range(round_to, shape.neurons, round_to)
    }
    width = max((width for width, size in sizes.items() if size <= most), default=None)
    if width is None:
        least = min(sizes.values(), default=dense)
        raise UserError(
            f"max-size {max_size} is less than is left where every MLP keeps {round_to} neurons: {disk_size(least)}"
        )
    note(f"For weight files of {disk_size(sizes[width])}, at most {max_size}: --width {width}.")
    return Budget(width=width)


def width_for(
    skeleton: PreTrainedModel, config: PruneConfig, system: Preset, scores: Scores | None
) -> tuple[ModelShape, int]:
    """Return the sizes of a model, and the width of its MLPs, or of most of them.

    Raises:
        UserError: the budget cannot be met, the widths could not be saved, or scores made before do not fit the model.
    """
    if scores:
        scores.require_finite()
        check_layout(scores, skeleton)
    shape = shape_of(skeleton)
    width = shape.width_at(config.budget, system.round_to)
    shape.check_experts(config.allocation.method, width)
    if config.allocation.method != "uniform" and (reason := family_of(skeleton.config).one_width_reason):
        raise UserError(f"{reason}; use --allocation uniform")
    return shape, width


def check_output_layout(skeleton: PreTrainedModel, config: PruneConfig, width: int) -> None:
    """Refuse a layout that cannot hold the widths that are possible; tell where other multiples would fit better.

    Layers keep multiples of `round_to`, or all that they have; of `width` if that is none.

    Raises:
        UserError: the layout cannot.
    """
    assert config.round_to
    mlps = {mlp.neurons for mlp in find_mlps(skeleton) if not mlp.is_expert}
    step = config.round_to if width % config.round_to == 0 else 1
    possible = sorted({width} if config.allocation.method == "uniform" else {width, width + step, *mlps})
    if config.layout == AUTO and len(possible) > 1:
        fitting = [size // MULTIPLE * MULTIPLE for size in possible]
        if deci_obstacle(skeleton.config, possible) and not deci_obstacle(skeleton.config, [*fitting, *mlps]):
            note(
                f"Widths are not multiples of {MULTIPLE}: the checkpoint gets a modeling file (layout remote). With "
                f"--round-to {MULTIPLE} it gets the layout deci, which vLLM, SGLang, TensorRT-LLM and mlx-lm implement."
            )
    settled_layout(config.layout, skeleton.config, possible)


def check_compensation(checkpoint: Checkpoint, scores: Scores | None, criterion: str) -> None:
    """Refuse biases to be compensated where there are none, or no mean activations."""
    require_bias(find_mlps(checkpoint.skeleton()))
    if not (scores.means if scores else find_criterion(criterion).collects_means):
        raise UserError(f"criterion '{criterion}' has no mean activations for biases; use flap")
