"""Models whose weights stay on the disk compute what models in memory do, to the last bit."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import hifiprune as hp
from hifiprune.config import CriterionOptions
from hifiprune.engine.offload import WeightOffload, stream
from hifiprune.engine.spill import Scratch
from hifiprune.engine.verify import verified_chain
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.mlp import find_blocks
from hifiprune.pruning.repair import changed_tensors
from hifiprune.scoring.early_stopping import Stability
from hifiprune.scoring.score import Request, score_all
from tests.commands import refused, run
from tests.families import FORMS, ROUTED, VARIANTS, load, tiny_tokens

Pair = tuple[Any, Any]


@pytest.fixture
def both(make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pair]:
    """A model in memory, and the same on the disk, whose head is read in many parts; in float32 activations are too."""
    monkeypatch.setattr("hifiprune.engine.lm_head.PART", 50)

    def made(variant: str, dtype: torch.dtype = torch.float32, **options: Any) -> Pair:
        path = make_checkpoint(family=variant, dtype=torch.bfloat16, **options)
        resident = load(path, dtype=dtype).eval()
        scratch = Scratch(tmp_path) if dtype == torch.float32 else None
        return resident, stream(find_checkpoint(str(path)), dtype, scratch=scratch)

    return made


@pytest.mark.by_layout
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_scores_equal_resident_ones(
    variant: str, dtype: torch.dtype, both: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    resident, streamed = both(variant, dtype)
    windows, requests = (
        tiny_tokens(5, 9),
        [(name, CriterionOptions()) for name in ("hfprune", "fisher", "flap", "magnitude")],
    )
    asked: list[Request] = list(requests)
    theirs = score_all(resident, windows, asked, recompute=True)
    monkeypatch.setattr("hifiprune.scoring.score.group_of", lambda *_, **__: 2)  # of five
    if dtype == torch.bfloat16:
        monkeypatch.setattr(WeightOffload, "head_room", 0)  # so that the head is read for every slice
    ours = score_all(streamed, windows, asked, model_hash="known")
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.values, other.values, strict=True)), one.criterion
        assert one.objective == other.objective
        assert one.total_parameters == other.total_parameters
        assert one.parameters_per_neuron == other.parameters_per_neuron
    assert all(parameter.device.type == "meta" for parameter in find_blocks(streamed).parameters())


@pytest.mark.parametrize("variant", FORMS + ROUTED)
def test_streamed_states_equal_resident_ones(variant: str, both: Callable[..., Pair]) -> None:
    resident, streamed = both(variant)
    tokens = tiny_tokens(2, 9)
    ours, theirs = (verified_chain(model) for model in (streamed, resident))
    final = ours.final_hidden(tokens)
    assert torch.equal(final, theirs.final_hidden(tokens))
    assert torch.equal(ours.head.logits(final[0]), theirs.head.logits(final[0]))


@pytest.mark.parametrize("variant", ["llama", "gemma2", "qwen2", "phi3", "gpt2"])
def test_both_stages_of_self_distillation_stream(variant: str, both: Callable[..., Pair]) -> None:
    asked: list[Request] = [("self-distillation", CriterionOptions(light_cut=0.2))]
    (theirs,), (ours,) = (
        score_all(model, tiny_tokens(4, 9), asked, recompute=True, model_hash="known") for model in both(variant)
    )
    assert all(torch.equal(one, other) for one, other in zip(ours.values, theirs.values, strict=True))


@pytest.mark.parametrize("variant", FORMS + ROUTED)
def test_streamed_repair_equals_resident_repair(variant: str, both: Callable[..., Pair]) -> None:
    resident, streamed = both(variant)
    windows = tiny_tokens(6, 24)
    plan = hp.allocate(
        score_all(resident, windows, [("hfprune", CriterionOptions())])[0], hp.Budget(width=20), round_to=1
    )
    theirs = hp.cut_and_repair_(resident, plan, windows)
    ours = hp.cut_and_repair_(streamed, plan, windows)
    assert ours == theirs
    projections = changed_tensors(resident, None)
    assert changed_tensors(streamed, None).keys() == projections.keys()
    for name, values in changed_tensors(streamed, None).items():
        assert torch.equal(values(), projections[name]().to(torch.bfloat16))


@pytest.mark.parametrize("more", [[], ["--repair", "none"], ["--criterion", "fisher", "--allocation", "global"]])
def test_commands_stream_to_the_same_files(world: Path, tmp_path: Path, more: list[str]) -> None:
    text = ("--calibration", world / "calibration.txt", "--num-samples", 6, "--seq-len", 24)
    for how in ("--stream", "--in-memory"):
        spilled = ("--scratch", tmp_path) if how == "--stream" and more else ()
        pruned = tmp_path / how
        words = (
            "prune",
            world / "dense",
            "--output",
            pruned,
            "--width",
            24,
            *text,
            "--recompute",
            *more,
            how,
            *spilled,
        )
        result = run(*words)
        assert result.code == 0, result.err
        measured = ("--against", world / "dense", "--text", world / "held.txt", "--seq-len", 24, how)
        result = run("evaluate", pruned, *measured, "--json")
        assert result.code == 0, result.err
        (tmp_path / how / "metrics").write_text(json.dumps([*result.json["results"]["models"].values()]))
    for name in ("model.safetensors", "hifiprune/plan.json", "hifiprune/scores.safetensors", "metrics", "config.json"):
        assert (tmp_path / "--stream" / name).read_bytes() == (tmp_path / "--in-memory" / name).read_bytes(), name


def test_models_that_do_not_fit_are_streamed_unasked(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hifiprune.commands.prepare.free_bytes", lambda _: 90_000)
    words = ("score", world / "dense", "--calibration", world / "calibration.txt", "--num-samples", 3, "--seq-len", 24)
    told = "each block's are read from the disk when it runs (--stream)"
    result = run(*words, "--output", tmp_path / "one")
    assert result.code == 0, result.err
    assert told in result.err
    asked = run(*words, "--output", tmp_path / "two", "--in-memory")
    assert asked.code == 0, asked.err
    assert told not in asked.err


def test_a_file_that_shrinks_meanwhile_is_told(both: Callable[..., Pair]) -> None:
    _, streamed = both("llama")
    chain = verified_chain(streamed)
    assert chain.shelf
    path = chain.shelf.head.path
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(hp.RunError, match=r"model.safetensors ends too early: it was changed since the run began"):
        chain.final_hidden(tiny_tokens(1, 9))


@pytest.mark.parametrize("variant", ["llama", "olmo2", "smollm3"])
def test_a_padding_token_far_down_the_vocabulary_is_no_trouble(variant: str, both: Callable[..., Pair]) -> None:
    resident, streamed = both(variant, pad_token_id=200)
    tokens = tiny_tokens(2, 9)
    assert torch.equal(verified_chain(streamed).final_hidden(tokens), verified_chain(resident).final_hidden(tokens))
    assert streamed.get_input_embeddings().padding_idx == resident.get_input_embeddings().padding_idx


def test_two_blocks_at_most_are_in_memory(both: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    _, streamed = both("llama", num_hidden_layers=5)
    seen, read = [], WeightOffload._read

    def counted(shelf: WeightOffload, block: Any, index: int) -> Any:
        seen.append(sum(any(p.device.type != "meta" for p in each.parameters()) for each in streamed.model.layers))
        return read(shelf, block, index)

    monkeypatch.setattr(WeightOffload, "_read", counted)
    score_all(streamed, tiny_tokens(3, 9), [("fisher", CriterionOptions())], model_hash="known")
    assert len(seen) >= 2 * 5
    assert max(seen) <= 1, "beside the one that is read"


def test_streamed_scoring_stops_where_resident_scoring_does(both: Callable[..., Pair]) -> None:
    windows, found = tiny_tokens(30, 9), []
    for model in both("llama"):
        stability = Stability(0.9, partial(hp.allocate, budget=hp.Budget(width=20), round_to=1))
        asked: list[Request] = [("hfprune", CriterionOptions())]
        found.append(score_all(model, windows, asked, stability=stability, recompute=True, model_hash="known")[0])
    assert found[0].settings == found[1].settings
    assert all(torch.equal(one, other) for one, other in zip(found[0].values, found[1].values, strict=True))


def test_what_cannot_be_streamed_is_refused(world: Path, tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    text = ("--calibration", world / "calibration.txt", "--num-samples", 3, "--seq-len", 24)
    words = ("prune", world / "dense", "--output", tmp_path / "out", "--width", 24, "--stream")
    refused(run(*words, "--calibration", "self", *text[2:]), "sampled from the model with weights in memory only")
    biased = make_checkpoint(mlp_bias=True)
    bias = ("prune", biased, "--output", tmp_path / "out", "--width", 24, "--criterion", "flap", "--bias-compensation")
    refused(run(*bias, *text, "--stream"), "biases are compensated with weights in memory only")
    tasks = ("evaluate", world / "dense", "--tasks", "piqa", "--stream")
    refused(run(*tasks), "zero-shot tasks are asked with weights in memory only")
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive  # a real vocabulary is read
def test_a_gguf_file_cannot_be_streamed(world: Path, tmp_path: Path, smollm2_gguf: Path) -> None:
    words = ("--calibration", world / "calibration.txt", "--num-samples", 3, "--seq-len", 24, "--stream")
    refused(run("score", smollm2_gguf, "--output", tmp_path / "out", *words), "does not store its tensors")
    assert not (tmp_path / "out").exists()
