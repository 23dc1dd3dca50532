"""JSON files: data as JSON holds it, files that hifiprune wrote, read by their shape, and those of others."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from hifiprune.errors import UserError

COMMANDS = ("prune", "recover", "evaluate", "bench", "compare")
SHOWN = 60
"""Letters of a value that a message shows."""


Count = Annotated[int, Field(gt=0)]


def to_plain(value: Any) -> Any:
    """Return dataclasses as dictionaries; a field whose default is None is left out where it is None."""
    if is_dataclass(value):
        named = {field: getattr(value, field.name) for field in fields(value)}
        kept = ((field.name, held) for field, held in named.items() if held is not None or field.default is not None)
        return {name: to_plain(held) for name, held in kept}
    if isinstance(value, dict):
        return {name: to_plain(held) for name, held in value.items()}
    return [to_plain(held) for held in value] if isinstance(value, list | tuple) else value


def read_record(path: Path, shape: Any) -> Any:
    """Read a JSON file that hifiprune wrote; it holds what `shape` wants, a type, and may hold more.

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
    """Read JSON text that hifiprune wrote into `shape`, a type.

    Raises:
        UserError: it has not; the message begins with `name`, says where, and what is wanted there.
    """
    try:
        return TypeAdapter(shape).validate_json(text, strict=True)
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
