"""Messages before the work begins: expected costs, and remarks."""

import math
from collections.abc import Sequence
from dataclasses import asdict

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hifiprune.commands.cost_model import Estimator, total_disk
from hifiprune.config.groups import AllocationConfig, Budget, ComputeConfig, CriterionOptions
from hifiprune.config.prune import PruneConfig
from hifiprune.config.texts import Calibration
from hifiprune.defaults import REPAIR_STEPS
from hifiprune.deployment.engines import K_BLOCK
from hifiprune.engine.machine import condition
from hifiprune.io.atomic import disk_size
from hifiprune.io.distributed import processes
from hifiprune.io.tokenization import special_tokens
from hifiprune.plan import EXPERT, ModelShape
from hifiprune.progress import about, logger, note
from hifiprune.pruning.reconstruct import Training
from hifiprune.results import Cost, Refit
from hifiprune.scores import Scores
from hifiprune.scoring.criteria import CRITERIA, find_criterion
from hifiprune.scoring.score import Request, count_passes

TOKENS_PER_NEURON = 4
"""Calibration tokens for each neuron that is refitted, which are recommended where there are few."""
HELPS = 0.1
"""Share of repair's held-out error that more text would remove, above which that is said."""


def announce_plan(budget: Budget, shape: ModelShape, width: int, round_to: int, allocation: str) -> str:
    """Return a message on the requested budget and the resulting widths."""
    reached = f"{shape.ratio_at(width):.2%} of all parameters, {1 - width / shape.neurons:.2%} of the neurons"
    if budget.width is not None and allocation == "uniform":
        return f"Plan: width {shape.neurons} -> {width}, removes {reached}."
    if allocation != "uniform":
        return f"Plan: {budget}; {allocation} allocation, mean width {width} of {shape.neurons}, removes {reached}."
    asked = f"{budget.ratio:.2%} of all parameters" if budget.ratio else f"{budget.neuron_ratio:.2%} of the neurons"
    return f"Plan: asked {asked}; width {shape.neurons} -> {width}, a multiple of {round_to}, removes {reached}."


