"""How fast a model reads and writes: timed in a process of its own, beside what its operations promise.

`python -m hifiprune.evaluation.speed JSON` times one checkpoint and prints what it found as JSON, so that every timing
starts from the same state.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.pytorch_utils import Conv1D

from hifiprune.engine.compute import Compute, load
from hifiprune.engine.context import frozen
from hifiprune.errors import HifipruneError
from hifiprune.models.checkpoint import find_checkpoint
from hifiprune.models.mlp import find_blocks
from hifiprune.run_record import peak_memory, reset_peak_memory


@dataclass(frozen=True)
class Workload:
    """What a model is asked to do.

    Attributes:
        batch_size: sequences at once.
        length: tokens of each that are read.
        new_tokens: tokens that are written after, greedily, at least 2.
        compiled: by `torch.compile`, with a cache of fixed size.
    """

    batch_size: int
    length: int
    new_tokens: int
    compiled: bool = False


@torch.inference_mode()
def write(
    model: PreTrainedModel, forward: Callable[..., Any], tokens: Int[Tensor, "batch length"], work: Workload
) -> tuple[Int[Tensor, "batch new"], float, float]:
    """Read the tokens and write new ones; with the seconds to the first of them, and for each of the others."""
    config, most = model.config, work.length + work.new_tokens
    cache = StaticCache(config, max_cache_len=most) if work.compiled else DynamicCache(config=config)
    start = _now(model)
    written = [_next(forward(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1))]
    first = _now(model)
    for _ in range(work.new_tokens - 1):
        written.append(_next(forward(input_ids=written[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)))
    return torch.cat(written, 1), first - start, (_now(model) - first) / (work.new_tokens - 1)


def _next(output: Any) -> Int[Tensor, "batch 1"]:
    found: Tensor = output.logits[:, -1:].argmax(-1)
    return found


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def time_workload(model: PreTrainedModel, work: Workload, repeats: int) -> dict[str, list[float]]:
    """Seconds to the first token, and for each later one, of several repeats after one that warms up."""
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (work.batch_size, work.length), generator=chance)
    forward: Callable[..., Any] = torch.compile(model) if work.compiled else model
    with frozen(model):
        runs = [write(model, forward, tokens.to(model.device), work)[1:] for _ in range(repeats + 1)]
    first, later = zip(*runs[1:], strict=True)
    return {"first": list(first), "later": list(later)}


def operations(model: PreTrainedModel, work: Workload) -> dict[str, float]:
    """Operations to the first token, and for each later one: two for each weight and token, and those of attention.

    `model` may be on the meta device.
    """
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    linears = [module for module in find_blocks(model).modules() if isinstance(module, (nn.Linear, Conv1D))]
    weights = sum(linear.weight.numel() for linear in linears)
    head: Any = model.get_output_embeddings()
    attention = 4.0 * text.num_hidden_layers * width
    first = work.length * (2.0 * weights + attention * work.length / 2) + 2.0 * head.weight.numel()
    later = 2.0 * (weights + head.weight.numel()) + attention * (work.length + work.new_tokens / 2)
    return {"first": work.batch_size * first, "later": work.batch_size * later}


def time_checkpoint(name: str, compute: Compute, workloads: list[Workload], repeats: int) -> dict[str, Any]:
    """Load a checkpoint in this process, and time it."""
    start = time.perf_counter()
    model = load(find_checkpoint(name), compute)
    loading = time.perf_counter() - start
    reset_peak_memory()
    timings = [_timed_or_told(model, work, repeats) for work in workloads]
    where = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    return {"loading": loading, "timings": timings, "threads": torch.get_num_threads(), **where, **peak_memory()}


def _timed_or_told(model: PreTrainedModel, work: Workload, repeats: int) -> dict[str, Any]:
    """Timings; of a compiled model what went wrong, if compiling does not work here."""
    try:
        return dict(time_workload(model, work, repeats))
    except Exception as error:
        if not work.compiled or isinstance(error, torch.OutOfMemoryError):
            raise
        return {"trouble": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}


def request(name: str, compute: Compute, workloads: list[Workload], repeats: int) -> str:
    """What a process of its own is asked."""
    each = [asdict(work) for work in workloads]
    return json.dumps({"name": name, "compute": asdict(compute), "workloads": each, "repeats": repeats})


def main() -> None:
    """Time what is asked for by the first argument."""
    asked = json.loads(sys.argv[1])
    workloads = [Workload(**each) for each in asked["workloads"]]
    try:
        found = time_checkpoint(asked["name"], Compute(**asked["compute"]), workloads, asked["repeats"])
    except HifipruneError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
