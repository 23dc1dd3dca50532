"""The pass that turns calibration windows into `Scores`."""

from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

import psutil
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.blocks import BlockChain, check_windows, frozen, memory_explained
from hifiprune.criteria import find_criterion
from hifiprune.errors import RunError
from hifiprune.hashing import hash_model, hash_tokens
from hifiprune.neurons import count_parameters
from hifiprune.objectives import SLICE_BYTES
from hifiprune.scores import Scores

Track = Callable[[Iterable[Tensor]], Iterable[Tensor]]


def score(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows positions"],
    criterion: str = "hfprune",
    *,
    batch_size: int = 1,
    recompute: bool | None = None,
    track: Track = lambda batches: batches,
    settings: dict[str, Any] | None = None,
    model_hash: str | None = None,
) -> Scores:
    """Score every MLP neuron of `model` on `windows`; the model is not changed.

    Args:
        model: a causal language model of a supported family, on any device and in any floating dtype.
        windows: integer token ids.
        criterion: see `hifiprune.criteria.CRITERIA`.
        batch_size: windows per step; scores do not depend on it, since every window's mean is taken by itself.
        recompute: run each block twice instead of keeping its graph, for a fraction of the memory; by default only
            where the graphs would not fit into half of the free memory.
        track: wraps the batches, to show progress.
        settings: more facts to keep in the scores.
        model_hash: of the weights as stored, if known; else these are hashed.

    Returns:
        scores with one float32 `[neurons]` tensor per MLP in layer order.

    Raises:
        UserError: the criterion, the windows or the architecture cannot be used.
        RunError: an activation or gradient is NaN or infinite, or memory ran out.
    """
    chosen = find_criterion(criterion)
    check_windows(model, windows, batch_size)
    with frozen(model):
        chain = BlockChain(model)
        totals = [torch.zeros(mlp.neurons, dtype=torch.float64) for mlp in chain.mlps]
        if recompute is None:
            recompute = choose_recompute(model, batch_size * windows.shape[1])
        objective = 0.0

        def add(layer: int, activation: Tensor, gradient: Tensor) -> None:
            totals[layer] += chosen.accumulate(activation, gradient).cpu()

        for batch in track(windows.split(batch_size)):
            tokens = batch.to(model.device, torch.int64)
            with memory_explained(model, tokens.numel()):
                objective += chain.sweep(tokens, chosen.objective, add, recompute=recompute).double().sum().item()
            if not all(total.isfinite().all() for total in totals):
                chain.final_hidden(tokens)  # names the block if the forward pass is to blame
                layer = max(i for i, total in enumerate(totals) if not total.isfinite().all())
                raise RunError(
                    f"the gradients at {chain.mlps[layer].name} are NaN or infinite in {model.dtype}; "
                    "compute in float32 (--dtype float32)"
                )
    facts = {
        "windows": len(windows),
        "positions": windows.shape[1],
        "batch_size": batch_size,
        "recompute": recompute,
        "compute_dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attention": model.config._attn_implementation,
        "hifiprune": version("hifiprune"),
    }
    return Scores(
        values=[total.float() for total in totals],
        names=[mlp.name for mlp in chain.mlps],
        parameters_per_neuron=[mlp.parameters_per_neuron for mlp in chain.mlps],
        total_parameters=count_parameters(model),
        criterion=criterion,
        objective=objective / len(windows),
        model_hash=model_hash or hash_model(model),
        data_hash=hash_tokens(windows),
        settings=facts | (settings or {}),
    )


def choose_recompute(model: PreTrainedModel, tokens: int) -> bool:
    """Whether the graphs of all blocks would not fit into half of the memory that is free."""
    return working_bytes(model, tokens, recompute=False) > free_bytes(model.device) // 2


def working_bytes(model: PreTrainedModel, tokens: int, *, recompute: bool) -> int:
    """Estimated memory above the weights for steps of `tokens` positions: graphs and slices of logits."""
    config = model.config.get_text_config()
    graph = tokens * (4 * config.intermediate_size + 14 * config.hidden_size)
    boundaries = config.num_hidden_layers * tokens * 2 * config.hidden_size
    kept = 2 * graph + boundaries if recompute else config.num_hidden_layers * graph
    return int(kept * model.dtype.itemsize + 2 * SLICE_BYTES)


def free_bytes(device: torch.device) -> int:
    """Memory that a new allocation on `device` could still get."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
