"""Estimate time, memory and disk of a run, by formulas over the pace of a short trial."""

from collections.abc import Sequence
from functools import cached_property
from math import ceil, inf
from typing import Any

import psutil
import torch

from hifiprune.commands.trial import Trial, read, sweep
from hifiprune.config.groups import ComputeConfig
from hifiprune.engine.lm_head import rows_of_slice
from hifiprune.engine.memory import (
    Graphs,
    choose_batch,
    choose_graphs,
    choose_group,
    free_bytes,
    graph_bytes,
    keeps_states,
    slice_bytes,
    state_bytes,
    working_bytes,
)
from hifiprune.engine.offload import LEAST_ROOM, return_what_is_freed
from hifiprune.io.distributed import processes
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.mlp import count_parameters, find_blocks, seen_mlps
from hifiprune.pruning.reconstruct import LOOKS, Training
from hifiprune.pruning.repair import HELD_OUT, STREAMS_SHARE
from hifiprune.results import Cost
from hifiprune.scoring.accumulate import StatisticJob, needs
from hifiprune.scoring.criteria import find_criterion
from hifiprune.scoring.score import Request, passes_of

REPAIR_PASSES = 2.3
"""Forward passes of a block that its repair takes: dense, cut, and what the change of its output projection adds."""
TRAINING_PASSES = 3
"""Forward passes of a block that one training step on a batch takes: forward, and back to activations and weights."""
TRAINING_COPIES = 6
"""Times that training holds the weights of a block: as they were, best, in training, gradient, and two moments."""
GRAMS, CROSSES = 8, 4
"""Matrices that a repair holds for each projection in float64: `[neurons, neurons]`, and `[hidden, neurons]`."""


def total_disk(costs: Sequence[Cost]) -> int:
    """Return the total of bytes written."""
    return sum(cost.disk for cost in costs)


