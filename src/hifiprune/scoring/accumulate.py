"""One pass over the calibration windows that accumulates the statistics of any number of criteria."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from hifiprune.engine.batch import Batch
from hifiprune.engine.block_chain import BlockChain
from hifiprune.engine.context import memory_explained
from hifiprune.engine.hooks import Activations
from hifiprune.engine.sliced_objective import Kernel
from hifiprune.errors import RunError
from hifiprune.io.distributed import meet, processes, rank
from hifiprune.io.hashing import hash_tokens
from hifiprune.io.pass_checkpoint import PassCheckpoint
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


@dataclass(frozen=True)
class PassConfig:
    """Settings of a pass.

    Attributes:
        batch_size: windows per step.
        recompute: see `BlockChain.sweep`.
        group: batches that take turns at each block; more than one if weights are streamed from disk.
    """

    batch_size: int = 1
    recompute: bool = False
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
        sums: sum of each kernel over the windows.
        hidden: final hidden state of each batch of this process, if requested.
        halves: part of the totals from every other batch, if requested.
        done: number of finished batches.
    """

    chain: BlockChain
    windows: Int[Tensor, "windows positions"]
    config: PassConfig
    keeper: PassCheckpoint | None = None
    totals: dict[StatisticJob, dict[int, Tensor]] = field(default_factory=dict)
    sums: dict[Kernel, float] = field(default_factory=dict)
    hidden: list[Tensor] = field(default_factory=list)
    halves: dict[StatisticJob, dict[int, Tensor]] = field(default_factory=dict)
    done: int = 0

    @property
    def objectives(self) -> dict[Kernel, float]:
        """Return the mean of each kernel over the windows, in nats."""
        return {kernel: total / len(self.windows) for kernel, total in self.sums.items()}

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

        Args:
            jobs: statistics to accumulate.
            teacher: the teacher's final hidden state for each batch, for kernels that need one.
            keep_hidden: whether to keep the final hidden states of this model.
            looks: numbers of batches after which to check whether they are enough.
            settled: returns whether they are enough; halves of the totals are kept for it.
        """
        wanted = list(dict.fromkeys(jobs))
        kernels, projections = needs(wanted)
        self.totals, self.sums = {job: {} for job in wanted}, dict.fromkeys(kernels, 0.0)
        self.halves = {job: {} for job in wanted} if settled else {}

        def visit(seen: Activations) -> None:
            for job in wanted:
                if serves(job, kernels, seen):
                    self._add(job, seen)

        starts = range(0, len(self.windows), self.config.batch_size)
        own = [*zip(starts, self.windows.split(self.config.batch_size), strict=True)][rank() :: processes()]
        keeper = self._keeper(wanted)
        if processes() > 1:
            meet(self.chain.model.device, keeper.resume_folder.make if keeper else None)
        done = self._resume(keeper.read() if keeper else None)
        if keep_hidden:
            for some in self._groups(0, done):
                self.hidden += [each.cpu() for each in self.chain.final_states([self._placed(own[n][1]) for n in some])]
        for places in track(self._groups(done, len(own), looks), "scoring"):
            batches = [
                Batch(self._placed(tokens), first, teacher[place] if teacher else None)
                for place, (first, tokens) in zip(places, own[places.start : places.stop], strict=True)
            ]
            with memory_explained(self.chain.model, self.windows[: self.config.batch_size].numel()):
                self.chain.sweep_all(batches, kernels, visit, recompute=self.config.recompute, projections=projections)
            self._require_finite([batch.tokens for batch in batches])
            for batch in batches:
                if keep_hidden:
                    self.hidden.append(batch.final.cpu())
                for kernel, value in zip(kernels, batch.values, strict=True):
                    self.sums[kernel] += value.double().sum().item()
            self.done = places.stop
            if settled and places.stop in looks and settled(self):
                self.windows = self.windows[: places.stop * self.config.batch_size]
                break
            if keeper:  # after the look, which a resumed run does not take again
                keeper.write(self._state(places.stop))
        self._add_up()
        return self

    def _groups(self, first: int, last: int, stops: Sequence[int] = ()) -> list[range]:
        """Return the batches that take turns at each block, as ranges; a group ends at a stop at the latest."""
        edges = [*range(first, last, self.config.group), *(stop for stop in stops if first < stop < last)]
        return [range(one, other) for one, other in pairwise(sorted({*edges, last}))]

    def _placed(self, batch: Tensor) -> Int[Tensor, "windows positions"]:
        return batch.to(self.chain.model.device, torch.int64)

    def _keeper(self, jobs: Sequence[StatisticJob]) -> PassCheckpoint | None:
        """Return the checkpoint for exactly this pass and this process's part of it."""
        part = rank(), processes(), self.config.batch_size, self.config.recompute, bool(self.halves)
        return self.keeper.of(hash_tokens(self.windows), [*map(str, jobs)], *part) if self.keeper else None

    def _state(self, done: int) -> dict[str, Tensor]:
        """Return the sums over the first `done` batches."""
        sums = {"done": torch.tensor(done), "sums": torch.tensor([*self.sums.values()], dtype=torch.float64)}
        totals = {
            f"{place}.{layer}": total.cpu()
            for place, found in enumerate([*self.totals.values(), *self.halves.values()])
            for layer, total in found.items()
        }
        return sums | totals

    def _resume(self, state: dict[str, Tensor] | None) -> int:
        """Restore a state; return the number of batches that it covers."""
        if state is None:
            return 0
        done, sums = int(state.pop("done")), state.pop("sums").tolist()
        self.sums = dict(zip(self.sums, sums, strict=True))
        tables = [*self.totals.values(), *self.halves.values()]
        for name, total in state.items():
            place, layer = map(int, name.split("."))
            tables[place][layer] = total.to(self.chain.model.device)
        return done

    def _add_up(self) -> None:
        """Sum over all processes; each of them then has the result."""
        if processes() == 1:
            return
        sums = torch.tensor([*self.sums.values()], dtype=torch.float64, device=self.chain.model.device)
        totals = [found[layer] for found in self.totals.values() for layer in sorted(found)]  # whatever was resumed
        for tensor in (sums, *totals):
            torch.distributed.all_reduce(tensor)
        self.sums = dict(zip(self.sums, sums.tolist(), strict=True))

    def _add(self, job: StatisticJob, seen: Activations) -> None:
        """Add to the sum in float64 on the model's device, so that no GPU is waited for."""
        found, tables = job.statistic(seen).double(), [self.totals[job]]
        if self.halves and seen.windows // self.config.batch_size % 2:
            tables.append(self.halves[job])
        for totals in tables:
            totals[seen.layer] = totals[seen.layer] + found if seen.layer in totals else found

    def _require_finite(self, batches: Sequence[Int[Tensor, "windows positions"]]) -> None:
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
