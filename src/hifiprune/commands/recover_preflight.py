"""Resolve a `recover` run: find its dense model, and check everything before weights are loaded."""

import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from hifiprune.bounds import size_in_bytes
from hifiprune.commands.prepare import prepare
from hifiprune.config.files import to_dict
from hifiprune.config.groups import ComputeConfig
from hifiprune.config.recover import RecoverConfig, TrainingConfig
from hifiprune.config.texts import Text
from hifiprune.errors import UserError, unknown
from hifiprune.io.atomic import check_space
from hifiprune.io.distributed import check_launcher
from hifiprune.io.resume import ResumeFolder
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.lineage import commits_of, dense_of, record_of
from hifiprune.models.mlp import count_parameters
from hifiprune.recovery.lora import check_adapter, linears_of
from hifiprune.recovery.time_limit import TimeLimit
from hifiprune.reports.model_card import Base, describe_base
from hifiprune.results import RecoverResults
from hifiprune.run_record import RunRecord


@dataclass(frozen=True)
class RecoverJob:
    """A checkpoint to be trained, with everything checked that can be without its weights.

    Attributes:
        model: what the user called the pruned checkpoint.
        data: rows to learn from.
        config: options.
        training: how the model is trained: as the options say, as far as it has an effect.
        checkpoint: the pruned checkpoint, whose tokenizer reads the data.
        started: the checkpoint that is trained: `checkpoint`, or `dense` as a control.
        dense: the dense model, if it has a part.
        target: absolute path of the output.
        base: what the card of the output says of the checkpoint that is trained.
        record: record of the run, as far as it is.
        resume_folder: finished parts, from which the same command resumes.
        limit: wall-clock limit of the run.
    """

    model: str
    data: str
    config: RecoverConfig
    training: TrainingConfig
    checkpoint: Checkpoint
    started: Checkpoint
    dense: Checkpoint | None
    target: Path
    base: Base
    record: RunRecord[RecoverResults]
    resume_folder: ResumeFolder
    limit: TimeLimit


def resolve(model: str, output: str | Path, data: str, config: RecoverConfig) -> RecoverJob:
    """Check everything that can be checked before weights are loaded.

    Raises:
        UserError: something asked for cannot be done.
    """
    training, compute = config.training, config.compute
    check_training(compute, training)
    if config.control:  # from itself it has nothing to learn
        training = replace(training, distill_weight=0.0, match_hidden=0.0, cache_teacher=None)
    check_purpose(training, config)
    settled = to_dict(replace(config, training=training))
    record: RunRecord[RecoverResults] = RunRecord(
        "recover", {"model": model, "output": str(output), "data": data, **settled}
    )
    size_in_bytes("shard size", config.shard_size)
    dense = find_dense(model, config.teacher, training, control=config.control)
    texts, read = [Text(data, training.seq_len)], [dense.path] if dense else []
    checkpoint, target, skeleton = prepare(
        model, output, texts, read, compute=compute, folder=True, overwrite=config.overwrite
    )
    record.commits = commits_of(checkpoint, dense)
    check_adapter(skeleton, training, kept=config.keep_adapter)
    check_tracker(config.report_to, target)
    started = dense if dense and config.control else checkpoint
    check_space(target, needed_bytes(started, training))
    return RecoverJob(
        model=model,
        data=data,
        config=config,
        training=training,
        checkpoint=checkpoint,
        started=started,
        dense=dense,
        target=target,
        base=describe_base(started),
        record=record,
        resume_folder=ResumeFolder.beside(target, "recover"),
        limit=TimeLimit(training.max_minutes),
    )


def check_purpose(training: TrainingConfig, config: RecoverConfig) -> None:
    """Refuse what would have no effect."""
    if config.teacher and not (training.taught or config.control):
        raise UserError(
            "--teacher has nothing to teach: give --distill-weight or --match-hidden above 0, or leave it out"
        )
    if config.keep_adapter and training.method == "full":
        raise UserError("--keep-adapter is for --method lora; full training has no adapter")


def check_training(compute: ComputeConfig, training: TrainingConfig) -> None:
    """Refuse arithmetic and devices that cannot train.

    Raises:
        UserError: these are such.
    """
    check_launcher(low_rank=training.method == "lora")
    if "flash" in (compute.attention or "") and training.rows > 1:
        raise UserError(
            "flash attention keeps packed examples apart in batches of one row only: --per-device-batch-size 1"
        )
    if compute.dtype == "float16":
        raise UserError("dtype float16 loses the small gradients of training: use bfloat16 or float32")
    if compute.device.startswith("cuda:"):
        number = compute.device.partition(":")[2]
        raise UserError(f"training takes the first GPU that it sees: set CUDA_VISIBLE_DEVICES={number}, --device cuda")
    if training.optimizer == "8-bit" and find_spec("bitsandbytes") is None:
        raise UserError("optimizer 8-bit needs bitsandbytes: pip install bitsandbytes, or --optimizer adamw")


def check_tracker(name: str, target: Path) -> None:
    """Refuse a tracker that is not known or not installed; TensorBoard's files go beside `target`.

    Raises:
        UserError: it is one of these.
    """
    known, here = [*INTEGRATION_TO_CALLBACK], get_available_reporting_integrations()
    if name not in ("none", *known):
        raise unknown("tracker", name, ["none", *known])
    if name not in ("none", *here):
        raise UserError(f"tracker '{name}' is not installed: pip install {name}")
    if name == "tensorboard":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", f"{target}-logs")  # or they would go with the states


def find_dense(model: str, teacher: str | None, training: TrainingConfig, *, control: bool) -> Checkpoint | None:
    """Return the dense model, where there is something for it to do, after checking that it can teach."""
    made_by = record_of(find_checkpoint(model))  # read in any case: what training makes tells of it too
    if not control and not training.taught:
        return None
    name = teacher or dense_of(made_by)
    wanted = "which --control trains" if control else "to learn its distribution, or --distill-weight 0"
    if name is None:
        raise UserError(f"the dense model is not known from {model}: give --teacher, {wanted}")
    try:
        dense = find_checkpoint(name)
    except UserError as error:
        raise UserError(f"{error}; give --teacher, {wanted}") from error
    record_of(dense)
    if training.taught:
        ours, theirs = (each.config().get_text_config() for each in (find_checkpoint(model), dense))
        if ours.vocab_size != theirs.vocab_size:
            sizes = f"{theirs.vocab_size} tokens, the model's {ours.vocab_size}"
            raise UserError(f"the teacher's vocabulary has {sizes}; give the dense model")
        if training.cache_teacher and training.cache_teacher >= theirs.vocab_size:
            raise UserError(f"cache-teacher {training.cache_teacher} must be below the vocabulary, {theirs.vocab_size}")
        shapes = {(each.hidden_size, each.num_hidden_layers) for each in (ours, theirs)}
        if training.match_hidden and len(shapes) > 1:
            raise UserError("match-hidden needs a teacher of the same depth and hidden size; give the dense model")
    return dense


def needed_bytes(checkpoint: Checkpoint, training: TrainingConfig) -> int:
    """Return the disk space for the result and three states: trained weights and two moments in float32 each."""
    skeleton = checkpoint.skeleton()
    total = trained = count_parameters(skeleton)
    if training.method == "lora":
        chosen = training.target_modules
        linears = [module for name, module in linears_of(skeleton) if not chosen or name.rpartition(".")[2] in chosen]
        trained = sum(training.lora_r * sum(linear.weight.shape) for linear in linears)
    return checkpoint.dtype().itemsize * total + 3 * 3 * 4 * trained
