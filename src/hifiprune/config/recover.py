"""The options of `recover`: how a pruned model is trained, and the papers' settings by name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from hifiprune.bounds import COUNT, INNER_SHARE, NOT_NEGATIVE, PAIR, POSITIVE, SEED, SHARE
from hifiprune.config.groups import ComputeConfig, layout_option, overwrite_option
from hifiprune.config.options import (
    ADAPTER,
    COMPUTE,
    LOSS,
    OPTIMIZATION,
    OUTPUT,
    TRAINING_DATA,
    Checked,
    group,
    option,
)
from hifiprune.errors import UserError

METHODS = ("lora", "full")
OPTIMIZERS = ("adamw", "adamw-bf16", "8-bit")


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """How a model is trained; `TRAININGS` has the papers' settings."""

    method: str = option("lora", "lora: low-rank changes, merged afterwards; full: all weights.", choices=METHODS)
    learning_rate: float = option(4e-4, "Learning rate at the start; it falls along a cosine.", bounds=POSITIVE)
    epochs: float = option(2.0, "Passes over the data.", bounds=POSITIVE)
    max_steps: int | None = option(
        None, "Number of optimizer steps, in place of --epochs.", panel=OPTIMIZATION, bounds=COUNT
    )
    max_minutes: float | None = option(
        None, "Wall-clock limit of the whole run, in minutes; such a run is not repeatable.", bounds=POSITIVE
    )
    per_device_batch_size: int | None = option(
        None,
        "Rows per batch on each device.",
        panel=OPTIMIZATION,
        bounds=COUNT,
        shown_default="1; a GPU takes several of a step's batches together, by size and free memory",
    )
    gradient_accumulation_steps: int = option(
        32, "Batches whose gradients make one optimizer step.", panel=OPTIMIZATION, bounds=COUNT
    )
    seq_len: int = option(1024, "Tokens per row; examples are packed into rows.", panel=TRAINING_DATA, bounds=PAIR)
    weight_decay: float = option(0.0, "Weight decay of AdamW.", panel=OPTIMIZATION, bounds=NOT_NEGATIVE)
    lora_r: int = option(32, "Rank of the low-rank changes.", panel=ADAPTER, bounds=COUNT)
    lora_alpha: int = option(64, "Scale of the low-rank changes, alpha / r.", panel=ADAPTER, bounds=COUNT)
    lora_dropout: float = option(0.05, "Dropout of the input of the low-rank changes.", panel=ADAPTER, bounds=SHARE)
    target_modules: tuple[str, ...] = option(
        (),
        "Linear layers that get low-rank changes, separated by commas, such as q_proj,v_proj.",
        panel=ADAPTER,
        metavar="NAMES",
        shown_default="all but the head",
    )
    optimizer: str = option(
        "adamw",
        "adamw; adamw-bf16: full weights and moments in bfloat16 on a GPU; 8-bit: by bitsandbytes.",
        panel=OPTIMIZATION,
        choices=OPTIMIZERS,
    )
    gradient_checkpointing: bool = option(
        False,
        "Recompute activations in the backward pass (less memory), or keep them (less time).",
        panel=COMPUTE,
        flag="--gradient-checkpointing/--keep-graphs",
    )
    distill_weight: float = option(
        1.0,
        "Share of the divergence from the dense model in the loss; the rest is cross-entropy on labels.",
        bounds=SHARE,
    )
    temperature: float = option(
        1.0, "Temperature of both distributions in the divergence.", panel=LOSS, bounds=POSITIVE
    )
    match_hidden: float = option(
        0.0,
        "Weight in the loss of the difference from the dense model's hidden states.",
        panel=LOSS,
        bounds=NOT_NEGATIVE,
    )
    cache_teacher: int | None = option(
        None,
        "Keep the dense model's probabilities of this many likeliest tokens on disk; train without it in memory.",
        panel=LOSS,
        bounds=COUNT,
        shown_default="nothing is kept",
    )
    evaluate_every: int = option(
        50, "Steps between evaluations on held-out rows, and between saved states.", panel=OPTIMIZATION, bounds=COUNT
    )
    held_out: float = option(
        0.05, "Fraction of the examples that is held out.", panel=TRAINING_DATA, bounds=INNER_SHARE
    )
    seed: int = option(
        0, "Seed of the order of the data, dropout and the start of LoRA.", panel=OPTIMIZATION, bounds=SEED
    )

    def __post_init__(self) -> None:
        """Check every value, and that a cached teacher is enough for the loss."""
        super().__post_init__()
        if self.cache_teacher and (self.match_hidden or not self.distill_weight):
            raise UserError("cache-teacher keeps distributions: give a --distill-weight above 0, and no --match-hidden")

    @property
    def rows(self) -> int:
        """Return the rows of a batch."""
        return self.per_device_batch_size or 1

    @property
    def taught(self) -> bool:
        """Whether the dense model has a part in the loss."""
        return self.distill_weight > 0 or self.match_hidden > 0

    def refuse_unused(self, given: frozenset[str]) -> None:
        """Refuse options that were given and have no effect.

        Args:
            given: names of the options.

        Raises:
            UserError: there are some.
        """
        for name in ("lora_r", "lora_alpha", "lora_dropout", "target_modules"):
            if self.method == "full" and name in given:
                raise UserError(f"{name.replace('_', '-')} is for --method lora; full training has no adapter")
        if self.distill_weight == 0 and "temperature" in given:
            raise UserError("temperature is that of the divergence, which --distill-weight 0 leaves out")


