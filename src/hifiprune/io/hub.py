"""Models of the hub: `owner/name`, or `owner/name@revision` for a commit, branch or tag of it."""

import re
from pathlib import Path

from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path

MODEL = re.compile(r"(?!.*\.\.)[\w-][\w.-]*(/[\w.-]+)?(@\w[\w./+-]*)?")


def split_revision(name: str) -> tuple[str, str | None]:
    """Return a model's hub id and its revision, if the name has one."""
    hub_id, _, revision = name.partition("@")
    return hub_id, revision or None


def at_revision(name: str, revision: str | None) -> str:
    """Return the name of a model at a revision, in place of the one that it has; without one, the name as it is."""
    if not revision:
        return name
    bare = name if local_path(name).exists() else name.rpartition("@")[0] or name
    return f"{bare}@{revision}"


def is_on_hub(name: str) -> bool:
    """Return whether a name is one of the hub, since nothing here has it.

    Raises:
        UserError: it is a path of this disk at a revision.
    """
    if local_path(name).exists():
        return False
    bare, _, revision = name.rpartition("@")
    if bare and local_path(bare).exists():
        raise UserError(f"{bare} is on this disk, and revision '{revision}' is for models of the hub: leave it out")
    return MODEL.fullmatch(name) is not None


def download(name: str, patterns: list[str], never: list[str] | None = None) -> Path:
    """Download files of a model, unless they are in the hub's cache, and return their folder.

    Args:
        name: hub id, at a revision if it names one.
        patterns: files to have.
        never: files to leave out.

    Raises:
        UserError: the hub does not have the model, does not give it, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    hub_id, revision = split_revision(name)
    absent = f"there is no folder {Path(name).absolute()}, and the"
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=never))
    except HfHubHTTPError as error:
        remedy = "; a private or gated model needs --token, HF_TOKEN or 'hf auth login'"
        hidden = isinstance(error, RepositoryNotFoundError)  # as gated ones are too
        raise UserError(f"{absent} hub answered: {error.server_message or error}{remedy * hidden}") from error
    except Exception as error:
        raise UserError(
            f"{absent} model hub could not be reached to look for {name} there; check the spelling, or download the "
            "model first and give its folder"
        ) from error
