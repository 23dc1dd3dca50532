"""The options of `ablate`."""

from dataclasses import dataclass
from pathlib import Path

from hifiprune.bounds import COUNT, NOT_NEGATIVE_COUNT, PAIR, SEED
from hifiprune.config.evaluate import TEXT_OPTIONS
from hifiprune.config.groups import ComputeConfig, Text, overwrite_option
from hifiprune.config.options import Checked, group, option


@dataclass(frozen=True)
class AblateConfig(Checked):
    """Options of `ablate`.

    Attributes:
        scores: files that `score` or `compare` made for this model.
        text: held-out text to measure on.
        neurons: number of single neurons to remove.
        groups: number of random groups to remove.
        group_size: neurons of a group, all of one layer.
        seed: seed of the sample.
        compute: device and arithmetic; `auto` is float32, since in half precision a single neuron drowns in rounding.
        overwrite: replace an existing output.

    Raises:
        UserError: a value is out of range.
    """

    scores: tuple[Path, ...] = option(
        help="Scores written by 'hifiprune score'; repeat it for several criteria.", metavar="PATH"
    )
    text: Text = group(Text("python-docs", 512, 4), only=TEXT_OPTIONS)
    neurons: int = option(64, "Number of single neurons to remove, one at a time.", bounds=COUNT)
    groups: int = option(32, "Number of random groups of neurons to remove.", bounds=NOT_NEGATIVE_COUNT)
    group_size: int = option(32, "Neurons in a group, all of one layer.", bounds=PAIR)
    seed: int = option(0, "Seed of the sample of neurons.", bounds=SEED)
    compute: ComputeConfig = group(ComputeConfig(), only=("device", "dtype", "batch_size", "attention"))
    overwrite: bool = overwrite_option()
