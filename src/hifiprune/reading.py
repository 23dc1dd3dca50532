"""Reading text, and rows of data, from files, folders and the hub."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from hifiprune.errors import UserError
from hifiprune.output import local_path

TEXT_COLUMNS = ("text", "content", "document", "article", "passage")
SELF, PYTHON_DOCS = "self", "python-docs"
HUB_ROWS = 20_000
"""Rows read from a hub data set for text at most, after shuffling its stream."""
Row = dict[str, object]


@dataclass(frozen=True)
class Part:
    """A file or data set.

    Attributes:
        where: its name, for messages.
        rows: what it holds; of a plain text one row with the column `text`.
        plain: whether it is a plain text.
    """

    where: str
    rows: Iterable[Row]
    plain: bool = False


def read_parts(source: str, seed: int = 0, hub_rows: int | None = HUB_ROWS) -> Iterator[Part]:
    """Every file of a source, or its data set, read as it is iterated over.

    Args:
        source: file, folder, `python-docs`, or hub data set `id[:config][:split]`.
        seed: of the order in which a hub data set is read.
        hub_rows: how many of its rows at most.

    Raises:
        UserError: the source does not exist or cannot be read.
    """
    path = local_path(source)
    if source == SELF:
        raise UserError(
            f"'{SELF}' is text for calibration only, sampled from the model; give a file, folder or data set"
        )
    if source == PYTHON_DOCS:
        yield Part(source, [{"text": text} for text in python_docs()], plain=True)
    elif path.is_dir():
        files = text_files(path)
        if not files:
            raise UserError(f"the folder {source} holds no {', '.join(READERS)} files")
        yield from map(_read_file, files)
    elif path.is_file():
        yield _read_file(path)
    else:
        yield Part(source, _hub_rows(source, seed, hub_rows))


def read_documents(source: str, text_column: str | None = None, seed: int = 0) -> list[str]:
    """The documents of a source: one for a text file, one a row for the others; blank ones are left out.

    Raises:
        UserError: the source does not exist, cannot be read, or holds no text.
    """
    parts = read_parts(source, seed)
    texts = (text for part in parts for text in _texts(part, None if part.plain else text_column))
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise UserError(f"{source} is empty: it holds no text")
    return documents


def text_files(folder: Path) -> list[Path]:
    """The files of a folder that are read as text, those of its folders too."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in READERS)


def python_docs() -> list[str]:
    """The language reference that ships inside CPython, a document a topic in alphabetical order (PSF licence)."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _read_file(path: Path) -> Part:
    suffix = path.suffix.lower()
    return Part(str(path), READERS.get(suffix, _text_rows)(path), plain=suffix not in (".jsonl", ".parquet"))


def _text_rows(path: Path) -> Iterator[Row]:
    yield {"text": _read_text(path)}


def _read_text(path: Path) -> str:
    if path.suffix.lower() == ".json":
        raise UserError(f"{path}: JSON is read a line at a time; convert it to JSON Lines and name it .jsonl")
    try:
        data = path.read_bytes()
        if b"\0" in data:
            raise UserError(f"{path} is binary, not text (a zero byte at {data.index(0)})")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        bad = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise UserError(f"{path} is not UTF-8 ({bad}); convert it first") from error


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: broken JSON ({error.msg} at character {error.pos})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a JSON object is needed, not {type(row).__name__}")
        yield row


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa  # some hundred megabytes with what it brings, which few runs need
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error})") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _text_rows,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}


def _hub_rows(source: str, seed: int, most: int | None) -> Iterator[Row]:
    from datasets import load_dataset  # likewise

    name, *rest = source.split(":")
    if len(rest) > 2:
        raise UserError(f"'{source}' names no file here, and a hub data set is written id[:config][:split]")
    config = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else "train"
    try:
        rows = load_dataset(name, config, split=split, streaming=True, trust_remote_code=False)
        yield from islice(rows.shuffle(seed=seed), most)
    except Exception as error:  # the hub client raises errors of many libraries
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"there is no file {source} here, and the data hub could not give it: {first}") from error


def _texts(part: Part, column: str | None) -> Iterator[str]:
    """The text of every row, from the column named or else guessed at the first row; empty cells are passed over."""
    for row in part.rows:
        column = column or _guess_column(row)
        if column not in row or not isinstance(row[column], str | None):
            wanted = f"'{column}'" if column else f"called {', '.join(TEXT_COLUMNS)}"
            columns = ", ".join(row)
            raise UserError(
                f"{part.where}: no text column {wanted}; the columns are {columns}; name one with --text-column"
            )
        yield str(row[column] or "")


def _guess_column(row: Row) -> str | None:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    return next((name for name in TEXT_COLUMNS if name in row), strings[0] if len(strings) == 1 else None)
