"""Options that several commands share: budget, criterion, allocation, compute."""

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hifiprune.bounds import COUNT, FEW, INNER_SHARE, POSITIVE, SEED, SHARE, size_in_bytes
from hifiprune.config.options import (
    CALIBRATION,
    COMPUTE,
    OUTPUT,
    SCORING,
    WIDTHS,
    Checked,
    option,
)
from hifiprune.errors import UserError

DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
ALLOCATIONS = ("uniform", "global", "table")
AUTO, STOCK, DECI, REMOTE = LAYOUTS = ("auto", "stock", "deci", "remote")
SDMPRUNE_SETTINGS = {0.2: (0.4, 0.2), 0.3: (0.42, 0.5), 0.4: (0.1, 0.2)}
"""Alpha and temperature of self-distillation that arXiv 2506.11120 uses at each ratio."""
BY_RATIO = "the paper's for the nearest ratio"

overwrite_option = partial(option, False, "Replace an existing output.", panel=OUTPUT)
dry_run_option = partial(option, False, "Estimate time, memory and disk usage, then stop.", panel=OUTPUT)
layout_option = partial(
    option,
    AUTO,
    "How MLP widths are stored. stock: one for all layers. If they differ, deci: as vLLM, SGLang, TensorRT-LLM and "
    "mlx-lm read them, for Llama, Mistral and Qwen 2.5, in multiples of 256; or remote: by a modeling file, for any "
    "family. auto: stock, or deci if it fits, or remote.",
    panel=OUTPUT,
    choices=LAYOUTS,
)
until_stable_option = partial(
    option,
    None,
    "Stop scoring once the neurons selected so far are estimated to share this fraction with the selection by all "
    "windows, such as 0.99.",
    panel=SCORING,
    bounds=INNER_SHARE,
)


@dataclass(frozen=True)
class Budget(Checked):
    """How much to remove; exactly one of the four."""

    ratio: float | None = option(None, "Fraction of all parameters to remove, such as 0.2.", bounds=INNER_SHARE)
    neuron_ratio: float | None = option(
        None, "Fraction of the MLP neurons to remove, in place of --ratio.", panel=WIDTHS, bounds=INNER_SHARE
    )
    width: int | None = option(None, "Neurons that every MLP keeps, in place of --ratio.", panel=WIDTHS, bounds=COUNT)
    max_size: str | None = option(
        None, "Size that the weight files may have, such as 600MB or 6GB, in place of --ratio.", panel=WIDTHS
    )

    def __post_init__(self) -> None:
        """Check that there is one, and its value."""
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) != 1:
            flags = "--ratio, --neuron-ratio, --width, --max-size"
            raise UserError(f"give exactly one of {flags}; given: {', '.join(given) or 'none'}")
        if self.max_size is not None:
            size_in_bytes("max-size", self.max_size)
        super().__post_init__()

    def __str__(self) -> str:
        name, value = next((name, value) for name, value in vars(self).items() if value is not None)
        return f"{name.replace('_', '-')} {value if isinstance(value, str) else f'{value:g}'}"


@dataclass(frozen=True)
class CriterionOptions(Checked):
    """Options of the criteria; each criterion uses those that it knows."""

    alpha: float | None = option(
        None,
        "Self-distillation: share of the divergence from the dense model in the objective.",
        panel=SCORING,
        bounds=SHARE,
        shown_default=BY_RATIO,
    )
    temperature: float | None = option(
        None,
        "Self-distillation: temperature of the dense model.",
        panel=SCORING,
        bounds=POSITIVE,
        shown_default=BY_RATIO,
    )
    light_cut: float = option(
        0.025,
        "Self-distillation: fraction of the neurons that its first stage removes.",
        panel=SCORING,
        bounds=INNER_SHARE,
    )
    label_samples: int = option(
        1,
        "Criteria fisher and fisher-abs: labels drawn from the model at each position, one backward pass each.",
        panel=SCORING,
        bounds=FEW,
    )
    seed: int = option(0, "Seed of everything that is drawn at random.", panel=CALIBRATION, bounds=SEED)

    def for_ratio(self, ratio: float) -> "CriterionOptions":
        """Return the same with the papers' alpha and temperature at their nearest ratio, where these are left open."""
        alpha, temperature = SDMPRUNE_SETTINGS[min(SDMPRUNE_SETTINGS, key=lambda paper: abs(paper - ratio))]
        return replace(
            self,
            alpha=alpha if self.alpha is None else self.alpha,
            temperature=temperature if self.temperature is None else self.temperature,
        )


