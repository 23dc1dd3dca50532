"""Spill tensors to disk, into an unnamed file that disappears however the process ends."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from hifiprune.errors import RunError, UserError
from hifiprune.io.atomic import local_path
from hifiprune.io.safetensors_stream import bytes_of

PAGE = 2**18
"""Bytes of a page of the scratch file; a tensor takes whole pages, wherever they are free."""
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
        self._pages = 0
        self._unused: list[int] = []

    def keep(self, tensor: Tensor) -> Spilled:
        """Write a tensor to the file; return what reads it back with its dtype, to its device.

        Raises:
            RunError: the disk is full.
        """
        return _SpilledTensor(self, tensor)

    def write(self, tensor: Tensor) -> list[int]:
        """Write the bytes of a tensor; return the pages that hold them."""
        values = bytes_of(tensor.to("cpu").contiguous())
        pages = self._take(-(-len(values) // PAGE))
        try:
            for part, offset in _parts(values, pages):
                left, place = part, offset
                while left:
                    count = os.pwrite(self._file.fileno(), left, place)
                    left, place = left[count:], place + count
        except OSError as error:
            raise RunError(
                f"what is set aside in {self.folder} could not be written after {self._pages * PAGE / 1e9:.2f} GB: "
                f"{error.strerror}; free some space there or choose another --scratch"
            ) from error
        return pages

    def read(self, pages: list[int], tensor: Tensor) -> None:
        """Fill a tensor with the bytes in pages.

        Raises:
            RunError: the disk does not give them back.
        """
        try:
            for part, offset in _parts(bytes_of(tensor), pages):
                left, place = part, offset
                while left:
                    count = os.preadv(self._file.fileno(), [left], place)
                    if count == 0:
                        raise OSError(0, "the file ends too early")
                    left, place = left[count:], place + count
        except OSError as error:
            raise RunError(f"what was set aside in {self.folder} cannot be read: {error.strerror}") from error

    def release(self, pages: list[int]) -> None:
        """Release pages for reuse."""
        self._unused += reversed(pages)

    def _take(self, count: int) -> list[int]:
        """Return released pages, and new ones at the end of the file where these are too few."""
        pages = [self._unused.pop() for _ in range(min(count, len(self._unused)))]
        added = range(self._pages, self._pages + count - len(pages))
        self._pages = added.stop
        return [*pages, *added]


class _SpilledTensor:
    """A tensor in the file, released when this object is."""

    def __init__(self, scratch: Scratch, tensor: Tensor):
        self._scratch, self._shape, self._dtype, self._device = scratch, tensor.shape, tensor.dtype, tensor.device
        self._pages = scratch.write(tensor)

    def __call__(self) -> Tensor:
        values = torch.empty(self._shape, dtype=self._dtype)
        self._scratch.read(self._pages, values)
        return values.to(self._device)

    def __del__(self) -> None:
        if hasattr(self, "_pages"):  # not if writing failed
            self._scratch.release(self._pages)


def _parts(values: memoryview, pages: list[int]) -> Iterator[tuple[memoryview, int]]:
    """Yield the part of the bytes that each page holds, and the page's offset."""
    for number, page in enumerate(pages):
        yield values[number * PAGE : (number + 1) * PAGE], page * PAGE


def spill(scratch: Scratch | None, tensor: Tensor) -> Spilled:
    """Spill a tensor to disk if there is a scratch file, else keep it in memory."""
    return scratch.keep(tensor) if scratch else lambda: tensor
