"""Causal language models whose MLP width differs from layer to layer, as pruning makes them.

This file is saved with such checkpoints and needs only transformers. `config.mlp_widths` holds the widths in layer
order, `config.mlp_maps` the paths of the projections of that width; everything else is the architecture's own, whose
class `X`, causal or base model, is available here as `PrunedX`.
"""

from functools import cache
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

PREFIX = "Pruned"
MAPS = ["model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"]


class MixedWidths(PreTrainedModel):
    """Gives every MLP the width that the configuration states for its layer."""

    mixed_widths = True
    base_name = ""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any):
        overrides = config.to_dict().get("per_layer_config")
        if overrides:  # or transformers warns of every width that is read
            config.per_layer_config = None
        super().__init__(config, *args, **kwargs)
        whole = self.base_model is not self
        paths = getattr(config, "mlp_maps", MAPS)
        *inputs, output = (path if whole else path.removeprefix(f"{self.base_model_prefix}.") for path in paths)
        for layer, width in enumerate(config.mlp_widths):
            last = self.get_submodule(output.format(layer))
            dense = _sizes(last)[1]
            for path in inputs:
                module = self.get_submodule(path.format(layer))
                outputs, hidden = _sizes(module)
                _resize(module, outputs // dense * width, hidden)
            _resize(last, _sizes(last)[0], width)
        self.post_init()  # type: ignore[no-untyped-call]
        if overrides:
            config.per_layer_config = overrides

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save by the names that this class loads, and without mention of code that is not saved with it."""
        self.__dict__.pop("_weight_conversions", None)
        base = self.base_name or PREFIX + type(self.base_model).__name__.removeprefix(PREFIX)
        self.config.auto_map = {"AutoModel": f"{type(self).__module__.rpartition('.')[2]}.{base}"}
        super().save_pretrained(*args, **kwargs)


def _sizes(module: Any) -> tuple[int, int]:
    """Return outputs and inputs of a projection; the weight of a Conv1D is transposed."""
    first, second = module.weight.shape
    return (first, second) if isinstance(module, nn.Linear) else (second, first)


def _resize(module: Any, outputs: int, inputs: int) -> None:
    """Replace the parameters by empty ones of another shape."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features, shape = outputs, inputs, (outputs, inputs)
    else:
        module.nf, module.nx, shape = outputs, inputs, (inputs, outputs)
    module._is_hf_initialized = False
    module.weight = nn.Parameter(module.weight.new_empty(shape))
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.new_zeros(outputs))


def __getattr__(name: str) -> Any:
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if stock is None:
        raise AttributeError(name)
    return pruned_class(stock, mixed=True)


def pruned_class(model_class: type[PreTrainedModel], *, mixed: bool) -> type[PreTrainedModel]:
    """Return the class of the same architecture with MLPs of different widths, or the stock class."""
    if issubclass(model_class, MixedWidths) if mixed else not hasattr(model_class, "mixed_widths"):
        return model_class
    stock: Any = next(each for each in model_class.__mro__ if each.__module__.startswith("transformers."))
    found: type[PreTrainedModel] = _mixed(stock) if mixed else stock
    return found


@cache
def _mixed(stock: Any) -> Any:
    """Return a class that saves this file with its weights."""
    made: Any = type(PREFIX + stock.__name__, (MixedWidths, stock), {"__module__": __name__, "__doc__": stock.__doc__})
    made.register_for_auto_class("AutoModelForCausalLM" if hasattr(stock, "generate") else "AutoModel")
    return made
