"""What commands take beside the options of their configs, declared once."""

from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from hifiprune.errors import UserError

if TYPE_CHECKING:
    from hifiprune.config.evaluate import Tasks

Model = Annotated[str, Argument(metavar="MODEL", help="Local folder, hub id or .gguf file.")]
Output = Annotated[str, Option(metavar="PATH", help="File or folder to create; it appears only when it is complete.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an existing output.", metavar="")]


def check_tasks_named(tasks: "Tasks | None", given: frozenset[str]) -> None:
    """Refuse what is said of tasks where none is named.

    Args:
        tasks: zero-shot tasks, if any are named.
        given: names of the flags that were given.

    Raises:
        UserError: there is none, and something is said of them.
    """
    if tasks is None and given & {"task_path", "limit"}:
        raise UserError("--task-path and --limit need --tasks with the names of tasks")
