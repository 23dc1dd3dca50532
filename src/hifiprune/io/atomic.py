"""Atomic writes: everything is written beside its target and renamed when complete."""

import errno
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hifiprune.errors import RunError, UserError
from hifiprune.io.manifest import MANIFEST, check_replaceable, manifest_with, write_manifest

if sys.platform != "win32":
    import fcntl

REPLACED = "replaced"
LONGEST_NAME, LONGEST_PATH = 255, 4000
RANDOM = 8
"""Letters that `tempfile.mkdtemp` puts into a name."""


def local_path(name: str | Path) -> Path:
    """Return `name` as a path on this disk, with a leading `~` and environment variables in their values' places.

    Raises:
        UserError: no file can have such a name.
    """
    if not str(name).strip():
        raise UserError("an empty name was given where a file, a folder or a model is needed; is a variable not set?")
    path = Path(os.path.expanduser(os.path.expandvars(name)))
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = str(path).encode(errors="backslashreplace").decode()
        raise UserError(f"the name {shown} is no UTF-8: rename it, or set LC_ALL=C.UTF-8 if it is") from error
    longest = max(len(os.fsencode(part)) for part in (*path.parts, ""))
    if longest > LONGEST_NAME or len(os.fsencode(path)) > LONGEST_PATH or "\0" in str(path):
        raise UserError(
            f"no file can be called {str(path)[:40]!r}...: names have at most {LONGEST_NAME} bytes, paths "
            f"{LONGEST_PATH}, and neither a zero byte"
        )
    return path


def output_path(name: str | Path) -> Path:
    """Return the absolute path of an output, whose folder's links are followed.

    Raises:
        UserError: no file can have such a name.
    """
    try:
        path = local_path(name).absolute()
    except FileNotFoundError as error:
        raise UserError("the working directory was removed; change to one that is there") from error
    return real_path(path) if path.name in ("", "..") else real_path(path.parent) / path.name


def real_path(path: Path) -> Path:
    """Resolve a path as `path.resolve()` does, but leave links that lead in a circle as they are."""
    return Path(os.path.realpath(path))


def disk_size(count: int) -> str:
    """Return bytes in the largest unit that leaves a digit before the point."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.{1 if unit == 'kB' else 2}f} {unit}"
    return f"{count} byte{'s' * (count != 1)}"


def check_space(target: str | Path, needed_bytes: int) -> None:
    """Raise `RunError` if the disk of `target` has less room than `needed_bytes`."""
    parent = nearest_folder(Path(target).absolute())
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise RunError(
            f"the disk of {parent} has {disk_size(free)} free, the output needs {disk_size(needed_bytes)}; "
            "free some space or choose another --output"
        )


@contextmanager
def replacing(target: str | Path, *, overwrite: bool | None = None) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or folder to; it becomes `target` if all goes well, else is removed.

    What killed processes left of the same target is removed first.

    Args:
        target: file or folder to be made.
        overwrite: whether an output of hifiprune may be replaced that is there in the end; nothing else ever is. If
            not given, `target` is no output but a file of hifiprune's own, which is replaced whatever it is.

    Raises:
        RunError: the disk is full, the target cannot be written, or something came to its place meanwhile.
    """
    target = output_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_after_the_killed(target)
        workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror}") from error
    held = _hold(workplace)
    try:
        new = workplace / target.name
        yield new
        if new.is_dir():
            write_manifest(new)
        _permit(new)
        if overwrite is not None:
            _look_again(target, folder=new.is_dir(), overwrite=overwrite)
        _rename(new, target, aside=workplace / REPLACED)
        if (workplace / REPLACED).exists():
            (workplace / REPLACED).rename(workplace / "no longer needed")  # never to be put back
    except (OSError, SafetensorError) as error:
        raise RunError(_describe(error, target)) from error
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
        if held is not None:
            os.close(held)


def update_manifest(folder: Path, name: str) -> None:
    """List one file anew that hifiprune has changed; without effect in a folder that it did not make."""
    if text := manifest_with(folder, name):
        with replacing(folder / MANIFEST) as new:
            new.write_text(text, encoding="utf-8")


def _look_again(target: Path, *, folder: bool, overwrite: bool) -> None:
    """Refuse to replace what came to an output's place since the run began, which nobody has agreed to."""
    try:
        check_replaceable(target, folder=folder, overwrite=overwrite)
    except UserError as error:
        raise RunError(f"{error}: it came there while this run worked, whose result is not written") from error


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


def clear_after_the_killed(target: Path) -> None:
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
    """Return the closest parent that exists; for the root, itself."""
    return next((parent for parent in path.parents if parent.exists()), path)


def _describe(error: OSError | SafetensorError, target: Path) -> str:
    full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or f"os error {errno.ENOSPC}" in str(error)
    if full:
        free = shutil.disk_usage(target.parent).free
        return f"the disk is full: {target} was not written ({disk_size(free)} free); free some space and run again"
    return f"{target} was not written: {error}"
