"""Compute `Scores` from calibration windows, by one criterion or by several that share their passes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.config.groups import SDMPRUNE_SETTINGS, CriterionOptions
from hifiprune.defaults import DEFAULT_CRITERION
from hifiprune.engine.context import check_windows, frozen
from hifiprune.engine.memory import Graphs, choose_batch, choose_graphs, free_bytes, group_of
from hifiprune.engine.offload import walk
from hifiprune.engine.reproducible import repeatability
from hifiprune.engine.temporary_cut import cut
from hifiprune.engine.verify import verified_chain
from hifiprune.errors import UserError
from hifiprune.io.distributed import check_share, processes
from hifiprune.io.hashing import hash_model, hash_tokens
from hifiprune.io.pass_checkpoint import PassCheckpoint
from hifiprune.models.mlp import Mlp, by_block, count_parameters, find_mlps
from hifiprune.models.unsupported import refuse_altered
from hifiprune.plan import Plan, proportional_width, top_indices
from hifiprune.scores import Scores
from hifiprune.scoring.accumulate import Pass, PassConfig, StatisticJob, needs
from hifiprune.scoring.criteria import Criterion, find_criterion
from hifiprune.scoring.early_stopping import Stability, looks
from hifiprune.scoring.neuron_statistics import WITHOUT_WEIGHTS, Sample, mean_activation, weight_absolute
from hifiprune.scoring.objectives import CrossEntropy

Request = tuple[str, CriterionOptions]
"""Name of a criterion, and its options."""
LIGHT = StatisticJob(weight_absolute, (CrossEntropy(),), uses_projections=True)
"""Job whose scores decide the light cut of self-distillation."""


def score(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows positions"] | None,
    criterion: str = DEFAULT_CRITERION,
    options: CriterionOptions = CriterionOptions(),
    *,
    batch_size: int | None = None,
    recompute: bool | None = None,
) -> Scores:
    """Score every MLP neuron of `model` on `windows`; the model is not changed.

    Args:
        model: a causal language model of a supported family, on any device and in any floating dtype.
        windows: integer token ids; None for criteria that need no data.
        criterion: name of the criterion, see `hifiprune.scoring.criteria.CRITERIA`.
        options: options of the criterion.
        batch_size: windows per step; scores do not depend on it. By default one on a CPU, on a GPU as many as keep it
            busy and have room.
        recompute: run each block twice instead of keeping its graph; by default only where memory is short.

    Returns:
        scores with one float32 `[neurons]` tensor per MLP in layer order.

    Raises:
        UserError: the criterion, the windows or the architecture cannot be used.
        RunError: an activation or gradient is NaN or infinite, or memory ran out.
    """
    return score_all(model, windows, [(criterion, options)], batch_size=batch_size, recompute=recompute)[0]


def score_all(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows positions"] | None,
    requests: Sequence[Request],
    *,
    batch_size: int | None = None,
    recompute: bool | None = None,
    settings: Mapping[str, object] | None = None,
    model_hash: str | None = None,
    keeper: PassCheckpoint | None = None,
    stability: Stability | None = None,
) -> list[Scores]:
    """Score by several criteria at once: one forward pass, and one backward pass for each of their objectives.

    Processes started by `torchrun` or `accelerate launch` each process a share of the windows; all return the scores.

    Self-distillation adds a second pass over the lightly cut model; the dense model's final hidden states are kept from
    the first pass, so the teacher costs `windows * positions * hidden_size` numbers and no second model.

    Args:
        model: as in `score`.
        windows: as in `score`.
        requests: criteria with their options.
        batch_size: windows per step, by default chosen as in `score`; scores do not depend on it, since every window's
            mean is taken by itself.
        recompute: run each block twice instead of keeping its graph, for a fraction of the memory; by default only
            where the graphs would not fit into half of the free memory, or on a GPU into 8 GB, and for no more blocks.
        settings: further facts to store with the scores.
        model_hash: hash of the stored weights, if known; otherwise it is computed.
        keeper: saves the sums on disk from time to time, so that an interrupted call resumes to the same scores.
        stability: may stop before all windows are read; for a single criterion of one stage, in one process.

    Returns:
        scores in the order of the requests.
    """
    refuse_altered(model)
    asked = [Asked(find_criterion(name), options.for_ratio(min(SDMPRUNE_SETTINGS))) for name, options in requests]
    needing = [each.criterion.name for each in asked if each.criterion.statistic]
    if stability:
        stability.check([each.criterion.name for each in asked])
    if windows is None and needing:
        raise UserError(f"criterion '{needing[0]}' needs calibration data")
    config = PassConfig()
    facts: dict[str, Any] = {
        "compute_dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attention": model.config._attn_implementation,
        "hifiprune": version("hifiprune"),
    }
    facts |= repeatability(model.device)
    if windows is not None and needing:
        config = _configure(model, windows, requests, batch_size, recompute)
        facts |= {"windows": len(windows), "positions": windows.shape[1]}
        facts |= {"batch_size": config.batch_size, "recompute": config.graphs.recompute}
        if config.graphs.recompute and config.graphs.kept > 1:
            facts |= {"kept_graphs": config.graphs.kept}
    with frozen(model):
        outcomes = _run(model, windows, asked, config, keeper, stability)
        model_hash = model_hash or hash_model(model)
    if stability and windows is not None and outcomes[0].windows < len(windows):
        windows = windows[: outcomes[0].windows]
        facts |= {"windows": len(windows), "stability": stability.curve[-1]}
    return [
        replace(
            _as_scores(outcome, model, each),
            model_hash=model_hash,
            data_hash=hash_tokens(windows) if windows is not None and each.criterion.statistic else "",
            settings=facts | dict(settings or {}) | {"options": each.criterion.used(each.options)},
        )
        for each, outcome in zip(asked, outcomes, strict=True)
    ]


def _configure(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows positions"],
    requests: Sequence[Request],
    batch_size: int | None,
    recompute: bool | None,
) -> PassConfig:
    """Return the settings of a pass: those that are given, and the others by the free memory of the device."""
    check_windows(model, windows, batch_size or 1)
    device, free, positions = model.device, free_bytes(model.device), windows.shape[1]
    most = -(-len(windows) // processes())
    size = batch_size or min(most, choose_batch(model, positions, device, free))
    check_share(-(-len(windows) // size))
    graphs = choose_graphs(model, size * positions, device, free) if recompute is None else Graphs(recompute)
    objectives = max([len(needs(jobs)[0]) for jobs in passes_of(requests)], default=0)
    return PassConfig(size, graphs, group_of(model, size * positions, objectives))


@dataclass(frozen=True)
class Asked:
    """A criterion with its options."""

    criterion: Criterion
    options: CriterionOptions

    @property
    def job(self) -> StatisticJob | None:
        """Return the job for a pass; None if the criterion uses the weights alone."""
        if self.criterion.statistic is None:
            return None
        kernels = self.criterion.objective(self.options) if self.criterion.objective else ()
        return StatisticJob(self.criterion.statistic, kernels, self.criterion.uses_projections)


@dataclass(frozen=True)
class Schedule:
    """The jobs of the pass over the dense model, and of the pass over each lightly cut model, by the fraction cut."""

    first: list[StatisticJob]
    later: dict[float, list[Asked]]

    @classmethod
    def of(cls, asked: Sequence[Asked]) -> "Schedule":
        """Schedule every requested job once."""
        later: dict[float, list[Asked]] = {}
        for each in asked:
            if each.criterion.two_stages:
                later.setdefault(each.options.light_cut, []).append(each)
        first = [each.job for each in asked if each.job and not each.criterion.two_stages]
        return cls(first + [LIGHT] * bool(later), later)


def count_passes(requests: Sequence[Request]) -> tuple[int, int]:
    """Return the number of forward and backward passes over the windows that `score_all` will make."""
    passes = passes_of(requests)
    return len(passes), sum(len(needs(jobs)[0]) for jobs in passes)


def passes_of(requests: Sequence[Request]) -> list[list[StatisticJob]]:
    """Return the jobs of each pass over the windows that `score_all` will make."""
    schedule = Schedule.of([Asked(find_criterion(name), options) for name, options in requests])
    passes = [schedule.first, *([each.job for each in group if each.job] for group in schedule.later.values())]
    return [jobs for jobs in passes if jobs]


@dataclass
class Outcome:
    """Result of one criterion: float32 scores and mean activations per layer, mean objective, windows read."""

    values: list[Float[Tensor, "_"]]
    means: list[Float[Tensor, "_"]] | None
    objective: float | None
    windows: int = 0


def _run(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows positions"] | None,
    asked: list[Asked],
    config: PassConfig,
    keeper: PassCheckpoint | None,
    stability: Stability | None,
) -> list[Outcome]:
    """Run the pass over the dense model, then one over each lightly cut model."""
    mlps = find_mlps(model)
    schedule = Schedule.of(asked)
    for fraction in schedule.later:
        if int(min(mlp.neurons for mlp in mlps) * (1 - fraction)) < 1:
            raise UserError(f"light-cut {fraction:g} leaves no neuron in a layer; use a smaller one")
    first = None
    if windows is not None and schedule.first:
        first = Pass(verified_chain(model), windows, config, keeper)
        if stability:
            settled = partial(_settled, asked[0], model, stability, len(windows))
            first.run(schedule.first, looks=looks(len(windows), config.batch_size), settled=settled)
            windows = first.windows
        else:
            first.run(schedule.first, keep_hidden=bool(schedule.later))
    found = {each: _finish(each, first, model, windows) for each in asked if not each.criterion.two_stages}
    for fraction, group in schedule.later.items():
        assert first
        assert windows is not None
        light = _light_plan(first.totals[LIGHT], mlps, fraction)
        with cut(model, light):
            jobs = [each.job for each in group if each.job]
            late = keeper.of("light cut", fraction) if keeper else None
            second = Pass(verified_chain(model), windows, config, late).run(jobs, first.hidden)
            for each in group:
                kept = _finish(each, second, model, windows)
                found[each] = Outcome(_spread(kept.values, light, first.totals[LIGHT]), None, kept.objective)
    return [found[each] for each in asked]


def _finish(
    each: Asked, run: Pass | None, model: PreTrainedModel, windows: Int[Tensor, "windows positions"] | None
) -> Outcome:
    """Compute scores from the accumulated statistics and the weights."""
    job, mlps = each.job, find_mlps(model)
    sizes = (len(windows), windows.shape[1]) if windows is not None else (0, 0)
    layers = range(len(mlps))
    samples = [Sample(*sizes, len(job.kernels) if job else 0, each.options.seed, layer) for layer in layers]
    nothing = torch.empty(0)
    totals = [run.totals[job][layer] if run and job else nothing for layer in layers]
    parts = list(zip(totals, mlps, samples, strict=True))
    blocks = by_block(mlps)
    order = range(len(blocks)) if each.criterion.finish in WITHOUT_WEIGHTS else walk(model, range(len(blocks)))
    values = [each.criterion.finish(*parts[layer]).float().cpu() for block in order for layer in blocks[block]]
    means = [mean_activation(*part).float().cpu() for part in parts] if each.criterion.collects_means else None
    objective = run.objectives[job.kernels[0]] if run and job and job.kernels else None
    return Outcome(values, means, objective, sizes[0])


def _settled(each: Asked, model: PreTrainedModel, stability: Stability, of: int, run: Pass) -> bool:
    """Return whether the kept set would hardly change with more windows."""
    size = run.config.batch_size

    def halves() -> tuple[Scores, Scores]:
        odd = run.halves
        even = {
            job: {layer: total - odd[job][layer] for layer, total in found.items()} for job, found in run.totals.items()
        }
        half = run.windows[: run.done * size : 2]
        one, other = (_finish(each, replace(run, totals=totals), model, half) for totals in (even, odd))
        return _as_scores(one, model, each), _as_scores(other, model, each)

    return stability.settled(run.done * size, of, halves)


def _as_scores(outcome: Outcome, model: PreTrainedModel, each: Asked) -> Scores:
    """Return the scores, still without the hashes of weights and data."""
    mlps = find_mlps(model)
    return Scores(
        values=outcome.values,
        means=outcome.means,
        names=[mlp.name for mlp in mlps],
        parameters_per_neuron=[mlp.parameters_per_neuron for mlp in mlps],
        total_parameters=count_parameters(model),
        criterion=each.criterion.name,
        objective=outcome.objective,
        model_hash="",
        data_hash="",
    )


def _light_plan(totals: dict[int, Tensor], mlps: list[Mlp], fraction: float) -> Plan:
    """Remove the `fraction` of the neurons with the lowest scores."""
    least = min(mlp.neurons for mlp in mlps)
    widths = [proportional_width(int(least * (1 - fraction)), least, mlp.neurons) for mlp in mlps]
    kept = [top_indices(totals[layer][0].cpu(), width) for layer, width in enumerate(widths)]
    return Plan(kept, [mlp.neurons for mlp in mlps], [mlp.name for mlp in mlps], None, 0.0, 0, 0)


def _spread(values: list[Tensor], light: Plan, before: dict[int, Tensor]) -> list[Float[Tensor, "_"]]:
    """Merge the scores of two stages: the first one's, below zero, for neurons it cut; the second one's for others."""
    whole = []
    for layer, (late, kept) in enumerate(zip(values, light.kept, strict=True)):
        early = before[layer][0].cpu()
        scores = (early - early[kept].min()).float()
        scores[kept] = late
        whole.append(scores)
    return whole
