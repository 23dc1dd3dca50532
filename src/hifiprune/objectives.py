"""What pruning should preserve: scalar objectives of the output distribution and their gradients.

An objective is evaluated a slice of positions at a time, so the `[positions, vocabulary]` matrix of logits never exists
as a whole: extra memory is a few `[slice, vocabulary]` float32 matrices, whatever the number of positions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from hifiprune.errors import UserError

SLICE_BYTES = 24 * 2**20  # one [slice, vocabulary] float32 matrix
SLICE_ROWS = 128  # at least, for a fast matrix product
CACHE_BYTES = 3 * 2**20  # rows that a CPU's cache holds while the elementwise steps pass over them

Kernel = Callable[[Float[Tensor, "rows vocabulary"]], Float[Tensor, "rows"]]
"""Objective per position: takes logits, overwrites them with its gradient, returns its value in nats."""


@dataclass(frozen=True)
class Head:
    """From the normalised final hidden state to the logits, as the model computes them but in float32 or better.

    `logits = cap * tanh(scale * (hidden @ weight.T + bias) / cap)`, without the outer part where `cap` is None.
    """

    linear: nn.Linear
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """The head of `model`, with the logit scaling of Cohere and Granite and the soft-capping of Gemma 2."""
        config = model.config.get_text_config()
        linear = model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise UserError(
                f"{type(model).__name__} has no plain Linear as its output head; give the causal language model"
            )
        scale = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return cls(linear, scale / divisor, getattr(config, "final_logit_softcapping", None))

    @property
    def vocabulary(self) -> int:
        """The number of logits per position."""
        return self.linear.out_features

    @property
    def slice_rows(self) -> int:
        """Positions per matrix product: as many rows of logits as fit into `SLICE_BYTES`, at least `SLICE_ROWS`."""
        return max(SLICE_ROWS, SLICE_BYTES // (4 * self.vocabulary))

    @property
    def cache_rows(self) -> int:
        """Rows per elementwise pass: on a CPU as many as stay in its cache, elsewhere a whole slice."""
        on_cpu = self.linear.weight.device.type == "cpu"
        return max(1, CACHE_BYTES // (4 * self.vocabulary)) if on_cpu else self.slice_rows

    def logits(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocabulary"]:
        """Logits of a few positions, in float32 or better."""
        hidden = hidden.to(_precise(hidden.dtype))
        logits = hidden.new_empty(len(hidden), self.vocabulary)
        for columns, weight in self._weight(hidden.dtype):
            torch.mm(hidden, weight.T, out=logits[:, columns])
        if self.linear.bias is not None:
            logits += self.linear.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def pull_back(self, gradient: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows hidden"]:
        """Gradient at the hidden rows from the gradient at the logits before soft-capping."""
        hidden = gradient.new_zeros(len(gradient), self.linear.in_features)
        for columns, weight in self._weight(gradient.dtype):
            hidden.addmm_(gradient[:, columns], weight, alpha=self.scale)
        return hidden

    def _weight(self, dtype: torch.dtype) -> Iterator[tuple[slice, Float[Tensor, "columns hidden"]]]:
        """The weight in `dtype`: whole where it is stored so, else converted a part of the vocabulary at a time."""
        weight = self.linear.weight.detach()
        step = self.vocabulary if weight.dtype == dtype else 16_384
        for start in range(0, self.vocabulary, step):
            yield slice(start, start + step), weight[start : start + step].to(dtype)


def entropy_(logits: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows"]:
    """Entropy of each row's distribution, in nats; overwrites `logits` with its gradient.

    Same as `H = -(p * p.log()).sum(-1)` with `p = logits.softmax(-1)`, and `logits <- dH/dlogits = -p * (p.log() + H)`,
    with one exponential and one scratch matrix. Source: arXiv 2603.08083, eq. 3.
    """
    logits -= logits.amax(-1, keepdim=True)
    weights = logits.exp()
    normaliser = weights.sum(-1, keepdim=True)
    mean: Tensor = torch.linalg.vecdot(weights, logits).unsqueeze(-1) / normaliser
    values = normaliser.log() - mean
    # -p * (log p + H) = -w / Z * (z - mean): the row's log-normaliser cancels.
    logits.sub_(mean).mul_(weights).div_(-normaliser)
    return values.squeeze(-1)


def mean_over_positions(
    kernel: Kernel,
    hidden: Float[Tensor, "windows positions hidden"],
    head: Head,
    slice_rows: int | None = None,
) -> tuple[Float[Tensor, "windows"], Float[Tensor, "windows positions hidden"]]:
    """Mean of `kernel` over the positions of each window, and its gradient with respect to `hidden`.

    Same as `kernel(head.logits(hidden)).mean(-1)` and its autograd gradient, without storing the logits.

    Args:
        kernel: objective per position, such as `entropy_`.
        hidden: the model's final hidden state after its last norm, any floating dtype.
        head: maps it to logits.
        slice_rows: positions per matrix product; see `Head.slice_rows`.

    Returns:
        values in nats in float32 or better, one a window, and the gradient in the same.
    """
    windows, positions, width = hidden.shape
    rows = hidden.reshape(-1, width)
    values = rows.new_empty(len(rows), dtype=_precise(hidden.dtype))
    gradient = torch.empty_like(rows, dtype=values.dtype)
    step = slice_rows or head.slice_rows
    for start in range(0, len(rows), step):
        logits = head.logits(rows[start : start + step])
        pieces = zip(logits.split(head.cache_rows), values[start : start + step].split(head.cache_rows), strict=True)
        for piece, target in pieces:
            target.copy_(_through_cap(kernel, piece, head.cap))
        gradient[start : start + step] = head.pull_back(logits).div_(positions)
    return values.view(windows, positions).mean(-1), gradient.view_as(hidden)


def _through_cap(kernel: Kernel, logits: Float[Tensor, "rows vocabulary"], cap: float | None) -> Float[Tensor, "rows"]:
    """Apply `kernel` to soft-capped logits and carry its gradient to before the cap."""
    if cap is None:
        return kernel(logits)
    slope = 1 - (logits / cap).square()  # d(cap * tanh(z / cap))/dz
    values = kernel(logits)
    logits *= slope
    return values


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
