"""Heads that a configuration ties to the embedding, whatever files hold of them: what transformers loads is right."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

import hifiprune as hp
from hifiprune.config import CriterionOptions
from hifiprune.engine.offload import stream
from hifiprune.io.hashing import hash_model
from hifiprune.io.safetensors_stream import stored_tensors
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.mlp import count_parameters
from hifiprune.models.save_model import save_model
from hifiprune.models.weight_files import tied_names, tied_once, untie_, untied_names
from hifiprune.pruning.cut_checkpoint import cut_checkpoint, hash_stored, stored_plainly
from hifiprune.scoring.score import score_all
from tests.commands import run
from tests.families import load, tiny_tokens
from tests.test_families import random_plan

FAMILIES = ["mistral3", "llama", "gemma", "qwen2_vl"]
FORMS = ["apart", "twice", "head only"]


@pytest.fixture
def make_tied(make_checkpoint: Callable[..., Path]) -> Callable[[str, str], Path]:
    """A checkpoint that is tied by its configuration, with a head of its own, a second copy, or the head alone."""

    def made(family: str, form: str) -> Path:
        folder = make_checkpoint(family=family, dtype=torch.bfloat16, tie_word_embeddings=False)
        tie(folder)
        tensors = load_file(folder / "model.safetensors")
        (head,) = (name for name in tensors if name.endswith("lm_head.weight"))
        (table,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
        if form != "apart":
            tensors[head] = tensors[table].clone()
        if form == "head only":
            del tensors[table]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return made


def tie(folder: Path) -> None:
    """State no tying, as published configurations do where it is the default; llama's default is another."""
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part.pop("tie_word_embeddings", None)
    if config["model_type"] in ("llama", "qwen2_vl"):
        config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_models_and_their_cuts_are_the_resident_ones(
    family: str, form: str, make_tied: Callable[[str, str], Path], tmp_path: Path
) -> None:
    folder = make_tied(family, form)
    checkpoint, resident = find_checkpoint(str(folder)), load(folder).eval()
    assert stored_plainly(checkpoint)
    assert hash_stored(checkpoint) == hash_model(resident)
    assert count_parameters(checkpoint.skeleton()) == count_parameters(resident)
    assert tied_names(checkpoint.skeleton()) == tied_names(resident)
    assert max(map(len, tied_names(resident))) == (1 if form == "apart" else 2)
    asked = [("hfprune", CriterionOptions())]
    (theirs,) = score_all(load(folder, dtype=torch.float32).eval(), tiny_tokens(3, 9), asked, recompute=True)
    (ours,) = score_all(stream(checkpoint, torch.float32), tiny_tokens(3, 9), asked, model_hash="known")
    assert all(torch.equal(one, other) for one, other in zip(ours.values, theirs.values, strict=True))
    assert ours.total_parameters == theirs.total_parameters
    plan = random_plan(resident, 24)
    cut_checkpoint(str(folder), tmp_path / "ours", plan)
    hp.cut_(resident, plan)
    save_model(resident, checkpoint, tmp_path / "theirs")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(values, files[1][name]) for name, values in files[0].items())
    assert hash_model(load(tmp_path / "ours")) == hash_model(resident)


def test_commands_stream_such_a_model_to_the_same_files(
    world: Path, tmp_path: Path, make_tied: Callable[[str, str], Path]
) -> None:
    folder = make_tied("mistral3", "apart")
    text = ("--calibration", world / "calibration.txt", "--num-samples", 6, "--seq-len", 24, "--recompute")
    for how in ("--stream", "--in-memory"):
        result = run("prune", folder, "--output", tmp_path / how, "--ratio", 0.1, "--round-to", 1, *text, how)
        assert result.code == 0, result.err
    for name in ("model.safetensors", "hifiprune/plan.json", "hifiprune/scores.safetensors", "config.json"):
        assert (tmp_path / "--stream" / name).read_bytes() == (tmp_path / "--in-memory" / name).read_bytes(), name


class ThreeNames(PreTrainedModel):
    """A model with three names for one matrix."""

    config_class = LlamaConfig
    _tied_weights_keys = {"first.weight": "table.weight", "second.weight": "table.weight"}  # noqa: RUF012

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.table = nn.Embedding(6, 2)
        self.first, self.second = nn.Linear(2, 6, bias=False), nn.Linear(2, 6, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Leave what is missing as it is."""


@pytest.mark.parametrize("held", [form for form in product(("", "x", "y"), repeat=3) if any(form)])
def test_several_tied_names_are_tied_as_transformers_ties_them(held: tuple[str, ...], tmp_path: Path) -> None:
    values = {"x": torch.arange(12.0).view(6, 2), "y": torch.ones(6, 2)}
    names = ("table.weight", "first.weight", "second.weight")
    tensors = {name: values[each].clone() for name, each in zip(names, held, strict=True) if each}
    config = LlamaConfig(tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded: Any = ThreeNames.from_pretrained(tmp_path)
    with torch.device("meta"):
        skeleton = ThreeNames(config)
    skeleton.tie_weights()
    stored: Any = stored_tensors([tmp_path / "model.safetensors"])
    untie_(skeleton, untied_names(skeleton, stored, torch.float32))
    assert tied_names(skeleton) == tied_names(loaded)
    own = tied_once(skeleton, stored)
    assert own.keys() == dict(loaded.named_parameters()).keys()
    assert all(torch.equal(own[name].whole(), parameter) for name, parameter in loaded.named_parameters())
