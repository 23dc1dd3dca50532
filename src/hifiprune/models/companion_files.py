"""Copy the companion files of a checkpoint: tokenizer, processor, prompts, licences, code named by `auto_map`.

One list of patterns decides, for folders on this disk and for what is downloaded from the hub.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub.utils import filter_repo_objects
from transformers.dynamic_module_utils import get_relative_imports

from hifiprune.errors import UserError

VOCABULARIES = [
    "tokenizer.*", "*tekken*.json", "*.tiktoken", "*.model", "*.spm", "*.bpe", "*.tokenizer", "*vocab*", "dict.txt",
    "byte_maps.json",
]  # fmt: skip
"""Any one of these can be all that a tokenizer is made from."""
SETTINGS = [
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "merges*", "*.codes", "emoji.json", "normalizer.json",
    "*processor_config.json", "*feature_extractor*.json", "generation_config.json", "*chat_template*", "SYSTEM_PROMPT*",
]  # fmt: skip
LEGAL = [
    "license", "licence", "copying", "copyright", "notice", "policy", "terms", "legal", "eula", "disclaimer",
    "attribution",
]  # fmt: skip
COMPANIONS = [*VOCABULARIES, *SETTINGS, *(f"*{case(word)}*" for word in LEGAL for case in (str, str.upper, str.title))]
WEIGHTS = [
    "*.safetensors", "*.bin", "*.bin.*", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.tflite",
    "*.npz", "*.pkl", "*.pickle",
]  # fmt: skip
"""Weights of any framework and states of training, whatever else they are called."""
NEVER = [*WEIGHTS, ".*", "*/.*", "README*", "*.py"]
"""What is not copied for its name: those, hidden files, the card, and code, which `auto_map` tells."""
BLOBS = "blobs"
"""Folder of the hub's cache to whose files those of snapshots are links."""


def copy_companions(source: Path, target: Path) -> None:
    """Copy the companions of a checkpoint to an output that has its `config.json` already, and code that both name."""
    for name in companions(source):
        _copy(source, target, name)
    for name in _code(source, target):
        if not (target / name).exists():  # written with the weights
            _copy(source, target, name)


def refuse_links(name: str, folder: Path) -> None:
    """Refuse companions that are links to something else: an output, which people upload, would hold a copy of it.

    Links within the folder, to files of the same name elsewhere, and those of the hub's cache are followed.

    Args:
        name: checkpoint, for the message.
        folder: directory of its files.

    Raises:
        UserError: one is such a link.
    """
    for file in companions(folder):
        if not _belongs(folder, file):
            raise UserError(
                f"{name}: {file} is a link to {os.path.realpath(folder / file)}, which lies outside of the folder and "
                "is called otherwise: an output would hold a copy; put the file itself there, or remove the link"
            )


def has_vocabulary(folder: Path) -> bool:
    """Return whether a folder holds what a tokenizer can be made from."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return any(True for _ in filter_repo_objects(names, allow_patterns=VOCABULARIES, ignore_patterns=NEVER))


def companions(folder: Path) -> Iterator[str]:
    """Find companions among the files of a folder, and all files of folders right in it that are called like one."""
    names = [path.name for path in folder.iterdir()]
    for name in filter_repo_objects(names, allow_patterns=COMPANIONS, ignore_patterns=NEVER):
        inside = [f"{name}/{path.name}" for path in (folder / name).iterdir()] if (folder / name).is_dir() else [name]
        for file in filter_repo_objects(inside, ignore_patterns=NEVER):
            if (folder / file).is_file():
                yield file


def _code(source: Path, target: Path) -> Iterator[str]:
    """Find the modules of a source that the settings of its output name, and those that these import."""
    for settings in sorted(target.glob("*config.json")):
        try:
            references = _strings(json.loads(settings.read_text(encoding="utf-8")).get("auto_map"))
        except (ValueError, AttributeError):
            continue  # as it is in the source
        for reference in references:
            if "--" not in reference:  # which is in another repository
                yield from _modules(source, f"{reference.rpartition('.')[0]}.py")


def _modules(source: Path, first: str) -> Iterator[str]:
    """Find a module of a source and those that it imports, as transformers does, but only files of the source's own."""
    found, names = set(), [first]
    while names:
        name = os.path.normpath(names.pop())
        if name in found or Path(name).is_absolute() or ".." in Path(name).parts or not (source / name).is_file():
            continue
        if _belongs(source, name):
            found.add(name)
            yield name
            with suppress(OSError, ValueError):
                names += [str(Path(first).parent / f"{module}.py") for module in get_relative_imports(source / name)]


def _belongs(folder: Path, name: str) -> bool:
    """Return whether a file is the folder's own, or that of a checkpoint that the folder is made of links to."""
    home, parent, real = (Path(os.path.realpath(path)) for path in (folder, (folder / name).parent, folder / name))
    if real.is_relative_to(home) or real.parent == home.parent.parent / BLOBS:
        return True
    return parent.is_relative_to(home) and real.name == Path(name).name


def _strings(value: Any) -> list[str]:
    """Return every string in lists and dictionaries."""
    if isinstance(value, dict | list):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def _copy(source: Path, target: Path, name: str) -> None:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / name, target / name)
