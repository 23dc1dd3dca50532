"""The command line: parses, calls the pipeline, prints."""

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import Argument, Option

from hifiprune import __version__
from hifiprune.errors import HifipruneError
from hifiprune.voice import Voice

app = typer.Typer(
    name="hifiprune",
    help="Make a large language model smaller by removing the MLP neurons whose loss changes its predictions least.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SCORING_FLAGS = (
    "--num-samples", "--seq-len", "--seed", "--sampler", "--text-column", "--criterion", "--batch-size", "--dtype",
    "--recompute", "--keep-graphs", "--attention",
)  # fmt: skip
Model = Annotated[str, Argument(metavar="MODEL", help="Local folder, hub id or .gguf file.")]
Output = Annotated[Path, Option(help="What to make; written beside and renamed when whole.")]
SOURCES = (
    "Calibration text: .txt, .jsonl or .parquet file, a folder of those, a hub data set id[:config][:split], "
    "'python-docs' (ships inside Python) or 'self' (sampled from the model)."
)
NumSamples = Annotated[int, Option(help="Calibration windows.")]
SeqLen = Annotated[int, Option(help="Tokens per window.")]
Seed = Annotated[int, Option(help="Seed of the choice of windows.")]
Sampler = Annotated[
    str, Option(help="documents: a random window of each long document; stream: all joined and cut; auto: by source.")
]
TextColumn = Annotated[str | None, Option(help="Column of the text; guessed if not given.")]
CriterionName = Annotated[str, Option("--criterion", help="entropy, or hfprune for the paper's definition for good.")]
BatchSize = Annotated[int, Option(help="Windows per step; results do not depend on it.")]
Device = Annotated[str, Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, Option(help="Arithmetic: float32, bfloat16, float16; auto: float32 on CPU, the model's on GPU.")]
Recompute = Annotated[
    bool | None, Option("--recompute/--keep-graphs", help="Trade time for memory; decided by free memory if not given.")
]
Attention = Annotated[
    str | None, Option(help="Attention implementation, such as flash_attention_2; the model's default if not given.")
]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object on standard output.")]
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]