@dataclass(frozen=True)
class AllocationConfig(Checked):
    """How MLPs share the neurons that a budget leaves."""

    method: str = option(
        "uniform",
        "uniform: one width for all layers; global: layers differ in width, by one threshold on all scores (by "
        "'fisher' unless --criterion is given); better, but transformers loads the checkpoint only with "
        "trust_remote_code=True; see --layout; table: the widths that cost least by --table.",
        flag="--allocation",
        choices=ALLOCATIONS,
    )
    floor: float = option(
        0.75,
        "Fraction of the uniform width that every layer keeps, where layers differ in width.",
        panel=WIDTHS,
        bounds=SHARE,
    )
    table: Path | None = option(
        None,
        "Table of widths written by 'hifiprune table': layers differ in width, as costs least by this table.",
        panel=WIDTHS,
        metavar="PATH",
    )

    def __post_init__(self) -> None:
        """Check the values; a table alone says how widths are decided."""
        super().__post_init__()
        if self.table and self.method == "uniform":
            object.__setattr__(self, "method", "table")
        if (self.method == "table") != (self.table is not None):
            raise UserError("--allocation table and --table go together: 'hifiprune table' writes one")


@dataclass(frozen=True)
class ComputeConfig(Checked):
    """How to run the model; the output keeps the checkpoint's own dtype in any case."""

    device: str = option("auto", "Device: cpu, cuda, cuda:N, or auto: a GPU if there is one.", panel=COMPUTE)
    dtype: str = option(
        "auto",
        "Data type to compute in: float32, bfloat16, float16, float64, or auto: float32 on a CPU, the model's own on a "
        "GPU.",
        panel=COMPUTE,
        choices=("auto", *DTYPE_NAMES),
    )
    batch_size: int | None = option(
        None,
        "Windows per step; results do not depend on it.",
        panel=COMPUTE,
        bounds=COUNT,
        shown_default="1 on a CPU, by size and free memory on a GPU",
    )
    recompute: bool | None = option(
        None,
        "Recompute activations in the backward pass (less memory), or keep them (less time).",
        panel=COMPUTE,
        flag="--recompute/--keep-graphs",
        shown_default="by free memory",
    )
    attention: str | None = option(
        None, "Attention implementation, such as flash_attention_2.", panel=COMPUTE, shown_default="the model's own"
    )
    stream: bool | None = option(
        None,
        "Stream the weights of one block at a time from the disk, or load them all.",
        panel=COMPUTE,
        flag="--stream/--in-memory",
        shown_default="by free memory",
    )
    scratch: str | None = option(
        None,
        "Folder on a fast disk for the activations of a streamed model.",
        panel=COMPUTE,
        metavar="DIR",
        shown_default="kept in memory",
    )
    deterministic: bool = option(
        False, "Get bit-identical scores from every run on one GPU, in more time; on a CPU they are.", panel=COMPUTE
    )

    @property
    def batch(self) -> int:
        """Return the windows per step where none were asked for and nothing else decides."""
        return self.batch_size or 1

    def __post_init__(self) -> None:
        """Check what can be checked without torch; the rest is checked where the device is used."""
        super().__post_init__()
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", self.device):
            raise UserError(f"device '{self.device}' is not known; use auto, cpu, cuda or cuda:0")
