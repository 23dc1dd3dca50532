"""Model cards and what goes to the hub: read again by the hub's own library."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from functools import partialmethod
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from rich.console import Console

from hifiprune.errors import UserError
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.progress import logger, shown
from hifiprune.reports.card_metadata import base_metadata
from hifiprune.reports.model_card import UNMEASURED, add_results, check_cards, describe_base, write_card
from hifiprune.results import Accuracy, Estimate, EvaluateResults, Measured
from tests.commands import refused, run

BASE = """---
license: apache-2.0
language: [en, fr]
pipeline_tag: text-generation
tags: [conversational]
---
# Words of the base
"""
Make = Callable[..., Path]
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
        "MLP width 40 became 24",
        "scored by `entropy-square`",
        "4 windows of 24 tokens",
        "output projections refitted on",
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
    own = {name: estimate["value"] for name, estimate in row["metrics"].items() if name != "dense_perplexity"}
    assert found == {name: pytest.approx(value) for name, value in own.items()}
    assert {each.dataset_name for each in card.data.eval_results} == {"held.txt, 5 windows of 24 tokens"}
    assert card.data.model_name == "small"
    assert UNMEASURED not in card.text
    assert "On 5 windows of 24 tokens of held.txt" in card.text
    assert "On 3 windows" not in card.text
    assert card.text.count("KL divergence, nats") == 1
    (row,) = (line for line in card.text.splitlines() if line.startswith("| KL divergence"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 4, "three cells, whatever stands in them"
    refused(run("evaluate", dense, "--text", text, "--seq-len", 24, "--card"), "that hifiprune made; leave out --card")


def test_what_was_measured_before_in_another_way_stays(pruned: Path) -> None:
    estimate, accuracy = Estimate(0.5, 0.4, 0.6), Accuracy(0.5, 0.4, 0.6, 0.05)
    on_text = EvaluateResults({"small": Measured(9, {"kl": estimate})}, windows=5, positions=24)
    answers = Measured(9, None, {"piqa/acc_norm": accuracy}, accuracy, {"piqa/acc_norm": estimate})
    by_tasks = EvaluateResults({"small": answers}, reference="x/dense", items={"piqa": (20, 1838)})
    add_results(pruned, "small", on_text, "a/held.txt")
    add_results(pruned, "small", by_tasks, None)
    add_results(pruned, "small", by_tasks, None)
    card = ModelCard.load(pruned / "README.md")
    names = [each.dataset_name for each in card.data.eval_results]
    assert names == ["held.txt, 5 windows of 24 tokens", "piqa, zero-shot, 20 of 1,838 items"]
    assert card.text.count("On 5 windows of 24 tokens of held.txt") == 1
    assert card.text.count("| piqa/acc_norm | 20 of 1,838 | 0.500 ± 0.050 | +0.500 (+0.400 to +0.600) |") == 1
    assert "the difference to `dense`" in card.text
    assert "How to use it" in card.text
    assert card.text.index("On 5 windows") < card.text.index("piqa") < card.text.index("## Limits")


def test_a_card_tells_which_text_served_what(pruned: Path, world: Path, tmp_path: Path) -> None:
    scores = pruned / "hifiprune" / "scores.safetensors"
    words = ("prune", pruned.parent / "dense", "--width", 24, "--scores", scores)
    assert run(*words, "--output", tmp_path / "cut").code == 0
    text = ("--calibration", world / "calibration.txt", "--num-samples", 3, "--seq-len", 20)
    assert run(*words, "--output", tmp_path / "mended", *text).code == 0
    scored = "scored by `entropy-square` on 4 windows of 24 tokens"
    for name, projections in (
        ("cut", "no repair"),
        ("mended", "output projections refitted on 3 windows of 20 tokens"),
    ):
        card = ModelCard.load(tmp_path / name / "README.md")
        assert scored in card.text
        assert projections in card.text


def test_cards_of_the_hub_are_not_changed(pruned: Path) -> None:
    with pytest.raises(UserError, match="a/b is on the hub: --card changes the cards of folders on this disk"):
        check_cards([Checkpoint("a/b", pruned, on_hub=True)])


def test_a_trained_checkpoint_tells_of_both_runs(pruned: Path, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": "ab cd abc " * 5 + "e" * n}) + "\n" for n in range(30))
    (tmp_path / "rows.jsonl").write_text(rows)
    words = (
        "--data",
        tmp_path / "rows.jsonl",
        "--max-steps",
        2,
        "--seq-len",
        32,
        "--gradient-accumulation-steps",
        1,
        "--lora-r",
        4,
    )
    result = run("recover", pruned, "--output", tmp_path / "better", *words)
    assert result.code == 0, result.err
    card = ModelCard.load(tmp_path / "better" / "README.md")
    assert card.data.license == "apache-2.0"
    assert "`dense` with 12.3% of its parameters pruned" in card.text, "it is the dense model that lost them"
    assert "`small`" not in card.text
    assert "MLP width 40 became 24" in card.text
    trained = "- then trained: low-rank changes of rank 4 on the dense model's predictions, 2 steps, "
    assert trained + "the best state that of step 2; perplexity of held-out rows" in card.text
    words = (
        "--data",
        tmp_path / "rows.jsonl",
        "--max-steps",
        1,
        "--seq-len",
        32,
        "--gradient-accumulation-steps",
        1,
        "--lora-r",
        4,
    )
    labels = ("--distill-weight", 0, "--learning-rate", 1e-9)
    assert run("recover", tmp_path / "better", "--output", tmp_path / "best", *words, *labels).code == 0
    card = ModelCard.load(tmp_path / "best" / "README.md")
    assert trained in card.text, "the earlier training is told too"
    assert "`dense` with 12.3% of its parameters pruned" in card.text
    looks = json.loads((tmp_path / "best" / "run.json").read_text())["results"]["held_out_losses"]
    best = "none of which was better than the start" if looks[1][1] >= looks[0][1] else "the best state that of step 1"
    assert f"- then trained: low-rank changes of rank 4 on labels, 1 steps, {best}" in card.text


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
    monkeypatch.setattr(HfApi, "upload_file", lambda self, **how: done.append(("file", how)))
    shown = run("push", pruned, "someone/small", "--json")
    assert shown.code == 0, shown.err
    assert done == []
    files = {str(path.relative_to(pruned)) for path in pruned.rglob("*") if path.is_file()}
    assert set(shown.json["files"]) == files - {".hifiprune.json"}
    assert shown.json["files"]["model.safetensors"] == (pruned / "model.safetensors").stat().st_size
    assert any("nothing was measured" in remark for remark in shown.json["remarks"])
    table = run("push", pruned, "someone/small")
    assert "dry run" in table.out
    assert "someone/small --upload" in table.out
    assert run("push", pruned, "someone/small", "--upload", "--private").code == 0
    assert done[0] == ("someone/small", {"private": True, "exist_ok": True})
    assert done[1][1]["folder_path"] == pruned
    assert done[1][1]["repo_id"] == "someone/small"
    assert done[1][1]["ignore_patterns"] == ["README.md"]
    assert done[2][1]["repo_id"] == "someone/small"
    uploaded = ModelCard(done[2][1]["path_or_fileobj"].decode())
    assert uploaded.text.count('from_pretrained("someone/small")') == 2
    assert 'from_pretrained("small"' not in uploaded.text
    assert (pruned / "README.md").read_text().count('from_pretrained("small")') == 2

    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    refused(run("push", pruned, "someone/small", "--upload"), "there is no login for the hub: run hf auth login")
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: "hf_none")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(HfApi, "__init__", partialmethod(HfApi.__init__, endpoint="http://127.0.0.1:9"))
    refused(run("push", pruned, "someone/small", "--upload"), "the hub could not be reached", code=1)
    refused(run("push", pruned, "some one/small"), "is no name of a repository")
    (pruned / "model.safetensors").unlink()
    refused(run("push", pruned, "someone/small"), "lacks model.safetensors; push a whole checkpoint")


BROKEN = ("license: mit\ntitle: My model: a test", "tags: [a", "tags: 5\nlicense: mit", "- a\n- b", "a: " + "[" * 5000)


def test_a_broken_card_of_the_base_model_costs_no_run(world: Path, make_checkpoint: Make) -> None:
    dense, spoken = make_checkpoint(), StringIO()
    for front in (*BROKEN, "a: !!python/object/apply:os.system [true]"):
        (dense / "README.md").write_text(f"---\n{front}\n---\n# words")
        with shown(Console(file=spoken)):
            assert base_metadata(Checkpoint(str(dense), dense)) == {}
            assert spoken.getvalue() == "", "said when the work begins, not before a refusal"
            logger.info("Scoring.")
        remark = "cannot be read as a model card: licence, language and base model are not taken over"
        assert remark in spoken.getvalue()
        assert spoken.getvalue().count("\n") == 2, "one remark, and what is said then"
        spoken.truncate(spoken.seek(0))
    result = run("prune", dense, "--output", dense.parent / "small", "--width", 24, "--criterion", "magnitude")
    assert result.code == 0, result.err
    assert result.err.index("README.md") < result.err.index("In all "), "said before the work"
    card = ModelCard.load(dense.parent / "small" / "README.md")
    assert card.data.to_dict().keys() == {"library_name", "tags", "pipeline_tag", "model_name"}
    (dense.parent / "small" / "README.md").write_text(f"---\n{BROKEN[0]}\n---\n# words")
    assert run("push", dense.parent / "small", "me/small").code == 0
    told = run("evaluate", dense.parent / "small", "--text", world / "held.txt", "--seq-len", 24, "--card")
    refused(told, "no README.md of a checkpoint that hifiprune made; leave out --card")


def test_values_of_the_wrong_type_are_left_out_and_named(
    make_checkpoint: Make, caplog: pytest.LogCaptureFixture
) -> None:
    dense = make_checkpoint()
    front = {"license": {"a": 1}, "language": ["en", False], "pipeline_tag": "x y", "base_model": "a/b"}
    (dense / "README.md").write_text(f"---\n{json.dumps(front)}\n---\n")
    with caplog.at_level(logging.INFO, "hifiprune"):
        assert base_metadata(Checkpoint(str(dense), dense)) == {"base_model": "a/b"}
    assert "states what is no valid language, license, pipeline_tag: not taken over" in caplog.text


HOSTILE = "x`\n\n# Heading\n\n<script>alert(1)</script>\n<!-- measured by hifiprune -->\n| a |"


def test_nothing_of_a_base_card_becomes_markup(world: Path, pruned: Path, tmp_path: Path) -> None:
    keys = ("base_model", "license", "license_name", "license_link", "language", "pipeline_tag")
    front = {"tags": ["hifiprune"], **dict.fromkeys(keys, HOSTILE)}
    (pruned / "README.md").write_text(f"---\n{json.dumps(front)}\n---\n")
    result = run("prune", pruned, "--output", tmp_path / "twice", "--width", 16, "--criterion", "magnitude")
    assert result.code == 0, result.err
    assert all(key in result.err for key in keys), result.err
    content = (tmp_path / "twice" / "README.md").read_text()
    assert "script" not in content
    assert "Heading" not in content
    assert content.count("<!-- measured by hifiprune -->") == 1
    words = ("--text", world / "held.txt", "--seq-len", 24, "--card", "--max-windows", 2)
    assert run("evaluate", tmp_path / "twice", *words).code == 0
    assert "`small` with" in ModelCard.load(tmp_path / "twice" / "README.md").text


def test_nothing_of_a_base_record_becomes_markup_or_costs_a_run(pruned: Path, tmp_path: Path) -> None:
    record = json.loads((pruned / "run.json").read_text())
    for model, results, told in (
        (HOSTILE, {"criterion": HOSTILE}, "with 12.3% of its parameters pruned"),
        ("/x/dense", {"parameters": HOSTILE}, "`small`, trained by hifiprune"),
    ):
        changed = record | {"arguments": record["arguments"] | {"model": model}}
        changed |= {"results": record["results"] | results}
        (pruned / "run.json").write_text(json.dumps(changed))
        base = describe_base(Checkpoint(str(pruned), pruned))
        training = {"method": "full", "lora_r": 8, "distill_weight": 0, "match_hidden": 0}
        trained = {"steps": 8, "best_step": 0, "held_out_perplexity": {"before": 2.0, "after": 2.0}, "trouble": None}
        trained |= {"losses": [], "held_out_losses": [], "pruning": None}
        arguments = {"model": "small", "training": training}
        facts = record | {"command": "recover", "arguments": arguments, "results": trained}
        (pruned / "run.json").write_text(json.dumps(facts))
        write_card(pruned, base, "better")
        card = ModelCard.load(pruned / "README.md")
        assert told in card.text
        assert "trained: all weights on labels, 8 steps, none of which was better than the start" in card.text
        assert "<script>" not in card.content
        assert not re.search("^# Heading", card.content, re.MULTILINE)
        assert card.content.count("<!-- measured by hifiprune -->") == 1


@pytest.mark.parametrize(
    ("stated", "found"),
    [("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"), ("/home/me/llama", None), ("x`y/z", None), (5, None)],
)
def test_the_base_model_is_named_by_its_hub_id_where_that_is_known(
    make_checkpoint: Make, stated: object, found: str | None
) -> None:
    folder = make_checkpoint()
    config = json.loads((folder / "config.json").read_text()) | {"_name_or_path": stated}
    (folder / "config.json").write_text(json.dumps(config))
    assert base_metadata(Checkpoint(str(folder), folder)).get("base_model") == found
    assert base_metadata(Checkpoint("a/b", folder, on_hub=True))["base_model"] == "a/b"
    cached = folder.parent / "models--Qwen--Qwen3-0.6B" / "snapshots" / "abc"
    shutil.copytree(folder, cached)
    base = describe_base(Checkpoint(str(cached), cached))
    assert (base.name, base.metadata["base_model"]) == ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")
