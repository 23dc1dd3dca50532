"""Errors that a user can act on: each says the value, the limit and the remedy."""

import difflib
from collections.abc import Iterable


class HifipruneError(Exception):
    """Base of all errors that hifiprune raises on purpose; the command line exits with `exit_code`."""

    exit_code = 1


class UserError(HifipruneError, ValueError):
    """The request cannot be carried out as asked: a wrong value, file or combination (exit code 2)."""

    exit_code = 2


class RunError(HifipruneError, RuntimeError):
    """The request was sound but the run failed: numbers, disk, memory or an interruption (exit code 1)."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for a name that is not among the known ones."""
    names = list(known)
    return UserError(f"{what} '{name}' is not known; known are {', '.join(names)}{nearest_name(name, names)}")
