"""Configs as plain data: to and from JSON, YAML and the `run.json` of an earlier run."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from hifiprune.config.options import declared_options, group_of, without_none
from hifiprune.errors import UserError, nearest_name
from hifiprune.io.atomic import local_path
from hifiprune.io.hub import at_revision

RUN_FORMAT = "hifiprune-run-1"
OF_ONE_RUN = ("output", "overwrite", "dry_run", "resume")
"""Options that another run does not take over."""
MODELS = ("model", "models", "dense", "pruned", "teacher", "against")
"""Arguments that name models: those from the hub are read again at the commit that they had."""
LARGEST = 10**6
"""Bytes of a file of options."""
C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain data, as JSON holds it."""
    facts: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return facts


def from_dict(config: type[C], facts: Mapping[str, Any], where: str = "config") -> C:
    """Make a config of plain data, whose every name and type is checked.

    Args:
        config: class of the config.
        facts: plain data, nested as the config is.
        where: name of the data for messages.

    Raises:
        UserError: a name is not known, a value is of another type, or a value is out of range.
    """
    _check_names(config, facts, where)
    needed: dict[str, Any] = {name: {} for name in _groups_needed(config)}  # what they need is said by themselves
    return checked(config, needed | dict(facts), where)


def checked(kind: type[C], value: Any, where: str) -> C:
    """Make a value of some type of plain data.

    Raises:
        UserError: the data is of another type, lacks something, or is out of range.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            raise cause from None
        if first["type"] == "missing" and (flag := _flag_of(kind, first["loc"])):
            raise missing(flag) from None
        place = ": ".join(filter(None, (where, ".".join(map(str, first["loc"])))))
        raise UserError(f"{place}: {first['msg']}, not {first['input']!r}") from error


def missing(word: str) -> UserError:
    """Return the error for an option or argument that neither the command line nor a file gives."""
    return UserError(f"'{word}' is missing: give it on the command line, or in the file of --config")


def _groups_needed(config: Any) -> list[str]:
    """Return the names of the groups that have no default."""
    kinds = get_type_hints(config)
    return [one.name for one in fields(config) if is_dataclass(kinds[one.name]) and one.default is MISSING]


def _flag_of(config: type, place: tuple[int | str, ...]) -> str:
    """Return the flag of what is missing: of an option, or of the first option of a group; nothing if it has none."""
    found = (option for option in declared_options(config) if option.path[: len(place)] == place)
    first = next(found, None)
    return f"--{first.word}" if first else ""


def _check_names(config: Any, facts: Any, where: str, path: str = "") -> None:
    """Refuse names that the config does not have, at any depth."""
    if not isinstance(facts, Mapping):
        raise UserError(f"{where}: {path.rstrip('.') or 'the whole'} must be a mapping of names to values")
    kinds = get_type_hints(config)
    names = [declared.name for declared in fields(config)]
    for name, value in facts.items():
        if name not in names:
            nested = [".".join(declared.path) for declared in declared_options(config) if declared.name == name]
            hint = f"; did you mean '{nested[0]}'?" if nested else nearest_name(str(name), names)
            raise UserError(f"{where}: '{path}{name}' is not an option; known are {', '.join(names)}{hint}")
        if is_dataclass(kind := without_none(kinds[name])) and value is not None:
            _check_names(kind, value, where, f"{path}{name}.")
            only, unused = group_of(config, name).only, {field.name: field.default for field in fields(kind)}
            for option, usual in unused.items():
                if only and option not in only and value.get(option, usual) != usual:
                    raise UserError(f"{where}: '{path}{name}.{option}' has no effect on this command; leave it out")


def read_config(path: Path, command: str) -> dict[str, Any]:
    """Read the options in a YAML or JSON file, or in the `run.json` of an earlier run.

    Of a run, what it read is taken, and not what it wrote: neither its output nor leave to overwrite one.

    Args:
        path: file to read.
        command: name of the command that the options are for.

    Raises:
        UserError: the file cannot be read, holds no options, or is of a run of another command.
    """
    facts = _parsed(local_path(path))
    if not isinstance(facts, dict):
        raise UserError(f"{path} holds no options; write them as 'name: value', one a line")
    if facts.get("format") != RUN_FORMAT:
        return facts
    if facts.get("command") != command:
        raise UserError(f"{path} is of a run of '{facts.get('command')}', and the command is '{command}'")
    arguments, commits = facts.get("arguments"), facts.get("commits", {})
    if not (isinstance(arguments, dict) and isinstance(commits, dict)):
        raise UserError(f"{path} was changed since hifiprune wrote it: arguments or commits are missing")
    return {
        name: _at_commits(value, commits) if name in MODELS else value
        for name, value in arguments.items()
        if name not in OF_ONE_RUN
    }


def _at_commits(names: Any, commits: Mapping[str, str]) -> Any:
    """Return a model's name, or several, at the commits that a run read them at."""
    if isinstance(names, list):
        return [_at_commits(name, commits) for name in names]
    return at_revision(names, commits.get(names)) if isinstance(names, str) else names


def _parsed(path: Path) -> Any:
    """Return what a YAML or JSON file holds."""
    import yaml

    loader: Any = type("Loader", (yaml.SafeLoader,), {})  # reads `1e-4` as the number that JSON and Python see in it
    loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"--config {path} has {path.stat().st_size:,} bytes, and options at most {LARGEST:,}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    with suppress(ValueError):
        return json.loads(text)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
            raise UserError(f"--config {path} has aliases (*name), which can stand for any amount: write values out")
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
