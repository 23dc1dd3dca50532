"""Calibration data: from text, JSON Lines, Parquet, the hub, Python's documentation or the model to token windows."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import torch
from datasets import load_dataset
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hifiprune.errors import UserError
from hifiprune.guards import check_seed
from hifiprune.output import local_path

SAMPLERS = ("auto", "documents", "stream")
TEXT_COLUMNS = ("text", "content", "document", "article", "passage")
SELF, PYTHON_DOCS = "self", "python-docs"
Row = dict[str, object]
HUB_DOCUMENTS = 20_000  # documents read from a hub data set at most, after shuffling its stream
GENERATED_TOGETHER = 16  # sequences sampled from the model at a time


@dataclass(frozen=True)
class Calibration:
    """Which text the model is shown, and how windows are drawn from it.

    Attributes:
        source: a `.jsonl` or `.parquet` file, any other file as plain text, a folder of `.txt` and those,
            `python-docs` (the language reference that
            ships inside Python), `self` (text sampled from the model) or a hub data set, `id[:config][:split]`.
        num_samples: number of windows.
        seq_len: tokens per window.
        seed: of the choice of documents and windows.
        sampler: `documents` draws one random window from each of `num_samples` random documents longer than `seq_len`
            (the papers' way), `stream` joins all documents by the end-of-text token, cuts windows and draws from these;
            `auto` is `stream` for a single document, else `documents`.
        text_column: column of the text in JSON Lines, Parquet and hub data, guessed if not given.
        mixed: further sources, and the share of the windows that each gets; `source` gets the rest.

    Raises:
        UserError: a value is out of range.
    """

    source: str
    num_samples: int = 128
    seq_len: int = 1024
    seed: int = 0
    sampler: str = "auto"
    text_column: str | None = None
    mixed: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise UserError(f"num-samples {self.num_samples} must be at least 1")
        if self.seq_len < 2:
            raise UserError(f"seq-len {self.seq_len} must be at least 2")
        if self.sampler not in SAMPLERS:
            raise UserError(f"sampler '{self.sampler}' is not known; known are {', '.join(SAMPLERS)}")
        check_seed(self.seed)
        if self.mixed and SELF in (self.source, *(source for source, _ in self.mixed)):
            raise UserError(f"'{SELF}' cannot be mixed with other sources")
        for source, share in self.mixed:
            if not 0 < share < 1:
                raise UserError(f"the share {share:g} of {source} must lie in (0, 1)")
        least = min(self._counts)
        if least < 1:
            raise UserError(
                f"num-samples {self.num_samples} leaves a source without a window; use more or larger shares"
            )

    @property
    def _counts(self) -> list[int]:
        """Windows of each source."""
        further = [round(share * self.num_samples) for _, share in self.mixed]
        return [self.num_samples - sum(further), *further]

    @property
    def parts(self) -> list["Calibration"]:
        """The same for each source by itself, with its number of windows."""
        sources = [self.source, *(source for source, _ in self.mixed)]
        return [
            replace(self, source=source, num_samples=count, mixed=())
            for source, count in zip(sources, self._counts, strict=True)
        ]


def check_source(source: str, seq_len: int, longest: int | None) -> None:
    """Fail early: check a source's path and that its windows fit the model's `longest` sequence.

    Raises:
        UserError: a local source does not exist, or windows are too long for the model.
    """
    if longest is not None and seq_len > longest:
        raise UserError(f"seq-len {seq_len} exceeds the model's {longest} positions; use --seq-len {longest}")
    path = local_path(source)
    if (path.suffix.lower() in READERS or source.startswith((".", "/", "~"))) and not path.exists():
        raise UserError(f"text {source} does not exist")


def load_windows(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "windows positions"]:
    """Draw token windows from any source but `self`; the same arguments give the same windows.

    Raises:
        UserError: the source cannot be read, or has too little text.
    """
    if calibration.mixed:
        windows = torch.cat([load_windows(part, tokenizer) for part in calibration.parts])
        return windows[torch.tensor(random.Random(calibration.seed).sample(range(len(windows)), len(windows)))]
    documents = read_documents(calibration.source, calibration.text_column, calibration.seed)
    sampler = calibration.sampler
    if sampler == "auto":
        sampler = "stream" if len(documents) == 1 else "documents"
    draw = draw_documents if sampler == "documents" else draw_stream
    return draw(documents, tokenizer, calibration)


def draw_documents(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, calibration: Calibration
) -> Int[Tensor, "windows positions"]:
    """One random window from each of `num_samples` random documents that are longer than a window."""
    chance, length = random.Random(calibration.seed), calibration.seq_len
    windows = []
    for document in chance.sample(documents, len(documents)):
        if len(document.encode()) + 2 < length:  # a token is a byte at least, but for a start and an end
            continue
        tokens = encode(tokenizer, document)
        if len(tokens) > length:
            start = chance.randrange(len(tokens) - length + 1)
            windows.append(tokens[start : start + length])
        if len(windows) == calibration.num_samples:
            return torch.tensor(windows)
    joined = len(join_documents(documents, tokenizer)) // length
    raise _too_little(calibration, len(windows), "documents", joined)


def draw_stream(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, calibration: Calibration
) -> Int[Tensor, "windows positions"]:
    """`num_samples` random windows of the documents joined into one stream, without overlap."""
    stream = join_documents(documents, tokenizer)
    if len(stream) < calibration.seq_len:
        asked = f"no window of {calibration.seq_len}"
        raise UserError(
            f"too little text in {calibration.source}: its {len(stream)} tokens make {asked}; use more text"
        )
    windows = cut_windows(stream, calibration.seq_len)
    if len(windows) < calibration.num_samples:
        raise _too_little(calibration, len(windows), "stream")
    chosen = random.Random(calibration.seed).sample(range(len(windows)), calibration.num_samples)
    return windows[torch.tensor(chosen)]


def join_documents(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "tokens"]:
    """All documents as one stream of tokens, with the end-of-text token between them."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for document in documents:
        stream += separator if stream else []
        stream += encode(tokenizer, document)
    return torch.tensor(stream, dtype=torch.int64)


def cut_windows(stream: Int[Tensor, "tokens"], length: int) -> Int[Tensor, "windows positions"]:
    """Consecutive windows without overlap; a last incomplete one is left out."""
    count = len(stream) // length
    return stream[: count * length].view(count, length)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of one text as the tokenizer makes them, without its warning about long texts."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


@torch.no_grad()
def sample_windows(
    model: PreTrainedModel,
    calibration: Calibration,
    track: Callable[[Iterable[int]], Iterable[int]] = lambda steps: steps,
) -> Int[Tensor, "windows positions"]:
    """Sample windows from the model's own distribution, at temperature 1 from its start token, with the KV cache.

    Entropy pruning needs no labels and no teacher; with this it needs no data either.

    Raises:
        UserError: the model names no start or end token to begin with.
    """
    config = model.config.get_text_config()
    ends = config.eos_token_id
    start = config.bos_token_id if config.bos_token_id is not None else ends[0] if isinstance(ends, list) else ends
    if start is None:
        raise UserError("the model names no start or end token to sample text from; give a text as --calibration")
    generator = torch.Generator(model.device).manual_seed(calibration.seed)
    windows = list(torch.full((calibration.num_samples, 1), start, device=model.device).split(GENERATED_TOGETHER))
    steps = calibration.seq_len - 1
    cache = None
    for step in track(range(len(windows) * steps)):
        group = step // steps
        cache = None if step % steps == 0 else cache
        output = model(input_ids=windows[group][:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        likely = output.logits[:, -1].float().softmax(-1)
        windows[group] = torch.cat((windows[group], torch.multinomial(likely, 1, generator=generator)), 1)
    return torch.cat(windows).cpu()


def read_documents(source: str, text_column: str | None = None, seed: int = 0) -> list[str]:
    """The documents of a source: one for a text file, one a row for the others; blank ones are left out.

    Raises:
        UserError: the source does not exist, cannot be read, or holds no text.
    """
    path = local_path(source)
    if source == SELF:
        raise UserError(
            f"'{SELF}' is text for calibration only, sampled from the model; give a file, folder or data set"
        )
    if source == PYTHON_DOCS:
        documents = python_docs()
    elif path.is_dir():
        files = text_files(path)
        if not files:
            raise UserError(f"the folder {source} holds no {', '.join(READERS)} files")
        documents = [text for file in files for text in READERS[file.suffix.lower()](file, text_column)]
    elif path.is_file():
        documents = list(READERS.get(path.suffix.lower(), _read_text)(path, text_column))
    else:
        documents = list(_read_hub(source, text_column, seed))
    documents = [document for document in documents if document.strip()]
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


def _read_text(path: Path, column: str | None = None) -> Iterator[str]:
    if path.suffix.lower() == ".json":
        raise UserError(f"{path}: JSON is read a line at a time; convert it to JSON Lines and name it .jsonl")
    try:
        data = path.read_bytes()
        if b"\0" in data:
            raise UserError(f"{path} is binary, not text (a zero byte at {data.index(0)})")
        yield data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        bad = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise UserError(f"{path} is not UTF-8 ({bad}); convert it first") from error


def _read_jsonl(path: Path, column: str | None) -> Iterator[str]:
    return _texts(_json_rows(path), column, str(path))


def _json_rows(path: Path) -> Iterator[Row]:
    (text,) = _read_text(path)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: broken JSON ({error.msg} at character {error.pos})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a JSON object is needed, not {type(row).__name__}")
        yield row


def _read_parquet(path: Path, column: str | None) -> Iterator[str]:
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        yield from _texts((row for batch in batches for row in batch.to_pylist()), column, str(path))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error})") from error


READERS = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _read_hub(source: str, column: str | None, seed: int) -> Iterator[str]:
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise UserError(f"'{source}' names no file here, and a hub data set is written id[:config][:split]")
    config = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else "train"
    try:
        rows = load_dataset(name, config, split=split, streaming=True).shuffle(seed=seed)
        yield from _texts(rows.take(HUB_DOCUMENTS), column, source)
    except UserError:
        raise
    except Exception as error:  # the hub client raises errors of many libraries
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"there is no file {source} here, and the data hub could not give it: {first}") from error


