"""Presets: the default system, as measured best, and those of the papers."""

from dataclasses import dataclass

from hifiprune.defaults import DEFAULT_CRITERION
from hifiprune.errors import unknown

REPAIRS = ("none", "ridge")
ACROSS_LAYERS = "fisher"
"""Scores by which layers share out their neurons: they tell the divergence best from layer to layer."""


@dataclass(frozen=True)
class Preset:
    """Settings that a preset fixes.

    Attributes:
        criterion: how neurons are scored.
        repair: what is refitted after the cut.
        round_to: widths are multiples of it.
        bos: whether windows of the calibration text begin as the tokenizer begins a text.
    """

    criterion: str
    repair: str = "none"
    round_to: int = 128
    bos: bool = True


PRESETS = {
    "default": Preset(DEFAULT_CRITERION, repair="ridge"),
    "hfprune": Preset("hfprune", round_to=1, bos=False),
    "sdmprune": Preset("self-distillation", round_to=1, bos=False),
}


def settle(
    name: str, *, criterion: str | None, repair: str | None, round_to: int | None, uniform: bool = True
) -> Preset:
    """Return a preset with what is given in its place.

    Args:
        name: name of the preset.
        criterion: criterion in place of the preset's.
        repair: repair in place of the preset's.
        round_to: rounding in place of the preset's.
        uniform: whether all MLPs get one width; else the default criterion is one that compares layers.

    Raises:
        UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    if name == "default" and not uniform:
        criterion = criterion or ACROSS_LAYERS
    preset = PRESETS[name]
    return Preset(
        criterion=criterion or preset.criterion,
        repair=repair or preset.repair,
        round_to=preset.round_to if round_to is None else round_to,
        bos=preset.bos,
    )
