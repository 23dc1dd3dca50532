"""Llama with an MLP width for every layer, in the layout of NVIDIA's Nemotron-NAS, for transformers.

This file is saved with such checkpoints, beside the two that it imports.
"""

from transformers import LlamaForCausalLM, LlamaModel

from .configuration_deci import DeciConfig
from .modeling_pruned import MixedWidths


class DeciModel(MixedWidths, LlamaModel):
    """The decoder alone."""

    config_class = DeciConfig
    base_name = "DeciModel"


class DeciLMForCausalLM(MixedWidths, LlamaForCausalLM):
    """The language model."""

    config_class = DeciConfig
    base_name = "DeciModel"


DeciModel.register_for_auto_class("AutoModel")  # type: ignore[no-untyped-call]
DeciLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")  # type: ignore[no-untyped-call]
