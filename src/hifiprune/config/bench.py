"""The options of `bench`."""

from collections.abc import Callable
from dataclasses import dataclass

from hifiprune.bounds import COUNT, FEW, PAIR
from hifiprune.config.groups import ComputeConfig, overwrite_option
from hifiprune.config.options import Checked, group, listed, option
from hifiprune.errors import UserError


def whole_numbers(name: str) -> Callable[[list[str]], dict[str, object]]:
    """Return what makes the field of a name from words of whole numbers, separated by commas."""

    def read(words: list[str]) -> dict[str, object]:
        shown, what = ",".join(words), name.replace("_", " ")
        try:
            numbers = tuple(int(word) for word in listed(words))
        except ValueError as error:
            raise UserError(f"{what} '{shown}' must be whole numbers separated by commas, such as 1,8") from error
        if not numbers:
            raise UserError(f"{what}: give at least one number")
        return {name: numbers}

    return read


@dataclass(frozen=True)
class BenchConfig(Checked):
    """Options of `bench`.

    Attributes:
        batch_sizes: sequences at once.
        lengths: tokens of each sequence that are read.
        new_tokens: tokens that are written afterwards.
        rounds: turns of every model, each in a fresh process.
        repeats: timings in a turn, of which the median counts.
        compiled: time `torch.compile` too.
        compute: device and arithmetic.
        overwrite: replace an existing output.

    Raises:
        UserError: a value is out of range.
    """

    batch_sizes: tuple[int, ...] = option(
        (1,),
        "Numbers of sequences at once, separated by commas.",
        bounds=COUNT,
        metavar="NUMBERS",
        shown_default="1",
        words=whole_numbers("batch_sizes"),
    )
    lengths: tuple[int, ...] = option(
        (512,),
        "Numbers of prefill tokens, separated by commas.",
        bounds=COUNT,
        metavar="NUMBERS",
        shown_default="512",
        words=whole_numbers("lengths"),
    )
    new_tokens: int = option(64, "Number of tokens to decode.", bounds=PAIR)
    rounds: int = option(3, "Turns of every model, each in a fresh process.", bounds=FEW)
    repeats: int = option(3, "Timings in a turn, of which the median counts.", bounds=FEW)
    compiled: bool = option(False, "Time torch.compile too.", flag="--compile")
    compute: ComputeConfig = group(ComputeConfig(), only=("device", "dtype", "attention"))
    overwrite: bool = overwrite_option()
