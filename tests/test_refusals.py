"""Adapters and quantized models are refused by name, with what to do instead, before any weight is read."""

import json
import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import hifiprune as hp
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.unsupported import refuse_altered
from tests.commands import leftovers, refused, run

# What the libraries write into config.json.
QUANTIZED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes 4 bits": (
        {
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "llm_int8_skip_modules": None,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        },
        "bitsandbytes",
    ),
    "bitsandbytes without its name": ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "bitsandbytes, 8 bits"),
    "GPTQ": (
        {"bits": 4, "desc_act": True, "group_size": 128, "quant_method": "gptq", "sym": True, "true_sequential": True},
        "gptq",
    ),
    "AWQ": (
        {"bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
         "zero_point": True},
        "awq",
    ),
    "FP8": (
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        "fp8",
    ),
    "compressed-tensors": (
        {
            "config_groups": {
                "group_0": {
                    "input_activations": None,
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {"group_size": 128, "num_bits": 4, "strategy": "group", "type": "int"},
                }
            },
            "format": "pack-quantized",
            "ignore": ["lm_head"],
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        },
        "compressed-tensors",
    ),
    "torchao": (
        {
            "include_input_output_embeddings": False,
            "modules_to_not_convert": None,
            "quant_method": "torchao",
            "quant_type": {"default": {"_data": {"group_size": None}, "_type": "Int8WeightOnlyConfig", "_version": 2}},
        },
        "torchao",
    ),
    "one that nobody knows": ({"quant_method": "ternary-2031", "trits": 1}, "ternary-2031"),
    "one that is damaged": ({"quant_method": "torchao"}, "torchao"),
}  # fmt: skip


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refusal(method: str) -> str:
    return f"is quantized ({method}) and cannot be cut; prune the original checkpoint and quantize the result"


@pytest.fixture
def adapter(checkpoint: Path) -> Path:
    """A LoRA adapter of the checkpoint `dense` beside it, that changes what it computes."""
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(checkpoint),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    folder = checkpoint.parent / "adapter"
    adapted.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_checkpoints(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    def choke(*_: object, **__: object) -> None:
        raise ImportError("the library that quantized this is not installed")

    monkeypatch.setattr("hifiprune.models.checkpoint.AutoConfig.from_pretrained", choke)
    facts, method = QUANTIZED[case]
    edit_config(checkpoint, quantization_config=facts)
    (checkpoint / "model.safetensors").unlink()  # nobody misses it: no weight is looked at
    out, other = tmp_path / "out", shutil.copytree(checkpoint, tmp_path / "other")
    for arguments in (
        ("inspect", checkpoint),
        ("prune", checkpoint, "--output", out, "--width", 8, "--calibration", text),
        ("score", checkpoint, "--output", out, "--calibration", text),
        ("evaluate", checkpoint, "--text", text),
        ("recover", checkpoint, "--output", out, "--data", text, "--distill-weight", 0),
        ("bench", checkpoint, other),
    ):
        refused(run(*arguments), refusal(method))
    assert not out.exists()
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "method"),
    [
        ("quantization", {"group_size": 64, "bits": 4}, "mlx"),
        (
            "compression_config",
            {"format": "pack-quantized", "quant_method": "compressed-tensors"},
            "compressed-tensors",
        ),
        ("quantization_config", {"group_size": 64, "bits": 4}, "unknown method"),
        ("quantization_config", "int8", "unknown method"),
    ],
)
def test_quantization_that_is_told_in_other_ways(checkpoint: Path, key: str, value: object, method: str) -> None:
    edit_config(checkpoint, **{key: value})
    refused(run("inspect", checkpoint), refusal(method))


@pytest.mark.parametrize(
    ("file", "method"),
    [("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt")],
)
def test_quantization_that_is_told_in_another_file(checkpoint: Path, file: str, method: str) -> None:
    (checkpoint / file).write_text('{"bits": 4}')
    refused(run("inspect", checkpoint), refusal(method))


def test_a_configuration_that_says_there_is_no_quantization(checkpoint: Path) -> None:
    edit_config(checkpoint, quantization_config=None)
    assert run("inspect", checkpoint).code == 0


