"""The steps that commands take with a checkpoint's model; each is announced, shown as it goes on, and timed."""

import gc
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.calibration import Calibration, load_windows, sample_windows
from hifiprune.commands.cost_model import Estimator
from hifiprune.commands.messages import (
    announce_costs,
    announce_course,
    announce_repair,
    announce_scoring,
    announce_search,
    remark_on_scale,
    remark_on_start,
    remark_on_unseen,
)
from hifiprune.commands.prepare import check_tokens, load_hashed, streams
from hifiprune.engine.compute import Compute
from hifiprune.errors import UserError
from hifiprune.evaluation.fidelity import divergence_of
from hifiprune.io.pass_checkpoint import Keeper
from hifiprune.io.resume import Unfinished
from hifiprune.io.text_sources import SELF
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.mlp import find_mlps
from hifiprune.plan import Budget, Plan
from hifiprune.progress import labelled, logger
from hifiprune.pruning.allocate import Sharing, allocate
from hifiprune.pruning.cut import cut_
from hifiprune.pruning.cut_checkpoint import hash_stored, output_maps, stored_plainly, write_cut
from hifiprune.pruning.iterative import Course, score_in_steps
from hifiprune.pruning.repair import cut_and_repair_
from hifiprune.pruning.search_widths import search, search_windows
from hifiprune.run_record import RunRecord
from hifiprune.scores import Scores
from hifiprune.scoring.early_stopping import Stability
from hifiprune.scoring.score import Request, score


