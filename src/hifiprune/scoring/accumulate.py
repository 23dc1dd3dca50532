"""One pass over the calibration windows that accumulates the statistics of any number of criteria."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hifiprune.engine.batch import Batch
from hifiprune.engine.block_chain import BlockChain
from hifiprune.engine.context import memory_explained
from hifiprune.engine.hooks import Activations
from hifiprune.engine.memory import Graphs, free_bytes, keeps_states, state_bytes
from hifiprune.engine.sliced_objective import Kernel
from hifiprune.errors import RunError
from hifiprune.io.distributed import meet, processes, rank
from hifiprune.io.hashing import hash_tokens
from hifiprune.io.pass_checkpoint import SECONDS_BETWEEN, PassCheckpoint
from hifiprune.progress import track
from hifiprune.scoring.neuron_statistics import Statistic


@dataclass(frozen=True)
class StatisticJob:
    """One statistic to accumulate, and what it needs."""

    statistic: Statistic
    kernels: tuple[Kernel, ...]
    uses_projections: bool

    def __str__(self) -> str:
        return f"{self.statistic.__name__} of {', '.join(map(repr, self.kernels))}"


def needs(jobs: Sequence[StatisticJob]) -> tuple[list[Kernel], list[int]]:
    """Return the kernels that a sweep for these jobs differentiates, and indices of those that need the projections."""
    kernels = list(dict.fromkeys(kernel for job in jobs for kernel in job.kernels))
    return kernels, [
        n for n, kernel in enumerate(kernels) if any(job.uses_projections and kernel in job.kernels for job in jobs)
    ]


def serves(job: StatisticJob, kernels: Sequence[Kernel], seen: Activations) -> bool:
    """Return whether a job uses these activations: of the forward pass, or of one of its kernels."""
    return not job.kernels if seen.kernel is None else kernels[seen.kernel] in job.kernels


def waits(device: torch.device) -> bool:
    """Return whether reading a value makes the device and the host wait for each other."""
    return device.type != "cpu"


@dataclass(frozen=True)
class PassConfig:
    """Settings of a pass.

    Attributes:
        batch_size: windows per step.
        graphs: of which blocks the graphs are kept.
        group: batches that take turns at each block; more than one if weights are streamed from disk.
    """

    batch_size: int = 1
    graphs: Graphs = Graphs(recompute=False)
    group: int = 1


@dataclass
class Pass:
    """One pass over all windows, for any number of jobs, distributed over the processes.

    Attributes:
        chain: block chain of the model.
        windows: token ids.
        config: settings of the pass.
        keeper: checkpoint of the sums, from which an interrupted pass resumes; None without.
        totals: sums for each job and layer, `[statistics, neurons]` in float64.
        sums: sum of each kernel over the windows, in float64 where it was computed.
        hidden: final hidden state of each batch of this process, if requested.
        halves: part of the totals from every other batch, if requested.
        done: number of finished batches.
        checked: how many of them gave finite sums, as far as was asked.
        checked_at: when that was asked.
    """

    chain: BlockChain
    windows: Int[Tensor, "windows positions"]
    config: PassConfig
    keeper: PassCheckpoint | None = None
    totals: dict[StatisticJob, dict[int, Tensor]] = field(default_factory=dict)
    sums: dict[Kernel, Tensor] = field(default_factory=dict)
    hidden: list[Tensor] = field(default_factory=list)
    halves: dict[StatisticJob, dict[int, Tensor]] = field(default_factory=dict)
    done: int = 0
    checked: int = 0
    checked_at: float = field(default_factory=time.monotonic)

    @property
    def objectives(self) -> dict[Kernel, float]:
        """Return the mean of each kernel over the windows, in nats."""
        return {kernel: total.item() / len(self.windows) for kernel, total in self.sums.items()}

    def run(
        self,
        jobs: Iterable[StatisticJob],
        teacher: Sequence[Tensor] = (),
        *,
        keep_hidden: bool = False,
        looks: Sequence[int] = (),
        settled: Callable[["Pass"], bool] | None = None,
    ) -> "Pass":
        """Sweep over the windows and accumulate the statistics of all jobs.

        A GPU is waited for only where its sums are read: at a look, at a checkpoint, and at the end.

        Args:
            jobs: statistics to accumulate.
            teacher: the teacher's final hidden state for each batch, for kernels that need one.
            keep_hidden: whether to keep the final hidden states of this model.
            looks: numbers of batches after which to check whether they are enough.
            settled: returns whether they are enough; halves of the totals are kept for it.
        """
        wanted = list(dict.fromkeys(jobs))
        kernels, projections = needs(wanted)
        device, graphs = self.chain.model.device, self.config.graphs
        self.totals = {job: {} for job in wanted}
        self.sums = {kernel: torch.zeros((), dtype=torch.float64, device=device) for kernel in kernels}
        self.halves = {job: {} for job in wanted} if settled else {}

        def visit(seen: Activations) -> None:
            for job in wanted:
                if serves(job, kernels, seen):
                    self._add(job, seen)

        own = self._share(device)
        keeper = self._keeper(wanted)
        if processes() > 1:
            meet(device, keeper.resume_folder.make if keeper else None)
        self.done = self.checked = self._resume(keeper.read() if keeper else None)
        store = self._store_for(own) if keep_hidden else None
        for some in self._groups(0, self.done) if store else ():
            self.hidden += [state.to(store) for state in self.chain.final_states([own[n][1] for n in some])]
        for places in track(self._groups(self.done, len(own), looks), "scoring"):
            batches = [
                Batch(tokens, first, teacher[place] if teacher else None)
                for place, (first, tokens) in zip(places, own[places.start : places.stop], strict=True)
            ]
            with memory_explained(self.chain.model, self.windows[: self.config.batch_size].numel()):
                self.chain.sweep_all(
                    batches, kernels, visit, recompute=graphs.recompute, kept=graphs.kept, projections=projections
                )
            self.hidden += [batch.final.to(store) for batch in batches if store]
            for kernel, value in (pair for batch in batches for pair in zip(kernels, batch.values, strict=True)):
                self.sums[kernel] += value.double().sum()
            self.done = places.stop
            look, due = settled is not None and self.done in looks, keeper is not None and keeper.due
            self._check(own, now=look or due or self.done == len(own))
            if look and settled and settled(self):
                self.windows = self.windows[: self.done * self.config.batch_size]
                break
            if keeper and due:  # after the look, which a resumed run does not take again
                keeper.write(self._state())
        self._add_up()
        return self

    def _share(self, device: torch.device) -> list[tuple[int, Int[Tensor, "windows positions"]]]:
        """Return this process's batches on the device, each after the number of its first window."""
        size = self.config.batch_size
        starts, tokens = range(0, len(self.windows), size), self.windows.to(device, torch.int64)
        return [*zip(starts, tokens.split(size), strict=True)][rank() :: processes()]

    def _store_for(self, own: Sequence[tuple[int, Int[Tensor, "_ positions"]]]) -> torch.device:
        """Return where to keep final hidden states: on the device if they take little of it, else on the host."""
        device = self.chain.model.device
        size = sum(state_bytes(self.chain.model, tokens.numel()) for _, tokens in own)
        return device if keeps_states(size, free_bytes(device)) else torch.device("cpu")

    def _groups(self, first: int, last: int, stops: Sequence[int] = ()) -> list[range]:
        """Return the batches that take turns at each block, as ranges; a group ends at a stop at the latest."""
        edges = [*range(first, last, self.config.group), *(stop for stop in stops if first < stop < last)]
        return [range(one, other) for one, other in pairwise(sorted({*edges, last}))]

    def _keeper(self, jobs: Sequence[StatisticJob]) -> PassCheckpoint | None:
        """Return the checkpoint for exactly this pass and this process's part of it."""
        config = self.config
        part: list[object] = [rank(), processes(), config.batch_size, config.graphs.recompute, bool(self.halves)]
        part += ["deterministic"] * torch.are_deterministic_algorithms_enabled()
        return self.keeper.of(hash_tokens(self.windows), [*map(str, jobs)], *part) if self.keeper else None

    def _state(self) -> dict[str, Tensor]:
        """Return the sums over the batches so far."""
        totals = {
            f"{place}.{layer}": total.cpu()
            for place, found in enumerate([*self.totals.values(), *self.halves.values()])
            for layer, total in found.items()
        }
        return {"done": torch.tensor(self.done), "sums": self._objectives().cpu()} | totals

    def _objectives(self) -> Float[Tensor, "kernels"]:
        """Return the sum of every kernel as one tensor."""
        return torch.stack([*self.sums.values()]) if self.sums else torch.zeros(0, dtype=torch.float64)

    def _resume(self, state: dict[str, Tensor] | None) -> int:
        """Restore a state; return the number of batches that it covers."""
        if state is None:
            return 0
        device, done = self.chain.model.device, int(state.pop("done"))
        self.sums = dict(zip(self.sums, state.pop("sums").to(device), strict=True))
        tables = [*self.totals.values(), *self.halves.values()]
        for name, total in state.items():
            place, layer = map(int, name.split("."))
            tables[place][layer] = total.to(device)
        return done

    def _add_up(self) -> None:
        """Sum over all processes; each of them then has the result."""
        if processes() == 1:
            return
        sums = self._objectives().to(self.chain.model.device)
        totals = [found[layer] for found in self.totals.values() for layer in sorted(found)]  # whatever was resumed
        for tensor in (sums, *totals):
            torch.distributed.all_reduce(tensor)
        self.sums = dict(zip(self.sums, sums, strict=True))

    def _add(self, job: StatisticJob, seen: Activations) -> None:
        """Add to the sum in float64 on the model's device, so that no GPU is waited for."""
        found, tables = job.statistic(seen), [self.totals[job]]
        if self.halves and seen.windows // self.config.batch_size % 2:
            tables.append(self.halves[job])
        for totals in tables:
            if seen.layer in totals:
                totals[seen.layer].add_(found)
            else:
                totals[seen.layer] = found.to(torch.float64, copy=True)

    def _check(self, own: Sequence[tuple[int, Int[Tensor, "_ positions"]]], *, now: bool) -> None:
        """Refuse sums that are not finite; a GPU, which must be waited for, is asked `now`, or once in a while."""
        if now or not waits(self.chain.model.device) or time.monotonic() - self.checked_at >= SECONDS_BETWEEN:
            self._require_finite([tokens for _, tokens in own[self.checked : self.done]])
            self.checked, self.checked_at = self.done, time.monotonic()

    def _require_finite(self, batches: Sequence[Int[Tensor, "_ positions"]]) -> None:
        layers = [layer for totals in self.totals.values() for layer in totals]
        sums = torch.stack([total.sum() for totals in self.totals.values() for total in totals.values()])
        if not sums.isfinite().all():
            for tokens in batches:
                self.chain.final_hidden(tokens)  # names the block if the forward pass is to blame
            worst = max(layer for layer, finite in zip(layers, sums.isfinite().tolist(), strict=True) if not finite)
            raise RunError(
                f"the gradients at {self.chain.mlps[worst].name} are NaN or infinite in {self.chain.model.dtype}; "
                "compute in float32 (--dtype float32)"
            )
