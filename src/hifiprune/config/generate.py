"""The options of `generate`."""

from dataclasses import dataclass

from hifiprune.bounds import COUNT, NOT_NEGATIVE, SEED
from hifiprune.config.groups import ComputeConfig
from hifiprune.config.options import Checked, group, option


@dataclass(frozen=True)
class GenerateConfig(Checked):
    """Options of `generate`."""

    prompt: str = option(help="Text to continue, or question to a chat model.")
    against: str | None = option(
        None, "Model to compare with, such as the dense one: local folder, hub id or .gguf file.", metavar="MODEL"
    )
    max_new_tokens: int = option(64, "Most tokens to generate; a model may end before.", bounds=COUNT)
    temperature: float = option(0.0, "Sampling temperature; 0 for the likeliest token each time.", bounds=NOT_NEGATIVE)
    seed: int = option(0, "Seed of sampling, the same for both models.", bounds=SEED)
    chat: bool = option(
        True, "Write the prompt by the tokenizer's chat template, where it has one, or as it is.", flag="--chat/--plain"
    )
    compute: ComputeConfig = group(ComputeConfig(), only=("device", "dtype", "attention"))
