"""Spill tensors to disk, into an unnamed file that disappears however the process ends."""

import os
import tempfile
from bisect import bisect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hifiprune.errors import RunError, UserError
from hifiprune.io.atomic import local_path
from hifiprune.io.safetensors_stream import bytes_of

Spilled = Callable[[], Tensor]
"""Returns a spilled tensor, as often as it is called."""


class Scratch:
    """An unnamed file that holds spilled tensors; space is reused once a tensor is released.

    Attributes:
        folder: folder on the disk to use.

    Raises:
        UserError: no file can be made there.
    """

    def __init__(self, folder: str | Path):
        self.folder = local_path(folder)
        try:
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"scratch folder {folder} cannot be used: {error.strerror}") from error
        self._end = 0
        self._unused: list[tuple[int, int]] = []
        """Start and length of each gap, in order; adjacent gaps are merged."""

    def keep(self, tensor: Tensor) -> Spilled:
        """Write a tensor to the file; return what reads it back with its dtype, to its device.

        Raises:
            RunError: the disk is full.
        """
        return _SpilledTensor(self, tensor)

    def write(self, tensor: Tensor) -> int:
        """Write the bytes of a tensor; return their offset."""
        left = bytes_of(tensor.to("cpu").contiguous())
        place = start = self._room(len(left))
        try:
            while left:
                count = os.pwrite(self._file.fileno(), left, place)
                left, place = left[count:], place + count
        except OSError as error:
            raise RunError(
                f"what is set aside in {self.folder} could not be written after {self._end / 1e9:.2f} GB: "
                f"{error.strerror}; free some space there or choose another --scratch"
            ) from error
        return start

    def read(self, start: int, tensor: Tensor) -> None:
        """Fill a tensor with the bytes from offset `start` on.

        Raises:
            RunError: the disk does not give them back.
        """
        left = bytes_of(tensor)
        try:
            while left:
                count = os.preadv(self._file.fileno(), [left], start)
                if count == 0:
                    raise OSError(0, "the file ends too early")
                left, start = left[count:], start + count
        except OSError as error:
            raise RunError(f"what was set aside in {self.folder} cannot be read: {error.strerror}") from error

    def _room(self, size: int) -> int:
        """Return the offset of the first gap of at least `size` bytes, or of new space at the end."""
        for number, (start, length) in enumerate(self._unused):
            if length >= size:
                self._unused[number : number + 1] = [(start + size, length - size)] if length > size else []
                return start
        self._end += size
        return self._end - size

    def forget(self, start: int, size: int) -> None:
        """Release `size` bytes at offset `start` for reuse."""
        place = bisect(self._unused, (start, size))
        if place and sum(self._unused[place - 1]) == start:  # right after another unused room
            place -= 1
            before, length = self._unused.pop(place)
            start, size = before, length + size
        if place < len(self._unused) and self._unused[place][0] == start + size:
            size += self._unused.pop(place)[1]
        if size:
            self._unused.insert(place, (start, size))


class _SpilledTensor:
    """A tensor in the file, released when this object is."""

    def __init__(self, scratch: Scratch, tensor: Tensor):
        self._scratch, self._shape, self._dtype, self._device = scratch, tensor.shape, tensor.dtype, tensor.device
        self._size = tensor.numel() * tensor.element_size()
        self._start = scratch.write(tensor)

    def __call__(self) -> Tensor:
        values = torch.empty(self._shape, dtype=self._dtype)
        self._scratch.read(self._start, values)
        return values.to(self._device)

    def __del__(self) -> None:
        if hasattr(self, "_start"):  # not if writing failed
            self._scratch.forget(self._start, self._size)


def spill(scratch: Scratch | None, tensor: Tensor) -> Spilled:
    """Spill a tensor to disk if there is a scratch file, else keep it in memory."""
    return scratch.keep(tensor) if scratch else lambda: tensor
