"""What to run next: commands that can be pasted into a shell and work on what is there."""

import shlex
import sys
from collections.abc import Collection, Sequence
from itertools import count, product
from pathlib import Path
from shutil import which
from typing import Any

from hifiprune.commands.inspect import shape_of
from hifiprune.config.groups import Budget
from hifiprune.errors import HifipruneError
from hifiprune.io.atomic import local_path
from hifiprune.io.hub import split_revision
from hifiprune.io.text_sources import PYTHON_DOCS, SELF
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.progress import console

NAME = "hifiprune"
ROUNDINGS = (128, 64, 32, 8, 1)
FEW_WINDOWS, SHORT = 32, 512
"""Windows, and tokens of each, of Python's documentation, which every Python has."""
YOURS = (
    "On text of a kind that matters to you it tells more: name a file, a folder or a data set instead of python-docs."
)


def next_step(*words: object) -> None:
    """Tell which of our commands to run next."""
    command = shlex.join([*program(), *map(str, words)])
    console().print(f"Next: {command}", highlight=False, soft_wrap=True, markup=False)
    if PYTHON_DOCS in words:
        console().print(YOURS, highlight=False, soft_wrap=True)


def program() -> list[str]:
    """Return the words that start this program: its name, or how it was started where a shell does not find that."""
    started = sys.argv[0]
    if which(NAME) or Path(started).name == started:
        return [NAME]
    return [started] if Path(started).stem == NAME else [sys.executable, "-m", NAME]


def next_is_without_dry_run() -> None:
    """Tell the command of this process without what made it a trial."""
    next_step(*(word for word in sys.argv[1:] if word != "--dry-run"))


def next_is_pruning(
    model: str,
    *,
    ratio: float = 0.2,
    round_to: int | None = None,
    scores: object = None,
    calibration: dict[str, Any] | None = None,
    more: Sequence[object] = (),
) -> None:
    """Tell how to prune a model.

    Args:
        model: what the user called it.
        ratio: fraction of all parameters to remove, or less where that cannot be.
        round_to: rounding of the width; if not given, the default or what a small model can take.
        scores: file of scores that were made before.
        calibration: of an earlier run, to be used again; Python's documentation without it, unless there are scores.
        more: further words.
    """
    source = calibration_flags(calibration)
    if scores:
        source = ["--scores", scores, *source]
    elif not source:
        length = min(SHORT, _positions(model))
        source = [
            "--calibration",
            PYTHON_DOCS,
            "--sampler",
            "stream",
            "--num-samples",
            FEW_WINDOWS,
            "--seq-len",
            length,
        ]
    cut = cut_flags(model, ratio, (round_to,) if round_to else ROUNDINGS)
    if cut:
        next_step("prune", model, *source, *cut, *more, "--output", free_name("smaller"))
    else:
        next_step("inspect", model)


def next_is_measuring(model: Path, dense: str | None, sources: Collection[str] = ()) -> None:
    """Tell how to measure a checkpoint on text that it was not calibrated on, or else which engines take it.

    Args:
        model: the checkpoint.
        dense: what it was made from.
        sources: of the text that it was calibrated on.
    """
    if PYTHON_DOCS in sources:
        next_step("inspect", model, "--deploy")
        return
    against = ["--against", dense] if dense and is_there(dense) else []
    length = ["--seq-len", min(SHORT, _positions(str(model)))]
    next_step("evaluate", model, *against, "--text", PYTHON_DOCS, *length, "--max-windows", FEW_WINDOWS, "--card")


def next_is_showing(models: list[str], output: str | Path | None, *, card: bool) -> None:
    """Tell what to do with what was measured: a page of it, or to the hub with the card that holds it."""
    if output:
        made = [name for name in models if (local_path(name) / "run.json").is_file()]
        next_step("report", *made, output, "--output", free_name("report", ".html"))
    elif card:
        next_step("push", models[0], f"OWNER/{Path(models[0]).resolve().name}")


def free_name(name: str, ending: str = "") -> str:
    """Return a name that nothing in the working directory has."""
    names = (f"{name}{'' if number == 1 else f'-{number}'}{ending}" for number in count(1))
    return next(found for found in names if not Path(found).exists())


def sources_of(calibration: dict[str, Any] | None) -> list[str]:
    """Return all sources of a calibration's text."""
    return [calibration["source"], *(source for source, _ in calibration["mixed"])] if calibration else []


def calibration_flags(calibration: dict[str, Any] | None) -> list[object]:
    """Return the flags of a calibration whose text can be read again."""
    if not calibration:
        return []
    mixed = [f"{source}:{share:g}" for source, share in calibration["mixed"]]
    read = (*sources_of(calibration), calibration.get("prompts") or SELF)
    if any(source != SELF and source.startswith(("-", "/dev/", "/proc/")) for source in read):
        return []
    flags: list[object] = [word for source in (calibration["source"], *mixed) for word in ("--calibration", source)]
    for name in ("prompts", "num_samples", "seq_len", "seed", "sampler", "text_column"):
        if calibration.get(name) not in (None, 0, "auto"):
            flags += [f"--{name.replace('_', '-')}", calibration[name]]
    return flags


def _positions(model: str) -> int:
    """Return the longest window that a model reads."""
    if not local_path(model).exists():  # on the hub, which is not asked
        return SHORT
    longest = getattr(find_checkpoint(model).config().get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 1 else SHORT


def cut_flags(model: str, ratio: float = 0.2, roundings: Sequence[int] = ROUNDINGS) -> list[object]:
    """Return the flags of the cut nearest to a ratio that a model can take, by the first rounding that allows one."""
    default = roundings[0] == ROUNDINGS[0]
    if not local_path(model).exists():  # on the hub, which is not asked
        return ["--ratio", ratio, *([] if default else ["--round-to", roundings[0]])]
    shape = shape_of(find_checkpoint(model).skeleton())
    for share, round_to in product((ratio, 1.5 * ratio, 2 * ratio, ratio / 2, ratio / 4, ratio / 10), roundings):
        try:
            width = shape.width_at(Budget(ratio=share), round_to)
            shape.check_experts("uniform", width)
        except HifipruneError:
            continue
        if width < shape.neurons:
            return ["--ratio", f"{share:g}", *([] if round_to == ROUNDINGS[0] else ["--round-to", round_to])]
    return []


def is_there(model: str) -> bool:
    """Return whether a name still leads to a model, as far as this disk can tell."""
    path = local_path(model)
    return path.exists() or (not path.is_absolute() and split_revision(model)[0].count("/") <= 1)
