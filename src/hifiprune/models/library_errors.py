"""Errors that libraries raise about a user's files, of any class, as one message that says what to do."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any

import torch

from hifiprune.errors import HifipruneError, RunError, UserError

Facts = dict[str, Any]
SHOWN = 300
"""Letters of a library's message that are shown."""
MOST_KEYS = 100
"""Keys of a JSON object at most of which each is left out in turn."""


@contextmanager
def explained(name: str, what: str, describe: Callable[[Exception], UserError] | None = None) -> Iterator[None]:
    """Turn whatever a library raises about a user's file into one message.

    Args:
        name: what the user called the model.
        what: part of it that is read.
        describe: returns the error to raise; by default it says in the library's words why it cannot be read.

    Raises:
        UserError: something was raised.
        RunError: there was not enough memory.
    """
    try:
        yield
    except HifipruneError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise RunError(f"not enough memory for {what} of {name}; try --dtype bfloat16") from error
        raise (describe(error) if describe else _unreadable(name, what, error)) from error


def _unreadable(name: str, what: str, error: Exception) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(
            f"{what} of {name} is code that comes with it (auto_map), and hifiprune runs no code of a checkpoint; "
            "where you trust that code, write a plain checkpoint with it in Python first, with a tokenizer.json"
        )
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserError(f"{what} of {name} cannot be read: {first[:SHOWN]}")


def in_short(error: Exception) -> str:
    """Return a library's message in one line, without the error class that it may begin with."""
    said = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return re.sub(r"^.*(TypeError|ValueError): ", "", said)[:200] or type(error).__name__


def find_culprit(facts: Facts, use: Callable[[Facts], object], path: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    """Return the key without which a JSON object can be used, as deep as it lies; None if there is no such one.

    Args:
        facts: JSON object with which `use` fails.
        use: raises where an object cannot be used.
        path: keys of the object within it that is looked into.
    """
    here = value_at(facts, path)
    for key in here if len(here) <= MOST_KEYS else ():
        fewer = deepcopy(facts)
        del value_at(fewer, path)[key]
        if key != "model_type" and _works(fewer, use):
            deeper = find_culprit(facts, use, (*path, key)) if isinstance(here[key], dict) else None
            return deeper or (*path, key)
    return None


def value_at(facts: Facts, path: tuple[str, ...]) -> Any:
    """Return what stands in a JSON object under a path of keys."""
    value: Any = facts
    for key in path:
        value = value[key]
    return value


def _works(facts: Facts, use: Callable[[Facts], object]) -> bool:
    with suppress(Exception):
        use(facts)
        return True
    return False
