"""The story of `recover`: a pruned checkpoint is trained, with labels or by the dense model, into a better one."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, TrainerState, set_seed

from hifiprune.commands.prepare import load_hashed, plain_arguments, prepare
from hifiprune.commands.recover_preflight import check_compute, check_purpose, check_tracker, find_dense, needed_bytes
from hifiprune.config.groups import ComputeConfig
from hifiprune.engine.compute import compute_dtype, estimate_seconds, load, resolved_device
from hifiprune.engine.context import memory_explained
from hifiprune.engine.machine import condition
from hifiprune.errors import RunError, UserError
from hifiprune.evaluation.text import Text
from hifiprune.io.atomic import check_shard_size, check_space, replacing
from hifiprune.io.distributed import processes, rank
from hifiprune.io.output_paths import exclusive
from hifiprune.io.resume import Unfinished
from hifiprune.io.tokenization import special_tokens
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.detect import family_of
from hifiprune.models.lineage import check_origin, record_of
from hifiprune.progress import about, how_many, logger
from hifiprune.recovery.callback import Watch, describe, is_better
from hifiprune.recovery.config import Training, gathered, last_state, train
from hifiprune.recovery.distillation import Remembered, Teacher, remember
from hifiprune.recovery.lora import check_adapter, with_adapter
from hifiprune.recovery.loss import sliced_loss
from hifiprune.recovery.packing import Packed
from hifiprune.recovery.rows import split
from hifiprune.recovery.time_limit import OutOfTimeError, TimeLimit
from hifiprune.recovery.training_data import read_examples
from hifiprune.reports.model_card import describe_base, write_card
from hifiprune.run_record import RunRecord
from hifiprune.scoring.objectives import SoftLabels


@exclusive
def recover(
    model: str,
    output: str | Path,
    data: str,
    training: Training = Training(),
    *,
    teacher: str | None = None,
    control: bool = False,
    learn_prompts: bool = False,
    text_column: str | None = None,
    max_rows: int | None = None,
    keep_adapter: bool = False,
    resume: bool = False,
    tracker: str = "none",
    compute: ComputeConfig = ComputeConfig(),
    shard_size: str = "5GB",
    overwrite: bool = False,
) -> RunRecord:
    """Train a pruned checkpoint and write the best state by held-out perplexity as an ordinary checkpoint.

    Interrupted, the same call goes on where it stopped. If training makes it worse, it is written as it was.

    Args:
        model: local folder, hub id or GGUF file.
        output: folder to be made.
        data: rows to learn from; see `hifiprune.recovery.training_data.read_examples`.
        training: how.
        teacher: the dense model; if not given, the one that the pruned model's `run.json` names, by its hash.
        control: train the dense model instead, to tell what the data is worth by itself.
        learn_prompts: make labels of prompts and other people's turns too.
        text_column: column of the text, guessed if not given.
        max_rows: of a hub data set; all if not given.
        keep_adapter: also write the LoRA adapter, into the folder `adapter`.
        resume: only go on with an interrupted run, and never start a new one.
        tracker: `tensorboard`, `trackio`, `wandb`, `swanlab` or another of transformers' own, told of losses too.
        compute: device and arithmetic; its batch size is not used.
        shard_size: largest weight file.
        overwrite: replace an existing output.

    Raises:
        UserError: something asked for cannot be done, found before the weights are loaded where possible.
        RunError: numbers, memory or disk failed.
    """
    check_compute(compute, training)
    if control:  # from itself it has nothing to learn
        training = replace(training, distill_weight=0.0, match_hidden=0.0, cache_teacher=None)
    check_purpose(training, teacher, control=control, keep_adapter=keep_adapter)
    record = RunRecord(
        "recover",
        plain_arguments(
            model=model, output=output, data=data, training=training, teacher=teacher, control=control,
            learn_prompts=learn_prompts, text_column=text_column, max_rows=max_rows, keep_adapter=keep_adapter,
            compute=compute,
        ),
    )  # fmt: skip
    check_shard_size(shard_size)
    dense = find_dense(model, teacher, training, control=control)
    texts, read = [Text(data, training.seq_len)], [dense.path] if dense else []
    checkpoint, target, skeleton = prepare(
        model, output, texts, read, compute=compute, folder=True, overwrite=overwrite
    )
    check_adapter(skeleton, training, kept=keep_adapter)
    check_tracker(tracker, target)
    started = dense if dense and control else checkpoint
    check_space(target, needed_bytes(started, training))
    job = Job(
        model=model, checkpoint=checkpoint, started=started, dense=dense, teacher=teacher, target=target,
        training=training, compute=compute, record=record, tracker=tracker,
        unfinished=Unfinished.beside(target, "recover"), limit=TimeLimit(training.max_minutes),
    )  # fmt: skip
    base = describe_base(started)
    try:
        rows, held = job.read(data, learn_prompts=learn_prompts, text_column=text_column, max_rows=max_rows)
        job = replace(job, training=training.for_rows(len(rows)))
        outcome = job.train(rows, held, resume=resume)
    except OutOfTimeError:
        outcome = Outcome(describe(TrainerState(), job.limit.passed))
    if rank() == 0:
        record.results = outcome.results | {"pruning": record_of(started)}
        trained = outcome.model or _as_it_was(started, record.results)
        with replacing(target, overwrite=overwrite) as new:
            with record.stage("writing"):
                if keep_adapter and isinstance(trained, PeftModel):
                    trained.save_pretrained(str(new / "adapter"))
                started.save(_merged(trained, started), new, shard_size)
            record.save(new / "run.json")
            write_card(new, record.to_dict(), base, target.name)
        job.unfinished.remove()
    return record


@dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Attributes:
        results: for the record.
        model: the trained model, if it is better than it was.
    """

    results: dict[str, Any]
    model: nn.Module | None = None


