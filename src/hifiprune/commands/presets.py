"""Whole systems by name: ours, as measured best, and those of the papers."""

from dataclasses import dataclass, replace

from hifiprune.defaults import DEFAULT_CRITERION
from hifiprune.errors import unknown

ACROSS_LAYERS = "fisher"
"""Scores by which layers share out their neurons: they tell the divergence best from layer to layer."""


@dataclass(frozen=True)
class Preset:
    """What decides a cut.

    Attributes:
        criterion: how neurons are scored.
        allocation: how widths are decided.
        repair: what is refitted after the cut.
        round_to: widths are multiples of it.
        bos: whether windows of the calibration text begin as the tokenizer begins a text.
    """

    criterion: str
    allocation: str = "uniform"
    repair: str = "none"
    round_to: int = 128
    bos: bool = True


PRESETS = {
    "default": Preset(DEFAULT_CRITERION, repair="ridge"),
    "hfprune": Preset("hfprune", round_to=1, bos=False),
    "sdmprune": Preset("self-distillation", round_to=1, bos=False),
}


def settle(name: str, **given: str | int | None) -> Preset:
    """A preset with what is given in its place.

    Raises:
        UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    changes: dict[str, str | int] = {key: value for key, value in given.items() if value is not None}
    if name == "default" and changes.get("allocation", "uniform") != "uniform":
        changes.setdefault("criterion", ACROSS_LAYERS)
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]
