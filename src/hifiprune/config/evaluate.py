"""The options of `evaluate`, and the zero-shot tasks that it and `compare` run."""

from dataclasses import dataclass
from pathlib import Path

from hifiprune.bounds import COUNT, SEED
from hifiprune.config.groups import ComputeConfig, overwrite_option
from hifiprune.config.options import OUTPUT, TASKS, Checked, group, option
from hifiprune.config.texts import Text

PAPERS = (
    "arc_easy", "arc_challenge", "boolq", "crows_pairs_english", "openbookqa", "piqa", "race", "social_iqa",
    "truthfulqa_mc2", "winogrande",
)  # fmt: skip
"""The ten tasks of arXiv 2603.08083 and 2506.11120, by the harness's names; `papers` stands for them."""


@dataclass(frozen=True)
class Tasks(Checked):
    """The zero-shot tasks to run.

    Names are of tasks, groups or tags; a group reports its own value, if it defines one, and that of every task.
    """

    names: tuple[str, ...] = option(
        help="Zero-shot tasks of lm-evaluation-harness, separated by commas, or 'papers' for the ten of the papers; "
        "needs the package's extra 'tasks'.",
        flag="--tasks",
        metavar="NAMES",
    )
    include_path: Path | None = option(
        None,
        "Folder of task files, which take precedence over the harness's; Python functions that they name by !function "
        "are run.",
        panel=TASKS,
        flag="--task-path",
        metavar="PATH",
    )
    limit: int | None = option(
        None,
        "Maximum number of items of each task: a random sample, the same in every run.",
        panel=TASKS,
        bounds=COUNT,
        shown_default="all",
    )
    seed: int = option(0, "Seed of the draw of items.", bounds=SEED, in_files_only=True)

    def __post_init__(self) -> None:
        """Check the numbers, and put the papers' tasks in place of their name."""
        super().__post_init__()
        names = tuple(each for name in self.names for each in (PAPERS if name == "papers" else [name]))
        object.__setattr__(self, "names", names)


TEXT_OPTIONS = ("source", "seq_len", "max_windows", "text_column")


@dataclass(frozen=True)
class EvaluateConfig(Checked):
    """Options of `evaluate`."""

    text: Text | None = group(None, only=TEXT_OPTIONS)
    against: str | None = option(None, "The dense model, to measure fidelity to.", metavar="DENSE")
    tasks: Tasks | None = None
    card: bool = option(False, "Write the results into the model card of every MODEL.", panel=OUTPUT)
    compute: ComputeConfig = group(ComputeConfig(), only=("device", "dtype", "batch_size", "attention", "stream"))
    overwrite: bool = overwrite_option()
