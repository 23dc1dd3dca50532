"""The language model head: logits from the final hidden state, a slice of positions at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from hifiprune.engine.offload import offload_of
from hifiprune.engine.products import add_product, multiply
from hifiprune.errors import UserError
from hifiprune.io.safetensors_stream import Stored

SLICE_BYTES = 24 * 2**20  # one [slice, vocabulary] float32 matrix
GPU_SLICE_BYTES = 128 * 2**20  # the same on a GPU, which larger matrices keep busy with fewer operations
SLICE_ROWS = 128  # at least, for a fast matrix product
PART = 16_384  # of the vocabulary, for one matrix product on a CPU
CACHE_BYTES = 3 * 2**20  # rows that a CPU's cache holds while the elementwise steps pass over them


@dataclass(frozen=True)
class Head:
    """Computes logits from the normalised final hidden state as the model does, but in float32 or better.

    The weight of a streamed model is `stored` in a file, and read a part at a time unless it is `held`.

    `logits = cap * tanh(scale * (hidden @ weight.T + bias) / cap)`, without the outer part where `cap` is None.
    """

    linear: nn.Linear
    scale: float = 1.0
    cap: float | None = None
    stored: Stored | None = None
    held: Float[Tensor, "vocabulary hidden"] | None = None
    room: int = 0
    device: torch.device = torch.device("cpu")

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """Return the head of `model`, with the logit scaling of Cohere and Granite and the soft-capping of Gemma 2."""
        config = model.config.get_text_config()
        linear = model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise UserError(
                f"{type(model).__name__} has no plain Linear as its output head; give the causal language model"
            )
        scale = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        cap = getattr(config, "final_logit_softcapping", None)
        shelf = offload_of(model)
        stored, room = (shelf.head, shelf.head_room) if shelf else (None, 0)
        return cls(linear, scale / divisor, cap, stored, room=room, device=model.device)

    def at_hand(self) -> "Head":
        """Load a streamed model's head weight into memory if it fits into `room` bytes; return the head that has it."""
        if self.stored is None or self.stored.bytes > self.room:
            return self
        return replace(self, held=self.stored.whole().to(self.device))

    @property
    def vocabulary(self) -> int:
        """Return the number of logits per position."""
        return self.linear.out_features

    @property
    def slice_rows(self) -> int:
        """Return the number of positions per matrix product."""
        return rows_of_slice(self.vocabulary, self.device)

    @property
    def cache_rows(self) -> int:
        """Return the rows per elementwise pass: on a CPU as many as its cache holds, elsewhere a whole slice."""
        on_cpu = self.device.type == "cpu"
        return max(1, CACHE_BYTES // (4 * self.vocabulary)) if on_cpu else self.slice_rows

    def logits(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocabulary"]:
        """Compute the logits of a few positions, in float32 or better."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.new_empty(len(hidden), self.vocabulary, dtype=dtype)
        for columns, weight in self._weight(hidden.device):
            multiply(hidden, weight.T, logits[:, columns])
        if self.linear.bias is not None:
            logits += self.linear.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def pull_back(self, gradient: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows hidden"]:
        """Return the gradient with respect to the hidden rows, given the gradient at the logits before soft-capping."""
        hidden = gradient.new_zeros(len(gradient), self.linear.in_features)
        for columns, weight in self._weight(gradient.device):
            add_product(hidden, gradient[:, columns], weight, self.scale)
        return hidden

    def _weight(self, device: torch.device) -> Iterator[tuple[slice, Float[Tensor, "columns hidden"]]]:
        """Yield the weight on a device, a part of the vocabulary at a time."""
        if self.stored is not None and self.held is None:
            parts = self.stored.chunks(PART)
        else:
            whole = self.linear.weight.detach() if self.held is None else self.held
            parts = iter(whole.split(PART if device.type == "cpu" else len(whole)))
        start = 0
        for part in parts:
            yield slice(start, start + len(part)), part.to(device)
            start += len(part)


def rows_of_slice(vocabulary: int, device: torch.device) -> int:
    """Return how many rows of logits fit into a slice on a device, at least `SLICE_ROWS`."""
    return max(SLICE_ROWS, bytes_of_slice(device) // (4 * vocabulary))


def bytes_of_slice(device: torch.device) -> int:
    """Return the bytes of a slice of logits on a device, of more than `SLICE_ROWS` rows."""
    return SLICE_BYTES if device.type == "cpu" else GPU_SLICE_BYTES


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert `tensor` to float32, or leave it if its own dtype is more precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
