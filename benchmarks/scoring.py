"""Scoring by entropy: this package against the papers' way, on SmolLM2-135M and 8 windows of 1,024 tokens.

The papers' way, written naively: the model's own forward, full logits and softmax, one autograd graph with weight
gradients. Every variant runs in fresh processes, interleaved over the rounds; seconds a window and the peak resident
memory above the loaded weights are compared as ratios of medians. Also measured: the time of the matrix products alone,
at the same shapes, to tell how close the pass comes to the machine's peak. Writes `results/scoring.json`.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.calibration import load_windows
from hifiprune.commands.demo import fetch_smollm2
from hifiprune.config.texts import Calibration
from hifiprune.engine.context import frozen
from hifiprune.engine.hooks import Activations
from hifiprune.engine.verify import verified_chain
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.run_record import describe_environment, peak_memory, reset_peak_memory
from hifiprune.scoring.neuron_statistics import absolute
from hifiprune.scoring.objectives import Entropy

ROOT = Path(__file__).parent.parent
WINDOWS, POSITIONS, ROUNDS = 8, 1024, 3
VARIANTS = ("papers", "keep-graphs", "recompute")


def papers_way(model: PreTrainedModel, windows: Tensor, seconds: list[float]) -> list[Tensor]:
    """Score by hooks on one autograd graph over full logits, weight gradients on."""
    activations: list[Tensor] = []

    def keep(_: torch.nn.Module, arguments: tuple[Tensor]) -> None:
        arguments[0].retain_grad()
        activations.append(arguments[0])

    model.requires_grad_()
    projections = [mlp.output for mlp in verified_chain(model).mlps]
    hooks = [linear.module.register_forward_pre_hook(keep) for linear in projections]
    scores = [torch.zeros(linear.in_features) for linear in projections]
    for window in windows:
        start = time.perf_counter()
        logits = model(input_ids=window.unsqueeze(0), use_cache=False).logits
        probs = torch.softmax(logits, -1)
        entropy = -(probs * torch.log_softmax(logits, -1)).sum(-1).mean()
        entropy.backward()
        for total, activation in zip(scores, activations, strict=True):
            assert activation.grad is not None
            total.add_((activation * activation.grad).abs().sum((0, 1)).detach())
        activations.clear()
        model.zero_grad()
        seconds.append(time.perf_counter() - start)
    for hook in hooks:
        hook.remove()
    return scores


def our_way(model: PreTrainedModel, windows: Tensor, seconds: list[float], *, recompute: bool) -> list[Tensor]:
    """Score by one sweep a window through the block chain."""
    with frozen(model):
        chain = verified_chain(model)
        scores = [torch.zeros(mlp.neurons) for mlp in chain.mlps]

        def add(seen: Activations) -> None:
            if seen.kernel is not None:
                scores[seen.layer] += absolute(seen)[0]

        for window in windows:
            start = time.perf_counter()
            chain.sweep(window.unsqueeze(0), [Entropy()], add, recompute=recompute)
            seconds.append(time.perf_counter() - start)
    return scores


def product_seconds(model: PreTrainedModel) -> tuple[float, float]:
    """Operations of the products that scoring one window needs, and the seconds they take alone.

    Forward and activation gradient of every projection, without what the first block's input would need.
    """
    seconds = operations = 0.0
    timed: dict[tuple[int, int, int], float] = {}
    chain = verified_chain(model)
    slices = chain.head.slice_rows
    shapes = [
        (POSITIONS, *linear.weight.shape, POSITIONS, 2 if layer or linear is chain.mlps[0].output.module else 1)
        for layer, block in enumerate(chain.blocks)
        for linear in block.modules()
        if isinstance(linear, torch.nn.Linear)
    ]
    shapes.append((slices, *chain.head.linear.weight.shape, POSITIONS, 2))
    for rows, outputs, inputs, positions, passes in shapes:
        for backward in range(passes):
            left, right = (outputs, inputs) if backward else (inputs, outputs)
            key = (rows, left, right)
            if key not in timed:
                timed[key] = _time_product(*key)
            seconds += timed[key] * positions / rows
            operations += 2.0 * positions * inputs * outputs
    return operations, seconds


def _time_product(rows: int, inner: int, columns: int) -> float:
    left, out = torch.randn(rows, inner), torch.empty(rows, columns)
    right = torch.randn(columns, inner).T if columns > inner else torch.randn(inner, columns)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        times.append(time.perf_counter() - start)
    return median(times)


def attention_operations(model: PreTrainedModel) -> float:
    """Operations of causal attention for one window: 2 products forward, 5 backward (none in the first block)."""
    config = model.config
    width = config.num_attention_heads * config.head_dim
    return float(POSITIONS**2 * width * (7 * config.num_hidden_layers - 5))


def measure(variant: str) -> dict[str, Any]:
    """Run one variant in this process."""
    checkpoint = find_checkpoint(str(ROOT / ".cache" / "smollm2"))
    windows = load_windows(Calibration("python-docs", WINDOWS, POSITIONS, sampler="stream"), checkpoint.tokenizer())
    model = checkpoint.load(torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # in memory, not mapped from the file
    reset_peak_memory()
    before, seconds = psutil.Process().memory_info().rss, list[float]()
    if variant == "papers":
        scores = papers_way(model, windows, seconds)
    else:
        scores = our_way(model, windows, seconds, recompute=variant == "recompute")
    peak = peak_memory()["peak_memory_bytes"] - before
    operations, alone = product_seconds(model)
    kept = [sorted(values.topk(1017).indices.tolist()) for values in scores]
    useful = operations + attention_operations(model)
    return {"seconds": seconds, "peak": peak, "useful": useful, "product_rate": operations / alone, "kept": kept}


def main() -> None:
    """Measure all variants, print the ratios, write the result."""
    fetch_smollm2(ROOT / ".cache" / "smollm2")
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for number in range(ROUNDS):
        for variant in VARIANTS:
            command = [sys.executable, __file__, variant]
            run = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            runs[variant].append(run)
            print(f"round {number + 1}, {variant}: {median(run['seconds']):.2f} s a window, {run['peak'] / 1e9:.2f} GB")
    results: dict[str, Any] = {}
    for variant in VARIANTS:
        seconds = median(second for run in runs[variant] for second in run["seconds"][1:])
        rate = median(run["useful"] / median(run["seconds"][1:]) / run["product_rate"] for run in runs[variant])
        results[variant] = {
            "seconds_per_window": seconds,
            "peak_bytes_above_weights": median(run["peak"] for run in runs[variant]),
            "share_of_product_speed": rate,
        }
    papers = results["papers"]
    for variant in VARIANTS[1:]:
        ours = results[variant]
        same = [set(a) & set(b) for a, b in zip(runs[variant][0]["kept"], runs["papers"][0]["kept"], strict=True)]
        ours["time_ratio"] = ours["seconds_per_window"] / papers["seconds_per_window"]
        ours["memory_ratio"] = ours["peak_bytes_above_weights"] / papers["peak_bytes_above_weights"]
        ours["kept_agreement_with_papers"] = min(len(shared) / 1017 for shared in same)
    for runs_of in runs.values():
        for run in runs_of:
            del run["kept"]
    facts = {"model": "SmolLM2-135M-Instruct", "windows": WINDOWS, "positions": POSITIONS, "rounds": ROUNDS}
    document = {**facts, "environment": describe_environment(), "results": results, "runs": runs}
    (ROOT / "benchmarks" / "results" / "scoring.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
