"""Adapter to lm-evaluation-harness: find its tasks by name, silence its output, undo its side effects."""

import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hifiprune.engine.context import frozen
from hifiprune.errors import RunError, UserError, nearest_name
from hifiprune.io.atomic import local_path


def find_tasks(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """Return a `TaskManager` of the harness that knows every name in `tasks`.

    Raises:
        UserError: the harness is not installed, the folder does not exist, or a task is unknown or named twice.
    """
    if find_spec("lm_eval") is None:
        raise UserError("zero-shot tasks need lm-evaluation-harness: pip install 'hifiprune[tasks]'")
    include_path = None if include_path is None else local_path(include_path)
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"the folder of task files {include_path} does not exist")
    if not tasks:
        raise UserError("no task is named; name at least one, such as piqa")
    from lm_eval.tasks import TaskManager

    with harness_quiet():
        manager = TaskManager(include_path=include_path, include_defaults=False)
        index = manager.task_index
        if not all(name in index for name in _with_members(tasks, index)):
            for name, entry in _own_tasks().items():
                index.setdefault(name, entry)
    unknown = [f"unknown task '{name}'{nearest_name(name, index)}" for name in tasks if name not in index]
    if unknown:
        raise UserError(f"{', '.join(unknown)} (lm_eval ls tasks lists the harness's own)")
    asked = Counter(member for name in tasks for member in set(_with_members([name], index)))
    twice = [name for name, times in asked.items() if times > 1]
    if twice:
        raise UserError(f"{', '.join(twice)} would run twice; name a task or a group that holds it, once")
    return manager


@cache
def _own_tasks() -> dict[str, Any]:
    """Return the harness's own tasks by name; reads thousands of files, so only once."""
    from lm_eval.tasks import TaskManager

    index: dict[str, Any] = TaskManager().task_index
    return index


def _with_members(names: Iterable[str], index: dict[str, Any]) -> Iterator[str]:
    """Yield the names, and those of the members of the groups among them."""
    for name in names:
        yield name
        members = (index[name].cfg or {}).get("task") if name in index else None
        if isinstance(members, list):
            given = (each if isinstance(each, str) else each.get("group", each.get("task", "")) for each in members)
            yield from _with_members(given, index)


@contextmanager
def harness_quiet() -> Iterator[None]:
    """Hide the harness's progress bars, prints, and log messages below errors."""
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level, shown = logger.level, tqdm.__init__

    def hidden(self: Any, *args: Any, **options: Any) -> None:
        shown(self, *args, **{**options, "disable": True})

    try:
        logger.setLevel(logging.ERROR)
        tqdm.__init__ = hidden  # most of the harness's bars have no switch of their own
        with redirect_stdout(StringIO()):
            yield
    finally:
        tqdm.__init__ = shown
        logger.setLevel(level)


@contextmanager
def seeded() -> Iterator[None]:
    """Use the seeds of the harness's command line within this context, for tasks that shuffle; restore them after."""
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    try:
        random.seed(0)
        np.random.seed(1234)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def as_it_is(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation mode within this context, and keep the harness from tying its weights.

    The harness ties weights wherever the configuration says so, which would replace the head of a checkpoint that has
    its own in spite of its configuration.
    """
    with frozen(model):
        model.__dict__["tie_weights"] = lambda: None
        try:
            yield
        finally:
            del model.__dict__["tie_weights"]


def built_once(task: Any, items: list[int]) -> None:
    """Build a task's prompts for these items now; later builds only clear the answers."""
    task.build_all_requests(samples=items)

    def cleared(**how: Any) -> None:
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}

    task.build_all_requests = cleared


@contextmanager
def explained(tasks: Sequence[str], batch_size: int = 1) -> Iterator[None]:
    """Turn the harness's errors, missing data and lack of memory into one message each."""
    names = ", ".join(tasks)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"not enough memory for {batch_size} prompts at once; use a smaller batch size") from error
    except OSError as error:
        raise RunError(f"the data of {names} cannot be had: {error}") from error
    except (ImportError, ValueError) as error:
        raise UserError(f"the harness cannot run {names}: {error}") from error


@contextmanager
def files_explained(tasks: Sequence[str]) -> Iterator[None]:
    """Turn mistakes in task files, such as an unknown field, into one message."""
    from jinja2 import TemplateError

    try:
        yield
    except (KeyError, AttributeError, TypeError, IndexError, TemplateError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"a file of {', '.join(tasks)} refers to an unknown field: {what}") from error
