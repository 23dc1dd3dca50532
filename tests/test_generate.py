"""`generate`: continuations of a prompt by one model or two, and where they part."""

import json
from pathlib import Path

import pytest
import torch

from hifiprune.models.find_checkpoint import find_checkpoint
from tests.commands import refused, run
from tests.conftest import byte_tokenizer, save_checkpoint

PROMPT, NEW = "tree", 12


def greedy(folder: Path, prompt: str) -> list[int]:
    """The likeliest token, and so on, one forward pass for each."""
    model, ids = find_checkpoint(str(folder)).load(torch.float32), [*byte_tokenizer()(prompt)["input_ids"]]
    made: list[int] = []
    while len(made) < NEW and (not made or made[-1] != 2):
        with torch.no_grad():
            made.append(int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax()))
    return made


@pytest.fixture
def other(tmp_path: Path, world: Path) -> Path:
    how = ("--width", 16, "--round-to", 1, "--criterion", "magnitude")
    assert run("prune", world / "dense", "--output", tmp_path / "cut", *how).code == 0
    return tmp_path / "cut"


def test_both_continue_as_their_likeliest_tokens_and_part_where_these_differ(world: Path, other: Path) -> None:
    words = ("generate", other, "--against", world / "dense", "--prompt", PROMPT, "--max-new-tokens", NEW)
    result = run(*words, "--json")
    assert result.code == 0, result.err
    ours, theirs = greedy(other, PROMPT), greedy(world / "dense", PROMPT)
    assert [found["ids"] for found in result.json["continuations"]] == [ours, theirs]
    same = next(number for number, (one, two) in enumerate(zip(ours, theirs, strict=False)) if one != two)
    assert result.json["same_tokens"] == same
    told = run(*words).out
    assert f"The first {same} tokens are the same; then" in told
    assert str(other) in told


def test_a_model_continues_like_itself(world: Path) -> None:
    words = ("generate", world / "dense", "--against", world / "dense", "--prompt", PROMPT, "--max-new-tokens", 5)
    assert "The same 5 tokens." in run(*words).out
    assert run(*words[:2], *words[4:], "--json").json["same_tokens"] is None


def test_a_seed_repeats_what_is_sampled(world: Path) -> None:
    words = ("generate", world / "dense", "--prompt", PROMPT, "--temperature", 3, "--max-new-tokens", NEW, "--json")
    one, again, another = (run(*words, "--seed", seed).json["continuations"] for seed in (5, 5, 6))
    assert one == again
    assert one != another


def test_a_chat_template_writes_the_prompt_where_there_is_one(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "chat")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    turns = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    words = ("generate", folder, "--prompt", "hi", "--max-new-tokens", 2, "--json")
    found = run(*words).json
    assert (found["prompt"], found["chat"]) == ("<user>hi<assistant>", True)
    plain = run(*words, "--plain").json
    assert (plain["prompt"], plain["chat"]) == ("hi", False)


def test_what_cannot_be_continued_is_told(world: Path, tmp_path: Path) -> None:
    words = ("generate", world / "dense", "--prompt")
    refused(run(*words, " "), "the prompt is empty")
    refused(
        run(*words, "tree", "--max-new-tokens", 61), "4 tokens and --max-new-tokens 61 are more than the 64 positions"
    )
    small = save_checkpoint(tmp_path / "small", vocab_size=61)
    refused(
        run(*words, "~~~~", "--max-new-tokens", 2, "--against", small),
        "has a vocabulary of 61, and the prompt has token",
    )
    refused(run(*words, "tree", "--against", tmp_path / "none"), "there is no model folder")
