"""Content hashes of weights, tokens and texts, which tie results to their inputs."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.errors import UserError

CHUNK = 2**20  # elements converted and hashed at a time: few, so that the same memory is used again


def hash_model(model: PreTrainedModel) -> str:
    """Compute the SHA-256 of the names, shapes and values of all weights, tied ones once.

    Values are hashed as float32, so a bfloat16 checkpoint has one hash in whichever wider dtype it was loaded.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    return hash_chunks((name, parameter.shape, [parameter.detach()]) for name, parameter in model.named_parameters())


def hash_chunks(weights: Iterable[tuple[str, Sequence[int], Iterable[Tensor]]]) -> str:
    """Compute the same SHA-256 as `hash_model` from names, shapes and values given in chunks.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    digest = hashlib.sha256()
    for name, shape, chunks in weights:
        digest.update(f"{name} {list(shape)}\n".encode())
        for part in (part for chunk in chunks for part in chunk.reshape(-1).split(CHUNK)):
            values = part.float().cpu()
            if not values.isfinite().all():
                raise UserError(f"the weights {name} contain NaN or infinite values; the checkpoint is damaged")
            digest.update(values.numpy())
    return digest.hexdigest()


def hash_tokens(windows: Int[Tensor, "windows positions"]) -> str:
    """Compute the SHA-256 of token windows, whatever their integer dtype."""
    digest = hashlib.sha256(f"{list(windows.shape)}\n".encode())
    values: Any = windows.to("cpu", torch.int64).contiguous().numpy()
    digest.update(values)
    return digest.hexdigest()


def hash_texts(texts: Iterable[str]) -> str:
    """Compute the SHA-256 of texts and their boundaries."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()
