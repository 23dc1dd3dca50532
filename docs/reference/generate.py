"""Fill in the reference pages while the site is built: the commands' help texts and the public names.

A hook of mkdocs. The command line is read as users read it, from `--help`, whatever library parses it.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING
from functools import cache
from typing import Any

import hifiprune
from hifiprune import config
from hifiprune.config.options import Declared, declared_options

CLI, API = "<!-- generated: command line -->", "<!-- generated: public names -->"
GROUPS = {
    "Commands on checkpoints": ("commands",),
    "Calibration and scoring": ("calibration", "scores", "scoring"),
    "Pruning": ("plan", "pruning"),
    "Evaluation": ("evaluation",),
}
"""Headings of the API page, with the modules whose names go under each; the rest goes under a last one."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of the reference pages."""
    if CLI in markdown:
        markdown = markdown.replace(CLI, command_line())
    return markdown.replace(API, public_names()) if API in markdown else markdown


@cache
def command_line() -> str:
    """Return the help of all commands, each under its heading."""
    commands = re.findall(r"^[│|\s]*([a-z][a-z-]*)\s{2,}\S", help_of(), re.MULTILINE)
    if len(commands) < 10:
        raise RuntimeError(f"`hifiprune --help` lists {commands} only: its commands were not recognized")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = dict(zip(commands, pool.map(help_of, commands), strict=True))
    return "\n\n".join(f"## hifiprune {name}\n\n```text\n{text}\n```" for name, text in texts.items())


def help_of(*words: str) -> str:
    """Return what `hifiprune ... --help` prints to a terminal of 100 columns, without colours."""
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "hifiprune", *words, "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=True)
    return "\n".join(line.rstrip() for line in result.stdout.splitlines()).strip()


def public_names() -> str:
    """Return what the page shows of each public name, by the part of the package that defines it."""
    names = {name: str(getattr(hifiprune, name).__module__) for name in hifiprune.__all__}
    lines, told = [], {*config.__all__}
    for title, parts in [*GROUPS.items(), ("Records and errors", None)]:
        chosen = [name for name in names if name not in told and (not parts or {*names[name].split(".")} & {*parts})]
        told |= {*chosen}
        lines += [f"## {title}", *(f"::: {names[name]}.{name}" for name in chosen)]
    return "\n\n".join([*lines, "## Options", *map(options, config.__all__)])


def options(name: str) -> str:
    """Return a config class with a table of its options, those of its groups by their path."""
    declared: Any = getattr(config, name)
    told = declared.__doc__.partition("\n\n    Attributes:")[0].replace("\n    ", "\n")
    owner = "hifiprune" if name in hifiprune.__all__ else "hifiprune.config"
    rows = [f"| `{'.'.join(each.path)}` | {shown(each)} | {each.option.help} |" for each in declared_options(declared)]
    table = "\n".join(["| option | default | |", "|---|---|---|", *rows]).replace("[", "\\[")  # no links
    return f"### `{owner}.{name}`\n\n{told}\n\n{table}"


def shown(option: Declared) -> str:
    """Return the default of an option."""
    if option.default is MISSING:
        return "required"
    return option.option.shown_default or f"`{option.default!r}`"
