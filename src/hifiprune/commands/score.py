"""`score`: check, read the text, score, write."""

from functools import partial
from pathlib import Path
from typing import cast

from hifiprune.commands.inspect import shape_of
from hifiprune.commands.job import DenseModel, Job
from hifiprune.commands.prepare import prepare
from hifiprune.commands.steps import calibration_windows, estimate_costs, read_calibration, score_dense
from hifiprune.config.files import to_dict
from hifiprune.config.groups import Budget, ComputeConfig, CriterionOptions
from hifiprune.config.prune import PruneConfig, ScoreConfig
from hifiprune.config.texts import Calibration
from hifiprune.engine.compute import limit_batch
from hifiprune.engine.reproducible import reproducible
from hifiprune.errors import UserError
from hifiprune.io.distributed import rank
from hifiprune.io.output_paths import exclusive
from hifiprune.io.resume import ResumeFolder
from hifiprune.models.lineage import commits_of
from hifiprune.pruning.allocate import allocate
from hifiprune.results import ScoreResults, Scoring
from hifiprune.run_record import RunRecord
from hifiprune.scores import Scores
from hifiprune.scoring.criteria import find_criterion
from hifiprune.scoring.early_stopping import Stability

SAMPLED = "text is sampled from the model"
"""Why weights must be in memory."""


@exclusive
@reproducible
def score_checkpoint(model: str, output: str | Path, config: ScoreConfig = ScoreConfig()) -> RunRecord[ScoreResults]:
    """Score a checkpoint and write the scores, from which it can be pruned at any ratio in seconds.

    Args:
        model: local folder, hub id or GGUF file.
        output: safetensors file to be made.
        config: options.

    Raises:
        UserError: something asked for cannot be done, found before the weights are loaded where possible.
        RunError: numbers, memory or disk failed.
    """
    job = resolve(model, output, config)  # every check, no weights
    texts = read_calibration(job)
    dense = DenseModel(job)
    estimator = estimate_costs(dense, job)
    if config.dry_run:
        return job.record
    windows = calibration_windows(dense, job, texts)
    scores = score_dense(dense, windows, job, estimator)
    if rank() > 0:
        return job.record  # the first process writes
    scores.save(job.target, overwrite=config.overwrite)
    job.record.results = describe_scores(scores, job)
    job.resume_folder.remove()
    return job.record


def resolve(model: str, output: str | Path, config: ScoreConfig) -> Job:
    """Check everything that can be checked before weights are loaded.

    Raises:
        UserError: something asked for cannot be done.
    """
    if (config.until_stable is None) != (config.ratio is None):
        raise UserError("until-stable and ratio go together: stable is what is kept at a ratio")
    budget = Budget(ratio=config.ratio) if config.ratio is not None else None
    stability = None
    if config.until_stable is not None and budget:
        stability = Stability(config.until_stable, partial(allocate, budget=budget, round_to=1))
        stability.check([config.criterion])
    options = options_of(config)
    arguments = {"model": model, "output": str(output), **to_dict(config), "options": to_dict(options)}
    record: RunRecord[ScoreResults] = RunRecord("score", arguments)
    check_data(config.criterion, config.calibration)
    checkpoint, target, skeleton = prepare(
        model, output, [config.calibration], compute=config.compute, folder=False, overwrite=config.overwrite
    )
    record.commits = commits_of(checkpoint)
    if budget:
        shape_of(skeleton).width_at(budget, 1)
    resume_folder = ResumeFolder.beside(target, "score")
    resident = SAMPLED if config.calibration and config.calibration.is_sampled else ""
    check_resident(resident, config.compute)
    compute = batches_of(config.compute, config.calibration)
    request = (config.criterion, options)
    return Job(checkpoint, target, config.calibration, compute, record, resume_folder, resident, request, stability)


def check_data(criterion: str, calibration: Calibration | None) -> None:
    """Refuse a criterion that reads text where there is none."""
    if find_criterion(criterion).statistic and calibration is None:
        raise UserError(f"criterion '{criterion}' needs data: give --calibration, or --scores made before")


def check_resident(resident: str, compute: ComputeConfig) -> None:
    """Refuse weights to be streamed where something needs them in memory."""
    if resident and compute.stream:
        raise UserError(f"{resident} with weights in memory only: leave out --stream")


def options_of(config: ScoreConfig | PruneConfig) -> CriterionOptions:
    """Return the criterion's options, by default with the seed of the calibration data."""
    seed = config.calibration.seed if config.calibration else 0
    return config.options or CriterionOptions(seed=seed)


def batches_of(compute: ComputeConfig, calibration: Calibration | None) -> ComputeConfig:
    """Return the same with a batch size of no more than all windows."""
    return limit_batch(compute, calibration.num_samples, "windows") if calibration else compute


def describe_scores(scores: Scores, job: Job) -> ScoreResults:
    """Return what a run record says of scores."""
    return ScoreResults(
        criterion=scores.criterion,
        objective_nats=scores.objective,
        model_hash=scores.model_hash,
        data_hash=scores.data_hash,
        scoring=cast("Scoring", scores.settings),
        stability=job.stability.curve if job.stability else None,
    )
