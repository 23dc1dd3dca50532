"""Memory of a pass: hidden states, graphs and logits of a batch, and how many batches go through a block in turn."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from hifiprune.engine.lm_head import SLICE_ROWS, bytes_of_slice
from hifiprune.engine.offload import offload_of
from hifiprune.io.distributed import neighbours
from hifiprune.models.mlp import width_of

FLOAT32 = 4
PER_NEURON, PER_FEATURE = 4, 14
"""Numbers that a block's graph keeps for each token, for each MLP neuron and each feature of the hidden state."""
SLICES = 4
"""Slices of logits, gradients and scratch that the head needs at once."""
PROJECTIONS = 3
"""Weight gradients of an MLP that are held at once."""
BUSY = 4.2e11
"""Products of a block's weights with a batch that keep a GPU busy while the next ones are launched.

On an H100, 2,048 tokens of a 7B model's block took 3% longer, a token, than 4,096, and 1,024 took 47% longer.
"""
TRAINED = 2
"""Numbers that a graph keeps where weights are trained, for each that it keeps where they are not."""
GPU_BYTES = 8 * 10**9
"""Memory of a GPU above the weights that a pass takes unless it is told otherwise."""
STATES_SHARE = 0.125
"""Share of a GPU's free memory that a teacher's final hidden states may take."""


@dataclass(frozen=True)
class Graphs:
    """Whether a pass runs blocks again for their gradients, and of how many, the last ones, it keeps the graphs."""

    recompute: bool
    kept: int = 1


def choose_batch(model: PreTrainedModel, positions: int, device: torch.device, free: int) -> int:
    """Return the number of windows per step: one on a CPU; as many as keep a GPU busy and have room on it."""
    if device.type == "cpu":
        return 1
    size, room = max(1, int(BUSY / (weights_of_block(model) * positions))), room_for_pass(device, free)
    while size > 1 and working_bytes(model, size * positions, Graphs(recompute=True), device) > room:
        size -= 1
    return size


def choose_graphs(model: PreTrainedModel, tokens: int, device: torch.device, free: int) -> Graphs:
    """Return whether to recompute blocks: where the graphs of all have no room; a GPU keeps those that have."""
    room = room_for_pass(device, free)
    if working_bytes(model, tokens, Graphs(recompute=False), device) <= room:
        return Graphs(recompute=False)
    if device.type == "cpu":
        return Graphs(recompute=True)
    most = range(1, model.config.get_text_config().num_hidden_layers)
    fitting = [kept for kept in most if working_bytes(model, tokens, Graphs(recompute=True, kept=kept), device) <= room]
    return Graphs(recompute=True, kept=max(fitting, default=1))


def choose_batches(
    model: PreTrainedModel, positions: int, most: int, device: torch.device, room: int, *, recompute: bool
) -> int:
    """Return how many of `most` training rows go through a GPU at once: a divisor that keeps it busy and has room."""
    fitting = [
        size
        for size in range(1, most + 1)
        if most % size == 0 and TRAINED * working_bytes(model, size * positions, Graphs(recompute), device) <= room
    ]
    wanted = BUSY / (weights_of_block(model) * positions)
    return min((size for size in fitting if size >= wanted), default=max(fitting, default=1))


def weights_of_block(model: PreTrainedModel) -> int:
    """Return about how many weights of a block a token is multiplied with."""
    hidden = int(model.config.get_text_config().hidden_size)
    return 3 * width_of(model.config) * hidden + 4 * hidden**2


def room_for_pass(device: torch.device, free: int) -> int:
    """Return the bytes above the weights that a pass may take: half of those that are free, on a GPU `GPU_BYTES`."""
    return free // 2 if device.type == "cpu" else min(free // 2, GPU_BYTES)


def working_bytes(
    model: PreTrainedModel,
    tokens: int,
    graphs: Graphs,
    device: torch.device,
    *,
    objectives: int = 1,
    projections: bool = False,
) -> int:
    """Estimate the memory above the weights for steps of `tokens` positions: graphs, gradients, slices of logits.

    With `projections` it includes the weight gradients of one MLP.
    """
    config = model.config.get_text_config()
    layers, state, graph = config.num_hidden_layers, state_bytes(model, tokens), graph_bytes(model, tokens)
    kept = (graphs.kept + 1) * graph + 2 * layers * state if graphs.recompute else layers * graph
    gradients = (objectives - 1) * state
    products = PROJECTIONS * FLOAT32 * width_of(model.config) * config.hidden_size if projections else 0
    return int(kept + gradients + slice_bytes(model, device) + products)


def state_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes of the hidden states of `tokens` positions between two blocks."""
    return int(tokens * model.config.get_text_config().hidden_size * model.dtype.itemsize)


def graph_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes that the graph of one block keeps for `tokens` positions."""
    hidden = model.config.get_text_config().hidden_size
    return int(tokens * (PER_NEURON * width_of(model.config) + PER_FEATURE * hidden) * model.dtype.itemsize)


def keeps_states(size: int, free: int) -> bool:
    """Return whether a GPU keeps a teacher's final hidden states of `size` bytes, or sends them to the host."""
    return size <= free * STATES_SHARE


def slice_bytes(model: PreTrainedModel, device: torch.device) -> int:
    """Return the bytes of one slice of logits and their gradients."""
    least = FLOAT32 * SLICE_ROWS * int(model.config.get_text_config().vocab_size)
    return SLICES * max(bytes_of_slice(device), least)


def group_of(model: PreTrainedModel, tokens: int, objectives: int = 0) -> int:
    """Return the number of batches of `tokens` positions that take turns at each block: 1 with weights in memory."""
    shelf = offload_of(model)
    if shelf is None:
        return 1
    return choose_group(model, tokens, objectives, shelf.device, shelf.scratch.folder if shelf.scratch else None)


def choose_group(
    model: PreTrainedModel, tokens: int, objectives: int, device: torch.device, scratch: str | Path | None
) -> int:
    """Return the number of batches of `tokens` positions that take turns at each block of a streamed model.

    The inputs of all blocks are kept for each batch, while weights are read twice for the whole group; the inputs may
    take a quarter of the free memory, or half of the free space on the disk of `scratch`.
    """
    state = state_bytes(model, tokens)
    inputs, moving = int(model.config.get_text_config().num_hidden_layers) * state, (2 + objectives) * state
    memory = free_bytes(device) // 4 // (neighbours() if device.type == "cpu" else 1)
    if scratch is None:
        return max(1, memory // (inputs + moving))
    return max(1, min(memory // moving, shutil.disk_usage(scratch).free // 2 // neighbours() // inputs))


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)
