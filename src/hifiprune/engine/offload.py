"""Offload weights to disk: a streamed model reads each block's weights when the block runs, and drops them after.

A streamed model is an ordinary one on the meta device; only the few weights outside blocks, embedding and head are
loaded. `BlockChain` gets the others from its `WeightOffload`. Files are read, not memory-mapped, so memory holds two
blocks at most: the one that runs, and the next one in the dtype of the file, which is prefetched.
"""

import ctypes
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from hifiprune.engine.spill import Scratch, Spilled, spill
from hifiprune.io.safetensors_stream import Stacked, Stored
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.detect import family_of
from hifiprune.models.mlp import find_blocks
from hifiprune.models.neuron_slices import Places

Weights = dict[str, Tensor]
M_MMAP_THRESHOLD = -3
LEAST_ROOM = 2**28
"""Bytes that the head may always take."""


@dataclass(frozen=True)
class WeightOffload:
    """The weights of a streamed model on disk.

    Attributes:
        stored: every tensor, by its name in the model.
        embedding: token embedding.
        head: weight of the language model head; the same tensor if they are tied.
        blocks: path of the decoder blocks.
        device: device that blocks run on.
        dtype: dtype that blocks run in.
        scratch: file to spill tensors to, if any.
        cuts: the slices that remain of a cut model's tensors.
        changed: tensors that replaced those of the same names after the cut.
    """

    stored: dict[str, Stored | Stacked]
    embedding: Stored
    head: Stored
    blocks: str
    device: torch.device
    dtype: torch.dtype
    scratch: Scratch | None = None
    cuts: dict[str, Places] = field(default_factory=dict)
    changed: dict[str, Spilled] = field(default_factory=dict)

    @property
    def head_room(self) -> int:
        """Return the bytes that the head may take while no block is loaded: those of two blocks, unlimited on a GPU."""
        if self.device.type != "cpu":
            return sys.maxsize
        first = [stored for name, stored in self.stored.items() if name.startswith(f"{self.blocks}.0.")]
        return max(LEAST_ROOM, sum(each.bytes + prod(each.shape) * self.dtype.itemsize for each in first))

    def walk(self, blocks: Sequence[nn.Module], order: Sequence[int]) -> Iterator[int]:
        """Yield block indices in the given order, each while its block's weights are loaded."""
        if not order:
            return
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._read, blocks[order[0]], order[0])
            for place, index in enumerate(order):
                weights = coming.result()
                if place + 1 < len(order):
                    following = order[place + 1]
                    coming = reader.submit(self._read, blocks[following], following)
                with self._placed(blocks[index], weights):
                    yield index

    def _read(self, block: nn.Module, index: int) -> Weights:
        """Read the weights of a block, in the dtype of the file."""
        return {name: self._one(f"{self.blocks}.{index}.{name}") for name, _ in block.named_parameters()}

    def _one(self, name: str) -> Tensor:
        if name in self.changed:
            return self.changed[name]()
        values = self.stored[name].whole()
        return self.cuts[name].of(values) if name in self.cuts else values

    def keep(self, cuts: Mapping[str, Places], changed: Mapping[str, Tensor]) -> None:
        """Record the cut and the changed tensors of a block, by name, which are applied whenever it is read again."""
        self.cuts.update(cuts)
        for name, values in changed.items():
            own = values.detach().to("cpu", self.stored[name].dtype, copy=True)
            self.changed[name] = spill(self.scratch, own)

    @contextmanager
    def _placed(self, block: nn.Module, weights: Weights) -> Iterator[None]:
        names = list(weights)
        try:
            for name in names:  # each takes the place of what was read, so that there are never two copies
                place(block, name, weights.pop(name).to(self.device, self.dtype))
            yield
        finally:
            for name in names:
                place(block, name, None)


def place(module: nn.Module, name: str, values: Tensor | None) -> None:
    """Set a module's parameter, or move it to the meta device."""
    if values is None:
        set_module_tensor_to_device(module, name, "meta")
    else:
        set_module_tensor_to_device(module, name, values.device, value=values, clear_cache=False)


def return_what_is_freed() -> None:
    """Make the C library return large tensors' memory at once; glibc would keep and fragment it.

    This costs page faults: the smaller the model, the larger their share of the time.
    """
    with suppress(OSError, AttributeError, TypeError):  # another library, which has no such setting
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def offload_of(model: PreTrainedModel) -> WeightOffload | None:
    """Return the weight shelf of a streamed model; None if its weights are in memory."""
    found: WeightOffload | None = model.__dict__.get("weight_shelf")
    return found


