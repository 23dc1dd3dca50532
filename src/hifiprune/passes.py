"""One run over the calibration windows that serves any number of criteria."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import psutil
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.blocks import BlockChain
from hifiprune.errors import RunError
from hifiprune.guards import memory_explained
from hifiprune.head import SLICE_BYTES, SLICE_ROWS
from hifiprune.neurons import find_mlps
from hifiprune.objectives import Kernel
from hifiprune.statistics import Statistic
from hifiprune.taps import Seen

Track = Callable[[Iterable[Tensor]], Iterable[Tensor]]


@dataclass(frozen=True)
class Job:
    """What one statistic needs of a pass."""

    statistic: Statistic
    kernels: tuple[Kernel, ...]
    maps: bool


@dataclass
class Pass:
    """One run over all windows, for any number of jobs.

    Attributes:
        chain: the model.
        windows: token ids.
        batch_size: windows per step.
        recompute: see `BlockChain.sweep`.
        track: shows progress.
        totals: of each job and layer, `[statistics, neurons]` in float64.
        objectives: mean of each kernel over the windows, in nats.
        hidden: final hidden state of each batch, kept where asked for.
    """

    chain: BlockChain
    windows: Int[Tensor, "windows positions"]
    batch_size: int
    recompute: bool
    track: Track
    totals: dict[Job, dict[int, Tensor]] = field(default_factory=dict)
    objectives: dict[Kernel, float] = field(default_factory=dict)
    hidden: list[Tensor] = field(default_factory=list)

    def run(self, jobs: Iterable[Job], teacher: Sequence[Tensor] = (), *, keep_hidden: bool = False) -> "Pass":
        """Sweep over the windows and collect what the jobs ask for."""
        wanted = list(dict.fromkeys(jobs))
        kernels = list(dict.fromkeys(kernel for job in wanted for kernel in job.kernels))
        maps = [number for number, kernel in enumerate(kernels) if any(j.maps and kernel in j.kernels for j in wanted)]
        self.totals = {job: {} for job in wanted}
        sums = dict.fromkeys(kernels, 0.0)

        def visit(seen: Seen) -> None:
            for job in wanted:
                if (kernels[seen.kernel] in job.kernels) if seen.kernel is not None else not job.kernels:
                    self._add(job, seen)

        for number, batch in enumerate(self.track(self.windows.split(self.batch_size))):
            tokens = batch.to(self.chain.model.device, torch.int64)
            with memory_explained(self.chain.model, tokens.numel()):
                values, hidden = self.chain.sweep(
                    tokens,
                    kernels,
                    visit,
                    recompute=self.recompute,
                    maps=maps,
                    teacher=teacher[number] if teacher else None,
                    first_window=number * self.batch_size,
                )
            self._require_finite(tokens)
            if keep_hidden:
                self.hidden.append(hidden.cpu())
            for kernel, value in zip(kernels, values, strict=True):
                sums[kernel] += value.double().sum().item()
        self.objectives = {kernel: total / len(self.windows) for kernel, total in sums.items()}
        return self

    def _add(self, job: Job, seen: Seen) -> None:
        """Sum in float64 where the model is, so that nothing waits for a GPU."""
        found, totals = job.statistic(seen).double(), self.totals[job]
        totals[seen.layer] = totals[seen.layer] + found if seen.layer in totals else found

    def _require_finite(self, tokens: Int[Tensor, "windows positions"]) -> None:
        layers = [layer for totals in self.totals.values() for layer in totals]
        sums = torch.stack([total.sum() for totals in self.totals.values() for total in totals.values()])
        if not sums.isfinite().all():
            self.chain.final_hidden(tokens)  # names the block if the forward pass is to blame
            worst = max(layer for layer, finite in zip(layers, sums.isfinite().tolist(), strict=True) if not finite)
            raise RunError(
                f"the gradients at {self.chain.mlps[worst].name} are NaN or infinite in {self.chain.model.dtype}; "
                "compute in float32 (--dtype float32)"
            )


def choose_recompute(model: PreTrainedModel, tokens: int) -> bool:
    """Whether the graphs of all blocks would not fit into half of the memory that is free."""
    return working_bytes(model, tokens, recompute=False) > free_bytes(model.device) // 2


def working_bytes(
    model: PreTrainedModel, tokens: int, *, recompute: bool, objectives: int = 1, maps: bool = False
) -> int:
    """Estimated memory above the weights for steps of `tokens` positions: graphs, gradients, slices of logits.

    With `maps` also the weight gradients of one MLP.
    """
    config = model.config.get_text_config()
    graph = tokens * (4 * config.intermediate_size + 14 * config.hidden_size)
    boundaries = config.num_hidden_layers * tokens * 2 * config.hidden_size
    kept = 2 * graph + boundaries if recompute else config.num_hidden_layers * graph
    more = (objectives - 1) * tokens * config.hidden_size
    slices = 4 * max(SLICE_BYTES, 4 * SLICE_ROWS * config.vocab_size)
    products = 3 * 4 * config.intermediate_size * config.hidden_size if maps else 0
    return int((kept + more) * model.dtype.itemsize + slices + products)


def moment_bytes(model: PreTrainedModel) -> int:
    """Memory of the second moments that `obs` sums up in float64."""
    return sum(8 * mlp.neurons * (mlp.neurons + mlp.output.out_features) for mlp in find_mlps(model))


def free_bytes(device: torch.device) -> int:
    """Memory that a new allocation on `device` could still get."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)
