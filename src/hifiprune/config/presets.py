"""Presets: the default system, as measured best, and those of the papers."""

from dataclasses import dataclass

from hifiprune.defaults import DEFAULT_CRITERION

REPAIRS = ("none", "ridge", "local")
ACROSS_LAYERS = "fisher"
"""Criterion whose scores are comparable between layers."""


@dataclass(frozen=True)
class Preset:
    """Settings that a preset fixes.

    Attributes:
        criterion: how neurons are scored.
        repair: what is refitted, or trained as well, after the cut.
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
