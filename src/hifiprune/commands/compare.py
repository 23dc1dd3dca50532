"""Criteria side by side on one's own model: `compare` scores, cuts, measures and contrasts.

A cell is a criterion at a ratio with one draw of the calibration windows. What is finished is kept beside the output
until all is done, so an interrupted run goes on where it stopped.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from hifiprune.calibration import read_texts
from hifiprune.commands.compare_plans import Workbench
from hifiprune.commands.inspect import shape_of
from hifiprune.commands.prepare import check_tokens, load_hashed, prepare
from hifiprune.config.files import to_dict
from hifiprune.config.groups import Budget, CriterionOptions
from hifiprune.config.study import CompareConfig
from hifiprune.config.texts import Calibration
from hifiprune.engine.compute import limit_batch
from hifiprune.engine.reproducible import reproducible
from hifiprune.errors import UserError
from hifiprune.evaluation.criteria_comparison import Cell, contrast
from hifiprune.evaluation.text import Held, held_windows
from hifiprune.evaluation.zero_shot_tasks import check_tasks
from hifiprune.io.atomic import local_path, replacing
from hifiprune.io.hashing import hash_tokens
from hifiprune.io.output_paths import exclusive
from hifiprune.io.resume import ResumeFolder
from hifiprune.io.text_files import is_pipe
from hifiprune.io.text_sources import text_files
from hifiprune.models.lineage import commits_of
from hifiprune.progress import labelled
from hifiprune.pruning.allocate import allocate
from hifiprune.run_record import RunRecord
from hifiprune.scores import Scores
from hifiprune.scoring.criteria import find_criterion
from hifiprune.scoring.score import Request
from hifiprune.study_results import CompareResults, HeldText


@exclusive
@reproducible
def compare(model: str, output: str | Path, config: CompareConfig) -> RunRecord[CompareResults]:
    """Prune by every criterion, at every ratio, with several draws of the calibration windows, and measure.

    The folder `output` will hold `compare.json`, the plots, and the scores, ready for `prune`.

    Args:
        model: local folder, hub id or GGUF file.
        output: folder to be made.
        config: options.

    Raises:
        UserError: something asked for cannot be done, found before the weights are loaded where possible.
        RunError: numbers, memory or disk failed.
    """
    ratios, calibration, tasks = config.ratios, config.calibration, config.tasks
    record: RunRecord[CompareResults] = RunRecord("compare", {"model": model, "output": str(output), **to_dict(config)})
    _check(config)
    if tasks:
        check_tasks(tasks)
    checkpoint, target, skeleton = prepare(
        model,
        output,
        [calibration, *config.texts],
        [tasks.include_path] if tasks else [],
        compute=config.compute,
        folder=True,
        overwrite=config.overwrite,
    )
    record.commits = commits_of(checkpoint)
    shape = shape_of(skeleton)
    resume_folder = ResumeFolder.beside(target, "compare")
    widths = {ratio: shape.width_at(Budget(ratio=ratio), config.round_to) for ratio in ratios}
    for width in widths.values():
        shape.check_experts("uniform", width)
    draws = [replace(calibration, seed=calibration.seed + number) for number in range(config.seeds)]
    tokenizer = checkpoint.tokenizer()
    with record.stage("reading the texts"), labelled("reading the texts, pieces"):
        held = [Held(text.source, text.fidelity, held_windows(text, tokenizer)) for text in config.texts]
        texts = [read_texts(draw, tokenizer) for draw in draws]
    most = max(calibration.num_samples, *(len(text.windows) for text in held))
    compute = limit_batch(config.compute, most, "windows")
    check_tokens(checkpoint, *(text.windows for text in texts), *(text.windows for text in held))
    checkpoint.fetch()
    loaded, model_hash = load_hashed(checkpoint, compute, record)
    bench = Workbench(loaded, model, model_hash, tokenizer, resume_folder.of(loaded, model_hash), compute)
    with record.stage("scoring"):
        drawn = [bench.windows(draw, read) for draw, read in zip(draws, texts, strict=True)]
        cells, files = score_draws(bench, draws, drawn, config)
    with record.stage("measuring"):
        dense, *measured = bench.measure([None, *(cell.plan for cell in cells)], [*held, *([tasks] if tasks else [])])
    record.reused_parts = len(bench.resume_folder.reused)
    record.results = CompareResults(
        **contrast(cells, dense, measured, len(held)),
        model_hash=model_hash,
        data_hashes=[hash_tokens(windows) for windows in drawn],
        texts=[HeldText(text.source, list(text.windows.shape)) for text in held],
        widths={f"{ratio:g}": (width, shape.ratio_at(width)) for ratio, width in widths.items()},
    )
    with replacing(target, overwrite=config.overwrite) as folder:
        from hifiprune.reports.plots import draw_comparison

        (folder / "scores").mkdir(parents=True)
        for name, path in files.items():
            shutil.copyfile(path, folder / "scores" / name)
        draw_comparison(record.results, folder)
        record.save(folder / "compare.json")
    resume_folder.remove()
    return record


def score_draws(
    bench: Workbench,
    draws: Sequence[Calibration],
    drawn: Sequence[Int[Tensor, "windows positions"]],
    config: CompareConfig,
) -> tuple[list[Cell], dict[str, Path]]:
    """Return what every draw decides at every ratio, and the files of its scores by their names in the output."""
    cells: list[Cell] = []
    files: dict[str, Path] = {}
    for draw, windows in zip(draws, drawn, strict=True):
        wanted = _requests(config.criteria, config.ratios, config.options, draw.seed)
        scored = dict(zip(wanted, bench.score(windows, list(wanted.values()), draw), strict=True))
        files |= {f"{label}-seed{draw.seed}.safetensors": path for label, (_, path) in scored.items()}
        scores = {label: made for label, (made, _) in scored.items()}
        cells += _cells(scores, config.criteria, config.ratios, draw.seed, config.round_to)
    return cells, files


def _cells(
    scores: dict[str, Scores], criteria: Sequence[str], ratios: Sequence[float], seed: int, round_to: int
) -> list[Cell]:
    """Yield what one draw decides at every ratio."""
    cells = []
    for ratio in ratios:
        for name in criteria:
            chosen = scores[_label(name, ratio)]
            plan = allocate(chosen, Budget(ratio=ratio), round_to=round_to)
            cells.append(Cell(name, ratio, seed, plan, chosen.values))
    return cells


def _label(criterion: str, ratio: float) -> str:
    """Return the name of scores: with the ratio, where presets make them depend on it."""
    return f"{criterion}-{ratio:g}" if find_criterion(criterion).two_stages else criterion


def _requests(
    criteria: Sequence[str], ratios: Sequence[float], options: CriterionOptions | None, seed: int
) -> dict[str, Request]:
    def settled(ratio: float) -> CriterionOptions:
        return replace(options or CriterionOptions(), seed=seed).for_ratio(ratio)

    return {_label(name, ratio): (name, settled(ratio)) for ratio in ratios for name in criteria}


def _check(config: CompareConfig) -> None:
    criteria, calibration, seeds, texts = config.criteria, config.calibration, config.seeds, config.texts
    ratios = [f"{ratio:g}" for ratio in config.ratios]
    given = {"criteria": criteria, "ratios": ratios, "texts": [text.source for text in texts]}
    for what, values in given.items():
        if not values:
            raise UserError(f"{what}: give at least one")
        if len(set(values)) != len(values):
            raise UserError(f"{what} {', '.join(values)}: each may be given once")
    for name in criteria:
        find_criterion(name)
    if seeds > 1 and any(map(is_pipe, calibration.texts)):
        raise UserError(f"a pipe is read only once, and {seeds} draws read it anew: write it to a file, or --seeds 1")
    for text in texts:
        if any(_overlap(source, text.source) for source in calibration.texts):
            raise UserError(f"{text.source} is in both calibration and held-out text; measure on another one")


def _overlap(first: str, second: str) -> bool:
    """Return whether two sources are one, or one is a file in the other's folder, however they are spelled."""
    paths = [local_path(source).resolve() for source in (first, second)]
    if not all(path.exists() for path in paths):
        return first.removesuffix(":train") == second.removesuffix(":train")
    files = [{path} if path.is_file() else set(text_files(path)) for path in paths]
    return not files[0].isdisjoint(files[1])
