"""Parity with the HFPrune authors' own code on a real model."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune import Budget, allocate, score

EXACT_WIDTH = 1017  # 20% of all parameters of SmolLM2-135M


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Rank correlation of each row."""
    ranks = torch.stack([values.double().argsort(-1).argsort(-1).double() for values in (first, second)])
    centred = ranks - ranks.mean(-1, keepdim=True)
    product: Tensor = (centred[0] * centred[1]).sum(-1) / centred.square().sum(-1).prod(0).sqrt()
    return product


def test_scores_equal_those_of_the_papers_code(smollm2: PreTrainedModel, shared: Path) -> None:
    folder = shared / "golden" / "smollm2-135m"
    golden = load_file(folder / "hfprune_entropy.safetensors")["scores"]
    scores = score(smollm2, load_file(folder / "windows.safetensors")["windows"])
    assert [len(values) for values in scores.values] == [1536] * 30
    assert spearman(torch.stack(scores.values), golden).min() >= 0.9999
    plan = allocate(scores, Budget(ratio=0.2), round_to=1)
    assert plan.widths == [EXACT_WIDTH] * 30
    for kept, values in zip(plan.kept, golden, strict=True):
        theirs = values.topk(EXACT_WIDTH).indices
        assert torch.isin(kept, theirs).double().mean() >= 0.998
