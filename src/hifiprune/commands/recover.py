"""`recover`: check, read the data, train by labels or by the dense model, write the better checkpoint."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, TrainerState, set_seed

from hifiprune.commands.cost_model import Estimator
from hifiprune.commands.prepare import load_hashed
from hifiprune.commands.recover_preflight import RecoverJob, resolve
from hifiprune.config.groups import ComputeConfig
from hifiprune.config.recover import RecoverConfig, TrainingConfig
from hifiprune.engine.compute import compute_dtype, load, resolved_device
from hifiprune.engine.context import memory_explained
from hifiprune.engine.machine import condition
from hifiprune.errors import RunError, UserError
from hifiprune.io.atomic import replacing
from hifiprune.io.distributed import processes, rank
from hifiprune.io.output_paths import exclusive
from hifiprune.io.tokenization import special_tokens
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.detect import family_of
from hifiprune.models.lineage import check_origin, plain_record_of
from hifiprune.models.save_model import save_model
from hifiprune.progress import about, how_many, logger
from hifiprune.recovery.callback import Watch, describe, is_better
from hifiprune.recovery.distillation import CachedTeacher, Teacher, cache_teacher
from hifiprune.recovery.lora import with_adapter
from hifiprune.recovery.loss import sliced_loss
from hifiprune.recovery.packing import Packed
from hifiprune.recovery.rows import split
from hifiprune.recovery.time_limit import OutOfTimeError
from hifiprune.recovery.trainer import batches_together, gathered, last_state, limit_batch
from hifiprune.recovery.trainer import train as run_trainer
from hifiprune.recovery.training_data import read_examples
from hifiprune.reports.model_card import write_card
from hifiprune.results import RecoverResults
from hifiprune.run_record import RunRecord
from hifiprune.scoring.objectives import SoftLabels


@exclusive
def recover(
    model: str, output: str | Path, data: str, config: RecoverConfig = RecoverConfig()
) -> RunRecord[RecoverResults]:
    """Train a pruned checkpoint and write the best state by held-out perplexity as an ordinary checkpoint.

    Interrupted, the same call continues where it stopped. If training makes it worse, it is written as it was.

    Args:
        model: local folder, hub id or GGUF file.
        output: folder to be made.
        data: rows to learn from; see `hifiprune.recovery.training_data.read_examples`.
        config: options.

    Raises:
        UserError: something asked for cannot be done, found before the weights are loaded where possible.
        RunError: numbers, memory or disk failed.
    """
    job = resolve(model, output, data, config)  # every check, no weights
    try:
        rows, held = load_data(job)
        job = replace(job, training=limit_batch(job.training, len(rows)))
        lesson = load_teacher(job, rows)
        outcome = train(job, lesson, held)
    except OutOfTimeError:
        outcome = Outcome(describe(TrainerState(), job.limit.passed))
    if rank() == 0:
        write(job, outcome)
    return job.record


def load_data(job: RecoverJob) -> tuple[Packed, Packed]:
    """Read the rows to train on, and those that are held out."""
    architecture, config = job.started.config(), job.config
    with job.record.stage("reading the data"):
        tokenizer = job.checkpoint.tokenizer()
        examples = read_examples(
            job.data,
            tokenizer,
            learn_prompts=config.learn_prompts,
            text_column=config.text_column,
            max_rows=config.max_rows,
            seed=job.training.seed,
            limit=job.limit,
        )
        vocabulary, start = architecture.get_text_config().vocab_size, special_tokens(tokenizer)[0]
        return split(examples, job.training, vocabulary, together=family_of(architecture).separates_packed, start=start)


@dataclass(frozen=True)
class Lesson:
    """What is learned.

    Attributes:
        rows: rows to train on, with what was kept of the dense model's distribution, if anything was.
        teacher: the dense model, where it runs along.
        teacher_hash: hash of the dense model's weights, if it has a part.
    """

    rows: Packed | CachedTeacher
    teacher: Teacher | None = None
    teacher_hash: str | None = None


def load_teacher(job: RecoverJob, rows: Packed) -> Lesson:
    """Load the dense model, where it has a part in the loss, and ask it once where its answers are kept."""
    training, kept = job.training, job.training.cache_teacher
    if job.dense is None or not training.taught:
        return Lesson(rows)
    job.limit.check()
    loaded, model_hash = load_hashed(job.dense, job.config.compute, job.record, stage="loading the dense model")
    check_origin(job.model, job.config.teacher, model_hash)
    teacher = Teacher(loaded.requires_grad_(False))
    if kept is None:
        return Lesson(rows, teacher, model_hash)
    with job.record.stage("caching teacher logits"):
        seconds = partial(Estimator(job.dense, job.config.compute, loaded=True).reading, positions=rows.length)
        remembered = cache_teacher(
            rows, teacher, model_hash, kept, training.temperature, seconds, job.resume_folder, job.limit
        )
    return Lesson(remembered, None, model_hash)


@dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Attributes:
        results: for the record.
        model: the trained model, if it is better than it was.
    """

    results: RecoverResults
    model: nn.Module | None = None


