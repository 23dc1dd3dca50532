"""One tiny random configuration of every supported family, and the variants that a family can have."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 257

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-bias": {"mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 8},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}


def tiny_config(variant: str, **options: object) -> PretrainedConfig:
    """The configuration of a variant."""
    config: PretrainedConfig = AutoConfig.for_model(
        variant.split("-", maxsplit=1)[0], **{**SIZES, **VARIANTS.get(variant, {}), **options}
    )
    return config


def tiny_model(variant: str, dtype: torch.dtype = torch.float64, seed: int = 0, **options: object) -> PreTrainedModel:
    """A random model of a variant, with random biases and norms too, so that none of them is neutral."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(variant, **options), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tiny_tokens(windows: int = 3, positions: int = 11, vocabulary: int = 61) -> torch.Tensor:
    return torch.randint(vocabulary, (windows, positions), generator=torch.Generator().manual_seed(1))
