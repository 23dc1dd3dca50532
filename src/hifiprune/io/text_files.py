"""Text files of any length: plain or compressed ones, pipes and standard input, read in pieces."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path

STDIN = "-"
PIECE = 1 << 18
"""Bytes that are read at a time, and characters that are tokenized at a time."""
LONGEST_ROW = 64 << 20
"""Characters of the longest row that is read: rows are parsed as a whole."""


def _zstd(path: Path) -> io.BufferedReader:
    import pyarrow as pa  # some hundred megabytes with what it brings, which few runs need

    decompressed: Any = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    return io.BufferedReader(decompressed)


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}


def is_pipe(source: str) -> bool:
    """Return whether a source can be read only once: standard input, a FIFO or another device."""
    path = local_path(source)
    return source == STDIN or (path.exists() and not path.is_file() and not path.is_dir())


def format_suffix(path: Path) -> str:
    """Return the suffix that tells the format, in small letters: `.jsonl` of `a.jsonl` and of `a.jsonl.gz`."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return inner.suffix.lower()


def read_pieces(path: Path) -> Iterator[str]:
    """Yield the text of a file in pieces of about `PIECE` characters.

    Raises:
        UserError: it cannot be read, is binary, or is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    position = 0
    with _opened(path) as file:
        for data in iter(lambda: file.read(PIECE), b""):
            if b"\0" in data:
                zero = position + data.index(0)
                raise UserError(
                    f"{path} is binary, not text (a zero byte at {zero}); unpack it, or convert it to .txt, .jsonl, "
                    ".csv or .parquet"
                )
            yield _decoded(path, decoder, data, position)
            position += len(data)
    _decoded(path, decoder, b"", position)


def lines_of(where: str | Path, pieces: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a text that is given in pieces, without their line feeds.

    Raises:
        UserError: a line is longer than `LONGEST_ROW`.
    """
    number, begun, length = 1, [""], 0  # the pieces of the line that has not ended yet
    for piece in pieces:
        first, *others = piece.split("\n")
        begun.append(first)
        length += len(first)
        if others:
            yield "".join(begun)
            yield from others[:-1]
            number += len(others)
            begun, length = [others[-1]], len(others[-1])
        if length > LONGEST_ROW:
            raise UserError(
                f"{where}, line {number} is longer than {LONGEST_ROW >> 20} million characters: cut it into several "
                "rows, or give it as a .txt file, whose text may have any length"
            )
    yield "".join(begun)


def _decoded(path: Path, decoder: codecs.IncrementalDecoder, data: bytes, position: int) -> str:
    """Decode the data at a position of a file; no data means that the file ends."""
    start = position - len(decoder.getstate()[0])
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        bad = f"byte 0x{error.object[error.start]:02x} at {start + error.start}"
        raise UserError(f"{path} is not UTF-8 ({bad}); convert it first") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read its bytes, decompressed, and turn what goes wrong meanwhile into one message."""
    try:
        if str(path) == STDIN and os.isatty(0):
            raise UserError(f"'{STDIN}' is standard input, which is a terminal here: pipe a text into it")
        if str(path) == STDIN:
            with open(0, "rb", closefd=False) as file:
                yield file
        else:
            decompress = COMPRESSIONS.get(path.suffix.lower())
            with decompress(path) if decompress else path.open("rb") as file:
                yield file
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} is not a whole {path.suffix} file ({error}); get it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
