"""A run on a checkpoint: everything resolved before weights are loaded, and the dense model, loaded when needed."""

import gc
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hifiprune.commands.prepare import load_hashed
from hifiprune.config.groups import AllocationConfig, Budget, ComputeConfig
from hifiprune.config.presets import Preset
from hifiprune.config.prune import PruneConfig
from hifiprune.config.texts import Calibration
from hifiprune.engine.compute import compute_dtype
from hifiprune.io.resume import ResumeFolder
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.plan import ModelShape
from hifiprune.pruning.cut_checkpoint import hash_stored, stored_plainly
from hifiprune.pruning.reconstruct import Training
from hifiprune.reports.model_card import Base
from hifiprune.run_record import RunRecord
from hifiprune.scores import Scores
from hifiprune.scoring.early_stopping import Stability
from hifiprune.scoring.score import Request


@dataclass(frozen=True)
class Job:
    """A run on a checkpoint, with everything checked that can be without its weights.

    Attributes:
        checkpoint: checkpoint of the dense model.
        target: absolute path of the output.
        calibration: text to read, if any is.
        compute: device and arithmetic.
        record: record of the run, as far as it is.
        resume_folder: finished parts, from which the same command resumes.
        resident: what needs the weights in memory, if anything does.
        request: criterion and options to score by, if the scores are not there.
        stability: what ends scoring early, if that is asked for.
    """

    checkpoint: Checkpoint
    target: Path
    calibration: Calibration | None
    compute: ComputeConfig
    record: RunRecord[Any]
    resume_folder: ResumeFolder
    resident: str
    request: Request | None
    stability: Stability | None

    @property
    def samples(self) -> bool:
        """Return whether calibration text is sampled from the model."""
        return self.calibration is not None and self.calibration.is_sampled


@dataclass(frozen=True)
class PruneJob(Job):
    """A run of `prune`.

    Attributes:
        config: options, those of the preset filled in.
        system: criterion, repair and rounding.
        shape: sizes of the dense model.
        width: MLP width after, of most MLPs.
        scores: scores that were made before, if they were.
        base: what the card of the output says of the dense model.
    """

    config: PruneConfig
    system: Preset
    shape: ModelShape
    width: int
    scores: Scores | None
    base: Base

    @property
    def budget(self) -> Budget:
        """Return how much to remove."""
        return self.config.budget

    @property
    def allocation(self) -> AllocationConfig:
        """Return how widths are decided."""
        return self.config.allocation

    @property
    def repairs(self) -> bool:
        """Return whether the cut is repaired."""
        return self.system.repair != "none"

    @property
    def training(self) -> Training | None:
        """Return how blocks are trained after their refits, if they are."""
        if self.system.repair != "local":
            return None
        return Training(self.config.repair_steps, minutes=self.config.repair_minutes)


@dataclass
class DenseModel:
    """The dense model of a run, loaded when a step first needs it.

    Attributes:
        job: run that needs it.
        hash: SHA-256 of the weights as stored, once they were read.
    """

    job: Job
    hash: str = ""
    _model: PreTrainedModel | None = field(default=None, init=False)

    def load(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Return the model in the dtype for computing, if no other is asked for."""
        job = self.job
        dtype = dtype or compute_dtype(job.compute, job.checkpoint)
        if self._model is not None and self._model.dtype != dtype:
            self._model = None
            gc.collect()
        if self._model is None:
            self._model, self.hash = load_hashed(
                job.checkpoint, job.compute, job.record, dtype, may_stream=not job.resident, model_hash=self.hash
            )
        return self._model

    def load_scored(self, scores: Scores, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Return the model, whose own these scores must be.

        Raises:
            UserError: they belong to another model.
        """
        model = self.load(dtype)
        scores.require_model(self.hash)
        return model

    def check_scores(self, scores: Scores) -> None:
        """Refuse scores of another model; the weights are read for that, not loaded.

        Raises:
            UserError: they belong to another model, or a weight is NaN or infinite.
        """
        if not self.hash:
            with self.job.record.stage("checking the weights"):
                self.hash = hash_stored(self.job.checkpoint)
        scores.require_model(self.hash)

    @cached_property
    def stored_plainly(self) -> bool:
        """Return whether the checkpoint can be cut on disk."""
        self.job.checkpoint.fetch()
        return stored_plainly(self.job.checkpoint)
