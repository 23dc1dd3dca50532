"""Derive command-line flags from config classes: a command declares the config that it takes, and receives it."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

from typer import Context
from typer import Option as Flag

from hifiprune.cli.console import speaking
from hifiprune.config.files import from_dict, missing, read_config
from hifiprune.config.options import PANELS, Declared, declared_options, group_of, without_none
from hifiprune.errors import unknown
from hifiprune.progress import note

MESSAGES = "Config and messages"
ConfigFile = Annotated[
    Path | None,
    Flag(
        "--config",
        metavar="FILE",
        help="Options in a YAML or JSON file, or the run.json of an earlier run, to repeat it; flags override it.",
        rich_help_panel=MESSAGES,
    ),
]
Quiet = Annotated[
    bool,
    Flag("--quiet", "-q", help="Show only warnings and errors, and no progress.", rich_help_panel=MESSAGES),
]
Verbose = Annotated[
    bool,
    Flag("--verbose", "-v", help="Also show each stage and how long it took.", rich_help_panel=MESSAGES),
]
AsJson = Annotated[bool, Flag("--json", help="Print one JSON object on standard output.", rich_help_panel=MESSAGES)]
Debug = Annotated[bool, Flag("--debug", help="Show the traceback of an error.", rich_help_panel=MESSAGES)]
COMMON = {"quiet": Quiet, "verbose": Verbose, "as_json": AsJson, "debug": Debug}
"""Flags of every command."""


@dataclass(frozen=True)
class Shared:
    """A flag, and where its value goes: options of one name in several groups share it."""

    name: str
    options: list[Declared]

    @property
    def first(self) -> Declared:
        """The option that the flag is shown as."""
        return self.options[0]


def shared_flags(config: type) -> list[Shared]:
    """Return the flags of a config, in the order of their help panels."""
    flags: dict[str, Shared] = {}
    for declared in declared_options(config):
        if declared.option.in_files_only:
            continue
        spelling = declared.option.flag.split("/")[0].lstrip("-").replace("-", "_")
        name = spelling or declared.name
        flags.setdefault(name, Shared(name, [])).options.append(declared)
    return sorted(flags.values(), key=lambda flag: PANELS.index(flag.first.option.panel))


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Make a typer command of a function, whose parameter that is a config becomes flags.

    With `--config` a file fills it, and names the other parameters too where they are not given. Where the config has
    `presets`, the one that the parameter `preset` names is what flags and files change. `--json` comes as the parameter
    `as_json`, and the names of the flags that were given as the parameter `given`, if there is one.
    """
    kinds = get_type_hints(command, include_extras=True)
    parameters = list(inspect.signature(command).parameters.values())
    configs = ((name, kind) for name, kind in kinds.items() if is_dataclass(kind) and isinstance(kind, type))
    name, config = next(configs, ("", None))
    if config is None:
        return _with_messages(command, parameters)
    flags = shared_flags(config)
    inputs = [parameter for parameter in parameters if parameter.name not in (name, "as_json", "given")]
    wants_given = "given" in kinds

    @wraps(command)
    def run(**values: Any) -> None:
        context = values.pop("context")
        given = {key: value for key, value in values.items() if _is_given(context, key)}
        for flag in flags:
            if flag.name in given and not flag.first.option.words:
                flag.first.option.check(flag.first.name, given[flag.name])
        file = values["config_file"]
        facts = read_config(file, str(command.__name__)) if file else {}
        arguments = {
            parameter.name: _input(parameter.name, values, given, facts, context) for parameter in inputs
        }  # takes them out of the facts
        if presets := getattr(config, "presets", None):
            facts = upon_preset(presets, arguments["preset"], facts)
        settled = merged(config, facts, given)
        made = from_dict(config, settled, str(file or "config"))
        from hifiprune.io.output_paths import reading

        with speaking(quiet=values["quiet"], verbose=values["verbose"]), reading(file):
            if unused := without_group(config, settled, given):
                note(f"Ignored, since there is no {unused}.")
            more = {"given": frozenset(given)} if wants_given else {}
            command(**arguments, **{name: made}, **more, as_json=values["as_json"])

    signature = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Context),
        *inputs,
        *(_parameter(flag) for flag in flags),
        inspect.Parameter("config_file", inspect.Parameter.KEYWORD_ONLY, annotation=ConfigFile, default=None),
        *_common_parameters(),
    ]
    _declare(run, signature)
    return run


