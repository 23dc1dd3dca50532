"""Tensors set aside on the disk, in a file without a name: it is gone whatever ends the process."""

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

Kept = Callable[[], Tensor]
"""Gives a tensor that was set aside, as often as it is asked."""


class Scratch:
    """A file in a folder, whose room is used again once what lay there is forgotten.

    Attributes:
        folder: on the disk that takes it.

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
        """Where unused room before the end begins, and how much it is, in order; never two rooms side by side."""

    def keep(self, tensor: Tensor) -> Kept:
        """Set a tensor aside; what is given back has its dtype and lies on its device.

        Raises:
            RunError: the disk is full.
        """
        return _Aside(self, tensor)

    def write(self, tensor: Tensor) -> int:
        """Where the bytes of a tensor are from now on."""
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
        """Fill a tensor with bytes from there on.

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
        """The first unused room that is large enough, or more at the end."""
        for number, (start, length) in enumerate(self._unused):
            if length >= size:
                self._unused[number : number + 1] = [(start + size, length - size)] if length > size else []
                return start
        self._end += size
        return self._end - size

    def forget(self, start: int, size: int) -> None:
        """Its room may be used again."""
        place = bisect(self._unused, (start, size))
        if place and sum(self._unused[place - 1]) == start:  # right after another unused room
            place -= 1
            before, length = self._unused.pop(place)
            start, size = before, length + size
        if place < len(self._unused) and self._unused[place][0] == start + size:
            size += self._unused.pop(place)[1]
        if size:
            self._unused.insert(place, (start, size))


class _Aside:
    """A tensor in the file, for as long as somebody has this."""

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


def set_aside(scratch: Scratch | None, tensor: Tensor) -> Kept:
    """Keep a tensor on the disk if there is a place for it there, else as it is."""
    return scratch.keep(tensor) if scratch else lambda: tensor
