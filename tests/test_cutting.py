"""Cutting checkpoints on the disk gives what cutting models in memory gives, tensor by tensor."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mode
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import hifiprune as hp
from hifiprune.io.hashing import hash_model
from hifiprune.io.safetensors_stream import Piece, Stored, stored_tensors, write_shard
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.mlp import find_mlps
from hifiprune.models.save_model import save_model
from hifiprune.models.weight_files import INDEX
from hifiprune.plan import Plan, proportional_width
from hifiprune.pruning.cut_checkpoint import cut_checkpoint, hash_stored, stored_plainly
from tests.commands import Interruption, refused, run
from tests.families import FORMS, MIXED, VARIANTS, load, tiny_tokens
from tests.naive import logits_of, masked_logits


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by the safetensors library."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def a_plan(model: Any, *, mixed: bool) -> Plan:
    """Some neurons of every layer."""
    chance = torch.Generator().manual_seed(0)
    mlps = find_mlps(model)
    most = mode(mlp.neurons for mlp in mlps)
    widths = [proportional_width(24, most, mlp.neurons) - 4 * mixed * layer for layer, mlp in enumerate(mlps)]
    kept = [
        torch.randperm(mlp.neurons, generator=chance)[:w].sort().values for mlp, w in zip(mlps, widths, strict=True)
    ]
    return Plan(kept, [mlp.neurons for mlp in mlps], [mlp.name for mlp in mlps], None, 0.0, 0, 0)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of some hundred bytes are read in parts."""
    monkeypatch.setattr("hifiprune.io.safetensors_stream.CHUNK_BYTES", 300)