def _texts(rows: Iterable[Row], column: str | None, where: str) -> Iterator[str]:
    """The text of every row, from the column named or else guessed at the first row; empty cells are passed over."""
    for row in rows:
        column = column or _guess_column(row)
        if column not in row or not isinstance(row[column], str | None):
            wanted = f"'{column}'" if column else f"called {', '.join(TEXT_COLUMNS)}"
            columns = ", ".join(row)
            raise UserError(f"{where}: no text column {wanted}; the columns are {columns}; name one with --text-column")
        yield str(row[column] or "")


def _guess_column(row: Row) -> str | None:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    return next((name for name in TEXT_COLUMNS if name in row), strings[0] if len(strings) == 1 else None)


def _too_little(calibration: Calibration, possible: int, sampler: str, streamed: int = 0) -> UserError:
    remedies = [f"--num-samples {possible}"] if possible else []
    if streamed > possible:
        remedies.append(f"--sampler stream (gives {streamed})")
    remedies.append(f"a --seq-len below {calibration.seq_len}")
    asked = f"{calibration.num_samples} windows of {calibration.seq_len} tokens asked for"
    return UserError(
        f"too little text in {calibration.source}: {asked}, {possible} possible with the sampler '{sampler}'; "
        f"use {', '.join(remedies)}, or more text"
    )
