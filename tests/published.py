"""Configurations as publishers ship them, with the keys of their day, and tiny models that have them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from hifiprune.models.detect import family_of

WIDTH = 64
NAMES = {"_name_or_path": "team/base-model", "transformers_version": "4.46.0", "team_notes": {"zeta": 1, "alpha": None}}
ROPE: dict[str, Any] = {"rope_scaling": None, "rope_theta": 1000000.0}
PLAIN: dict[str, Any] = {
    "vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "initializer_range": 0.3, "hidden_act": "silu", "rms_norm_eps": 1e-05,
    "intermediate_size": WIDTH, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": True,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "norm_topk_prob": True}
IMAGE, VIDEO = 250, 251
QWEN_TOKENS = {
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16, "q_lora_rank": 12, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_routed_experts": 4, "ep_size": 1,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "mistral3": {
        "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": IMAGE, "model_type": "mistral3",
        "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
        "text_config": {
            **PLAIN, "head_dim": 32, "model_type": "mistral", "rope_theta": 1000000000.0, "sliding_window": None,
        },
        "torch_dtype": "float32",
        "vision_config": {
            "attention_dropout": 0.0, "head_dim": 16, "hidden_act": "silu", "hidden_size": 32, "image_size": 56,
            "initializer_range": 0.02, "intermediate_size": WIDTH, "model_type": "pixtral", "num_attention_heads": 2,
            "num_channels": 3, "num_hidden_layers": 1, "patch_size": 14, "rope_theta": 10000.0,
        },
        "vision_feature_layer": -1,
    },
    "internvl": {
        "architectures": ["InternVLForConditionalGeneration"], "downsample_ratio": 0.5, "image_seq_length": 4,
        "image_token_id": IMAGE, "model_type": "internvl", "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["Qwen2ForCausalLM"], **PLAIN, "max_window_layers": 70, "model_type": "qwen2",
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}, "rope_theta": 1000000.0,
            "sliding_window": None, "torch_dtype": "float32", "use_sliding_window": False,
        },
        "torch_dtype": "float32",
        "vision_config": {
            "architectures": ["InternVisionModel"], "attention_bias": True, "hidden_act": "gelu", "hidden_size": 32,
            "image_size": [28, 28], "intermediate_size": WIDTH, "layer_scale_init_value": 0.1,
            "model_type": "internvl_vision", "num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 1,
            "patch_size": [14, 14], "use_mask_token": False,
        },
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
    },
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 252, "eoi_token_index": 253,
        "eos_token_id": [1, 106], "image_token_index": IMAGE, "initializer_range": 0.02, "mm_tokens_per_image": 4,
        "model_type": "gemma3",
        "text_config": {
            **{key: value for key, value in PLAIN.items() if key not in ("hidden_act", "use_cache")}, "head_dim": 32,
            "hidden_activation": "gelu_pytorch_tanh", "model_type": "gemma3_text", "num_hidden_layers": 6,
            "query_pre_attn_scalar": 32, "rope_local_base_freq": 20000.0, "rope_theta": 500000.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 8, "sliding_window_pattern": 6,
        },
        "torch_dtype": "float32",
        "vision_config": {
            "hidden_size": 32, "image_size": 56, "intermediate_size": WIDTH, "model_type": "siglip_vision_model",
            "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 14, "vision_use_head": False,
        },
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"], **PLAIN, "attn_logit_softcapping": None,
        "cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "model_type": "gemma3_text", "num_hidden_layers": 6, "query_pre_attn_scalar": 32,
        "rope_local_base_freq": 20000, "rope_scaling": None, "rope_theta": 500000, "sliding_window": 8,
        "sliding_window_pattern": 6, "torch_dtype": "float32",
    },
    "qwen2_vl": {
        "architectures": ["Qwen2VLForConditionalGeneration"], **PLAIN, **QWEN_TOKENS, "vision_token_id": 254,
        "max_window_layers": 2, "model_type": "qwen2_vl", "rope_theta": 500000.0, "sliding_window": 128,
        "tie_word_embeddings": True, "torch_dtype": "float32", "use_sliding_window": False,
        "vision_config": {
            "depth": 1, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "in_chans": 3, "hidden_size": 64,
            "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    },
    "qwen2_5_vl": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], **PLAIN, **QWEN_TOKENS, "vision_token_id": 254,
        "max_window_layers": 2, "model_type": "qwen2_5_vl", "rope_theta": 500000.0, "sliding_window": 128,
        "tie_word_embeddings": False, "torch_dtype": "float32", "use_sliding_window": False,
        "vision_config": {
            "depth": 1, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": WIDTH, "num_heads": 2,
            "in_chans": 3, "out_hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
            "window_size": 112, "fullatt_block_indexes": [0], "tokens_per_second": 2, "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    },
    "qwen3_vl": {
        "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": IMAGE, "model_type": "qwen3_vl",
        "text_config": {
            **PLAIN, "attention_bias": False, "dtype": "float32", "head_dim": 32, "model_type": "qwen3_vl_text",
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
            "rope_theta": 5000000, "tie_word_embeddings": True,
        },
        "tie_word_embeddings": True, "video_token_id": VIDEO,
        "vision_config": {
            "deepstack_visual_indexes": [0], "depth": 1, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32,
            "in_channels": 3, "initializer_range": 0.02, "intermediate_size": WIDTH, "model_type": "qwen3_vl",
            "num_heads": 2, "num_position_embeddings": 16, "out_hidden_size": 64, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        "vision_end_token_id": 253, "vision_start_token_id": 252,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, **PLAIN, **EXPERTS, "intermediate_size": 96,
        "decoder_sparse_step": 1, "head_dim": 32, "max_window_layers": 2, "mlp_only_layers": [],
        "model_type": "qwen3_moe", "num_experts": 4, "output_router_logits": False, **ROPE,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "float32",
        "use_sliding_window": False,
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_multiplier": 0.0625, **PLAIN,
        "embedding_multiplier": 12.0, "logits_scaling": 8.0, "mlp_bias": False, "model_type": "granite",
        "residual_multiplier": 0.22, "rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": True,
        "torch_dtype": "float32",
    },
    "granitemoehybrid": {
        "architectures": ["GraniteMoeHybridForCausalLM"], "attention_bias": False, "attention_multiplier": 0.0625,
        **PLAIN, "embedding_multiplier": 12, "init_method": "mup", "layer_types": ["attention", "attention"],
        "logits_scaling": 10, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 32,
        "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 4, "mamba_proj_bias": False,
        "model_type": "granitemoehybrid", "normalization_function": "rmsnorm", "num_experts_per_tok": 0,
        "num_local_experts": 0, "output_router_logits": False, "pad_token_id": 0, "position_embedding_type": "rope",
        "residual_multiplier": 0.22, "rope_scaling": None, "rope_theta": 10000000, "router_aux_loss_coef": 0.01,
        "shared_intermediate_size": WIDTH, "tie_word_embeddings": True, "torch_dtype": "float32",
    },
    "cohere2": {
        "architectures": ["Cohere2ForCausalLM"], "attention_bias": False,
        **{key: value for key, value in PLAIN.items() if key != "rms_norm_eps"}, "cache_implementation": "hybrid",
        "head_dim": 16, "layer_norm_eps": 1e-05, "layer_switch": 4, "logit_scale": 0.25, "model_type": "cohere2",
        "num_hidden_layers": 4, "order_of_interleaved_layers": "local_attn_first", "pad_token_id": 0,
        "position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 60000, "rotary_pct": 1.0,
        "sliding_window": 8, "sliding_window_pattern": 4, "torch_dtype": "float32", "use_embedding_sharing": True,
        "use_gated_activation": True, "use_parallel_block": True, "use_parallel_embedding": True,
    },
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "aux_loss_alpha": 0.001, **PLAIN, **LATENT,
        **EXPERTS, "model_type": "deepseek_v2", "n_group": 1, "n_shared_experts": 2, "norm_topk_prob": False,
        "pretraining_tp": 1, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "float32",
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, **PLAIN, **LATENT, **EXPERTS,
        "model_type": "deepseek_v3", "n_group": 2, "n_shared_experts": 1, "num_nextn_predict_layers": 1,
        "pretraining_tp": 1, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
        "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "float32",
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"], **PLAIN, "attention_bias": False, "embd_pdrop": 0.0,
        "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "model_type": "phi3",
        "original_max_position_embeddings": 64, "pad_token_id": 0, "partial_rotary_factor": 0.75, "resid_pdrop": 0.0,
        "rope_scaling": None, "rope_theta": 50000.0, "sliding_window": 100, "tie_word_embeddings": True,
        "torch_dtype": "float32",
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, **PLAIN, "head_dim": 16, "mlp_bias": False,
        "model_type": "llama", "pretraining_tp": 1,
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
    },
}  # fmt: skip
"""Small ones with the keys, places and spellings of well-known repositories."""
UNTIED = ("mistral3", "internvl")
"""Those whose files hold a head of its own, which transformers 5 ties by default."""
FILES = {"gemma3": {"vision_tower.": "vision_tower.vision_model."}}
"""What published files call tensors that transformers 5 writes by other names."""
WIDTHS: dict[str, dict[str, float]] = {
    **{name: {"intermediate_size": 0.75} for name in PUBLISHED},
    **{name: {"text_config.intermediate_size": 0.75} for name in ("mistral3", "internvl", "gemma3", "qwen3_vl")},
    "granitemoehybrid": {"intermediate_size": 0.75, "shared_intermediate_size": 0.75},
    "qwen3_moe": {"moe_intermediate_size": 0.75},
    "deepseek_v2": {"intermediate_size": 0.75, "moe_intermediate_size": 0.75},
    "deepseek_v3": {"intermediate_size": 0.75, "moe_intermediate_size": 0.75, "num_nextn_predict_layers": 0},
}
"""What a cut to three quarters of the neurons changes in each: by which factor."""


def publish(folder: Path, facts: dict[str, Any]) -> Path:
    """Write a random model with a published configuration, in the files' names of its time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(facts))
    config = AutoConfig.from_pretrained(folder)
    if facts["model_type"] in UNTIED:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    torch.manual_seed(0)
    made: Any = AutoModelForImageTextToText if family_of(config).takes_images else AutoModelForCausalLM
    model: PreTrainedModel = made.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for before, after in FILES.get(facts["model_type"], {}).items():
        tensors = load_file(folder / "model.safetensors")
        renamed = {name.replace(before, after, 1): values for name, values in tensors.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(facts, indent=4, ensure_ascii=False))
    return folder