def train(job: RecoverJob, lesson: Lesson, held: Packed) -> Outcome:
    """Train on a lesson, from the newest state of the same training if there is one."""
    training, compute = job.training, job.config.compute
    job.limit.check()
    student, model_hash = load_hashed(job.started, compute, job.record, _training_dtype(job.started, training, compute))
    job.limit.writing = 2 * job.record.stages[-1].seconds  # it may have to be loaded again for that
    rows = lesson.rows.rows if isinstance(lesson.rows, CachedTeacher) else lesson.rows
    folder = state_folder(
        job, student, model_hash, [asdict(training), rows.digest(), held.digest(), lesson.teacher_hash, processes()]
    )
    dtype = str(student.dtype).removeprefix("torch.")
    together = batches_together(student, training, resolved_device(compute))
    batches = replace(compute, dtype=dtype, batch_size=training.rows * together)
    logger.info(_announce(training, rows, held, Estimator(job.started, batches, loaded=True)))
    set_seed(training.seed)  # LoRA starts at random
    trained = _trainable(student, training)
    watch = Watch(job.limit, _tokens_per_step(training), last_state(folder))
    kernel = SoftLabels(training.distill_weight, training.temperature)
    loss = sliced_loss(student, kernel, lesson.teacher, match_hidden=training.match_hidden)
    with job.record.stage("training"), loss, _explained(student, training, folder):
        trainer = run_trainer(
            trained,
            training,
            lesson.rows,
            held,
            folder,
            watch,
            device=resolved_device(compute),
            together=together,
            report_to=job.config.report_to,
        )
        weights = gathered(trainer)
    results = replace(
        describe(trainer.state, watch.trouble),
        model_hash=model_hash,
        data_hash=rows.digest(),
        teacher_hash=lesson.teacher_hash,
    )
    if rank() > 0 or not is_better(trainer.state):
        return Outcome(results)
    if weights:
        trained = _trainable(load(job.started, replace(compute, device="cpu")), training)
        trained.load_state_dict(weights)
    return Outcome(results, trained)


def state_folder(job: RecoverJob, student: PreTrainedModel, model_hash: str, facts: list[Any]) -> Path:
    """Return the folder of a training's states, which depend on these facts.

    Raises:
        UserError: there is no state in it, and only an interrupted run was to be continued.
    """
    folder = job.resume_folder.of(student, model_hash).path("states", *facts, suffix="")
    if job.config.resume and last_state(folder) is None:
        raise UserError(f"there is no state of such a run beside {job.target} to resume; leave out --resume")
    if rank() == 0:
        job.resume_folder.write(
            folder / "facts.json", lambda path: path.write_text(json.dumps(facts), encoding="utf-8")
        )
    return folder


