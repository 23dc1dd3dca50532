"""Where and in which arithmetic a run computes, and what it will roughly cost."""

import os
import re
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hifiprune.bounds import check_numbers
from hifiprune.errors import UserError, nearest_name, unknown
from hifiprune.io.atomic import local_path
from hifiprune.io.distributed import local_rank
from hifiprune.models.checkpoint import DTYPES, Checkpoint
from hifiprune.models.detect import family_of
from hifiprune.models.mlp import width_of
from hifiprune.progress import note

FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attention_4": ("flash_attn", "flash-attn-4"),
}
"""Module and package of the attention implementations that transformers does not bring along."""


@dataclass(frozen=True)
class Compute:
    """How to run the model.

    Attributes:
        device: `auto` (CUDA if there is one, else the CPU), `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (float32 on a CPU, the checkpoint's own on a GPU) or a floating dtype by name; the output
            keeps the checkpoint's own dtype in any case.
        batch_size: windows per step.
        recompute: trade time for memory; None decides by free memory.
        attention: transformers' name of an attention implementation, such as `flash_attention_2`; None is the default.
        stream: leave the weights on the disk and read each block's when it runs; None decides by free memory.
        scratch: folder in which a streamed model's activations are set aside, if not in memory.
    """

    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 1
    recompute: bool | None = None
    attention: str | None = None
    stream: bool | None = None
    scratch: str | None = None

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise UserError(
                f"dtype '{self.dtype}' is not known; known are auto, {known}{nearest_name(self.dtype, DTYPES)}"
            )
        check_numbers(vars(self))
        if self.scratch and not os.access(local_path(self.scratch), os.W_OK | os.X_OK):
            raise UserError(
                f"scratch folder {self.scratch} is not there, or cannot be written; choose another --scratch"
            )
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", self.device):
            raise UserError(f"device '{self.device}' is not known; use auto, cpu, cuda or cuda:0")
        kind, _, number = self.device.partition(":")
        if kind == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device '{self.device}': torch {torch.__version__} sees no CUDA GPU; use --device cpu")
        if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
            raise UserError(f"device '{self.device}' does not exist; there are {torch.cuda.device_count()} GPUs")
        own = local_rank() or 0
        if self.resolved_device.startswith("cuda") and own >= torch.cuda.device_count():
            raise UserError(f"process {own + 1} of this machine finds {torch.cuda.device_count()} GPUs: start fewer")
        if self.attention is not None:
            check_attention(self.attention, self.resolved_device)

    @property
    def resolved_device(self) -> str:
        """The device, with `auto` decided; of several processes on a machine each takes a GPU of its own."""
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        own = local_rank()
        return f"cuda:{own}" if device == "cuda" and own is not None else device

    def for_rows(self, rows: int, what: str) -> "Compute":
        """Return the same with a batch size of no more than all `rows`, such as windows, and tell if it was more."""
        if self.batch_size <= rows:
            return self
        note(f"There are {rows} {what}: --batch-size {self.batch_size} is cut down to {rows}.")
        return replace(self, batch_size=rows)

    def dtype_for(self, checkpoint: Checkpoint) -> torch.dtype:
        """The dtype to compute in, with `auto` decided."""
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        return torch.float32 if self.resolved_device == "cpu" else checkpoint.dtype()


def check_attention(name: str, device: str) -> None:
    """Refuse an attention implementation that is not known, or cannot run here.

    Raises:
        UserError: transformers does not know it, its package is not installed, or it does not run on `device`.
    """
    known = ["eager", *(each for each in ALL_ATTENTION_FUNCTIONS.valid_keys() if not each.startswith("paged|"))]
    if name not in known:
        raise unknown("attention", name, known)
    module, package = FLASH_PACKAGES.get(name, ("", ""))
    if package and not device.startswith("cuda"):
        raise UserError(f"attention '{name}' runs on a GPU only, and the device is {device}; leave out --attention")
    if package and find_spec(module) is None:
        raise UserError(f"attention '{name}' needs {package}: pip install {package}, or leave out --attention")


def estimate_seconds(
    config: PretrainedConfig,
    tokens: int,
    positions: int,
    device: str,
    dtype: torch.dtype,
    *,
    forwards: int = 1,
    backwards: int = 1,
) -> float:
    """Rough time of passes over `tokens`: their operations over the speed of a matrix product here."""
    text = config.get_text_config()
    layers, hidden, width = text.num_hidden_layers, text.hidden_size, width_of(config)
    maps, heads = len(family_of(config).inputs) + 1, text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or hidden // heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    weights = layers * (maps * hidden * width + 2 * hidden * head_width * (heads + keys)) + hidden * text.vocab_size
    attention = (2 * forwards + 5 * backwards) * layers * positions * heads * head_width  # causal
    operations = tokens * (2 * (forwards + backwards) * weights + attention)
    return float(operations) / product_speed(hidden, width, device, dtype)


def product_speed(hidden: int, width: int, device: str, dtype: torch.dtype) -> float:
    """Operations per second of `[512, hidden] @ [hidden, width]`."""
    left = torch.randn(512, hidden, device=device, dtype=dtype)
    right = torch.randn(hidden, width, device=device, dtype=dtype)
    (left @ right).sum().item()
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        (left @ right).sum().item()
        products += 1
    return products * 2 * 512 * hidden * width / (time.perf_counter() - start)


def load(checkpoint: Checkpoint, compute: Compute) -> PreTrainedModel:
    """The model in the arithmetic asked for."""
    return checkpoint.load(compute.dtype_for(checkpoint), compute.resolved_device, compute.attention)
