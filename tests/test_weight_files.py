"""Weight files that are not the model's are refused by their headers, by every command, before a weight is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

import hifiprune as hp
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.find_checkpoint import find_checkpoint
from tests.commands import refused, run
from tests.families import load

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
GATE = "model.layers.1.mlp.gate_proj.weight"


def change(folder: Path, name: str, to: Callable[[Tensor], Tensor]) -> None:
    """Change a tensor of the files."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = to(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit(folder: Path, **values: object) -> None:
    """Change the configuration."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads weights or makes hashes of them fails."""

    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    for name in (
        "hifiprune.models.checkpoint.Checkpoint.load",
        "hifiprune.io.safetensors_stream.Stored.whole",
        "hifiprune.io.safetensors_stream._fill",
    ):
        monkeypatch.setattr(name, read)


def commands(folder: Path, world: Path, output: Path) -> list[list[object]]:
    """A line for every command that looks at a model."""
    text = ["--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 24]
    held = ["--text", world / "held.txt", "--seq-len", 24]
    return [
        ["inspect", folder],
        ["score", folder, "--output", output, *text],
        ["prune", folder, "--output", output, "--width", 24, *text],
        ["prune", folder, "--output", output, "--width", 24, *text, "--stream"],
        ["prune", folder, "--output", output, "--width", 24, "--criterion", "magnitude", "--dry-run"],
        ["compare", folder, "--output", output, *text, *held, "--criteria", "magnitude", "--ratios", 0.1],
        ["evaluate", folder, *held],
        ["evaluate", world / "dense", "--against", folder, *held],
        ["bench", folder, world / "dense"],
        ["export", folder, "--output", output],
        ["recover", folder, "--output", output, "--data", world / "held.txt", "--distill-weight", 0],
    ]


@pytest.mark.usefixtures("unread")
def test_every_command_refuses_whole_numbers_for_weights(
    make_checkpoint: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    folder = make_checkpoint()
    change(folder, GATE, lambda weight: weight.to(torch.int32))
    for words in commands(folder, world, tmp_path / "out"):
        refused(run(*words), f"stores {GATE} as I32, and no quantization_config says what its numbers mean")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "name", "dtype", "kind"),
    [
        ("llama", "model.embed_tokens.weight", torch.float8_e4m3fn, "F8_E4M3"),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", torch.int8, "I8"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight", torch.uint8, "U8"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", torch.bool, "BOOL"),
        ("mistral3", "language_model.model.layers.0.mlp.up_proj.weight", torch.float8_e5m2, "F8_E5M2"),
    ],
)
def test_numbers_of_every_kind_and_place(
    make_checkpoint: Callable[..., Path], family: str, name: str, dtype: torch.dtype, kind: str
) -> None:
    folder = make_checkpoint(family=family)
    change(folder, name, lambda weight: weight.to(dtype))
    place = name.rpartition(".layers.")[2].replace("block_sparse_moe", "mlp")
    with pytest.raises(hp.UserError, match=rf"{place} as {kind}, .*prune the original checkpoint"):
        find_checkpoint(str(folder)).fetch()


