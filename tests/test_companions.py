"""Files that go with the weights: by what a loader of the source needs, and nothing else that lies there."""

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM

import hifiprune as hp
from hifiprune.models.find_checkpoint import find_checkpoint
from tests.commands import refused, run
from tests.conftest import byte_tokenizer
from tests.families import tiny_tokens
from tests.naive import logits_of

TAKEN = [
    "tekken.json", "SYSTEM_PROMPT.txt", "qwen.tiktoken", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model.v3", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/tool_use.jinja", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "feature_extractor_config.json", "LICENSE", "LICENCE.md", "License.txt", "COPYING", "USE_POLICY.md",
    "MODEL_LICENSE", "THIRD_PARTY_NOTICES", "Notice.txt", "LICENSES/Apache-2.0.txt", "llama-license.pdf",
    "TERMS_OF_USE.md",
]  # fmt: skip
LEFT = [
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", "run.json", ".env",
    ".gitattributes", "tf_model.h5", "flax_model.msgpack", "model.onnx", "rust_model.ot", "consolidated.safetensors",
    "pytorch_model.bin.index.json", "params.json", "tokenizer_model.safetensors", "license.py", "unused.py",
    "README_zh.md", "figures/plot.png", "original/tokenizer.model", "LICENSES/.secret", "model.q4.gguf", ".license.swp",
    "hifiprune/scores.safetensors",
]  # fmt: skip


def fill(folder: Path, names: list[str]) -> None:
    """Files that say what they are called."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)


def prune(dense: Path, output: Path) -> None:
    hp.prune(str(dense), output, hp.PruneConfig(hp.Budget(width=24), round_to=1, criterion="magnitude", repair="none"))


def test_companions_go_along_and_the_rest_stays(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = (checkpoint / "tokenizer.json").read_bytes()
    fill(checkpoint, TAKEN + [name for name in LEFT if name != "pytorch_model.bin.index.json"])
    prune(checkpoint, tmp_path / "cut")
    files = {path.relative_to(tmp_path / "cut").as_posix() for path in (tmp_path / "cut").rglob("*") if path.is_file()}
    ours = {"README.md", "run.json", ".hifiprune.json", "hifiprune/scores.safetensors", "hifiprune/plan.json"}
    theirs = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files == {*TAKEN} | ours | theirs
    assert all((tmp_path / "cut" / name).read_text() == name for name in TAKEN)
    assert (tmp_path / "cut" / "tokenizer.json").read_bytes() == tokenizer


def test_the_hub_is_asked_for_the_same_and_for_no_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, got = tmp_path / "hub", tmp_path / "got"
    shutil.copytree(checkpoint, hub)
    (hub / "modeling_x.py").write_text("")
    fill(hub, TAKEN + LEFT)

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str] | None, **_: object) -> str:
        names = [path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()]
        for file in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (got / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(hub / file, got / file)
        return str(got)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    find_checkpoint("org/model")
    files = {path.relative_to(got).as_posix() for path in got.rglob("*") if path.is_file()}
    assert {*TAKEN, "config.json", "tokenizer.json", "modeling_x.py"} <= files
    weights = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".gguf")
    assert not [name for name in files if name.endswith(weights)]


@pytest.mark.parametrize("kind", ["tekken.json", "tokenizer.model", "qwen.tiktoken", "spiece.model", "vocab.txt"])
def test_a_tokenizer_of_any_kind_is_one(
    kind: str, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(hp.UserError, match="has no tokenizer files"):
        find_checkpoint(str(folder)).tokenizer()
    (folder / kind).write_text("")
    monkeypatch.setattr(
        "hifiprune.models.tokenizer_files.AutoTokenizer.from_pretrained", lambda *_, **__: byte_tokenizer()
    )
    assert len(find_checkpoint(str(folder)).tokenizer()) == 257


CONFIGURATION = """
from transformers import LlamaConfig

class TheirConfig(LlamaConfig):
    pass
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_theirs import TheirConfig
from .helpers_theirs import same

class Theirs(LlamaForCausalLM):
    config_class = TheirConfig

    def forward(self, *args, **kwargs):
        return same(super().forward(*args, **kwargs))
