"""What an interrupted run leaves beside its output: finished parts, each found again by all that it was made from."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hifiprune.errors import UserError
from hifiprune.output import replacing
from hifiprune.voice import Voice

MARK = "made-by-hifiprune"
"""A file that tells a folder of ours from a user's."""


@dataclass(frozen=True)
class Unfinished:
    """A folder of finished parts.

    Attributes:
        folder: beside the output, made with the first part.
        voice: tells of parts that cannot be read.
        made_of: what all parts depend on.
    """

    folder: Path
    voice: Voice
    made_of: Sequence[str] = ()

    @classmethod
    def beside(cls, target: Path, voice: Voice) -> "Unfinished":
        """The parts of the run that makes `target`.

        Raises:
            UserError: something else has the folder's name.
        """
        folder = target.with_name(f"{target.name}.unfinished")
        if folder.exists() and not (folder / MARK).is_file():
            raise UserError(f"{folder} is needed for unfinished work but is not hifiprune's; rename or remove it")
        return cls(folder, voice)

    def of(self, model: PreTrainedModel, model_hash: str) -> "Unfinished":
        """Those parts that were made from this model, in this arithmetic, by this version."""
        made_of = [model_hash, str(model.dtype), model.config._attn_implementation, version("hifiprune")]
        return replace(self, made_of=made_of)

    def path(self, kind: str, *facts: Any, suffix: str = ".json") -> Path:
        """Where a part is kept that was made of these facts, which JSON must know."""
        key = hashlib.sha256(json.dumps([*self.made_of, *facts]).encode()).hexdigest()[:24]
        return self.folder / kind / f"{key}{suffix}"

    def read(self, path: Path) -> Any:
        """A part, or None if it is not there or damaged."""
        try:
            return json.loads(path.read_text()) if path.is_file() else None
        except ValueError:
            self.discard(path)
            return None

    def write(self, path: Path, part: Any) -> None:
        """Keep a part, as JSON."""
        self.mark()
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(part))

    def mark(self) -> None:
        """Make the folder known as ours, before the first part is written."""
        if not (self.folder / MARK).is_file():
            with replacing(self.folder / MARK) as temporary:
                temporary.write_text("Finished parts of an interrupted run; the same command goes on from here.\n")

    def discard(self, path: Path) -> None:
        """Drop a damaged part, to be made again."""
        self.voice.say(f"{path} is damaged and is made again.")
        path.unlink()

    def remove(self) -> None:
        """All is done."""
        shutil.rmtree(self.folder, ignore_errors=True)
