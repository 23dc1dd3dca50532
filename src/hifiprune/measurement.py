"""The story of `evaluate`: a checkpoint measured on a text, beside the dense one."""

from dataclasses import asdict

from hifiprune.checkpoint import find_checkpoint
from hifiprune.compute import Compute
from hifiprune.evaluation import measure
from hifiprune.preparation import check_model, load, plain_arguments
from hifiprune.record import RunRecord
from hifiprune.texts import Text
from hifiprune.voice import SILENT, Voice


def evaluate(
    model: str,
    text: str,
    *,
    against: str | None = None,
    seq_len: int = 1024,
    max_windows: int | None = None,
    text_column: str | None = None,
    compute: Compute = Compute(),
    voice: Voice = SILENT,
) -> RunRecord:
    """Perplexity of a checkpoint on a text, and its fidelity to the dense one `against`.

    The text is one stream of tokens cut into windows of `seq_len` without overlap, each scored from its second token.

    Raises:
        UserError: the text is too short or something else asked for cannot be done.
    """
    record = RunRecord(
        "evaluate",
        plain_arguments(
            model=model, against=against, text=text, seq_len=seq_len, max_windows=max_windows, compute=compute
        ),
    )
    source = Text(text, seq_len, max_windows, text_column=text_column)
    checkpoints = [find_checkpoint(name) for name in (model, against) if name]
    for checkpoint in checkpoints:
        check_model(checkpoint, source)
    windows = source.held(checkpoints[0].tokenizer()).windows
    for checkpoint in checkpoints:
        checkpoint.fetch()
    with record.stage("loading the weights"):
        models = [load(checkpoint, compute) for checkpoint in checkpoints]
    names = " against ".join(checkpoint.name for checkpoint in checkpoints)
    voice.say(f"Evaluating {names} on {len(windows)} windows of {seq_len} tokens of {text}.")
    with record.stage("evaluating"):
        pruned, dense = models[0], models[1] if against else None
        metrics = measure(pruned, windows, dense, batch_size=compute.batch_size, track=voice.track("evaluating"))
    plain = {name: asdict(estimate) for name, estimate in metrics.items()}
    record.results = {"windows": len(windows), "positions": seq_len, "metrics": plain}
    return record
