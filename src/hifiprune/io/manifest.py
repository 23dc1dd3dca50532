"""The mark of finished outputs: folders list the files that hifiprune wrote, single files name their maker."""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hifiprune.errors import UserError

MANIFEST = ".hifiprune.json"
FORMAT = "hifiprune-files-1"
GENERATOR = "hifiprune"
"""Maker that pages and GGUF files name."""
HTML_MARK = f'<meta name="generator" content="{GENERATOR}'
GGUF_FIELD = "general.quantized_by"
BLOCKS, BLOCK_BYTES = 64, 4096
"""Parts of a large file that its fingerprint is made of."""
WHOLE = 2**26
"""Bytes up to which the fingerprint of a file is that of all its bytes."""
NAMED = 3
"""Files that a refusal names at most."""


def write_manifest(folder: Path) -> None:
    """List every file of a finished folder, each with its fingerprint."""
    files = {name: fingerprint(folder / name) for name in list_files(folder) if name != MANIFEST}
    (folder / MANIFEST).write_text(_text(files), encoding="utf-8")


def manifest_with(folder: Path, name: str) -> str | None:
    """Return the text of a folder's list with one file listed anew; None of a folder that hifiprune did not make."""
    listed = _listed(folder)
    return _text(listed | {name: fingerprint(folder / name)}) if listed else None


def is_unchanged(folder: Path, name: str) -> bool:
    """Return whether a file is as hifiprune wrote it."""
    return _is_as_listed(folder / name, _listed(folder).get(name))


def check_replaceable(path: Path, *, folder: bool, overwrite: bool, name: str | Path = "") -> None:
    """Refuse to replace what is at `path`, unless it is an empty folder or hifiprune made all of it.

    Args:
        path: file or folder that is about to be replaced, if it exists.
        folder: whether a folder is going to be there.
        overwrite: whether outputs of hifiprune may be replaced.
        name: by which the user knows it.

    Raises:
        UserError: it may not be replaced.
    """
    name = name or path
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise UserError(f"output {name} exists already; choose another name, or replace it with --overwrite")
    mode = path.lstat().st_mode
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        found = " but a link" if stat.S_ISLNK(mode) else ""
        raise UserError(f"output {name} is not a {'folder' if folder else 'file'}{found}; choose another name")
    if not folder:
        if not _says_so(path):
            raise UserError(
                f"output {name} was not written by hifiprune, and --overwrite replaces nothing else: move it away or "
                "choose another name"
            )
        return
    listed, here = _listed(path), list_files(path)
    foreign = [file for file in here if file not in listed and file != MANIFEST]
    changed = [file for file in here if file in listed and not _is_as_listed(path / file, listed[file])]
    for files, what in ((foreign, "hifiprune did not write"), (changed, "was changed since hifiprune wrote it")):
        if files:
            shown = ", ".join(files[:NAMED]) + (f" and {len(files) - NAMED} more" if len(files) > NAMED else "")
            raise UserError(
                f"output {name} holds {shown}, which {what}; --overwrite replaces nothing else: move such files away "
                "or choose another name"
            )


def fingerprint(path: Path) -> str:
    """Return a hash of a file: of all its bytes up to `WHOLE` of them, else of samples.

    Files that people edit are small, and training a model further changes every block of its weights.
    """
    if path.stat().st_size > WHOLE:
        return sampled_fingerprint(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sampled_fingerprint(path: Path) -> str:
    """Return a hash of a file's size and of blocks spread evenly over it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb", buffering=0) as file:
        for number in range(BLOCKS):
            file.seek(size * number // BLOCKS)
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _is_as_listed(path: Path, listed: str | None) -> bool:
    """Return whether a file has a fingerprint; lists of version 0.1 sampled small files too."""
    return listed is not None and (fingerprint(path) == listed or sampled_fingerprint(path) == listed)


def _text(files: dict[str, str]) -> str:
    return json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n"


def list_files(folder: Path) -> list[str]:
    """Return the names of everything in a folder, recursively, that is not a folder."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    names = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        names += [Path(parent, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(names)


def _listed(folder: Path) -> dict[str, str]:
    """Read the fingerprints of the files that hifiprune wrote into a folder, by name."""
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return dict(facts["files"]) if facts["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _says_so(path: Path) -> bool:
    """Return whether a file names hifiprune as its maker: scores, plans, records, pages and GGUF files do."""
    with path.open("rb") as file:
        start = file.read(BLOCK_BYTES)
    if start.startswith(b"GGUF"):
        return _gguf_maker(path).startswith(GENERATOR)
    if HTML_MARK.encode() in start:
        return True
    try:
        if start.lstrip().startswith(b"{"):
            facts: Any = json.loads(path.read_text(encoding="utf-8"))
        else:
            with safe_open(path, "pt") as tensors:
                facts = json.loads((tensors.metadata() or {}).get("hifiprune", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return False
    return isinstance(facts, dict) and str(facts.get("format", "")).startswith("hifiprune-")


def _gguf_maker(path: Path) -> str:
    from gguf import GGUFReader  # which takes a while to import, and few commands need

    try:
        field = GGUFReader(path).get_field(GGUF_FIELD)
        return str(field.contents()) if field else ""
    except (OSError, ValueError, KeyError, IndexError):
        return ""
