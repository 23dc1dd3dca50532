"""The origin of a checkpoint, from the `run.json` beside it."""

from pathlib import Path
from typing import Any

from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path
from hifiprune.io.hub import at_commit
from hifiprune.io.json_files import checked, read_text
from hifiprune.io.schemas import Lineage
from hifiprune.models.checkpoint import Checkpoint, find_checkpoint

MARK = '"hifiprune-run-'
"""Marks the `run.json` of hifiprune; those of other tools are ignored."""


def record_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the record of the run that made a checkpoint, if it was one of ours.

    Raises:
        UserError: the record cannot be read, or was changed.
    """
    path = checkpoint.folder / "run.json"
    text = "" if checkpoint.gguf or not path.is_file() else read_text(path)
    facts: dict[str, Any] | None = checked(text, Lineage, str(path)) if MARK in text else None
    return facts


def pruning_of(facts: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the record of the pruning run: the given run, or the one that it continued from."""
    while facts and facts["command"] == "recover":
        facts = facts["results"].get("pruning")
    return facts if facts and facts["command"] == "prune" else None


def dense_of(facts: dict[str, Any] | None) -> str | None:
    """Return the dense model that a checkpoint was pruned from, by the record of its run, at the commit it had."""
    pruning = pruning_of(facts)
    return at_commit(pruning["arguments"]["model"], pruning) if pruning else None


def commits_of(*checkpoints: Checkpoint | None) -> dict[str, str]:
    """Return the commit of each checkpoint that is from the hub, by its name."""
    return {found.name: found.commit for found in checkpoints if found and found.commit}


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
    facts = pruning_of(record_of(find_checkpoint(name)))
    pruned = facts["results"].get("model_hash") if facts else None
    if teacher is None and pruned and pruned != model_hash:
        raise UserError(
            f"the model at {dense_of(facts)} is not the one that {name} was pruned from: its weights differ; give "
            "--teacher"
        )
