"""Cut a checkpoint on disk, shard by shard, without loading the model."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.bounds import size_in_bytes
from hifiprune.config.groups import AUTO, DECI
from hifiprune.engine.spill import Spilled
from hifiprune.errors import UserError
from hifiprune.io.atomic import check_space, replacing
from hifiprune.io.hashing import hashing
from hifiprune.io.output_paths import check_target, exclusive
from hifiprune.io.safetensors_stream import DTYPES, Piece, Stacked, Stored, write_shard
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.detect import family_of
from hifiprune.models.edit import cuts_of, matching_mlps
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.layouts import zero_biases
from hifiprune.models.lineage import read_with
from hifiprune.models.modeling_pruned import MixedWidths
from hifiprune.models.neuron_slices import Places
from hifiprune.models.save_model import save_model
from hifiprune.models.weight_files import INDEX
from hifiprune.plan import Plan
from hifiprune.pruning.cut import cut_

PATTERN = "model{suffix}.safetensors"


@exclusive
def cut_checkpoint(
    model: str,
    output: str | Path,
    plan: Plan,
    *,
    layout: str = AUTO,
    shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Prune a checkpoint as `hifiprune.cut_` prunes a model, in its own dtype, with one chunk of a tensor in memory.

    Args:
        model: local folder or hub id.
        output: folder to write, an ordinary checkpoint.
        plan: which neurons to keep.
        layout: how the configuration states widths; see `PruneConfig`.
        shard_size: largest weight file.
        overwrite: replace an existing output.

    Raises:
        UserError: the plan is for a model of another shape, the checkpoint stores its MLPs in another way, or the
            layout cannot hold the widths.
        RunError: the disk is full.
    """
    size_in_bytes("shard size", shard_size)
    checkpoint = find_checkpoint(model)
    target = check_target(output, folder=True, overwrite=overwrite, inputs=read_with(checkpoint))
    checkpoint.fetch()
    if not stored_plainly(checkpoint):
        raise UserError(f"{model} does not store its tensors as the model has them: load it, and use cut_")
    with replacing(target, overwrite=overwrite) as folder:
        write_cut(checkpoint, plan, folder, shard_size, layout=layout)


def stored_plainly(checkpoint: Checkpoint) -> bool:
    """Return whether the files hold each parameter of the model by its own name and shape, tied ones once."""
    if checkpoint.gguf:
        return False
    skeleton, stored = checkpoint.skeleton(), checkpoint.tensors()
    state = skeleton.state_dict()
    buffers = {name: buffer for name, buffer in skeleton.named_buffers() if name in state}
    wanted = {name: tuple(values.shape) for name, values in (*skeleton.named_parameters(), *buffers.items())}
    known = {name: stored[name] for name in state if name in stored}
    return wanted == {name: each.shape for name, each in known.items() if each.kind in DTYPES}


