"""Time prefill and decode in a separate process, and count the operations that predict the speed-up.

`python -m hifiprune.evaluation.speed JSON` times one checkpoint and prints the result as JSON, so that every timing
starts from the same state.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.pytorch_utils import Conv1D

from hifiprune.config.groups import ComputeConfig
from hifiprune.engine.compute import load
from hifiprune.engine.context import frozen
from hifiprune.errors import HifipruneError
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.mlp import find_blocks
from hifiprune.results import Workload
from hifiprune.run_record import peak_memory, reset_peak_memory


@torch.inference_mode()
def write(
    model: PreTrainedModel, forward: Callable[..., Any], tokens: Int[Tensor, "batch length"], work: Workload
) -> tuple[Int[Tensor, "batch new"], float, float]:
    """Generate tokens; return them with the seconds to the first token and for each later one."""
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
    """Return the seconds to the first token and for each later one, for several repeats after a warm-up."""
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (work.batch_size, work.length), generator=chance)
    forward: Callable[..., Any] = torch.compile(model) if work.compiled else model
    with frozen(model):
        runs = [write(model, forward, tokens.to(model.device), work)[1:] for _ in range(repeats + 1)]
    first, later = zip(*runs[1:], strict=True)
    return {"first": list(first), "later": list(later)}


def operations(model: PreTrainedModel, work: Workload) -> dict[str, float]:
    """Count operations to the first token and for each later one: two per weight and token, and those of attention.

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


def time_checkpoint(name: str, compute: ComputeConfig, workloads: list[Workload], repeats: int) -> dict[str, Any]:
    """Load a checkpoint in this process, and time it."""
    start = time.perf_counter()
    model = load(find_checkpoint(name), compute)
    loading = time.perf_counter() - start
    reset_peak_memory()
    timings = [_timed_or_told(model, work, repeats) for work in workloads]
    where = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    return {"loading": loading, "timings": timings, "threads": torch.get_num_threads(), **where, **peak_memory()}


def _timed_or_told(model: PreTrainedModel, work: Workload, repeats: int) -> dict[str, Any]:
    """Return the timings, or for a compiled model the reason why compiling failed."""
    try:
        return dict(time_workload(model, work, repeats))
    except Exception as error:
        if not work.compiled or isinstance(error, torch.OutOfMemoryError):
            raise
        return {"trouble": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}


def request(name: str, compute: ComputeConfig, workloads: list[Workload], repeats: int) -> str:
    """Return the JSON argument of the timing process, which runs on as many threads as this one."""
    asked = {"name": name, "compute": asdict(compute), "repeats": repeats, "threads": torch.get_num_threads()}
    return json.dumps(asked | {"workloads": [asdict(work) for work in workloads]})


def main() -> None:
    """Time the checkpoint that the first argument describes."""
    asked = json.loads(sys.argv[1])
    workloads = [Workload(**each) for each in asked["workloads"]]
    torch.set_num_threads(asked["threads"])
    try:
        found = time_checkpoint(asked["name"], ComputeConfig(**asked["compute"]), workloads, asked["repeats"])
    except HifipruneError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
