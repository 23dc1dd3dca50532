"""The options of `bench`."""

from dataclasses import dataclass

from hifiprune.bounds import COUNT, FEW, PAIR
from hifiprune.config.groups import ComputeConfig, overwrite_option
from hifiprune.config.options import Checked, group, option


@dataclass(frozen=True)
class BenchConfig(Checked):
    """Options of `bench`."""

    batch_sizes: tuple[int, ...] = option(
        (1,),
        "Batch sizes, separated by commas.",
        bounds=COUNT,
        metavar="NUMBERS",
    )
    lengths: tuple[int, ...] = option(
        (512,),
        "Prompt lengths in tokens, separated by commas.",
        bounds=COUNT,
        metavar="NUMBERS",
    )
    new_tokens: int = option(64, "Number of tokens to decode.", bounds=PAIR)
    rounds: int = option(3, "Number of rounds: in each, every model is timed once, in a fresh process.", bounds=FEW)
    repeats: int = option(3, "Number of timings in a round, of which the median counts.", bounds=FEW)
    compiled: bool = option(False, "Time torch.compile too.", flag="--compile")
    compute: ComputeConfig = group(ComputeConfig(), only=("device", "dtype", "attention"))
    overwrite: bool = overwrite_option()
