"""How a model is trained after the cut: settings, the papers' by name, and the run by transformers' Trainer."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from hifiprune.bounds import check_numbers
from hifiprune.errors import UserError, unknown
from hifiprune.io.distributed import processes
from hifiprune.progress import note
from hifiprune.recovery.callback import CLOCK, Watch
from hifiprune.recovery.distillation import Remembered
from hifiprune.recovery.packing import Packed
from hifiprune.recovery.time_limit import OutOfTimeError

METHODS = ("lora", "full")
OPTIMIZERS = {"adamw": "adamw_torch", "adamw-bf16": "adamw_torch", "8-bit": "adamw_bnb_8bit"}


@dataclass(frozen=True)
class Training:
    """What decides a training run.

    Attributes:
        method: `lora`, low-rank changes that are merged after (arXiv 2106.09685), or `full`.
        learning_rate: at the start; it falls to zero along a cosine.
        epochs: passes over the data, unless steps are given.
        max_steps: optimizer steps.
        max_minutes: wall-clock limit of the whole run; the learning rate falls with time where that is spent sooner
            than the steps, and runs are not repeatable.
        batch_size: rows a step on each device.
        gradient_accumulation: batches whose gradients make one optimizer step.
        seq_len: tokens a row.
        weight_decay: of AdamW.
        lora_r: rank.
        lora_alpha: scale of the change, `alpha / r`.
        lora_dropout: of the change's input.
        target_modules: maps that get one; of none, all linear maps but the head.
        optimizer: `adamw`; `adamw-bf16`, on a GPU weights trained in full and moments in bfloat16; `8-bit`.
        gradient_checkpointing: compute each block twice, for less memory.
        distill_weight: share of the divergence from the dense model in the loss, the rest being cross-entropy.
        temperature: of both distributions in the divergence.
        match_hidden: weight of the difference between hidden states, see `hifiprune.recovery.loss.sliced_loss`.
        cache_teacher: so many likeliest tokens of the dense model's distribution are asked for once and kept on disk.
        evaluate_every: optimizer steps between looks at the held-out rows, and between saved states.
        held_out: fraction of the examples that are held out.
        seed: of the order of the data, dropout and LoRA's start.

    Raises:
        UserError: a value is out of range.
    """

    method: str = "lora"
    learning_rate: float = 4e-4
    epochs: float = 2.0
    max_steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = 1
    gradient_accumulation: int = 32
    seq_len: int = 1024
    weight_decay: float = 0.0
    lora_r: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] = ()
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    distill_weight: float = 1.0
    temperature: float = 1.0
    match_hidden: float = 0.0
    cache_teacher: int | None = None
    evaluate_every: int = 50
    held_out: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        check_numbers(vars(self))
        if self.cache_teacher and (self.match_hidden or not self.distill_weight):
            raise UserError("cache-teacher keeps distributions: give a --distill-weight above 0, and no --match-hidden")

    def for_rows(self, rows: int) -> "Training":
        """Return the same with a batch size of no more than each device's share of all rows; tell if it was more."""
        share = -(-rows // processes())
        if self.batch_size <= share:
            return self
        note(f"There are {rows} rows to train on: --batch-size {self.batch_size} is cut down to {share}.")
        return replace(self, batch_size=share)

    @property
    def taught(self) -> bool:
        """Whether the dense model has a part in the loss."""
        return self.distill_weight > 0 or self.match_hidden > 0


HFPRUNE = Training(gradient_checkpointing=True, optimizer="adamw-bf16", distill_weight=0.0)
SDMPRUNE = replace(HFPRUNE, learning_rate=1e-4, weight_decay=0.05, gradient_accumulation=16, seq_len=4096)
TRAININGS = {
    "default": Training(),
    "hfprune-lora": HFPRUNE,
    "hfprune-full": replace(HFPRUNE, method="full", learning_rate=1e-4, epochs=3.0, weight_decay=0.05),
    "sdmprune-lora": replace(SDMPRUNE, lora_r=8, lora_alpha=16, gradient_checkpointing=False),
    "sdmprune-full": replace(SDMPRUNE, method="full", epochs=3.0, gradient_checkpointing=False),
}
"""By name; the papers' as in the scripts that their authors published, for each of four GPUs."""


def training_named(name: str, given: Mapping[str, Any]) -> Training:
    """A preset with what is given, and is not None, in its place.

    Raises:
        UserError: there is no such preset, or a value is out of range.
    """
    if name not in TRAININGS:
        raise unknown("preset", name, TRAININGS)
    changes = {key: value for key, value in given.items() if value is not None}
    training = replace(TRAININGS[name], **changes)
    for key in changes:
        word = key.replace("_", "-")
        if training.method == "full" and key in ("lora_r", "lora_alpha", "lora_dropout", "target_modules"):
            raise UserError(f"{word} is for --method lora; full training has no adapter")
        if training.distill_weight == 0 and key == "temperature":
            raise UserError(f"{word} is that of the divergence, which --distill-weight 0 leaves out")
    return training


class TimedTrainer(Trainer):
    """Transformers' Trainer, whose learning rate can fall with the time that is spent."""

    watch: Watch

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A cosine over the steps, or over the time where that is limited and spent sooner."""
        if self.watch.limit.minutes is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)

        def cosine(step: int) -> float:
            return (1 + math.cos(math.pi * max(self.watch.share, min(1.0, step / num_training_steps)))) / 2

        chosen: Any = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(chosen, cosine)
        return self.lr_scheduler


def train(
    model: nn.Module,
    training: Training,
    rows: Packed | Remembered,
    held: Packed,
    folder: Path,
    watch: Watch,
    *,
    device: str,
    tracker: str = "none",
) -> TimedTrainer:
    """Train `model`, which returns its loss, and leave it in its best state by held-out loss; resumes from `folder`.

    Args:
        model: returns its loss, and sum and number of labels of each row when it is evaluated.
        training: the settings.
        rows: to train on.
        held: to look at.
        folder: where states are kept.
        watch: tells of progress.
        device: `cpu`, or anything else for what torch finds.
        tracker: of transformers' own, that is told of losses too.
    """
    steps = training.max_steps if training.max_steps is not None else -1
    mixed = device != "cpu" and next(model.parameters()).dtype == torch.float32
    resumed = last_state(folder)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=training.weight_decay,
        optim=OPTIMIZERS[training.optimizer],
        activation_checkpointing=training.gradient_checkpointing,
        bf16=mixed,
        use_cpu=device == "cpu",
        seed=training.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_on_start=resumed is None,
        eval_steps=training.evaluate_every,
        save_strategy="steps",
        save_steps=training.evaluate_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=device != "cpu",
        disable_tqdm=True,
        report_to=tracker,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # or one process would make replicas of the model
    trainer = TimedTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=held,
        callbacks=[watch],
        compute_metrics=mean_of_labels,
    )
    trainer.watch = watch
    trainer.remove_callback(PrinterCallback)
    with suppress(OutOfTimeError):  # in the first look at the held-out rows
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    return trainer


def gathered(trainer: Trainer) -> dict[str, Tensor] | None:
    """All weights, in the first process, where FSDP or DeepSpeed share them out; every process must ask."""
    accelerator = trainer.accelerator
    shared_out = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    state: dict[str, Tensor] | None = accelerator.get_state_dict(trainer.model_wrapped) if shared_out else None
    return state


def mean_of_labels(found: EvalPrediction) -> dict[str, float]:
    """Loss over all labels, from the sum and the number of each row."""
    sums = torch.as_tensor(found.predictions).double().sum(0)
    return {"loss": float(sums[0] / sums[1])}


def last_state(folder: Path) -> Path | None:
    """The newest state that is whole."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{CLOCK}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
