"""Model cards and what goes to the hub: read again by the hub's own library."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError

from hifiprune.cards import UNMEASURED
from tests.commands import refused, run

BASE = """---
license: apache-2.0
language: [en, fr]
pipeline_tag: text-generation
tags: [conversational]
---
# Words of the base
"""
SMALL = ("--num-samples", 4, "--seq-len", 24)


@pytest.fixture
def pruned(world: Path, make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that was pruned from one with a card."""
    dense = make_checkpoint()
    (dense / "README.md").write_text(BASE)
    text = world / "calibration.txt"
    result = run("prune", dense, "--output", tmp_path / "small", "--width", 24, "--calibration", text, *SMALL)
    assert result.code == 0, result.err
    return tmp_path / "small"


def test_a_card_carries_the_licence_over_and_says_how_the_model_was_made(pruned: Path) -> None:
    card = ModelCard.load(pruned / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en", "fr"]
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"hifiprune", "pruned"} <= set(card.data.tags)
    results = json.loads((pruned / "run.json").read_text())["results"]
    for part in (
        f"{results['parameters']['before']:,} parameters became {results['parameters']['after']:,}",
        "MLPs of width 40 ones of 24",
        "scored by `entropy-square`",
        "4 windows of 24 tokens",
        "refitted in closed form",
        "guarantees nothing about the predictions themselves",
        UNMEASURED,
    ):
        assert part in card.text
    assert str(pruned.parent) not in card.content, "no path of the user's machine"
    assert "Words of the base" not in card.text


def test_what_is_measured_goes_into_the_card_and_the_hubs_index(pruned: Path, world: Path) -> None:
    text, dense = world / "held.txt", pruned.parent / "dense"
    for windows in (3, 5):  # the second replaces the first
        words = ("--against", dense, "--text", text, "--seq-len", 24, "--max-windows", windows, "--card", "--json")
        result = run("evaluate", pruned, *words)
        assert result.code == 0, result.err
    (row,) = result.json["results"]["models"].values()
    card = ModelCard.load(pruned / "README.md")
    found = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert found == {name: pytest.approx(estimate["value"]) for name, estimate in row["metrics"].items()}
    assert {each.dataset_name for each in card.data.eval_results} == {"held.txt"}
    assert card.data.model_name == "small"
    assert UNMEASURED not in card.text
    assert "On 5 windows of 24 tokens of held.txt" in card.text
    assert "On 3 windows" not in card.text
    assert card.text.count("KL divergence, nats") == 1
    refused(run("evaluate", dense, "--text", text, "--seq-len", 24, "--card"), "that hifiprune made; leave out --card")


def test_a_trained_checkpoint_tells_of_both_runs(pruned: Path, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": "ab cd abc " * 5 + "e" * n}) + "\n" for n in range(30))
    (tmp_path / "rows.jsonl").write_text(rows)
    words = ("--data", tmp_path / "rows.jsonl", "--max-steps", 2, "--seq-len", 32, "--gradient-accumulation", 1)
    result = run("recover", pruned, "--output", tmp_path / "better", *words)
    assert result.code == 0, result.err
    card = ModelCard.load(tmp_path / "better" / "README.md")
    assert card.data.license == "apache-2.0"
    assert "MLPs of width 40 ones of 24" in card.text
    assert "then trained: low-rank changes of rank 32 on the dense model's predictions" in card.text


def test_mixed_widths_say_how_they_are_loaded(world: Path, tmp_path: Path) -> None:
    words = ("--neuron-ratio", 0.4, "--round-to", 1, "--criterion", "magnitude", "--allocation", "global")
    assert run("prune", world / "dense", "--output", tmp_path / "mixed", *words).code == 0
    card = ModelCard.load(tmp_path / "mixed" / "README.md")
    assert "trust_remote_code=True" in card.text
    assert "custom_code" in card.data.tags
    assert card.data.license is None


def test_push_shows_what_would_go_and_uploads_when_told(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **how: done.append((name, how)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **how: done.append(("folder", how)))
    shown = run("push", pruned, "someone/small", "--json")
    assert shown.code == 0, shown.err
    assert done == []
    assert set(shown.json["files"]) == {str(path.relative_to(pruned)) for path in pruned.rglob("*") if path.is_file()}
    assert shown.json["files"]["model.safetensors"] == (pruned / "model.safetensors").stat().st_size
    assert any("nothing was measured" in remark for remark in shown.json["remarks"])
    table = run("push", pruned, "someone/small")
    assert "dry run" in table.out
    assert "someone/small --upload" in table.out
    assert run("push", pruned, "someone/small", "--upload", "--private").code == 0
    assert done[0] == ("someone/small", {"private": True, "exist_ok": True})
    assert done[1][1]["folder_path"] == pruned
    assert done[1][1]["repo_id"] == "someone/small"

    def unknown(self: HfApi, name: str, **how: Any) -> None:
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(HfApi, "create_repo", unknown)
    refused(run("push", pruned, "someone/small", "--upload"), "there is no login for the hub: run hf auth login")
    refused(run("push", pruned, "some one/small"), "is no name of a repository")
    (pruned / "model.safetensors").unlink()
    refused(run("push", pruned, "someone/small"), "lacks model.safetensors; push a whole checkpoint")
