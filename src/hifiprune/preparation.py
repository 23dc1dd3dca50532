"""What every command does before its own work: check what is asked, load the model, say what the work will cost."""

from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.allocation import Shape
from hifiprune.calibration import Calibration, check_source
from hifiprune.checkpoint import Checkpoint, find_checkpoint
from hifiprune.compute import Compute, estimate_seconds
from hifiprune.criteria import find_criterion
from hifiprune.hashing import hash_model
from hifiprune.inspection import shape_of
from hifiprune.neurons import find_mlps
from hifiprune.output import check_target
from hifiprune.passes import choose_recompute, working_bytes
from hifiprune.record import RunRecord
from hifiprune.scoring import Request, count_passes
from hifiprune.texts import Text


def prepare(
    model: str,
    output: str | Path,
    sources: Sequence[Calibration | Text | None],
    files: Sequence[str | Path | None] = (),
    *,
    folder: bool,
    overwrite: bool,
) -> tuple[Checkpoint, Path, Shape]:
    """Find the model, and check the output and all that can be known before weights are fetched.

    Args:
        model: local folder, hub id or GGUF file.
        output: what is to be made.
        sources: texts that will be read.
        files: other files that will be read.
        folder: whether the output is a folder.
        overwrite: whether an existing output may be replaced.

    Returns:
        the checkpoint, the output's absolute path, and the model's shape.

    Raises:
        UserError: one of these cannot be used.
    """
    checkpoint = find_checkpoint(model)
    inputs = [checkpoint.path, *(each.source for source in sources for each in _parts(source)), *files]
    target = check_target(output, folder=folder, overwrite=overwrite, inputs=inputs)
    check_model(checkpoint, *sources)
    return checkpoint, target, shape_of(checkpoint.skeleton())


def check_model(checkpoint: Checkpoint, *sources: Calibration | Text | None) -> None:
    """Check family and layout, and that the sources are there and fit its positions."""
    find_mlps(checkpoint.skeleton())
    longest = getattr(checkpoint.config().get_text_config(), "max_position_embeddings", None)
    for source in sources:
        for each in _parts(source):
            check_source(each.source, each.seq_len, longest)


def _parts(source: Calibration | Text | None) -> Sequence[Calibration | Text]:
    """Every single source that a calibration or a text reads."""
    if isinstance(source, Calibration):
        return source.parts
    return [source] if source else []


def load(checkpoint: Checkpoint, compute: Compute) -> PreTrainedModel:
    """The model in the arithmetic asked for."""
    return checkpoint.load(compute.dtype_for(checkpoint), compute.resolved_device, compute.attention)


def load_hashed(
    checkpoint: Checkpoint, compute: Compute, record: RunRecord, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, str]:
    """The model in a dtype or the arithmetic asked for, and the hash of its weights as stored, which refuses NaN."""
    with record.stage("loading the weights"):
        model = checkpoint.load(device=compute.resolved_device, attention=compute.attention)
        model_hash = hash_model(model)
        dtype = dtype or compute.dtype_for(checkpoint)
        if dtype != model.dtype:
            del model
            model = checkpoint.load(dtype, compute.resolved_device, compute.attention)
    return model, model_hash


def announce_scoring(
    name: str,
    model: PreTrainedModel,
    windows: Int[Tensor, "windows positions"],
    requests: Sequence[Request],
    compute: Compute,
) -> str:
    """What scoring will cost."""
    forwards, backwards = count_passes(requests)
    tokens = compute.batch_size * windows.shape[1]
    recompute = choose_recompute(model, tokens) if compute.recompute is None else compute.recompute
    maps = any(find_criterion(name).maps for name, _ in requests)
    memory = working_bytes(model, tokens, recompute=recompute, objectives=backwards, maps=maps)
    seconds = estimate_seconds(
        model.config,
        windows.numel(),
        windows.shape[1],
        compute.resolved_device,
        model.dtype,
        forwards=forwards,
        backwards=backwards,
    )
    criteria = ", ".join(dict.fromkeys(f"'{name}'" for name, _ in requests))
    kept = 0
    if any(find_criterion(name).two_stages for name, _ in requests):
        kept = windows.numel() * model.config.get_text_config().hidden_size * model.dtype.itemsize
    teacher = f", and {kept / 1e6:.0f} MB for the dense model's hidden states" if kept else ""
    return (
        f"Scoring {name} by {criteria} on {len(windows)} windows of {windows.shape[1]} tokens, {model.dtype} on "
        f"{compute.resolved_device}: {forwards} forward and {backwards} backward passes, about {duration(seconds)} and "
        f"{memory / 1e9:.1f} GB above the weights{' (recomputing)' if recompute else ''}{teacher}, if the machine is "
        "idle."
    )


def announce_repair(model: PreTrainedModel, windows: Int[Tensor, "windows positions"], compute: Compute) -> str:
    """What repair will cost: forward passes of the dense and the cut model, and half a pass for the moments."""
    device, config = compute.resolved_device, model.config.get_text_config()
    one = estimate_seconds(config, windows.numel(), windows.shape[1], device, model.dtype, backwards=0)
    kept = windows.numel() * (2 * config.hidden_size + config.intermediate_size) * model.dtype.itemsize
    return (
        f"Repairing on {len(windows)} windows of {windows.shape[1]} tokens, {model.dtype} on {device}: about "
        f"{duration(2.5 * one)} and {kept / 1e9:.1f} GB of memory above the weights, if the machine is idle."
    )


def announce_search(
    model: PreTrainedModel, windows: Int[Tensor, "windows positions"], trials: int, compute: Compute
) -> str:
    """What a search for widths will cost: a forward pass a trial, and half as much again for the metrics."""
    device = compute.resolved_device
    one = estimate_seconds(model.config, windows.numel(), windows.shape[1], device, model.dtype, backwards=0)
    return (
        f"Searching for widths by {trials} trials on {len(windows)} windows of {windows.shape[1]} tokens: about "
        f"{duration(1.5 * one * trials)}, if the machine is idle."
    )


def duration(seconds: float) -> str:
    """Seconds for a reader."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plain_arguments(**values: Any) -> dict[str, Any]:
    """Arguments as plain data."""
    return {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in values.items()}
