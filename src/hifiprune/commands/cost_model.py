"""Estimate time, memory and disk of a run by a short trial: the same code on models of one and of two real blocks."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.config.groups import ComputeConfig
from hifiprune.engine.compute import compute_dtype, product_speed, resolved_device
from hifiprune.engine.context import frozen, memory_explained
from hifiprune.engine.hooks import Activations
from hifiprune.engine.lm_head import rows_of_slice
from hifiprune.engine.offload import LEAST_ROOM, place, return_what_is_freed
from hifiprune.engine.verify import verified_chain
from hifiprune.io.distributed import processes
from hifiprune.io.hashing import hash_chunks
from hifiprune.io.safetensors_stream import Stored
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.detect import settled_family, stock_class
from hifiprune.models.mlp import count_parameters, find_blocks, find_mlps, seen_mlps
from hifiprune.pruning.cut_checkpoint import stored_plainly
from hifiprune.pruning.ridge import DAMPINGS, HeldOut, Moments
from hifiprune.scoring.accumulate import (
    Job,
    choose_group,
    free_bytes,
    graph_bytes,
    needs,
    serves,
    slice_bytes,
    state_bytes,
    working_bytes,
)  # fmt: skip
from hifiprune.scoring.criteria import find_criterion
from hifiprune.scoring.score import Request, passes_of

NO_PLAIN_BLOCKS = {"first_k_dense_replace": 0, "mlp_only_layers": [], "decoder_sparse_step": 1}
"""Configuration of a model whose blocks all have experts."""
TRIAL_SECONDS = 0.5
"""Seconds that a sweep through one block may take; for longer windows the first positions are tried."""
ROUNDS = 3
VOCABULARY = 2048
PROBE_BYTES = 2**26
SOLVED, ADDED = 1024, 4096
"""Maximum number of neurons of the trial systems: to solve, and to add a batch to."""


@dataclass(frozen=True)
class Cost:
    """Cost of a step.

    Attributes:
        step: name of the step in run records.
        seconds: seconds on the machine as loaded as in the trial; see `hifiprune.engine.machine`.
        memory: peak resident bytes; on a GPU the GPU's.
        disk: bytes written.
    """

    step: str
    seconds: float
    memory: int
    disk: int = 0


@dataclass(frozen=True)
class Pace:
    """Seconds of a batch in each block, and outside the blocks."""

    block: float
    rest: float


def total_disk(costs: Sequence[Cost]) -> int:
    """Return the total of bytes written."""
    return sum(cost.disk for cost in costs)


class Estimator:
    """Estimates the cost of each step for a checkpoint.

    Args:
        checkpoint: checkpoint of the dense model; its weights are not loaded.
        compute: device and dtype.
        streamed: whether weights are streamed from disk.
        loaded: whether weights are in memory already.
    """

    def __init__(self, checkpoint: Checkpoint, compute: ComputeConfig, *, streamed: bool = False, loaded: bool = False):
        self.checkpoint, self.compute, self.streamed = checkpoint, compute, streamed
        self.dtype, self.device = compute_dtype(compute, checkpoint), torch.device(resolved_device(compute))
        skeleton: Any = checkpoint.skeleton()
        self.skeleton: PreTrainedModel = skeleton.to(self.dtype)
        self.config = self.skeleton.config.get_text_config()
        self.layers = len(find_blocks(self.skeleton))
        self.mlps, self.seen = ceil(len(find_mlps(self.skeleton)) / self.layers), seen_mlps(self.skeleton.config)
        if streamed:
            return_what_is_freed()
        self.weights = 0 if streamed or loaded else count_parameters(self.skeleton) * self.dtype.itemsize
        self._free = free_bytes(self.device) - self.weights
        self._paces: dict[Any, Pace] = {}
        own = psutil.Process().memory_info().rss
        self.base = self.weights + own * self.on_cpu

    def loading(self) -> Cost:
        """Return the cost of reading and hashing the weights."""
        seconds = self._stored * (max(self._rates) + (0 if self.streamed else self._rates[0]))
        return Cost("loading the weights", seconds, self.base)

    def checking(self) -> Cost:
        """Return the cost of hashing the weights without loading them."""
        return Cost("checking the weights", self._stored * max(self._rates), self.base - self.weights)

    def writing(self, share: float) -> Cost:
        """Return the cost of writing a share of the weights."""
        size = int(self._stored * share)
        return Cost("writing", size * self._rates[0], self.base - self.weights, size)

    def scoring(self, requests: Sequence[Request], windows: int, positions: int) -> Cost:
        """Return the cost of scoring on this process's share of the windows."""
        size, tokens = self.compute.batch_size, self.compute.batch_size * positions
        batches = ceil(ceil(windows / size) / processes())
        passes = passes_of(requests)
        if not passes:  # the weights alone are looked at
            return Cost("scoring", self._streamed(0.0, 1), self.base + self._two_blocks * self.streamed)
        objectives = max([1, *(len(needs(jobs)[0]) for jobs in passes)])
        group = min(batches, self._group(tokens, objectives))
        recompute = self.recomputes(positions)
        seconds = 0.0
        for jobs in passes:
            pace = self._pace(jobs, positions, recompute)
            computing = batches * (self.layers * pace.block + pace.rest)
            wanted, groups = len(needs(jobs)[0]), ceil(batches / group)
            seconds += self._streamed(computing, (2 if wanted else 1) * groups)
            seconds += self._reading_of_heads(groups, batches * tokens, wanted)
        more = 0
        if any(find_criterion(name).two_stages for name, _ in requests):
            more += batches * state_bytes(self.skeleton, tokens) * self.on_cpu
        if self.streamed:
            states = group * (2 + objectives + (0 if self.compute.scratch else self.layers))
            more += states * state_bytes(self.skeleton, tokens)
            head = self._head_bytes * self._head_is_held + slice_bytes(self.skeleton)
            more += max(self._two_blocks + 2 * graph_bytes(self.skeleton, tokens), head)
        else:
            maps = any(job.maps for jobs in passes for job in jobs)
            more += working_bytes(self.skeleton, tokens, recompute=recompute, objectives=objectives, maps=maps)
        disk = group * self.layers * state_bytes(self.skeleton, tokens) if self.streamed and self.compute.scratch else 0
        return Cost("scoring", seconds, self.base + more, disk)

    def repair(self, windows: int, positions: int, width: int) -> Cost:
        """Return the cost of refitting output projections of about `width` neurons: two forwards, moments, solving."""
        size, hidden = self.compute.batch_size, self.config.hidden_size
        batches, kept = ceil(windows / size), min(width, SOLVED)
        pace = self._pace([], positions, recompute=False)
        adding, solving = self._moments(size * positions, width), self._solution(kept) * (width / kept) ** 3
        per_block = batches * (2.3 * pace.block + self.seen * adding) + self.mlps * solving
        seconds = self._streamed(self.layers * per_block, 1)
        states = windows * positions * (2 * hidden + width) * self.dtype.itemsize
        sums = self.mlps * 8 * (8 * width * width + 4 * width * hidden)
        spilled = self.streamed and self.compute.scratch is not None
        more = (0 if spilled else states * self.on_cpu) + sums
        more += (self._two_blocks if self.streamed else 0) + graph_bytes(self.skeleton, size * positions)
        maps = self.layers * self.mlps * width * hidden * self.checkpoint.dtype().itemsize
        return Cost("cutting and repairing", seconds, self.base + more, states + maps if spilled else 0)

    def recomputes(self, positions: int) -> bool:
        """Return whether blocks will be recomputed instead of keeping their graphs."""
        if self.compute.recompute is not None or self.streamed:
            return self.streamed or bool(self.compute.recompute)
        return working_bytes(self.skeleton, self.compute.batch_size * positions, recompute=False) > self._free // 2

    def _group(self, tokens: int, objectives: int) -> int:
        if not self.streamed:
            return 1
        return choose_group(self.skeleton, tokens, objectives, self.device, self.compute.scratch)

    @property
    def on_cpu(self) -> bool:
        """Return whether the counted memory is that of the CPU."""
        return self.device.type == "cpu"

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
        reading = sweeps * self._stored_blocks * self._rates[0] if self.streamed else 0.0
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
        slices = tokens / rows_of_slice(self.config.vocab_size)
        return (groups if self._head_is_held else slices * (1 + objectives)) * self._head_bytes * self._rates[2]

    @cached_property
    def _rates(self) -> tuple[float, float, float]:
        """Measure the seconds per byte to read, to hash, and to reread weights; zero where that cannot be tried."""
        if not self.checkpoint.is_here or not stored_plainly(self.checkpoint):
            return 0.0, 0.0, 0.0
        tensors = self.checkpoint.tensors().values()
        largest = max((each for tensor in tensors for each in tensor.members), key=lambda tensor: tensor.bytes)
        rows = max(1, min(largest.shape[0], PROBE_BYTES * largest.shape[0] // largest.bytes))
        part = Stored(largest.path, largest.kind, (rows, *largest.shape[1:]), largest.start)
        read, hashed, again = (
            _seconds(what)
            for what in (
                lambda: part.whole().to(self.dtype),
                lambda: hash_chunks([("part", part.shape, part.chunks())]),
                lambda: part.whole().to(self.dtype),
            )
        )
        return read / part.bytes, hashed / part.bytes, again / part.bytes

    def _pace(self, jobs: Sequence[Job], positions: int, recompute: bool) -> Pace:
        """Measure the pace by differences between models of one and two blocks, and of one and two vocabularies."""
        key = tuple(jobs), positions, recompute
        if key not in self._paces:
            self._paces[key] = self._tried(jobs, positions, recompute)
        return self._paces[key]

    def _tried(self, jobs: Sequence[Job], positions: int, recompute: bool) -> Pace:
        size, vocabulary = self.compute.batch_size, min(VOCABULARY, self.config.vocab_size)
        weights = sum(each.numel() for each in find_blocks(self.skeleton)[0].parameters())
        speed = product_speed(self.config.hidden_size, max(self.widths), str(self.device), self.dtype)
        tried = min(positions, max(32, int(TRIAL_SECONDS * speed / (6.0 * weights * size))))
        tokens = torch.randint(vocabulary, (size, tried), device=self.device)
        one, two, wide = (
            _timed(self._miniature(layers, size), tokens, jobs, recompute=recompute)
            for layers, size in ((1, vocabulary), (2, vocabulary), (1, 2 * vocabulary))
        )
        block = max(two - one, 0.0)
        rest = max(one - block, 0.0) + max(wide - one, 0.0) * (self.config.vocab_size / vocabulary - 1)
        return Pace(block * positions / tried, rest * positions / tried)

    @property
    def widths(self) -> list[int]:
        """Return the widths of the MLPs."""
        return [mlp.neurons for mlp in find_mlps(self.skeleton)]

    def _miniature(self, layers: int, vocabulary: int) -> PreTrainedModel:
        """Build a model of a few blocks of the real sizes, all weights being one small number in shared memory."""
        config = self.checkpoint.config()
        family = settled_family(config)
        text = config.get_text_config()
        text.num_hidden_layers, text.vocab_size = layers, vocabulary
        if family.width and not family.experts:
            setattr(text, family.width, round(sum(self.widths) / self.layers))
        config.__dict__.pop("mlp_widths", None)
        for name, value in NO_PLAIN_BLOCKS.items():
            if hasattr(text, name):
                setattr(text, name, value)
        for each in {id(each): each for each in (config, text)}.values():
            each.pad_token_id = each.bos_token_id = each.eos_token_id = 0  # which is in any vocabulary
            if getattr(each, "layer_types", None):
                each.layer_types = each.layer_types[:layers]
        stock = stock_class(config)
        config.dtype = self.dtype
        with init_empty_weights(include_buffers=False):
            model: Any = stock._from_config(config, attn_implementation=self.compute.attention)
        known: dict[tuple[str, torch.Size], Tensor] = {}
        for name, parameter in list(model.named_parameters()):
            small = 1 / parameter.shape[-1]  # so that nothing grows on its way
            values = torch.full(parameter.shape, small, dtype=self.dtype, device=self.device)
            place(model, name, known.setdefault((re.sub(r"\.\d+\.", ".", name), parameter.shape), values))
        model.tie_weights()
        miniature: PreTrainedModel = model.to(self.device).eval()
        return miniature

    def _moments(self, tokens: int, width: int) -> float:
        """Measure the seconds to add a batch to the moments of a map of `width` neurons."""
        kept = min(width, ADDED)
        rows = min(tokens, max(32, int(TRIAL_SECONDS * 1e10 / kept**2)))
        activation = torch.full((1, rows, kept), 0.01, dtype=self.dtype, device=self.device)
        state = torch.full((1, rows, self.config.hidden_size), 0.01, dtype=self.dtype, device=self.device)
        moments, held = HeldOut(weighted=True), torch.zeros(1, dtype=torch.bool)
        seconds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            moments.add(activation, state, state, held)
            seconds.append(time.perf_counter() - start)
        return min(seconds) * tokens / rows * (width / kept) ** 2

    def _solution(self, width: int) -> float:
        """Measure the seconds to solve for a map of `width` neurons, with about half of the dampings tried."""
        moments = Moments()
        moments.gram = torch.eye(width, dtype=torch.float64, device=self.device)
        hidden = max(1, self.config.hidden_size * width // max(self.widths))
        moments.cross = torch.ones(hidden, width, dtype=torch.float64, device=self.device)
        moments.output = 1.0
        seconds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            moments.error(moments.solve(0.1))
            seconds.append(time.perf_counter() - start)
        return min(seconds) * len(DAMPINGS) / 2


def _timed(model: PreTrainedModel, tokens: Tensor, jobs: Sequence[Job], *, recompute: bool) -> float:
    """Time a sweep for the jobs, after a warm-up."""
    kernels, maps = needs(jobs)

    def visit(seen: Activations) -> None:
        for job in jobs:
            if serves(job, kernels, seen):
                job.statistic(seen).double()

    seconds: list[float] = []
    with frozen(model), memory_explained(model, tokens.numel()):
        chain = verified_chain(model)
        teacher = chain.final_hidden(tokens)
        while len(seconds) < ROUNDS and sum(seconds) < ROUNDS * TRIAL_SECONDS:
            start = time.perf_counter()
            _, final = chain.sweep(tokens, kernels, visit, recompute=recompute, maps=maps, teacher=teacher)
            float(final.sum())  # which waits for a GPU
            seconds.append(time.perf_counter() - start)
    return min(seconds)


def _seconds(work: Callable[[], object]) -> float:
    """Return the seconds that a function takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