def as_published(facts: dict[str, Any], top: bool = True) -> dict[str, Any]:
    """Turn what transformers 5 writes into what its forerunners wrote, with more keys and in another order."""
    old = {key: as_published(each, top=False) if isinstance(each, dict) else each for key, each in facts.items()}
    rope = facts.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        del old["rope_parameters"]
        parts = {"full_attention": rope, **rope} if "full_attention" not in rope else rope
        whole, sliding = dict(parts["full_attention"]), parts.get("sliding_attention")
        base, share = ("rotary_emb_base", "rotary_pct") if facts["model_type"] == "gpt_neox" else (
            "rope_theta", "partial_rotary_factor",
        )  # fmt: skip
        old[base] = whole.pop("rope_theta")
        if "partial_rotary_factor" in whole:
            old[share] = whole.pop("partial_rotary_factor")
        if sliding:
            old["rope_local_base_freq"] = sliding["rope_theta"]
        if whole != {"rope_type": "default"}:
            old["rope_scaling"] = whole
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    return dict(reversed({**old, **NAMES}.items())) if top else dict(reversed(old.items()))


def flat(facts: Any, path: str = "") -> dict[str, Any]:
    """Every value of a configuration by its path, in the file's order."""
    if not isinstance(facts, dict) or not facts:
        return {path: facts}
    start = f"{path}." if path else ""
    return {key: value for name, each in facts.items() for key, value in flat(each, start + name).items()}
