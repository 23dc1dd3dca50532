"""Causal language models whose MLPs differ in width from layer to layer, as pruning leaves them.

This file is saved with such checkpoints and needs nothing but transformers. `config.mlp_widths` holds the widths in
layer order; everything else is the architecture's own.
"""

from typing import Any

from torch import nn
from transformers import (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
)


class MixedWidths(PreTrainedModel):
    """Gives every MLP the width that the configuration states for its layer."""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        for layer, width in zip(self.model.layers, config.mlp_widths, strict=True):
            mlp = layer.mlp
            hidden, bias = mlp.down_proj.out_features, mlp.down_proj.bias is not None
            mlp.gate_proj = nn.Linear(hidden, width, bias=mlp.gate_proj.bias is not None)
            mlp.up_proj = nn.Linear(hidden, width, bias=mlp.up_proj.bias is not None)
            mlp.down_proj = nn.Linear(width, hidden, bias=bias)
            mlp.intermediate_size = width
        self.post_init()  # type: ignore[no-untyped-call]


class PrunedGemma2ForCausalLM(MixedWidths, Gemma2ForCausalLM):
    """Gemma 2."""


class PrunedGemma3ForCausalLM(MixedWidths, Gemma3ForCausalLM):
    """Gemma 3, text."""


class PrunedLlamaForCausalLM(MixedWidths, LlamaForCausalLM):
    """LLaMA and what shares its architecture."""


class PrunedMistralForCausalLM(MixedWidths, MistralForCausalLM):
    """Mistral."""


class PrunedOlmo2ForCausalLM(MixedWidths, Olmo2ForCausalLM):
    """OLMo 2."""


class PrunedQwen2ForCausalLM(MixedWidths, Qwen2ForCausalLM):
    """Qwen 2."""


class PrunedQwen3ForCausalLM(MixedWidths, Qwen3ForCausalLM):
    """Qwen 3."""


class PrunedSmolLM3ForCausalLM(MixedWidths, SmolLM3ForCausalLM):
    """SmolLM3."""


for _pruned in MixedWidths.__subclasses__():
    # saves this file with the weights
    _pruned.register_for_auto_class("AutoModelForCausalLM")  # type: ignore[no-untyped-call]


def pruned_class(model_class: type[PreTrainedModel], *, mixed: bool) -> type[PreTrainedModel]:
    """The class of the same architecture whose MLPs differ in width, or the stock one.

    Raises:
        NotImplementedError: there is none.
    """
    if mixed == issubclass(model_class, MixedWidths):
        return model_class
    if not mixed:
        return next(base for base in model_class.__bases__ if base is not MixedWidths)
    for each in MixedWidths.__subclasses__():
        if model_class in each.__bases__:
            return each
    raise NotImplementedError(f"{model_class.__name__} has no form whose MLPs differ in width")
