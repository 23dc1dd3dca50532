"""Sources, samplers, seeds, and what is said when there is too little text."""

import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

import hifiprune as hp
from hifiprune import Calibration, UserError
from hifiprune.calibration import (
    Texts,
    check_source,
    cut_windows,
    join_documents,
    load_windows,
    sample_windows,
)
from hifiprune.config.texts import RECOMMENDED, mixture
from hifiprune.io.prompts import read_prompts
from hifiprune.io.text_sources import python_docs, read_documents
from tests.conftest import byte_tokenizer

DOCUMENTS = ["".join(chr(97 + (i * k) % 26) for i in range(30 * k)) for k in range(1, 9)]


class Hub:
    """A client of a hub that answers."""

    def head(self, address: str, timeout: float) -> None:
        assert address == "https://huggingface.co"
        assert 1 <= timeout <= 20


def texts_of(source: str, column: str | None = None) -> list[str]:
    """Every document of a source as a whole."""
    return ["".join(pieces) for pieces in read_documents(source, column)]


def write(path: Path, documents: list[str] = DOCUMENTS) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table({"id": range(len(documents)), "text": documents}), path)
    else:
        path.write_text("\n".join(documents))
    return path


def test_every_file_kind_holds_the_same_documents(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet"):
        assert texts_of(str(write(tmp_path / name))) == DOCUMENTS
    assert texts_of(str(write(tmp_path / "b.txt"))) == ["\n".join(DOCUMENTS)]
    assert texts_of(str(write(tmp_path / "b.raw"))) == ["\n".join(DOCUMENTS)]
    assert sorted(texts_of(str(tmp_path))) == sorted([*DOCUMENTS, *DOCUMENTS, "\n".join(DOCUMENTS)])


def test_documents_gives_one_window_from_each_long_document(tmp_path: Path) -> None:
    tokenizer, source = byte_tokenizer(), str(write(tmp_path / "a.jsonl"))
    windows = load_windows(Calibration(source, 6, 61, sampler="documents"), tokenizer)
    texts = [str(tokenizer.decode(window)) for window in windows]
    origins = [next(i for i, document in enumerate(DOCUMENTS) if text in document) for text in texts]
    assert sorted(origins) == [2, 3, 4, 5, 6, 7]  # the documents of 90 bytes and more


def test_stream_gives_windows_of_the_joined_documents_without_overlap(tmp_path: Path) -> None:
    tokenizer, source = byte_tokenizer(), str(write(tmp_path / "a.jsonl"))
    joined = tokenizer.eos_token.join(DOCUMENTS)
    windows = load_windows(Calibration(source, 5, 100, sampler="stream"), tokenizer)
    stream = join_documents([[text] for text in DOCUMENTS], tokenizer)
    pieces = cut_windows(stream, 100, torch.empty(0, dtype=torch.long))
    assert "".join(str(tokenizer.decode(piece)) for piece in pieces) in joined
    found = {tuple(window.tolist()) for window in windows}
    assert len(found) == 5
    assert found <= {tuple(piece.tolist()) for piece in pieces}


@pytest.mark.parametrize("sampler", ["documents", "stream"])
def test_the_seed_decides_the_windows(tmp_path: Path, sampler: str) -> None:
    source = str(write(tmp_path / "a.jsonl"))
    first, again, other = (
        load_windows(Calibration(source, 3, 50, seed, sampler), byte_tokenizer()) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_too_little_text_says_how_much_there_is_and_what_to_change(tmp_path: Path) -> None:
    source = str(write(tmp_path / "a.jsonl"))
    with pytest.raises(
        UserError, match=r"9 windows of 200 tokens asked for, 2 possible with the sampler 'documents'"
    ) as caught:
        load_windows(Calibration(source, 9, 200, sampler="documents"), byte_tokenizer())
    assert "--num-samples 2, --sampler stream (gives 5), a --seq-len below 200" in str(caught.value)
    assert len(load_windows(Calibration(source, 5, 200, sampler="stream"), byte_tokenizer())) == 5
    with pytest.raises(UserError, match=r"its \d+ tokens make no window of 5000; use more text"):
        load_windows(Calibration(source, 1, 5000, sampler="stream"), byte_tokenizer())
    with pytest.raises(UserError, match="6 windows of 200 tokens asked for, 5 possible with the sampler 'stream'"):
        load_windows(Calibration(source, 6, 200, sampler="stream"), byte_tokenizer())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty: it holds no text"),
        ("blank.jsonl", b'{"text": "  "}\n', "is empty: it holds no text"),
        ("binary.txt", b"abc\0def", r"is binary, not text \(a zero byte at 3\)"),
        ("latin.txt", "café".encode("latin-1"), r"is not UTF-8 \(byte 0xe9 at 3\)"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: broken JSON"),
        ("list.jsonl", b"[1]\n", "line 1: a JSON object is needed, not list"),
        (
            "column.jsonl",
            b'{"a": "x", "b": "y"}\n',
            "no text column called text.*the columns are a, b; name one with --text-column",
        ),
        ("array.json", b'[{"text": "a"}]', "convert it to JSON Lines and name it .jsonl"),
        ("bad.parquet", b"PAR1 not really", "is not a readable Parquet file"),
    ],
)
def test_unreadable_sources(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts_of(str(tmp_path / name))


def test_text_columns_are_named_or_guessed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "t", "content": "c"}\n')
    assert texts_of(str(path)) == ["c"]
    assert texts_of(str(path), "title") == ["t"]
    path.write_text('{"body": "only", "id": 3}\n')
    assert texts_of(str(path)) == ["only"]
    with pytest.raises(UserError, match="no text column 'nope'"):
        texts_of(str(path), "nope")
    path.write_text('\ufeff{"text": null, "url": "u"}\n{"text": "t", "url": "u"}\n{"text": null, "url": "u"}\n')
    assert texts_of(str(path)) == ["t"]
    path.with_suffix(".JSONL").write_text('{"text": "t"}\n')
    assert texts_of(str(path.with_suffix(".JSONL"))) == ["t"]


def test_empty_folders_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.txt, \.jsonl, \.parquet, \.csv, \.tsv files"):
        texts_of(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        check_source(str(tmp_path / "none.txt"), 1024, None)
    with pytest.raises(UserError, match="seq-len 100 exceeds the model's 64 positions; use --seq-len 64"):
        check_source("self", 100, 64)


def test_hub_data_sets_are_streamed_by_id_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    asked = []

    def load(name: str, config: str | None, split: str, *, streaming: bool, trust_remote_code: bool) -> object:
        asked.append((name, config, split, streaming, trust_remote_code))
        return Dataset.from_dict({"text": DOCUMENTS}).to_iterable_dataset()

    monkeypatch.setattr("huggingface_hub.utils.get_session", Hub)
    monkeypatch.setattr("datasets.load_dataset", load)
    for source in ("org/data", "org/data:validation", "org/data:train_sft", "org/data:en:test", "org/data:en"):
        assert sorted(texts_of(source)) == sorted(DOCUMENTS)
    assert asked == [
        ("org/data", None, "train", True, False),
        ("org/data", None, "validation", True, False),
        ("org/data", None, "train_sft", True, False),
        ("org/data", "en", "test", True, False),
        ("org/data", "en", "train", True, False),
    ]
    with pytest.raises(UserError, match="is written id"):
        texts_of("a:b:c:d")


def test_the_recommended_text_is_read_from_both_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    letters = {("HuggingFaceFW/fineweb-edu", "sample-10BT"): "f", ("allenai/c4", "en"): "c"}

    def load(name: str, config: str, split: str, **_: object) -> object:
        assert split == "train"
        return Dataset.from_dict({"text": [letters[name, config] * 100] * 20}).to_iterable_dataset()

    monkeypatch.setattr("huggingface_hub.utils.get_session", Hub)
    monkeypatch.setattr("datasets.load_dataset", load)
    calibration = Calibration(**mixture([*RECOMMENDED]), num_samples=12, seq_len=30)  # type: ignore[arg-type]
    windows = load_windows(calibration, byte_tokenizer())
    assert sorted(byte_tokenizer().decode(window[:1]) for window in windows) == ["c"] * 6 + ["f"] * 6


def test_a_hub_that_gives_no_data_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nlong story")

    monkeypatch.setattr("huggingface_hub.utils.get_session", Hub)
    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(
        UserError, match=r"there is no file org/data here, and the data hub could not give it: no route$"
    ):
        texts_of("org/data")


def test_an_unreachable_hub_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr("datasets.load_dataset", None)  # whose client tries again and again
    start = time.monotonic()
    with pytest.raises(UserError, match=r"no file org/data here, and http://127\.0\.0\.1:9 cannot be reached"):
        texts_of("org/data")
    assert time.monotonic() - start < 10


def test_python_documentation_is_long_enough_for_the_demo() -> None:
    assert sum(map(len, python_docs())) > 300_000


def test_text_sampled_from_the_model_follows_its_distribution(make_checkpoint: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(initializer_range=0.5), dtype=torch.float32)
    calibration = Calibration("self", 40, 12, seed=3)
    windows = sample_windows(model, calibration)
    assert windows.shape == (40, 12)
    assert torch.equal(windows, sample_windows(model, calibration))
    assert (windows[:, 0] == model.config.bos_token_id).all()
    with torch.no_grad():
        log_probs = model(input_ids=windows).logits[:, :-1].log_softmax(-1)
    likelihood = log_probs.gather(-1, windows[:, 1:, None]).mean().item()
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean().item()
    assert -likelihood == pytest.approx(entropy, rel=0.08)  # sampled tokens are as surprising as the entropy says
    assert entropy < 0.95 * torch.tensor(float(model.config.vocab_size)).log().item()


def test_text_from_the_model_is_mixed_with_other_sources(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(initializer_range=0.5), dtype=torch.float32)
    (tmp_path / "z.txt").write_text("z" * 1000)
    mixed = Calibration(**mixture(["self:0.3", str(tmp_path / "z.txt")]), num_samples=10, seq_len=16)  # type: ignore[arg-type]
    windows = hp.load_windows(mixed, byte_tokenizer(), model)
    read = (windows == byte_tokenizer()("z")["input_ids"][0]).all(1)
    assert int(read.sum()) == 7
    assert not read[3:].all(), "what is held out for repair is of all sources"
    assert rows(windows[~read]) == rows(sample_windows(model, Calibration("self", 3, 16)))
    assert torch.equal(windows, hp.load_windows(mixed, byte_tokenizer(), model))
    with pytest.raises(UserError, match="'self' is sampled from the model: load_windows needs it"):
        hp.load_windows(mixed, byte_tokenizer())


def test_windows_hold_prompts_and_what_the_model_answers(make_checkpoint: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(initializer_range=0.5), dtype=torch.float32)
    model.generation_config.eos_token_id = ends = list(range(200, 250))
    prompts = [[1, 2, 3], [4, 5], [6]]
    calibration = Calibration("self", 40, 30, seed=3, prompts="x.txt")
    windows = sample_windows(model, calibration, Texts(torch.empty(0, 30, dtype=torch.int64), prompts))
    assert windows.shape == (40, 30)
    assert torch.equal(
        windows, sample_windows(model, calibration, Texts(torch.empty(0, 30, dtype=torch.int64), prompts))
    )
    answered = torch.zeros(40, 30, dtype=torch.bool)
    asked: set[tuple[int, ...]] = set()
    for row, window in enumerate(windows.tolist()):
        place = 0
        while place < 30:
            prompt = next(each for each in prompts if window[place : place + len(each)] == each[: 30 - place])
            asked.add(tuple(prompt))
            start = place + len(prompt)
            place = next((number + 1 for number in range(start, 30) if window[number] in ends), 30)
            answered[row, start:place] = True
    assert len(asked) == 3
    assert (~answered).sum() > 2 * 40, "windows have several prompts"
    with torch.no_grad():
        log_probs = model(input_ids=windows).logits[:, :-1].log_softmax(-1)
    likelihood = log_probs.gather(-1, windows[:, 1:, None])[..., 0][answered[:, 1:]].mean().item()
    entropy = -(log_probs.exp() * log_probs).sum(-1)[answered[:, 1:]].mean().item()
    assert -likelihood == pytest.approx(entropy, rel=0.08)  # in view of all tokens before


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS: list[tuple[dict[str, object], str]] = [
    ({"instruction": "add", "input": "1 1", "output": "2"}, "add\n\n1 1"),
    ({"instruction": "add", "input": ""}, "add"),
    ({"prompt": "why?", "response": "so"}, "why?"),
    ({"text": "words"}, "words"),
]


def test_prompts_are_rows_without_their_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hifiprune")
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    chat = {"messages": [*turns, {"role": "assistant", "content": "ho"}]}
    path, lines = tmp_path / "a.jsonl", tmp_path / "b.txt"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*(row for row, _ in PROMPTS), chat, {"text": " "}]))
    lines.write_text("one\n\ntwo\n" + "x" * 40)
    plain, tokenizer = byte_tokenizer(), byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    expected = [f"<user>{text}</><assistant>" for _, text in PROMPTS] + ["<system>s</><user>hi</><assistant>"]
    assert [tokenizer.decode(prompt) for prompt in read_prompts(str(path), tokenizer, 99)] == expected
    assert "chat template" not in caplog.text
    texts = [*(text for _, text in PROMPTS), "s\n\nhi"]
    assert [plain.decode(prompt) for prompt in read_prompts(str(path), plain, 99)] == texts
    assert "The tokenizer has no chat template: the prompts are plain text." in caplog.text
    assert [plain.decode(prompt) for prompt in read_prompts(str(lines), plain, 40)] == ["one", "two"]
    assert "1 of 3 prompts are left out: they have 40 tokens or more" in caplog.text
    with pytest.raises(UserError, match=r"shortest prompt of .* has 3 tokens, .* a window of 3; use --seq-len 6"):
        read_prompts(str(lines), plain, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": ""}\n', "holds no prompts"),
        ('{"text": "a"}\n{"label": "x"}\n', "row 2: the columns are label; needed are messages, instruction, prompt"),
        ('{"messages": []}\n', "row 1: 'messages' must be a list of turns"),
        ('{"prompt": 3}\n', "row 1: column 'prompt' holds no text"),
    ],
)
def test_rows_that_are_no_prompts(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(str(tmp_path / "a.jsonl"), byte_tokenizer(), 99)


def test_prompts_are_for_text_from_the_model() -> None:
    with pytest.raises(UserError, match="--prompts are answered by the model, which --calibration self asks for"):
        Calibration("a.txt", prompts="b.txt")
    mixed = Calibration("a.txt", 10, mixed=(("self", 0.5),), prompts="b.txt")
    assert [part.prompts for part in mixed.parts] == [None, "b.txt"]


def rows(windows: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(window.tolist()) for window in windows}


def test_sources_are_mixed_by_their_shares(tmp_path: Path) -> None:
    for letter in "abc":
        (tmp_path / f"{letter}.txt").write_text(letter * 1000)
    first, *others = (str(tmp_path / f"{letter}.txt") for letter in "abc")
    mixed = Calibration(first, 10, 16, 3, mixed=((others[0], 0.3), (others[1], 0.2)))
    windows = load_windows(mixed, byte_tokenizer())
    letters = [byte_tokenizer().decode(window[:1]) for window in windows]
    assert sorted(letters) == list("aaaaabbbcc")
    assert letters != sorted(letters), "what is held out for repair is of all sources"
    assert torch.equal(windows, load_windows(mixed, byte_tokenizer()))
    alone = load_windows(Calibration(first, 10, 16, 3), byte_tokenizer())
    assert torch.equal(alone, load_windows(Calibration(first, 10, 16, 3, mixed=()), byte_tokenizer()))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a"], ("a", ())),
        (["a", "b:0.3"], ("a", (("b", 0.3),))),
        (["a", "b"], ("a", (("b", 0.5),))),
        (["a:1", "b:3"], ("a", (("b", 0.75),))),
        (["hub/set:config:train", "b:.25"], ("hub/set:config:train", (("b", 0.25),))),
    ],
)
def test_shares_are_read_from_the_command_line(words: list[str], expected: object) -> None:
    facts = mixture(words)
    assert (facts["source"], facts["mixed"]) == expected


@pytest.mark.parametrize(
    ("words", "samples", "message"),
    [
        (["a", "b:1.2"], 10, "the shares of --calibration add up to 1.2 and leave nothing for the others"),
        (["a", "b:0.01"], 10, "num-samples 10 leaves a source without a window"),
    ],
)
def test_impossible_mixtures(words: list[str], samples: int, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Calibration(**mixture(words), num_samples=samples)  # type: ignore[arg-type]
