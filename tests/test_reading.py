"""Long texts in pieces, compressed files, pipes and unreadable rows: the windows of the plain way, or a refusal."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import BatchEncoding, PreTrainedTokenizer, PreTrainedTokenizerFast

from hifiprune import Calibration, Text, UserError
from hifiprune.calibration import check_source, load_windows
from hifiprune.commands.trial import Pace, Trial
from hifiprune.evaluation.text import held_windows
from hifiprune.io.chat_templates import ChatTemplate, Piece
from hifiprune.io.spool import stored_tokens
from hifiprune.io.text_files import lines_of
from hifiprune.io.text_sources import python_docs, read_documents
from hifiprune.io.tokenization import encode_pieces
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.recovery.training_data import read_examples
from tests.commands import Result, refused, run
from tests.conftest import byte_tokenizer

PROSE = "\n\n".join(python_docs())[100_000:160_000]
STRANGE = "".join(
    random.Random(0).choices(
        ["a" * 200, " " * 150, "1234567890" * 9, "日本語テキスト", "\r\n" * 9, "é́ ", "word ", "👨‍👩‍👧", "don't "], k=700
    )
)
ROW = {"text": "some words that are long enough for a window or two " * 3}


def merging_tokenizer(*, split: bool) -> PreTrainedTokenizerFast:
    """A byte pair encoding as Llama's, of words or of the whole text, that begins and ends every text."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    inner.train_from_iterator(PROSE.splitlines(), trainer)
    inner.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


class Counted(PreTrainedTokenizer):
    """A sentencepiece tokenizer that tells of no characters, as slow tokenizers do not."""

    def __init__(self) -> None:
        model = io.BytesIO()
        how: dict[str, Any] = {"vocab_size": 500, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(PROSE.splitlines()), model_writer=model, **how)
        self.inner = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())

    def __call__(self, text: Any, *_: Any, add_special_tokens: bool = True, **how: Any) -> BatchEncoding:
        return BatchEncoding({"input_ids": [1] * add_special_tokens + self.inner.encode(text)})


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": byte_tokenizer,
    "words": lambda: merging_tokenizer(split=True),
    "whole": lambda: merging_tokenizer(split=False),
    "counted": Counted,
}


