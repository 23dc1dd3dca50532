"""Which checkpoints serving engines support, as data read from the source code of the versions named.

Every rule carries the address of its source. Where nothing was found, the answer is `unknown`.
"""

from dataclasses import dataclass

VLLM = "https://github.com/vllm-project/vllm/blob/v0.33.0"
TENSORRT = "https://github.com/NVIDIA/TensorRT-LLM/blob"
SGLANG = "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt"
MLX = "https://github.com/ml-explore/mlx-lm/blob/v0.32.2/mlx_lm"
LLAMA_CPP = "https://github.com/ggml-org/llama.cpp/blob/0c1e57098bba43ac29e6e3b677cdceebdd22334f"


@dataclass(frozen=True)
class Engine:
    """A serving engine.

    Attributes:
        name: name shown to users.
        version: version whose source was read.
        models: address of its list of architectures.
        fixed: address of an example of a model with a hard-coded MLP width of four times the hidden size.
        splits: address of its tensor parallelism over the MLP width; empty if it has none.
        mixed: verdict for MLPs that differ in width in the layout remote, with a modeling file of ours.
        why: reason of that verdict.
        code: address of the source of that verdict.
        deci: address of its implementation of the layout deci.
        mend: remedy for a hard-coded width, with a placeholder for the checkpoint's width.
    """

    name: str
    version: str
    models: str
    fixed: str
    splits: str
    mixed: str
    why: str
    code: str
    deci: str
    mend: str = ""


ENGINES = {
    "vllm": Engine(
        "vLLM",
        "0.33.0",
        f"{VLLM}/vllm/model_executor/models/registry.py",
        f"{VLLM}/vllm/model_executor/models/falcon.py",
        f"{VLLM}/vllm/model_executor/layers/linear.py",
        "yes",
        "through its Transformers backend, by auto_map.AutoModel, with --trust-remote-code",
        f"{VLLM}/vllm/model_executor/models/registry.py",
        f"{VLLM}/vllm/model_executor/models/nemotron_nas.py",
    ),
    "tensorrt-llm": Engine(
        "TensorRT-LLM",
        "main at 065ff9e",
        f"{TENSORRT}/065ff9e93780bc0bdbfdbc7156a306ca14f5850c/tensorrt_llm/_torch/models/_arch_index.py",
        "",
        f"{TENSORRT}/00bbf71e796406ea8593a77cbfb828356182db16/tensorrt_llm/_torch/modules/linear.py",
        "unknown",
        "the PyTorch backend has no such architecture; AutoDeploy was not tried",
        f"{TENSORRT}/01bffee125e24ebe5b4a63437840a9422eb70868/tensorrt_llm/_torch/models/modeling_auto.py",
        f"{TENSORRT}/0193dbd4189221d0fd5e9f20cdb384d3da8dbc24/tensorrt_llm/_torch/models/modeling_nemotron_nas.py",
    ),
    "sglang": Engine(
        "SGLang",
        "0.5.23",
        f"{SGLANG.replace('blob', 'tree', 1)}/models",
        f"{SGLANG}/models/phi.py",
        f"{SGLANG}/layers/linear.py",
        "yes",
        "through its Transformers backend, by auto_map.AutoModel, with --trust-remote-code",
        f"{SGLANG}/model_loader/utils.py",
        f"{SGLANG}/models/nemotron_nas.py",
    ),
    "mlx": Engine(
        "MLX (mlx-lm)",
        "0.32.2",
        f"{MLX.replace('blob', 'tree', 1)}/models",
        f"{MLX}/models/gptj.py",
        "",
        "no",
        "its own implementation has one width for all layers",
        f"{MLX}/utils.py",
        f"{MLX}/models/nemotron-nas.py",
    ),
    "llama.cpp": Engine(
        "llama.cpp",
        "0c1e570",
        f"{LLAMA_CPP}/conversion/__init__.py",
        f"{LLAMA_CPP}/conversion/gpt2.py",
        "",
        "no",
        "the converter has no such architecture, and most architectures read one width for all layers",
        f"{LLAMA_CPP}/conversion/base.py",
        f"{LLAMA_CPP}/src/models/deci.cpp",
        "after the conversion, set feed_forward_length to {} in the file with gguf_set_metadata",
    ),
}


@dataclass(frozen=True)
class Form:
    """A number format in which an engine runs or creates weights.

    Attributes:
        engine: key of `ENGINES`.
        name: name of the format.
        multiple: number that the sizes of grouped dimensions, or each GPU's share of them, must be a multiple of.
        otherwise: verdict if they are not.
        then: consequence or reason in that case.
        source: address of the source that was read.
    """

    engine: str
    name: str
    multiple: int = 1
    otherwise: str = "no"
    then: str = ""
    source: str = ""

    @property
    def short(self) -> str:
        """Return the name for tables of little width."""
        return SHORT.get(self.name, self.name)


