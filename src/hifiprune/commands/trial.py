"""Measure the pace of a machine: the same code as in a run, on models of one and of two real blocks."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from hifiprune.config.groups import ComputeConfig
from hifiprune.engine.compute import compute_dtype, resolved_device
from hifiprune.engine.context import frozen, memory_explained
from hifiprune.engine.hooks import Activations
from hifiprune.engine.offload import place
from hifiprune.engine.verify import verified_chain
from hifiprune.io.hashing import hash_chunks
from hifiprune.io.safetensors_stream import Stored
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.detect import settled_family, stock_class
from hifiprune.models.mlp import find_blocks, find_mlps
from hifiprune.pruning.cut_checkpoint import stored_plainly
from hifiprune.pruning.ridge import DAMPINGS, HeldOut, Moments
from hifiprune.scoring.accumulate import StatisticJob, needs, serves

TRIAL_SECONDS, TRIAL_ROUNDS = 0.5, 3
"""Seconds that one round of a trial should take at most, and the rounds, of which the fastest counts."""
LEAST_ROWS = 32
"""Positions that a trial has at least; it has those of a window, unless these would take too long."""
VOCABULARY = 2048
"""Tokens of the smaller of the two vocabularies of a trial."""
SOLVED, ADDED = 1024, 4096
"""Neurons that a trial of repair has at most on a CPU: to solve for, and to add a batch to the moments of."""
ON_GPU = 8192
"""Neurons that it has at most on a GPU, where small products take no less time than larger ones."""
PROBE_BYTES = 2**26
"""Bytes of weights that are read and hashed on trial."""
OPERATIONS = 6
"""Operations for each weight and token of a sweep forward and back."""
SLOWEST = 1e10
"""Operations per second that moments are added with at least."""
NO_PLAIN_BLOCKS = {"first_k_dense_replace": 0, "mlp_only_layers": [], "decoder_sparse_step": 1}
"""Configuration of a model whose blocks all have experts."""


@dataclass(frozen=True)
class Pace:
    """Seconds of a batch in each block, and outside the blocks."""

    block: float
    rest: float


class Trial:
    """Measures the pace of this machine with a checkpoint; its weights are not loaded, and nothing is tried twice.

    Args:
        checkpoint: checkpoint of the dense model.
        compute: device and dtype.
    """

    def __init__(self, checkpoint: Checkpoint, compute: ComputeConfig):
        self.checkpoint, self.compute = checkpoint, compute
        self.dtype, self.device = compute_dtype(compute, checkpoint), torch.device(resolved_device(compute))
        skeleton: Any = checkpoint.new_skeleton()
        self.skeleton: PreTrainedModel = skeleton.to(self.dtype)
        self.config = self.skeleton.config.get_text_config()
        self.widths = [mlp.neurons for mlp in find_mlps(self.skeleton)]
        self.layers = len(find_blocks(self.skeleton))
        self._paces: dict[Any, Pace] = {}

    @property
    def on_cpu(self) -> bool:
        """Return whether the model runs on the CPU, and memory that is counted is the CPU's."""
        return self.device.type == "cpu"

    @cached_property
    def rates(self) -> tuple[float, float, float]:
        """Measure the seconds per byte to read, to hash, and to reread weights; zero where that cannot be tried."""
        if not self.checkpoint.is_here or not stored_plainly(self.checkpoint):
            return 0.0, 0.0, 0.0
        tensors = self.checkpoint.tensors().values()
        largest = max((each for tensor in tensors for each in tensor.members), key=lambda tensor: tensor.bytes)
        rows = max(1, min(largest.shape[0], PROBE_BYTES * largest.shape[0] // largest.bytes))
        part = Stored(largest.path, largest.kind, (rows, *largest.shape[1:]), largest.start)
        read = _seconds(lambda: part.whole().to(self.dtype))
        hashed = _seconds(lambda: hash_chunks([("part", part.shape, part.chunks())]))
        again = _seconds(lambda: part.whole().to(self.dtype))
        return read / part.bytes, hashed / part.bytes, again / part.bytes

    def pace(self, work: Callable[..., float], size: int, positions: int, *details: object) -> Pace:
        """Return the pace of work on batches of `size` windows, tried once."""
        key = work, size, positions, details
        if key not in self._paces:
            self._paces[key] = self._tried(work, size, positions, *details)
        return self._paces[key]

    def _tried(self, work: Callable[..., float], size: int, positions: int, *details: object) -> Pace:
        """Measure a pace by differences between models of one and two blocks, and of one and two vocabularies."""
        vocabulary = min(VOCABULARY, self.config.vocab_size)
        weights = sum(each.numel() for each in find_blocks(self.skeleton)[0].parameters())
        speed = product_speed(self.config.hidden_size, max(self.widths), str(self.device), self.dtype)
        tried = min(positions, max(LEAST_ROWS, int(TRIAL_SECONDS * speed / (OPERATIONS * weights * size))))
        tokens = torch.randint(vocabulary, (size, tried), device=self.device)
        one, two, wide = (
            work(self._miniature(layers, entries), tokens, *details)
            for layers, entries in ((1, vocabulary), (2, vocabulary), (1, 2 * vocabulary))
        )
        block = max(two - one, 0.0)
        head = max(wide - one, 0.0) * (self.config.vocab_size / vocabulary - 1)
        rest = max(one - block, 0.0) + head
        return Pace(block * positions / tried, rest * positions / tried)

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
        with init_empty_weights(include_buffers=False), no_init_weights():
            model: Any = stock._from_config(config, attn_implementation=self.compute.attention)
        known: dict[tuple[str, torch.Size], Tensor] = {}
        for name, parameter in list(model.named_parameters()):
            small = 1 / parameter.shape[-1]  # so that nothing grows on its way
            values = torch.full(parameter.shape, small, dtype=self.dtype, device=self.device)
            place(model, name, known.setdefault((re.sub(r"\.\d+\.", ".", name), parameter.shape), values))
        model.tie_weights()
        miniature: PreTrainedModel = model.to(self.device).eval()
        return miniature

    def moments(self, tokens: int, width: int) -> float:
        """Measure the seconds to add a batch to the moments of a projection of `width` neurons."""
        kept = min(width, ADDED if self.on_cpu else ON_GPU)
        rows = min(tokens, max(LEAST_ROWS, int(TRIAL_SECONDS * SLOWEST / kept**2))) if self.on_cpu else tokens
        activation = torch.full((1, rows, kept), 0.01, dtype=self.dtype, device=self.device)
        state = torch.full((1, rows, self.config.hidden_size), 0.01, dtype=self.dtype, device=self.device)
        moments, held = HeldOut(weighted=True), torch.zeros(1, dtype=torch.bool)

        def add() -> None:
            moments.add(activation, state, state, held)
            float(moments.fit.output)  # which waits for a GPU

        seconds = _fastest(add, warm_up=not self.on_cpu)
        return seconds * tokens / rows * (width / kept) ** 2

    def moving(self, tokens: int, width: int) -> float:
        """Measure the seconds to send the states of a batch, and its activations, to the host and back; 0 on a CPU."""
        if self.on_cpu:
            return 0.0
        numbers = tokens * (3 * self.config.hidden_size + width)  # the dense and the cut stream, and the latter again
        values = torch.zeros(numbers, dtype=self.dtype, device=self.device)
        return _fastest(lambda: values.cpu().to(self.device), warm_up=not self.on_cpu)

    def solution(self, width: int) -> float:
        """Measure the seconds to solve for a projection of `width` neurons, with about half of the dampings tried."""
        kept, moments = min(width, SOLVED if self.on_cpu else ON_GPU), Moments()
        moments.gram = torch.eye(kept, dtype=torch.float64, device=self.device)
        hidden = max(1, self.config.hidden_size * kept // max(self.widths))
        moments.cross = torch.ones(hidden, kept, dtype=torch.float64, device=self.device)
        moments.output = torch.ones((), dtype=torch.float64)
        seconds = _fastest(lambda: moments.error(moments.solve(DAMPINGS[0])), warm_up=not self.on_cpu)
        return seconds * len(DAMPINGS) / 2 * (width / kept) ** 3


def sweep(model: PreTrainedModel, tokens: Tensor, jobs: Sequence[StatisticJob], recompute: bool) -> float:
    """Time a sweep for the jobs, after a warm-up."""
    kernels, projections = needs(jobs)

    def visit(seen: Activations) -> None:
        for job in jobs:
            if serves(job, kernels, seen):
                job.statistic(seen).double()

    with frozen(model), memory_explained(model, tokens.numel()):
        chain = verified_chain(model)
        teacher = chain.final_hidden(tokens)

        def run() -> None:
            _, final = chain.sweep(
                tokens, kernels, visit, recompute=recompute, projections=projections, teacher=teacher
            )
            float(final.sum())  # which waits for a GPU

        return _fastest(run)


def read(model: PreTrainedModel, tokens: Tensor) -> float:
    """Time a forward pass to the distributions of the next tokens, after a warm-up."""
    with frozen(model), memory_explained(model, tokens.numel()):
        chain = verified_chain(model)

        def run() -> None:
            distributions = chain.head.logits(chain.final_hidden(tokens).flatten(0, 1)).log_softmax(-1)
            float(distributions[-1, -1])  # which waits for a GPU

        run()
        return _fastest(run)


def product_speed(hidden: int, width: int, device: str, dtype: torch.dtype) -> float:
    """Measure the operations per second of `[512, hidden] @ [hidden, width]`."""
    left = torch.randn(512, hidden, device=device, dtype=dtype)
    right = torch.randn(hidden, width, device=device, dtype=dtype)

    def multiply() -> None:
        (left @ right).sum().item()

    multiply()
    return 2 * 512 * hidden * width / _fastest(multiply)


def _fastest(work: Callable[[], object], *, warm_up: bool = False) -> float:
    """Return the seconds of the fastest of a few rounds, of fewer where they take long; one more is not counted."""
    if warm_up:
        work()
    seconds: list[float] = []
    while len(seconds) < TRIAL_ROUNDS and sum(seconds) < TRIAL_ROUNDS * TRIAL_SECONDS:
        seconds.append(_seconds(work))
    return min(seconds)


def _seconds(work: Callable[[], object]) -> float:
    """Return the seconds that a function takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
