"""Check where outputs may be written: never over, into or around an input, and by one run at a time."""

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import FileLock, Timeout
from huggingface_hub import constants

from hifiprune.errors import UserError
from hifiprune.io.atomic import clear_after_the_killed, local_path, nearest_folder, output_path, real_path
from hifiprune.io.distributed import rank
from hifiprune.io.manifest import MANIFEST, check_replaceable

P = ParamSpec("P")
T = TypeVar("T")
UNFINISHED = "-unfinished"
"""Suffix of folders that hold the finished parts of an interrupted run."""
UNLOCKABLE = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
"""Errors of file systems that cannot lock files."""
LONGEST_SUFFIX = 40
"""Bytes that names beside an output have in addition to its own, at most."""


@dataclass
class _Run:
    """Resources of a running command: the locks of its outputs, and its folders of unfinished work."""

    locks: ExitStack = field(default_factory=ExitStack)
    unfinished: list[Path] = field(default_factory=list)


_running: ContextVar[_Run | None] = ContextVar("_running", default=None)
_also_read: ContextVar[tuple[Path | None, ...]] = ContextVar("_also_read", default=())


def exclusive(command: Callable[P, T]) -> Callable[P, T]:
    """Let a command keep its outputs to itself from `check_target` to its end, however it ends.

    What is raised notes which folder of unfinished work stays.
    """

    @wraps(command)
    def run(*arguments: P.args, **options: P.kwargs) -> T:
        own = _Run()
        token = _running.set(own)
        try:
            with own.locks:
                return command(*arguments, **options)
        except BaseException as error:
            for folder in own.unfinished:
                if folder.exists():
                    error.add_note(f"{folder} stays, and the same command goes on from there")
            raise
        finally:
            _running.reset(token)

    return run


@contextmanager
def reading(*paths: Path | None) -> Iterator[None]:
    """Treat files as inputs of the commands within, beside those that these name themselves."""
    token = _also_read.set(paths)
    try:
        yield
    finally:
        _also_read.reset(token)


def note_unfinished(folder: Path) -> None:
    """Remember where the running command keeps finished parts."""
    if run := _running.get():
        run.unfinished.append(folder)


def check_target(
    target: str | Path, *, folder: bool, overwrite: bool = False, inputs: Sequence[str | Path | None] = ()
) -> Path:
    """Return the absolute path of `target` after checking, before any work, that it can be written.

    Within a command that is `exclusive` no other run can take the same target until that command ends.

    Args:
        target: file or folder to be made.
        folder: whether it will be a folder.
        overwrite: whether an existing one may be replaced that hifiprune made.
        inputs: paths that are read, if they exist, of which none may be lost.

    Raises:
        UserError: it exists and may not be replaced, is, contains or lies inside an input or a place of the user's,
            another run is making it, or its folder cannot be written.
    """
    path = claim(target, inputs)
    clear_after_the_killed(path)
    check_replaceable(path, folder=folder, overwrite=overwrite, name=target)
    return path


def claim(target: str | Path, inputs: Sequence[str | Path | None] = ()) -> Path:
    """Return the absolute path of `target`, where an output may be, and keep other runs from it; see `check_target`."""
    path = output_path(target)
    _check_name(path, target)
    _check_place(path, target)
    _check_inputs(real_path(path), target, inputs)
    parent = nearest_folder(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"output {target} cannot be written: {parent} is not a writable folder")
    _lock(path, target)
    return path


