"""The command that trains: `recover`."""

from dataclasses import asdict
from typing import Annotated

from typer import Argument, Option

from hifiprune.cli.console import show
from hifiprune.cli.options import (
    AsJson,
    Attention,
    Debug,
    Device,
    Dtype,
    Output,
    Overwrite,
    Quiet,
    ShardSize,
    TextColumn,
    Verbose,
    listed,
)
from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path


def recover(
    model: Annotated[str | None, Argument(metavar="MODEL", help="Local folder, hub id or .gguf file.")] = None,
    output: Output = "recovered",
    data: Annotated[
        str | None,
        Option(
            help="Rows to learn from: text, instruction and output, prompt and response, or messages; a .txt, .jsonl "
            ".csv or .parquet file, a folder of those, or a hub data set id[:config][:split]."
        ),
    ] = None,
    preset: Annotated[
        str, Option(help="default, or the papers' settings: hfprune-lora, hfprune-full, sdmprune-lora, sdmprune-full.")
    ] = "default",
    show_preset: Annotated[bool, Option("--show-preset", help="Show the preset's settings and end.")] = False,
    method: Annotated[str | None, Option(help="lora: low-rank changes, merged after; or full.")] = None,
    teacher: Annotated[
        str | None, Option(metavar="DENSE", help="The dense model; if not given, the one that was pruned.")
    ] = None,
    distill_weight: Annotated[
        float | None, Option(help="Share of the divergence from the dense model in the loss; the rest is labels.")
    ] = None,
    temperature: Annotated[float | None, Option(help="Of both distributions in the divergence.")] = None,
    match_hidden: Annotated[
        float | None, Option(help="Weight of the difference to the dense model's hidden states, added to the loss.")
    ] = None,
    cache_teacher: Annotated[
        int | None,
        Option(help="Keep so many likeliest tokens of the dense model's distribution on disk, and train without it."),
    ] = None,
    epochs: Annotated[float | None, Option(help="Passes over the data.")] = None,
    max_steps: Annotated[int | None, Option(help="Optimizer steps, in place of epochs.")] = None,
    max_minutes: Annotated[float | None, Option(help="Wall-clock limit of the whole run.")] = None,
    learning_rate: Annotated[float | None, Option("--lr", help="Learning rate at the start.")] = None,
    lora_r: Annotated[int | None, Option(help="Rank of the changes.")] = None,
    lora_alpha: Annotated[int | None, Option(help="Their scale is alpha / r.")] = None,
    lora_dropout: Annotated[float | None, Option(help="Dropout of their input.")] = None,
    target_modules: Annotated[str | None, Option(help="Maps that get one, separated by commas; else all.")] = None,
    seq_len: Annotated[int | None, Option(help="Tokens a row; examples are packed.")] = None,
    batch_size: Annotated[int | None, Option(help="Rows a step on each device.")] = None,
    gradient_accumulation: Annotated[int | None, Option(help="Batches that make one optimizer step.")] = None,
    weight_decay: Annotated[float | None, Option(help="Of AdamW.")] = None,
    optimizer: Annotated[
        str | None, Option(help="adamw; adamw-bf16: full weights and moments in bfloat16; 8-bit: by bitsandbytes.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, Option("--gradient-checkpointing/--keep-activations", help="Compute each block twice.")
    ] = None,
    evaluate_every: Annotated[
        int | None, Option(help="Steps between looks at held-out rows, and between saved states.")
    ] = None,
    held_out: Annotated[float | None, Option(help="Fraction of the examples that are held out.")] = None,
    seed: Annotated[int | None, Option(help="Of the data's order, dropout and LoRA's start.")] = None,
    learn_prompts: Annotated[
        bool, Option("--learn-prompts", help="Labels on prompts too, not on answers alone.")
    ] = False,
    text_column: TextColumn = None,
    max_rows: Annotated[int | None, Option(help="Rows of a hub data set; all if not given.")] = None,
    control: Annotated[bool, Option("--control", help="Train the dense model instead, on the same data.")] = False,
    keep_adapter: Annotated[bool, Option("--keep-adapter", help="Write the LoRA adapter too.")] = False,
    resume: Annotated[
        bool,
        Option("--resume", help="Only go on with an interrupted run; never start a new one."),
    ] = False,
    tracker: Annotated[
        str,
        Option("--report-to", help="A tracker to tell of losses: tensorboard, trackio, wandb, swanlab ...; or none."),
    ] = "none",
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = None,
    shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Train a pruned model, by the dense one or by labels, to win back what it lost."""
    import hifiprune as hp
    from hifiprune.cli import tables
    from hifiprune.recovery.config import training_named

    if target_modules is not None and not listed(target_modules):
        raise UserError(
            f"target-modules '{target_modules}' names no map; give names such as q_proj,v_proj, or leave it out"
        )
    given = {
        "method": method,
        "distill_weight": distill_weight,
        "temperature": temperature,
        "match_hidden": match_hidden,
        "cache_teacher": cache_teacher,
        "epochs": epochs,
        "max_steps": max_steps,
        "max_minutes": max_minutes,
        "learning_rate": learning_rate,
        "lora_r": lora_r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": None if target_modules is None else tuple(listed(target_modules)),
        "seq_len": seq_len,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
        "weight_decay": weight_decay,
        "optimizer": optimizer,
        "gradient_checkpointing": gradient_checkpointing,
        "evaluate_every": evaluate_every,
        "held_out": held_out,
        "seed": seed,
    }
    training = training_named(preset, given)
    if show_preset:
        show(asdict(training), as_json, lambda: tables.settings(asdict(training)))
        return
    if model is None:
        raise UserError("recover needs a checkpoint to train: name a folder, hub id or .gguf file")
    if data is None:
        raise UserError("recover needs rows to learn from: give --data")
    record = hp.recover(
        model,
        output,
        data,
        training,
        teacher=teacher,
        control=control,
        learn_prompts=learn_prompts,
        text_column=text_column,
        max_rows=max_rows,
        keep_adapter=keep_adapter,
        resume=resume,
        tracker=tracker,
        compute=hp.ComputeConfig(device, dtype, attention=attention),
        shard_size=shard_size,
        overwrite=overwrite,
    )
    show(record.to_dict(), as_json, lambda: tables.recovered(record, local_path(output)))
