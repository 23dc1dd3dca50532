"""Derive command-line flags from config classes: a command declares the config that it takes, and receives it."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import partial, wraps
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer import Context
from typer import Option as Flag

from hifiprune.bounds import meant
from hifiprune.cli.common import CONFIG_FILE, MESSAGES, REVISION, THREADS, TOKEN, keyword, set_threads, use_token
from hifiprune.cli.console import speaking
from hifiprune.config.files import checked, from_dict, missing, read_config
from hifiprune.config.options import PANELS, Declared, declared_options, group_of, without_none
from hifiprune.errors import UserError, unknown
from hifiprune.io.hub import at_revision
from hifiprune.progress import note

TAKE_HUB_IDS = {"model", "models", "dense", "repository"}
"""Parameters and options that may name what is on the hub."""


def flags_of(config: type) -> dict[str, list[Declared]]:
    """Return the options of each flag of a config, by its name and in the order of help panels.

    Options of one name in several groups share a flag, which is shown as the first of them.
    """
    flags: dict[str, list[Declared]] = {}
    for declared in declared_options(config):
        if not declared.option.in_files_only:
            flags.setdefault(declared.word.replace("-", "_"), []).append(declared)
    return dict(sorted(flags.items(), key=lambda flag: PANELS.index(flag[1][0].option.panel)))


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Make a typer command of a function, whose parameter that is a config becomes flags.

    With `--config` a file fills it, and names the other parameters too where they are not given. Where the config has
    `presets`, the one that the parameter `preset` names is what flags and files change. `--json` comes as the parameter
    `as_json`, and the names of the flags that were given as the parameter `given`, if there is one. `--revision`,
    `--token` and `--threads` are there, and are seen to here, where there is a model to find and something to compute.
    """
    kinds = get_type_hints(command)
    parameters = inspect.signature(command).parameters
    configs = ((name, kind) for name, kind in kinds.items() if is_dataclass(kind) and isinstance(kind, type))
    name, config = next(configs, ("", None))
    flags = flags_of(config) if config else {}
    inputs = [parameter for parameter in parameters.values() if parameter.name not in (name, "as_json", "given")]
    further = _further({*parameters}, {*flags})

    @wraps(command)
    def run(context: Any, **values: Any) -> None:
        given = {key: value for key, value in values.items() if _is_given(context, key)}
        _check_values(flags, given)
        file = values.get("config_file")
        facts = read_config(file, str(command.__name__)) if file else {}
        settle = partial(_input, given=given, facts=facts, context=context)
        arguments = {each.name: settle(each.name, kinds[each.name], values[each.name]) for each in inputs}
        use_token(values.get("token"))
        if "threads" in values:
            set_threads(settle("threads", int, values["threads"]))
        if arguments.get("model"):
            arguments["model"] = at_revision(arguments["model"], settle("revision", str, values.get("revision")))
        settled = _settled(config, facts, given, arguments.get("preset")) if config else {}
        if config:
            arguments[name] = from_dict(config, settled, str(file or "config"))
        if "given" in kinds:
            arguments["given"] = frozenset(given)
        from hifiprune.io.output_paths import reading

        with speaking(quiet=values["quiet"], verbose=values["verbose"]), reading(file):
            if unused := without_group(flags, settled, given):
                note(f"Ignored, since there is no {unused}.")
            command(**arguments, as_json=values["as_json"])

    derived = [_parameter(flag, options[0]) for flag, options in flags.items()]
    told = [CONFIG_FILE, *MESSAGES] if config else MESSAGES
    _declare(run, [keyword("context", Context, inspect.Parameter.empty), *inputs, *derived, *further, *told])
    return run


def _declare(run: Any, parameters: list[inspect.Parameter]) -> None:
    """Let typer see these parameters."""
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _further(parameters: set[str], options: set[str]) -> list[inspect.Parameter]:
    """Return the flags that a command has beside its parameters and the options of its config."""
    wanted = [
        (THREADS, "device" in options),
        (REVISION, "model" in parameters),
        (TOKEN, not TAKE_HUB_IDS.isdisjoint(parameters | options)),
    ]
    return [flag for flag, has in wanted if has]


def _check_values(flags: Mapping[str, list[Declared]], given: Mapping[str, Any]) -> None:
    """Refuse values of flags that are out of range, whether or not the group that they belong to is there."""
    for flag, (first, *_) in flags.items():
        if flag in given and not (first.option.words or first.listed):
            first.option.check(first.word, given[flag])


