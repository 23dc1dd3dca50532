"""Parity with the papers authors' own code on a real model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune import Budget, Scores, allocate
from hifiprune.config import CriterionOptions
from hifiprune.evaluation.ranks import spearman
from hifiprune.scoring.score import score_all

pytestmark = [pytest.mark.exhaustive, pytest.mark.first]  # 8 windows of 1,024 tokens by three criteria take minutes
EXACT_WIDTH = 1017  # 20% of all parameters of SmolLM2-135M
LIGHT_WIDTH = 1497  # after SDMPrune's light cut


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    folder = shared / "golden" / "smollm2-135m"
    names = ("hfprune_entropy", "sdmprune", "windows")
    return {key: tensor for name in names for key, tensor in load_file(folder / f"{name}.safetensors").items()}


@pytest.fixture(scope="module")
def found(smollm2: PreTrainedModel, golden: dict[str, Tensor]) -> dict[str, Scores]:
    """All criteria of the papers in one go."""
    names = ("hfprune", "cross-entropy-weight", "self-distillation")
    options = CriterionOptions(alpha=0.42, temperature=0.5)
    scores = score_all(smollm2, golden["windows"], [(name, options) for name in names])
    return dict(zip(names, scores, strict=True))


def agreement(kept: list[Tensor], golden: list[Tensor], width: int) -> float:
    """Smallest share of the neurons kept, over the layers, that the papers' code would keep too."""
    shares = [torch.isin(k, g.topk(width).indices).double().mean() for k, g in zip(kept, golden, strict=True)]
    return float(torch.stack(shares).min())


def test_entropy_scores_equal_those_of_the_papers_code(found: dict[str, Scores], golden: dict[str, Tensor]) -> None:
    scores = found["hfprune"]
    assert [len(values) for values in scores.values] == [1536] * 30
    assert spearman(torch.stack(scores.values), golden["scores"]).min() >= 0.9999
    plan = allocate(scores, Budget(ratio=0.2), round_to=1)
    assert plan.widths == [EXACT_WIDTH] * 30
    assert agreement(plan.kept, [*golden["scores"]], EXACT_WIDTH) >= 0.998


def test_the_first_stage_of_self_distillation_equals_the_papers_code(
    found: dict[str, Scores], golden: dict[str, Tensor]
) -> None:
    assert spearman(torch.stack(found["cross-entropy-weight"].values), golden["stage1"]).min() >= 0.9999
    cut = [(values < 0).nonzero()[:, 0] for values in found["self-distillation"].values]
    assert [len(removed) for removed in cut] == [1536 - LIGHT_WIDTH] * 30
    assert agreement(cut, [-values for values in golden["stage1"]], 1536 - LIGHT_WIDTH) >= 0.998
    for values, removed, first in zip(found["self-distillation"].values, cut, golden["stage1"], strict=True):
        assert spearman(values[removed], first[removed]) >= 0.999  # what the light cut takes keeps its order


def test_the_second_stage_of_self_distillation_equals_the_papers_code(
    found: dict[str, Scores], golden: dict[str, Tensor]
) -> None:
    theirs = torch.full((30, 1536), -1.0)
    theirs.scatter_(1, golden["stage1"].topk(LIGHT_WIDTH).indices.sort().values, golden["stage2"])
    for ours, other in zip(found["self-distillation"].values, theirs, strict=True):
        both = (ours >= 0) & (other >= 0)
        assert both.sum() >= 0.998 * LIGHT_WIDTH
        assert spearman(ours[both], other[both]) >= 0.9999
    plan = allocate(found["self-distillation"], Budget(ratio=0.2), round_to=1)
    assert agreement(plan.kept, [*theirs], EXACT_WIDTH) >= 0.998
