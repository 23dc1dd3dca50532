"""The options of `export`."""

from dataclasses import dataclass

from hifiprune.config.groups import overwrite_option
from hifiprune.config.options import Checked, option


@dataclass(frozen=True)
class ExportConfig(Checked):
    """Options of `export`."""

    to: str = option("gguf", "Format: gguf, one file for llama.cpp and programs built on it.")
    type: str = option(
        "auto",
        "Number type of the weights: f32, f16, bf16, q8_0, or auto for 16 bits; q4_0, q4_k_m and others by "
        "llama-quantize.",
    )
    converter: str | None = option(
        None,
        "Folder of llama.cpp, or its converter.",
        metavar="PATH",
        shown_default="what LLAMA_CPP or the PATH names",
    )
    overwrite: bool = overwrite_option()
