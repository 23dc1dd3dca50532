"""Budgets, widths and plans."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hifiprune import Budget, Plan, Scores, UserError, allocate
from hifiprune.plan import ModelShape

SMOLLM2 = ModelShape(neurons=1536, mlps=30, parameters_per_neuron=3 * 576, total_parameters=134_515_008)
LLAMA2_7B = ModelShape(neurons=11008, mlps=32, parameters_per_neuron=3 * 4096, total_parameters=6_738_415_616)


def make_scores(layers: int = 3, neurons: int = 64) -> Scores:
    chance = torch.Generator().manual_seed(2)
    values = [torch.rand(neurons, generator=chance) for _ in range(layers)]
    names = [f"model.layers.{layer}.mlp" for layer in range(layers)]
    return Scores(values, names, [30] * layers, 3 * neurons * 30 * 2, "hfprune", 1.5, "a" * 64, "b" * 64, {"seed": 0})


def test_widths_of_the_papers() -> None:
    assert SMOLLM2.width_at(Budget(ratio=0.2)) == 1017
    assert SMOLLM2.width_at(Budget(ratio=0.2), 128) == 1024
    width = LLAMA2_7B.width_at(Budget(ratio=0.2))
    assert 1 - width / 11008 == pytest.approx(0.31, abs=0.005)  # 20% of the model is about 31% of its neurons


@given(ratio=st.floats(0.001, 0.58), round_to=st.sampled_from([1, 7, 64, 128, 256]))
def test_the_ratio_reached_is_within_half_a_step(ratio: float, round_to: int) -> None:
    try:
        width = SMOLLM2.width_at(Budget(ratio=ratio), round_to)
    except UserError as error:
        assert "nothing would be removed" in str(error)  # noqa: PT017
        return
    assert width % round_to == 0
    assert 0 < width < 1536
    step = SMOLLM2.ratio_at(0) / 1536 * round_to
    assert abs(SMOLLM2.ratio_at(width) - ratio) <= step / 2 + 1e-12 or width == round_to


def test_neuron_ratios_and_widths() -> None:
    assert SMOLLM2.width_at(Budget(neuron_ratio=0.5), 128) == 768
    assert SMOLLM2.width_at(Budget(width=1000), 128) == 1000
    assert SMOLLM2.width_at(Budget(ratio=0.58), 1024) == 1024  # never zero


def test_the_best_neurons_are_kept_in_order_and_ties_keep_the_lower_index() -> None:
    scores = make_scores()
    plan = allocate(scores, Budget(width=20))
    for kept, values in zip(plan.kept, scores.values, strict=True):
        assert (kept.diff() > 0).all()
        gone = torch.ones(64, dtype=torch.bool).index_fill(0, kept, value=False)
        assert values[kept].min() >= values[gone].max()
    scores.values[0][:] = 1.0
    assert allocate(scores, Budget(width=20)).kept[0].tolist() == list(range(20))
    assert plan.parameters_after == plan.parameters_before - 44 * 30 * 3
    assert plan.ratio_reached == pytest.approx(44 / 64 / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one of --ratio, --neuron-ratio, --width, --max-size; given: none"),
        ({"ratio": 0.2, "width": 5}, "given: ratio, width"),
        ({"ratio": 0.0}, r"ratio 0 must lie in \(0, 1\)"),
        ({"ratio": 1.0}, r"ratio 1 must lie in \(0, 1\)"),
        ({"ratio": 20.0}, r"ratio 20 must lie in \(0, 1\); did you mean 0.2\?"),
        ({"ratio": 1.4}, r"ratio 1.4 must lie in \(0, 1\); did you mean 0.4\?"),
        ({"ratio": float("nan")}, r"ratio nan must lie in \(0, 1\)"),
        ({"neuron_ratio": -0.5}, r"neuron-ratio -0.5 must lie in \(0, 1\)"),
        ({"width": 0}, "width 0 must be at least 1"),
    ],
)
def test_impossible_budgets(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Budget(**arguments)  # type: ignore[arg-type]


def test_budgets_beyond_the_mlps_name_the_largest_possible() -> None:
    with pytest.raises(UserError, match=r"ratio 0\.7 is more than the MLPs hold.*largest possible --ratio is 0.591"):
        SMOLLM2.width_at(Budget(ratio=0.7))
    assert SMOLLM2.width_at(Budget(ratio=0.591)) >= 1
    with pytest.raises(UserError, match=r"neuron-ratio 0\.9999 is more.*--neuron-ratio 0\.9993"):
        SMOLLM2.width_at(Budget(neuron_ratio=0.9999))
    with pytest.raises(UserError, match="width 1536 must be below the model's own width 1536"):
        SMOLLM2.width_at(Budget(width=1536))
    with pytest.raises(UserError, match=r"nothing would be removed.*--round-to 1"):
        SMOLLM2.width_at(Budget(ratio=0.01), 128)
    with pytest.raises(UserError, match="round-to 0 must be at least 1"):
        SMOLLM2.width_at(Budget(ratio=0.2), 0)


def test_scores_and_plans_survive_the_disk_byte_for_byte(tmp_path: Path) -> None:
    scores = make_scores()
    scores.save(tmp_path / "a.safetensors")
    again = Scores.load(tmp_path / "a.safetensors")
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert all(torch.equal(a, b) for a, b in zip(scores.values, again.values, strict=True))
    plan = allocate(again, Budget(ratio=0.2), round_to=1)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").to_json() == plan.to_json()
    assert not list(tmp_path.glob(".*"))


def test_damaged_files_and_scores_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("not scores")
    with pytest.raises(UserError, match="no readable scores file"):
        Scores.load(tmp_path / "x")
    with pytest.raises(UserError, match="is not a readable plan"):
        Plan.load(tmp_path / "x")
    with pytest.raises(UserError, match="does not exist"):
        Scores.load(tmp_path / "missing")
    scores = make_scores()
    scores.values[1][3] = float("nan")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp contain NaN"):
        allocate(scores, Budget(width=3))
    with pytest.raises(UserError, match="ascending order"):
        Plan([torch.tensor([2, 1])], [5], ["mlp"], None, 0.0, 0, 0)
    with pytest.raises(UserError, match="0 to 4"):
        Plan([torch.tensor([1, 5])], [5], ["mlp"], None, 0.0, 0, 0)
