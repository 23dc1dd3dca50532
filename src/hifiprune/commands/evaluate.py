"""`evaluate`: measure checkpoints on a text, beside the dense one, and by zero-shot tasks."""

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
from hifiprune.evaluation.fidelity import measure
from hifiprune.evaluation.text import held_windows
from hifiprune.evaluation.token_comparison import read_passage
from hifiprune.evaluation.zero_shot_tasks import Answers, TaskRunner, average, check_tasks, differences
from hifiprune.io.atomic import replacing
from hifiprune.io.hashing import hash_tokens
from hifiprune.io.json_files import to_plain
from hifiprune.io.output_paths import check_target, exclusive
from hifiprune.io.resume import ResumeFolder, kept
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.lineage import commits_of, read_with
from hifiprune.models.mlp import count_parameters
from hifiprune.progress import about, how_many, labelled, logger
from hifiprune.reports.model_card import add_results, check_cards
from hifiprune.results import PASSAGES, Accuracy, Dense, Estimate, EvaluateResults, Measured, Passages
from hifiprune.run_record import RunRecord

PASSAGES_READ, PASSAGE_TOKENS = 3, 96
"""How many passages of a text are shown token by token, and how much of each."""
PROMPTS = 8
"""Asked at once where one window is measured: they are short."""


@exclusive
def evaluate(
    models: str | Sequence[str], config: EvaluateConfig, output: str | Path | None = None
) -> RunRecord[EvaluateResults]:
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
    record: RunRecord[EvaluateResults] = RunRecord("evaluate", {"models": names, **to_dict(config)})
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
    resume_folder = ResumeFolder.beside(target, "evaluate") if target else None
    bench = load_data(everyone, config, record, resume_folder)
    logger.info(bench.cost(everyone[0], len(everyone)))
    if dense:
        bench.take_dense(dense)
    for checkpoint in checkpoints:
        bench.take(checkpoint)
    record.results = bench.results()
    if config.card:
        for checkpoint in checkpoints:
            add_results(checkpoint.folder, checkpoint.name, record.results, config.text.source if config.text else None)
    if target and resume_folder:
        record.reused_parts = len(resume_folder.reused)
        with replacing(target, overwrite=config.overwrite) as new:
            new.mkdir()
            record.save(new / "run.json")
            (new / PASSAGES).write_text(json.dumps(to_plain(bench.passages)), encoding="utf-8")
        resume_folder.remove()
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
        differing = " and ".join(map(str, sorted(sizes)))
        raise UserError(
            f"the vocabularies differ ({differing} tokens): perplexities would not compare; measure one at a time"
        )


def _target(output: str | Path, checkpoints: Sequence[Checkpoint], config: EvaluateConfig) -> Path:
    """Return the absolute path of the output, which must not be among what is read."""
    read = [path for checkpoint in checkpoints for path in read_with(checkpoint)]
    text = config.text.source if config.text else None
    tasks = config.tasks.include_path if config.tasks else None
    return check_target(output, folder=True, overwrite=config.overwrite, inputs=[*read, text, tasks])


def load_data(
    checkpoints: Sequence[Checkpoint],
    config: EvaluateConfig,
    record: RunRecord[EvaluateResults],
    resume_folder: ResumeFolder | None,
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
    return Bench(windows, exams, compute, record, resume_folder)


@dataclass
class Bench:
    """Checkpoints measured one after another.

    Attributes:
        windows: of the text, to measure perplexity and fidelity on.
        exams: tasks to be taken, by the names that they were asked by.
        compute: device and arithmetic.
        record: of the run.
        resume_folder: keeps what is finished, if anything does.
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
    record: RunRecord[EvaluateResults]
    resume_folder: ResumeFolder | None
    dense: PreTrainedModel | None = None
    dense_name: str = ""
    dense_hash: str = ""
    metrics: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    answers: dict[str, dict[str, Answers]] = field(default_factory=dict)
    passages: Passages = field(default_factory=dict)
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
                metrics = kept(parts, facts, partial(self._measure, checkpoint, model))
                self.metrics[checkpoint.name] = {name: Estimate(**estimate) for name, estimate in metrics.items()}
                if self.dense and self.resume_folder:
                    few = self.windows[:: -(-len(self.windows) // PASSAGES_READ), :PASSAGE_TOKENS]
                    tokenizer = checkpoint.tokenizer()
                    read = [read_passage(self.dense, model, tokenizer, tokens) for tokens in few]
                    self.passages[checkpoint.name] = read
        self._ask(checkpoint, model, parts)

    def _measure(self, checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Any]:
        assert self.windows is not None
        with labelled(f"measuring {checkpoint.name}"):
            metrics = measure(model, self.windows, self.dense, batch_size=self.compute.batch)
        return {name: asdict(estimate) for name, estimate in metrics.items()}

    def _ask(self, checkpoint: Checkpoint, model: PreTrainedModel, parts: ResumeFolder | None) -> None:
        """Have a model answer every task."""
        for name, exam in self.exams.items():
            facts = ["answers", exam.identity]
            with self.record.stage(f"asking {checkpoint.name}: {name}"):
                plain = kept(parts, facts, partial(self._answers, name, checkpoint, model))
            self.answers.setdefault(checkpoint.name, {}).update(
                (task, Answers(Estimate(**answer["accuracy"]), tuple(answer["items"])))
                for task, answer in plain.items()
            )

    def _answers(self, name: str, checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Any]:
        size = PROMPTS * self.compute.batch
        with labelled(f"asking {checkpoint.name}: {name}"):
            answers = self.exams[name].ask(model, checkpoint.tokenizer(), batch_size=size)
        return {task: asdict(answer) for task, answer in answers.items()}

    def _parts(self, model: PreTrainedModel, model_hash: str) -> ResumeFolder | None:
        return self.resume_folder.of(model, model_hash) if self.resume_folder else None

    def cost(self, first: Checkpoint, count: int) -> str:
        """Estimate the seconds of all measurements, judged by the first checkpoint."""
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

    def results(self) -> EvaluateResults:
        """Return the results model by model; differences are to the dense model, or else to the first."""
        windows = self.windows
        items = {task: size for exam in self.exams.values() for task, size in exam.items.items()}
        return EvaluateResults(
            {name: self._measured(name) for name in dict.fromkeys([*self.answers, *self.metrics])},
            dense=Dense(self.dense_name, self.parameters[self.dense_name]) if self.dense_name else None,
            windows=None if windows is None else windows.shape[0],
            positions=None if windows is None else windows.shape[1],
            reference=next(iter(self.answers)) if self.exams else None,
            items=items if self.exams else None,
        )

    def _measured(self, name: str) -> Measured:
        """Return what was found of one model."""
        reference, answers = next(iter(self.answers.values()), {}), self.answers.get(name)
        parameters, metrics = self.parameters[name], self.metrics.get(name)
        if answers is None:
            return Measured(parameters, metrics)
        mean = average(answers)
        return Measured(
            parameters,
            metrics,
            tasks={task: _with_error(answer.accuracy) for task, answer in answers.items()},
            average=_with_error(mean) if mean else None,
            differences=None if answers is reference else differences(answers, reference),
        )


def _with_error(estimate: Estimate) -> Accuracy:
    """Return the estimate with its standard error; the interval has 1.96 of it to each side."""
    error = None if estimate.high is None else (estimate.high - estimate.value) / 1.96
    return Accuracy(**vars(estimate), standard_error=error)
