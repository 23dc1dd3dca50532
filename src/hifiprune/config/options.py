"""Declare an option once, as a field of a dataclass: name, type, default, help, bounds and help panel."""

import re
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from hifiprune.bounds import Bounds, check_number
from hifiprune.errors import unknown

WIDTHS, CALIBRATION, PRESET, SCORING = "Widths", "Calibration data", "Preset and repair", "Scoring"
TEXT, TASKS = "Text to measure on", "Zero-shot tasks"
TRAINING_DATA, LOSS, OPTIMIZATION, ADAPTER = "Training data", "Loss", "Optimization", "LoRA"
COMPUTE, OUTPUT = "Compute", "Output"
PANELS = (
    None, WIDTHS, CALIBRATION, PRESET, SCORING, TEXT, TASKS, TRAINING_DATA, LOSS, OPTIMIZATION, ADAPTER, COMPUTE,
    OUTPUT,
)  # fmt: skip
"""Help panels in order; the first has the options that matter most."""
Words = Callable[[list[str]], dict[str, object]]
"""Makes fields of a group from the words of a flag that may be given more than once."""


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its name, type and default.

    Attributes:
        help: one sentence for the command line.
        panel: help panel; options without one come first.
        bounds: numbers that it takes.
        choices: words that it takes, if not any.
        flag: spelling on the command line, if not that of the name; several are separated by a slash.
        metavar: placeholder of the value in the help.
        shown_default: default as the help tells it, where the value itself does not.
        words: what makes fields of the option's group from the words of its flag.
        in_files_only: whether there is no flag.
    """

    help: str
    panel: str | None = None
    bounds: Bounds | None = None
    choices: tuple[str, ...] = ()
    flag: str = ""
    metavar: str | None = None
    shown_default: str = ""
    words: Words | None = None
    in_files_only: bool = False

    def word(self, name: str) -> str:
        """Return what the option of a name is called on the command line and in messages."""
        return self.flag.split("/")[0].lstrip("-") or name.replace("_", "-")

    def check(self, name: str, value: Any) -> None:
        """Refuse a value that is out of range or not among the choices.

        Raises:
            UserError: it is; the message gives the value, the limit and the remedy.
        """
        if value is None:
            return
        word = self.word(name)
        for single in value if isinstance(value, tuple) else (value,):
            if self.bounds:
                check_number(word, single, self.bounds)
            if self.choices and single not in self.choices:
                raise unknown(word, str(single), self.choices)


@dataclass(frozen=True)
class Group:
    """How a dataclass of options is nested in another.

    Attributes:
        one_of: whether only one of its options may be given, so that a flag stands for all that a file says of them.
        only: names of the options that the config uses; of none, all.
    """

    one_of: bool = False
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Declared:
    """An option where it stands in a config: `path` leads to it through the groups.

    Attributes:
        path: field names from the config to the option.
        kind: type of the value, without None.
        default: value where none is given, None in a group that need not be there; `MISSING` if there must be one.
        option: what else is known of it.
    """

    path: tuple[str, ...]
    kind: Any
    default: Any
    option: Option

    @property
    def name(self) -> str:
        """The field's name."""
        return self.path[-1]

    @property
    def word(self) -> str:
        """What it is called on the command line."""
        return self.option.word(self.name)

    @property
    def listed(self) -> bool:
        """Whether its flag takes several values, separated by commas."""
        return get_origin(self.kind) is tuple and get_args(self.kind)[0] in (int, float, str)


def option(
    default: Any = MISSING,
    /,
    help: str = "",
    *,
    panel: str | None = None,
    bounds: Bounds | None = None,
    choices: tuple[str, ...] = (),
    flag: str = "",
    metavar: str | None = None,
    shown_default: str = "",
    words: Words | None = None,
    in_files_only: bool = False,
) -> Any:
    """Return a dataclass field for an option with a default, if it has one; see `Option` for the keywords."""
    facts = Option(help, panel, bounds, choices, flag, metavar, shown_default, words, in_files_only)
    return field(default=default, metadata={"option": facts})


def group(default: Any = MISSING, /, *, one_of: bool = False, only: tuple[str, ...] = ()) -> Any:
    """Return a dataclass field for a nested group of options; see `Group` for the keywords."""
    return field(default=default, metadata={"group": Group(one_of, only)})


class Checked:
    """Base of every dataclass of options: values are checked as it is made, and its docstring lists the options."""

    def __init_subclass__(cls) -> None:
        """Describe every option in the docstring as its help does, and every group by the name of its class."""
        lines, kinds = [], dict[str, Any](cls.__annotations__)
        for name, kind in kinds.items():
            if get_origin(kind) is ClassVar:
                continue
            declared = getattr(getattr(cls, name, None), "metadata", {}).get("option")
            group = re.sub(r"[\w.]+\.", "", getattr(kind, "__name__", str(kind)))
            lines.append(f"        {name}: {declared.help if declared else f'see `{group}`.'}")
        raised = "\n\n    Raises:\n        UserError: a value is out of range.\n"
        cls.__doc__ = "\n".join([f"{(cls.__doc__ or '').rstrip()}\n\n    Attributes:", *lines]) + raised

    def __post_init__(self) -> None:
        """Check every value."""
        config: Any = self
        for declared in fields(config):
            if found := declared.metadata.get("option"):
                found.check(declared.name, getattr(self, declared.name))


def declared_options(config: type, path: tuple[str, ...] = ()) -> Iterator[Declared]:
    """Yield every option of a config and its groups, in order."""
    kinds = get_type_hints(config)
    for declared in fields(config):
        kind, place = without_none(kinds[declared.name]), (*path, declared.name)
        if is_dataclass(kind) and isinstance(kind, type):
            only = group_of(config, declared.name).only
            for nested in declared_options(kind, place):
                if not only or nested.path[len(place)] in only:
                    yield replace(nested, default=_default_within(declared.default, nested))
        elif "option" in declared.metadata:
            yield Declared(place, kind, declared.default, declared.metadata["option"])


def _default_within(group: Any, option: Declared) -> Any:
    """Return the default of an option of a group that has itself a default, None for no group, or must be there."""
    if is_dataclass(group):
        return getattr(group, option.name)
    return None if group is None and option.default is MISSING else option.default


def group_of(config: type, name: str) -> Group:
    """Return how the group of a name is nested in a config."""
    found = next(declared for declared in fields(config) if declared.name == name)
    nested: Group = found.metadata.get("group", Group())
    return nested


def without_none(kind: Any) -> Any:
    """Return the type beside None in a union of two; any other type as it is."""
    if get_origin(kind) in (Union, types.UnionType):
        others = [part for part in get_args(kind) if part is not type(None)]
        return others[0] if len(others) == 1 else kind
    return kind