@app.command()
def prune(
    model: Model,
    output: Output,
    ratio: Annotated[float | None, Option(help="Fraction of all parameters to remove.")] = None,
    neuron_ratio: Annotated[float | None, Option(help="Fraction of the MLP neurons to remove.")] = None,
    width: Annotated[int | None, Option(help="Neurons that every MLP keeps.")] = None,
    calibration: Annotated[str | None, Option(help=SOURCES)] = None,
    scores: Annotated[Path | None, Option(help="Scores made before, instead of a calibration.")] = None,
    num_samples: NumSamples = 128,
    seq_len: SeqLen = 1024,
    seed: Seed = 0,
    sampler: Sampler = "auto",
    text_column: TextColumn = None,
    criterion: CriterionName = "entropy",
    round_to: Annotated[int, Option(help="Widths become the nearest multiple; 1 for the papers' exact widths.")] = 128,
    batch_size: BatchSize = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    recompute: Recompute = None,
    attention: Attention = None,
    shard_size: Annotated[str, Option(help="Largest weight file.")] = "5GB",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Remove the least important neurons; write a smaller, ordinary checkpoint."""
    import hifiprune as hp
    from hifiprune import printing

    voice = _voice()
    if scores:
        ignored = [word for word in sys.argv if word.split("=")[0] in SCORING_FLAGS]
        if ignored:
            voice.say(f"Ignored, since the --scores were made before: {', '.join(ignored)}.")
    record = hp.prune(
        model,
        output,
        hp.Budget(ratio, neuron_ratio, width),
        hp.Calibration(calibration, num_samples, seq_len, seed, sampler, text_column) if calibration else None,
        scores=scores,
        criterion=criterion,
        round_to=round_to,
        compute=hp.Compute(device, dtype, batch_size, recompute, attention),
        shard_size=shard_size,
        overwrite=overwrite,
        voice=voice,
    )
    _print(record.to_dict(), as_json, lambda: printing.pruned(record, output))


@app.command()
def score(
    model: Model,
    output: Output,
    calibration: Annotated[str, Option(help=SOURCES)],
    num_samples: NumSamples = 128,
    seq_len: SeqLen = 1024,
    seed: Seed = 0,
    sampler: Sampler = "auto",
    text_column: TextColumn = None,
    criterion: CriterionName = "entropy",
    batch_size: BatchSize = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    recompute: Recompute = None,
    attention: Attention = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Score every neuron once, to prune at any ratio later."""
    import hifiprune as hp
    from hifiprune import printing

    record = hp.score_checkpoint(
        model,
        output,
        hp.Calibration(calibration, num_samples, seq_len, seed, sampler, text_column),
        criterion=criterion,
        compute=hp.Compute(device, dtype, batch_size, recompute, attention),
        overwrite=overwrite,
        voice=_voice(),
    )
    _print(record.to_dict(), as_json, lambda: printing.scored(record, model, output))


@app.command()
def evaluate(
    model: Model,
    text: Annotated[str, Option(help="Text to measure on: any source that --calibration takes but 'self'.")],
    against: Annotated[str | None, Option(metavar="DENSE", help="The dense model to compare with.")] = None,
    seq_len: SeqLen = 1024,
    max_windows: Annotated[int | None, Option(min=1, help="Use only the first windows.")] = None,
    text_column: TextColumn = None,
    batch_size: BatchSize = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity and, against the dense model, fidelity."""
    import hifiprune as hp
    from hifiprune import printing

    record = hp.evaluate(
        model,
        text,
        against=against,
        seq_len=seq_len,
        max_windows=max_windows,
        text_column=text_column,
        compute=hp.Compute(device, dtype, batch_size, None, attention),
        voice=_voice(),
    )
    _print(record.to_dict(), as_json, lambda: printing.evaluated(record))


@app.command()
def inspect(model: Model, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show a model's MLPs and the widths that ratios would give, without loading weights."""
    import hifiprune as hp
    from hifiprune import printing

    facts = hp.inspect(model)
    _print(facts, as_json, lambda: printing.inspected(facts))


@app.command()
def demo(
    output: Annotated[Path, Option(help="Folder for the models and the results.")] = Path("demo-out"),
    model: Annotated[str | None, Option(help="Another model than SmolLM2-135M-Instruct.")] = None,
    num_samples: NumSamples = 24,
    seq_len: SeqLen = 512,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prune a real small model by 20% on this machine and show how faithful it stays."""
    from hifiprune import demonstration, printing

    summary = demonstration.run(output, model, num_samples, seq_len, _voice())
    _print(summary, as_json, lambda: printing.demonstrated(summary, output))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, Option("--version", help="Show the version.")] = False) -> None:
    if version:
        typer.echo(f"hifiprune {__version__}")
        raise typer.Exit


def _voice() -> Voice:
    """Speak on standard error, and keep transformers from speaking too."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Voice(Console(stderr=True))


def _print(facts: dict[str, Any], as_json: bool, table: Any) -> None:
    if as_json:
        typer.echo(json.dumps(facts, default=str))
    else:
        table()


class _Stopped(BaseException):
    """The run was asked to end by a signal; no library catches it on the way out."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped(signal.Signals(number).name)


def main() -> None:
    """Run the command line; a failure is one message and an exit code: 2 for the user's mistakes, 1 for the rest."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except HifipruneError as error:
        _fail(error, str(error), error.exit_code)
    except _Stopped as error:
        _fail(error, f"interrupted by {error}: no half-written output is left; the same command starts again", 1)
    except Exception as error:  # noqa: BLE001 - the edge: whatever is left is our bug, said in one line
        _fail(error, f"{type(error).__name__}: {error} (a bug in hifiprune or a library; --debug shows where)", 1)


def _fail(error: BaseException, message: str, code: int) -> None:
    if "--debug" in sys.argv:
        raise error
    Console(stderr=True).print(f"error: {message}", style="red", highlight=False, soft_wrap=True, markup=False)
    sys.exit(code)
