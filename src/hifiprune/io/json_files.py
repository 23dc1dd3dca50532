"""JSON files read: those that hifiprune wrote, by their shape, and those of others."""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hifiprune.errors import UserError

COMMANDS = ("prune", "recover", "evaluate", "bench", "compare")
SHOWN = 60
"""Letters of a value that a message shows."""


def read_record(path: Path, shape: Any) -> Any:
    """Read a JSON file that hifiprune wrote; it holds what `shape` wants, a type of `record_shapes`, and may hold more.

    Raises:
        UserError: the file cannot be read, or was changed.
    """
    return checked(read_text(path), shape, str(path))


def read_text(path: Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        UserError: the file is not there, is no file, may not be read, or is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def checked(text: str, shape: Any, name: str) -> Any:
    """Parse JSON text that hifiprune wrote, and check that it has `shape`.

    Raises:
        UserError: it has not; the message begins with `name`, says where, and what is wanted there.
    """
    try:
        TypeAdapter(shape).validate_json(text, strict=True)
        return json.loads(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"] if part not in COMMANDS)
        value = first["input"]
        shown = f", not {brief(value)}" if isinstance(value, str | int | float | None) and place else ""
        what = f"{place}: {first['msg']}{shown}" if place else first["msg"]
    except (ValueError, RecursionError) as error:
        what = str(error)
    raise UserError(f"{name} was changed since hifiprune wrote it ({what}); copy it again, or make it again")


def read_json(path: Path) -> Any:
    """Read a JSON file that another tool wrote.

    Raises:
        UserError: the file cannot be read, or is no JSON.
    """
    try:
        return json.loads(read_text(path))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}); correct it, or copy it again") from error


def check_objects(folder: Path, *names: str) -> None:
    """Refuse settings of a checkpoint, where they are there, that are no JSON objects.

    Raises:
        UserError: one cannot be read, or is none.
    """
    for path in (folder / name for name in names):
        if path.is_file() and not isinstance(value := read_json(path), dict):
            raise UserError(f"{path} must hold a JSON object, not {brief(value)}; copy it again")


def brief(value: object) -> str:
    """Write a value for a message, its beginning where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
