"""The options of `prune` and of `score`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hifiprune.bounds import COUNT, INNER_SHARE, PAIR, POSITIVE
from hifiprune.config.groups import (
    AllocationConfig,
    Budget,
    ComputeConfig,
    CriterionOptions,
    dry_run_option,
    layout_option,
    overwrite_option,
    until_stable_option,
)
from hifiprune.config.options import CALIBRATION, OUTPUT, PRESET, SCORING, WIDTHS, Checked, group, option
from hifiprune.config.presets import ACROSS_LAYERS, PRESETS, REPAIRS
from hifiprune.config.texts import Calibration
from hifiprune.defaults import DEFAULT_CRITERION, REPAIR_STEPS

_DEFAULT = PRESETS["default"]
criterion_option = partial(
    option,
    help="How neurons are scored: see 'hifiprune criteria'; hfprune is the paper's definition.",
    flag="--criterion",
)


BY_DEFAULT = f"{_DEFAULT.criterion}; {ACROSS_LAYERS} with --allocation global; or the preset's"


@dataclass(frozen=True)
class PruneConfig(Checked):
    """Options of `prune`.

    What is None is as the preset has it. Scores must be of this very model; with them, text is only read for repair,
    and it is not needed for criteria that look at weights alone. Without `options` the criterion has its defaults, and
    the seed of the calibration data.
    """

    budget: Budget = group(one_of=True)
    calibration: Calibration | None = None
    criterion: str | None = criterion_option(None, shown_default=BY_DEFAULT)
    allocation: AllocationConfig = AllocationConfig()
    repair: str | None = option(
        None,
        "ridge: refit each MLP's output projection to what the dense model computes, in closed form; local: then train "
        "each block toward it, better and slower; or none.",
        choices=REPAIRS,
        shown_default=f"{_DEFAULT.repair}, or the preset's; none without --calibration",
    )
    round_to: int | None = option(
        None,
        "Round widths to the nearest multiple; 1 for exact widths.",
        panel=WIDTHS,
        bounds=COUNT,
        shown_default=f"{_DEFAULT.round_to}, or the preset's; 256 with --layout deci",
    )
    scores: Path | None = option(
        None,
        "Scores written by 'hifiprune score', in place of scoring; --calibration is then used only for repair.",
        panel=CALIBRATION,
        metavar="PATH",
    )
    preset: str = option(
        "default",
        "Settings for all that is not given: default, or a paper's: hfprune, sdmprune.",
        panel=PRESET,
        choices=tuple(PRESETS),
    )
    options: CriterionOptions | None = None
    until_stable: float | None = until_stable_option()
    bias_compensation: bool = option(
        False,
        "Add the mean output of the removed neurons to biases, as FLAP does; needs its criterion, flap.",
        panel=PRESET,
    )
    repair_steps: int = option(
        REPAIR_STEPS, "Optimizer steps of each block at most, with --repair local.", panel=PRESET, bounds=COUNT
    )
    repair_minutes: float | None = option(
        None,
        "Minutes at most for all blocks, with --repair local; each may take its share. Runs then differ.",
        panel=PRESET,
        bounds=POSITIVE,
        shown_default="no limit",
    )
    compute: ComputeConfig = ComputeConfig()
    layout: str = layout_option()
    shard_size: str = option("5GB", "Largest weight file.", panel=OUTPUT)
    overwrite: bool = overwrite_option()
    dry_run: bool = dry_run_option()


@dataclass(frozen=True)
class ScoreConfig(Checked):
    """Options of `score`.

    Text is not needed for criteria that look at weights alone. Without `options` the criterion has its defaults, and
    the seed of the calibration data.
    """

    calibration: Calibration | None = None
    criterion: str = criterion_option(DEFAULT_CRITERION)
    options: CriterionOptions | None = None
    until_stable: float | None = until_stable_option()
    ratio: float | None = option(
        None, "Fraction of all parameters to be removed, for --until-stable.", panel=SCORING, bounds=INNER_SHARE
    )
    compute: ComputeConfig = ComputeConfig()
    overwrite: bool = overwrite_option()
    dry_run: bool = dry_run_option()


@dataclass(frozen=True)
class TableConfig(Checked):
    """Options of `table`."""

    scores: Path = option(
        help="Scores written by 'hifiprune score', by which each width keeps its neurons.", metavar="PATH"
    )
    calibration: Calibration = group()
    choices: int = option(8, "Widths measured of each MLP, equally far apart; its own is the last.", bounds=PAIR)
    probes: int = option(4, "Held-out windows that divergences are measured on, at most.", bounds=COUNT)
    compute: ComputeConfig = group(ComputeConfig(), only=("device", "dtype", "batch_size", "attention", "stream"))
    overwrite: bool = overwrite_option()
