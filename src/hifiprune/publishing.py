"""The story of `push`: a checkpoint goes to the hub, once its owner has seen what would."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from hifiprune.card_metadata import CARD, read_card
from hifiprune.cards import for_repository, is_measured
from hifiprune.checkpoint import find_checkpoint
from hifiprune.errors import RunError, UserError
from hifiprune.voice import SILENT, Voice


def push(
    folder: str, repository: str, *, private: bool = False, upload: bool = False, voice: Voice = SILENT
) -> dict[str, Any]:
    """Upload a checkpoint's folder to the hub; without `upload` only tell what would be.

    Args:
        folder: of the checkpoint.
        repository: its name on the hub, `owner/name`.
        private: whether only its owner sees it, where it is new.
        upload: do it.
        voice: tells of progress.

    Returns:
        the files with their sizes, what the card lacks, and whether it was uploaded.

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
    files = {str(path.relative_to(root)): path.stat().st_size for path in sorted(root.rglob("*")) if path.is_file()}
    card = read_card(root)
    remarks = [f"there is no readable {CARD}"] if card is None else []
    if card and not card.data.get("license"):
        remarks.append(f"{CARD} names no licence: take over that of the base model")
    if card and not is_measured(card):
        remarks.append("nothing was measured: hifiprune evaluate --card puts results into the card")
    if upload:
        voice.say(f"Uploading {len(files)} files, {sum(files.values()) / 1e6:,.1f} MB, to {repository}.")
        try:
            api = HfApi(token=True)  # or a missing login would be called a refusal
            api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                folder_path=root, repo_id=repository, commit_message="Pruned by hifiprune", ignore_patterns=[CARD]
            )
            if card:
                content = for_repository(card, repository).encode()
                api.upload_file(path_or_fileobj=content, path_in_repo=CARD, repo_id=repository)
        except LocalTokenNotFoundError as error:
            raise UserError("there is no login for the hub: run hf auth login, or set HF_TOKEN") from error
        except HfHubHTTPError as error:
            raise RunError(f"the hub refused {repository}: {error.server_message or error}") from error
        except Exception as error:  # whatever the hub's library raises of the network
            raise RunError(f"the hub could not be reached: {type(error).__name__}: {error}") from error
    return {"repository": repository, "files": files, "remarks": remarks, "uploaded": upload}