def test_low_precision_of_tensors_that_the_model_does_not_know(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    unknown = {"model.further.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    save_file(tensors | unknown, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(hp.UserError, match=r"model.further.weight as F8_E4M3"):
        find_checkpoint(str(folder)).fetch()


def test_whole_numbers_that_are_no_weights_are_left_alone(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(family="gpt2")
    tensors = load_file(folder / "model.safetensors")
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool), "ids": torch.arange(8)}
    save_file(tensors | masks, folder / "model.safetensors", {"format": "pt"})
    checkpoint = find_checkpoint(str(folder))
    checkpoint.fetch()
    assert checkpoint.load().state_dict().keys() == load(folder).state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"intermediate_size": 50},
            r"mlp.\w+.weight is \[.*\] in the files, where config.json \(intermediate_size 50\) asks for \[.*50.*\].*"
            r" \(8 more tensors differ\)",
        ),
        (
            {"vocab_size": 300},
            r"tokens.weight is \[257, 24\] in the files, where config.json \(vocab_size 300\) asks for \[300, 24\]",
        ),
    ],
)
@pytest.mark.usefixtures("unread")
def test_shapes_that_the_configuration_does_not_ask_for(
    make_checkpoint: Callable[..., Path], world: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = make_checkpoint()
    edit(folder, **changes)
    with pytest.raises(hp.UserError, match=said):
        find_checkpoint(str(folder)).fetch()
    for words in commands(folder, world, tmp_path / "out"):
        refused(run(*words), "copy config.json and the weights again from one checkpoint")


def test_a_single_tensor_of_a_wrong_shape(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint()
    change(folder, GATE, lambda weight: weight[:30])
    said = rf"{GATE} is \[30, 24\] in the files, where config.json \(.*intermediate_size 40.*\) asks for \[40, 24\]"
    with pytest.raises(hp.UserError, match=said):
        find_checkpoint(str(folder)).fetch()


@pytest.mark.parametrize(
    "name", ["1.mlp.experts.2.gate_proj", "1.mlp.experts.2.down_proj", "1.mlp.shared_experts.up_proj"]
)
def test_an_expert_of_a_wrong_shape(make_checkpoint: Callable[..., Path], name: str) -> None:
    folder = make_checkpoint(family="deepseek_v2")
    change(folder, f"model.layers.{name}.weight", lambda weight: weight[:13])
    with pytest.raises(hp.UserError, match=r"in the files, where config.json.* asks for \["):
        find_checkpoint(str(folder)).fetch()


def test_shapes_that_only_loading_shows(make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint()
    change(folder, GATE, lambda weight: weight[:30])
    monkeypatch.setattr(Checkpoint, "fetch", lambda self: None)
    with pytest.raises(hp.UserError, match=rf"{GATE} is \[30, 24\] in the files, .* asks for \[40, 24\]"):
        find_checkpoint(str(folder)).load()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_git_lfs_pointers(make_checkpoint: Callable[..., Path], world: Path, tmp_path: Path, file: str) -> None:
    folder = make_checkpoint()
    (folder / file).write_text(POINTER)
    text = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 24)
    result = run("prune", folder, "--output", tmp_path / "out", "--width", 24, *text)
    refused(result, f"{file} is a git-lfs pointer, not the file: run `git lfs pull` in {folder}")


def test_git_lfs_pointers_of_shards_indices_and_gguf_files(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint()
    find_checkpoint(str(folder)).load().save_pretrained(tmp_path / "many", max_shard_size="20KB")
    shards = sorted((tmp_path / "many").glob("model-*"))
    assert len(shards) > 1
    shards[-1].write_text(POINTER)
    refused(run("inspect", tmp_path / "many"), f"{shards[-1].name} is a git-lfs pointer")
    (tmp_path / "many" / "model.safetensors.index.json").write_text(POINTER)
    refused(run("inspect", tmp_path / "many"), "model.safetensors.index.json is a git-lfs pointer")
    (tmp_path / "model.gguf").write_text(POINTER)
    refused(run("inspect", tmp_path / "model.gguf"), "model.gguf is a git-lfs pointer")


@pytest.mark.usefixtures("unread")
def test_a_tokenizer_that_is_larger_than_the_vocabulary(
    make_checkpoint: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    folder = make_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["the "])
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text("the thing " * 400)
    other = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 24)
    text = ("--calibration", tmp_path / "text.txt", "--num-samples", 4, "--seq-len", 24)
    held = ("--text", tmp_path / "text.txt", "--seq-len", 24)
    said = "the tokenizer writes token 257 where the model's vocabulary has 257; give the model its own tokenizer"
    trained = ("--data", tmp_path / "text.txt", "--seq-len", 24, "--distill-weight", 0, "--lora-r", 8)
    output = ("--output", tmp_path / "out")
    for words in (
        ["score", folder, *output, *text],
        ["prune", folder, *output, "--width", 24, *text],
        ["evaluate", folder, *held],
        ["compare", folder, *output, *other, *held, "--criteria", "fisher", "--ratios", 0.1, "--round-to", 1],
        ["recover", folder, *output, *trained],
    ):
        result = run(*words)
        refused(result, said)
