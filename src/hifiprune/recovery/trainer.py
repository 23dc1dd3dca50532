"""Training after the cut, by transformers' Trainer."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from hifiprune.config.recover import TrainingConfig
from hifiprune.engine.memory import choose_batches, free_bytes
from hifiprune.io.distributed import processes
from hifiprune.progress import note
from hifiprune.recovery.callback import CLOCK, Watch
from hifiprune.recovery.distillation import CachedTeacher, guided
from hifiprune.recovery.packing import Packed
from hifiprune.recovery.time_limit import OutOfTimeError

OPTIMIZERS = {"adamw": "adamw_torch", "adamw-bf16": "adamw_torch", "8-bit": "adamw_bnb_8bit"}
"""What transformers' Trainer calls each optimizer."""
ON_GPU = {**OPTIMIZERS, "adamw": "adamw_torch_fused", "adamw-bf16": "adamw_torch_fused"}
"""What it calls them on a GPU."""
LOGGED_ON_GPU = 10
"""Steps between readings of the loss on a GPU, each of which waits for it."""
OPTIMIZED = 3
"""Numbers that training adds for each trained weight: its gradient and two moments."""


def limit_batch(training: TrainingConfig, rows: int) -> TrainingConfig:
    """Return the same with a batch size of no more than each device's share of all rows; tell if it was more."""
    share, size = -(-rows // processes()), training.per_device_batch_size
    if size is None or size <= share:
        return training
    note(f"There are {rows} rows to train on: --per-device-batch-size {size} is cut down to {share}.")
    return replace(training, per_device_batch_size=share)


class TimedTrainer(Trainer):
    """Transformers' Trainer, whose learning rate can fall with the time that is spent."""

    watch: Watch

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count no operations, for which all parameters would be walked through at every batch."""
        return 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create a cosine over the steps, or over the time where that is limited and spent sooner."""
        if self.watch.limit.minutes is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)

        def cosine(step: int) -> float:
            return (1 + math.cos(math.pi * max(self.watch.share, min(1.0, step / num_training_steps)))) / 2

        chosen: Any = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(chosen, cosine)
        return self.lr_scheduler


def train(
    model: nn.Module,
    training: TrainingConfig,
    rows: Packed | CachedTeacher,
    held: Packed,
    folder: Path,
    watch: Watch,
    *,
    device: str,
    together: int = 1,
    report_to: str = "none",
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
        together: batches of an optimizer step that are one on the device; see `batches_together`.
        report_to: experiment tracker of transformers' own, told of losses too.
    """
    steps = training.max_steps if training.max_steps is not None else -1
    on_gpu, resumed = device != "cpu", last_state(folder)
    rows_at_once = training.rows * together
    mixed = on_gpu and any(each.dtype == torch.float32 for each in model.parameters() if each.requires_grad)
    optimizer = (ON_GPU if on_gpu else OPTIMIZERS)[training.optimizer]
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        max_steps=steps,
        per_device_train_batch_size=rows_at_once,
        per_device_eval_batch_size=rows_at_once,
        gradient_accumulation_steps=training.gradient_accumulation_steps // together,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=training.weight_decay,
        optim=optimizer,
        activation_checkpointing=training.gradient_checkpointing,
        bf16=mixed,
        use_cpu=not on_gpu,
        seed=training.seed,
        logging_steps=LOGGED_ON_GPU if on_gpu else 1,
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
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},
        disable_tqdm=True,
        report_to=report_to,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # or one process would make replicas of the model
    trainer = TimedTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=held,
        data_collator=collated,
        callbacks=[watch],
        compute_metrics=mean_of_labels,
    )
    trainer.watch = watch
    trainer.remove_callback(PrinterCallback)
    own_dtypes = disable_input_dtype_casting(model, active=mixed)  # autocast says in which dtype an adapter computes
    with own_dtypes, suppress(OutOfTimeError):  # in the first look at the held-out rows
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    return trainer


def batches_together(model: PreTrainedModel, training: TrainingConfig, device: str) -> int:
    """Return how many of an optimizer step's batches a device takes as one: 1 where their size was asked for."""
    one_by_one = device == "cpu" or "flash" in str(model.config._attn_implementation)  # which packs one row alone
    if training.per_device_batch_size is not None or one_by_one:
        return 1
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    room = (free_bytes(torch.device(device)) - OPTIMIZED * weights * (training.method == "full")) // 2
    steps, recompute = training.gradient_accumulation_steps, training.gradient_checkpointing
    return choose_batches(model, training.seq_len, steps, torch.device(device), room, recompute=recompute)


def collated(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack rows, and say where a label follows, which would make a GPU wait if it was asked."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return batch | {"places": guided(batch["labels"]).flatten().nonzero().flatten()}


def gathered(trainer: Trainer) -> dict[str, Tensor] | None:
    """Return all weights, in the first process, where FSDP shares them out; every process must call it."""
    accelerator = trainer.accelerator
    shared_out = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    state: dict[str, Tensor] | None = accelerator.get_state_dict(trainer.model_wrapped) if shared_out else None
    return state


def mean_of_labels(found: EvalPrediction) -> dict[str, float]:
    """Return the loss over all labels, from the sum and the number of each row."""
    sums = torch.as_tensor(found.predictions).double().sum(0)
    return {"loss": float(sums[0] / sums[1])}


def last_state(folder: Path) -> Path | None:
    """Return the newest complete state."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{CLOCK}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