def write_cut(
    checkpoint: Checkpoint,
    plan: Plan,
    folder: Path,
    shard_size: str = "5GB",
    changed: dict[str, Spilled] | None = None,
    *,
    layout: str = AUTO,
) -> None:
    """Write the part of a checkpoint that `plan` keeps into a folder.

    Args:
        checkpoint: checkpoint with all files on this disk, `stored_plainly`.
        plan: which neurons to keep.
        folder: folder to create.
        shard_size: largest weight file.
        changed: tensors that replace those of the same names, after the cut.
        layout: how the configuration states widths.
    """
    skeleton: Any = checkpoint.new_skeleton()
    matching_mlps(skeleton, plan)
    pieces = _pieces(checkpoint, skeleton, plan, changed or {})
    check_space(folder, sum(piece.bytes for piece in pieces.values()))
    cut_(skeleton.to(checkpoint.dtype()), plan)  # of the meta device: sizes alone
    save_model(skeleton, checkpoint, folder, layout=layout, state_dict={})
    if Checkpoint(str(folder), folder).layout == DECI:
        pieces |= {name: _zeros(values) for name, values in zero_biases(skeleton).items()}
    if not isinstance(skeleton, MixedWidths):
        family = family_of(skeleton.config)
        pieces = {family.in_files(name): piece for name, piece in pieces.items()}
    split = split_state_dict_into_shards_factory(
        pieces, get_storage_size=lambda piece: piece.bytes, filename_pattern=PATTERN, max_shard_size=shard_size
    )
    for file, names in split.filename_to_tensors.items():
        write_shard(folder / file, {name: pieces[name] for name in names})
    if split.is_sharded:
        places = {name: file for file, names in split.filename_to_tensors.items() for name in names}
        index = {"metadata": split.metadata, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _pieces(
    checkpoint: Checkpoint, skeleton: PreTrainedModel, plan: Plan, changed: dict[str, Spilled]
) -> dict[str, Piece]:
    """Return every tensor of the output by name, in the order of the dense model's bytes."""
    cuts, known = cuts_of(skeleton, plan), skeleton.state_dict().keys()
    pieces = {}
    for name, stored in checkpoint.tensors().items():
        if name not in known:
            continue
        cut, other = cuts.get(name), changed.get(name)
        if isinstance(stored, Stacked):
            for expert, parts in enumerate(stored.parts):
                start = 0
                for (part, matrix), rows in zip(parts.items(), _shares(cut, expert, parts), strict=True):
                    stop = start + (matrix.shape[0] if rows is None or rows.dim else len(rows.rows[0]))
                    values = other and partial(_matrix, other, expert, slice(start, stop))
                    pieces[part], start = _piece(matrix, rows, values), stop
        else:
            pieces[name] = _piece(stored, cut, other)
    return pieces


def _piece(stored: Stored, cut: Places | None, changed: Spilled | None) -> Piece:
    """Return a tensor of the output."""
    shape, rows = stored.shape, stored.chunks
    if cut is not None:
        shape, rows = tuple(cut.shape(shape)), partial(_kept_rows, stored, cut)
    if changed is not None:
        rows = partial(_changed, changed, stored.dtype)
    return Piece(stored.kind, shape, rows)


def _zeros(values: Tensor) -> Piece:
    """Return a tensor of the output that is zero."""
    kind = next(name for name, dtype in DTYPES.items() if dtype == values.dtype)
    return Piece(kind, tuple(values.shape), lambda: iter([values]))


def _shares(cut: Places | None, expert: int, parts: dict[str, Stored]) -> Iterator[Places | None]:
    """Yield the rows kept of each stored matrix of an expert."""
    first = 0
    for part in parts.values():
        if cut is None:
            yield None
            continue
        kept, last = cut.rows[expert], first + part.shape[0]
        if cut.dim == 0:
            kept = kept[(kept >= first) & (kept < last)] - first
        yield Places([kept], cut.dim)
        first = last


def _matrix(values: Spilled, expert: int, rows: slice) -> Tensor:
    """Return some rows of an expert's matrix of a stack."""
    return values()[expert, rows]


def _changed(values: Spilled, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield a tensor that replaces a stored one."""
    yield values().to("cpu", dtype)


def _kept_rows(stored: Stored, cut: Places) -> Iterator[Tensor]:
    """Yield the rows of a tensor reduced to the kept neurons."""
    if cut.stacked:
        for (matrix,), kept in zip(stored.chunks(1), cut.rows, strict=True):
            yield matrix.index_select(cut.dim, kept).unsqueeze(0)
        return
    (kept,), first = cut.rows, 0
    for rows in stored.chunks():
        if cut.dim == 0:
            here = kept[(kept >= first) & (kept < first + len(rows))] - first
            first += len(rows)
            yield rows.index_select(0, here)
        else:
            yield rows.index_select(1, kept)


@contextmanager
def hashing_stored(checkpoint: Checkpoint) -> Iterator[Callable[[], str]]:
    """Compute `hash_model` of a checkpoint from its files, which must be `stored_plainly`, while the context runs.

    What it yields waits for the hash, and raises `UserError` where a weight is NaN or infinite.
    """
    stored = checkpoint.tensors()
    names = [name for name, _ in checkpoint.skeleton().named_parameters()]
    with hashing((name, stored[name].shape, stored[name].chunks()) for name in names) as result:
        yield result


def hash_stored(checkpoint: Checkpoint) -> str:
    """Compute the same hash at once.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    with hashing_stored(checkpoint) as result:
        return result()