@dataclass
class Stages:
    """A checkpoint on its way to a smaller one.

    Attributes:
        checkpoint: of the dense model.
        calibration: text to score, search and repair on, if there is any.
        compute: device and arithmetic.
        record: keeps what each step cost.
        unfinished: keeps what an interrupted run would have to do again.
        resident: what is done with weights in memory only, if anything is.
        model: loaded when a step first needs it.
        model_hash: of the dense weights as stored.
        text: windows of the calibration text, once they are read or sampled.
    """

    checkpoint: Checkpoint
    calibration: Calibration | None
    compute: Compute
    record: RunRecord
    unfinished: Unfinished
    resident: str = ""
    model: PreTrainedModel | None = None
    model_hash: str = ""
    text: Int[Tensor, "windows positions"] | None = None

    def __post_init__(self) -> None:
        if self.resident and self.compute.stream:
            raise UserError(f"{self.resident} with weights in memory only: leave out --stream")
        if self.calibration:
            self.compute = self.compute.for_rows(self.calibration.num_samples, "windows")

    def read(self) -> None:
        """Windows of a text, unless there is none or the model has yet to write it."""
        if self.calibration and self.calibration.source != SELF:
            with self.record.stage("reading the calibration data"):
                tokenizer = self.checkpoint.tokenizer()
                with labelled("reading the calibration text, pieces"):
                    self.text = load_windows(self.calibration, tokenizer)
            remark_on_start(self.calibration, tokenizer)
            check_tokens(self.checkpoint, self.text)

    def finish(self) -> None:
        """The output is there: what was kept for an interrupted run can go."""
        self.unfinished.remove()

    @cached_property
    def estimator(self) -> Estimator:
        """Tells what steps will cost; made before the weights are loaded."""
        if self.checkpoint.is_here or not self.checkpoint.on_hub:
            self.checkpoint.fetch()
        dtype = self.compute.dtype_for(self.checkpoint)
        return Estimator(
            self.checkpoint,
            self.compute,
            streamed=not self.resident and streams(self.checkpoint, self.compute, dtype),
        )

    def foresee(
        self,
        request: Request | None,
        share: float | None = None,
        width: int = 0,
        course: Course | None = None,
        *,
        compensate: bool = False,
    ) -> None:
        """Tell and record what will be done, and what it will cost.

        Args:
            request: criterion to score by, if the scores are not there.
            share: of the weights that is written, if any is.
            width: of the MLPs after.
            course: how they get there.
            compensate: whether biases will be changed.
        """
        estimator, text = self.estimator, self.calibration
        sizes = (text.num_samples, text.seq_len) if text else (0, 0)
        repairs, searches = course and course.repair, course and course.sharing.allocation == "searched"
        elsewhere = self.checkpoint.is_here and not self.stored_plainly
        loads = request or repairs or searches or compensate or elsewhere
        costs = [estimator.loading() if loads else estimator.checking()]
        if request:
            steps = course.steps if course else 1
            cost = estimator.scoring([request], *sizes, times=steps)
            if repairs and steps > 1:
                between = estimator.repair(*sizes, (width + max(estimator.widths)) // 2)
                cost = replace(cost, seconds=cost.seconds + (steps - 1) * between.seconds)
            costs.append(cost)
        if repairs:
            costs.append(estimator.repair(*sizes, width))
        if share is not None:
            costs.append(estimator.writing(share))
        self.record.expected = [asdict(cost) for cost in costs]
        logger.info(announce_costs(costs, estimator.device))
        uncounted = {
            "downloading the weights": not self.checkpoint.is_here,
            "reading the weights": elsewhere,
            "sampling text from the model": self.text is None and text is not None,
            "searching widths": searches,
        }
        if any(uncounted.values()):
            logger.info(f"Not counted: {', '.join(name for name, left_out in uncounted.items() if left_out)}.")

    def load(self, dtype: torch.dtype | None = None, scores: Scores | None = None) -> PreTrainedModel:
        """The dense model, in the dtype for computing if no other is asked for; `scores` must be its own.

        Raises:
            UserError: the scores belong to another model.
        """
        dtype = dtype or self.compute.dtype_for(self.checkpoint)
        if self.model is None or self.model.dtype != dtype:
            self.model = None
            gc.collect()
            self.model, self.model_hash = load_hashed(
                self.checkpoint,
                self.compute,
                self.record,
                dtype,
                may_stream=not self.resident,
                model_hash=self.model_hash,
            )
        if scores:
            scores.require_model(self.model_hash)
        return self.model

    def windows(self, model: PreTrainedModel) -> Int[Tensor, "windows positions"]:
        """Those of the text, or text from the model itself."""
        if self.text is None:
            assert self.calibration
            with self.record.stage("sampling text from the model"):
                self.text = sample_windows(model, self.calibration)
        return self.text

    def score(self, request: Request, course: Course | None = None, stability: Stability | None = None) -> Scores:
        """Every neuron of the dense model; in several steps on a course; until they are stable."""
        self.checkpoint.fetch()
        model, windows = self.load(), None
        if self.calibration:
            windows = self.windows(model)
            logger.info(f"{announce_scoring(windows, [request], self.estimator)}.")
            if stability:
                logger.info(f"That at most: it ends once {100 * stability.wanted:g}% of what is kept is settled.")
            logger.info("Interrupted, the same command goes on where it stopped.")
        how: dict[str, Any] = {
            "batch_size": self.compute.batch_size,
            "recompute": self.compute.recompute,
            "settings": {"calibration": asdict(self.calibration)} if self.calibration else None,
            "model_hash": self.model_hash,
            "keeper": Keeper(self.unfinished.of(model, self.model_hash)),
        }
        with self.record.stage("scoring"):
            if course is None or course.steps == 1:
                scores = score(model, windows, *request, stability=stability, **how)
            else:
                assert windows is not None
                logger.info(announce_course(course))
                scores = score_in_steps(model, windows, request, course, **how)
        if stability:
            self.record.results["stability"] = stability.curve
        self.record.reused_parts = len(self.unfinished.reused)
        remark_on_unseen(scores)
        return scores

    def check(self, scores: Scores) -> None:
        """Refuse scores of another model; the weights are read for that, not loaded.

        Raises:
            UserError: they are, or a weight is NaN or infinite.
        """
        if not self.model_hash:
            with self.record.stage("checking the weights"):
                self.model_hash = hash_stored(self.checkpoint)
        scores.require_model(self.model_hash)

    @cached_property
    def stored_plainly(self) -> bool:
        """Whether the checkpoint can be cut on the disk."""
        self.checkpoint.fetch()
        return stored_plainly(self.checkpoint)

    def change(self, scores: Scores, plan: Plan, *, repair: bool, compensate: bool) -> PreTrainedModel | None:
        """The cut model, where more is done to it than can be done on the disk."""
        if repair:
            model = self.load(scores=scores)
            self.record.results["repair"] = self.repair_(model, plan)
            return model
        if compensate or not self.stored_plainly:
            model = self.load(self.checkpoint.dtype(), scores)
            cut_(model, plan, scores.means if compensate else None)
            return model
        self.check(scores)
        return None

    def save(self, model: PreTrainedModel | None, plan: Plan, folder: Path, shard_size: str) -> None:
        """What the plan leaves of the checkpoint, with the output maps of the cut `model` if it was changed more."""
        if self.stored_plainly:
            write_cut(self.checkpoint, plan, folder, shard_size, output_maps(model) if model else None)
        else:
            assert model
            self.checkpoint.save(self.as_stored(model, plan), folder, shard_size)

    def as_stored(self, repaired: PreTrainedModel, plan: Plan) -> PreTrainedModel:
        """The repaired model in the checkpoint's dtype, with all but its output maps exactly as they are stored."""
        stored = self.checkpoint.dtype()
        if torch.promote_types(repaired.dtype, stored) == repaired.dtype:
            return repaired.type(stored)
        maps = {name: values for mlp in find_mlps(repaired) for name, values in mlp.output.state().items()}
        model = self.load(stored)
        cut_(model, plan)
        with torch.no_grad():
            for name, values in maps.items():
                model.get_parameter(name).copy_(values)
        return model

    def plan(self, scores: Scores, budget: Budget, round_to: int, sharing: Sharing) -> Plan:
        """Who stays."""
        if sharing.allocation == "searched":
            return self.search(scores, budget, round_to, sharing)
        remark_on_scale(scores, sharing)
        return allocate(scores, budget, round_to=round_to, sharing=sharing)

    def search(self, scores: Scores, budget: Budget, round_to: int, sharing: Sharing) -> Plan:
        """Widths by trial, on a few of the windows."""
        model = self.load(scores=scores)
        few = search_windows(self.windows(model))
        logger.info(announce_search(model, few, sharing.trials, self.compute))
        with self.record.stage("searching widths"):
            divergence = divergence_of(model, few, self.compute.batch_size)
            return search(model, scores, budget, divergence, round_to=round_to, sharing=sharing)

    def repair_(self, model: PreTrainedModel, plan: Plan) -> list[dict[str, Any]]:
        """Cut and repair the model; how each layer's refit went, as plain data."""
        windows = self.windows(model)
        logger.info(announce_repair(windows, sum(plan.widths) // len(plan.widths), self.estimator))
        with self.record.stage("cutting and repairing"):
            refits = cut_and_repair_(model, plan, windows, batch_size=self.compute.batch_size)
        return [asdict(refit) for refit in refits]
