"""GGUF files of every common type of block go in: their weights are those that the gguf package makes of them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from hifiprune.models.find_checkpoint import find_checkpoint

HIDDEN = WIDTH = 256  # k-quants have blocks of 256
VOCABULARY = 40
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
    "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
}
TURNED = ("blk.0.attn_q.weight", "blk.0.attn_k.weight")  # rows in another order than in transformers
SCALES = {Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}
"""Where in a block its float16 scales are; the package reads these types but writes none."""


def blocks(kind: Type, rows: int, columns: int, chance: np.random.Generator) -> NDArray[Any]:
    """Weights in a type's blocks: random ones rounded, or random bytes with scales that are numbers."""
    if kind not in SCALES:
        return quantize(chance.standard_normal((rows, columns), dtype=np.float32), kind)
    size, length = gguf.GGML_QUANT_SIZES[kind]
    data = chance.integers(0, 256, (rows, columns // size, length), dtype=np.uint8)
    for place in SCALES[kind]:
        data[..., place : place + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    return data.reshape(rows, -1)


def write(path: Path, kind: Type) -> dict[str, NDArray[np.float32]]:
    """A Llama of one block in a file; the weights that it holds."""
    chance, held = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{number}" for number in range(VOCABULARY)])
    writer.add_token_merges([])
    for name in (*NAMES, *TURNED):
        data = blocks(kind, VOCABULARY if name in ("token_embd.weight", "output.weight") else HIDDEN, HIDDEN, chance)
        held[name] = dequantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


KINDS = (Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q5_1, *SCALES)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_weights_are_those_that_the_file_holds(kind: Type, tmp_path: Path) -> None:
    held = write(tmp_path / "tiny.gguf", kind)
    model = find_checkpoint(str(tmp_path / "tiny.gguf")).load()
    weights = model.state_dict()
    for name, ours in NAMES.items():
        assert torch.equal(weights[ours], torch.from_numpy(held[name])), name
    assert model.dtype == torch.float32
    assert model(torch.arange(9).unsqueeze(0)).logits.isfinite().all()
