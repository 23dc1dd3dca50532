"""Steps that `prune` and `score` share: each is announced, timed, and resumable."""

from dataclasses import asdict

import torch
from jaxtyping import Int
from torch import Tensor

from hifiprune.calibration import Texts, read_texts, sample_windows
from hifiprune.commands.cost_model import Estimator
from hifiprune.commands.job import DenseModel, Job, PruneJob
from hifiprune.commands.messages import announce_costs, announce_scoring, remark_on_start, remark_on_unseen
from hifiprune.commands.prepare import check_tokens, streams
from hifiprune.engine.compute import compute_dtype
from hifiprune.io.pass_checkpoint import PassCheckpoint
from hifiprune.progress import labelled, logger
from hifiprune.results import Cost
from hifiprune.scores import Scores
from hifiprune.scoring.score import score_all

Windows = Int[Tensor, "windows positions"]


def read_calibration(job: Job) -> Texts | None:
    """Draw windows from the calibration text and read prompts, unless the model writes all without any."""
    if job.calibration is None or not job.calibration.texts:
        return None
    with job.record.stage("reading the calibration data"), labelled("reading the calibration text, pieces"):
        tokenizer = job.checkpoint.tokenizer()
        texts = read_texts(job.calibration, tokenizer)
    remark_on_start(job.calibration, tokenizer)
    check_tokens(job.checkpoint, texts.windows, *(torch.tensor([prompt]) for prompt in texts.prompts))
    return texts


def calibration_windows(dense: DenseModel, job: Job, texts: Texts | None) -> Windows | None:
    """Return all windows, those that are sampled from the dense model itself among them; None if nothing reads any."""
    if not job.samples:
        return texts.windows if texts else None
    assert job.calibration
    model = dense.load()
    with job.record.stage("sampling text from the model"):
        return sample_windows(model, job.calibration, texts)


def estimator_of(dense: DenseModel, job: Job) -> Estimator:
    """Return what tells the costs of steps; made before the weights are loaded."""
    if job.checkpoint.is_here or not job.checkpoint.on_hub:
        job.checkpoint.fetch()
    dtype = compute_dtype(job.compute, job.checkpoint)
    streamed = not job.resident and streams(job.checkpoint, job.compute, dtype)
    return Estimator(job.checkpoint, job.compute, streamed=streamed)


def estimate_costs(dense: DenseModel, job: Job) -> Estimator:
    """Tell and record what the run will cost; return what tells it."""
    estimator = estimator_of(dense, job)
    costs = costs_of(dense, job, estimator)
    job.record.expected = costs
    logger.info(announce_costs(costs, estimator.device))
    uncounted = {
        "downloading the weights": not job.checkpoint.is_here,
        "reading the weights": job.checkpoint.is_here and not dense.stored_plainly,
        "sampling text from the model": job.samples,
    }
    if any(uncounted.values()):
        logger.info(
            f"Not included in the estimate: {', '.join(name for name, left_out in uncounted.items() if left_out)}."
        )
    return estimator


def costs_of(dense: DenseModel, job: Job, estimator: Estimator) -> list[Cost]:
    """Return the cost of each step of a run that can be foreseen."""
    sizes = (job.calibration.num_samples, job.calibration.seq_len) if job.calibration else (0, 0)
    prunes = job if isinstance(job, PruneJob) else None
    in_memory = prunes and (prunes.repairs or prunes.config.bias_compensation)
    loads = job.request or in_memory or (job.checkpoint.is_here and not dense.stored_plainly)
    costs = [estimator.loading() if loads else estimator.checking()]
    if job.request:
        costs.append(estimator.scoring([job.request], *sizes))
    if prunes and prunes.repairs:
        costs.append(estimator.repair(*sizes, prunes.width, prunes.training))
    if prunes:
        costs.append(estimator.writing(1 - prunes.shape.ratio_at(prunes.width)))
    return costs


def score_dense(dense: DenseModel, windows: Windows | None, job: Job, estimator: Estimator) -> Scores:
    """Score every neuron of the dense model, until the selection is stable where that is asked for."""
    assert job.request
    job.checkpoint.fetch()
    model = dense.load()
    if windows is not None:
        logger.info(f"{announce_scoring(windows, [job.request], estimator)}.")
        if job.stability:
            logger.info(f"Upper bound: scoring stops once {100 * job.stability.wanted:g}% of the selection is stable.")
        logger.info("Interrupted, the same command goes on where it stopped.")
    settings = {"calibration": asdict(job.calibration)} if job.calibration else None
    keeper = PassCheckpoint(job.resume_folder.of(model, dense.hash))
    with job.record.stage("scoring"):
        (scores,) = score_all(
            model,
            windows,
            [job.request],
            batch_size=job.compute.batch_size,
            recompute=job.compute.recompute,
            settings=settings,
            model_hash=dense.hash,
            keeper=keeper,
            stability=job.stability,
        )
    job.record.reused_parts = len(job.resume_folder.reused)
    remark_on_unseen(scores)
    return scores
