"""Read and write safetensors files a chunk at a time, with plain reads and writes.

Pages of a memory-mapped file count as memory of the process once touched, so weights larger than memory are read here.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from math import ceil, prod
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from hifiprune.errors import RunError

CHUNK_BYTES = 2**24
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor stored in a safetensors file.

    Attributes:
        path: path of the file.
        kind: dtype, by its name in the format.
        shape: shape of the tensor.
        start: offset of its bytes in the file.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype."""
        return DTYPES[self.kind]

    @property
    def bytes(self) -> int:
        """Return the size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def chunks(self, step: int | None = None) -> Iterator[Shaped[Tensor, "rows *rest"]]:
        """Yield `step` rows at a time, with prefetch; a chunk is valid until the next one. A scalar is one row."""
        rows, *rest = self.shape or (1,)
        step = step or max(1, CHUNK_BYTES // max(1, prod(rest) * self.dtype.itemsize))
        if step >= rows:
            yield self.whole().view(rows, *rest)
            return
        buffers = torch.empty((2, step, *rest), dtype=self.dtype)
        with self.path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as reader:
            file.seek(self.start)

            def read(number: int) -> Tensor:
                part = buffers[number % 2, : min(step, rows - number * step)]
                _fill(file, part)
                return part

            coming = reader.submit(read, 0)
            for following in range(1, ceil(rows / step) + 1):
                part = coming.result()
                if following * step < rows:
                    coming = reader.submit(read, following)
                yield part

    def whole(self) -> Tensor:
        """Read the whole tensor."""
        values = torch.empty(self.shape, dtype=self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            _fill(file, values)
        return values

    @property
    def members(self) -> list["Stored"]:
        """Return the stored tensors that it consists of: itself."""
        return [self]

    def rows(self, numbers: Sequence[int]) -> Shaped[Tensor, "rows *rest"]:
        """Read some rows."""
        values = torch.empty((len(numbers), *self.shape[1:]), dtype=self.dtype)
        size = self.bytes // self.shape[0]
        with self.path.open("rb", buffering=0) as file:
            for row, number in zip(values, numbers, strict=True):
                file.seek(self.start + number * size)
                _fill(file, row)
        return values


@dataclass(frozen=True)
class Stacked:
    """The stacked tensor of a block's experts, whose matrices are stored one by one.

    Attributes:
        parts: for each expert the matrices that are concatenated, by name.
    """

    parts: list[dict[str, Stored]]

    @property
    def members(self) -> list[Stored]:
        """Return the stored tensors that it consists of."""
        return [each for parts in self.parts for each in parts.values()]

    @property
    def kind(self) -> str:
        """Return the dtype by its name in the format; an unknown name if members differ."""
        kinds = {each.kind for each in self.members}
        return kinds.pop() if len(kinds) == 1 else ""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype."""
        return DTYPES[self.kind]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return experts, rows, columns; empty if the members do not fit together."""
        shapes = {
            (sum(part.shape[0] for part in parts.values()), *next(iter(parts.values())).shape[1:])
            for parts in self.parts
        }
        return (len(self.parts), *shapes.pop()) if len(shapes) == 1 else ()

    @property
    def bytes(self) -> int:
        """Return the size in bytes."""
        return sum(each.bytes for each in self.members)

    def chunks(self, step: int | None = None) -> Iterator[Shaped[Tensor, "1 rows columns"]]:
        """Yield one expert after the other."""
        for parts in self.parts:
            yield torch.cat([part.whole() for part in parts.values()]).unsqueeze(0)

    def whole(self) -> Tensor:
        """Read the whole tensor."""
        values = torch.empty(self.shape, dtype=self.dtype)
        for own, (found,) in zip(values, self.chunks(), strict=True):
            own.copy_(found)
        return values


def stack_experts(
    tensors: dict[str, Stored], path: str, inputs: Sequence[str], output: str
) -> dict[str, Stored | Stacked]:
    """Combine the matrices of single experts into the tensors that the model has: two a block.

    Args:
        tensors: stored tensors by name.
        path: path of the experts in a block, such as `mlp.experts`.
        inputs: names of an expert's input projections, which the model concatenates.
        output: name of its output projection.
    """
    kinds = dict.fromkeys(inputs, "gate_up_proj") | {output: "down_proj"}
    pattern = re.compile(rf"(.*\.{re.escape(path)})\.(\d+)\.({'|'.join(map(re.escape, kinds))})\.weight")
    found: dict[str, Stored | Stacked] = {}
    experts: dict[str, dict[int, dict[str, tuple[str, Stored]]]] = {}
    for name, each in tensors.items():
        if match := pattern.fullmatch(name):
            block, expert, part = match.groups()
            stack = f"{block}.{kinds[part]}"
            found[stack] = each  # in its place
            experts.setdefault(stack, {}).setdefault(int(expert), {})[part] = name, each
        else:
            found[name] = each
    for stack, parts in experts.items():
        order = [each for each in (*inputs, output) if stack.endswith(f".{kinds[each]}")]
        found[stack] = Stacked(
            [dict(parts[expert][each] for each in order if each in parts[expert]) for expert in sorted(parts)]
        )
    return found


def stored_tensors(files: Iterable[Path]) -> dict[str, Stored]:
    """List all tensors of safetensors files, by name, in the order of their bytes."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, facts in sorted(header.items(), key=lambda entry: entry[1]["data_offsets"][0]):
            start = 8 + length + facts["data_offsets"][0]
            found[name] = Stored(path, facts["dtype"], tuple(facts["shape"]), start)
    return found


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: its shape, and an iterator over its rows."""

    kind: str
    shape: tuple[int, ...]
    rows: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        """Return the size in bytes."""
        return prod(self.shape) * DTYPES[self.kind].itemsize


def write_shard(path: Path, pieces: dict[str, Piece]) -> None:
    """Write a safetensors file with at most one chunk of one tensor in memory."""
    order = sorted(pieces, key=lambda name: (-DTYPES[pieces[name].kind].itemsize, name))  # so that all are aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + pieces[name].bytes
        header[name] = {"dtype": pieces[name].kind, "shape": pieces[name].shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for rows in pieces[name].rows():
                _pour(file, rows)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _fill(file: FileIO, tensor: Tensor) -> None:
    """Fill a tensor with the next bytes of a file."""
    left = bytes_of(tensor)
    while left:
        count = file.readinto(left)
        if count == 0:
            raise RunError(f"{file.name} ends too early: it was changed since the run began; copy the checkpoint again")
        left = left[count:]


def _pour(file: FileIO, tensor: Tensor) -> None:
    """Write all bytes of a tensor."""
    left = bytes_of(tensor.contiguous())
    while left:
        left = left[file.write(left) :]