K_BLOCK, BLOCK = 256, 32
"""Block sizes of k-quants and of the types that llama-quantize falls back to; other tensors become f16."""
GROUPS, BLOCKS, FP8 = (
    "int4, groups of 128 (GPTQ, AWQ)",
    "FP8, blocks of 128 x 128",
    "FP8, one scale per tensor or channel",
)
SHORT = {
    "16 bits": "16-bit", GROUPS: "int4", "int4, groups of 128 (AWQ)": "int4", BLOCKS: "FP8 blocks", FP8: "FP8",
    "quantized in groups of 64 (mlx_lm.convert -q)": "4-bit", "f32, f16, bf16": "f16",
    "q4_0, q4_1, q5_0, q5_1, q8_0": "q4_0 to q8_0",
}  # fmt: skip
"""Names of formats in the table of `inspect --deploy`; the others are short already."""
QUANTIZE = f"{LLAMA_CPP}/src/llama-quant.cpp"
FORMS = [
    Form("vllm", "16 bits"),
    Form(
        "vllm", GROUPS, 128, "no", "groups must be whole",
        f"{VLLM}/vllm/model_executor/kernels/linear/mixed_precision/marlin.py",
    ),
    Form(
        "vllm", BLOCKS, 128, "no", "blocks must be whole",
        f"{VLLM}/vllm/model_executor/layers/quantization/utils/fp8_utils.py",
    ),
    Form(
        "vllm", FP8, 16, "partly", "the CUTLASS kernel pads such layers",
        f"{VLLM}/vllm/model_executor/kernels/linear/scaled_mm/cutlass.py",
    ),
    Form("tensorrt-llm", "16 bits"),
    Form(
        "tensorrt-llm", "int4, groups of 128 (AWQ)", 128, "no", "groups must be whole",
        ENGINES["tensorrt-llm"].splits,
    ),
    Form("sglang", "16 bits"),
    Form(
        "sglang", GROUPS, 128, "no", "groups must be whole",
        f"{SGLANG}/layers/quantization/gptq/schemes/gptq_linear.py",
    ),
    Form(
        "sglang", BLOCKS, 128, "no", "blocks must be whole",
        f"{SGLANG}/layers/quantization/fp8.py",
    ),
    Form(
        "sglang", FP8, 16, "unknown", "the CUTLASS kernel skips such layers; the fallback was not looked up",
        f"{SGLANG}/layers/quantization/fp8_utils.py",
    ),
    Form("mlx", "16 bits"),
    Form(
        "mlx", "quantized in groups of 64 (mlx_lm.convert -q)", 64, "partly",
        "such layers stay in 16 bits; --q-group-size 32 supports more sizes", f"{MLX}/utils.py",
    ),
    Form("llama.cpp", "f32, f16, bf16"),
    Form("llama.cpp", "q4_0, q4_1, q5_0, q5_1, q8_0", BLOCK, "partly", "such tensors become f16", QUANTIZE),
    Form(
        "llama.cpp", "k-quants", K_BLOCK, "partly",
        "such tensors fall back: q4_K to q5_0, q5_K to q5_1, q6_K to q8_0, q2_K and q3_K to q4_0", QUANTIZE,
    ),
    Form("llama.cpp", "i-quants", K_BLOCK, "partly", "such tensors fall back to iq4_nl", QUANTIZE),
]  # fmt: skip
"""In the order in which they are shown."""

Y, B, F, N, U, A = "yes", "backend", "fixed", "no", "unknown", "autodeploy"
SUPPORT = {
    "arcee": (B, U, Y, N, Y),
    "bloom": (F, U, N, N, F),
    "codegen": (N, U, N, N, N),
    "cohere": (Y, U, Y, Y, Y),
    "cohere2": (Y, Y, Y, Y, Y),
    "deepseek_v2": (Y, U, Y, Y, Y),
    "deepseek_v3": (Y, U, Y, Y, Y),
    "ernie4_5": (Y, U, B, Y, Y),
    "exaone4": (Y, Y, Y, Y, Y),
    "falcon": (F, U, N, N, F),
    "gemma": (Y, U, Y, Y, Y),
    "gemma2": (Y, U, Y, Y, Y),
    "gemma3": (Y, Y, Y, Y, Y),
    "gemma3_text": (Y, Y, Y, Y, Y),
    "glm": (B, U, B, U, Y),
    "glm4": (Y, U, Y, Y, Y),
    "glm4_moe": (Y, U, Y, Y, Y),
    "gpt2": (Y, U, Y, F, F),
    "gpt_bigcode": (B, U, Y, Y, F),
    "gpt_neox": (B, U, B, F, Y),
    "gptj": (Y, U, Y, F, N),
    "granite": (Y, A, Y, Y, Y),
    "helium": (B, U, B, Y, N),
    "hunyuan_v1_dense": (B, Y, Y, Y, Y),
    "internvl": (Y, U, U, N, Y),
    "llama": (Y, Y, Y, Y, Y),
    "llava": (Y, U, Y, Y, Y),
    "ministral": (B, U, B, N, N),
    "ministral3": (Y, U, Y, Y, Y),
    "mistral": (Y, Y, Y, Y, Y),
    "mistral3": (Y, U, Y, Y, Y),
    "mixtral": (Y, Y, Y, Y, Y),
    "nemotron": (Y, Y, B, Y, Y),
    "olmo": (B, U, Y, N, Y),
    "olmo2": (B, U, Y, Y, Y),
    "olmo3": (B, A, B, Y, Y),
    "olmoe": (Y, U, Y, Y, Y),
    "opt": (Y, U, Y, N, N),
    "phi": (B, U, F, Y, F),
    "phi3": (Y, Y, Y, Y, Y),
    "qwen2": (Y, Y, Y, Y, Y),
    "qwen2_5_vl": (Y, U, Y, Y, Y),
    "qwen2_moe": (Y, Y, Y, Y, Y),
    "qwen2_vl": (Y, Y, Y, Y, Y),
    "qwen3": (Y, Y, Y, Y, Y),
    "qwen3_moe": (Y, Y, Y, Y, Y),
    "qwen3_vl": (Y, U, Y, Y, Y),
    "seed_oss": (B, Y, B, Y, Y),
    "smollm3": (B, A, B, Y, Y),
    "smolvlm": (Y, U, U, N, Y),
    "stablelm": (Y, U, Y, Y, Y),
    "starcoder2": (B, Y, Y, Y, Y),
}
"""Of every model type, how each of `ENGINES` in their order runs it.

`yes` with a model of its own, `backend` by its Transformers backend, `autodeploy` by TensorRT-LLM's AutoDeploy as its
list of models says, `fixed` with a model that takes the MLP to be four times the hidden size, `no`, or `unknown`.
"""