HFPRUNE = TrainingConfig(gradient_checkpointing=True, optimizer="adamw-bf16", distill_weight=0.0)
SDMPRUNE = replace(HFPRUNE, learning_rate=1e-4, weight_decay=0.05, gradient_accumulation_steps=16, seq_len=4096)
TRAININGS = {
    "default": TrainingConfig(),
    "hfprune-lora": HFPRUNE,
    "hfprune-full": replace(HFPRUNE, method="full", learning_rate=1e-4, epochs=3.0, weight_decay=0.05),
    "sdmprune-lora": replace(SDMPRUNE, lora_r=8, lora_alpha=16, gradient_checkpointing=False),
    "sdmprune-full": replace(SDMPRUNE, method="full", epochs=3.0, gradient_checkpointing=False),
}
"""By name; the papers' as in the scripts that their authors published, for each of four GPUs."""


@dataclass(frozen=True)
class RecoverConfig(Checked):
    """Options of `recover`."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"training": asdict(training)} for name, training in TRAININGS.items()
    }

    training: TrainingConfig = TrainingConfig()
    teacher: str | None = option(
        None,
        "The dense model: local folder, hub id or .gguf file.",
        metavar="DENSE",
        shown_default="the one that was pruned",
    )
    control: bool = option(
        False,
        "Train the dense model instead, on the same data, to see what the data alone is worth.",
        panel=TRAINING_DATA,
    )
    learn_prompts: bool = option(False, "Learn prompts too, not only answers.", panel=TRAINING_DATA)
    text_column: str | None = option(
        None, "Column that holds the text.", panel=TRAINING_DATA, shown_default="guessed from the data"
    )
    max_rows: int | None = option(
        None,
        "Maximum number of rows to read from a hub data set.",
        panel=TRAINING_DATA,
        bounds=COUNT,
        shown_default="all",
    )
    keep_adapter: bool = option(False, "Write the LoRA adapter too.", panel=OUTPUT)
    resume: bool = option(False, "Only continue an interrupted run; never start a new one.", panel=OUTPUT)
    report_to: str = option(
        "none", "Experiment tracker: tensorboard, trackio, wandb, swanlab and others; or none.", panel=OUTPUT
    )
    compute: ComputeConfig = group(ComputeConfig(), only=("device", "dtype", "attention"))
    layout: str = layout_option()
    shard_size: str = option("5GB", "Largest weight file.", panel=OUTPUT)
    overwrite: bool = overwrite_option()
