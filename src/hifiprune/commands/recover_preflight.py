"""What a training run refuses before it begins, and where its dense model is."""

import os
from importlib.util import find_spec
from pathlib import Path

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from hifiprune.config.groups import ComputeConfig
from hifiprune.errors import UserError, unknown
from hifiprune.io.distributed import check_launcher
from hifiprune.models.checkpoint import Checkpoint, find_checkpoint
from hifiprune.models.lineage import dense_of, record_of
from hifiprune.models.mlp import count_parameters
from hifiprune.recovery.config import Training
from hifiprune.recovery.lora import linears_of


def check_purpose(training: Training, teacher: str | None, *, control: bool, keep_adapter: bool) -> None:
    """Refuse what would have no effect."""
    if teacher and not (training.taught or control):
        raise UserError(
            "--teacher has nothing to teach: give --distill-weight or --match-hidden above 0, or leave it out"
        )
    if keep_adapter and training.method == "full":
        raise UserError("--keep-adapter is for --method lora; full training has no adapter")


def check_compute(compute: ComputeConfig, training: Training) -> None:
    """Refuse arithmetic and devices that cannot train.

    Raises:
        UserError: these are such.
    """
    check_launcher(low_rank=training.method == "lora")
    if "flash" in (compute.attention or "") and training.batch_size > 1:
        raise UserError("flash attention keeps packed examples apart in batches of one row only: --batch-size 1")
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


def find_dense(model: str, teacher: str | None, training: Training, *, control: bool) -> Checkpoint | None:
    """The dense model, where there is something for it to do, checked to fit where it teaches."""
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


def needed_bytes(checkpoint: Checkpoint, training: Training) -> int:
    """Disk for the result and for three states, of which each has what is trained and two moments in float32."""
    skeleton = checkpoint.skeleton()
    total = trained = count_parameters(skeleton)
    if training.method == "lora":
        chosen = training.target_modules
        linears = [module for name, module in linears_of(skeleton) if not chosen or name.rpartition(".")[2] in chosen]
        trained = sum(training.lora_r * sum(linear.weight.shape) for linear in linears)
    return checkpoint.dtype().itemsize * total + 3 * 3 * 4 * trained