MIXTURES = ("deepseek_v2", "deepseek_v3", "glm4_moe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""Whose experts other kernels run; those were not looked up."""

THETA, SHARE, FAILS = "rope_theta", "partial_rotary_factor", "fails"
Value = float | int | str
KEYS: dict[str, dict[str, dict[str, Value]]] = {
    "mlx": {
        "cohere": {THETA: 8e6}, "cohere2": {THETA: 5e4, "sliding_window_pattern": 4}, "deepseek_v2": {THETA: 1e4},
        "deepseek_v3": {THETA: 1e4}, "ernie4_5": {THETA: FAILS},
        "exaone4": {THETA: FAILS, "rope_scaling": FAILS, "head_dim": FAILS}, "gemma": {THETA: 1e4},
        "gemma2": {THETA: 1e4},
        "gemma3_text": {THETA: 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
        "glm4": {THETA: FAILS, SHARE: FAILS}, "glm4_moe": {THETA: FAILS, "rope_scaling": FAILS, SHARE: FAILS},
        "gpt2": {"n_ctx": FAILS}, "granite": {THETA: FAILS},
        "gpt_neox": {"rotary_emb_base": FAILS, "rotary_pct": FAILS},
        "helium": {THETA: FAILS}, "hunyuan_v1_dense": {THETA: 1e4}, "llama": {THETA: 1e4},
        "llava": {"hidden_size": FAILS, "num_hidden_layers": FAILS, "num_attention_heads": FAILS},
        "mistral": {THETA: 1e4}, "mixtral": {THETA: 1e6}, "nemotron": {THETA: 1e4, SHARE: 0.5}, "olmo2": {THETA: 1e4},
        "olmo3": {THETA: FAILS}, "olmoe": {THETA: 1e4}, "phi": {THETA: 1e4, SHARE: 0.4},
        "phi3": {THETA: 1e4, SHARE: 1.0}, "qwen2": {THETA: 1e6, "tie_word_embeddings": True},
        "qwen2_5_vl": {THETA: 1e6, "tie_word_embeddings": True}, "qwen2_moe": {THETA: 1e6},
        "qwen2_vl": {THETA: 1e6, "tie_word_embeddings": True},
        "qwen3": {"tie_word_embeddings": FAILS, "head_dim": FAILS},
        "qwen3_moe": {THETA: FAILS, "num_experts": FAILS},
        "qwen3_vl": {"tie_word_embeddings": FAILS, "head_dim": FAILS}, "seed_oss": {THETA: 1e4},
        "smollm3": {THETA: 1e4}, "stablelm": {THETA: FAILS, SHARE: FAILS}, "starcoder2": {THETA: 1e5},
    },
    "llama.cpp": {
        "cohere2": {"rotary_pct": FAILS}, "gpt2": {"n_ctx": FAILS}, "gpt_neox": {"rotary_pct": 0.25},
        "internvl": {"architectures": FAILS},
    },
}  # fmt: skip
"""What engines read in `config.json`, and take where it is not there, if they do not fail.

Transformers 5 writes these into `rope_parameters`, by other names, or not at all. Models with images are read by the
row of their text model as well, in its section.
"""


def shown(value: Value) -> str:
    """Return a value of `KEYS` as it is told."""
    return str(value).lower() if isinstance(value, bool | str) else f"{value:g}"
