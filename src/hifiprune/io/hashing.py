"""Content hashes of weights, tokens and texts, which tie results to their inputs."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.errors import UserError

CHUNK = 2**20  # elements hashed at a time: few, so that the same memory is used again
MOST_THREADS = 16  # each reads some megabytes ahead
Weights = Iterable[tuple[str, Sequence[int], Iterable[Tensor]]]
"""Name, shape and values of tensors, these in chunks."""


def hash_model(model: PreTrainedModel) -> str:
    """Compute a SHA-256 of the names, shapes and values of all weights, tied ones once.

    Values count as float32, so a bfloat16 checkpoint has one hash in whichever wider dtype it was loaded.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    return hash_chunks((name, parameter.shape, [parameter.detach()]) for name, parameter in model.named_parameters())


def hash_chunks(weights: Weights) -> str:
    """Compute the same SHA-256 as `hash_model` from names, shapes and values given in chunks.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    with hashing(weights) as result:
        return result()


@contextmanager
def hashing(weights: Weights) -> Iterator[Callable[[], str]]:
    """Hash in threads while the context runs; yield a function that waits for the result of `hash_chunks`.

    It is the hash of the tensors' hashes, which are computed in parallel.
    """
    pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
    try:
        parts = pool.map(_hash_tensor, weights)
        yield lambda: hashlib.sha256(b"".join(parts)).hexdigest()
    finally:
        pool.shutdown(cancel_futures=True)


def _hash_tensor(weight: tuple[str, Sequence[int], Iterable[Tensor]]) -> bytes:
    """Hash the upper halves of all values as float32, which are those of bfloat16, and the lower ones unless all are 0.

    So a bfloat16 tensor is hashed as it is stored.
    """
    name, shape, chunks = weight
    upper, lower = hashlib.sha256(f"{name} {list(shape)}\n".encode()), hashlib.sha256()
    zeros: int | None = 0  # how many lower halves there were, as long as all are 0
    for values in (part for chunk in chunks for part in chunk.reshape(-1).split(CHUNK) if len(part)):
        if not all(bound.isfinite() for bound in values.aminmax()):  # NaN is both
            raise UserError(f"the weights {name} contain NaN or infinite values; the checkpoint is damaged")
        if values.dtype == torch.bfloat16:
            upper.update(_bytes(values.view(torch.int16)))
            low = torch.zeros(())
        else:
            bits = values.float().view(torch.int32)
            upper.update(_bytes((bits >> 16).to(torch.int16)))
            low = bits.to(torch.int16)
        if zeros is not None and not low.any():
            zeros += len(values)
            continue
        if zeros is not None:
            for start in range(0, zeros, CHUNK):
                lower.update(bytes(2 * min(CHUNK, zeros - start)))
            zeros = None
        lower.update(_bytes(low.expand(len(values)).to(torch.int16)))
    return upper.digest() + (lower.digest() if zeros is None else b"")


def _bytes(values: Tensor) -> Any:
    """Return the bytes of a tensor without a copy, if it is on the CPU."""
    return values.cpu().contiguous().numpy()


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
