"""One GPU computes what the CPU does: `make test-gpu`. Skipped where there is none.

`HIFIPRUNE_TEST_DEVICE=cpu` runs these tests on the CPU, to try the tests themselves.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

import hifiprune as hp
from hifiprune.config import CriterionOptions
from hifiprune.engine import products
from hifiprune.engine.offload import stream
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.mlp import find_mlps
from hifiprune.scores import Scores
from hifiprune.scoring.score import score_all
from tests.families import load, tiny_model, tiny_tokens

ROOT = Path(__file__).parent.parent
DEVICE = os.environ.get("HIFIPRUNE_TEST_DEVICE", "cuda")
CRITERIA = ("hfprune", "entropy-square", "cross-entropy", "fisher", "wanda-sp", "self-distillation")
needs_gpu = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def placed(variant: str, dtype: torch.dtype) -> Any:
    """A model on the GPU."""
    model: Any = tiny_model(variant, dtype)
    return model.to(DEVICE)


def scored(model: Any, **how: Any) -> list[Scores]:
    requests = [(name, CriterionOptions()) for name in CRITERIA]
    return score_all(model, tiny_tokens(5, 33), requests, model_hash="known", **how)


@needs_gpu
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", ["llama", "qwen3", "gpt2"])
def test_float32_scores_are_those_of_the_cpu(variant: str, recompute: bool, batch_size: int) -> None:
    expected = scored(tiny_model(variant, torch.float32))
    scores = scored(placed(variant, torch.float32), batch_size=batch_size, recompute=recompute)
    for ours, theirs in zip(scores, expected, strict=True):
        for one, other in zip(ours.values, theirs.values, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


@needs_gpu
@pytest.mark.parametrize("variant", ["llama", "qwen3", "gpt2"])
def test_bfloat16_ranks_neurons_as_float32_does(variant: str) -> None:
    expected = scored(tiny_model(variant, torch.bfloat16).float())
    for ours, theirs in zip(scored(placed(variant, torch.bfloat16)), expected, strict=True):
        correlations = [spearmanr(a, b).statistic for a, b in zip(ours.values, theirs.values, strict=True)]
        assert min(correlations) > 0.9, (ours.criterion, correlations)


@needs_gpu
def test_streamed_scores_and_repairs_equal_resident_ones(make_checkpoint: Callable[..., Path]) -> None:
    path = make_checkpoint(dtype=torch.bfloat16)
    resident = load(path, dtype=torch.bfloat16).eval().to(DEVICE)
    streamed = stream(find_checkpoint(str(path)), torch.bfloat16, DEVICE)
    for ours, theirs in zip(scored(streamed), scored(resident, recompute=True), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.values, theirs.values, strict=True)), ours.criterion


@needs_gpu
def test_a_repaired_model_is_that_of_the_cpu_and_loads_as_saved(tmp_path: Path) -> None:
    windows = tiny_tokens(9, 33)
    here, there = tiny_model("llama", torch.float32), placed("llama", torch.float32)
    plan = hp.allocate(hp.score(here, windows), hp.Budget(neuron_ratio=0.3), round_to=8)
    refits = [hp.cut_and_repair_(model, plan, windows).refits for model in (here, there)]
    assert [refit.damping for refit in refits[0]] == [refit.damping for refit in refits[1]]
    for one, other in zip(find_mlps(there), find_mlps(here), strict=True):
        torch.testing.assert_close(one.output.weight.cpu(), other.output.weight, rtol=1e-3, atol=1e-4)
    there.save_pretrained(tmp_path)
    again = load(tmp_path).eval().to(DEVICE)
    assert torch.equal(again(windows.to(DEVICE)).logits, there(windows.to(DEVICE)).logits)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_of_the_head_are_those_of_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(64, 256, dtype=dtype), torch.randn(256, 384, dtype=torch.bfloat16)
    out = torch.empty(64, 384, device=DEVICE)
    products.multiply(left.to(DEVICE), right.to(DEVICE), out)
    size = left.double().abs() @ right.double().abs()
    assert ((out.cpu() - left.double() @ right.double()).abs() <= 2**-15 * size).all()


@needs_gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU's own count of memory")
def test_recomputing_takes_less_memory_than_keeping_graphs() -> None:
    model: Any = tiny_model("llama", torch.float32, num_hidden_layers=12, intermediate_size=512)
    model.to(DEVICE)
    windows, peaks = tiny_tokens(2, 60), []
    for recompute in (True, False):
        score_all(model, windows, [("hfprune", CriterionOptions())], recompute=recompute, model_hash="known")
        torch.cuda.reset_peak_memory_stats()
        score_all(model, windows, [("hfprune", CriterionOptions())], recompute=recompute, model_hash="known")
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] < 0.8 * peaks[1]


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark without a GPU."""
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)


def test_the_benchmark_says_that_it_needs_a_gpu() -> None:
    ended = bench()
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1].startswith("benchmarks/gpu.py needs an NVIDIA GPU")


@pytest.mark.exhaustive
def test_the_benchmark_measures_all_parts_of_a_small_model() -> None:
    ended = bench("--tiny")
    assert ended.returncode == 0, ended.stderr
    for name in ("hfprune kept, batch 4", "self-distillation by default", "cutting and repairing", "tokens_per_second"):
        assert f'"{name}": ' in ended.stdout
    assert '"error"' not in ended.stdout