@contextmanager
def small_pieces(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces of thousands of characters, so that short texts have many."""
    with patch.context() as short:
        short.setattr("hifiprune.io.tokenization.PIECE", 3000)
        short.setattr("hifiprune.io.tokenization.OVERLAP", 500)
        short.setattr("hifiprune.io.text_files.PIECE", 1001)
        short.setattr("hifiprune.io.spool.PIECE", 1001)
        short.setattr("hifiprune.io.spool.IN_MEMORY", 5000)
        yield


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", [PROSE, STRANGE, "word " * 2000], ids=["prose", "strange", "words"])
def test_the_tokens_of_pieces_are_those_of_the_whole(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS[name]()
    with small_pieces(monkeypatch):
        batches = list(encode_pieces(tokenizer, (text[start : start + 700] for start in range(0, len(text), 700))))
    assert len(batches) > 3
    assert [token for batch in batches for token in batch] == tokenizer(text)["input_ids"]


def test_letters_without_a_space_are_tokenized_in_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("a" * 20_000, "0123456789" * 2000, " " * 20_000):
        tokenizer = TOKENIZERS["whole"]()
        with small_pieces(monkeypatch):
            tokens = [token for batch in encode_pieces(tokenizer, [text]) for token in batch]
        assert tokens == tokenizer(text)["input_ids"]


def test_an_overlap_that_is_too_short_is_made_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS["whole"]()
    with small_pieces(monkeypatch), monkeypatch.context() as short:
        short.setattr("hifiprune.io.tokenization.OVERLAP", 8)
        tokens = [token for batch in encode_pieces(tokenizer, [PROSE]) for token in batch]
    assert tokens == tokenizer(PROSE)["input_ids"]


def naive_windows(documents: list[str], calibration: Calibration, tokenizer: Any) -> torch.Tensor:
    """The windows by the definition: every text whole, every token in one list."""
    chance, length = random.Random(calibration.seed), calibration.seq_len
    windows = []
    if calibration.sampler == "stream" or (calibration.sampler == "auto" and len(documents) == 1):
        stream: list[int] = []
        for document in documents:
            stream += [tokenizer.eos_token_id] if stream else []
            stream += tokenizer(document)["input_ids"]
        all_windows = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
        return all_windows[torch.tensor(chance.sample(range(len(all_windows)), calibration.num_samples))]
    for document in chance.sample(documents, len(documents)):
        tokens = tokenizer(document)["input_ids"] if len(document.encode()) + 2 >= length else []
        if len(tokens) > length:
            start = chance.randrange(len(tokens) - length + 1)
            windows.append(tokens[start : start + length])
        if len(windows) == calibration.num_samples:
            break
    return torch.tensor(windows)


@pytest.mark.parametrize("sampler", ["auto", "documents", "stream"])
@pytest.mark.parametrize("kind", ["one.txt", "many.jsonl"])
@pytest.mark.parametrize("name", ["bytes", "words"])
def test_the_windows_are_those_of_the_plain_way(
    sampler: str, kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, path = TOKENIZERS[name](), tmp_path / kind
    documents = [PROSE] if kind == "one.txt" else [PROSE[:9000], " \n", "too short", *PROSE.split("\n\n")[:60], STRANGE]
    path.write_text(PROSE if kind == "one.txt" else "".join(json.dumps({"text": each}) + "\n" for each in documents))
    documents = [each for each in documents if each.strip()]
    for seed in (0, 5):
        calibration = Calibration(
            str(path), 1 if (kind, sampler) == ("one.txt", "documents") else 7, 61, seed, sampler, bos=False
        )
        expected = naive_windows(documents, calibration, tokenizer)
        assert torch.equal(load_windows(calibration, tokenizer), expected)
        with small_pieces(monkeypatch):
            assert torch.equal(load_windows(calibration, tokenizer), expected)


def test_a_held_out_text_is_read_as_far_as_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tokenizer = tmp_path / "long.txt", byte_tokenizer()
    path.write_bytes(PROSE.encode() + b"\xff")  # whoever reads to the end finds that it is no UTF-8
    expected = torch.tensor(tokenizer(PROSE)["input_ids"][: 5 * 100]).view(5, 100)
    with small_pieces(monkeypatch):
        assert torch.equal(held_windows(Text(str(path), 100, 5), tokenizer), expected)
        with pytest.raises(UserError, match=f"is not UTF-8 .byte 0xff at {len(PROSE.encode())}"):
            held_windows(Text(str(path), 100), tokenizer)


def test_many_tokens_lie_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [[*range(start, start + 1000)] for start in range(0, 50_000, 1000)]
    files: list[Any] = []
    opened = tempfile.TemporaryFile

    def open_told() -> Any:
        files.append(opened())
        return files[-1]

    monkeypatch.setattr("hifiprune.io.spool.tempfile.TemporaryFile", open_told)
    assert torch.equal(stored_tokens(batches), torch.arange(50_000))
    assert not files
    with small_pieces(monkeypatch):
        assert torch.equal(stored_tokens(batches), torch.arange(50_000))
        assert torch.equal(stored_tokens(batches, 1234), torch.arange(1234))
    assert len(files) == 2


def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, peaks = byte_tokenizer(), []
    for size in (1, 4):
        (tmp_path / "long.txt").write_text(PROSE * size)
        with small_pieces(monkeypatch):
            tracemalloc.start()
            load_windows(Calibration(str(tmp_path / "long.txt"), 3, 64), tokenizer)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < len(PROSE), "three times that came in addition, and 24 times that in token ids"


def compressed(kind: str, data: bytes) -> bytes:
    ways: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda data: bytes(pa.compress(data, codec="zstd", asbytes=True)),
    }
    return ways[kind](data)


ROWS = [{"id": str(number), "text": f'{ROW["text"]}, {number}\n"quoted"'} for number in range(5)]
KINDS: dict[str, bytes] = {
    "txt": "\n".join(row["text"] for row in ROWS).encode(),
    "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "json": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "csv": ("id,text\n" + "".join('{},"{}"\n'.format(r["id"], r["text"].replace('"', '""')) for r in ROWS)).encode(),
    "tsv": ("id\ttext\n" + "".join('{}\t"{}"\n'.format(r["id"], r["text"].replace('"', '""')) for r in ROWS)).encode(),
}


@pytest.mark.parametrize("packing", ["", "gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_read_as_it_is_and_compressed(kind: str, packing: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}{'.' * bool(packing)}{packing}"
    path.write_bytes(compressed(packing, KINDS[kind]))
    texts = ["".join(pieces) for pieces in read_documents(str(path))]
    assert texts == ([KINDS["txt"].decode()] if kind == "txt" else [row["text"] for row in ROWS])
    if packing:
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(UserError, match=r"a\.\w+\.\w+ (is not a whole|cannot be read)"):
            list(map(list, read_documents(str(path))))


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_pipes_and_standard_input_are_read(kind: str, tmp_path: Path) -> None:
    expected = [KINDS["txt"].decode()] if kind == "txt" else [row["text"] for row in ROWS]
    for standard in (False, True):
        reading, writing = os.pipe()
        os.write(writing, KINDS[kind])
        os.close(writing)
        kept = os.dup(0)
        try:
            if standard:
                os.dup2(reading, 0)
            source = "-" if standard else f"/dev/fd/{reading}"
            check_source(source, 16, None)
            assert ["".join(pieces) for pieces in read_documents(source)] == expected
        finally:
            os.dup2(kept, 0)
            os.close(kept)
            os.close(reading)
    os.mkfifo(tmp_path / "fifo")
    check_source(str(tmp_path / "fifo"), 16, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("su.jsonl", b'{"text": "fine"}\n{"text": "a \\ud800"}\n', r"row 2: .*surrogate pair, \\ud800 at character 2"),
        ("long.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "line 1: JSON that is not read"),
        ("deep.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: JSON that is not read"),
        ("list.jsonl", b'{"text": "a"}\n{"text": ["b"]}\n', "row 2: column 'text' holds list, not text"),
        ("number.jsonl", b'{"text": 5}\n', "row 1: column 'text' holds int, not text"),
        ("nan.jsonl", b'{"text": NaN}\n', "row 1: column 'text' holds float, not text"),
        ("lost.jsonl", b'{"text": "a"}\n{"t": "b"}\n', "row 2: no text column 'text'; the columns are t"),
        ("wide.csv", b"id,text\n1,a,b\n", "line 2: more cells than the 2 columns"),
        ("zip.txt.gz", gzip.compress(b"a\0b", mtime=0), r"binary, not text \(a zero byte at 1\); unpack it"),
        ("one.json", b"{\n", "convert it to JSON Lines and name it .jsonl"),
        ("none.csv", b"", "is empty: it holds no text"),
        ("blank.txt", b" " * 3_000_000, "is empty: it holds no text"),
    ],
)
def test_rows_that_cannot_be_read_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(map(list, read_documents(str(tmp_path / name))))


def test_a_line_that_is_too_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hifiprune.io.text_files.LONGEST_ROW", 1000)
    assert list(lines_of("a", ["ab", "c\nd", "\n", "e\n\nf"])) == ["abc", "d", "e", "", "f"]
    with pytest.raises(UserError, match=r"a\.jsonl, line 3 is longer than"):
        list(lines_of("a.jsonl", ["x\n", "y\n", "z" * 700, "z" * 700]))


def test_names_that_are_no_source_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("datasets.load_dataset", fetch)
    for name in ("notes.md", "texts/notes.text", "c4.json.gz", "x.zst", "./none", "none.csv"):
        with pytest.raises(UserError, match="does not exist"):
            check_source(name, 16, None)
        with pytest.raises(UserError, match="does not exist"):
            next(read_documents(name))
    for name in ("c4.json.gz", "x.zst", "none.csv"):
        with pytest.raises(UserError, match=r"does not exist$"):
            check_source(name, 16, None)
    with pytest.raises(UserError, match=r"owner/name\.en:train would be its name"):
        check_source("owner/name.en", 16, None)
    for name in (
        "owner/name",
        "squad",
        "owner/name-1.5",
        "owner/name.en:train",
        "python-docs",
        "self",
        "-",
        "/dev/null",
    ):
        check_source(name, 16, None)
    for empty in ("", " "):
        with pytest.raises(UserError, match="the name of a text is empty"):
            Calibration(empty)
        with pytest.raises(UserError, match="the name of a text is empty"):
            Text(empty)
    with pytest.raises(UserError, match="/dev/null is empty"):
        next(read_documents("/dev/null"))
    with pytest.raises(UserError, match="no file can be called"):
        check_source("x" * 300, 16, None)


def test_folders_are_no_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "c.jsonl.gz").write_bytes(compressed("gz", KINDS["jsonl"]))
    assert [*map("".join, read_documents(str(tmp_path)))] == ["text", *(row["text"] for row in ROWS)]


def test_a_pipe_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hifiprune.calibration.processes", lambda: 2)
    with pytest.raises(UserError, match="text - is a pipe, which 2 processes cannot share: write it to a file"):
        check_source("-", 16, None)


def trial(world: Path, tmp_path: Path, command: str, *words: object) -> Result:
    return run(command, world / "dense", *words, "--seq-len", 16, "--batch-size", 20_000)


def test_batch_sizes_beyond_the_data_are_cut_down_and_told(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def keep(trial: Trial, work: object, size: int, *_: object) -> Pace:
        tried.append(size)
        return Pace(1e-3, 1e-3)

    monkeypatch.setattr(Trial, "_tried", keep)
    text, held, out = world / "calibration.txt", world / "held.txt", tmp_path / "out"
    windows = ("--calibration", text, "--num-samples", 3)
    said = "There are 3 windows: --batch-size 20000 is cut down to 3."
    assert said in trial(world, tmp_path, "score", "--output", tmp_path / "s", *windows).err
    assert said in trial(world, tmp_path, "prune", "--output", out, "--width", 32, "--round-to", 8, *windows).err
    assert said in trial(world, tmp_path, "evaluate", "--text", held, "--max-windows", 3).err
    ablate = ("--scores", tmp_path / "s", "--neurons", 1, "--groups", 0, "--text", held, "--max-windows", 3)
    assert said in trial(world, tmp_path, "ablate", "--output", tmp_path / "a", *ablate).err
    lone = run("score", world / "dense", "--output", tmp_path / "one", *windows, "--seq-len", 16, "--json")
    many = trial(world, tmp_path, "score", "--output", tmp_path / "many", *windows, "--json")
    assert set(tried) == {1, 3}, "no trial is larger than the work"
    assert lone.json["results"]["objective_nats"] == pytest.approx(many.json["results"]["objective_nats"], rel=1e-6)


def test_absurd_numbers_are_refused(world: Path, tmp_path: Path) -> None:
    for source in ("self", world / "calibration.txt"):
        words = ("--output", tmp_path / "s", "--calibration", source, "--num-samples", 10**9, "--seq-len", 16)
        refused(run("score", world / "dense", *words), "1.6e+10 tokens, more than the 4.29e+09 that are taken")


def test_tokens_that_are_stored_can_be_written_to() -> None:
    tokens = stored_tokens([[1, 2, 3]])
    tokens[0] = 5
    assert np.array_equal(tokens.numpy(), [5, 2, 3])


TEMPLATES = {
    "loop": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "zero": ("{{ 1/0 }}", "division by zero"),
    "memory": ("{{ 'a' * 10**11 }}", "MemoryError"),
    "padding": ("{{ 'a'.ljust(10**10) }}", "MemoryError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    "nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "maximum recursion depth exceeded"),
    "power": ("{{ 10**(10**8) }}", "takes more than 0.5 s"),
    "endless": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 0.5 s"),
    "syntax": ("{% if %}", "Expected an expression"),
    "escape": ("{{ ''.__class__.__mro__ }}", "is unsafe"),
    "size": ("{{ 'a' * 2000 }}", "writes 2,000 characters of it; at most 1,000 are read"),
    "several": ({"tool": "x"}, "multiple chat templates with no default"),
    "number": (5, "Can't compile non template nodes"),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_that_fail_or_compute_for_ever_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template, message = TEMPLATES[kind]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    monkeypatch.setattr("hifiprune.io.chat_templates.LONGEST", 1000)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    start = time.monotonic()
    with ChatTemplate(tokenizer, 0.5 if "0.5 s" in message else 20.0) as chat, pytest.raises(UserError, match=message):
        chat.texts(turns)
    assert "0.5 s" not in message or time.monotonic() - start < 5
    assert chat._process.exitcode is not None


def test_templates_run_where_a_process_cannot_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr("hifiprune.io.chat_templates.COPIED", False)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with ChatTemplate(tokenizer, 1.0) as chat:  # a second is too little for its imports
        assert chat.texts(turns) == [[Piece("a", False), Piece("b", True)]]


def test_conversations_are_written_in_order_whatever_stands_between(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows: list[dict[str, Any]] = []
    for number in range(70):
        turns = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": f"{number}!"}]
        rows.append({"messages": turns} if number % 3 else {"text": f"text {number}"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = read_examples(str(tmp_path / "rows.jsonl"), tokenizer)
    texts = [str(tokenizer.decode([*example.tokens])) for example in examples]
    expected = [f"{n}?{n}!" if n % 3 else f"text {n}" for n in range(70)]
    assert [text.removesuffix("<end>") for text in texts] == expected


def test_a_long_plain_text_is_one_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "long.txt").write_text(PROSE)
    tokenizer = TOKENIZERS["words"]()
    (whole,) = read_examples(str(tmp_path / "long.txt"), tokenizer)
    with small_pieces(monkeypatch):
        (pieces,) = read_examples(str(tmp_path / "long.txt"), tokenizer)
    assert pieces == whole
    assert [*whole.tokens] == tokenizer(f"<s>{PROSE}</s>", add_special_tokens=False)["input_ids"]
    assert whole.learned == bytes([0] + [1] * (len(whole.tokens) - 1))


def test_half_a_surrogate_pair_in_a_conversation_is_named(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "a.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "b"}]}\n'
    )
    with pytest.raises(UserError, match=r"row 1: the text is not Unicode .half of a surrogate pair, .ud83d"):
        read_examples(str(tmp_path / "a.jsonl"), tokenizer)


def test_a_tokenizer_that_needs_sentencepiece_says_so(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world / "dense", tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").rename(tmp_path / "dense" / "tokenizer.model")
    monkeypatch.setattr("hifiprune.models.tokenizer_files.find_spec", lambda _: None)
    with pytest.raises(UserError, match="alone, which needs sentencepiece: pip install sentencepiece"):
        find_checkpoint(str(tmp_path / "dense")).tokenizer()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"tokenizer.model is no whole sentencepiece model; copy it again"):
        find_checkpoint(str(tmp_path / "dense")).tokenizer()
