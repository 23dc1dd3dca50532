"""The options of `prune` and of `score`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hifiprune.bounds import COUNT, INNER_SHARE
from hifiprune.config.groups import (
    AllocationConfig,
    Budget,
    ComputeConfig,
    CriterionOptions,
    dry_run_option,
    overwrite_option,
    until_stable_option,
)
from hifiprune.config.options import CALIBRATION, OUTPUT, PRESET, SCORING, WIDTHS, Checked, group, option
from hifiprune.config.presets import ACROSS_LAYERS, PRESETS, REPAIRS
from hifiprune.config.texts import Calibration
from hifiprune.defaults import DEFAULT_CRITERION

_DEFAULT = PRESETS["default"]
criterion_option = partial(
    option,
    help="How neurons are scored: see 'hifiprune criteria'; hfprune is the paper's definition.",
    flag="--criterion",
)


BY_DEFAULT = f"{_DEFAULT.criterion}; {ACROSS_LAYERS} where widths differ; or the preset's"


@dataclass(frozen=True)
class PruneConfig(Checked):
    """Options of `prune`.

    Attributes:
        budget: how much to remove.
        calibration: text to score and repair on; with `scores` for repair alone, and not needed for a plain cut by
            criteria that look at weights alone.
        criterion: how to score, see `hifiprune.scoring.criteria`; None is the preset's.
        allocation: how widths are decided.
        repair: `ridge` refits each MLP's output projection to what the dense model computes, in closed form; `none` is
            the default where there is no calibration, or biases are compensated.
        scores: file of scores of this very model, made before.
        preset: what stands for all that is None: `default`, or one of the papers' systems, `hfprune` or `sdmprune`.
        round_to: widths become the nearest multiple of it; None is the preset's.
        options: of the criterion; if None, by default with the seed of the calibration data.
        bias_compensation: put the mean output of the removed neurons into the bias of each output projection, as FLAP
            does; only for architectures that have one, with criteria that collect mean activations.
        until_stable: stop scoring once the kept set would agree so well with that of all windows; see
            `hifiprune.scoring.early_stopping`.
        compute: device and arithmetic.
        shard_size: largest weight file, such as `5GB`.
        overwrite: replace an existing output.
        dry_run: stop once it is known what the run will cost.

    Raises:
        UserError: a value is out of range.
    """

    budget: Budget = group(one_of=True)
    calibration: Calibration | None = None
    criterion: str | None = criterion_option(None, shown_default=BY_DEFAULT)
    allocation: AllocationConfig = AllocationConfig()
    repair: str | None = option(
        None,
        "ridge: refit each MLP's output projection to what the dense model computes, in closed form; or none.",
        choices=REPAIRS,
        shown_default=f"{_DEFAULT.repair}, or the preset's; none without --calibration",
    )
    round_to: int | None = option(
        None,
        "Round widths to the nearest multiple; 1 for exact widths.",
        panel=WIDTHS,
        bounds=COUNT,
        shown_default=f"{_DEFAULT.round_to}, or the preset's",
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
    compute: ComputeConfig = ComputeConfig()
    shard_size: str = option("5GB", "Largest weight file.", panel=OUTPUT)
    overwrite: bool = overwrite_option()
    dry_run: bool = dry_run_option()


@dataclass(frozen=True)
class ScoreConfig(Checked):
    """Options of `score`.

    Attributes:
        calibration: text to score on; not needed for criteria that look at weights alone.
        criterion: how to score; see `hifiprune.scoring.criteria`.
        options: of the criterion; if None, by default with the seed of the calibration data.
        until_stable: stop once the set kept at `ratio` would agree so well with that of all windows; see
            `hifiprune.scoring.early_stopping`.
        ratio: for which the scores will be used.
        compute: device and arithmetic.
        overwrite: replace an existing output.
        dry_run: stop once it is known what the run will cost.

    Raises:
        UserError: a value is out of range.
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
