"""Explain what is wrong with a command line: one message per mistake."""

from functools import cached_property
from typing import Any

from typer import BadParameter
from typer.core import TyperCommand, TyperGroup

from hifiprune.bounds import meant

NUMBERS = {"int": "whole number", "float": "number"}


class Commands(TyperGroup):
    """All commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the list of all commands as plain text: rich takes longer to import than all else together."""
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters; switches are shown without a type."""
        return plain_switches(super().get_params(ctx))


def plain_switches(parameters: list[Any]) -> list[Any]:
    """Return parameters of which those that take no value have no placeholder of one."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


class Command(TyperCommand):
    """A command that needs its parameters without a default, unless the file of `--config` may have them."""

    @cached_property
    def must_be_given(self) -> frozenset[str]:
        """Return the names of the parameters without a default."""
        return frozenset(parameter.name for parameter in self.params if parameter.required)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take what must be given as optional where a file may hold it, or nothing is done with it."""
        lifted = any(word.split("=")[0] in ("--config", "--show-preset") for word in args)
        for parameter in self.params:
            parameter.required = parameter.name in self.must_be_given and not lifted
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters; switches are shown without a type."""
        return plain_switches(super().get_params(ctx))


def explain(error: Any) -> str:
    """Explain a usage error: the option, its value, and the remedy; empty if typer showed the help."""
    if isinstance(error, BadParameter) and error.__cause__ is not None:
        message = _value_explained(error, error.__cause__)
    elif hasattr(error, "possibilities"):
        message = f"there is no option {error.option_name}"
        if error.possibilities:
            message += f"; did you mean {' or '.join(sorted(error.possibilities))}?"
    else:
        message = error.format_message().rstrip(".")
        message = message[:1].lower() + message[1:]
    context = getattr(error, "ctx", None)
    return f"{message} (see '{context.command_path} --help')" if message and context else message


def _value_explained(error: Any, cause: Any) -> str:
    """Explain a value that pydantic refused."""
    first = cause.errors()[0]
    option, value = error.param.opts[0], first["input"]
    kind = next((name for start, name in NUMBERS.items() if first["type"].startswith(start)), "")
    return f"{option} '{value}' is no {kind}{meant(str(value))}" if kind else f"{option} '{value}': {first['msg']}"
