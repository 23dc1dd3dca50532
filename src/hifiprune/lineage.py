"""Where a checkpoint came from, as the `run.json` beside it tells."""

import json
from typing import Any

from hifiprune.checkpoint import Checkpoint, find_checkpoint
from hifiprune.errors import UserError


def record_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The run that made a checkpoint, if it was one of ours."""
    path = checkpoint.folder / "run.json"
    try:
        facts = json.loads(path.read_text()) if path.is_file() and not checkpoint.gguf else None
    except ValueError:
        return None
    ours = isinstance(facts, dict) and str(facts.get("format", "")).startswith("hifiprune-run")
    return facts if ours else None


def pruning_of(facts: dict[str, Any] | None) -> dict[str, Any] | None:
    """The run that pruned, of a run or the one that it went on from."""
    while facts and facts.get("command") == "recover":
        facts = facts.get("results", {}).get("pruning")
    return facts if facts and facts.get("command") == "prune" else None


def dense_of(facts: dict[str, Any] | None) -> str | None:
    """What a checkpoint was pruned from, by the record of its run."""
    pruning = pruning_of(facts) or {}
    name = pruning.get("arguments", {}).get("model")
    return str(name) if name else None


def check_origin(name: str, teacher: str | None, model_hash: str) -> None:
    """Refuse a dense model that is where the pruned one's record says, but is another.

    Raises:
        UserError: its weights are not those that were pruned, and it was not named as the teacher.
    """
    facts = pruning_of(record_of(find_checkpoint(name))) or {}
    pruned = facts.get("results", {}).get("model_hash")
    if teacher is None and pruned and pruned != model_hash:
        raise UserError(
            f"the model at {dense_of(facts)} is not the one that {name} was pruned from: its weights differ; give "
            "--teacher"
        )
