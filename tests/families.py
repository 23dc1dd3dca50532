"""One tiny random configuration of every supported family, and the variants that a family can have.

Run as a program it prints the table of families for the documentation, and their names for the README.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from hifiprune.models.detect import family_of
from hifiprune.models.families import FAMILIES

VOCABULARY = 257

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
WIDTH = 40
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
HEADS: dict[str, Any] = {**GROUPED, "head_dim": 8}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 40, "num_experts_per_tok": 2, "n_shared_experts": 2}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
}  # fmt: skip

MULTIMODAL: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]}
EYES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 2, "num_heads": 2,
    "intermediate_size": 20, "embed_dim": 24, "image_size": 28, "patch_size": 14, "out_hidden_size": 24, "head_dim": 12,
    "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
}  # fmt: skip
"""Sizes of what vision-language models see with, by the names that each of them knows."""
IMAGE = 1000
"""The token that stands for a part of an image: none of the vocabulary."""

VARIANTS: dict[str, dict[str, Any]] = {
    "internvl": HEADS,
    "llama": HEADS,
    "llama-tied": {**HEADS, "tie_word_embeddings": True},
    "llama-bias": {**HEADS, "mlp_bias": True, "attention_bias": True},
    "arcee": {**HEADS, "mlp_bias": True},
    "bloom": {"hidden_size": 10, "num_attention_heads": 2},
    "codegen": {"rotary_dim": 4},
    "cohere": {**GROUPED, "logit_scale": 0.5},
    "cohere2": {**HEADS, "sliding_window": 5, "logit_scale": 0.5},
    "deepseek_v2": {**LATENT, **EXPERTS, "n_routed_experts": 5, "first_k_dense_replace": 1, "intermediate_size": 56},
    "deepseek_v3": {
        **LATENT,
        **EXPERTS,
        "n_routed_experts": 6,
        "n_group": 3,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "num_mtp_layers": 0,
    },
    "ernie4_5": {**HEADS, "use_bias": True},
    "exaone4": {**GROUPED, "sliding_window": 5},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-alibi": {"alibi": True, "parallel_attn": False, "bias": True, "multi_query": False},
    "falcon-multi": {},
    "gemma": HEADS,
    "gemma2": {**HEADS, "sliding_window": 5, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma3": {**HEADS, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "gemma3_text": {**HEADS, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "glm": HEADS,
    "glm4": HEADS,
    "glm4_moe": {**HEADS, **EXPERTS, "n_routed_experts": 5, "first_k_dense_replace": 1, "num_mtp_layers": 0},
    "gpt2": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "gpt_bigcode": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "gpt_neox": {},
    "gpt_neox-serial": {"use_parallel_residual": False},
    "gptj": {"rotary_dim": 4},
    "granite": {**GROUPED, "residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "helium": {**GROUPED, "head_dim": 6},
    "hunyuan_v1_dense": HEADS,
    "ministral": {**HEADS, "sliding_window": 5},
    "ministral3": HEADS,
    "mistral": {**HEADS, "sliding_window": 5},
    "llava": HEADS,
    "mistral3": HEADS,
    "mixtral": {**GROUPED, **EXPERTS, "num_local_experts": 5},
    "nemotron": {**HEADS, "mlp_bias": True},
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": {**GROUPED, "sliding_window": 5},
    "olmoe": {**GROUPED, **EXPERTS, "num_experts": 5},
    "opt": {"word_embed_proj_dim": 24, "init_std": 0.3, "dropout": 0},
    "phi": {
        **GROUPED,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.67},
    },
    "phi3": GROUPED,
    "qwen2": {**HEADS, "use_sliding_window": False},
    "qwen2_5_vl": {**GROUPED, "rope_parameters": MULTIMODAL},
    "qwen2_vl": {**GROUPED, "rope_parameters": MULTIMODAL},
    "qwen3": HEADS,
    "qwen2_moe": {
        **GROUPED,
        **EXPERTS,
        "num_experts": 5,
        "shared_expert_intermediate_size": 60,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {**HEADS, **EXPERTS, "num_experts": 5, "norm_topk_prob": True, "decoder_sparse_step": 2},
    "seed_oss": HEADS,
    "qwen3_vl": {**HEADS, "rope_parameters": MULTIMODAL},
    "smolvlm": HEADS,
    "smollm3": {**HEADS, "no_rope_layers": [1, 0, 1]},
    "stablelm": {**GROUPED, "use_parallel_residual": True},
    "stablelm-serial": {**GROUPED, "use_parallel_residual": False, "qk_layernorm": True},
    "starcoder2": {**GROUPED, "use_bias": True},
}
FORMS = [
    "llama", "llama-tied", "llama-bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "smollm3",
    "falcon", "gpt2", "opt", "phi3",
]  # fmt: skip
"""Of every form of MLP and block one or more, for tests that take their time."""
ROUTED = ["mixtral", "deepseek_v2", "qwen2_moe"]
"""Those with experts: nothing else, plain blocks too, an MLP that they share."""
LAYOUTS = [*FORMS, *ROUTED, "qwen2_vl"]
"""Every way that blocks, MLPs and models are laid out."""
TYPED = ["llama", "gemma2", "falcon", "gpt2", "opt", "phi3", "mixtral", "deepseek_v2", "qwen2_vl"]
"""One of each form of block and MLP, for runs that check types and shapes at every call."""
MIXED = [name for name in VARIANTS if not FAMILIES[name.split("-", maxsplit=1)[0]].one_width_reason]
"""Those whose MLPs may differ in width: experts may not."""


def family_name(variant: str) -> str:
    return variant.split("-", maxsplit=1)[0]


def tiny_config(variant: str, **options: object) -> PretrainedConfig:
    """The configuration of a variant."""
    name = family_name(variant)
    family = FAMILIES[name]
    width = {family.width: options.pop("intermediate_size", WIDTH)} if family.width else {}
    sizes = {**SIZES, **width, **VARIANTS[variant], **options}
    if not family.takes_images:
        config: PretrainedConfig = AutoConfig.for_model(name, **sizes)
        return config
    plain: Any = AutoConfig.for_model(name)
    eyes = EYES | {"model_type": plain.vision_config.model_type}
    if isinstance(plain.vision_config.image_size if hasattr(plain.vision_config, "image_size") else 0, (list, tuple)):
        eyes |= {"image_size": [28, 28], "patch_size": [14, 14]}
    sizes["model_type"] = plain.get_text_config().model_type
    whole = {key: sizes.pop(key) for key in ("dtype",) if key in sizes}
    known = [key for key in ("image_token_id", "image_token_index", "video_token_id") if hasattr(plain, key)]
    seeing: PretrainedConfig = AutoConfig.for_model(
        name, text_config=sizes, vision_config=eyes, tie_word_embeddings=False, **whole, **dict.fromkeys(known, IMAGE)
    )
    return seeing


def load(path: Path | str, **how: Any) -> Any:
    """A checkpoint by transformers alone, whatever kind of language model it is."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    takes_images = family_of(config).takes_images
    return (AutoModelForImageTextToText if takes_images else AutoModelForCausalLM).from_pretrained(path, **how)


