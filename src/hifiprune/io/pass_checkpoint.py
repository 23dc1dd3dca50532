"""Checkpoints of a pass over the windows: its sums so far, from which an interrupted run resumes."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hifiprune.errors import RunError
from hifiprune.io.resume import ResumeFolder
from hifiprune.progress import logger

SECONDS_BETWEEN = 20.0
"""Minimum time between two states, in seconds."""
COST = 0.05
"""Share of the time that may be spent on writing states."""


@dataclass
class PassCheckpoint:
    """Saves the state of a pass, tensors by name, from time to time.

    Attributes:
        resume_folder: folder of the run's parts.
        facts: further facts that the state depends on.
        last: time of the last write, or of the start of the pass.
        took: seconds that the last write took.
    """

    resume_folder: ResumeFolder
    facts: tuple[Any, ...] = ()
    last: float = field(default_factory=time.monotonic)
    took: float = 0.0

    def of(self, *facts: Any) -> "PassCheckpoint":
        """Return the checkpoint of a pass that depends on further facts, JSON-serializable, and starts now."""
        return replace(self, facts=(*self.facts, *facts), last=time.monotonic(), took=0.0)

    def read(self) -> dict[str, Tensor] | None:
        """Read the last state; None if it is missing or damaged."""

        def load(path: Path) -> dict[str, Tensor]:
            try:
                return dict(load_file(path))
            except SafetensorError as error:
                raise ValueError(path) from error

        return self.resume_folder.read(self._path, load)

    @property
    def due(self) -> bool:
        """Return whether it is time to write a state."""
        return time.monotonic() - self.last >= max(SECONDS_BETWEEN, self.took / COST)

    def write(self, state: dict[str, Tensor]) -> None:
        """Write a state."""
        start = time.monotonic()
        try:
            self.resume_folder.write(self._path, lambda path: save_file(state, path))
        except RunError as error:
            logger.warning(f"Scoring goes on, but could not be resumed from here: {error}")
        self.last = time.monotonic()
        self.took = self.last - start

    @property
    def _path(self) -> Path:
        return self.resume_folder.path("states", *self.facts, suffix=".safetensors")
