"""The table of widths, against cuts that are repaired by themselves, and its exact budget, against brute force."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

import hifiprune as hp
from hifiprune.io.resume import ResumeFolder
from hifiprune.models.mlp import find_mlps
from hifiprune.plan import top_indices
from hifiprune.pruning import measure_widths as measuring
from hifiprune.pruning.measure_widths import measure_widths
from hifiprune.width_table import WidthTable, cheapest
from tests.commands import run
from tests.families import tiny_model, tiny_tokens
from tests.test_repair import plan_of

WINDOWS = 16
HELD = [7, 15]


def scored(variant: str = "llama") -> tuple[PreTrainedModel, hp.Scores, Tensor]:
    """A model in float64, its scores, and the windows."""
    model, tokens = tiny_model(variant).double(), tiny_tokens(WINDOWS)
    return model, hp.score(model, tokens, "wanda-sp"), tokens


@pytest.mark.parametrize("variant", ["llama", "gemma2", "opt", "phi3"])
def test_a_cost_is_the_divergence_of_that_cut_alone_repaired(variant: str) -> None:
    model, scores, tokens = scored(variant)
    table = measure_widths(model, scores, tokens, choices=4, probes=2)
    dense = tiny_model(variant).double()
    assert table.widths == [[mlp.neurons * part // 4 for part in (1, 2, 3, 4)] for mlp in find_mlps(dense)]
    with torch.no_grad():
        truth = dense(input_ids=tokens[HELD]).logits.log_softmax(-1)
    for block, place in [(0, 0), (1, 2), (2, 1)]:
        narrow = tiny_model(variant).double()
        plan = plan_of(narrow, find_mlps(narrow)[0].neurons)
        plan.kept[block] = top_indices(scores.values[block], table.widths[block][place])
        hp.cut_and_repair_(narrow, plan, tokens, sequential=False)
        with torch.no_grad():
            logits = narrow(input_ids=tokens[HELD]).logits.log_softmax(-1)
        expected = functional.kl_div(logits, truth, log_target=True, reduction="sum") / truth[..., 0].numel()
        assert table.costs[block][place] == pytest.approx(float(expected), rel=1e-6)
    assert [costs[-1] for costs in table.costs] == [0.0] * len(table.costs)


def test_the_model_stays_as_it_was_and_batches_do_not_matter() -> None:
    model, scores, tokens = scored()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    one = measure_widths(model, scores, tokens, choices=3)
    other = measure_widths(model, scores, tokens, choices=3, batch_size=5)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    np.testing.assert_allclose(one.costs, other.costs, rtol=1e-9)


def test_an_interrupted_table_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, scores, tokens = scored()
    whole = measure_widths(model, scores, tokens, choices=3)
    folder, blocks = ResumeFolder(tmp_path / "parts", ["model"]), []
    costs = measuring._costs

    def stop_at_second(chain: object, block: int, *more: object) -> list[float]:
        blocks.append(block)
        if blocks == [0, 1]:
            raise KeyboardInterrupt
        return costs(chain, block, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(measuring, "_costs", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        measure_widths(model, scores, tokens, choices=3, resume_folder=folder)
    assert measure_widths(model, scores, tokens, choices=3, resume_folder=folder) == whole
    assert blocks == [0, 1, 1, 2]


@given(
    costs=st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=5), min_size=1, max_size=5),
    share=st.floats(0, 1),
)
def test_the_budget_is_solved_as_by_brute_force(costs: list[list[float]], share: float) -> None:
    units = round(share * sum(len(values) - 1 for values in costs))
    chosen = cheapest([np.array(values) for values in costs], units)
    assert sum(chosen) == units
    every = product(*(range(len(values)) for values in costs))
    totals = [
        sum(values[count] for values, count in zip(costs, counts, strict=True))
        for counts in every
        if sum(counts) == units
    ]
    reached = sum(values[count] for values, count in zip(costs, chosen, strict=True))
    assert reached == pytest.approx(min(totals), abs=1e-9)


def test_best_widths_of_five_layers_are_those_of_brute_force() -> None:
    chance = np.random.default_rng(0)
    widths = [[16, 32, 48, 64]] * 5
    costs = [[*np.sort(chance.random(3))[::-1].tolist(), 0.0] for _ in widths]
    table = WidthTable(list("abcde"), widths, costs, "fisher", "", "")
    found = table.best_widths(40, round_to=8, floor=0.5)
    choices = range(24 - 8, 65, 8)  # half of 40 in steps of 8 is 16

    def total(chosen: tuple[int, ...]) -> float:
        return sum(
            float(np.interp(width, *pair)) for width, pair in zip(chosen, zip(widths, costs, strict=True), strict=True)
        )

    best = min((chosen for chosen in product(choices, repeat=5) if sum(chosen) == 200), key=total)
    assert sum(found) == 200
    assert total(tuple(found)) == pytest.approx(total(best))


def test_experts_are_refused() -> None:
    model, tokens = tiny_model("mixtral"), tiny_tokens(4)
    with pytest.raises(hp.UserError, match="experts have one width"):
        measure_widths(model, hp.score(model, tokens, "wanda-sp"), tokens)


def test_from_the_table_to_a_pruned_model(world: Path, tmp_path: Path) -> None:
    text = ("--calibration", world / "calibration.txt", "--num-samples", 8, "--seq-len", 16)
    scores, table, out = tmp_path / "s.safetensors", tmp_path / "widths.json", tmp_path / "out"
    assert run("score", world / "dense", "--output", scores, "--criterion", "fisher", *text).code == 0
    made = run("table", world / "dense", "--output", table, "--scores", scores, "--choices", 4, *text)
    assert made.code == 0, made.err
    assert f"--table {table}" in " ".join(made.out.replace("\\\n", " ").split())
    streamed = run(
        "table", world / "dense", "--output", tmp_path / "b.json", "--scores", scores, "--choices", 4, *text, "--stream"
    )
    assert streamed.code == 0, streamed.err
    one, other = (WidthTable.load(path).costs for path in (table, tmp_path / "b.json"))
    np.testing.assert_allclose(one, other, rtol=1e-5)
    words = ("--scores", scores, "--table", table, "--width", 32, "--round-to", 8, "--repair", "none")
    result = run("prune", world / "dense", "--output", out, *words)
    assert result.code == 0, result.err
    plan = hp.Plan.load(out / "hifiprune" / "plan.json")
    assert plan.widths == WidthTable.load(table).best_widths(32, round_to=8, floor=0.75)
    assert len({*plan.widths}) > 1


def test_weight_files_take_at_most_the_size_asked_for(world: Path, tmp_path: Path) -> None:
    words = ("prune", world / "dense", "--criterion", "magnitude", "--round-to", 4)

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))

    dense = size(world / "dense")
    wanted = dense * 9 // 10 // 1000
    result = run(*words, "--output", tmp_path / "out", "--max-size", f"{wanted}KB")
    assert result.code == 0, result.err
    width = hp.Plan.load(tmp_path / "out" / "hifiprune" / "plan.json").widths[0]
    assert size(tmp_path / "out") <= wanted * 1000
    assert run(*words, "--output", tmp_path / "wider", "--width", width + 4).code == 0
    assert size(tmp_path / "wider") > wanted * 1000
    for value, message in [
        (f"{dense}KB", "the dense model's weight files take no more"),
        ("1KB", "is less than is left where every MLP keeps 4 neurons"),
        ("6 GB", "max-size '6 GB' must be a number and a unit"),
    ]:
        refused = run(*words, "--output", tmp_path / "none", "--max-size", value)
        assert refused.code == 2
        assert message in " ".join(refused.err.split())


def test_a_table_that_does_not_fit_is_refused(world: Path, tmp_path: Path) -> None:
    scores, table = tmp_path / "s.safetensors", tmp_path / "widths.json"
    assert run("score", world / "dense", "--output", scores, "--criterion", "magnitude").code == 0
    mlps = hp.Scores.load(scores)
    sizes = [[len(values)] for values in mlps.values]
    words = (
        "prune",
        world / "dense",
        "--output",
        tmp_path / "out",
        "--scores",
        scores,
        "--table",
        table,
        "--width",
        32,
    )
    WidthTable(mlps.names, sizes, [[0.0]] * len(sizes), "fisher", mlps.model_hash, "").save(table)
    result = run(*words)
    assert result.code == 2
    assert "chosen by 'fisher', these scores are by 'magnitude'" in result.err
    WidthTable(mlps.names, sizes, [[0.0]] * len(sizes), "magnitude", "another", "").save(table)
    assert "belongs to another model" in run(*words).err
    table.write_text(table.read_text().replace("0.0", "NaN"))
    assert "was changed since" in run(*words).err
    table.write_text("{}")
    anew = ("prune", world / "dense", "--output", tmp_path / "out", "--table", tmp_path / "none.json", "--width", 32)
    missing = run(*anew, "--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 16)
    assert missing.code == 2
    assert "none.json does not exist; make it with 'hifiprune table'" in " ".join(missing.err.split())
    assert "Scoring" not in missing.err
    assert "holds no widths" in run(*words).err
    assert not (tmp_path / "out").exists()
