"""Read text and data rows from files, folders, pipes and the hub, in memory independent of their size."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from hifiprune.errors import UserError
from hifiprune.io.atomic import local_path
from hifiprune.io.text_files import COMPRESSIONS, LONGEST_ROW, PIECE, format_suffix, is_pipe, lines_of, read_pieces

TEXT_COLUMNS = ("text", "content", "document", "article", "passage")
SELF, PYTHON_DOCS = "self", "python-docs"
HUB_SECONDS = 10
"""Seconds in which the hub must answer, before its clients try again and again."""
SPLITS = "train|test|valid|dev|eval"
"""What names of splits begin with: any other single name after that of a hub data set is a config."""
HUB_ROWS = 20_000
"""Rows read from a hub data set for text at most, after shuffling its stream."""
PARQUET_ROWS = 256
"""Rows of a Parquet file that are read at a time."""
BLANK_PIECES = 256
"""Pieces of blanks that a text may begin with."""
Row = dict[str, object]


@dataclass(frozen=True)
class Part:
    """A file or data set.

    Attributes:
        where: its name, for messages.
        rows: rows of a file or data set with columns.
        text: a plain text, in pieces, which has no rows; read once.
    """

    where: str
    rows: Iterable[Row] = ()
    text: Iterator[str] | None = None


def read_parts(source: str, seed: int = 0, hub_rows: int | None = HUB_ROWS) -> Iterator[Part]:
    """Yield every file of a source, or its data set; each is read lazily.

    Args:
        source: file, folder, pipe, `-` for standard input, `python-docs`, or hub data set `id[:config][:split]`.
        seed: of the order in which a hub data set is read.
        hub_rows: how many of its rows at most.

    Raises:
        UserError: the source does not exist or cannot be read.
    """
    path = local_path(source)
    check_there(source)
    if source == SELF:
        raise UserError(
            f"'{SELF}' is text for calibration only, sampled from the model; give a file, folder or data set"
        )
    if source == PYTHON_DOCS:
        yield from (Part(source, text=iter([text])) for text in python_docs())
    elif path.is_dir():
        files = text_files(path)
        if not files:
            raise UserError(f"the folder {source} holds no {', '.join(READERS)} files")
        yield from map(_read_file, files)
    elif path.is_file() or is_pipe(source):
        yield _read_file(path)
    else:
        yield Part(source, _hub_rows(source, seed, hub_rows))


def read_documents(source: str, text_column: str | None = None, seed: int = 0) -> Iterator[Iterator[str]]:
    """Yield the documents of a source in pieces: a text file, or a row of the others; blank ones are left out.

    The pieces of a document must be read before the next one.

    Raises:
        UserError: the source does not exist, cannot be read, or holds no text.
    """
    count = 0
    for part in read_parts(source, seed):
        rows = (iter([text]) for text in _texts(part, text_column))
        for pieces in rows if part.text is None else [part.text]:
            if document := _unless_blank(part.where, pieces):
                count += 1
                yield document
    if count == 0:
        raise UserError(f"{source} is empty: it holds no text")


def check_named(source: str) -> None:
    """Refuse an empty name, which would stand for the current folder.

    Raises:
        UserError: it is empty.
    """
    if not source.strip():
        raise UserError("the name of a text is empty: give a file, a folder or a data set")


def check_there(source: str) -> None:
    """Refuse a source that is no file here, and by its name none of the hub's data sets.

    Raises:
        UserError: it is one, or cannot be looked for.
    """
    check_named(source)
    path = local_path(source)
    try:
        if path.exists() or is_pipe(source):
            return
    except OSError as error:  # no permission, or a name that is too long
        raise UserError(f"text {source} cannot be read: {error.strerror}") from error
    if source.startswith((".", "/", "~")) or format_suffix(path) in READERS or path.suffix.lower() in COMPRESSIONS:
        raise UserError(f"text {source} does not exist")
    if re.fullmatch(r"\.[A-Za-z]{1,5}", path.suffix):
        raise UserError(
            f"text {source} does not exist; were it a data set of the hub, {source}:train would be its name"
        )


def text_files(folder: Path) -> list[Path]:
    """Return the files of a folder, recursively, that are read as text."""
    return sorted(file for file in folder.rglob("*") if format_suffix(file) in READERS and file.is_file())


def python_docs() -> list[str]:
    """Return the language reference that ships inside CPython, one document per topic, sorted (PSF licence)."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def check_text(text: str) -> str:
    """Return a text, unless it has half of a surrogate pair, which scraped JSON may hold and no tokenizer takes.

    Raises:
        UserError: it has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x} at character {error.start}"
        raise UserError(f"the text is not Unicode (half of a surrogate pair, {half}); repair or remove it") from error
    return text


def _read_file(path: Path) -> Part:
    reader = _json_rows if format_suffix(path) == ".json" else READERS.get(format_suffix(path))
    if reader:
        return Part(str(path), reader(path))
    pieces = read_pieces(path)
    if is_pipe(str(path)):
        first = next(pieces, "")
        pieces = chain([first], pieces)
        if _begins_with_object(first):
            return Part(str(path), _json_rows(path, pieces))
    return Part(str(path), text=pieces)


def _begins_with_object(text: str) -> bool:
    """Return whether the first line is a JSON object, as that of JSON Lines."""
    line = text.lstrip().partition("\n")[0]
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_rows(path: Path, pieces: Iterable[str] | None = None) -> Iterator[Row]:
    for number, line in enumerate(lines_of(path, pieces or read_pieces(path)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"broken JSON ({error.msg} at character {error.pos})"
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or very deep nesting
            problem = f"JSON that is not read ({error})"
        else:
            problem = "" if isinstance(row, dict) else f"a JSON object is needed, not {type(row).__name__}"
        if problem and format_suffix(path) == ".json":
            problem += "; JSON is read a line at a time: convert it to JSON Lines and name it .jsonl"
        if problem:
            raise UserError(f"{path}, line {number}: {problem}")
        yield row


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_ROW)
    lines = (f"{line}\n" for line in lines_of(path, read_pieces(path)))
    reader = csv.DictReader(lines, delimiter="\t" if format_suffix(path) == ".tsv" else ",")
    try:
        for row in reader:
            if None in row:
                raise UserError(f"{path}, line {reader.line_num}: more cells than the {len(row) - 1} columns")
            yield {**row}
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: broken CSV ({error})") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa  # some hundred megabytes with what it brings, which few runs need
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=PIECE, pre_buffer=False) as file:
            for batch in file.iter_batches(PARQUET_ROWS, use_threads=False):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error})") from error


READERS: dict[str, Callable[[Path], Iterator[Row]] | None] = {
    ".txt": None,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
}
"""Row reader by file suffix; text files have none."""


def _hub_rows(source: str, seed: int, most: int | None) -> Iterator[Row]:
    from datasets import load_dataset  # likewise
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    name, *rest = source.split(":")
    if len(rest) > 2:
        raise UserError(f"'{source}' names no file here, and a hub data set is written id[:config][:split]")
    named_split = rest and (len(rest) == 2 or re.match(SPLITS, rest[0]))
    split = rest.pop() if named_split else "train"
    config = rest[0] if rest else None
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # of a client that huggingface_hub chooses
        raise UserError(
            f"there is no file {source} here, and {constants.ENDPOINT} cannot be reached to look for a data set of "
            "that name; check the spelling and the network, or download it and give its file"
        ) from error
    try:
        rows = load_dataset(name, config, split=split, streaming=True, trust_remote_code=False)
        yield from islice(rows.shuffle(seed=seed), most)
    except Exception as error:  # the hub client raises errors of many libraries
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"there is no file {source} here, and the data hub could not give it: {first}") from error


def _texts(part: Part, column: str | None) -> Iterator[str]:
    """Yield the text of every row, from the named column or one guessed at the first row; empty cells are skipped."""
    for number, row in enumerate(part.rows, 1):
        column = column or _guess_column(row)
        text = row.get(column) if column else None
        if column not in row:
            wanted = f"'{column}'" if column else f"called {', '.join(TEXT_COLUMNS)}"
            raise UserError(
                f"{part.where}, row {number}: no text column {wanted}; the columns are {', '.join(row)}; name one with "
                "--text-column"
            )
        if not isinstance(text, str | None):
            raise UserError(
                f"{part.where}, row {number}: column '{column}' holds {type(text).__name__}, not text; name another "
                "with --text-column"
            )
        try:
            yield check_text(text or "")
        except UserError as error:
            raise UserError(f"{part.where}, row {number}: {error}") from error


def _guess_column(row: Row) -> str | None:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    return next((name for name in TEXT_COLUMNS if name in row), strings[0] if len(strings) == 1 else None)


def _unless_blank(where: str, pieces: Iterator[str]) -> Iterator[str] | None:
    """Yield the same pieces, unless all of them are blank."""
    blanks: list[str] = []
    for piece in pieces:
        blanks.append(piece)
        if piece.strip():
            return chain(blanks, pieces)
        if len(blanks) > BLANK_PIECES:
            raise UserError(f"{where} begins with more than {BLANK_PIECES * PIECE >> 20} MB of blanks: is it text?")
    return None