class Estimator(Trial):
    """Estimates the cost of each step for a checkpoint.

    Args:
        checkpoint: checkpoint of the dense model; its weights are not loaded.
        compute: device and dtype.
        streamed: whether weights are streamed from disk.
        loaded: whether weights are in memory already.
    """

    def __init__(self, checkpoint: Checkpoint, compute: ComputeConfig, *, streamed: bool = False, loaded: bool = False):
        super().__init__(checkpoint, compute)
        self.streamed = streamed
        self.mlps, self.seen = ceil(len(self.widths) / self.layers), seen_mlps(self.skeleton.config)
        if streamed:
            return_what_is_freed()
        self.weights = 0 if streamed or loaded else count_parameters(self.skeleton) * self.dtype.itemsize
        self._free = free_bytes(self.device) - self.weights
        own = psutil.Process().memory_info().rss
        self.base = self.weights + own * self.on_cpu

    def loading(self) -> Cost:
        """Return the cost of reading and hashing the weights."""
        seconds = self._stored * (max(self.rates) + (0 if self.streamed else self.rates[0]))
        return Cost("loading the weights", seconds, self.base)

    def checking(self) -> Cost:
        """Return the cost of hashing the weights without loading them."""
        return Cost("checking the weights", self._stored * max(self.rates), self.base - self.weights)

    def writing(self, share: float) -> Cost:
        """Return the cost of writing a share of the weights."""
        size = int(self._stored * share)
        return Cost("writing", size * self.rates[0], self.base - self.weights, size)

    def scoring(self, requests: Sequence[Request], windows: int, positions: int) -> Cost:
        """Return the cost of scoring on this process's share of the windows."""
        passes = passes_of(requests)
        if not passes:  # the weights alone are looked at
            return Cost("scoring", self._streamed(0.0, sweeps=1), self.base + self._two_blocks * self.streamed)
        size = self.batch(windows, positions)
        tokens, batches = size * positions, ceil(ceil(windows / size) / processes())
        objectives = max([1, *(len(needs(jobs)[0]) for jobs in passes)])
        group = min(batches, self._group(tokens, objectives))
        state = state_bytes(self.skeleton, tokens)
        inputs = group * self.layers * state
        memory = self.base
        if any(find_criterion(name).two_stages for name, _ in requests):
            memory += batches * state * (self.on_cpu or keeps_states(batches * state, self._free))  # the teacher's
        if self.streamed:
            memory += group * (2 + objectives) * state + inputs * (not self._spills)
            head = self._head_bytes * self._head_is_held + slice_bytes(self.skeleton, self.device)
            memory += max(self._two_blocks + 2 * graph_bytes(self.skeleton, tokens), head)
        else:
            projections = any(job.uses_projections for jobs in passes for job in jobs)
            graphs = self.graphs(tokens)
            memory += working_bytes(
                self.skeleton, tokens, graphs, self.device, objectives=objectives, projections=projections
            )
        seconds = sum(self._sweeping(jobs, batches, ceil(batches / group), size, positions) for jobs in passes)
        return Cost("scoring", seconds, memory, inputs * self._spills)

    def _sweeping(self, jobs: Sequence[StatisticJob], batches: int, groups: int, size: int, positions: int) -> float:
        """Return the seconds of one pass over the batches for jobs, forward and, for objectives, back."""
        graphs = self.graphs(size * positions)
        pace = self.pace(sweep, size, positions, tuple(jobs), graphs.recompute)
        objectives = len(needs(jobs)[0])
        blocks = self.layers * pace.block
        if graphs.recompute and graphs.kept > 1:
            kept = self.pace(sweep, size, positions, tuple(jobs), False).block
            blocks += graphs.kept * (kept - pace.block)
        computing = batches * (blocks + pace.rest)
        sweeps = (2 if objectives else 1) * groups
        heads = self._reading_of_heads(groups, batches * size * positions, objectives)
        return self._streamed(computing, sweeps) + heads

    def repair(self, windows: int, positions: int, width: int, training: Training | None = None) -> Cost:
        """Return the cost of refitting output projections of about `width` neurons, and of training every block.

        A refit takes two forward passes, moments and solving.
        """
        hidden, size = self.config.hidden_size, self.batch(windows, positions)
        tokens, batches = size * positions, ceil(windows / size)
        forward = self.pace(sweep, size, positions, (), False).block
        states = windows * positions * ((3 if training else 2) * hidden + width) * self.dtype.itemsize
        stay = not self.on_cpu and states <= STREAMS_SHARE * self._free
        moving = 0.0 if stay else self.moving(tokens, width)
        block = batches * (REPAIR_PASSES * forward + moving + self.seen * self.moments(tokens, width))
        block += self.mlps * self.solution(width)
        trained = 0
        if training:
            taken = training.steps * training.batches_of(batches, tokens)
            longest = 60 * training.minutes / self.layers if training.minutes else inf
            block += min(longest, forward * (TRAINING_PASSES * taken + (LOOKS + 2) * ceil(batches / HELD_OUT)))
            trained = self._stored_blocks // self.layers // self.checkpoint.dtype().itemsize
        projections = self.layers * self.mlps * width * hidden * self.checkpoint.dtype().itemsize
        memory = self.base + self.mlps * torch.float64.itemsize * (GRAMS * width * width + CROSSES * width * hidden)
        memory += self._two_blocks * self.streamed + graph_bytes(self.skeleton, tokens)
        memory += torch.float32.itemsize * TRAINING_COPIES * trained
        memory += states * (stay or (self.on_cpu and not self._spills))
        seconds = self._streamed(self.layers * block, sweeps=1)
        return Cost("cutting and repairing", seconds, memory, (states + projections) * self._spills)

    def reading(self, tokens: int, positions: int) -> float:
        """Return the seconds of a forward pass over `tokens`, to the distributions of the next ones.

        A backward pass takes as long again for the gradients of activations, and once more for those of all weights.
        """
        pace = self.pace(read, self.compute.batch, positions)
        return tokens / (self.compute.batch * positions) * (self.layers * pace.block + pace.rest)

    def batch(self, windows: int, positions: int) -> int:
        """Return how many of these windows a step has: what was asked for, or what the device has room for."""
        if self.compute.batch_size:
            return self.compute.batch_size
        chosen = choose_batch(self.skeleton, positions, self.device, self._free)
        return max(1, min(chosen, ceil(windows / processes())))

    def graphs(self, tokens: int) -> Graphs:
        """Return of which blocks the graphs will be kept in steps of so many tokens."""
        if self.compute.recompute is not None or self.streamed:
            return Graphs(self.streamed or bool(self.compute.recompute))
        return choose_graphs(self.skeleton, tokens, self.device, self._free)

    def _group(self, tokens: int, objectives: int) -> int:
        if not self.streamed:
            return 1
        return choose_group(self.skeleton, tokens, objectives, self.device, self.compute.scratch)

    @property
    def _spills(self) -> bool:
        """Return whether activations are set aside on a disk."""
        return self.streamed and self.compute.scratch is not None

    @cached_property
    def _stored(self) -> int:
        """Return the bytes of all weights in plain files."""
        return count_parameters(self.skeleton) * self.checkpoint.dtype().itemsize

    @cached_property
    def _stored_blocks(self) -> int:
        """Return the bytes of all blocks in the files."""
        parameters = sum(parameter.numel() for parameter in find_blocks(self.skeleton).parameters())
        return parameters * self.checkpoint.dtype().itemsize

    @property
    def _two_blocks(self) -> int:
        """Return the bytes of the running block, and of the prefetched one as stored."""
        stored = self._stored_blocks // self.layers
        return stored + stored * self.dtype.itemsize // self.checkpoint.dtype().itemsize

    def _streamed(self, computing: float, sweeps: int) -> float:
        """Return the seconds of computing while blocks are streamed `sweeps` times, if they are."""
        reading = sweeps * self._stored_blocks * self.rates[0] if self.streamed else 0.0
        return max(computing, reading)

    @property
    def _head_bytes(self) -> int:
        """Return the bytes of the head in the files."""
        head: Any = self.skeleton.get_output_embeddings()
        return int(head.weight.numel()) * self.checkpoint.dtype().itemsize

    @property
    def _head_is_held(self) -> bool:
        """Return whether a streamed model's head is read once a group; see `WeightOffload.head_room`."""
        return not self.on_cpu or self._head_bytes <= max(LEAST_ROOM, self._two_blocks)

    def _reading_of_heads(self, groups: int, tokens: int, objectives: int) -> float:
        """Return the seconds to read the head once a group, or for every slice of positions in every direction."""
        if not self.streamed or not objectives:
            return 0.0
        slices = tokens / rows_of_slice(self.config.vocab_size, self.device)
        return (groups if self._head_is_held else slices * (1 + objectives)) * self._head_bytes * self.rates[2]
