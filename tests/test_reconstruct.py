"""Training of cut blocks toward the dense stream, against autograd on plain transformers in float64."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hifiprune as hp
from hifiprune.engine.block_chain import BlockChain
from hifiprune.engine.context import frozen
from hifiprune.engine.spill import spill
from hifiprune.engine.verify import verified_chain
from hifiprune.io.resume import ResumeFolder
from hifiprune.models.mlp import find_blocks, find_mlps
from hifiprune.pruning import reconstruct
from hifiprune.pruning.reconstruct import Example, Training, reconstruct_
from hifiprune.pruning.repair import cut_and_repair_
from tests.commands import run
from tests.families import tiny_model, tiny_tokens
from tests.test_experts import stack
from tests.test_repair import plan_of

WINDOWS = 16
LAYER = 1


@pytest.fixture
def chain() -> Iterator[BlockChain]:
    model = tiny_model("llama").double()
    with frozen(model):
        yield verified_chain(model)


def examples_of(chain: BlockChain, tokens: Tensor, size: int = 1) -> list[Example]:
    """Inputs of a block, and its outputs times a little more than one."""
    made = []
    for batch, numbers in zip(tokens.split(size), torch.arange(len(tokens)).split(size), strict=True):
        hidden, calls = chain.embed(batch)
        with torch.no_grad():
            target = 1.1 * chain.run_block(LAYER, hidden, calls[LAYER])
        held = numbers % 4 == 3
        made.append(Example(spill(None, hidden), spill(None, target), calls[LAYER], held))
    return made


@pytest.mark.parametrize("size", [1, 3])
def test_the_gradient_is_that_of_the_mean_relative_error(chain: BlockChain, size: int) -> None:
    tokens = tiny_tokens(6)
    examples = examples_of(chain, tokens, size)
    weight = chain.mlps[LAYER].inputs[0].weight.requires_grad_()
    run = partial(chain.run_block, LAYER)
    reconstruct._backward(chain, run, examples, torch.float64)
    found, weight.grad = weight.grad, None
    hidden, calls = chain.embed(tokens)
    with torch.enable_grad():
        output = chain.run_block(LAYER, hidden, calls[LAYER])
        target = 1.1 * output.detach()
        errors = (output - target).pow(2).sum(-1) / target.pow(2).sum(-1)
        fitted = torch.arange(6) % 4 != 3
        errors[fitted].mean().backward()
    assert found is not None
    torch.testing.assert_close(found, weight.grad)
    held = reconstruct.held_out_error(chain, run, examples, torch.float64)
    assert held == pytest.approx(errors[~fitted].mean().item(), rel=1e-9)
    assert held == pytest.approx((0.1 / 1.1) ** 2, rel=1e-9)


@pytest.mark.parametrize(
    ("variant", "behind"),
    [("llama", True), ("phi3", True), ("qwen3", True), ("gemma2", False), ("cohere", False), ("falcon", False)],
)
def test_what_follows_attention_is_run_alone_where_it_is_all(variant: str, behind: bool) -> None:
    model, tokens = tiny_model(variant).double(), tiny_tokens(6)
    with frozen(model):
        chain = verified_chain(model)
        examples = examples_of(chain, tokens)
        tail = reconstruct.find_tail(chain, LAYER, examples[0])
        assert (tail is not None) == behind
        if tail:
            whole = reconstruct.held_out_error(chain, partial(chain.run_block, LAYER), examples, torch.float64)
            after = tail.examples(chain, LAYER, examples)
            assert reconstruct.held_out_error(chain, tail, after, torch.float64) == pytest.approx(whole, rel=1e-12)
            assert not torch.equal(after[0].input(), examples[0].input())


def test_what_can_be_reconstructed_is() -> None:
    model = tiny_model("llama").double()
    tokens = tiny_tokens(WINDOWS)
    with frozen(model):
        chain = verified_chain(model)
        hidden, calls = chain.embed(tokens)
        with torch.no_grad():
            target = chain.run_block(LAYER, hidden, calls[LAYER])
            weight = chain.mlps[LAYER].inputs[1].weight
            weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        held = torch.arange(WINDOWS) % 8 == 7
        example = Example(lambda: hidden, lambda: target, calls[LAYER], held)
        result = reconstruct_(chain, LAYER, [example], Training(steps=800, learning_rate=1e-2))
    assert result.before > 1e-6
    assert result.error < 3e-3 * result.before
    assert result.step > 0


@pytest.mark.parametrize("variant", ["llama", "gemma2", "opt", "phi3"])
def test_held_out_windows_are_never_worse_and_the_rest_of_the_model_stays(variant: str) -> None:
    model, tokens = tiny_model(variant), tiny_tokens(48)
    plan = plan_of(model, 24)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    repair = cut_and_repair_(model, plan, tokens, training=Training(steps=40, learning_rate=3e-3, tokens=192))
    assert len(repair.reconstructions) == len(find_blocks(model))
    assert all(block.error <= block.before for block in repair.reconstructions)
    assert any(block.step and block.error < block.before for block in repair.reconstructions)
    inside = [id(p) for mlp in find_mlps(model) for each in mlp.projections for p in each.parameters().values()]
    for name, values in model.named_parameters():
        if id(values) not in inside and values.ndim > 1:
            assert torch.equal(values, before[name]), name


def test_training_that_does_not_help_changes_nothing() -> None:
    plain, trained = tiny_model("llama"), tiny_model("llama")
    plan, tokens = plan_of(plain, 32), tiny_tokens(WINDOWS)
    cut_and_repair_(plain, plan, tokens)
    repair = cut_and_repair_(trained, plan, tokens, training=Training(steps=4, learning_rate=1e3))
    assert [block.step for block in repair.reconstructions] == [0] * len(find_blocks(plain))
    for one, other in zip(plain.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the block of every step."""
    steps, train, backward, block = [], reconstruct_, reconstruct._backward, [0]

    def begin(chain: BlockChain, index: int, *more: Any) -> Any:
        block[0] = index
        return train(chain, index, *more)

    def count(*arguments: Any) -> None:
        steps.append(block[0])
        backward(*arguments)

    monkeypatch.setattr("hifiprune.pruning.repair.reconstruct_", begin)
    monkeypatch.setattr(reconstruct, "_backward", count)
    return steps


