"""GGUF files of models whose layers differ in width: architectures of llama.cpp that read a width for every layer.

llama.cpp's converter knows one width, so it converts the model with every MLP padded by neurons of zeros to the widest;
afterwards the zeros are cut off again, and the architecture is named as one that computes the same layer: `deci` for
Llama's, `openelm` for Qwen 3's, whose output head must be the embedding.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter, ReaderTensor
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig

from hifiprune.config.groups import STOCK
from hifiprune.errors import UserError
from hifiprune.io.safetensors_stream import DTYPES, Piece, Stored, write_shard
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.config_file import CONFIG
from hifiprune.models.detect import stock_class
from hifiprune.models.layouts import has_zero_biases, llama_facts, zero_biases
from hifiprune.models.save_model import save_model

BLOCK = re.compile(r"^blk\.(\d+)\.(ffn_gate|ffn_up|ffn_down|attn_q|attn_k|attn_v)\.(weight|bias)$")
WIDTH = "feed_forward_length"
ROWS = 4096
"""Rows of zeros that are written at a time."""


def differing_architecture(config: PretrainedConfig) -> str:
    """Return the architecture of llama.cpp that holds such layers with a width for each.

    Raises:
        UserError: there is none.
    """
    window = getattr(config, "sliding_window", None) or getattr(config, "use_sliding_window", False)
    if getattr(config, "hidden_act", None) == "silu" and not window:
        if config.model_type in ("llama", "mistral", "qwen2"):
            return "deci"
        if config.model_type == "qwen3" and config.tie_word_embeddings and not config.attention_bias:
            return "openelm"
    raise UserError(
        f"its MLPs differ in width, and llama.cpp reads one width for all layers of a {config.model_type} model; it "
        "has a width a layer for Llama, Mistral without a sliding window, Qwen 2.5, and Qwen 3 with a tied head; "
        "prune with --allocation uniform"
    )


def write_padded(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a stock checkpoint whose MLPs are padded with zeros to the largest width; Qwen 2 becomes Llama."""
    config = checkpoint.config()
    zeros = zero_biases(checkpoint.skeleton()) if has_zero_biases(config) else {}
    config.__dict__.pop("mlp_widths", None)
    with torch.device("meta"):
        uniform: Any = stock_class(config)._from_config(config, dtype=checkpoint.dtype())
    save_model(uniform, checkpoint, folder, layout=STOCK, state_dict={})
    shapes = {name: tuple(values.shape) for name, values in uniform.state_dict().items()}
    pieces = {
        name: Piece(stored.kind, shapes[name], partial(_padded, stored, shapes[name]))
        for name, stored in checkpoint.tensors().items()
        if name in shapes and isinstance(stored, Stored)
    }
    kind = next(kind for kind, dtype in DTYPES.items() if dtype == checkpoint.dtype())
    pieces |= {name: Piece(kind, tuple(values.shape), partial(iter, [values])) for name, values in zeros.items()}
    write_shard(folder / "model.safetensors", pieces)
    if zeros:
        text = json.dumps(llama_facts(json.loads((folder / CONFIG).read_text(encoding="utf-8")), config))
        (folder / CONFIG).write_text(text, encoding="utf-8")


def _padded(stored: Stored, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield the rows of a tensor with zeros to its right and below, up to a shape."""
    missing = shape[0] - stored.shape[0]
    for rows in stored.chunks():
        yield pad(rows, (0, shape[1] - rows.shape[1])) if rows.ndim == 2 else rows
    while missing > 0:
        count = min(ROWS, missing)
        yield torch.zeros((count, *shape[1:]), dtype=DTYPES[stored.kind])
        missing -= count


def cut_padding(path: Path, new: Path, architecture: str, widths: Sequence[int]) -> None:
    """Write a GGUF file with layers of their own widths, from one in which they are padded.

    Args:
        path: file that the converter made of a padded checkpoint.
        new: file to make.
        architecture: architecture to name.
        widths: width of every layer.

    Raises:
        UserError: a type stores more neurons together than some width is a multiple of.
    """
    reader, writer = GGUFReader(path), GGUFWriter(new, architecture)
    before = reader.get_field("general.architecture")
    assert before
    _copy_fields(reader, writer, before.contents(), architecture)
    writer.add_feed_forward_length(list(widths))
    tensors = [tensor for group in _grouped(reader, architecture) for tensor in [_own_width(*group, widths)]]
    for name, values, kind in tensors:
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, values, _ in tensors:
        writer.write_tensor_data(values)
    writer.close()


def _copy_fields(reader: GGUFReader, writer: GGUFWriter, before: str, after: str) -> None:
    """Copy all metadata but widths; keys of the architecture get its new name."""
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", f"{before}.{WIDTH}"):
            continue
        renamed = f"{after}.{name.removeprefix(f'{before}.')}" if name.startswith(f"{before}.") else name
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(renamed, field.contents(), field.types[0], sub_type=inner)


def _grouped(reader: GGUFReader, architecture: str) -> Iterator[tuple[str, list[ReaderTensor]]]:
    """Yield tensors by the names that they are to have; `openelm` has query, key and value in one."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in tensors.items():
        found = BLOCK.match(name)
        if architecture == "openelm" and found and found[2].startswith("attn_"):
            if found[2] == "attn_q":
                parts = [tensors[f"blk.{found[1]}.attn_{part}.weight"] for part in "qkv"]
                yield f"blk.{found[1]}.attn_qkv.weight", parts
        else:
            yield name, [tensor]


def _own_width(
    name: str, parts: list[ReaderTensor], widths: Sequence[int]
) -> tuple[str, np.ndarray[Any, np.dtype[Any]], gguf.GGMLQuantizationType]:
    """Return a tensor with its MLP's neurons alone: rows of gate and up, columns of down."""
    kind, values = parts[0].tensor_type, np.concatenate([part.data for part in parts])
    found = BLOCK.match(name)
    if not found or not found[2].startswith("ffn_"):
        return name, values, kind
    width = widths[int(found[1])]
    if found[2] != "ffn_down":
        return name, values[:width], kind
    if found[3] == "bias":
        return name, values, kind
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if width % block:
        raise UserError(
            f"{kind.name.lower()} stores {block} neurons together, and a layer has {width:,}: prune with --round-to "
            f"{block}, or give --type f16"
        )
    last = width // block * size // values.dtype.itemsize if values.dtype == np.uint8 else width
    return name, np.ascontiguousarray(values[:, :last]), kind
