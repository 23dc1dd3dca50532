"""Windows begin as the tokenizer begins a text; where it adds nothing, and by the papers' presets, they do not."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import hifiprune as hp
from hifiprune.calibration import window_start
from hifiprune.config import TrainingConfig
from hifiprune.evaluation.text import held_windows
from hifiprune.io.text_sources import read_documents
from hifiprune.recovery.packing import cut_to, pack
from hifiprune.recovery.training_data import Example, read_examples
from tests.commands import Interruption, run
from tests.conftest import byte_tokenizer
from tests.families import load

BOS = 256


def beginning(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """The tokenizer with what it writes around a text, whatever its flags say of that."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(template, special_tokens=[("<end>", BOS)])
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return beginning(byte_tokenizer(), "<end> $A")


@pytest.fixture
def dense(make_checkpoint: Callable[..., Path], tokenizer: PreTrainedTokenizerFast) -> Path:
    """A checkpoint whose tokenizer begins a text with a start token."""
    folder = make_checkpoint()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("sampler", ["documents", "stream"])
def test_every_window_of_calibration_begins_with_the_start_token(
    tokenizer: PreTrainedTokenizerFast, text: Path, sampler: str
) -> None:
    windows = hp.load_windows(hp.Calibration(str(text), 8, 24, sampler=sampler), tokenizer)
    assert windows.shape == (8, 24)
    assert (windows[:, 0] == BOS).all()
    shorter = hp.Calibration(str(text), 8, 23, sampler=sampler)
    if sampler == "documents":
        assert torch.equal(windows[:, 1:], hp.load_windows(shorter, byte_tokenizer()))
    else:
        stream = torch.cat([encode(document) for document in read(text)])[1:]
        parts = {tuple(part.tolist()) for part in stream[: len(stream) // 23 * 23].view(-1, 23)}
        assert {tuple(window.tolist()) for window in windows[:, 1:]} <= parts


def read(text: Path) -> list[str]:
    return ["".join(pieces) for pieces in read_documents(str(text))]


def encode(document: str) -> Tensor:
    """A document as it stands in a stream: its start token, its bytes, and the end-of-text token."""
    return torch.tensor([BOS, *byte_tokenizer()(document).input_ids, BOS])


def test_the_papers_windows_are_without(tokenizer: PreTrainedTokenizerFast, text: Path) -> None:
    windows = hp.load_windows(hp.Calibration(str(text), 8, 24, sampler="documents", bos=False), tokenizer)
    documents, chance = read(text), random.Random(0)
    expected: list[list[int]] = []
    for document in chance.sample(documents, len(documents)):
        tokens = tokenizer(document).input_ids
        if len(tokens) > 24 and len(expected) < 8:
            start = chance.randrange(len(tokens) - 23)
            expected.append(tokens[start : start + 24])
    assert windows.tolist() == expected
    assert not (windows[:, 0] == BOS).all()


@pytest.mark.parametrize("sampler", ["documents", "stream"])
@pytest.mark.parametrize("bos", [True, False])
def test_nothing_changes_where_the_tokenizer_adds_nothing(text: Path, sampler: str, bos: bool) -> None:
    wanted = hp.Calibration(str(text), 8, 24, sampler=sampler, bos=bos)
    windows = hp.load_windows(wanted, byte_tokenizer())
    assert torch.equal(windows, hp.load_windows(hp.Calibration(str(text), 8, 24, sampler=sampler), byte_tokenizer()))
    assert window_start(byte_tokenizer(), wanted).tolist() == []


def test_all_that_a_tokenizer_begins_a_text_with_and_nothing_that_it_ends_it_with(text: Path) -> None:
    two = beginning(byte_tokenizer(), "<end> <end> $A <end>")
    windows = hp.load_windows(hp.Calibration(str(text), 8, 24), two)
    assert (windows[:, :2] == BOS).all()
    assert (windows[:, 2] != BOS).all()
    with pytest.raises(
        hp.UserError, match="2 tokens of its own, which leaves no text in a window of 2; use --seq-len 3"
    ):
        hp.load_windows(hp.Calibration(str(text), 1, 2), two)


def test_held_out_windows_hold_the_text_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("abcdefghij" * 10)
    windows = held_windows(hp.Text(str(tmp_path / "held.txt"), 24), tokenizer)
    assert (windows[:, 0] == BOS).all()
    assert tokenizer.decode(windows[:, 1:].flatten()) == ("abcdefghij" * 10)[: 4 * 23]
    few = held_windows(hp.Text(str(tmp_path / "held.txt"), 24, 2), tokenizer)
    assert torch.equal(few, windows[:2])


def test_a_held_out_window_that_begins_with_a_document_has_one_start_token(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "document {n:03}"}}\n' for n in range(12)))
    whole = torch.cat([encode(document) for document in read(path)])[1:]
    assert whole[13] == whole[27] == BOS, "or the test could not fail"
    windows = held_windows(hp.Text(str(path), 14), tokenizer)
    assert (windows[:, 0] == BOS).all()
    assert (windows[:, 1] != BOS).all()
    text = whole[whole != BOS].tolist()
    held = windows[windows != BOS].tolist()
    assert held == text[: len(held)], "in order, nothing twice"
    assert len(text) - len(held) < 13


def test_commands_begin_every_window_so(dense: Path, world: Path, tmp_path: Path) -> None:
    text = ("--calibration", world / "calibration.txt", "--num-samples", 6, "--seq-len", 24)
    papers = "Windows of the calibration text do not begin with <end>, which the tokenizer writes before a text"
    scores: dict[str, dict[str, Any]] = {}
    for preset in ("default", "hfprune"):
        small = tmp_path / preset
        result = run("prune", dense, "--output", small, "--width", 24, "--preset", preset, *text)
        assert result.code == 0, result.err
        assert (papers in " ".join(result.err.split())) == (preset == "hfprune")
        assert json.loads((small / "run.json").read_text())["arguments"]["calibration"]["bos"] == (preset == "default")
        scores[preset] = hp.Scores.load(small / "hifiprune" / "scores.safetensors").settings
    assert [scores[preset]["calibration"]["bos"] for preset in scores] == [True, False]
    held = ("--text", world / "held.txt", "--seq-len", 24, "--json")
    found = run("evaluate", dense, *held).json["results"]["models"][str(dense)]["metrics"]["perplexity"]["value"]
    body = torch.tensor(byte_tokenizer()((world / "held.txt").read_text()).input_ids)
    windows = body[: len(body) // 23 * 23].view(-1, 23)
    tokens = torch.cat((torch.full((len(windows), 1), BOS), windows), 1)
    with torch.no_grad():
        logits = load(dense)(input_ids=tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows.flatten())
    assert found == pytest.approx(math.exp(loss), rel=1e-5)


def test_rows_to_learn_from_begin_so(text: Path, tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"prompt": "one", "response": "two"}\n')
    for source in (text, tmp_path / "asked.jsonl"):
        for start in ("", "<end>", "<end> <end>"):
            examples = read_examples(str(source), beginning(byte_tokenizer(), f"{start} $A".strip()))
            own = [BOS] * len(start.split())
            assert all([*example.tokens[: len(own) + 1]][:-1] == own for example in examples)
            assert all(example.tokens[len(own)] != BOS for example in examples)


def test_windows_that_begin_with_a_document_have_one_start_token(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Of windows of 13 tokens of text, one begins with a document's start token and one with the end before it."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "document {n:03}"}}\n' for n in range(12)))
    whole = torch.cat([encode(document) for document in read(path)])[1:-1]
    assert whole[13] == whole[26] == whole[27] == BOS, "or the test could not fail"
    windows = hp.load_windows(hp.Calibration(str(path), 12, 14, sampler="stream"), tokenizer)
    assert (windows[:, 0] == BOS).all()
    assert (windows[:, 1] != BOS).all()
    places = [0, 14, 28, *range(39, 156, 13)]
    expected = {tuple(whole[place : place + 13].tolist()) for place in places}
    assert {tuple(window.tolist()) for window in windows[:, 1:]} == expected


def test_every_piece_of_a_long_example_begins_with_the_start_token() -> None:
    tokens, learned = [BOS, *range(10, 23), BOS], [False, *[True] * 14]
    pieces = cut_to(Example(tokens, learned), 6, [BOS])
    assert [[*piece.tokens] for piece in pieces] == [
        [BOS, 10, 11, 12, 13, 14], [BOS, 15, 16, 17, 18, 19], [BOS, 20, 21, 22, BOS],
    ]  # fmt: skip
    assert [[*piece.learned] for piece in pieces] == [[0, *[1] * (len(piece.tokens) - 1)] for piece in pieces]
    for start in ((), (7,), (BOS, 10, 11, 12, 13)):  # none, of other texts, and one that leaves no room
        assert [[*piece.tokens] for piece in cut_to(Example(tokens, learned), 6, start)] == [
            tokens[:6], tokens[6:12], tokens[12:],
        ]  # fmt: skip


def test_rows_of_a_training_begin_so(dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hp.prune(str(dense), tmp_path / "small", hp.PruneConfig(hp.Budget(width=24), criterion="magnitude", repair="none"))
    rows: list[Any] = []

    def keep(*arguments: object, **options: object) -> None:
        rows.extend(pack(*arguments, **options).rows)  # type: ignore[arg-type]
        raise Interruption

    monkeypatch.setattr("hifiprune.recovery.rows.pack", keep)
    training = TrainingConfig(seq_len=16, max_steps=1, distill_weight=0.0)
    with pytest.raises(Interruption):
        hp.recover(str(tmp_path / "small"), tmp_path / "out", str(text), hp.RecoverConfig(training))
    pieces = [piece for row in rows for piece in row]
    assert len(pieces) > 10
    assert all(piece.tokens[0] == BOS for piece in pieces)
