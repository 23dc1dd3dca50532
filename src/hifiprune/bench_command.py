"""The command that times: `bench`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from hifiprune.options import AsJson, Attention, Debug, Device, Dtype, Overwrite, numbers
from hifiprune.terminal import show, voice


def bench(
    dense: Annotated[str, Argument(metavar="DENSE", help="The dense model: local folder, hub id or .gguf file.")],
    pruned: Annotated[list[str], Argument(metavar="PRUNED...", help="Those to compare with it.")],
    batch_sizes: Annotated[str, Option(help="Sequences at once, separated by commas.")] = "1",
    lengths: Annotated[str, Option(help="Tokens that are read, separated by commas.")] = "512",
    new_tokens: Annotated[int, Option(help="Tokens that are written after.")] = 64,
    rounds: Annotated[int, Option(help="How often every model has its turn, in a fresh process.")] = 3,
    repeats: Annotated[int, Option(help="Of each timing in a turn; their median counts.")] = 3,
    compiled: Annotated[bool, Option("--compile", help="Time torch.compile too.")] = False,
    output: Annotated[Path | None, Option(help="Folder to keep the results in.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Time reading and writing of pruned models beside the dense one, and what of the promised gain was reached."""
    import hifiprune as hp
    from hifiprune import printing

    record = hp.bench(
        dense,
        pruned,
        batch_sizes=numbers("batch sizes", batch_sizes),
        lengths=numbers("lengths", lengths),
        new_tokens=new_tokens,
        rounds=rounds,
        repeats=repeats,
        compiled=compiled,
        output=output,
        overwrite=overwrite,
        compute=hp.Compute(device, dtype, attention=attention),
        voice=voice(),
    )
    show(record.to_dict(), as_json, lambda: printing.benched(record))
