"""The command line's options, declared once for all commands."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from hifiprune.config.groups import mixture
from hifiprune.errors import UserError

if TYPE_CHECKING:
    from hifiprune.config.evaluate import Tasks
    from hifiprune.config.groups import Calibration

Model = Annotated[str, Argument(metavar="MODEL", help="Local folder, hub id or .gguf file.")]
Output = Annotated[str, Option(metavar="PATH", help="Where to write (a new file or folder, whole or not at all).")]
SOURCES = (
    "Calibration text: .txt, .jsonl, .csv or .parquet file, or one of these as .gz, .bz2, .xz or .zst; a folder of "
    "those, a pipe ('-' is standard input), a hub data set id[:config][:split], "
    "'python-docs' (ships inside Python) or 'self' (sampled from the model). Given more than once, sources are mixed: "
    "SOURCE:0.3 gets 30% of the windows, those without a share the rest."
)
NumSamples = Annotated[int, Option(help="Calibration windows.")]
SeqLen = Annotated[int, Option(help="Tokens per window.")]
Seed = Annotated[int, Option(help="Seed of the choice of windows.")]
Sampler = Annotated[
    str,
    Option(
        help="documents: a random window of each long one; stream: all joined and cut; auto: stream for a single one."
    ),
]
TextColumn = Annotated[str | None, Option(help="Column of the text; guessed if not given.")]
CRITERIA = Option("--criterion", help="How to score: see 'hifiprune criteria'; hfprune is the paper's definition.")
CriterionName = Annotated[str, CRITERIA]
PresetCriterion = Annotated[str | None, CRITERIA]
PAPERS = "if not given the papers' for the ratio, or for 20% where no ratio is named."
Alpha = Annotated[float | None, Option(help=f"Self-distillation: share of the divergence; {PAPERS}")]
Temperature = Annotated[float | None, Option(help=f"Self-distillation: of the dense model; {PAPERS}")]
LightCut = Annotated[float, Option(help="Self-distillation: fraction of the neurons cut in its first stage.")]
LabelSamples = Annotated[int, Option(help="Fisher: labels drawn at each position, a backward pass each.")]
BiasCompensation = Annotated[
    bool,
    Option("--bias-compensation", help="As FLAP, with its scores: mean outputs of removed neurons go into biases."),
]
Repair = Annotated[
    str | None,
    Option(help="ridge: refit each MLP's output map to what the dense model computes, in closed form; or none."),
]
Preset = Annotated[
    str, Option(help="What stands for all that is not given: default, or the papers' exact systems, hfprune, sdmprune.")
]
Allocation = Annotated[
    str | None,
    Option(
        help="uniform: one width for all layers; global: one threshold on the scores, by 'fisher' unless another "
        "criterion is given; searched: widths by trial on the calibration text. The last two make checkpoints that "
        "load with trust_remote_code=True."
    ),
]
Floor = Annotated[float, Option(help="Fraction of the uniform width that every layer keeps where widths differ.")]
Trials = Annotated[int, Option(help="Plans that a search for widths tries.")]
Steps = Annotated[int, Option(help="How often to score; the model is cut, and repaired, by as much between.")]
ROUNDING = Option(help="Widths become the nearest multiple; 1 for the papers' exact widths.")
RoundTo = Annotated[int, ROUNDING]
PresetRoundTo = Annotated[int | None, ROUNDING]
BatchSize = Annotated[int, Option(help="Windows per step; results do not depend on it.")]
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, Option(help="Arithmetic: float32, bfloat16, float16; auto: float32 on CPU, the model's on GPU.")]
UntilStable = Annotated[
    float | None,
    Option(help="Stop scoring once the kept neurons would agree so well with those by all windows, such as 0.99."),
]
Stream = Annotated[
    bool | None,
    Option("--stream/--in-memory", help="Read each block's weights from the disk when it runs, or not."),
]
Scratch = Annotated[
    str | None,
    Option("--scratch", help="Folder on a fast disk for a streamed model's activations, which else stay in memory."),
]
Recompute = Annotated[
    bool | None, Option("--recompute/--keep-graphs", help="Trade time for memory; decided by free memory if not given.")
]
Attention = Annotated[
    str | None, Option(help="Attention implementation, such as flash_attention_2; the model's default if not given.")
]
TaskNames = Annotated[
    str | None,
    Option(
        "--tasks",
        help="Zero-shot tasks of lm-evaluation-harness, separated by commas, or 'papers' for the ten of the papers; "
        "needs the extra 'tasks'.",
    ),
]
TaskPath = Annotated[Path | None, Option(help="Folder of more task files; Python that they name by !function is run.")]
Limit = Annotated[int | None, Option(help="So many items of each task, drawn at random, always the same.")]
ShardSize = Annotated[str, Option(help="Largest weight file.")]
DryRun = Annotated[bool, Option("--dry-run", help="Say what it will cost in time, memory and disk, and stop.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object on standard output.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an existing output.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Show only warnings and errors, and no progress.")]
Verbose = Annotated[bool, Option("--verbose", "-v", help="Also show each stage and how long it took.")]
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]


def drawn_from(words: list[str], *how: Any) -> "Calibration":
    """The `Calibration` that `--calibration` and its companions ask for."""
    from hifiprune.config.groups import Calibration

    facts: Any = mixture(words)
    return replace(Calibration(facts["source"], *how), mixed=facts["mixed"])


def asked_tasks(names: str | None, path: Path | None, limit: int | None) -> "Tasks | None":
    """The `Tasks` that `--tasks` and its companions ask for."""
    from hifiprune.config.evaluate import Tasks

    if names is None and (path or limit is not None):
        raise UserError("--task-path and --limit need --tasks with the names of tasks")
    return None if names is None else Tasks(tuple(listed(names)), path, limit)


def check_tasks_named(tasks: "Tasks | None", given: frozenset[str]) -> None:
    """Refuse what is said of tasks where none is named."""
    if tasks is None and given & {"task_path", "limit"}:
        raise UserError("--task-path and --limit need --tasks with the names of tasks")


def listed(names: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in names.split(",") if name.strip()]