_MODELS: dict[str, tuple[PreTrainedModel, torch.Tensor]] = {}
"""Every tiny model that was made, with the state of the random numbers after it."""


def tiny_model(variant: str, dtype: torch.dtype = torch.float64, seed: int = 0, **options: object) -> PreTrainedModel:
    """A copy of a random model of a variant, with random biases and norms too, so that none of them is neutral."""
    key = repr((variant, dtype, seed, sorted(options.items())))
    if key not in _MODELS:
        _MODELS[key] = _random_model(variant, dtype, seed, options), torch.get_rng_state()
    model, chance = _MODELS[key]
    torch.set_rng_state(chance)
    return copy.deepcopy(model)


def _random_model(variant: str, dtype: torch.dtype, seed: int, options: dict[str, object]) -> PreTrainedModel:
    torch.manual_seed(seed)
    family = FAMILIES[family_name(variant)]
    eager = {"experts_implementation": "eager"} if family.experts else {}
    made: Any = AutoModelForImageTextToText if family.takes_images else AutoModelForCausalLM
    model: PreTrainedModel = made.from_config(tiny_config(variant, **options), dtype=dtype, **eager).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # of routers
                buffer.add_(0.2 * torch.randn_like(buffer))
    return model


def tiny_tokens(windows: int = 3, positions: int = 11, vocabulary: int = 61) -> torch.Tensor:
    return torch.randint(vocabulary, (windows, positions), generator=torch.Generator().manual_seed(1))


def table() -> str:
    """The supported families, as Markdown."""
    lines = ["| model type | models | MLPs in a block | input projections | output projection | plain residual add |"]
    lines.append("|---|---|---|---|---|---|")
    for name, family in sorted(FAMILIES.items()):
        mlps = "experts" + " and a shared MLP" * bool(family.shared) if family.experts else "one"
        inputs = " and ".join(f"`{each}`" for each in dict.fromkeys(family.inputs))
        fused = " (gate and up fused)" * (len(family.inputs) != len({*family.inputs}))
        straight = "yes" if family.additive else "no"
        lines.append(f"| `{name}` | {family.models} | {mlps} | {inputs}{fused} | `{family.output}` | {straight} |")
    return "\n".join(lines)


def names() -> str:
    """The models of all families, in one line."""
    return ", ".join(family.models for _, family in sorted(FAMILIES.items()))


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n\n{names()}\n")