"""
CODE = {
    "configuration_theirs.py": CONFIGURATION,
    "modeling_theirs.py": MODELING,
    "helpers_theirs.py": "from .deeper_theirs import same\n",
    "deeper_theirs.py": "def same(value):\n    return value\n",
    "tokenization_theirs.py": "",
    "unused_theirs.py": "",
}
NAMED = {"AutoConfig": "configuration_theirs.TheirConfig", "AutoModelForCausalLM": "modeling_theirs.Theirs"}


@pytest.fixture
def coded(checkpoint: Path) -> Path:
    """A checkpoint of a family of the table that names code of its own too."""
    for name, text in CODE.items():
        (checkpoint / name).write_text(text)
    for name, more in {
        "config.json": NAMED,
        "tokenizer_config.json": {"AutoTokenizer": [None, "tokenization_theirs.Slow"], "Auto": "other/repo--a.B"},
    }.items():
        facts = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps(facts | {"auto_map": more}))
    (checkpoint / "processor_config.json").write_text('{"auto_map": {"a": "../evil.B", "b": "nowhere.C", "c": 3}}')
    (checkpoint / "preprocessor_config.json").write_text("broken")
    (checkpoint.parent / "evil.py").write_text("")
    return checkpoint


@pytest.mark.parametrize("how", ["cut", "trained"])
def test_code_that_is_named_goes_along_and_loads(how: str, coded: Path, world: Path, tmp_path: Path) -> None:
    if how == "cut":
        prune(coded, tmp_path / "out")
    else:
        words = (
            "--data",
            world / "calibration.txt",
            "--max-steps",
            1,
            "--seq-len",
            24,
            "--distill-weight",
            0,
            "--lora-r",
            4,
        )
        result = run("recover", coded, "--output", tmp_path / "out", *words)
        assert result.code == 0, result.err
    files = {path.name for path in (tmp_path / "out").glob("*.py")}
    assert files == {*CODE} - {"unused_theirs.py"}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(theirs).__name__ == "Theirs"
    assert torch.equal(logits_of(theirs, tiny_tokens()), logits_of(stock, tiny_tokens()))


def test_code_of_models_whose_widths_differ_is_ours_alone(coded: Path, world: Path, tmp_path: Path) -> None:
    text = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 24)
    result = run("prune", coded, "--output", tmp_path / "out", "--width", 24, "--allocation", "global", *text)
    assert result.code == 0, result.err
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == {"modeling_pruned.py", "tokenization_theirs.py"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)


def test_tekken_alone_is_calibrated_with_and_copied(checkpoint: Path, world: Path, tmp_path: Path) -> None:
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    words = ("prune", checkpoint, "--output", tmp_path / "out", "--width", 24, "--num-samples", 4, "--seq-len", 24)
    refused(run(*words, "--calibration", world / "calibration.txt"), "has no tokenizer files; copy those of the")
    vocabulary = [
        {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
        for byte in range(250)
    ]
    special = [
        {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(("<unk>", "<s>", "</s>"))
    ]
    config = {"pattern": "\\w+|.", "num_vocab_tokens": 250, "default_vocab_size": 253}
    config |= {"default_num_special_tokens": 3, "version": "v7"}
    facts = {"config": config, "vocab": vocabulary, "special_tokens": special}
    (checkpoint / "tekken.json").write_text(json.dumps(facts))
    result = run(*words, "--calibration", world / "calibration.txt")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "out" / "tekken.json").read_text()) == facts


@pytest.mark.parametrize("place", ["LICENSE", "tokenizer.json", "licenses"])
def test_links_to_what_is_the_users_own_are_not_copied(place: str, checkpoint: Path, tmp_path: Path) -> None:
    secret = tmp_path / "home" / ".ssh" / "id_rsa"
    secret.parent.mkdir(parents=True)
    secret.write_text("secret")
    (checkpoint / place).unlink(missing_ok=True)
    (checkpoint / place).symlink_to(secret.parent if place == "licenses" else secret)
    words = ("--output", tmp_path / "out", "--width", 24, "--round-to", 1, "--criterion", "magnitude")
    refused(run("prune", checkpoint, *words), f"is a link to {secret}, which lies outside of the folder")
    assert not (tmp_path / "out").exists()


def test_links_to_files_of_a_checkpoint_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    """As in a folder of links to another checkpoint, in one with links within it, and in the hub's cache."""
    fill(checkpoint, ["LICENSE", "additional_chat_templates/tool_use.jinja"])
    farm, hub = tmp_path / "farm", tmp_path / "models--a--b"
    farm.mkdir()
    (hub / "blobs").mkdir(parents=True)
    snapshot = hub / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(path for path in checkpoint.rglob("*") if path.is_file()):
        name = path.relative_to(checkpoint)
        shutil.copyfile(path, hub / "blobs" / str(number))
        for folder, target in ((farm, path), (snapshot, hub / "blobs" / str(number))):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(target)
    (checkpoint / "NOTICE").symlink_to("LICENSE")
    for folder in (farm, snapshot, checkpoint):
        prune(folder, tmp_path / "out" / folder.name)
        assert (tmp_path / "out" / folder.name / "additional_chat_templates" / "tool_use.jinja").is_file()
        assert (tmp_path / "out" / folder.name / "LICENSE").read_text() == "LICENSE"
    assert (tmp_path / "out" / checkpoint.name / "NOTICE").read_text() == "LICENSE"


def test_code_does_not_leave_the_folders(coded: Path, tmp_path: Path) -> None:
    """A module that says it imports one from elsewhere: transformers takes what stands there for a path."""
    payload = coded.parent / "payload.py"
    payload.write_text("print('run')")
    away = f"../../{coded.parent.name}/payload"  # from the output's folder that leads elsewhere than from this one
    back = f"../../{coded.parent.name}/{coded.name}/unused_theirs"  # its own file, by a way that leads out
    lines = (f"from .{name} import run" for name in ("deeper_theirs", away, back, payload.with_suffix(""), "waiting"))
    (coded / "helpers_theirs.py").write_text("\n".join(lines))
    (coded / "processor_config.json").write_text(json.dumps({"auto_map": {"a": f"{away}.B"}}))
    os.mkfifo(coded / "waiting.py")  # which whoever reads it waits at
    (coded / "deeper_theirs.py").unlink()
    (coded / "deeper_theirs.py").symlink_to(payload)
    before = {*tmp_path.parent.rglob("payload.py")}
    prune(coded, tmp_path / "work" / "out")
    assert {*tmp_path.parent.rglob("payload.py")} == before
    assert not [*(tmp_path / "work").rglob("unused_theirs.py")]
    assert not (tmp_path / "work" / "out" / "deeper_theirs.py").exists()
    assert (tmp_path / "work" / "out" / "helpers_theirs.py").exists()