@pytest.mark.by_layout
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("variant", "mixed"), [(each, mixed) for each in VARIANTS for mixed in (False, True) if each in MIXED or not mixed]
)
def test_cut_checkpoint_writes_what_a_cut_model_saves(
    variant: str, mixed: bool, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    dense = make_checkpoint(family=variant, dtype=torch.bfloat16)
    model = load(dense)
    plan = a_plan(model, mixed=mixed)
    hp.cut_(model, plan)
    save_model(model, find_checkpoint(str(dense)), tmp_path / "memory")
    for size in ("5GB", "10KB"):
        cut_checkpoint(str(dense), tmp_path / size, plan, shard_size=size)
        ours, theirs = tensors_of(tmp_path / size), tensors_of(tmp_path / "memory")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert (tmp_path / size / "config.json").read_text() == (tmp_path / "memory" / "config.json").read_text()
        files = {path.name for path in (tmp_path / "memory").iterdir()} - {"model.safetensors"}
        assert files <= {path.name for path in (tmp_path / size).iterdir()}
    shards = list((tmp_path / "10KB").glob("*.safetensors"))
    assert len(shards) > 1
    index = json.loads((tmp_path / "10KB" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in ours.values())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    for path in shards:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert all(index["weight_map"][name] == path.name for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("variant", FORMS)
def test_a_checkpoint_has_the_hash_of_its_model(
    variant: str, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint(family=variant, dtype=torch.float16)
    monkeypatch.setattr("hifiprune.io.safetensors_stream.CHUNK_BYTES", 300)
    assert stored_plainly(find_checkpoint(str(path)))
    assert hash_stored(find_checkpoint(str(path))) == hash_model(load(path))


def test_pieces_are_read_back_by_the_library(tmp_path: Path) -> None:
    chance = torch.Generator().manual_seed(0)
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
    values = {
        f"{dtype}-{shape}": torch.randint(0, 2, shape, generator=chance).to(dtype)
        for dtype in dtypes
        for shape in ((3, 5), (7,), (), (2, 3, 4))
    }
    save_file(values, tmp_path / "theirs.safetensors")
    stored = stored_tensors([tmp_path / "theirs.safetensors"])
    assert stored.keys() == values.keys()
    pieces = {name: Piece(each.kind, each.shape, each.chunks) for name, each in stored.items()}
    write_shard(tmp_path / "ours.safetensors", pieces)
    ours = load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in values.items())


def test_plain_cuts_load_no_weights(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 24)
    words = ("prune", world / "dense", "--width", 24)
    assert run("score", world / "dense", "--output", tmp_path / "scores", *text).code == 0
    assert run(*words, "--output", tmp_path / "one", *text, "--repair", "none").code == 0
    monkeypatch.setattr("hifiprune.models.checkpoint.Checkpoint.load", None)
    result = run(*words, "--output", tmp_path / "two", "--scores", tmp_path / "scores", "--json")
    assert result.code == 0, result.err
    ours, theirs = tensors_of(tmp_path / "two"), tensors_of(tmp_path / "one")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert [stage["name"] for stage in result.json["stages"]] == ["checking the weights", "writing"]


@pytest.mark.exhaustive  # a real vocabulary is read
def test_what_is_not_stored_as_the_model_has_it_is_not_cut_in_files(smollm2_gguf: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(str(smollm2_gguf))
    assert not stored_plainly(checkpoint)
    plan = a_plan(checkpoint.skeleton(), mixed=False)
    with pytest.raises(hp.UserError, match="does not store its tensors as the model has them"):
        cut_checkpoint(str(smollm2_gguf), tmp_path / "out", plan)


def test_an_interrupted_cut_leaves_nothing_behind(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = a_plan(load(world / "dense"), mixed=False)
    chunks, count = Stored.chunks, [0]

    def stopping(stored: Any) -> Iterator[Tensor]:
        count[0] += 1
        if count[0] == 9:
            raise Interruption
        return chunks(stored)

    monkeypatch.setattr("hifiprune.io.safetensors_stream.Stored.chunks", stopping)
    with pytest.raises(Interruption):
        cut_checkpoint(str(world / "dense"), tmp_path / "out", plan)
    assert not any(tmp_path.iterdir())
    cut_checkpoint(str(world / "dense"), tmp_path / "out", plan)
    load(tmp_path / "out")


def test_what_cannot_be_cut_is_refused(
    make_checkpoint: Callable[..., Path], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_checkpoint(num_hidden_layers=2)
    plan = a_plan(load(world / "dense"), mixed=False)
    with pytest.raises(hp.UserError, match=re.escape("the plan is for 3 MLPs of [40] neurons, the model has 2")):
        cut_checkpoint(str(dense), tmp_path / "out", plan)
    with pytest.raises(hp.UserError, match="exists already"):
        cut_checkpoint(str(dense), world, plan)
    weights = dense / "model.safetensors"
    values = load_file(weights)
    values["model.norm.weight"][3] = torch.nan
    save_file(values, weights, {"format": "pt"})
    with pytest.raises(hp.UserError, match=r"the weights model.norm.weight contain NaN"):
        hash_stored(find_checkpoint(str(dense)))
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(hp.UserError, match="is truncated or damaged"):
        cut_checkpoint(str(dense), tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()
    refused(run("prune", dense, "--output", tmp_path / "out", "--width", 24, "--criterion", "magnitude"), "truncated")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_names_without_the_models_prefix_are_known(
    family: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """As the checkpoints of GPT-2 and BLOOM on the hub have them."""
    path = make_checkpoint(family=family)
    tensors = load_file(path / "model.safetensors")
    bare = {name.removeprefix("transformer.").removeprefix("model."): values for name, values in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, path / "model.safetensors", {"format": "pt"})
    checkpoint = find_checkpoint(str(path))
    assert stored_plainly(checkpoint)
    plan = a_plan(checkpoint.skeleton(), mixed=True)
    expected = masked_logits(load(path), plan, tiny_tokens())
    cut_checkpoint(str(path), tmp_path / "cut", plan)
    loaded = load(tmp_path / "cut", trust_remote_code=True)
    torch.testing.assert_close(logits_of(loaded, tiny_tokens()), expected, rtol=1e-4, atol=1e-5)
