"""Vision-language models: their text part is cut in place, and what they see stays what it was."""

import json
from pathlib import Path
from typing import Any

import torch

import hifiprune as hp
from hifiprune.models.mlp import find_mlps
from tests.commands import refused, run
from tests.conftest import save_checkpoint
from tests.families import load, tiny_model, tiny_tokens
from tests.naive import changed_activations
from tests.test_families import random_plan

SEEN = 60


@torch.no_grad()
def test_cutting_equals_zero_masking_with_an_image_too() -> None:
    model: Any = tiny_model("llava")
    model.config.image_token_id = SEEN
    tokens = tiny_tokens(2) % SEEN
    tokens[:, 2:6] = SEEN  # four patches
    image = torch.rand(2, 3, 28, 28, dtype=model.dtype, generator=torch.Generator().manual_seed(0))
    given = {"input_ids": tokens, "pixel_values": image, "use_cache": False}
    plan = random_plan(model, 17)
    masks = [
        torch.zeros(mlp.neurons, dtype=model.dtype).index_fill(0, kept, 1)
        for mlp, kept in zip(find_mlps(model), plan.kept, strict=True)
    ]
    with changed_activations(model, lambda number, activation: activation * masks[number]):
        expected, other = (model(**given | {"pixel_values": seen}).logits for seen in (image, 1 - image))
    assert not torch.allclose(expected, other), "the image is looked at"
    hp.cut_(model, plan)
    torch.testing.assert_close(model(**given).logits, expected, rtol=1e-10, atol=1e-12)


def test_what_an_image_needs_is_kept(world: Path, tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", "qwen2_vl", max_position_embeddings=128)
    (dense / "preprocessor_config.json").write_text(json.dumps({"size": 28}))
    text = ("--calibration", world / "calibration.txt", "--num-samples", 6, "--seq-len", 24)
    result = run("prune", dense, "--output", tmp_path / "out", "--width", 24, *text)
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == (
        dense / "preprocessor_config.json"
    ).read_text()
    before, after = (load(path) for path in (dense, tmp_path / "out"))
    assert type(after) is type(before)
    assert {mlp.neurons for mlp in find_mlps(after)} == {24}
    seen = dict(before.model.visual.named_parameters())
    assert seen
    assert all(torch.equal(values, seen[name]) for name, values in after.model.visual.named_parameters())
    assert "AutoModelForImageTextToText" in (tmp_path / "out" / "README.md").read_text()


def test_widths_that_differ_are_refused(world: Path, tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", "qwen2_vl", max_position_embeddings=128)
    text = ("--calibration", world / "calibration.txt", "--num-samples", 6, "--seq-len", 24)
    words = ("prune", dense, "--output", tmp_path / "out", "--width", 24, "--allocation", "global", *text)
    refused(run(*words), "vision-language models are saved with one width; use --allocation uniform")


def test_a_pruned_model_that_sees_is_trained(world: Path, tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", "qwen2_vl", max_position_embeddings=128)
    hp.prune(str(dense), tmp_path / "small", hp.PruneConfig(hp.Budget(width=24), criterion="magnitude"))
    words = ("--data", world / "calibration.txt", "--max-steps", 4, "--seq-len", 24, "--output", tmp_path / "out")
    result = run("recover", tmp_path / "small", *words)
    assert result.code == 0, result.err
    before, after = (load(tmp_path / name) for name in ("small", "out"))
    assert type(after) is type(before)
    trained = json.loads((tmp_path / "out" / "run.json").read_text())["results"]["held_out_perplexity"]
    assert trained["after"] < trained["before"]
    kept = dict(before.named_parameters())
    changed = {name.split(".")[1] for name, values in after.named_parameters() if not torch.equal(values, kept[name])}
    assert changed == {"language_model"}
