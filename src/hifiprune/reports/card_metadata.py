"""Read the metadata that a model card inherits from the base model, validated, since its files may hold anything.

Only hub ids, licence ids, language codes and pipeline tags are used: no text of a base model becomes our markup.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path
from hifiprune.io.hub import split_revision
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.progress import note

CARD, TAG = "README.md", "hifiprune"
LARGEST = 4_000_000
"""Largest model card that is read, in bytes."""
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")
"""A model's id in the path of its files in the hub's cache."""
UNSAFE = re.compile(r"[^\w ./:+@=,()-]")
"""Characters that could be markup in a name."""


def read_card(folder: Path) -> ModelCard | None:
    """Read the card in a folder; None if there is none or it cannot be read."""
    path = folder / CARD
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return None
        return ModelCard(path.read_text(encoding="utf-8-sig"), ignore_metadata_errors=True)
    except Exception:  # noqa: BLE001 - whatever the parsers raise of a file that may hold anything
        return None


def ours(card: ModelCard) -> bool:
    """Return whether a card belongs to a checkpoint that hifiprune made."""
    tags = card.data.get("tags")
    return isinstance(tags, list) and TAG in tags


def plain(text: str) -> str:
    """Return a foreign name in one line, without characters that could be markup."""
    return UNSAFE.sub("", " ".join(text.split()))[:96]


def called(name: str) -> str:
    """Return a model's display name: its hub id, or the last part of its path."""
    cached = CACHED.search(name)
    if cached:
        return plain("/".join(cached.groups()))
    hub_id = split_revision(name)[0]
    on_hub = is_hub_id(hub_id) and not local_path(name).exists()
    return plain(hub_id if on_hub else Path(name).name) or "a model"


def is_hub_id(value: Any) -> bool:
    """Return whether a value is a hub id."""
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True


def base_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the metadata that outputs of a checkpoint inherit, and remark once on what cannot be used.

    Args:
        checkpoint: the base model, whose card may be missing, broken or hostile.
    """
    if checkpoint.gguf:
        return {}
    card = read_card(checkpoint.folder)
    stated = {key: value for key in VALID if card and (value := card.data.get(key)) is not None}
    usable = {key: value for key, value in stated.items() if _all_are(VALID[key], value)}
    if card is None and (checkpoint.folder / CARD).exists():
        note(
            f"{CARD} of {checkpoint.name} cannot be read as a model card: licence, language and base model are not "
            "taken over from it."
        )
    elif usable.keys() != stated.keys():
        names = ", ".join(sorted(stated.keys() - usable.keys()))
        note(f"{CARD} of {checkpoint.name} states what is no valid {names}: not taken over into the output's card.")
    return usable | _origin(checkpoint, usable.get("base_model"))


def _origin(checkpoint: Checkpoint, stated: Any) -> dict[str, Any]:
    """Return the hub id of the base model, or of the model that it was made from."""
    cached = CACHED.search(str(checkpoint.folder))
    if checkpoint.on_hub or cached:
        hub_id = split_revision(checkpoint.name)[0]
        return {"base_model": "/".join(cached.groups()) if cached and not checkpoint.on_hub else hub_id}
    origin = stated or _name_or_path(checkpoint)
    return {"base_model": origin} if origin else {}


def _name_or_path(checkpoint: Checkpoint) -> str | None:
    """Return the origin that transformers noted in `config.json`, if it is a hub id."""
    try:
        name: Any = checkpoint.stated.get("_name_or_path")
    except UserError:  # which whoever reads the model tells
        return None
    return name if isinstance(name, str) and is_hub_id(name) and "/" in name and not local_path(name).exists() else None


def _all_are(valid: Callable[[str], object], value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return 0 < len(values) <= 200 and all(isinstance(each, str) and valid(each) for each in values)


def _matching(pattern: str) -> Callable[[str], object]:
    return re.compile(pattern).fullmatch


VALID: dict[str, Callable[[str], object]] = {
    "license": _matching(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}"),
    "license_name": _matching(r"[A-Za-z0-9][\w .,+()-]{0,95}"),
    "license_link": _matching(r"(https?://)?[A-Za-z0-9][\w.~/%#?&=+-]{0,500}"),
    "language": _matching(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual"),
    "pipeline_tag": _matching(r"[a-z0-9]+(-[a-z0-9]+){0,9}"),
    "base_model": is_hub_id,
}
"""Metadata that a card inherits from its base's card, with the check of each."""