def _with_messages(command: Callable[..., None], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """Make a typer command of a function that has no config: with the flags that every command has."""

    @wraps(command)
    def run(**values: Any) -> None:
        common = {name: values.pop(name) for name in COMMON}
        with speaking(quiet=common["quiet"], verbose=common["verbose"]):
            command(**values, as_json=common["as_json"])

    signature = [*(parameter for parameter in parameters if parameter.name != "as_json"), *_common_parameters()]
    _declare(run, signature)
    return run


def _common_parameters() -> list[inspect.Parameter]:
    """Return the parameters that every command has."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(name, keyword, annotation=kind, default=False) for name, kind in COMMON.items()]


def _declare(run: Any, parameters: list[inspect.Parameter]) -> None:
    """Let typer see these parameters."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    run.__signature__ = inspect.Signature([parameter.replace(kind=keyword) for parameter in parameters])
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


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
    for declared in fields(config):  # of groups with defaults, a file or flags may change a part
        if is_dataclass(declared.default) and not isinstance(declared.default, type):
            result[declared.name] = {**asdict(declared.default), **(result.get(declared.name) or {})}
    flags = [flag for flag in shared_flags(config) if flag.name in given]
    for nested in dict.fromkeys(option.path[0] for flag in flags for option in flag.options if len(option.path) > 1):
        values = _values_of(nested, flags, given)
        if group_of(config, nested).one_of:
            result[nested] = values
        elif result.get(nested) or not _needs_more(config, nested, values):
            result[nested] = {**(result.get(nested) or {}), **values}
    for flag in flags:
        for option in flag.options:
            if len(option.path) == 1:
                result |= _fields_of(option, given[flag.name])
    _share(config, result)
    return result


def _share(config: type, facts: dict[str, Any]) -> None:
    """Let groups that share a flag have the same value, where only one of them has it."""
    for flag in shared_flags(config):
        places = [facts.get(option.path[0]) for option in flag.options if len(option.path) > 1]
        groups = [place for place in places if isinstance(place, dict)]
        values = [place[flag.first.name] for place in groups if flag.first.name in place]
        for place in groups if len(flag.options) > 1 else []:
            if values:
                place.setdefault(flag.first.name, values[0])


def without_group(config: type, facts: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Return which flags have no effect, since the group that they belong to is not there; nothing where all have."""
    unused: dict[str, list[str]] = {}
    for flag in shared_flags(config):
        groups = [option.path[0] for option in flag.options]
        if flag.name in given and flag.first.path[1:] and not any(facts.get(name) for name in groups):
            unused.setdefault(f"--{groups[0]}", []).append(f"--{flag.name.replace('_', '-')}")
    return "; ".join(f"{name}: {', '.join(flags)}" for name, flags in unused.items())


def _fields_of(option: Declared, value: Any) -> dict[str, object]:
    """Return the fields of a group, or of the config, that the value of a flag gives."""
    words = option.option.words
    if words is None:
        return {option.name: value}
    return words([value] if isinstance(value, str) else value)


def _values_of(nested: str, flags: list[Shared], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a group that flags give."""
    values: dict[str, Any] = {}
    for flag in flags:
        for option in flag.options:
            if option.path[0] == nested and len(option.path) > 1:
                values |= _fields_of(option, given[flag.name])
    return values


def _needs_more(config: type, nested: str, values: Mapping[str, Any]) -> bool:
    """Return whether a group has an option without a default that is not given."""
    options = (option for option in declared_options(config) if option.path[0] == nested)
    return any(option.default is MISSING and option.name not in values for option in options)


def _is_given(context: Any, name: str) -> bool:
    """Return whether a parameter stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _input(name: str, values: dict[str, Any], given: Mapping[str, Any], facts: dict[str, Any], context: Any) -> Any:
    """Return a parameter that is not part of the config: from the command line, else the file, else its default.

    Raises:
        UserError: it must be given, and is nowhere.
    """
    of_file = facts.pop(name, None)
    value = values[name] if name in given or of_file is None else of_file
    if value is None:
        parameter = next(parameter for parameter in context.command.params if parameter.name == name)
        if name in context.command.must_be_given:
            word = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.metavar or name.upper()
            raise missing(word)
    return value


def _parameter(flag: Shared) -> inspect.Parameter:
    """Return the parameter of a typer command for a flag."""
    declared, option = flag.first, flag.first.option
    kind: Any = without_none(declared.kind)
    facts: dict[str, Any] = {"help": option.help, "rich_help_panel": option.panel, "metavar": option.metavar}
    spelling = option.flag or "--" + declared.name.replace("_", "-")
    default = None if declared.default is MISSING else declared.default
    if kind is bool:
        facts["show_default"] = option.shown_default or False
    elif option.words and get_origin(kind) is tuple:
        kind, default = str, None  # parts of one word, separated by commas
    elif option.words or get_origin(kind) is tuple:
        kind, default = list[str], None
    if option.shown_default and default is None:
        facts["show_default"] = option.shown_default
    if option.choices:
        facts["autocompletion"] = _completing(option.choices)
    optional = kind | None if default is None else kind
    return inspect.Parameter(
        flag.name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[optional, Flag(spelling, **facts)],
        default=default,
    )


def _completing(choices: tuple[str, ...]) -> Callable[[str], Iterator[str]]:
    """Return what a shell completes a word by."""

    def complete(incomplete: str) -> Iterator[str]:
        return (choice for choice in choices if choice.startswith(incomplete))

    return complete
