"""Writing that is whole or not there: everything is written beside its target and renamed when complete."""

import errno
import glob
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hifiprune.errors import RunError, UserError

if sys.platform != "win32":
    import fcntl

REPLACED = "replaced"
RANDOM = 8
"""Letters that `tempfile.mkdtemp` puts into a name."""


def local_path(name: str | Path) -> Path:
    """`name` as a path, with a leading `~` for the home folder where there is one."""
    return Path(os.path.expanduser(name))


def check_target(
    target: str | Path, *, folder: bool, overwrite: bool = False, inputs: Sequence[str | Path | None] = ()
) -> Path:
    """Return the absolute path of `target` after checking, before any work, that it can be written.

    Args:
        target: file or folder to be made.
        folder: whether it will be a folder.
        overwrite: whether an existing one of the same kind may be replaced.
        inputs: paths that are read, of which none may be lost.

    Raises:
        UserError: it exists and may not be replaced, is or contains an input, or its folder cannot be written.
    """
    path, real = Path(os.path.abspath(target)), Path(target).resolve()
    _clear_after_the_killed(path)
    for read in (local_path(name).resolve() for name in inputs if name is not None):
        if read.exists() and real in (read, *read.parents):
            relation = "is" if real == read else "contains"
            raise UserError(f"output {target} {relation} the input {read}; choose another name")
    if os.path.lexists(path):
        if not overwrite:
            raise UserError(f"output {target} exists already; choose another name, or replace it with --overwrite")
        if path.is_symlink() or path.is_dir() != folder:
            raise UserError(f"output {target} is not a {'folder' if folder else 'file'}; choose another name")
    parent = nearest_folder(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"output {target} cannot be written: {parent} is not a writable folder")
    return path


def check_shard_size(shard_size: str) -> None:
    """Raise `UserError` if transformers cannot read a size."""
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB|TB)", shard_size):
        raise UserError(f"shard size '{shard_size}' must be a number and a unit, such as 500MB or 5GB")


def check_space(target: str | Path, needed_bytes: int) -> None:
    """Raise `RunError` if the disk of `target` has less room than `needed_bytes`."""
    parent = nearest_folder(Path(target).absolute())
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise RunError(
            f"the disk of {parent} has {free / 1e9:.2f} GB free, the output needs {needed_bytes / 1e9:.2f} GB; "
            "free some space or choose another --output"
        )


@contextmanager
def replacing(target: str | Path) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or folder to; it becomes `target` if all goes well, else is removed.

    What killed processes left of the same target is removed first.

    Raises:
        RunError: the disk is full or the target cannot be written.
    """
    target = Path(os.path.abspath(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_after_the_killed(target)
        workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror}") from error
    held = _hold(workplace)
    try:
        new = workplace / target.name
        yield new
        _permit(new)
        _rename(new, target, aside=workplace / REPLACED)
        if (workplace / REPLACED).exists():
            (workplace / REPLACED).rename(workplace / "no longer needed")  # never to be put back
    except (OSError, SafetensorError) as error:
        raise RunError(_describe(error, target)) from error
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
        if held is not None:
            os.close(held)


def _hold(workplace: Path) -> int | None:
    """Lock a folder until what this gives is closed or the process ends; None if it is locked, or cannot be."""
    if sys.platform == "win32":
        return None
    try:
        held = os.open(workplace, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return None
    return held


def _clear_after_the_killed(target: Path) -> None:
    """Remove what processes that are gone left beside a target, and put back what one of them was about to replace."""
    for workplace in target.parent.glob(f".{glob.escape(target.name)}.{'?' * RANDOM}.partial"):
        held = _hold(workplace)
        if held is not None:
            if (workplace / REPLACED).exists() and not os.path.lexists(target):
                (workplace / REPLACED).rename(target)
            shutil.rmtree(workplace, ignore_errors=True)
            os.close(held)


def _permit(new: Path) -> None:
    """Give files the permissions that new files usually get: safetensors writes them for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (new, *new.rglob("*")):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _rename(new: Path, target: Path, aside: Path) -> None:
    """Move `new` to `target`; a folder that was there goes `aside` first and comes back if anything interrupts."""
    if not target.is_dir():
        new.replace(target)
        return
    try:
        target.rename(aside)
        new.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise


def nearest_folder(path: Path) -> Path:
    """The closest parent that exists."""
    return next(parent for parent in path.parents if parent.exists())


def _describe(error: OSError | SafetensorError, target: Path) -> str:
    full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or f"os error {errno.ENOSPC}" in str(error)
    if full:
        free = shutil.disk_usage(target.parent).free
        return f"the disk is full: {target} was not written ({free / 1e9:.2f} GB free); free some space and run again"
    return f"{target} was not written: {error}"
