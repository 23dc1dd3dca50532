"""What every pass over a model checks and protects: its windows, its memory, its modes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hifiprune.bounds import COUNT, check_number
from hifiprune.errors import RunError, UserError


def check_windows(model: PreTrainedModel, windows: Tensor, batch_size: int, least: int = 1) -> None:
    """Refuse token windows that `model` cannot be run on, or of fewer than `least` positions.

    Raises:
        UserError: the shape, dtype, length or token ids are wrong, or the batch size is.
    """
    config = model.config.get_text_config()
    if windows.ndim != 2 or windows.numel() == 0 or windows.is_floating_point():
        found = f"{windows.dtype} {list(windows.shape)}"
        raise UserError(f"windows must be integer token ids [windows, positions], not {found}")
    longest = getattr(config, "max_position_embeddings", None) or windows.shape[1]
    if not least <= windows.shape[1] <= longest:
        raise UserError(f"windows must have {least} to {longest} positions, not {windows.shape[1]}")
    low, high = int(windows.min()), int(windows.max())
    if not 0 <= low <= high < config.vocab_size:
        raise UserError(f"token ids must lie in 0 to {config.vocab_size - 1}; found {low} to {high}")
    check_number("batch-size", batch_size, COUNT)


def check_vocabulary(largest: int, vocabulary: int) -> None:
    """Refuse text that a tokenizer writes with tokens that the model does not have.

    Args:
        largest: largest token id of the text.
        vocabulary: how many tokens the model has.

    Raises:
        UserError: it is beyond the vocabulary.
    """
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer writes token {largest} where the model's vocabulary has {vocabulary}; give the model its "
            "own tokenizer, or text without special tokens that were added later"
        )


def check_names(names: Sequence[str]) -> None:
    """Refuse models that are named twice.

    Raises:
        UserError: one is.
    """
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UserError(f"{', '.join(twice)} would be measured twice; name each model once")


@contextmanager
def memory_explained(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Turn a device that is out of memory into one message."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"not enough memory on {model.device} for {tokens} tokens at once; use a smaller --batch-size or "
            "--seq-len, --dtype bfloat16, or --recompute where it is offered"
        ) from error


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without weight gradients within this context; both are restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()
        for module, mode in modes.items():
            module.training = mode
