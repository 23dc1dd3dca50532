"""The options of `demo`."""

from dataclasses import dataclass

from hifiprune.bounds import COUNT, PAIR
from hifiprune.config.groups import ComputeConfig, overwrite_option
from hifiprune.config.options import Checked, group, option


@dataclass(frozen=True)
class DemoConfig(Checked):
    """Options of `demo`."""

    model: str | None = option(
        None,
        "Model to prune: local folder, hub id or .gguf file.",
        metavar="MODEL",
        shown_default="SmolLM2-135M-Instruct",
    )
    num_samples: int = option(24, "Number of calibration windows.", bounds=COUNT)
    seq_len: int = option(512, "Tokens per window.", bounds=PAIR)
    compute: ComputeConfig = group(ComputeConfig(), only=("device",))
    overwrite: bool = overwrite_option()
