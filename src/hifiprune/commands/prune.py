"""`prune`: check, score, decide widths, cut and repair, write."""

from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from transformers import PreTrainedModel

from hifiprune.commands.cost_model import Estimator
from hifiprune.commands.job import DenseModel, PruneJob
from hifiprune.commands.messages import announce_repair, remark_on_more_text, remark_on_scale
from hifiprune.commands.prune_preflight import resolve
from hifiprune.commands.score import describe_scores
from hifiprune.commands.steps import Windows, calibration_windows, estimate_costs, read_calibration, score_dense
from hifiprune.config.prune import PruneConfig
from hifiprune.engine.reproducible import reproducible
from hifiprune.engine.spill import Spilled
from hifiprune.io.atomic import replacing
from hifiprune.io.distributed import rank
from hifiprune.io.output_paths import exclusive
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.save_model import save_model
from hifiprune.plan import Plan
from hifiprune.progress import logger
from hifiprune.pruning.allocate import allocate
from hifiprune.pruning.cut import cut_
from hifiprune.pruning.cut_checkpoint import write_cut
from hifiprune.pruning.finished_blocks import Repair
from hifiprune.pruning.repair import changed_tensors, cut_and_repair_
from hifiprune.reports.model_card import write_card
from hifiprune.results import Pair, PruneResults, Ratio
from hifiprune.run_record import RunRecord
from hifiprune.scores import Scores


@exclusive
@reproducible
def prune(model: str, output: str | Path, config: PruneConfig, scores: Scores | None = None) -> RunRecord[PruneResults]:
    """Prune a checkpoint into the new folder `output`, from calibration data or from scores made before.

    The folder holds an ordinary checkpoint, `run.json`, and the scores and the plan in its folder `hifiprune`.

    Args:
        model: local folder, hub id or GGUF file.
        output: folder to be made, written beside and renamed when whole.
        config: options.
        scores: scores of this very model, in place of the file that the options name.

    Raises:
        UserError: something asked for cannot be done, found before the weights are loaded where possible.
        RunError: numbers, memory or disk failed.
    """
    job = resolve(model, output, config, scores)  # every check, no weights: budget, paths, space, families
    texts = read_calibration(job)  # windows of texts, and prompts
    dense = DenseModel(job)  # resident or streamed, and loaded when it is first needed
    if job.scores and not config.dry_run and job.checkpoint.is_here and dense.stored_plainly:
        dense.check_scores(job.scores)  # refused before costs are estimated
    estimator = estimate_costs(dense, job)
    if config.dry_run:
        return job.record
    if job.scores and job.samples:
        dense.load_scored(job.scores)  # refuses scores of another model before text is sampled
    windows = calibration_windows(dense, job, texts)  # [windows, positions], read or sampled; None without a text
    neuron_scores = job.scores or score_dense(dense, windows, job, estimator)
    if rank() > 0:
        return job.record  # the first process does the rest
    remark_on_scale(neuron_scores, job.allocation)
    plan = allocate(neuron_scores, job.budget, round_to=job.system.round_to, allocation=job.allocation)
    cut = cut_and_repair(dense, neuron_scores, plan, windows, job, estimator)
    return write(cut, plan, neuron_scores, job)


@dataclass(frozen=True)
class Cut:
    """What to write: `model` if it is there, else the checkpoint's files, cut on the way, with the `changed` tensors.

    Attributes:
        model: cut model in the checkpoint's own dtype, where the files cannot be cut.
        changed: repaired tensors, written instead of those in the files.
        repair: how each refit and each reconstruction went, where the cut was repaired.
    """

    model: PreTrainedModel | None = None
    changed: dict[str, Spilled] | None = None
    repair: Repair | None = None


def cut_and_repair(
    dense: DenseModel, scores: Scores, plan: Plan, windows: Windows | None, job: PruneJob, estimator: Estimator
) -> Cut:
    """Cut the dense model, and repair it or put mean outputs into its biases where that is asked for."""
    repair = None
    if job.repairs:
        assert windows is not None
        model = dense.load_scored(scores)
        logger.info(announce_repair(windows, sum(plan.widths) // len(plan.widths), estimator, job.training))
        with job.record.stage("cutting and repairing"):
            repair = cut_and_repair_(
                model,
                plan,
                windows,
                training=job.training,
                batch_size=estimator.batch(*windows.shape),
                resume_folder=job.resume_folder.of(model, dense.hash),
            )
        assert job.calibration
        remark_on_more_text(repair.refits, job.calibration)
    elif job.config.bias_compensation or not dense.stored_plainly:
        model = dense.load_scored(scores, job.checkpoint.dtype())
        cut_(model, plan, scores.means if job.config.bias_compensation else None)
    else:
        dense.check_scores(scores)
        return Cut()
    if dense.stored_plainly:
        return Cut(changed=changed_tensors(model, job.training), repair=repair)
    return Cut(in_stored_dtype(dense, model, plan, job), repair=repair)


def in_stored_dtype(dense: DenseModel, repaired: PreTrainedModel, plan: Plan, job: PruneJob) -> PreTrainedModel:
    """Return the repaired model in the checkpoint's dtype; all that repair did not change is exactly as stored."""
    dtype = job.checkpoint.dtype()
    if torch.promote_types(repaired.dtype, dtype) == repaired.dtype:  # no less precise: casting back is exact
        return repaired.type(dtype)
    changed = changed_tensors(repaired, job.training)
    model = dense.load(dtype)
    cut_(model, plan)
    with torch.no_grad():
        for name, values in changed.items():
            model.get_parameter(name).copy_(values())
    return model


def write(cut: Cut, plan: Plan, scores: Scores, job: PruneJob) -> RunRecord[PruneResults]:
    """Write the checkpoint, what it was decided from, its record and its card."""
    record, target, shard_size = job.record, job.target, job.config.shard_size
    with replacing(target, overwrite=job.config.overwrite) as folder:
        with record.stage("writing"):
            if cut.model:
                save_model(cut.model, job.checkpoint, folder, shard_size, layout=job.config.layout)
            else:
                write_cut(job.checkpoint, plan, folder, shard_size, cut.changed, layout=job.config.layout)
        (folder / "hifiprune").mkdir()
        scores.save(folder / "hifiprune" / "scores.safetensors")
        plan.save(folder / "hifiprune" / "plan.json")
        after = Checkpoint(str(target), folder).weight_bytes
        record.results = PruneResults(
            **vars(describe_scores(scores, job)),
            **describe_plan(plan),
            asked=str(job.budget),
            weight_bytes=Pair(job.checkpoint.weight_bytes, after),
            repair=cut.repair.refits if cut.repair else None,
            reconstruction=(cut.repair.reconstructions or None) if cut.repair else None,
        )
        record.save(folder / "run.json")
        write_card(folder, job.base, target.name)
    job.resume_folder.remove()
    return record


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Return the fields of `PruneResults` that a plan gives."""
    kept, neurons = sum(plan.widths), sum(plan.neurons)
    widths = [width for before, width in zip(plan.neurons, plan.widths, strict=True) if before == mode(plan.neurons)]
    return {
        "width": Pair(mode(plan.neurons), plan.widths if len({*widths}) > 1 else widths[0]),
        "parameters": Pair(plan.parameters_before, plan.parameters_after),
        "ratio": Ratio(plan.ratio_asked, plan.ratio_reached),
        "neuron_ratio_reached": 1 - kept / neurons,
    }
