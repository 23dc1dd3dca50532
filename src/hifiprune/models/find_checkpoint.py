"""Find a model by what the user calls it: local folder, GGUF file or hub id."""

from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path
from hifiprune.io.hub import download, is_on_hub
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.companion_files import COMPANIONS, WEIGHTS, refuse_links
from hifiprune.models.unsupported import ADAPTER, METHOD_FILES, refuse_adapter
from hifiprune.models.weight_files import (
    INDEX,
    refuse_pointers,
)


def find_checkpoint(name: str) -> Checkpoint:
    """Find a model by local folder, GGUF file or hub id; of a hub id all but the weights is downloaded.

    Args:
        name: local folder, GGUF file or hub id, the latter at a commit, branch or tag by `owner/name@revision`.

    Raises:
        UserError: there is no such model, or it is an adapter of one.
    """
    path = local_path(name)
    on_hub = is_on_hub(name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name} is neither a model folder, a .gguf file nor a hub id")
        refuse_pointers(name, [path])
        return Checkpoint(name, path.parent, path.name)
    if not path.exists() and not on_hub:
        raise UserError(f"there is no model folder or .gguf file {name}")
    asked = ["config.json", INDEX, "README.md", ADAPTER, *METHOD_FILES, *COMPANIONS, "*.py"]
    folder = download(name, asked, WEIGHTS) if on_hub else path
    refuse_pointers(name, [folder / "config.json"])
    refuse_adapter(name, folder)
    refuse_links(name, folder)
    if not (folder / "config.json").is_file():
        found = sorted(file.name for file in folder.iterdir())[:5]
        raise UserError(f"{name} holds no config.json (found: {', '.join(found) or 'nothing'}); is it a model folder?")
    return Checkpoint(name, folder, on_hub=on_hub)
