"""Distributed runs: rank and world size as launchers such as `accelerate launch` and `torchrun` state them."""

import atexit
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hifiprune.errors import UserError

if TYPE_CHECKING:
    import torch

SHARED = ("score", "prune", "recover")
"""Commands that distribute their work over processes."""
ENDED, LEFT = "hifiprune-ended", "hifiprune-left"
"""Keys of the store: rank 0's exit code, and the number of processes that have left."""
POLLED = 0.1
"""Seconds between polls of the store."""
PATIENCE, PATIENCE_AFTER_FAILURE = 10.0, 1.0
"""Seconds that rank 0 waits for the others to read its exit code; after a failure they may be in the middle of work."""


def rank() -> int:
    """Return the rank of this process; rank 0 prints messages and writes the result."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """Return the number of processes (world size)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int | None:
    """Return the rank of this process on its machine, None if it was not started by a launcher."""
    found = os.environ.get("LOCAL_RANK")
    return None if found is None else int(found)


def neighbours() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_command(words: Sequence[str]) -> None:
    """Refuse a launcher for commands that would repeat the same work in every process.

    Raises:
        UserError: the command does not share its work out.
    """
    if processes() > 1 and not set(words[1:2]) & set(SHARED):
        raise UserError(
            f"{' '.join(['hifiprune', *words[1:2]])} runs in one process, and {processes()} were started; "
            f"{', '.join(SHARED)} share their work out"
        )


def meet(device: "torch.device", first: Callable[[], None] | None = None) -> None:
    """Wait until all processes have arrived and rank 0 has run `first`.

    Args:
        device: device of the tensors that they exchange.
        first: function that rank 0 runs.
    """
    from accelerate import PartialState

    meeting = PartialState(cpu=device.type == "cpu")
    _leave_at_exit()
    if first and rank() == 0:
        first()
    meeting.wait_for_everyone()


def follow_first(code: int) -> int:
    """Wait, in every process but the first, until the first has ended; return the code that it ends with.

    The first writes the result alone when the others are done; a launcher ends all when one of them ends early.

    Args:
        code: exit code of this process.
    """
    store = _store()
    if store is None or rank() == 0:
        return code
    try:
        while not store.check([ENDED]):
            time.sleep(POLLED)
        return int(store.get(ENDED))
    except RuntimeError:  # the first is gone, and the store with it
        return 1


def leave(code: int = 0) -> None:
    """Close the group of processes, if there is one; the first tells the others its exit code.

    Left to the interpreter's end, its threads would abort the process.
    """
    store = _store()
    if store is None:
        return
    try:
        if rank() == 0:
            store.set(ENDED, str(code))
        store.add(LEFT, 1)
        last = time.monotonic() + (PATIENCE_AFTER_FAILURE if code else PATIENCE)
        while rank() == 0 and store.add(LEFT, 0) < processes() and time.monotonic() < last:
            time.sleep(POLLED)  # it may keep the store
    except RuntimeError:
        pass  # another process kept the store, and is gone
    finally:
        sys.modules["torch.distributed"].destroy_process_group()


def _store() -> Any:
    """Return the process group's key-value store, None without a group; imports nothing."""
    distributed: Any = sys.modules.get("torch.distributed")
    there = processes() > 1 and distributed and distributed.is_available() and distributed.is_initialized()
    return distributed.distributed_c10d._get_default_store() if there else None


def _leave_at_exit() -> None:
    """Register the clean-up of the process group at exit for programs that use the Python API, once."""
    atexit.unregister(leave)
    atexit.register(leave)


def check_share(batches: int) -> None:
    """Refuse fewer batches than processes.

    Raises:
        UserError: there are fewer batches than processes.
    """
    if batches < processes():
        raise UserError(f"{batches} batches of windows cannot be shared out among {processes()} processes: start fewer")


def check_launcher(*, low_rank: bool) -> None:
    """Refuse launch configurations that are known not to work.

    Raises:
        UserError: this is one of them.
    """
    _leave_at_exit()
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() == "true" and (low_rank or name == "DeepSpeed"):
            what = "low-rank changes do" if low_rank else "training does"
            remedy = "torchrun, where every GPU holds the model" + (", or --method full" if name == "FSDP" else "")
            raise UserError(f"{what} not work under {name}; use {remedy}")
