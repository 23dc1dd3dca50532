"""The options of the commands that study criteria: `compare` and `ablate`."""

from dataclasses import dataclass
from pathlib import Path

from hifiprune.bounds import COUNT, FEW, NOT_NEGATIVE_COUNT, PAIR, SEED
from hifiprune.config.evaluate import TEXT_OPTIONS, Tasks
from hifiprune.config.groups import ComputeConfig, CriterionOptions, overwrite_option
from hifiprune.config.options import WIDTHS, Checked, group, option
from hifiprune.config.texts import Calibration, Text
from hifiprune.defaults import DEFAULT_CRITERION


@dataclass(frozen=True)
class CompareConfig(Checked):
    """Options of `compare`.

    The seed of the calibration data is that of the first draw, and the next draws count on from it. Without `options`
    alpha and temperature follow the ratio, as in the papers.
    """

    calibration: Calibration = group()
    texts: tuple[Text, ...] = option((), "Held-out texts to measure on.", in_files_only=True)
    criteria: tuple[str, ...] = option(
        ("hfprune", DEFAULT_CRITERION, "cross-entropy", "wanda-sp"),
        "Criteria, separated by commas; the others are compared with the first.",
        metavar="NAMES",
    )
    ratios: tuple[float, ...] = option(
        (0.2, 0.3),
        "Fractions of all parameters to remove, separated by commas.",
        metavar="NUMBERS",
    )
    seeds: int = option(3, "Number of draws of the calibration windows.", bounds=FEW)
    tasks: Tasks | None = None
    options: CriterionOptions | None = None
    round_to: int = option(128, "Round widths to the nearest multiple; 1 for exact widths.", panel=WIDTHS, bounds=COUNT)
    compute: ComputeConfig = group(
        ComputeConfig(), only=("device", "dtype", "batch_size", "recompute", "attention", "deterministic")
    )
    overwrite: bool = overwrite_option()


@dataclass(frozen=True)
class AblateConfig(Checked):
    """Options of `ablate`.

    Scores are those that `score` or `compare` made for this model. In half precision what a single neuron does drowns
    in rounding.
    """

    scores: tuple[Path, ...] = option(
        help="Scores written by 'hifiprune score'; repeat it for several criteria.", metavar="PATH"
    )
    text: Text = group(Text("python-docs", 512, 4), only=TEXT_OPTIONS)
    neurons: int = option(64, "Number of single neurons to remove, one at a time.", bounds=COUNT)
    groups: int = option(32, "Number of random groups of neurons to remove.", bounds=NOT_NEGATIVE_COUNT)
    group_size: int = option(32, "Neurons in a group, all of one layer.", bounds=PAIR)
    seed: int = option(0, "Seed of the sample of neurons.", bounds=SEED)
    compute: ComputeConfig = group(ComputeConfig(dtype="float32"), only=("device", "dtype", "batch_size", "attention"))
    overwrite: bool = overwrite_option()
