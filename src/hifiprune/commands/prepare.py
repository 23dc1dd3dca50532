"""Common preparation of all commands: check the request, and load the model."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.calibration import check_source, start_token
from hifiprune.config.groups import ComputeConfig
from hifiprune.config.texts import Calibration, Text
from hifiprune.engine.compute import check_compute, compute_dtype, resolved_device
from hifiprune.engine.context import check_vocabulary
from hifiprune.engine.memory import free_bytes
from hifiprune.engine.offload import stream
from hifiprune.engine.spill import Scratch
from hifiprune.errors import UserError
from hifiprune.io.hashing import hash_model
from hifiprune.io.output_paths import check_target
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.detect import family_of
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.lineage import read_with
from hifiprune.models.mlp import count_parameters, find_mlps
from hifiprune.progress import logger
from hifiprune.pruning.cut_checkpoint import hash_stored, hashing_stored, stored_plainly
from hifiprune.run_record import RunRecord

FITS = 0.8
"""Share of the free memory that weights may take before they are streamed."""


def prepare(
    model: str,
    output: str | Path,
    sources: Sequence[Calibration | Text | None],
    files: Sequence[str | Path | None] = (),
    *,
    compute: ComputeConfig,
    folder: bool,
    overwrite: bool,
) -> tuple[Checkpoint, Path, PreTrainedModel]:
    """Find the model, and check the output and all that can be known before weights are fetched.

    Args:
        model: local folder, hub id or GGUF file.
        output: what is to be made.
        sources: texts that will be read.
        files: other files that will be read.
        compute: device and arithmetic.
        folder: whether the output is a folder.
        overwrite: whether an existing output may be replaced.

    Returns:
        the checkpoint, the output's absolute path, and the model's skeleton on the meta device.

    Raises:
        UserError: one of these cannot be used.
    """
    check_compute(compute)
    checkpoint = find_checkpoint(model)
    texts = [each.texts if isinstance(each, Calibration) else [each.source] for each in sources if each]
    inputs = [*read_with(checkpoint), *chain(*texts), *files]
    target = check_target(output, folder=folder, overwrite=overwrite, inputs=inputs)
    return checkpoint, target, check_model(checkpoint, compute, *sources)


def check_model(checkpoint: Checkpoint, compute: ComputeConfig, *sources: Calibration | Text | None) -> PreTrainedModel:
    """Check family, layout, attention, and that sources are there and fit its positions; returns its skeleton."""
    check_compute(compute)
    skeleton = checkpoint.skeleton()
    find_mlps(skeleton)
    if compute.attention:
        checkpoint.check_attention(compute.attention)
    longest = getattr(checkpoint.config().get_text_config(), "max_position_embeddings", None)
    for source in sources:
        for each in _parts(source):
            check_source(each.source, each.seq_len, longest)
        if isinstance(source, Calibration) and source.prompts is not None:
            check_source(source.prompts, source.seq_len, longest)
        elif isinstance(source, Calibration) and source.is_sampled:
            start_token(checkpoint.config())
    return skeleton


def check_tokens(checkpoint: Checkpoint, *texts: Int[Tensor, "_ _"]) -> None:
    """Refuse windows of text with tokens that the model does not have, before its weights are loaded.

    Raises:
        UserError: the tokenizer is another model's, or was given more tokens than the model.
    """
    vocabulary = checkpoint.config().get_text_config().vocab_size
    for windows in texts:
        check_vocabulary(int(windows.max()) if len(windows) else 0, vocabulary)


def _parts(source: Calibration | Text | None) -> Sequence[Calibration | Text]:
    """Return every single source that a calibration or a text reads."""
    if isinstance(source, Calibration):
        return source.parts
    return [source] if source else []


def load_hashed(
    checkpoint: Checkpoint,
    compute: ComputeConfig,
    record: RunRecord[Any],
    dtype: torch.dtype | None = None,
    *,
    may_stream: bool = False,
    stage: str = "loading the weights",
    model_hash: str = "",
) -> tuple[PreTrainedModel, str]:
    """Load the model, by default as `compute` says, and hash its stored weights, which refuses NaN.

    If it may stream, `streams` decides whether the model is streamed. A known hash is not computed again.
    """
    dtype, device = dtype or compute_dtype(compute, checkpoint), resolved_device(compute)
    with record.stage(stage):
        checkpoint.fetch()
        plainly = stored_plainly(checkpoint)
        if may_stream and streams(checkpoint, compute, dtype):
            if compute.stream is None:
                needed, free = _needed_and_free(checkpoint, compute, dtype)
                logger.info(
                    f"The weights take {needed / 1e9:.1f} GB in {dtype}, and {free / 1e9:.1f} GB are free on "
                    f"{resolved_device(compute)}: each block's are read from the disk when it runs (--stream)."
                )
            scratch = Scratch(compute.scratch) if compute.scratch else None
            return stream(checkpoint, dtype, device, compute.attention, scratch), model_hash or hash_stored(checkpoint)
        if may_stream and compute.scratch:
            logger.info("The weights are in memory: --scratch is not used.")
        if model_hash:
            return checkpoint.load(dtype, device, compute.attention), model_hash
        if plainly:
            with hashing_stored(checkpoint) as hashed:
                return checkpoint.load(dtype, device, compute.attention), hashed()
        model = checkpoint.load(device=device, attention=compute.attention)
        model_hash = hash_model(model)
        if dtype != model.dtype:
            del model
            model = checkpoint.load(dtype, device, compute.attention)
    return model, model_hash


def streams(checkpoint: Checkpoint, compute: ComputeConfig, dtype: torch.dtype) -> bool:
    """Return whether to stream weights from disk: as requested, or if they would not fit into the free memory.

    Weights that are not on this disk yet are assumed to be stored plainly.

    Raises:
        UserError: it is asked for, but they are not stored in a way that allows it.
    """
    if family_of(checkpoint.config()).detected:
        if compute.stream:
            raise UserError(
                f"model type '{checkpoint.config().model_type}' is not in the table of families: its layout is proved "
                "with weights in memory only; leave out --stream"
            )
        return False
    plainly = not checkpoint.is_here or stored_plainly(checkpoint)
    if compute.stream is not None:
        if compute.stream and not plainly:
            raise UserError(
                f"{checkpoint.name} does not store its tensors as the model has them, as GGUF files do not: they "
                "cannot be read block by block; leave out --stream"
            )
        return compute.stream
    needed, free = _needed_and_free(checkpoint, compute, dtype)
    return plainly and needed >= FITS * free


def _needed_and_free(checkpoint: Checkpoint, compute: ComputeConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes that the weights take in a dtype, and that are free on the device."""
    needed = count_parameters(checkpoint.skeleton()) * dtype.itemsize
    return needed, free_bytes(torch.device(resolved_device(compute)))
