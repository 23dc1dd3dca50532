"""What is wrong with a command line: every command checks its numbers first, and each mistake is one message."""

from typing import Any

from typer import BadParameter
from typer.core import TyperCommand

from hifiprune.bounds import check_numbers, meant

NUMBERS = {"int": "whole number", "float": "number"}


class Command(TyperCommand):
    """A command whose numbers are checked before anything is imported for it."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        check_numbers(ctx.params)
        return super().invoke(ctx)


def explain(error: Any) -> str:
    """Say what typer refuses: the option, its value, and how to write it; nothing where it showed the help."""
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
    """Say what is wrong with a value that pydantic refused."""
    first = cause.errors()[0]
    option, value = error.param.opts[0], first["input"]
    kind = next((name for start, name in NUMBERS.items() if first["type"].startswith(start)), "")
    return f"{option} '{value}' is no {kind}{meant(str(value))}" if kind else f"{option} '{value}': {first['msg']}"
