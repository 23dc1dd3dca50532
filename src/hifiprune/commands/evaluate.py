"""The story of `evaluate`: checkpoints measured on a text, beside the dense one, and by zero-shot tasks."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.commands.cost_model import Estimator
from hifiprune.commands.prepare import check_model, check_tokens, load_hashed
from hifiprune.config.evaluate import EvaluateConfig
from hifiprune.config.files import to_dict
from hifiprune.config.groups import ComputeConfig
from hifiprune.engine.compute import limit_batch
from hifiprune.engine.context import check_names
from hifiprune.engine.machine import condition
from hifiprune.errors import UserError
from hifiprune.evaluation.bootstrap import Estimate
from hifiprune.evaluation.fidelity import measure
from hifiprune.evaluation.text import held_windows
from hifiprune.evaluation.token_comparison import read_passage
from hifiprune.evaluation.zero_shot_tasks import Answers, TaskRunner, average, check_tasks, differences
from hifiprune.io.atomic import replacing
from hifiprune.io.hashing import hash_tokens
from hifiprune.io.output_paths import check_target, exclusive
from hifiprune.io.resume import ResumeFolder, kept
from hifiprune.io.schemas import PASSAGES
from hifiprune.models.checkpoint import Checkpoint, find_checkpoint
from hifiprune.models.lineage import commits_of, read_with
from hifiprune.models.mlp import count_parameters
from hifiprune.progress import about, how_many, labelled, logger
from hifiprune.reports.model_card import add_results, check_cards
from hifiprune.run_record import RunRecord

PASSAGES_READ, PASSAGE_TOKENS = 3, 96
"""How many passages of a text are shown token by token, and how much of each."""
PROMPTS = 8
"""Asked at once where one window is measured: they are short."""


@exclusive
def evaluate(models: str | Sequence[str], config: EvaluateConfig, output: str | Path | None = None) -> RunRecord:
    """Measure perplexity of checkpoints on a text, fidelity to the dense one, and zero-shot accuracy.

    The text is one stream of tokens cut into windows without overlap, each scored from its second token. Models answer
    the same items of the tasks, so that their differences to the dense one, or else to the first, are taken item by
    item.

    Args:
        models: local folders, hub ids or GGUF files.
        config: options.
        output: folder to be made, with the results in `run.json`; with it, an interrupted run continues where it
            stopped.

    Raises:
        UserError: the text is too short or something else asked for cannot be done.
        RunError: numbers, memory or the data of a task failed.
    """
    names = [models] if isinstance(models, str) else list(models)
    record = RunRecord("evaluate", {"models": names, **to_dict(config)})
    check_names(names)
    _check_asked(config)
    dense = find_checkpoint(config.against) if config.against else None
    checkpoints = [find_checkpoint(name) for name in names]
    everyone = [dense, *checkpoints] if dense else checkpoints
    record.commits = commits_of(*everyone)
    check_models(everyone, config)
    if config.card:
        check_cards(checkpoints)
    target = None if output is None else _target(output, everyone, config)
    unfinished = ResumeFolder.beside(target, "evaluate") if target else None
    bench = load_data(everyone, config, record, unfinished)
    logger.info(bench.cost(everyone[0], len(everyone)))
    if dense:
        bench.take_dense(dense)
    for checkpoint in checkpoints:
        bench.take(checkpoint)
    record.results = bench.results()
    if config.card:
        for checkpoint in checkpoints:
            add_results(checkpoint.folder, checkpoint.name, record.results, config.text.source if config.text else None)
    if target and unfinished:
        record.reused_parts = len(unfinished.reused)
        with replacing(target, overwrite=config.overwrite) as new:
            new.mkdir()
            record.save(new / "run.json")
            (new / PASSAGES).write_text(json.dumps(bench.passages), encoding="utf-8")
        unfinished.remove()
    return record


def _check_asked(config: EvaluateConfig) -> None:
    if config.text is None and config.tasks is None:
        raise UserError("there is nothing to measure: give --text, --tasks or both")
    if config.tasks and config.compute.stream:
        raise UserError("zero-shot tasks are asked with weights in memory only: leave out --stream, or --tasks")


def check_models(checkpoints: Sequence[Checkpoint], config: EvaluateConfig) -> None:
    """Refuse models that cannot be measured, or cannot be compared on one text."""
    for checkpoint in checkpoints:
        check_model(checkpoint, config.compute, config.text)
    sizes = {checkpoint.config().get_text_config().vocab_size for checkpoint in checkpoints}
    if config.text and len(sizes) > 1:
        found = " and ".join(map(str, sorted(sizes)))
        raise UserError(
            f"the vocabularies differ ({found} tokens): perplexities would not compare; measure one at a time"
        )


def _target(output: str | Path, checkpoints: Sequence[Checkpoint], config: EvaluateConfig) -> Path:
    """Return the absolute path of the output, which must not be among what is read."""
    read = [path for checkpoint in checkpoints for path in read_with(checkpoint)]
    text = config.text.source if config.text else None
    tasks = config.tasks.include_path if config.tasks else None
    return check_target(output, folder=True, overwrite=config.overwrite, inputs=[*read, text, tasks])


def load_data(
    checkpoints: Sequence[Checkpoint], config: EvaluateConfig, record: RunRecord, unfinished: ResumeFolder | None
) -> "Bench":
    """Read the text and the tasks, and get the models' files."""
    if config.tasks:
        check_tasks(config.tasks)
    windows = held_windows(config.text, checkpoints[0].tokenizer()) if config.text else None
    if windows is not None:
        check_tokens(checkpoints[0], windows)
    tasks = config.tasks
    exams = {name: TaskRunner(replace(tasks, names=(name,))) for name in tasks.names} if tasks else {}
    prompts = max((len(exam.prompts) for exam in exams.values()), default=0)
    rows = max(len(windows) if windows is not None else 1, -(-prompts // PROMPTS))
    compute = limit_batch(config.compute, rows, "windows, or groups of prompts" if prompts else "windows")
    for checkpoint in checkpoints:
        checkpoint.fetch()
    return Bench(windows, exams, compute, record, unfinished)


@dataclass
class Bench:
    """Checkpoints measured one after another.

    Attributes:
        windows: of the text, to measure perplexity and fidelity on.
        exams: tasks to be taken, by the names that they were asked by.
        compute: device and arithmetic.
        record: of the run.
        unfinished: keeps what is finished, if anything does.
        dense: the dense model, where others are compared with it token by token.
        dense_name: what the user called it.
        dense_hash: of its weights.
        metrics: on the text, by checkpoint.
        answers: to the tasks, by checkpoint.
        passages: the beginnings of some windows read beside the dense model, by checkpoint.
        parameters: how many, by checkpoint.
    """

    windows: Int[Tensor, "windows positions"] | None
    exams: dict[str, TaskRunner]
    compute: ComputeConfig
    record: RunRecord
    unfinished: ResumeFolder | None
    dense: PreTrainedModel | None = None
    dense_name: str = ""
    dense_hash: str = ""
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, dict[str, Answers]] = field(default_factory=dict)
    passages: dict[str, list[list[dict[str, Any]]]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)

    def take_dense(self, checkpoint: Checkpoint) -> None:
        """Load the dense model, to stay, and have it answer the tasks."""
        self.dense, self.dense_hash = load_hashed(checkpoint, self.compute, self.record, may_stream=not self.exams)
        self.dense_name, self.parameters[checkpoint.name] = checkpoint.name, count_parameters(self.dense)
        self._ask(checkpoint, self.dense, self._parts(self.dense, self.dense_hash))
        if self.windows is None:  # nobody is compared with it token by token
            self.dense = None

    def take(self, checkpoint: Checkpoint) -> None:
        """Measure a checkpoint on the text, and by the tasks."""
        model, model_hash = load_hashed(checkpoint, self.compute, self.record, may_stream=not self.exams)
        parts = self._parts(model, model_hash)
        self.parameters[checkpoint.name] = count_parameters(model)
        if self.windows is not None:
            facts = ["metrics", hash_tokens(self.windows), self.dense_hash]
            with self.record.stage(f"measuring {checkpoint.name}"):
                self.metrics[checkpoint.name] = kept(parts, facts, partial(self._measure, checkpoint, model))
                if self.dense and self.unfinished:
                    few = self.windows[:: -(-len(self.windows) // PASSAGES_READ), :PASSAGE_TOKENS]
                    tokenizer = checkpoint.tokenizer()
                    read = [read_passage(self.dense, model, tokenizer, tokens) for tokens in few]
                    self.passages[checkpoint.name] = read
        self._ask(checkpoint, model, parts)

    def _measure(self, checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Any]:
        assert self.windows is not None
        with labelled(f"measuring {checkpoint.name}"):
            found = measure(model, self.windows, self.dense, batch_size=self.compute.batch_size)
        return {name: asdict(estimate) for name, estimate in found.items()}

    def _ask(self, checkpoint: Checkpoint, model: PreTrainedModel, parts: ResumeFolder | None) -> None:
        """Have a model answer every task."""
        for name, exam in self.exams.items():
            facts = ["answers", exam.identity]
            with self.record.stage(f"asking {checkpoint.name}: {name}"):
                plain = kept(parts, facts, partial(self._answers, name, checkpoint, model))
            own = self.answers.setdefault(checkpoint.name, {})
            own |= {task: Answers(Estimate(**each["accuracy"]), tuple(each["items"])) for task, each in plain.items()}

    def _answers(self, name: str, checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Any]:
        size = PROMPTS * self.compute.batch_size
        with labelled(f"asking {checkpoint.name}: {name}"):
            found = self.exams[name].ask(model, checkpoint.tokenizer(), batch_size=size)
        return {task: asdict(answers) for task, answers in found.items()}

    def _parts(self, model: PreTrainedModel, model_hash: str) -> ResumeFolder | None:
        return self.unfinished.of(model, model_hash) if self.unfinished else None

    def cost(self, first: Checkpoint, count: int) -> str:
        """What all of it will take, judged by the first checkpoint."""
        estimator, seconds, what = Estimator(first, self.compute, loaded=True), 0.0, []
        if self.windows is not None:
            seconds += 2 * estimator.reading(self.windows.numel(), self.windows.shape[1])
            what.append(f"{len(self.windows)} windows of {self.windows.shape[1]} tokens")
        prompts = [prompt for exam in self.exams.values() for prompt in exam.prompts]
        if prompts:
            some = random.Random(0).sample(prompts, min(len(prompts), 200))
            lengths = [len(ids) for ids in first.tokenizer()(some).input_ids]
            mean = sum(lengths) // len(lengths)
            seconds += estimator.reading(len(prompts) * mean, mean)
            what.append(f"{len(prompts):,} prompts of {len(self.exams)} tasks")
        models = how_many(count, "model")
        return f"Measuring {models} on {' and '.join(what)}: {about(count * seconds)}{condition(estimator.device)}."

    def results(self) -> dict[str, Any]:
        """All that was found, model by model; differences are to the dense model, or else to the first."""
        reference = next(iter(self.answers.values()), {})
        rows: dict[str, dict[str, Any]] = {
            name: {"parameters": self.parameters[name]} for name in [*self.answers, *self.metrics]
        }
        for name, found in self.metrics.items():
            rows[name]["metrics"] = found
        for name, answers in self.answers.items():
            row = rows[name]
            row["tasks"] = {task: _with_error(each.accuracy) for task, each in answers.items()}
            if mean := average(answers):
                row["average"] = _with_error(mean)
            if answers is not reference:
                row["differences"] = {task: asdict(each) for task, each in differences(answers, reference).items()}
        results: dict[str, Any] = {"models": rows}
        if self.dense_name:
            results["dense"] = {"name": self.dense_name, "parameters": self.parameters[self.dense_name]}
        if self.windows is not None:
            results |= {"windows": len(self.windows), "positions": self.windows.shape[1]}
        if self.exams:
            results["reference"] = next(iter(self.answers))
            results["items"] = {task: list(size) for exam in self.exams.values() for task, size in exam.items.items()}
        return results


def _with_error(estimate: Estimate) -> dict[str, float | None]:
    """With the standard error, of which the interval has 1.96 to each side."""
    error = None if estimate.high is None else (estimate.high - estimate.value) / 1.96
    return asdict(estimate) | {"standard_error": error}
