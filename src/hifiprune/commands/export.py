"""`export`: check, convert by llama.cpp's own converter, read the file back."""

import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from hifiprune.config.export import ExportConfig
from hifiprune.config.groups import STOCK
from hifiprune.deployment.engines import BLOCK, K_BLOCK
from hifiprune.deployment.gguf_widths import cut_padding, differing_architecture, write_padded
from hifiprune.deployment.llama_cpp import find_converter, find_quantizer, run
from hifiprune.errors import RunError, UserError, unknown
from hifiprune.io.atomic import check_space, replacing
from hifiprune.io.manifest import GENERATOR, GGUF_FIELD
from hifiprune.io.output_paths import check_target, exclusive
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.detect import family_of
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.lineage import read_with
from hifiprune.models.mlp import count_parameters, find_mlps
from hifiprune.models.unsupported import refuse_own_tokenizer
from hifiprune.progress import logger
from hifiprune.version import __version__

FORMATS = ("gguf", "onnx")
DOWN, EXPERTS = re.compile(r"\.ffn_down(_exps|_shexp)?\.weight$"), re.compile(r"\.ffn_down_exps\.")
"""What GGUF files call output projections."""
ONNX = (
    "ONNX files are made by optimum-onnx, whose latest release (0.1.0) wants transformers below 4.58, and this "
    "checkpoint is of transformers 5; until a release takes that, export to GGUF with --to gguf"
)


@dataclass(frozen=True)
class Kind:
    """A type of GGUF tensors.

    Attributes:
        bits: of a weight, at most, all tensors taken together.
        block: weights that share a scale: rows are a multiple of it, or are kept in a larger type.
        quantized: whether llama.cpp's quantizer makes it, from what the converter wrote.
    """

    bits: float
    block: int = 1
    quantized: bool = False


