"""The processes of a run, by what launchers such as `accelerate launch` and `torchrun` tell each of them."""

import os

from hifiprune.errors import UserError


def rank() -> int:
    """The number of this process; the first, 0, is the one that speaks and writes the result."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
