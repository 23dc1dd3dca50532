"""The story of `recover`: a pruned checkpoint is trained, with labels or by the dense model, into a better one."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState, set_seed

from hifiprune.adapters import check_adapter, with_adapter
from hifiprune.announcements import duration
from hifiprune.cards import describe_base, write_card
from hifiprune.checkpoint import Checkpoint
from hifiprune.compute import Compute, estimate_seconds
from hifiprune.discovery import family_of
from hifiprune.errors import RunError, UserError
from hifiprune.examples import Example, read_examples
from hifiprune.guards import check_vocabulary, memory_explained
from hifiprune.lineage import check_origin, record_of
from hifiprune.objectives import SoftLabels
from hifiprune.output import check_shard_size, check_space, replacing
from hifiprune.packing import Packed, cut_to, pack
from hifiprune.parallel import processes, rank
from hifiprune.preparation import load, load_hashed, plain_arguments, prepare
from hifiprune.record import RunRecord
from hifiprune.targets import exclusive
from hifiprune.teacher import Remembered, Teacher, remember
from hifiprune.texts import Text
from hifiprune.training import Training, gathered, last_state, train
from hifiprune.training_checks import check_compute, check_purpose, check_tracker, find_dense, needed_bytes
from hifiprune.training_loss import sliced_loss
from hifiprune.unfinished import Unfinished
from hifiprune.voice import SILENT, Voice
from hifiprune.watch import Watch, held_out_losses, perplexity

HELD_OUT_ROWS = 128
"""Looked at, at most, however much is held out."""


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
    compute: Compute = Compute(),
    shard_size: str = "5GB",
    overwrite: bool = False,
    voice: Voice = SILENT,
) -> RunRecord:
    """Train a pruned checkpoint and write the best state by held-out perplexity as an ordinary checkpoint.

    Interrupted, the same call goes on where it stopped. If training makes it worse, it is written as it was.

    Args:
        model: local folder, hub id or GGUF file.
        output: folder to be made.
        data: rows to learn from; see `hifiprune.examples.read_examples`.
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
        voice: tells of progress.

    Raises:
        UserError: something asked for cannot be done, found before the weights are loaded where possible.
        RunError: numbers, memory or disk failed.
    """
    check_compute(compute, training)
    voice = voice if rank() == 0 else SILENT
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
    base = describe_base(started, voice)
    with record.stage("reading the data"):
        examples = read_examples(
            data,
            checkpoint.tokenizer(),
            learn_prompts=learn_prompts,
            text_column=text_column,
            max_rows=max_rows,
            seed=training.seed,
            track=voice.track("reading the data, rows"),
        )
        config = started.config()
        rows, held = _split(examples, training, config.get_text_config().vocab_size, family_of(config).packs)
    unfinished = Unfinished.beside(target, "recover", voice)
    taught, guide, guide_hash = _guide(model, teacher, dense, training, rows, compute, record, unfinished)
    student, model_hash = load_hashed(started, compute, record, _training_dtype(started, training, compute))
    facts = [asdict(training), rows.digest(), held.digest(), guide_hash, processes()]
    folder = unfinished.of(student, model_hash).path("states", *facts, suffix="")
    if resume and last_state(folder) is None:
        raise UserError(f"there is no state of such a run beside {target} to resume; leave out --resume to start it")
    if rank() == 0:
        unfinished.write(folder / "facts.json", lambda path: path.write_text(json.dumps(facts)))
    voice.say(_announce(student, training, rows, held, compute))
    set_seed(training.seed)  # LoRA starts at random
    trained = _trainable(student, training)
    watch = Watch(training.max_minutes, _tokens_per_step(training), voice, last_state(folder))
    kernel = SoftLabels(training.distill_weight, training.temperature)
    loss = sliced_loss(student, kernel, guide, match_hidden=training.match_hidden)
    with record.stage("training"), loss, _explained(student, training, folder):
        trainer = train(trained, training, taught, held, folder, watch, device=compute.resolved_device, tracker=tracker)
        weights = gathered(trainer)
    if rank() == 0:
        record.results = _describe(trainer.state, watch.trouble) | {
            "model_hash": model_hash,
            "data_hash": rows.digest(),
            "teacher_hash": guide_hash,
            "pruning": record_of(started),
        }
        if weights or not _better(trainer.state):
            trained = _anew(started, training, compute, weights if _better(trainer.state) else None, voice)
        with replacing(target, overwrite=overwrite) as new:
            with record.stage("writing"):
                if keep_adapter and isinstance(trained, PeftModel):
                    trained.save_pretrained(str(new / "adapter"))
                started.save(_merged(trained, started), new, shard_size)
            record.save(new / "run.json")
            write_card(new, record.to_dict(), base, target.name)
        unfinished.remove()
    return record


def _guide(
    model: str,
    teacher: str | None,
    dense: Checkpoint | None,
    training: Training,
    rows: Packed,
    compute: Compute,
    record: RunRecord,
    unfinished: Unfinished,
) -> tuple[Packed | Remembered, Teacher | None, str | None]:
    """The rows, with what the dense model says of them where that is kept; else itself; and the hash of its weights."""
    if dense is None or not training.taught:
        return rows, None, None
    loaded, model_hash = load_hashed(dense, compute, record)
    check_origin(model, teacher, model_hash)
    guide = Teacher(loaded.requires_grad_(False))
    if training.cache_teacher is None:
        return rows, guide, model_hash
    with record.stage("asking the dense model"):
        kept = remember(rows, guide, model_hash, training.cache_teacher, training.temperature, compute, unfinished)
    return kept, None, model_hash


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


def _training_dtype(checkpoint: Checkpoint, training: Training, compute: Compute) -> Any:
    """Weights that are trained in full are float32, unless the optimizer says otherwise; none are float16."""
    if compute.dtype != "auto" or compute.resolved_device == "cpu":
        return compute.dtype_for(checkpoint)
    if training.method == "full":
        return torch.bfloat16 if training.optimizer == "adamw-bf16" else torch.float32
    return torch.float32 if checkpoint.dtype() == torch.float16 else checkpoint.dtype()


def _split(
    examples: Sequence[Example], training: Training, vocabulary: int, together: bool = True
) -> tuple[Packed, Packed]:
    """Rows to train on, and rows that are held out: other examples, or other pieces of very few and long ones.

    An example longer than a row is as many as its pieces.
    """
    check_vocabulary(max(max(example.tokens) for example in examples), vocabulary)
    pieces = [[*cut_to(example, training.seq_len)] for example in examples]
    if training.held_out * len(pieces) < 1:
        pieces = [[piece] for example in pieces for piece in example]
    order = random.Random(training.seed).sample(pieces, len(pieces))
    count = max(1, round(training.held_out * len(order)))
    parts = ([piece for example in part for piece in example] for part in (order[count:], order[:count]))
    rows, held = (pack(part, training.seq_len, seed=training.seed, together=together) for part in parts)
    if not len(rows) or not len(held):
        raise UserError(f"too little data: {len(order)} examples make no row to train on and one to hold out")
    return rows, held.first(HELD_OUT_ROWS)


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


def _announce(model: PreTrainedModel, training: Training, rows: Packed, held: Packed, compute: Compute) -> str:
    """What training will cost."""
    each = _tokens_per_step(training)
    steps = training.max_steps or math.ceil(len(rows) * training.seq_len / each) * training.epochs
    seconds = estimate_seconds(
        model.config,
        int(steps * each),
        training.seq_len,
        compute.resolved_device,
        model.dtype,
        forwards=2 if training.taught and not training.cache_teacher else 1,
        backwards=1 if training.method == "lora" else 2,
    )
    if training.max_minutes:
        limit = f"{training.max_minutes:g} minutes"
    else:
        limit = f"{steps:.0f} steps of {each:,} tokens, about {duration(seconds)} if the machine is idle"
    how = "low-rank changes" if training.method == "lora" else "all weights"
    target = "the dense model's distribution" if training.taught else "labels"
    return (
        f"Training {how} on {target}: {len(rows)} rows of {training.seq_len} tokens, {len(held)} held out; {limit}. "
        "Interrupted, the same command goes on where it stopped."
    )


def _anew(
    checkpoint: Checkpoint, training: Training, compute: Compute, weights: dict[str, Tensor] | None, voice: Voice
) -> nn.Module:
    """The model with weights that were trained, or else as it was."""
    if weights is None:
        voice.say("Training did not lower the held-out perplexity: the checkpoint is written as it was.")
        return checkpoint.load(checkpoint.dtype())
    trained = _trainable(load(checkpoint, replace(compute, device="cpu")), training)
    trained.load_state_dict(weights)
    return trained


def _better(state: TrainerState) -> bool:
    """Whether the held-out loss was ever below that at the start."""
    (_, start), *later = held_out_losses(state)
    return any(loss < start for _, loss in later)


def _describe(state: TrainerState, trouble: str) -> dict[str, Any]:
    looks = held_out_losses(state)
    best = min(looks, key=lambda look: look[1])
    return {
        "held_out_perplexity": {"before": perplexity(looks[0][1]), "after": perplexity(min(best[1], looks[0][1]))},
        "best_step": best[0],
        "steps": state.global_step,
        "trouble": trouble or None,
        "losses": [[entry["step"], entry["loss"]] for entry in state.log_history if "loss" in entry],
        "held_out_losses": [list(look) for look in looks],
    }
