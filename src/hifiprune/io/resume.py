"""Resume interrupted runs: finished parts are kept beside the output, each keyed by everything that it depends on."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from hifiprune.errors import UserError
from hifiprune.io.atomic import replacing
from hifiprune.io.output_paths import UNFINISHED, note_unfinished
from hifiprune.progress import logger

T = TypeVar("T")
MARK = "made-by-hifiprune"
"""File that marks a folder as written by hifiprune."""


@dataclass(frozen=True)
class ResumeFolder:
    """A folder of finished parts of a run.

    Attributes:
        folder: folder beside the output, created with the first part.
        made_of: facts that all parts depend on.
        reused: parts found from an earlier run.
    """

    folder: Path
    made_of: Sequence[str] = ()
    reused: set[Path] = field(default_factory=set)

    @classmethod
    def beside(cls, target: Path, command: str) -> "ResumeFolder":
        """Return the parts of the command that makes `target`.

        Raises:
            UserError: something else has the folder's name.
        """
        folder = target.with_name(f"{target.name}.{command}{UNFINISHED}")
        if folder.exists() and not (folder / MARK).is_file():
            raise UserError(f"{folder} is needed for unfinished work but is not hifiprune's; rename or remove it")
        note_unfinished(folder)
        return cls(folder)

    def of(self, model: PreTrainedModel, model_hash: str) -> "ResumeFolder":
        """Return the parts that depend on this model, in this dtype and device, and on this version."""
        made_of = [model_hash, str(model.dtype), model.config._attn_implementation, version("hifiprune")]
        return replace(self, made_of=made_of)

    def path(self, kind: str, *facts: Any, suffix: str = ".json") -> Path:
        """Return the path of the part that depends on these facts, which must be JSON-serializable."""
        key = hashlib.sha256(json.dumps([*self.made_of, *facts]).encode()).hexdigest()[:24]
        return self.folder / kind / f"{key}{suffix}"

    def read(self, path: Path, reader: Callable[[Path], T]) -> T | None:
        """Read a part; None if it is missing, or damaged, which `reader` signals by a `ValueError`."""
        if not path.is_file():
            return None
        try:
            part = reader(path)
        except ValueError:
            logger.warning(f"{path} is damaged and is made again.")
            path.unlink()
            return None
        self.reused.add(path)
        return part

    def make(self) -> None:
        """Create the folder if it is missing."""
        if not self.folder.exists():
            with replacing(self.folder) as whole:
                whole.mkdir()
                (whole / MARK).write_text(
                    "Finished parts of an interrupted run: the same command goes on from here.\n", encoding="utf-8"
                )

    def write(self, path: Path, writer: Callable[[Path], object]) -> None:
        """Write a part."""
        self.make()
        with replacing(path) as temporary:
            writer(temporary)

    def read_json(self, path: Path) -> Any:
        """Read a part that `write_json` wrote; None if it is missing or damaged."""
        return self.read(path, lambda found: json.loads(found.read_text(encoding="utf-8")))

    def write_json(self, path: Path, part: dict[str, Any]) -> None:
        """Write plain data as a part."""
        self.write(path, lambda temporary: temporary.write_text(json.dumps(part), encoding="utf-8"))

    def remove(self) -> None:
        """Remove all parts; the mark goes last, so that an interrupted removal is still recognized."""
        if not self.folder.exists():
            return
        for part in self.folder.iterdir():
            if part.name != MARK:
                shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def kept(parts: ResumeFolder | None, facts: list[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the part that depends on these facts, from an earlier run or made now; the first fact is its kind."""
    if parts is None:
        return make()
    path = parts.path(*facts)
    found: dict[str, Any] | None = parts.read_json(path)
    if found is None:
        found = make()
        parts.write_json(path, found)
    return found
