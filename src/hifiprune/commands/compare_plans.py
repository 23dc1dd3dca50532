"""A dense model on which plans are tried out; scores and measurements survive an interruption."""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hifiprune.calibration import Texts, sample_windows
from hifiprune.commands.cost_model import Estimator
from hifiprune.commands.messages import announce_scoring
from hifiprune.config.evaluate import Tasks
from hifiprune.config.groups import ComputeConfig
from hifiprune.config.texts import Calibration
from hifiprune.engine.compute import resolved_device
from hifiprune.engine.machine import condition
from hifiprune.engine.temporary_cut import cut
from hifiprune.evaluation.criteria_comparison import Measured
from hifiprune.evaluation.fidelity import Reference, measure_windows
from hifiprune.evaluation.text import Held
from hifiprune.evaluation.zero_shot_tasks import TaskRunner
from hifiprune.io.hashing import hash_tokens
from hifiprune.io.pass_checkpoint import PassCheckpoint
from hifiprune.io.resume import ResumeFolder
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.plan import Plan
from hifiprune.progress import about, labelled, logger, track
from hifiprune.scores import Scores
from hifiprune.scoring.criteria import find_criterion
from hifiprune.scoring.load_scores import check_layout, load_scores
from hifiprune.scoring.score import Request, score_all


@dataclass(frozen=True)
class Workbench:
    """A dense model on which plans are tried out.

    Attributes:
        model: the dense model; it is cut for a while, and is whole again after.
        name: what the user called it.
        model_hash: of its weights.
        tokenizer: of the model, for texts and tasks.
        resume_folder: keeps scores and measurements.
        compute: device and arithmetic.
    """

    model: PreTrainedModel
    name: str
    model_hash: str
    tokenizer: PreTrainedTokenizerBase
    resume_folder: ResumeFolder
    compute: ComputeConfig

    def windows(self, calibration: Calibration, texts: Texts) -> Int[Tensor, "windows positions"]:
        """Return calibration windows; those that the model itself writes are kept in the resume folder."""
        if not calibration.is_sampled:
            return texts.windows
        path = self.resume_folder.path("windows", asdict(calibration), hash_tokens(texts.windows), texts.prompts)
        known = self.resume_folder.read_json(path)
        if known is None:
            with labelled(f"sampling text from the model, seed {calibration.seed}"):
                known = {"windows": sample_windows(self.model, calibration, texts).tolist()}
            self.resume_folder.write_json(path, known)
        return torch.tensor(known["windows"])

    def score(
        self, windows: Int[Tensor, "windows positions"], requests: Sequence[Request], calibration: Calibration
    ) -> list[tuple[Scores, Path]]:
        """Return scores for each request and their file; made together unless they are there from before."""
        paths = [self._scores_path(request, windows) for request in requests]
        found = {path: known for path in paths if (known := self.resume_folder.read(path, self._read_scores))}
        missing = {path: request for path, request in zip(paths, requests, strict=True) if path not in found}
        if missing:
            wanted = list(missing.values())
            cost = announce_scoring(windows, wanted, self._estimator)
            logger.info(f"Draw with seed {calibration.seed}: {cost}{condition(self._estimator.device)}.")
            with labelled(f"scoring, seed {calibration.seed}"):
                made = score_all(
                    self.model,
                    windows,
                    wanted,
                    batch_size=self.compute.batch_size,
                    recompute=self.compute.recompute,
                    settings={"calibration": asdict(calibration)},
                    model_hash=self.model_hash,
                    keeper=PassCheckpoint(self.resume_folder),
                )
            for path, scores in zip(missing, made, strict=True):
                self.resume_folder.write(path, scores.save)
                found[path] = scores
        return [(found[path], path) for path in paths]

    def _read_scores(self, path: Path) -> Scores:
        scores = load_scores(path)
        check_layout(scores, self.model)
        return scores

    @cached_property
    def _estimator(self) -> Estimator:
        return Estimator(find_checkpoint(self.name), self.compute, loaded=True)

    def _scores_path(self, request: Request, windows: Int[Tensor, "windows positions"]) -> Path:
        criterion, options = find_criterion(request[0]), request[1]
        data = hash_tokens(windows) if criterion.statistic else ""
        return self.resume_folder.path("scores", criterion.name, data, criterion.used(options), suffix=".safetensors")

    def measure(self, plans: Sequence[Plan | None], what: Sequence[Held | Tasks]) -> list[list[Measured]]:
        """Measure every plan on every text and by every set of tasks; None is the dense model.

        What is there from before is not made again, and equal plans are measured once.
        """
        table = [[self._path(plan, each) for each in what] for plan in plans]
        wanted = {
            path: (plan, each)
            for plan, row in zip(plans, table, strict=True)
            for each, path in zip(what, row, strict=True)
        }
        found = {path: self.resume_folder.read_json(path) for path in wanted}
        todo = [path for path, known in found.items() if known is None]
        texts = {each.source: each for each in what if isinstance(each, Held)}
        missing = Counter(each.source for path in todo if isinstance(each := wanted[path][1], Held))
        seconds = sum((number * self._seconds(texts[source]) for source, number in missing.items()), start=0.0)
        tasks = " and the time of the tasks" if any(isinstance(each, Tasks) for each in what) else ""
        logger.info(
            f"Measuring: {len(todo)} of {len(wanted)} measurements are to be made, {about(seconds)}{tasks}"
            f"{condition(resolved_device(self.compute))}. Interrupted, the same command goes on where it stopped."
        )
        references = {
            source: Reference.of(self.model, texts[source].windows, self.compute.batch)
            for source in missing
            if texts[source].fidelity
        }
        asked = [each for each in what if isinstance(each, Tasks) and any(wanted[path][1] is each for path in todo)]
        exams = {each: TaskRunner(each) for each in asked}
        steps = track(todo, "measuring")
        for _, paths in groupby(steps, key=lambda path: id(wanted[path][0])):  # a model is cut once for all texts
            first = next(paths)
            plan = wanted[first][0]
            with cut(self.model, plan) if plan else nullcontext():
                for path in chain([first], paths):
                    each = wanted[path][1]
                    found[path] = self._take(exams[each]) if isinstance(each, Tasks) else self._read(each, references)
                    self.resume_folder.write_json(path, found[path])
        return [[found[path] for path in row] for row in table]

    def _read(self, text: Held, references: dict[str, Reference]) -> Measured:
        values = measure_windows(self.model, text.windows, references.get(text.source), batch_size=self.compute.batch)
        return {name: each.tolist() for name, each in values.items()}

    def _take(self, exam: TaskRunner) -> Measured:
        answers = exam.ask(self.model, self.tokenizer, batch_size=self.compute.batch)
        return {name: [found.accuracy.value] for name, found in answers.items()}

    def _path(self, plan: Plan | None, what: Held | Tasks) -> Path:
        """Return a path named by all that the measurement depends on."""
        kept = [indices.tolist() for indices in plan.kept] if plan else None
        if isinstance(what, Held):
            facts: list[Any] = [hash_tokens(what.windows), what.fidelity]
        else:
            facts = [what.names, str(what.include_path), what.limit, what.seed]
        return self.resume_folder.path("cells", *facts, kept)

    def _seconds(self, text: Held) -> float:
        """Estimate the seconds of a measurement: a forward pass, half as much again for every metric."""
        one_pass = self._estimator.reading(text.windows.numel(), text.windows.shape[1])
        return one_pass * (1.5 if text.fidelity else 1.1)
