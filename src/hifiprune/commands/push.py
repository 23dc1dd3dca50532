"""`push`: check a checkpoint's folder, show what would be uploaded, upload it."""

import json
import os
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from hifiprune.errors import RunError, UserError
from hifiprune.io.atomic import disk_size
from hifiprune.io.manifest import MANIFEST, list_files
from hifiprune.models.companion_files import has_vocabulary
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.weight_files import INDEX, SINGLE, check_whole, refuse_pointers
from hifiprune.progress import logger
from hifiprune.reports.card_metadata import CARD, read_card
from hifiprune.reports.model_card import for_repository, is_measured


@dataclass(frozen=True)
class PushResults:
    """Files with their sizes, what the card lacks, and whether they were uploaded."""

    repository: str
    files: dict[str, int]
    remarks: list[str]
    uploaded: bool


def push(folder: str, repository: str, *, private: bool = False, upload: bool = False) -> PushResults:
    """Upload a checkpoint's folder to the hub; without `upload` only tell what would be.

    Args:
        folder: of the checkpoint.
        repository: its name on the hub, `owner/name`.
        private: whether only its owner sees it, where it is new.
        upload: do it.

    Raises:
        UserError: the folder is no whole checkpoint, the name is none of a repository, or there is no login.
        RunError: the hub refused or could not be reached.
    """
    checkpoint = find_checkpoint(folder)
    if checkpoint.on_hub or checkpoint.gguf:
        raise UserError(f"{folder} is no folder on this disk; push what prune or recover wrote")
    lacking = [file.name for file in checkpoint.weight_files if not file.is_file()]
    if lacking:
        raise UserError(f"{folder} lacks {', '.join(lacking)}; push a whole checkpoint")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"'{repository}' is no name of a repository: {error}") from error
    root = Path(checkpoint.folder)
    files = _uploadable(root)
    _check_contents(root, files)
    checkpoint.check_files()
    card = read_card(root)
    remarks = [f"there is no readable {CARD}"] if card is None else []
    remarks += [] if has_vocabulary(root) else ["there is no tokenizer"]
    if card and not card.data.get("license"):
        remarks.append(f"{CARD} names no licence: take over that of the base model")
    if card and not is_measured(card):
        remarks.append("nothing was measured: hifiprune evaluate --card puts results into the card")
    if upload:
        logger.info(f"Uploading {len(files)} files, {disk_size(sum(files.values()))}, to {repository}.")
        try:
            api = HfApi(token=True)  # or a missing login would be called a refusal
            api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                folder_path=root,
                repo_id=repository,
                commit_message="Pruned by hifiprune",
                allow_patterns=[escape(name) for name in files],
                ignore_patterns=[CARD],
            )
            if card:
                content = for_repository(card, repository).encode()
                api.upload_file(path_or_fileobj=content, path_in_repo=CARD, repo_id=repository)
        except LocalTokenNotFoundError as error:
            raise UserError("there is no login for the hub: run hf auth login, set HF_TOKEN or give --token") from error
        except HfHubHTTPError as error:
            raise RunError(f"the hub refused {repository}: {error.server_message or error}") from error
        except Exception as error:  # whatever the hub's library raises of the network
            raise RunError(f"the hub could not be reached: {type(error).__name__}: {error}") from error
    return PushResults(repository, files, remarks, upload)


def _uploadable(root: Path) -> dict[str, int]:
    """Return all files of a folder but hifiprune's mark, with their sizes, in order.

    Raises:
        UserError: some are hidden, lead out of the folder, or are no files that can be read.
    """
    files: dict[str, int] = {}
    refused = []
    for name in list_files(root):
        path = root / name
        if name == MANIFEST:
            continue
        if why := _unfit(root, path):
            refused.append(f"{name} ({why})")
        else:
            files[name] = path.stat().st_size
    if refused:
        raise UserError(f"{root} holds what is never uploaded: {', '.join(refused)}; move it away first")
    return files


def _unfit(root: Path, path: Path) -> str:
    """Return why a file is not uploaded, if it is not."""
    real, real_root = path.resolve(), root.resolve()
    if not real.is_relative_to(real_root):
        return "a link out of the folder"
    if any(part.startswith(".") for part in (*path.relative_to(root).parts, *real.relative_to(real_root).parts)):
        return "hidden"
    if not path.is_file():
        return "no file"
    return "" if os.access(path, os.R_OK) else "not readable"


def _check_contents(root: Path, files: dict[str, int]) -> None:
    """Refuse files that nobody could read: pointers of git-lfs, broken JSON, weights cut short, weights twice.

    Raises:
        UserError: one is such a file.
    """
    if SINGLE in files and INDEX in files:
        raise UserError(f"{root} holds weights twice: {SINGLE}, and the shards of {INDEX}; remove those that are old")
    refuse_pointers(str(root), (root / name for name in files))
    for path in (root / name for name in files):
        if path.suffix == ".safetensors":
            check_whole(str(root), path)
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is truncated or damaged ({error}); copy it again") from error
