"""Check the headers of weight files against the model before a weight is read."""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from hifiprune.errors import UserError
from hifiprune.io.safetensors_stream import CHUNK_BYTES, Stacked, Stored, stack_experts, stored_tensors
from hifiprune.models.config_file import FURTHER
from hifiprune.models.detect import family_of
from hifiprune.models.families import Family

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = b"version https://git-lfs"
FLOATS = ("F64", "F32", "F16", "BF16")
Tensors = dict[str, Stored | Stacked]


def listed_files(name: str, folder: Path) -> list[Path]:
    """Return the weight files that a folder should hold: those that its index names, or the single one.

    Args:
        name: checkpoint, for messages.
        folder: directory of its files.

    Raises:
        UserError: the weights are in another format, or their index is damaged.
    """
    if (folder / INDEX).is_file():
        refuse_pointers(name, [folder / INDEX])
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            shards = {Path(shard) for shard in index["weight_map"].values()}
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{name}: {INDEX} is damaged ({error}); copy the checkpoint again") from error
        for shard in shards:
            if shard.is_absolute() or ".." in shard.parts:
                raise UserError(f"{name}: {INDEX} names {shard}, outside of its folder; no checkpoint does that")
        return sorted(folder / shard for shard in shards)
    pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind))
    if pickled and not (folder / SINGLE).is_file():
        hint = f"{pickled[0]} would have to be unpickled: convert it to safetensors first"
        raise UserError(f"{name} has no {SINGLE} and no {INDEX}; {hint}")
    return [folder / SINGLE]


def refuse_missing(name: str, tensors: Collection[str]) -> None:
    """Refuse weights that lack tensors of the model.

    Args:
        name: checkpoint, for the message.
        tensors: names of those that it lacks.

    Raises:
        UserError: there are some.
    """
    if tensors:
        raise UserError(f"{name} lacks {len(tensors)} tensors, such as {min(tensors)}; copy it again")


def refuse_pointers(name: str, files: Iterable[Path]) -> None:
    """Refuse files that git-lfs has not fetched.

    Args:
        name: the checkpoint, for the message.
        files: its files, there or not.

    Raises:
        UserError: one is a pointer to the file, or cannot be read.
    """
    for file in filter(Path.is_file, files):
        try:
            with file.open("rb") as opened:
                start = opened.read(len(POINTER))
        except OSError as error:
            raise UserError(f"{name}: {file.name} cannot be read: {error.strerror}") from error
        if start == POINTER:
            raise UserError(
                f"{name}: {file.name} is a git-lfs pointer, not the file: run `git lfs pull` in {file.parent}"
            )


def check_whole(name: str, file: Path) -> None:
    """Refuse a safetensors file that is truncated or damaged, by its header.

    Raises:
        UserError: it is.
    """
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{name}: {file.name} is truncated or damaged ({error}); copy it again") from error


def model_tensors(files: Iterable[Path], family: Family, model: PreTrainedModel) -> Tensors:
    """Return the stored tensors by the model's names, in the order of their bytes."""
    known, start = model.state_dict().keys(), f"{model.base_model_prefix}."
    found = {family.in_model(name): stored for name, stored in stored_tensors(files).items()}
    named = {start + name if start + name in known else name: stored for name, stored in found.items()}
    if not family.experts:
        return {**named}
    *inputs, output = family.stored_experts
    return stack_experts(named, ".".join(filter(None, (family.mlp, family.experts))), inputs, output)


def check_tensors(name: str, model: PreTrainedModel, tensors: Tensors) -> None:
    """Refuse weights that are missing, are not floating-point numbers, or differ from the model in shape.

    Args:
        name: the checkpoint, for the message.
        model: its skeleton.
        tensors: what the files hold, by the model's names.

    Raises:
        UserError: they are such.
    """
    state = model.state_dict()
    strangers = [known for known in tensors if known not in state]
    _check_layers(name, model, strangers)
    meant = dict(zip(strangers, _renamed(model, strangers, state), strict=True))
    for tensor, stored in tensors.items():
        _check_kind(name, tensor, stored, state.get(meant.get(tensor, tensor)))
    wrong = [known for known, values in state.items() if known in tensors and tensors[known].shape != values.shape]
    if wrong:
        raise UserError(f"{name}: {_shapes(wrong[0], tensors[wrong[0]], state[wrong[0]], model)}{_more(wrong)}")
    if not strangers:  # from which transformers might make what is missing
        shared = [names for names in tied_names(model) if not any(each in tensors for each in names)]
        refuse_missing(name, [names[0] for names in shared])


