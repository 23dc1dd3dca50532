"""LoRA adapters on the plain projections of decoder blocks; experts' stacked matrices have none."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import transformers_weight_conversion
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hifiprune.config.recover import TrainingConfig
from hifiprune.errors import UserError, unknown
from hifiprune.models.detect import family_of
from hifiprune.models.mlp import find_blocks


def with_adapter(model: PreTrainedModel, training: TrainingConfig) -> PeftModel:
    """Put an adapter on the projections that are to be trained, and freeze all else."""
    with warnings.catch_warnings(), _names_as_given():
        warnings.simplefilter("ignore", FutureWarning)  # about how peft calls transformers
        return get_peft_model(model, _settings(model, training))


def check_adapter(model: PreTrainedModel, training: TrainingConfig, *, kept: bool) -> None:
    """Refuse an adapter for projections that are not there, or one to be kept that peft would load elsewhere.

    Args:
        model: the model or its skeleton.
        training: which projections the adapter is for, if there is one.
        kept: whether it is written too.

    Raises:
        UserError: it is such.
    """
    if training.method != "lora":
        return
    settings = _settings(model, training)
    transformers_weight_conversion.convert_peft_config_for_transformers(settings, model, None)
    if kept and settings.target_parameters:
        raise UserError(
            f"peft loads no adapter for gate_proj, up_proj or down_proj of a {model.config.model_type} model: it takes "
            "these for the experts' own; leave out --keep-adapter (the output has what was learned anyway), or name "
            "other projections, such as --target-modules q_proj"
        )


def _settings(model: PreTrainedModel, training: TrainingConfig) -> LoraConfig:
    sides = {path: min(linear.weight.shape) for path, linear in linears_of(model)}
    paths = {path: path.rpartition(".")[2] for path in sides}
    for name in training.target_modules:
        if name not in paths.values():
            raise unknown("target module", name, sorted({*paths.values()}))
    most = max(side for path, side in sides.items() if paths[path] in (training.target_modules or (paths[path],)))
    limit = max(most, TrainingConfig.lora_r)  # the default is for any model
    if training.lora_r > limit:
        raise UserError(
            f"lora-r {training.lora_r} must be at most {limit}; the smaller side of the largest projection is {most}"
        )
    return LoraConfig(
        r=training.lora_r,
        lora_alpha=training.lora_alpha,
        lora_dropout=training.lora_dropout,
        target_modules=[path for path, name in paths.items() if name in (training.target_modules or (name,))],
        bias="none",
        task_type="CAUSAL_LM",
    )


@contextmanager
def _names_as_given() -> Iterator[None]:
    """Have peft take the names of projections as they are.

    So that adapters made with transformers 4 still load, it takes `gate_proj`, `up_proj` and `down_proj` of some model
    types for projections of experts, which are no modules any more, and would train their stacked matrices in place of
    the projections that were named.
    """
    with patch.object(transformers_weight_conversion, "convert_peft_config_for_transformers"):
        yield


def linears_of(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """Yield path and module of each projection in the decoder blocks."""
    for name, module in find_blocks(model).named_modules(prefix=family_of(model.config).blocks):
        if isinstance(module, (nn.Linear, Conv1D)):
            yield name, module
