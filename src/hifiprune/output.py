"""Writing that is whole or not there: everything is written beside its target and renamed when complete."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hifiprune.errors import RunError, UserError


def check_target(target: str | Path, *, overwrite: bool = False, inputs: tuple[str | Path, ...] = ()) -> Path:
    """Return `target` as a path after checking, before any work, that it can be written.

    Args:
        target: file or folder to be made.
        overwrite: whether an existing one may be replaced.
        inputs: paths that are read and so may not be replaced.

    Raises:
        UserError: it exists and may not be replaced, is or lies in an input, or its folder cannot be written.
    """
    target = Path(target)
    for path in map(Path, inputs):
        if path.exists() and target.resolve() == path.resolve():
            raise UserError(f"output {target} is the input itself; choose another folder")
        if path.exists() and target.resolve() in path.resolve().parents:
            raise UserError(f"output {target} contains the input {path}; choose another folder")
    if target.exists() and not overwrite:
        raise UserError(f"output {target} exists already; choose another name, or replace it with --overwrite")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"output {target} cannot be written: {parent} is not a writable folder")
    return target


def check_space(target: str | Path, needed_bytes: int) -> None:
    """Raise `RunError` if the disk of `target` has less room than `needed_bytes`."""
    parent = Path(target).absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise RunError(
            f"the disk of {parent} has {free / 1e9:.2f} GB free, the output needs {needed_bytes / 1e9:.2f} GB; "
            "free some space or choose another --output"
        )


@contextmanager
def replacing(target: str | Path) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or folder to; it becomes `target` if all goes well, else is removed.

    Raises:
        RunError: the disk is full or the target cannot be written.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror}") from error
    try:
        new = workplace / target.name
        yield new
        _rename(new, target, aside=workplace / "replaced")
    except (OSError, SafetensorError) as error:
        raise RunError(_describe(error, target)) from error
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _rename(new: Path, target: Path, aside: Path) -> None:
    """Move `new` to `target`; a folder that was there goes `aside` first and comes back if the move fails."""
    if not target.is_dir():
        new.replace(target)
        return
    target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        aside.rename(target)
        raise


def _describe(error: OSError | SafetensorError, target: Path) -> str:
    full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or f"os error {errno.ENOSPC}" in str(error)
    if full:
        free = shutil.disk_usage(target.parent).free
        return f"the disk is full: {target} was not written ({free / 1e9:.2f} GB free); free some space and run again"
    return f"{target} was not written: {error}"
