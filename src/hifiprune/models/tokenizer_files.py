"""A checkpoint's tokenizer, read from its files: what cannot be read is told by file, key and value."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hifiprune.errors import UserError
from hifiprune.io.json_files import brief, check_objects, read_json
from hifiprune.models.companion_files import companions, has_vocabulary
from hifiprune.models.library_errors import Facts, explained, find_culprit, in_short, value_at
from hifiprune.models.weight_files import refuse_pointers

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
VOCABULARY = "tokenizer.json"
LARGEST = 2**24
"""Bytes of a file at most in which the key that cannot be read is looked for."""


def read_tokenizer(name: str, folder: Path, gguf: str | None = None) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a checkpoint; no code of it runs.

    Args:
        name: what the user called the checkpoint.
        folder: directory of its files.
        gguf: name of its GGUF file in the folder, if it is one.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if gguf:
        with explained(name, "the tokenizer"):
            return _read(folder, gguf)
    if not has_vocabulary(folder):
        raise UserError(f"{name} has no tokenizer files; copy those of the original model to {folder}")
    refuse_pointers(name, (folder / file for file in companions(folder)))
    check_objects(folder, *SETTINGS)
    alone = (folder / "tokenizer.model").is_file() and not (folder / VOCABULARY).is_file()
    if alone and find_spec("sentencepiece") is None:
        raise UserError(
            f"{name} has its tokenizer in tokenizer.model alone, which needs sentencepiece: pip install sentencepiece"
        )
    try:
        with explained(name, "the tokenizer"):
            return _read(folder)
    except UserError as error:
        if alone and "tiktoken" in str(error):  # the format that transformers tries last
            raise UserError(f"{name}: tokenizer.model is no whole sentencepiece model; copy it again") from error
        raise _with_key(name, folder, error) from error


def _read(folder: Path, gguf: str | None = None) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False)
    return tokenizer


def _with_key(name: str, folder: Path, error: UserError) -> UserError:
    """Return the error with the key that is to blame, where the tokenizer can be read without it."""
    if error.__cause__ is None or "auto_map" in str(error):
        return error
    with _copied(folder) as copy:
        for file in (copy / file for file in (*SETTINGS, VOCABULARY)):
            if not file.is_file() or file.stat().st_size > LARGEST or not isinstance(facts := read_json(file), dict):
                continue
            text = file.read_bytes()

            def use(facts: Facts, file: Path = file) -> None:
                file.write_text(json.dumps(facts), encoding="utf-8")
                _read(copy)

            if key := find_culprit(facts, use):
                said = f"something else ({in_short(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
                return UserError(
                    f"the tokenizer of {name} cannot be read: in {file.name}, {'.'.join(key)} is "
                    f"{brief(value_at(facts, key))} and should be {said}; correct it, or copy {file.name} again"
                )
            file.write_bytes(text)
    return error


@contextmanager
def _copied(folder: Path) -> Iterator[Path]:
    """Copy what a tokenizer is read from into a folder, which is removed after."""
    with tempfile.TemporaryDirectory() as scratch:
        for file in ("config.json", *companions(folder)):
            if (folder / file).is_file():
                (Path(scratch) / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / file, Path(scratch) / file)
        yield Path(scratch)