TYPES = {
    "auto": Kind(16.0),
    "f32": Kind(32.0),
    "f16": Kind(16.0),
    "bf16": Kind(16.0),
    "q8_0": Kind(8.5, BLOCK),
    **{name: Kind(8.5, BLOCK, True) for name in ("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")},
    **{
        name: Kind(8.5, K_BLOCK, True)
        for name in (
            "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_xs",
        )
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExportResults:
    """The file that was made, its size, its tensors by type, and remarks."""

    model: str
    output: str
    format: str
    type: str
    bytes: int
    tensors: dict[str, int]
    converter: str
    seconds: float
    remarks: list[str]


@exclusive
def export(model: str, output: str | Path, config: ExportConfig = ExportConfig()) -> ExportResults:
    """Write a checkpoint as one GGUF file, for llama.cpp and what is built on it.

    Args:
        model: local folder or hub id.
        output: the file to make.
        config: options.

    Raises:
        UserError: the format or type is not known, the model cannot be held by GGUF, or there is no converter.
        RunError: the converter failed, what it wrote does not fit the model, or the disk is full.
    """
    if config.to not in FORMATS:
        raise unknown("format", config.to, FORMATS)
    if config.to == "onnx":
        raise UserError(ONNX)
    wanted = config.type.lower()
    if wanted not in TYPES:
        raise unknown("type", config.type, TYPES)
    checkpoint, kind = find_checkpoint(model), TYPES[wanted]
    refuse_own_tokenizer(model, checkpoint.folder)
    read = [*read_with(checkpoint), config.converter]
    target = check_target(output, folder=False, overwrite=config.overwrite, inputs=read)
    parameters, widths, hidden = _sizes(checkpoint)
    architecture = _differing(checkpoint)
    command = find_converter(config.converter)
    quantizer = find_quantizer(command, wanted) if kind.quantized else None
    check_space(target, int(parameters * (kind.bits + 16 * kind.quantized) / 8))
    remarks = _remarks(wanted, {"MLP width": gcd(*widths) if architecture else min(widths), "hidden size": hidden})
    for remark in remarks:
        logger.info(remark)
    checkpoint.fetch()
    logger.info(f"Converting by {command[-1]}.")
    start = time.monotonic()
    with replacing(target, overwrite=config.overwrite) as new:
        made, stated = new.with_name("made.gguf"), "auto" if quantizer else wanted
        maker = new.with_name("metadata.json")
        maker.write_text(json.dumps({GGUF_FIELD: f"{GENERATOR} {__version__}"}), encoding="utf-8")
        words = ["--outfile", str(made), "--metadata", str(maker), "--outtype", stated]
        source = checkpoint.folder
        if architecture:
            write_padded(checkpoint, source := new.with_name("padded"))
        run([*command, str(source), *words], "converting")
        remarks += _check(made, [max(widths)] if architecture else sorted({*widths}))
        if architecture:
            made.rename(padded := new.with_name("padded.gguf"))
            cut_padding(padded, made, architecture, widths)
        if quantizer:
            run([*quantizer, str(made), str(new), wanted.upper()], "quantizing")
            made.unlink()
        else:
            made.rename(new)
        tensors = Counter(tensor.tensor_type.name for tensor in _opened(new).tensors)
    return ExportResults(
        model=model,
        output=str(target),
        format=config.to,
        type=wanted,
        bytes=target.stat().st_size,
        tensors=dict(tensors.most_common()),
        converter=command[-1],
        seconds=time.monotonic() - start,
        remarks=remarks,
    )


def _sizes(checkpoint: Checkpoint) -> tuple[int, list[int], int]:
    """Return parameters, the widths of all MLPs and the hidden size of a model.

    Raises:
        UserError: it is GGUF already.
    """
    if checkpoint.gguf:
        raise UserError(f"{checkpoint.name} is a GGUF file already; llama-quantize changes its type")
    config, skeleton = checkpoint.config(), checkpoint.skeleton()
    widths = [mlp.neurons for mlp in find_mlps(skeleton)]
    return count_parameters(skeleton), widths, config.get_text_config().hidden_size


def _differing(checkpoint: Checkpoint) -> str | None:
    """Return the architecture that a model whose layers differ in width gets; None where they are alike.

    Raises:
        UserError: llama.cpp has none for it.
    """
    config = checkpoint.config()
    if checkpoint.layout == STOCK:
        return None
    if not family_of(config).width:
        raise UserError(
            f"{checkpoint.name} loads with code of its own, which llama.cpp's converter does not know: the "
            f"configuration of a {config.model_type} model has no place for a width"
        )
    try:
        return differing_architecture(config)
    except UserError as error:
        raise UserError(f"{checkpoint.name} cannot be a GGUF file: {error}") from error


def _remarks(wanted: str, sizes: dict[str, int]) -> list[str]:
    """Return what a type cannot do for a model, before the work starts."""
    block = TYPES[wanted].block
    return [
        f"The {what} {size:,} is no multiple of {block}, as {wanted} wants it: the tensors with such rows are kept in "
        f"a larger type." + f" A cut with --round-to {block} avoids that." * (what == "MLP width")
        for what, size in sizes.items()
        if size % block
    ]


def _opened(path: Path, mode: Any = "r") -> GGUFReader:
    """Open a GGUF file; return its header and tensors.

    Raises:
        RunError: it is none.
    """
    try:
        return GGUFReader(path, mode)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise RunError(
            f"the converter wrote no readable GGUF file ({error}); try another version of llama.cpp"
        ) from error


def _check(path: Path, widths: list[int]) -> list[str]:
    """Compare what was written with the model, and put a width right that the converter took for the dense family's.

    Raises:
        RunError: the MLPs are not as wide as the model's.
    """
    reader = _opened(path, "r+")
    found = {int(tensor.shape[0]) for tensor in reader.tensors if DOWN.search(tensor.name)}
    field = next((field for name, field in reader.fields.items() if name.endswith(".feed_forward_length")), None)
    stated = field.contents() if field else None
    wanted = " and ".join(map(str, widths))
    if found != {*widths} or field is None or not isinstance(stated, int):
        raise RunError(
            f"the converter wrote MLPs of width {sorted(found)}, stated as {stated}, not {wanted}: it does not know "
            "this model; try another version of llama.cpp"
        )
    if stated == widths[0] or len(widths) > 1 or EXPERTS.search(" ".join(tensor.name for tensor in reader.tensors)):
        return []  # experts' widths are stated by names of their own
    field.parts[field.data[0]][0] = widths[0]  # the file is mapped into memory: this writes to it
    return [f"The converter stated the width of the dense family, {stated:,}; {widths[0]:,} stands there now."]
