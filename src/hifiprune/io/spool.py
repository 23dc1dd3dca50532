"""Documents and token ids in unnamed temporary files, so that the memory they take does not grow with the text."""

import codecs
import errno
import math
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hifiprune.errors import RunError
from hifiprune.io.text_files import PIECE

IN_MEMORY = 64 << 20
"""Bytes that are kept in memory before they go to a file."""


class Documents:
    """Documents that can be read in any order, each in pieces, as often as needed."""

    def __init__(self, documents: Iterable[Iterable[str]] = ()):
        self._file: Any = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 - closed with this object
        self._ends = array("q", [0])
        with _space_explained():
            for pieces in documents:
                for piece in pieces:
                    self._file.write(piece.encode())
                self._ends.append(self._file.tell())

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[Iterator[str]]:
        """Yield every document in pieces."""
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Iterator[str]:
        """Yield a document in pieces of about `PIECE` bytes."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        place, end = self._ends[number], self._ends[number + 1]
        while place < end:
            self._file.seek(place)
            data = self._file.read(min(PIECE, end - place))
            place += len(data)
            yield decoder.decode(data)

    def bytes_of(self, number: int) -> int:
        """Return the size of a document in UTF-8."""
        return self._ends[number + 1] - self._ends[number]


def stored_tokens(batches: Iterable[list[int]], most: int | None = None) -> Int[Tensor, "tokens"]:
    """Join token ids, up to `most` of them, into one tensor, which lies in an unnamed temporary file once it is large.

    Same as `torch.tensor([*chain(*batches)][:most])`, without holding all of it in memory.
    """
    recent, file, left = array("q"), None, math.inf if most is None else most
    with _space_explained():
        for batch in batches:
            recent.extend(batch if len(batch) < left else batch[: int(left)])
            left -= len(batch)
            if left <= 0:
                break
            if len(recent) * recent.itemsize > IN_MEMORY:
                file = file or tempfile.TemporaryFile()  # noqa: SIM115 - the tensor's memory map keeps it open
                recent.tofile(file)
                recent = array("q")
        if file is None:
            return torch.from_numpy(np.array(recent))
        recent.tofile(file)
        file.flush()
    mapped = np.memmap(file, np.int64, mode="c")  # whoever writes to it has a copy of that page
    file.close()
    return torch.from_numpy(mapped)


@contextmanager
def _space_explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise RunError(
            f"the disk is full: a text is kept in {tempfile.gettempdir()} while it is tokenized; free some space, or "
            "set TMPDIR to a folder with more"
        ) from error