@dataclass(frozen=True)
class Job:
    """A checkpoint that is trained.

    Attributes:
        model: what the user called the pruned checkpoint.
        checkpoint: the pruned one, whose tokenizer reads the data.
        started: the one that is trained: `checkpoint`, or `dense` as a control.
        dense: the dense model, if it has a part.
        teacher: what the user called the dense model, if he named it.
        target: the output.
        training: the settings.
        compute: device and arithmetic.
        record: keeps what each stage cost.
        unfinished: keeps what an interrupted run would have to do again.
        tracker: of transformers' own, that is told of losses too.
        limit: of the time that all of it may take.
    """

    model: str
    checkpoint: Checkpoint
    started: Checkpoint
    dense: Checkpoint | None
    teacher: str | None
    target: Path
    training: Training
    compute: ComputeConfig
    record: RunRecord
    unfinished: Unfinished
    tracker: str
    limit: TimeLimit

    def read(self, data: str, **how: Any) -> tuple[Packed, Packed]:
        """Read rows to train on, and rows that are held out; see `hifiprune.recovery.training_data.read_examples`."""
        config = self.started.config()
        with self.record.stage("reading the data"):
            tokenizer = self.checkpoint.tokenizer()
            examples = read_examples(
                data,
                tokenizer,
                seed=self.training.seed,
                limit=self.limit,
                **how,
            )
            vocabulary = config.get_text_config().vocab_size
            start = special_tokens(tokenizer)[0]
            return split(examples, self.training, vocabulary, together=family_of(config).packs, start=start)

    def train(self, rows: Packed, held: Packed, *, resume: bool) -> Outcome:
        """Train on rows, from the newest state of the same training if there is one."""
        training, compute = self.training, self.compute
        taught, guide, guide_hash = _guide(self, rows)
        self.limit.check()
        dtype = _training_dtype(self.started, training, compute)
        student, model_hash = load_hashed(self.started, compute, self.record, dtype)
        self.limit.writing = 2 * self.record.stages[-1]["seconds"]  # it may have to be loaded again for that
        facts = [asdict(training), rows.digest(), held.digest(), guide_hash, processes()]
        folder = self.unfinished.of(student, model_hash).path("states", *facts, suffix="")
        state = last_state(folder)
        if resume and state is None:
            beside = self.target
            raise UserError(f"there is no state of such a run beside {beside} to resume; leave out --resume")
        if rank() == 0:
            self.unfinished.write(
                folder / "facts.json", lambda path: path.write_text(json.dumps(facts), encoding="utf-8")
            )
        logger.info(_announce(student, training, rows, held, compute))
        set_seed(training.seed)  # LoRA starts at random
        trained = _trainable(student, training)
        watch = Watch(self.limit, _tokens_per_step(training), state)
        kernel = SoftLabels(training.distill_weight, training.temperature)
        loss = sliced_loss(student, kernel, guide, match_hidden=training.match_hidden)
        device = resolved_device(compute)
        with self.record.stage("training"), loss, _explained(student, training, folder):
            trainer = train(trained, training, taught, held, folder, watch, device=device, tracker=self.tracker)
            weights = gathered(trainer)
        hashes = {"model_hash": model_hash, "data_hash": rows.digest(), "teacher_hash": guide_hash}
        results = describe(trainer.state, watch.trouble) | hashes
        if rank() > 0 or not is_better(trainer.state):
            return Outcome(results)
        if weights:
            trained = _trainable(load(self.started, replace(compute, device="cpu")), training)
            trained.load_state_dict(weights)
        return Outcome(results, trained)