def write(job: RecoverJob, outcome: Outcome) -> None:
    """Write the trained model, or the checkpoint as it was, with its record and its card."""
    job.record.results = replace(outcome.results, pruning=plain_record_of(job.started))
    trained = outcome.model or _as_it_was(job.started, job.record.results)
    with replacing(job.target, overwrite=job.config.overwrite) as folder:
        with job.record.stage("writing"):
            if job.config.keep_adapter and isinstance(trained, PeftModel):
                trained.save_pretrained(str(folder / "adapter"))
            merged, config = _merged(trained, job.started), job.config
            save_model(merged, job.started, folder, config.shard_size, layout=config.layout)
        job.record.save(folder / "run.json")
        write_card(folder, job.base, job.target.name)
    job.resume_folder.remove()


@contextmanager
def _explained(model: PreTrainedModel, training: TrainingConfig, folder: Path) -> Iterator[None]:
    """Turn a device without memory or a disk without room into one message."""
    try:
        with memory_explained(model, training.rows * training.seq_len):
            yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch's file writer
            raise
        raise RunError(f"a state of the training could not be kept in {folder}: {error}") from error


def _training_dtype(checkpoint: Checkpoint, training: TrainingConfig, compute: ComputeConfig) -> Any:
    """Return the dtype to train in: float32 for all weights, unless the optimizer says otherwise; never float16."""
    if compute.dtype != "auto" or resolved_device(compute) == "cpu":
        return compute_dtype(compute, checkpoint)
    if training.method == "full":
        return torch.bfloat16 if training.optimizer == "adamw-bf16" else torch.float32
    return torch.float32 if checkpoint.dtype() == torch.float16 else checkpoint.dtype()


def _trainable(model: PreTrainedModel, training: TrainingConfig) -> nn.Module:
    """Return the model, to be trained whole or with an adapter."""
    return model.requires_grad_(True) if training.method == "full" else with_adapter(model, training)


def _merged(trained: nn.Module, checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the model itself, adapter merged, in the dtype and with the configuration of the checkpoint."""
    whole: Any = trained.merge_and_unload() if isinstance(trained, PeftModel) else trained
    whole.config.__dict__.pop("use_cache", None)  # which is off while a model is trained
    whole.config.get_text_config().use_cache = checkpoint.config().get_text_config().use_cache
    model: PreTrainedModel = whole.type(checkpoint.dtype())
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise RunError(f"the trained weights are not all finite in {checkpoint.dtype()}; use a smaller --learning-rate")
    return model


def _tokens_per_step(training: TrainingConfig) -> int:
    return training.rows * training.gradient_accumulation_steps * training.seq_len * processes()


def _announce(training: TrainingConfig, rows: Packed, held: Packed, estimator: Estimator) -> str:
    """Announce the cost: passes of the model and its teacher, and gradients of activations or of all weights."""
    each = _tokens_per_step(training)
    steps = training.max_steps or math.ceil(len(rows) * training.seq_len / each) * training.epochs
    forwards = 2 if training.taught and not training.cache_teacher else 1
    passes = forwards + (1 if training.method == "lora" else 2)
    seconds = passes * estimator.reading(int(steps * each / processes()), training.seq_len)
    cost = f"{steps:,.0f} steps of {each:,} tokens, {about(seconds)}{condition(estimator.device)}."
    if training.max_minutes:
        limit = how_many(training.max_minutes, "minute")
        cost += f" It ends with these steps or after {limit} in all, whichever comes first."
    how = "low-rank changes" if training.method == "lora" else "all weights"
    target = "the dense model's distribution" if training.taught else "labels"
    return (
        f"Training {how} on {target}: {len(rows)} rows of {training.seq_len} tokens, {len(held)} held out; "
        f"{cost} Interrupted, the same command goes on where it stopped."
    )


def _as_it_was(checkpoint: Checkpoint, results: RecoverResults) -> nn.Module:
    """Return the model as it was, which training did not make better."""
    why = results.trouble if not results.steps else None
    why = f"{why[0].upper()}{why[1:]}" if why else "Training did not lower the held-out perplexity"
    logger.warning(f"{why}: the checkpoint is written as it was.")
    return checkpoint.load(checkpoint.dtype())