def _check_layers(name: str, model: PreTrainedModel, strangers: Iterable[str]) -> None:
    """Refuse weights of more layers than the configuration counts, but for those that predict further tokens."""
    config = model.config.get_text_config()
    layers, blocks = config.num_hidden_layers, family_of(model.config).blocks
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    if any(getattr(config, key, None) for key in FURTHER):
        return
    for tensor in strangers:
        found = re.match(rf"{re.escape(blocks)}\.(\d+)\.", tensor)
        if found and int(found[1]) >= layers and not any(pattern.search(tensor) for pattern in ignored):
            raise UserError(
                f"{name} holds {tensor}, of a layer that its configuration does not count: num_hidden_layers is "
                f"{layers}; copy config.json and the weights again from one checkpoint"
            )


def tied_names(model: nn.Module) -> list[list[str]]:
    """Return the names of every parameter of a model: several if it is tied, its own first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def untied_names(model: PreTrainedModel, tensors: Tensors, dtype: torch.dtype) -> frozenset[str]:
    """Return the parameters that the configuration ties, but transformers keeps apart when it loads these files.

    It does so if the files hold both and their values differ, in the order in which it ties.

    Args:
        model: the skeleton.
        tensors: what the files hold, by the model's names.
        dtype: in which values are compared.
    """
    held, apart = dict(tensors), set()
    for target, source in model.all_tied_weights_keys.items():
        if target in held and source in held:
            if not _equal(held[target], held[source], dtype):
                apart.add(target)
        elif target in held:
            held[source] = held[target]
        elif source in held:
            held[target] = held[source]
    return frozenset(apart)


def untie_(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Untie parameters of a model on the meta device."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        parameter = model.get_parameter(name)
        setattr(model.get_submodule(path), leaf, nn.Parameter(torch.empty_like(parameter)))
        del model.all_tied_weights_keys[name]


def tied_once(model: nn.Module, tensors: Tensors) -> Tensors:
    """Return each of the model's parameters once by its first name, whichever name it is stored under."""
    first = {name: names[0] for names in tied_names(model) for name in names}
    return {
        first.get(name, name): stored
        for name, stored in tensors.items()
        if first.get(name, name) == name or first[name] not in tensors
    }


def _check_kind(name: str, tensor: str, stored: Stored | Stacked, values: Tensor | None) -> None:
    """Refuse a tensor that should be floating-point numbers and is not.

    One that the model does not know is read by nobody, unless it is in low precision: its scales may be.
    """
    for part, member in _members(tensor, stored).items():
        floats = member.kind.startswith("F") if values is None else values.is_floating_point()
        if floats and member.kind not in FLOATS:
            raise UserError(
                f"{name} stores {part} as {member.kind}, and no quantization_config says what its numbers mean: "
                "weights must be float32, bfloat16 or float16; prune the original checkpoint, and quantize the result"
            )


def _members(tensor: str, stored: Stored | Stacked) -> dict[str, Stored]:
    """Return the stored tensors that a tensor consists of, by name."""
    if isinstance(stored, Stored):
        return {tensor: stored}
    return {name: part for parts in stored.parts for name, part in parts.items()}


def _renamed(model: PreTrainedModel, names: Iterable[str], state: Mapping[str, Tensor]) -> Iterator[str]:
    """Rename foreign tensor names as transformers does."""
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    for name in names:
        yield rename_source_key(name, renamings, converters, model.base_model_prefix, dict(state))[0]


def _shapes(tensor: str, stored: Stored | Stacked, values: Tensor, model: PreTrainedModel) -> str:
    """Say how a tensor differs in shape from the model's, and what in the configuration may be wrong."""
    found, wanted = list(stored.shape), list(values.shape)
    sizes = {size for size in wanted if size not in found}
    facts = model.config.get_text_config().to_dict()
    keys = [f"{key} {value}" for key, value in facts.items() if type(value) is int and value in sizes]
    said = f" ({', '.join(keys)})" if keys else ""
    return (
        f"{tensor} is {found or 'matrices of several shapes'} in the files, where config.json{said} asks for {wanted}; "
        "copy config.json and the weights again from one checkpoint"
    )


def _more(names: list[str]) -> str:
    return f" ({len(names) - 1} more tensors differ)" if len(names) > 1 else ""


def _equal(one: Stored | Stacked, other: Stored | Stacked, dtype: torch.dtype) -> bool:
    """Compare as `torch.equal(one.whole().to(dtype), other.whole().to(dtype))` does, a few rows at a time."""
    if one.shape != other.shape:
        return False
    step = max(1, CHUNK_BYTES // max(1, prod(one.shape[1:]) * 8))
    return all(
        torch.equal(ours.to(dtype), theirs.to(dtype))
        for ours, theirs in zip(one.chunks(step), other.chunks(step), strict=True)
    )
