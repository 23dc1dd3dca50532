"""The processes of a run, by what launchers such as `accelerate launch` and `torchrun` tell each of them."""

import os


def rank() -> int:
    """The number of this process; the first, 0, is the one that speaks and writes the result."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))