def _guide(job: Job, rows: Packed) -> tuple[Packed | Remembered, Teacher | None, str | None]:
    """The rows, with what the dense model says of them where that is kept; else itself; and the hash of its weights."""
    training, kept = job.training, job.training.cache_teacher
    if job.dense is None or not training.taught:
        return rows, None, None
    job.limit.check()
    loaded, model_hash = load_hashed(job.dense, job.compute, job.record, stage="loading the dense model")
    check_origin(job.model, job.teacher, model_hash)
    guide = Teacher(loaded.requires_grad_(False))
    if kept is None:
        return rows, guide, model_hash
    with job.record.stage("asking the dense model"):
        remembered = remember(
            rows, guide, model_hash, kept, training.temperature, job.compute, job.unfinished, job.limit
        )
    return remembered, None, model_hash


@contextmanager
def _explained(model: PreTrainedModel, training: Training, folder: Path) -> Iterator[None]:
    """Turn a device without memory or a disk without room into one message."""
    try:
        with memory_explained(model, training.batch_size * training.seq_len):
            yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch's file writer
            raise
        raise RunError(f"a state of the training could not be kept in {folder}: {error}") from error


def _training_dtype(checkpoint: Checkpoint, training: Training, compute: ComputeConfig) -> Any:
    """Weights that are trained in full are float32, unless the optimizer says otherwise; none are float16."""
    if compute.dtype != "auto" or resolved_device(compute) == "cpu":
        return compute_dtype(compute, checkpoint)
    if training.method == "full":
        return torch.bfloat16 if training.optimizer == "adamw-bf16" else torch.float32
    return torch.float32 if checkpoint.dtype() == torch.float16 else checkpoint.dtype()


def _trainable(model: PreTrainedModel, training: Training) -> nn.Module:
    """The model, all of it to be trained or with an adapter."""
    return model.requires_grad_(True) if training.method == "full" else with_adapter(model, training)


def _merged(trained: nn.Module, checkpoint: Checkpoint) -> PreTrainedModel:
    """The model itself, in the dtype and with the configuration of the checkpoint."""
    whole: Any = trained.merge_and_unload() if isinstance(trained, PeftModel) else trained
    whole.config.__dict__.pop("use_cache", None)  # which is off while a model is trained
    whole.config.get_text_config().use_cache = checkpoint.config().get_text_config().use_cache
    model: PreTrainedModel = whole.type(checkpoint.dtype())
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise RunError(f"the trained weights are not all finite in {checkpoint.dtype()}; use a smaller --lr")
    return model


def _tokens_per_step(training: Training) -> int:
    return training.batch_size * training.gradient_accumulation * training.seq_len * processes()


def _announce(model: PreTrainedModel, training: Training, rows: Packed, held: Packed, compute: ComputeConfig) -> str:
    """What training will cost."""
    each = _tokens_per_step(training)
    steps = training.max_steps or math.ceil(len(rows) * training.seq_len / each) * training.epochs
    seconds = estimate_seconds(
        model.config,
        int(steps * each),
        training.seq_len,
        resolved_device(compute),
        model.dtype,
        forwards=2 if training.taught and not training.cache_teacher else 1,
        backwards=1 if training.method == "lora" else 2,
    )
    cost = f"{steps:,.0f} steps of {each:,} tokens, {about(seconds)}{condition(resolved_device(compute))}."
    if training.max_minutes:
        limit = how_many(training.max_minutes, "minute")
        cost += f" It ends with these steps or after {limit} in all, whichever comes first."
    how = "low-rank changes" if training.method == "lora" else "all weights"
    target = "the dense model's distribution" if training.taught else "labels"
    return (
        f"Training {how} on {target}: {len(rows)} rows of {training.seq_len} tokens, {len(held)} held out; "
        f"{cost} Interrupted, the same command goes on where it stopped."
    )


def _as_it_was(checkpoint: Checkpoint, results: dict[str, Any]) -> nn.Module:
    """The model that training did not make better."""
    why = results["trouble"] if not results["steps"] and results["trouble"] else None
    why = f"{why[0].upper()}{why[1:]}" if why else "Training did not lower the held-out perplexity"
    logger.warning(f"{why}: the checkpoint is written as it was.")
    return checkpoint.load(checkpoint.dtype())
