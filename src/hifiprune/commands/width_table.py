"""`table`: check, load, measure what every width of every MLP costs, write."""

from pathlib import Path

from hifiprune.calibration import load_windows
from hifiprune.commands.cost_model import Estimator
from hifiprune.commands.prepare import check_tokens, load_hashed, prepare
from hifiprune.commands.score import batches_of, check_resident
from hifiprune.config.files import to_dict
from hifiprune.config.prune import TableConfig
from hifiprune.engine.machine import condition
from hifiprune.errors import UserError
from hifiprune.io.output_paths import exclusive
from hifiprune.io.resume import ResumeFolder
from hifiprune.models.detect import family_of
from hifiprune.models.lineage import commits_of
from hifiprune.progress import about, labelled, logger
from hifiprune.pruning.measure_widths import measure_widths
from hifiprune.run_record import RunRecord
from hifiprune.scoring.load_scores import check_layout, load_scores
from hifiprune.width_table import WidthTable


@exclusive
def table_checkpoint(model: str, output: str | Path, config: TableConfig) -> RunRecord[WidthTable]:
    """Measure the KL divergence that every width of every MLP costs, and write the table.

    Args:
        model: local folder, hub id or GGUF file.
        output: JSON file to be made.
        config: options.

    Raises:
        UserError: something asked for cannot be done, found before the weights are loaded where possible.
        RunError: numbers, memory or disk failed.
    """
    record: RunRecord[WidthTable] = RunRecord("table", {"model": model, "output": str(output), **to_dict(config)})
    if config.calibration.is_sampled:
        raise UserError("a table of widths needs a text: give a file or data set as --calibration")
    scores = load_scores(config.scores)
    checkpoint, target, skeleton = prepare(
        model,
        output,
        [config.calibration],
        [config.scores],
        compute=config.compute,
        folder=False,
        overwrite=config.overwrite,
    )
    record.commits = commits_of(checkpoint)
    check_layout(scores, skeleton)
    scores.require_finite()
    if reason := family_of(skeleton.config).one_width_reason:
        raise UserError(f"{reason}: there is nothing to choose by a table of widths")
    with record.stage("reading the calibration data"), labelled("reading the calibration text, pieces"):
        windows = load_windows(config.calibration, checkpoint.tokenizer())
    check_tokens(checkpoint, windows)
    compute = batches_of(config.compute, config.calibration)
    check_resident("", compute)
    checkpoint.fetch()
    dense, model_hash = load_hashed(checkpoint, compute, record)
    scores.require_model(model_hash)
    estimator = Estimator(checkpoint, compute, loaded=True)
    layers = dense.config.get_text_config().num_hidden_layers
    probed = config.probes * (config.choices - 1) * layers * windows.shape[1] // 2
    seconds = estimator.repair(len(windows), windows.shape[1], max(map(len, scores.values))).seconds
    logger.info(
        f"Measuring {config.choices - 1} widths of {layers} MLPs on at most {config.probes} of {len(windows)} windows "
        f"of {windows.shape[1]} tokens: {about(seconds + estimator.reading(probed, windows.shape[1]))}"
        f"{condition(estimator.device)}. Interrupted, the same command goes on where it stopped."
    )
    resume_folder = ResumeFolder.beside(target, "table")
    with record.stage("measuring widths"):
        table = measure_widths(
            dense,
            scores,
            windows,
            choices=config.choices,
            probes=config.probes,
            batch_size=compute.batch,
            resume_folder=resume_folder.of(dense, model_hash),
        )
    record.results = table
    table.save(target, overwrite=config.overwrite)
    resume_folder.remove()
    return record
