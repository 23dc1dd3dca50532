"""The origin of a checkpoint, from the `run.json` beside it."""

import json
from pathlib import Path
from typing import Any

from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path
from hifiprune.io.hub import at_revision
from hifiprune.io.json_files import checked, read_text
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.records import Lineage, PruneRun, RecoverRun

MARK = '"hifiprune-run-'
"""Marks the `run.json` of hifiprune; those of other tools are ignored."""


def record_of(checkpoint: Checkpoint) -> PruneRun | RecoverRun | None:
    """Return the record of the run that made a checkpoint, if it was one of ours.

    Raises:
        UserError: the record cannot be read, or was changed.
    """
    text = _record_text(checkpoint)
    record: PruneRun | RecoverRun | None = checked(text, Lineage, str(checkpoint.folder / "run.json")) if text else None
    return record


def plain_record_of(checkpoint: Checkpoint) -> Any:
    """Return the same as its JSON has it, with everything that is not read."""
    text = _record_text(checkpoint)
    return json.loads(text) if text else None


def _record_text(checkpoint: Checkpoint) -> str:
    """Return the record of the run that made a checkpoint as text; nothing if it was none of ours."""
    path = checkpoint.folder / "run.json"
    text = "" if checkpoint.gguf or not path.is_file() else read_text(path)
    return text if MARK in text else ""


def pruning_of(run: object) -> PruneRun | None:
    """Return the record of the pruning run: the given run, or the one that it continued from."""
    while isinstance(run, RecoverRun):
        run = run.results.pruning
    return run if isinstance(run, PruneRun) else None


def dense_of(run: object) -> str | None:
    """Return the dense model that a checkpoint was pruned from, by the record of its run, at the commit it had."""
    pruning = pruning_of(run)
    if pruning is None:
        return None
    return at_revision(pruning.arguments.model, pruning.commits.get(pruning.arguments.model))


def commits_of(*checkpoints: Checkpoint | None) -> dict[str, str]:
    """Return the commit of each checkpoint that is from the hub, by its name."""
    return {one.name: one.commit for one in checkpoints if one and one.commit}


def read_with(checkpoint: Checkpoint) -> list[Path]:
    """Return the paths that a run on a checkpoint depends on: its files, and the dense model that its record names."""
    try:
        dense = dense_of(record_of(checkpoint))
    except UserError:  # which other commands tell, that need the record
        dense = None
    path = local_path(dense) if dense else None
    return [checkpoint.path, *([path] if path and (path.is_file() or (path / "config.json").is_file()) else [])]


def check_origin(name: str, teacher: str | None, model_hash: str) -> None:
    """Refuse a dense model at the recorded path whose weights are not those that were pruned.

    Raises:
        UserError: its weights are not those that were pruned, and it was not named as the teacher.
    """
    pruning = pruning_of(record_of(find_checkpoint(name)))
    if teacher is None and pruning and pruning.results.model_hash != model_hash:
        raise UserError(
            f"the model at {dense_of(pruning)} is not the one that {name} was pruned from: its weights differ; "
            "give --teacher"
        )