def test_an_adapter(adapter: Path, text: Path, tmp_path: Path) -> None:
    message = f"{adapter} is an adapter of {adapter.parent / 'dense'}, not a model; merge it first"
    refused(run("inspect", adapter), message)
    refused(run("prune", adapter, "--output", tmp_path / "out", "--width", 8, "--calibration", text), message)
    for file in ("config.json", "model.safetensors"):  # transformers would load the other model, not this one
        shutil.copyfile(adapter.parent / "dense" / file, adapter / file)
    refused(run("inspect", adapter), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("facts", [None, "{", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_that_does_not_say_of_what(adapter: Path, facts: str | None) -> None:
    (adapter / "adapter_config.json").unlink()
    if facts:
        (adapter / "adapter_config.json").write_text(facts)
    refused(run("inspect", adapter), f"{adapter} is an adapter of a model that it does not name, not a model")


def test_an_adapter_on_the_hub(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, allow_patterns: list[str], **_: object) -> str:
        (tmp_path / "hub").mkdir()
        for file in adapter.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, tmp_path / "hub" / file.name)
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    refused(run("inspect", "org/adapter"), f"org/adapter is an adapter of {adapter.parent / 'dense'}, not a model")
    assert [file.name for file in (tmp_path / "hub").iterdir() if file.suffix == ".safetensors"] == []


def test_the_remedy_for_an_adapter_works(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(hp.UserError) as refusal:
        find_checkpoint(str(adapter))
    (command,) = re.findall(r"AutoPeft\S+\.save_pretrained\('merged'\)", str(refusal.value))
    monkeypatch.chdir(tmp_path)
    exec(command, {"AutoPeftModelForCausalLM": AutoPeftModelForCausalLM})
    tokens = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        merged = find_checkpoint("merged").load()(tokens).logits
        adapted = AutoPeftModelForCausalLM.from_pretrained(str(adapter)).eval()(tokens).logits
        dense = find_checkpoint(str(adapter.parent / "dense")).load()(tokens).logits
    torch.testing.assert_close(merged, adapted)
    assert (dense - adapted).abs().max() > 0.1 * dense.abs().max()


def test_a_model_with_adapters_in_memory(adapter: Path) -> None:
    adapted = AutoPeftModelForCausalLM.from_pretrained(str(adapter))
    windows = torch.arange(12).unsqueeze(0)
    with pytest.raises(hp.UserError, match=r"has an adapter at .*; merge it first: model = model.merge_and_unload\(\)"):
        hp.score(adapted.base_model.model, windows)
    model = adapted.merge_and_unload()
    scores = hp.score(model, windows)
    hp.cut_(model, hp.allocate(scores, hp.Budget(width=8), round_to=1))
    assert model(windows).logits.isfinite().all()


def test_a_peft_model_in_memory(adapter: Path) -> None:
    adapted: Any = AutoPeftModelForCausalLM.from_pretrained(str(adapter))
    plan = hp.Plan([torch.arange(8)], [40], ["model.layers.0.mlp"], None, 0.0, 0, 0)
    for call in (lambda: hp.score(adapted, torch.arange(12).unsqueeze(0)), lambda: hp.cut_(adapted, plan)):
        with pytest.raises(hp.UserError, match=r"^PeftModelForCausalLM has an adapter at .*: model = model.merge"):
            call()


def _to_int8(model: Any, name: str) -> None:
    """As bitsandbytes keeps weights: whole numbers of one byte where a Linear's weight was."""
    module = model.get_submodule(name)
    module.weight = nn.Parameter(module.weight.data.to(torch.int8), requires_grad=False)


def _to_int32(model: Any, name: str) -> None:
    """Packed whole numbers, as AWQ and GPTQ keep weights."""
    module = model.get_submodule(name)
    module.weight = nn.Parameter(module.weight.data.to(torch.int32), requires_grad=False)


def _to_float8(model: Any, name: str) -> None:
    """As fp8 checkpoints keep weights, here without their scales."""
    module = model.get_submodule(name)
    module.weight = nn.Parameter(module.weight.data.to(torch.float8_e4m3fn), requires_grad=False)


def _to_subclass(model: Any, name: str) -> None:
    """As torchao does: a tensor of another class, which claims the dtype that it was made from."""

    class Packed(nn.Parameter):
        pass

    module = model.get_submodule(name)
    module.weight = Packed(module.weight.data)


@pytest.mark.parametrize("alter", [_to_int8, _to_int32, _to_float8, _to_subclass])
@pytest.mark.parametrize("place", ["mlp.down_proj", "self_attn.q_proj"])
def test_a_quantized_model_in_memory(checkpoint: Path, alter: Callable[[Any, str], None], place: str) -> None:
    model = find_checkpoint(str(checkpoint)).load()
    windows = torch.arange(24).view(2, 12)
    plan = hp.allocate(hp.score(model, windows), hp.Budget(width=8), round_to=1)
    alter(model, f"model.layers.1.{place}")
    before = [weight.shape for weight in model.parameters()]
    message = rf"LlamaForCausalLM is quantized \(model.layers.1.{place}.weight is .*prune the original model"
    for call in (
        lambda: hp.score(model, windows),
        lambda: hp.cut_(model, plan),
        lambda: hp.cut_and_repair_(model, plan, windows),
    ):
        with pytest.raises(hp.UserError, match=message):
            call()
    assert [weight.shape for weight in model.parameters()] == before
    refuse_altered(find_checkpoint(str(checkpoint)).load(torch.float16))