def _check_name(path: Path, target: str | Path) -> None:
    """Refuse names that leave no room for those of files beside the output, or whose variables are not known."""
    missing = [parent.name for parent in (path, *path.parents) if not os.path.lexists(parent)]
    if any(re.search(r"^~|\$\{?[A-Za-z_]", name) for name in missing):
        raise UserError(f"output {target}: the home or variable in it is not known; set it, or write the path in full")
    longest = os.pathconf(nearest_folder(path), "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    size = len(os.fsencode(path.name))
    if size > longest - LONGEST_SUFFIX:
        raise UserError(
            f"the name of output {str(target)[:40]}... has {size} bytes, and {longest - LONGEST_SUFFIX} are possible "
            "here; choose a shorter one"
        )


def _check_place(path: Path, target: str | Path) -> None:
    """Refuse places that are never an output's, whatever is there."""
    real = real_path(path)
    if what := _reserved(real):
        raise UserError(f"output {target} {what}; choose another name, such as that of a new folder elsewhere")
    for parent in (real, *real.parents):
        if parent.name.endswith(UNFINISHED):
            raise UserError(f"output {target}: {parent} is where an interrupted run goes on; choose another name")
        if parent != real and (parent / MANIFEST).is_file():
            raise UserError(f"output {target} lies inside {parent}, which is an output itself; choose another name")


def _reserved(real: Path) -> str:
    """Return what a path is that no output may be; nothing if it is nothing of the kind."""
    places = {"the working directory": Path().absolute(), "your home": Path(os.path.expanduser("~"))}
    for what, place in places.items():
        if (relation := _relation(real, real_path(place))) in ("is", "contains"):
            return f"{relation} {what}"
    caches = (constants.HF_HUB_CACHE, os.environ.get("HF_DATASETS_CACHE", os.path.join(constants.HF_HOME, "datasets")))
    for cache in map(Path, caches):
        if relation := _relation(real, real_path(cache)):
            return f"{relation} the hub's cache {cache}"
    if real.parent in (Path("/home"), Path("/Users")):
        return "is a home"
    if os.path.ismount(real):
        return "is where a disk is mounted"
    return "is a repository, or of one" if (real / ".git").exists() or ".git" in real.parts else ""


def _check_inputs(real: Path, target: str | Path, inputs: Sequence[str | Path | None]) -> None:
    for name in (*inputs, *_also_read.get()):
        for read in _files_of(local_path(name)) if name is not None else ():
            if relation := _relation(real, read):
                raise UserError(
                    f"output {target} {relation} the input {read}; choose another name, outside of the inputs"
                )


def _files_of(path: Path) -> Iterator[Path]:
    """Yield where an input is, as it is called and as it really is, and where links that a folder holds lead."""
    if not os.path.lexists(path):
        return
    yield real_path(path.parent) / path.name
    yield real_path(path)
    for parent, folders, files in os.walk(path):
        yield from (real_path(entry) for name in (*folders, *files) if (entry := Path(parent, name)).is_symlink())


def _relation(real: Path, read: Path) -> str:
    """Return how an output relates to an input: `is`, `contains` or `lies inside`; nothing if neither is in the other.

    Files are told by their numbers on the disk, not by names alone, whose case may not matter.
    """
    if _same(real, read):
        return "is"
    if any(_same(real, parent) for parent in read.parents):
        return "contains"
    if any(_same(read, parent) for parent in real.parents):
        return "lies inside"
    return ""


def _same(one: Path, other: Path) -> bool:
    if one == other:
        return True
    try:
        return os.path.samestat(one.stat(), other.stat())
    except OSError:
        return False


def _lock(path: Path, target: str | Path) -> None:
    """Keep other runs from making the same output until the running command ends, or its process does.

    Of several processes that share the work out the first one does it for all. Where files cannot be locked nothing
    is kept.
    """
    run = _running.get()
    if run is None or rank() > 0:
        return
    name = f".{path.name}.hifiprune-lock"
    lock = FileLock(path.with_name(name), blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        run.locks.enter_context(_made(path.parent))
        lock.acquire()
    except Timeout as error:
        if not os.path.lexists(lock.lock_file):
            raise UserError(f"output {target} cannot be written: no file can be made in {path.parent}") from error
        raise UserError(
            f"output {target} is being made by another run; wait until it has ended, or choose another name"
        ) from error
    except OSError as error:
        if error.errno in UNLOCKABLE:
            return
        raise UserError(f"output {target} cannot be written: {error.strerror}") from error
    run.locks.callback(_unlock, lock)


def _unlock(lock: FileLock) -> None:
    """Remove a lock's file while it is still held, as nobody must come to hold one that has no name."""
    with suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Have a folder, and remove it and its parents in the end if they were not there and nothing was put there."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
