"""Configuration of models in the layout of NVIDIA's Nemotron-NAS: Llama with an MLP width for every layer.

This file is saved with such checkpoints and needs only transformers; vLLM, SGLang and TensorRT-LLM read it too, and
bring the model's code themselves.
"""

from collections.abc import Sequence
from typing import Any

from transformers import LlamaConfig

MULTIPLE = 256
"""Engines round widths up to a multiple of it."""


class Part(dict[str, Any]):
    """A part of `block_configs`: its keys are attributes, as engines read them, and it is a dictionary in files."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciConfig(LlamaConfig):
    """Llama's configuration with `block_configs`, of which each states its MLP's width by `ffn_mult`."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Sequence[dict[str, Any]] = (), per_layer_config: Any = None, **kwargs: Any):
        self.block_configs = [Part({name: Part(part) for name, part in block.items()}) for block in block_configs]
        super().__init__(**kwargs)
        if per_layer_config:  # last, or transformers warns of every width that it checks
            self.per_layer_config = per_layer_config

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "num_key_value_heads" and isinstance(value, list):  # TensorRT-LLM states one a layer
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)  # type: ignore[no-untyped-call]

    @property
    def mlp_widths(self) -> list[int]:
        """Return the MLP widths in layer order."""
        return [width_of(block.ffn.ffn_mult, self.hidden_size) for block in self.block_configs]


DeciConfig.register_for_auto_class()  # type: ignore[no-untyped-call]


def width_of(ffn_mult: float, hidden_size: int) -> int:
    """Return the width that engines compute."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // MULTIPLE) * MULTIPLE
