"""Device, dtype and attention implementation of a run."""

import os
from dataclasses import replace
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hifiprune.config.groups import ComputeConfig
from hifiprune.errors import UserError, unknown
from hifiprune.io.atomic import local_path
from hifiprune.io.distributed import local_rank
from hifiprune.models.checkpoint import DTYPES, Checkpoint
from hifiprune.progress import note

FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attention_4": ("flash_attn", "flash-attn-4"),
}
"""Module and package of the attention implementations that transformers does not bring along."""


def check_compute(compute: ComputeConfig) -> None:
    """Refuse a device, an attention implementation or a scratch folder that cannot be used here.

    Raises:
        UserError: one cannot be.
    """
    if compute.scratch and not os.access(local_path(compute.scratch), os.W_OK | os.X_OK):
        raise UserError(
            f"scratch folder {compute.scratch} is not there, or cannot be written; choose another --scratch"
        )
    kind, _, number = compute.device.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device '{compute.device}': torch {torch.__version__} sees no CUDA GPU; use --device cpu")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{compute.device}' does not exist; there are {torch.cuda.device_count()} GPUs")
    place = local_rank() or 0
    device = resolved_device(compute)
    if device.startswith("cuda") and place >= torch.cuda.device_count():
        raise UserError(f"process {place + 1} of this machine finds {torch.cuda.device_count()} GPUs: start fewer")
    if compute.attention is not None:
        check_attention(compute.attention, device)


def resolved_device(compute: ComputeConfig) -> str:
    """Return the device, with `auto` decided; of several processes on a machine each takes a GPU of its own."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if compute.device == "auto" else compute.device
    place = local_rank()
    return f"cuda:{place}" if device == "cuda" and place is not None else device


def compute_dtype(compute: ComputeConfig, checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype to compute in, with `auto` decided."""
    if compute.dtype != "auto":
        return DTYPES[compute.dtype]
    return torch.float32 if resolved_device(compute) == "cpu" else checkpoint.dtype()


def limit_batch(compute: ComputeConfig, rows: int, what: str) -> ComputeConfig:
    """Return the same with a batch size of no more than all `rows`, such as windows, and tell if it was more."""
    if compute.batch_size is None or compute.batch_size <= rows:
        return compute
    note(f"There are {rows} {what}: --batch-size {compute.batch_size} is cut down to {rows}.")
    return replace(compute, batch_size=rows)


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


def load(checkpoint: Checkpoint, compute: ComputeConfig) -> PreTrainedModel:
    """Load the model on the device and in the dtype of `compute`."""
    return checkpoint.load(compute_dtype(compute, checkpoint), resolved_device(compute), compute.attention)
