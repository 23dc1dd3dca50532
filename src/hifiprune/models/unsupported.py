"""Refuse models that cannot be pruned as they are (adapters, quantized weights), with the remedy."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hifiprune.errors import UserError

ADAPTER = "adapter_config.json"
METHOD_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Files that state quantization beside `config.json`, and the method of each."""


def refuse_adapter(name: str, folder: Path) -> None:
    """Refuse a folder that holds an adapter, alone or beside a model: transformers would load another model from it.

    Raises:
        UserError: it does.
    """
    if not (folder / ADAPTER).is_file() and not (folder / "adapter_model.safetensors").is_file():
        return
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    raise UserError(
        f"{name} is an adapter of {base or 'a model that it does not name'}, not a model; merge it first, with peft: "
        f"AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained('merged'), and "
        "save the base model's tokenizer there too"
    )


def refuse_quantized(name: str, folder: Path, config: dict[str, Any]) -> None:
    """Refuse a checkpoint whose `config`, or a file beside it, says that the weights are quantized.

    Looks at no weights and asks no library, so the one that made them need not be installed.

    Raises:
        UserError: it says so.
    """
    method = _stated_method(config) or next(
        (how for file, how in METHOD_FILES.items() if (folder / file).is_file()), None
    )
    if method is not None:
        raise UserError(
            f"{name} is quantized ({method}) and cannot be cut; prune the original checkpoint and quantize the result"
        )


def refuse_kernels(name: str, config: dict[str, Any]) -> None:
    """Refuse a `config` that names compute kernels of the hub, which transformers would download and run.

    Raises:
        UserError: it, or a part of it, does.
    """
    for key, stated in config.items():
        if not key.strip("_").startswith(("attn_implementation", "experts_implementation")):
            continue
        for kernel in stated.values() if isinstance(stated, dict) else [stated]:
            if isinstance(kernel, str) and "/" in kernel:
                raise UserError(
                    f"{name}: its config.json names code of the hub, {kernel}, as {key}, and hifiprune runs no code of "
                    f"a checkpoint; remove {key} from it"
                )
    for part in config.values():
        if isinstance(part, dict):
            refuse_kernels(name, part)


def refuse_own_tokenizer(name: str, folder: Path) -> None:
    """Refuse a tokenizer that is code of the checkpoint, for programs that would run it, as llama.cpp's converter.

    Raises:
        UserError: `tokenizer_config.json` names such code, or cannot be read.
    """
    try:
        facts = json.loads((folder / "tokenizer_config.json").read_bytes())
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: tokenizer_config.json cannot be read: {error}") from error
    if isinstance(facts, dict) and "auto_map" in facts:
        raise UserError(
            f"{name}: tokenizer_config.json names code of the checkpoint (auto_map), which llama.cpp's converter may "
            "run; where its tokenizer.json does without, remove auto_map"
        )


def _stated_method(config: dict[str, Any]) -> str | None:
    """Return the quantization method that `config` states, empty without one."""
    facts = [config[key] for key in ("quantization_config", "compression_config") if config.get(key) is not None]
    if facts and isinstance(facts[0], dict):
        bits = next((bits for bits in (4, 8) if facts[0].get(f"load_in_{bits}bit")), None)
        return str(facts[0].get("quant_method") or (f"bitsandbytes, {bits} bits" if bits else "unknown method"))
    if facts:
        return "unknown method"
    return "mlx" if isinstance(config.get("quantization"), dict) else None


def refuse_altered(model: nn.Module) -> None:
    """Refuse a model in memory that holds adapters or quantized weights.

    Raises:
        UserError: it does.
    """
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):  # what every layer of peft calls the one that it changes
            raise UserError(
                f"{type(model).__name__} has an adapter at {name}; merge it first: model = model.merge_and_unload()"
            )
    for name, weight in model.named_parameters():
        # torchao's weights are of classes of their own and claim the dtype that they were made from.
        plain = type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and weight.element_size() > 1
        if not plain:
            kind = f"{type(weight).__name__}, {weight.dtype}"
            raise UserError(
                f"{type(model).__name__} is quantized ({name} is a {kind}) and cannot be cut; prune the original "
                "model and quantize the result"
            )