def _is_given(context: Any, name: str) -> bool:
    """Return whether a parameter stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _input(name: str, kind: Any, value: Any, given: Mapping[str, Any], facts: dict[str, Any], context: Any) -> Any:
    """Return a parameter that is not part of the config: from the command line, else the file, else its default.

    Raises:
        UserError: it must be given, and is nowhere, or the file has something else in its place.
    """
    of_file = facts.pop(name, None)
    if name not in given and of_file is not None:
        return checked(kind, of_file, f"--config: {name}")
    if name in context.command.must_be_given and not (value or name in given or "show_preset" in given):
        parameter = next(parameter for parameter in context.command.params if parameter.name == name)
        raise missing(parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.metavar or name.upper())
    return value


def _settled(config: type, facts: Mapping[str, Any], given: Mapping[str, Any], preset: str | None) -> dict[str, Any]:
    """Return what a preset, a file and flags come to, each in place of what stands before it."""
    if presets := getattr(config, "presets", None):
        facts = upon_preset(presets, str(preset), facts)
    return merged(config, facts, given)


def upon_preset(presets: Mapping[str, Mapping[str, Any]], name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a preset's groups of options, with the facts of a file in place of theirs.

    Raises:
        UserError: there is no such preset.
    """
    if name not in presets:
        raise unknown("preset", name, presets)
    groups = {nested: {**values, **(facts.get(nested) or {})} for nested, values in presets[name].items()}
    return {**facts, **groups}


def merged(config: type, facts: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a file with the flags that were given in their place.

    A group that need not be there, such as the calibration data, is made by its option without a default, or by any
    of its options where all have one.
    """
    result = {name: dict(value) if isinstance(value, Mapping) else value for name, value in facts.items()}
    flags, groups = flags_of(config), {field.name: field.default for field in fields(config)}
    for name, default in groups.items():  # of groups with defaults, a file or flags may change a part
        if is_dataclass(default) and not isinstance(default, type):
            result[name] = {**asdict(default), **(result.get(name) or {})}
    changes: dict[str, dict[str, object]] = {}
    for flag in flags.keys() & given.keys():
        for option in flags[flag]:
            place = changes.setdefault(option.path[0], {}) if len(option.path) > 1 else result
            place |= _fields_of(option, given[flag])
    for name, values in changes.items():
        if group_of(config, name).one_of:
            result[name] = values
        elif result.get(name) or not _needs_more(config, name, values):
            result[name] = {**(result.get(name) or {}), **values}
    _share(flags, result)
    return result


def _share(flags: Mapping[str, list[Declared]], facts: dict[str, Any]) -> None:
    """Let groups that share a flag have the same value, where only one of them has it."""
    for options in flags.values():
        places = [place for option in options if isinstance(place := facts.get(option.path[0]), dict)]
        values = [place[options[0].name] for place in places if options[0].name in place]
        for place in places if len(options) > 1 and values else []:
            place.setdefault(options[0].name, values[0])


def _fields_of(option: Declared, value: Any) -> dict[str, object]:
    """Return the fields of a group, or of the config, that the value of a flag gives."""
    if option.option.words:
        return option.option.words(value)
    return {option.name: _parts(option, value) if option.listed else value}


def _parts(option: Declared, text: str) -> tuple[object, ...]:
    """Return the values in a text that separates them by commas.

    Raises:
        UserError: there is none, or one is no number where it must be.
    """
    kind = get_args(option.kind)[0]
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UserError(f"{option.word}: give at least one, or several separated by commas")
    for part in parts:
        try:
            kind(part)
        except ValueError as error:
            number = "whole number" if kind is int else "number"
            raise UserError(
                f"{option.word} '{part}' is no {number}{meant(part)}; separate several by commas"
            ) from error
    return tuple(kind(part) for part in parts)


def _needs_more(config: type, name: str, values: Mapping[str, Any]) -> bool:
    """Return whether a group has an option without a default that is not given."""
    kind: Any = without_none(get_type_hints(config)[name])
    return any(field.default is MISSING and field.name not in values for field in fields(kind))


def without_group(flags: Mapping[str, list[Declared]], facts: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Return which flags have no effect, since the group that they belong to is not there; nothing where all have."""
    unused: dict[str, list[str]] = {}
    for flag, options in flags.items():
        groups = [option.path[0] for option in options]
        if flag in given and options[0].path[1:] and not any(facts.get(name) for name in groups):
            unused.setdefault(f"--{groups[0]}", []).append(f"--{flag.replace('_', '-')}")
    return "; ".join(f"{name}: {', '.join(names)}" for name, names in unused.items())


def _parameter(name: str, declared: Declared) -> inspect.Parameter:
    """Return the parameter of a typer command for a flag."""
    option, default = declared.option, declared.default
    kind: Any = declared.kind
    facts: dict[str, Any] = {"help": option.help, "rich_help_panel": option.panel, "metavar": option.metavar}
    if declared.listed:  # parts of one word, separated by commas
        kind, default = str, ", ".join(map(str, default or ())) or None
    elif option.words or get_origin(kind) is tuple:
        kind, default = list[str], default if default is MISSING else None
    if kind is bool:
        facts["show_default"] = option.shown_default or False
    elif option.shown_default and default is None:
        facts["show_default"] = option.shown_default
    if option.choices:
        facts["autocompletion"] = _completing(option.choices)
    kind = kind | None if default is None else kind
    flag = Flag(option.flag or f"--{declared.word}", **facts)
    return keyword(name, Annotated[kind, flag], inspect.Parameter.empty if default is MISSING else default)


def _completing(choices: tuple[str, ...]) -> Callable[[str], Iterator[str]]:
    """Return what a shell completes a word by."""
    return lambda incomplete: (choice for choice in choices if choice.startswith(incomplete))