def remark_on_blocks(budget: Budget, shape: ModelShape, width: int, allocation: AllocationConfig) -> None:
    """Remark if k-quants support the dense model's width but not the new one."""
    if allocation.method != "uniform" or shape.neurons % K_BLOCK or not width % K_BLOCK:
        return  # widths that differ are not for llama.cpp at all
    flag, best = ("--width", width // K_BLOCK * K_BLOCK) if budget.width else ("--round-to", K_BLOCK)
    remedy = f"; {flag} {best} avoids that" if width > K_BLOCK else ""
    note(
        f"Width {width} is not a multiple of {K_BLOCK}: llama.cpp's k-quants use fallback types for the "
        f"down projections{remedy}."
    )


def announce_scoring(
    windows: Int[Tensor, "windows positions"], requests: Sequence[Request], estimator: Estimator
) -> str:
    """Return a message on the expected cost of scoring."""
    cost, (forwards, backwards) = estimator.scoring(requests, len(windows), windows.shape[1]), count_passes(requests)
    criteria = ", ".join(dict.fromkeys(f"'{name}'" for name, _ in requests))
    shared = f", shared out among {processes()} processes" if processes() > 1 else ""
    size = estimator.batch(*windows.shape)
    how = ", recomputing" * estimator.graphs(size * windows.shape[1]).recompute
    how = f" ({size} windows a step{how})" if size > 1 else " (recomputing)" * bool(how)
    return (
        f"Scoring {estimator.checkpoint.name} by {criteria} on {len(windows)} windows of {windows.shape[1]} tokens"
        f"{shared}, {estimator.dtype} on {estimator.device}: {forwards} forward and "
        f"{backwards} backward pass{'es' * (backwards != 1)}{how}, "
        f"{about(cost.seconds)} and {cost.memory / 1e9:.1f} GB of memory"
    )


def announce_costs(costs: Sequence[Cost], device: torch.device) -> str:
    """Return a message on the expected cost of the whole run."""
    seconds, memory, disk = sum(cost.seconds for cost in costs), max(cost.memory for cost in costs), total_disk(costs)
    each = f" for each of {processes()} processes" if processes() > 1 else ""
    written = f" and {disk_size(disk)} on the disk" if disk else ""
    return f"In all {about(seconds)}, {memory / 1e9:.1f} GB of memory{each}{written}{condition(device)}."


def announce_repair(
    windows: Int[Tensor, "windows positions"], width: int, estimator: Estimator, training: Training | None
) -> str:
    """Return a message on the expected cost of repair."""
    cost = estimator.repair(len(windows), windows.shape[1], width, training)
    return (
        f"Repairing on {len(windows)} windows of {windows.shape[1]} tokens, {estimator.dtype} on {estimator.device}: "
        f"{about(cost.seconds)} and {cost.memory / 1e9:.1f} GB of memory."
    )


def remark_on_options(scores: Scores | None, ratio: float) -> None:
    """Remark if precomputed scores were made with other options than the papers' at this ratio."""
    made = scores.settings.get("options", {}) if scores else {}
    papers = {name: value for name, value in asdict(CriterionOptions().for_ratio(ratio)).items() if name in made}
    differing = [name for name in ("alpha", "temperature") if name in made and made[name] != papers[name]]
    for name in differing:
        note(f"The scores were made with {name} {made[name]:g}; the papers use {papers[name]:g} near this ratio.")


def remark_on_scale(scores: Scores, allocation: AllocationConfig) -> None:
    """Remark if a global threshold is applied to scores that are not comparable across layers."""
    known = CRITERIA.get(scores.criterion)
    if allocation.method == "global" and known and not known.across_layers:
        logger.warning(
            f"Scores by '{scores.criterion}' are not on one scale in all layers; widths by them mean little."
        )


def remark_on_amount(calibration: Calibration, width: int) -> None:
    """Remark if repair has fewer tokens than neurons to refit, so that its moments are singular but for damping."""
    tokens = calibration.num_samples * calibration.seq_len
    if tokens < width:
        note(
            f"{tokens} calibration tokens are fewer than the {width} neurons that repair refits in each MLP: damping "
            f"decides much of it. Use --num-samples {-(-TOKENS_PER_NEURON * width // calibration.seq_len)} or more."
        )


def remark_on_more_text(refits: Sequence[Refit], calibration: Calibration) -> None:
    """Remark if repair fits its text much better than the held-out windows, which more text would change.

    A regression on `n` tokens errs as much less on them as it errs more on others, both by a share that falls as `1/n`:
    endless text would bring both errors to the middle.
    """
    known = [refit for refit in refits if refit.fitted_share is not None]
    held = sum(refit.error for refit in known)
    fitted = sum(refit.plain_error * (refit.fitted_share or 0.0) for refit in known)
    share = (held - fitted) / 2 / held if held else 0.0
    if share > HELPS:
        wanted = calibration.num_samples * 2 ** math.ceil(math.log2(share / HELPS))
        logger.info(
            f"More text would help the repair, by up to {share:.0%} of the error that it leaves on held-out windows: "
            f"--num-samples {wanted}."
        )


def remark_on_start(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> None:
    """Remark if calibration windows lack the start token that the tokenizer puts before a text."""
    if not calibration.bos and (start := special_tokens(tokenizer)[0]):
        logger.info(
            f"Windows of the calibration text do not begin with {tokenizer.decode(start)}, which the tokenizer writes "
            "before a text: as in the papers."
        )


def remark_on_unseen(scores: Scores) -> None:
    """Remark on experts that received no calibration tokens."""
    experts = [values for name, values in zip(scores.names, scores.values, strict=True) if EXPERT.search(name)]
    unseen = sum(bool((values == values[0]).all()) for values in experts)
    if unseen:
        logger.warning(
            f"{unseen} of {len(experts)} experts received no calibration tokens: which of their neurons stay is "
            "arbitrary. Give more text, or text of more kinds."
        )


def remark_on_unused(options: CriterionOptions | None, settled: PruneConfig) -> None:
    """Remark on options that are set but have no effect."""
    criterion, allocation, unused = settled.criterion or "", settled.allocation, []
    if options:
        others = [name for name in asdict(options) if name not in (*find_criterion(criterion).options, "seed")]
        unused += [name for name in others if getattr(options, name) != getattr(CriterionOptions(), name)]
    if allocation.method == "uniform" and allocation.floor != AllocationConfig().floor:
        unused.append("floor")
    if unused:
        names = ", ".join(name.replace("_", "-") for name in unused)
        note(f"Unused with criterion '{criterion}' and {allocation.method} allocation: {names}.")
    idle = {"repair-steps": settled.repair_steps != REPAIR_STEPS, "repair-minutes": settled.repair_minutes is not None}
    if settled.repair != "local" and any(idle.values()):
        note(f"Unused with --repair {settled.repair}: {', '.join(name for name, given in idle.items() if given)}.")


def remark_on_ignored(config: PruneConfig) -> None:
    """Remark on options that are set but have no effect because scores are precomputed."""
    settings = asdict(config.options or CriterionOptions()) | {"recompute": config.compute.recompute}
    usual = asdict(CriterionOptions()) | {"recompute": None}
    if config.calibration:
        del settings["seed"]
    else:
        settings |= {name: getattr(config.compute, name) for name in ("batch_size", "dtype", "attention")}
        usual |= {name: getattr(ComputeConfig(), name) for name in ("batch_size", "dtype", "attention")}
    ignored = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items() if value != usual[name]]
    if ignored:
        note(f"Ignored, since the --scores were made before: {', '.join(ignored)}.")
