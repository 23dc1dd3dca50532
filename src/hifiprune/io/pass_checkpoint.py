"""What a pass over the windows has summed up so far, kept on disk: an interrupted run goes on from there."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hifiprune.errors import RunError
from hifiprune.io.resume import Unfinished

SECONDS_BETWEEN = 20.0
"""From one state to the next, at least."""
COST = 0.05
"""Share of the time that writing states may take."""


@dataclass
class Keeper:
    """Keeps the state of a pass, tensors by name, in a file of its own.

    Attributes:
        unfinished: the folder, which knows the model, its arithmetic and the version.
        facts: what else the state depends on.
        last: when the last one was written, or the pass began.
        took: seconds that it took.
    """

    unfinished: Unfinished
    facts: tuple[Any, ...] = ()
    last: float = field(default_factory=time.monotonic)
    took: float = 0.0

    def of(self, *facts: Any) -> "Keeper":
        """For a pass that depends on more facts, which JSON must know, and begins now."""
        return replace(self, facts=(*self.facts, *facts), last=time.monotonic(), took=0.0)

    def read(self) -> dict[str, Tensor] | None:
        """The last state, or None if there is none or it is damaged."""

        def load(path: Path) -> dict[str, Tensor]:
            try:
                return dict(load_file(path))
            except SafetensorError as error:
                raise ValueError(path) from error

        return self.unfinished.read(self._path, load)

    def write(self, state: dict[str, Tensor]) -> None:
        """Keep a state, if that is due."""
        start = time.monotonic()
        if start - self.last >= max(SECONDS_BETWEEN, self.took / COST):
            try:
                self.unfinished.write(self._path, lambda path: save_file(state, path))
            except RunError as error:
                self.unfinished.voice.say(f"Scoring goes on, but could not be resumed from here: {error}")
            self.last = time.monotonic()
            self.took = self.last - start

    @property
    def _path(self) -> Path:
        return self.unfinished.path("states", *self.facts, suffix=".safetensors")