def walk(model: PreTrainedModel, order: Sequence[int]) -> Iterator[int]:
    """Yield decoder block indices in the given order, each while its block's weights are in memory."""
    shelf = offload_of(model)
    return shelf.walk(list(find_blocks(model)), order) if shelf else iter(order)


def stream(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: str = "cpu",
    attention: str | None = None,
    scratch: Scratch | None = None,
) -> PreTrainedModel:
    """Load a checkpoint as a model whose blocks, embedding and head are read from disk when they are needed.

    Args:
        checkpoint: checkpoint with all its files on this disk, `pruning.cut_checkpoint.stored_plainly`.
        dtype: dtype to compute in.
        device: device to compute on.
        attention: attention implementation, by its name in transformers.
        scratch: file to spill activations to; None keeps them in memory.
    """
    config = checkpoint.config()
    config.dtype = dtype
    with init_empty_weights(include_buffers=False):
        model: Any = checkpoint.model_class._from_config(config, attn_implementation=attention)
    return_what_is_freed()
    stored, family = checkpoint.tensors(), family_of(config)
    model.eval().requires_grad_(False)
    model.tie_weights(recompute_mapping=False)
    checkpoint.untie_as_stored_(model)
    tables, blocks = [model.get_input_embeddings(), model.get_output_embeddings()], find_blocks(model)
    embedding, head = (stored[_name_of(model, table.weight, stored)].members[0] for table in tables)
    shelf = WeightOffload(stored, embedding, head, family.blocks, torch.device(device), dtype, scratch)
    far = {id(parameter) for parameter in (*blocks.parameters(), *(table.weight for table in tables))}
    for name, parameter in list(model.named_parameters()):
        if id(parameter) not in far:
            place(model, name, stored[name].whole().to(device, dtype))
    for module in model.modules():
        if module._non_persistent_buffers_set:
            model._init_weights(module)  # in float32, as when it is loaded
    for name, buffer in list(model.named_buffers()):
        known = stored[name].whole().to(buffer.dtype) if name in stored else buffer
        place(model, name, known.to(device))
    model.__dict__["weight_shelf"] = shelf
    table = tables[0]
    nothing = torch.zeros((), dtype=dtype, device=device).expand(table.weight.shape)  # of its shape, but no size
    table.weight = nn.Parameter(nothing, requires_grad=False)  # the first parameter tells where a model is
    model.tie_weights(recompute_mapping=False)
    streamed: PreTrainedModel = model
    return streamed


@contextmanager
def embedding_rows_loaded(model: PreTrainedModel, tokens: Int[Tensor, "windows positions"]) -> Iterator[Tensor]:
    """Load only the embedding rows of these tokens within this context; yield the tokens as indices into them."""
    shelf, table = offload_of(model), cast(nn.Embedding, model.get_input_embeddings())
    if shelf is None:
        yield tokens
        return
    known, numbers = tokens.unique(return_inverse=True)
    rows = shelf.embedding.rows(known.tolist())
    before, padding = table.weight, table.padding_idx
    table.weight = nn.Parameter(rows.to(shelf.device, shelf.dtype), requires_grad=False)
    table.padding_idx = None  # it is a number in the whole table
    try:
        yield numbers
    finally:
        table.weight, table.padding_idx = before, padding


@contextmanager
def head_rows_loaded(model: PreTrainedModel, count: int = 64) -> Iterator[None]:
    """Load only the first rows of a streamed model's head within this context."""
    shelf, table = offload_of(model), model.get_output_embeddings()
    if shelf is None:
        yield
        return
    before, bias = table.weight, table.bias
    rows = shelf.head.rows(range(min(count, len(before))))
    table.weight = nn.Parameter(rows.to(shelf.device, shelf.dtype), requires_grad=False)
    if bias is not None:
        table.bias = nn.Parameter(bias[: len(rows)], requires_grad=False)
    try:
        yield
    finally:
        table.weight, table.bias = before, bias


def _name_of(model: PreTrainedModel, weight: Tensor, stored: Collection[str]) -> str:
    """Return the name that a weight is stored by: its own, or that of the weight it is tied to."""
    names = model.named_parameters(remove_duplicate=False)
    return next(name for name, parameter in names if parameter is weight and name in stored)
