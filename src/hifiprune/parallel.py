"""The processes of a run, by what launchers such as `accelerate launch` and `torchrun` tell each of them."""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hifiprune.errors import UserError

if TYPE_CHECKING:
    import torch

SHARED = ("score", "prune", "recover")
"""Commands that share their work out."""


def rank() -> int:
    """The number of this process; the first, 0, is the one that speaks and writes the result."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int | None:
    """The number of this process among those of its machine, if it was started as one of several."""
    found = os.environ.get("LOCAL_RANK")
    return None if found is None else int(found)


def neighbours() -> int:
    """How many processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_command(words: Sequence[str]) -> None:
    """Refuse to do the same work several times.

    Raises:
        UserError: the command does not share its work out.
    """
    if processes() > 1 and not set(words[1:2]) & set(SHARED):
        raise UserError(
            f"{' '.join(['hifiprune', *words[1:2]])} runs in one process, and {processes()} were started; "
            f"{', '.join(SHARED)} share their work out"
        )


def meet(device: "torch.device", first: Callable[[], None] | None = None) -> None:
    """Wait until all processes are here, and the first of them has done something.

    Args:
        device: where what they exchange lies.
        first: what it does.
    """
    from accelerate import PartialState

    meeting = PartialState(cpu=device.type == "cpu")
    if first and rank() == 0:
        first()
    meeting.wait_for_everyone()


def check_share(batches: int) -> None:
    """Refuse to share out so little that a process would have nothing to do.

    Raises:
        UserError: there are fewer batches than processes.
    """
    if batches < processes():
        raise UserError(f"{batches} batches of windows cannot be shared out among {processes()} processes: start fewer")


def check_launcher(*, low_rank: bool) -> None:
    """Refuse ways to share a model out among processes that are known not to work.

    Raises:
        UserError: this is one of them.
    """
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() == "true" and (low_rank or name == "DeepSpeed"):
            what = "low-rank changes do" if low_rank else "training does"
            remedy = "torchrun, where every GPU holds the model" + (", or --method full" if name == "FSDP" else "")
            raise UserError(f"{what} not work under {name}; use {remedy}")