def test_training_ends_where_the_held_out_error_falls_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = tiny_model("llama"), counted(monkeypatch)
    cut_and_repair_(model, plan_of(model, 32), tiny_tokens(WINDOWS), training=Training(steps=120, learning_rate=1e3))
    looks = 120 // reconstruct.LOOKS
    assert [steps.count(block) for block in range(3)] == [reconstruct.PATIENCE * looks] * 3


def test_minutes_are_shared_by_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps, clock = tiny_model("llama"), counted(monkeypatch), [0.0]

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    for module in ("reconstruct", "repair"):
        monkeypatch.setattr(f"hifiprune.pruning.{module}.monotonic", tick)
    training = Training(steps=1000, learning_rate=1e-4, minutes=1.0)
    repair = cut_and_repair_(model, plan_of(model, 32), tiny_tokens(WINDOWS), training=training)
    taken = [steps.count(block) for block in range(3)]
    assert 50 <= sum(taken) <= 60  # a step takes a second here
    assert max(taken) - min(taken) <= 2
    assert all(block.error <= block.before for block in repair.reconstructions)


def test_a_cut_of_nothing_changes_nothing() -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    width = find_mlps(model)[0].neurons
    cut_and_repair_(model, plan_of(model, width), tiny_tokens(8), training=Training(steps=6))
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


class Interrupted(Exception):
    """In place of a signal."""


def test_a_resumed_repair_is_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, training = tiny_tokens(WINDOWS), Training(steps=12, learning_rate=3e-3, tokens=96)
    made: list[PreTrainedModel] = []
    blocks: list[int] = []

    def stop_at_second(chain: BlockChain, index: int, *more: object) -> object:
        blocks.append(index)
        if index == 1 and len(blocks) == 2:
            raise Interrupted
        return reconstruct_(chain, index, *more)  # type: ignore[arg-type]

    for number, folder in enumerate([None, tmp_path / "parts", tmp_path / "parts"]):
        model = tiny_model("llama")
        parts = ResumeFolder(folder, ["model"]) if folder else None
        if number:
            monkeypatch.setattr("hifiprune.pruning.repair.reconstruct_", stop_at_second)
        try:
            cut_and_repair_(model, plan_of(model, 32), tokens, training=training, resume_folder=parts)
        except Interrupted:
            assert number == 1
            continue
        made.append(model)
    assert blocks == [0, 1, 1, 2]  # the first block was not trained again
    whole, resumed = made
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def pruned(dense: Path, output: Path, world: Path, *words: object) -> dict[str, Any]:
    """Prune with training, and return the record."""
    text = ("--calibration", world / "calibration.txt", "--num-samples", 8, "--seq-len", 16)
    words = (*words, "--repair", "local", "--repair-steps", 6)
    result = run("prune", dense, "--output", output, "--width", 24, *text, *words)
    assert result.code == 0, result.err
    assert "blocks better by training" in result.out
    record: dict[str, Any] = json.loads((output / "run.json").read_text())
    return record


def test_the_command_writes_what_is_trained_in_memory(world: Path, tmp_path: Path) -> None:
    record = pruned(world / "dense", tmp_path / "out", world, "--stream")
    model = AutoModelForCausalLM.from_pretrained(world / "dense", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world / "dense")
    windows = hp.load_windows(hp.Calibration(str(world / "calibration.txt"), 8, 16), tokenizer)
    plan = hp.Plan.load(tmp_path / "out" / "hifiprune" / "plan.json")
    repair = cut_and_repair_(model, plan, windows, training=Training(steps=6))
    assert [asdict(block) for block in repair.reconstructions] == record["results"]["reconstruction"]
    assert any(block.step for block in repair.reconstructions)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for (name, one), other in zip(model.named_parameters(), written.parameters(), strict=True):
        assert torch.equal(one, other), name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "every block trained on 8 windows of 16 tokens" in " ".join(card.split())


@pytest.mark.parametrize("stacked", [False, True])
def test_trained_experts_are_written_in_either_form(
    make_checkpoint: Callable[..., Path], world: Path, tmp_path: Path, stacked: bool
) -> None:
    dense = make_checkpoint("moe", "qwen2_moe")
    if stacked:
        stack(dense)
    record = pruned(dense, tmp_path / "out", world, *["--stream"] * stacked)
    assert any(block["step"] for block in record["results"]["reconstruction"])
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    windows = hp.load_windows(
        hp.Calibration(str(world / "calibration.txt"), 8, 16), AutoTokenizer.from_pretrained(dense)
    )
    plan = hp.Plan.load(tmp_path / "out" / "hifiprune" / "plan.json")
    cut_and_repair_(model, plan, windows, training=Training(steps=6))
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for (name, one), other in zip(model.named_parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_steps_without_training_are_told(world: Path, tmp_path: Path) -> None:
    words = ("--width", 24, "--criterion", "magnitude", "--repair-steps", 5)
    result = run("prune", world / "dense", "--output", tmp_path / "out", *words)
    assert "Unused with --repair none: repair-steps." in result.err
