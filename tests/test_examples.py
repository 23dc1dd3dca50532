"""Training examples of every shape, label by label, and rows of them that are packed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hifiprune.errors import UserError
from hifiprune.models.families import FAMILIES
from hifiprune.recovery.packing import IGNORED, pack
from hifiprune.recovery.training_data import Example, read_examples
from tests.conftest import byte_tokenizer
from tests.families import VARIANTS, tiny_model, tiny_tokens

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "he"},
    {"role": "assistant", "content": "ha"},
]
ROWS: dict[str, tuple[dict[str, Any], list[tuple[str, bool]]]] = {
    "text": ({"text": "some words"}, [("some words<end>", True)]),
    "prompt": ({"prompt": "why? ", "response": "so"}, [("why? ", False), ("so<end>", True)]),
    "completion": ({"prompt": "a", "completion": "b"}, [("a", False), ("b<end>", True)]),
    "instruction": (
        {"instruction": "add", "input": "", "output": "2"},
        [(f"{ASKED}\n\n### Instruction:\nadd\n\n### Response:\n", False), ("2<end>", True)],
    ),
    "lamini": (
        {"instruction": "add", "response": "2", "instruction_source": "x"},
        [(f"{ASKED}\n\n### Instruction:\nadd\n\n### Response:\n", False), ("2<end>", True)],
    ),
    "input": (
        {"instruction": "add", "input": "1 1", "output": "2"},
        [
            (
                "Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n"
                "### Instruction:\nadd\n\n### Input:\n1 1\n\n### Response:\n",
                False,
            ),
            ("2<end>", True),
        ],
    ),
    "messages": (
        {"messages": TURNS},
        [
            ("<system>s</><user>hi</><assistant>", False),
            ("ho</>", True),
            ("<user>he</><assistant>", False),
            ("ha</>", True),
        ],
    ),
}


def written(tmp_path: Path, *rows: dict[str, Any]) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tokenizer() -> PreTrainedTokenizerBase:
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("learn_prompts", [False, True])
def test_labels_cover_the_answer_alone_token_by_token(tmp_path: Path, shape: str, learn_prompts: bool) -> None:
    row, pieces = ROWS[shape]
    tokens = tokenizer()
    (example,) = read_examples(written(tmp_path, row), tokens, learn_prompts=learn_prompts)
    assert tokens.decode([*example.tokens]) == "".join(text for text, _ in pieces)
    learned = [(text, taught or learn_prompts) for text, taught in pieces]
    expected = [taught for text, taught in learned for _ in tokens(text).input_ids]
    assert [*map(bool, example.learned)] == expected


@pytest.mark.parametrize("shape", ["prompt", "instruction", "messages", "text"])
def test_a_real_tokenizer_splits_at_the_answer(
    tmp_path: Path, smollm2_tokenizer: PreTrainedTokenizerBase, shape: str
) -> None:
    row, _ = ROWS[shape]
    (example,) = read_examples(written(tmp_path, row), smollm2_tokenizer)
    taught = [token for token, learned in zip(example.tokens, example.learned, strict=True) if learned]
    answers = {
        "messages": "ho<|im_end|>\nha<|im_end|>\n",
        "text": "some words<|im_end|>",
        "prompt": " so<|im_end|>",  # the token of the word begins with the prompt's last character
        "instruction": "2<|im_end|>",
    }
    assert smollm2_tokenizer.decode(taught) == answers[shape]
    if shape == "messages":
        whole: Any = smollm2_tokenizer.apply_chat_template(row["messages"], tokenize=True)
        assert [*example.tokens] == whole["input_ids"]


def test_a_start_token_is_written_where_the_tokenizer_writes_one(tmp_path: Path) -> None:
    source = written(tmp_path, ROWS["prompt"][0])
    plain = tokenizer()
    plain.add_special_tokens({"bos_token": "<start>"})
    (without,) = read_examples(source, plain)
    assert plain.decode([*without.tokens]) == "why? so<end>"
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", plain.bos_token_id)]
    )
    (example,) = read_examples(source, plain)
    assert plain.decode([*example.tokens]) == "<start>why? so<end>"
    assert example.tokens.count(plain.bos_token_id) == 1
    assert not example.learned[0]


def test_a_template_that_writes_earlier_turns_otherwise_makes_an_example_of_each_answer(tmp_path: Path) -> None:
    """As Qwen3's, which leaves a block for thoughts in the last answer only."""
    thinking = tokenizer()
    thinking.chat_template = (
        "{% for m in messages %}{{ m.role }}: "
        "{% if loop.last and m.role == 'assistant' %}(thinks) {% endif %}{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": role, "content": f"{role[0]}{n}"} for n in (1, 2, 3) for role in ("user", "assistant")]
    examples = read_examples(written(tmp_path, {"messages": turns}), thinking)
    texts = [thinking.decode([*example.tokens]) for example in examples]
    taught = [
        thinking.decode([token for token, learned in zip(each.tokens, each.learned, strict=True) if learned])
        for each in examples
    ]
    assert texts == [
        "user: u1;assistant: (thinks) a1;",
        "user: u1;assistant: a1;user: u2;assistant: (thinks) a2;",
        "user: u1;assistant: a1;user: u2;assistant: a2;user: u3;assistant: (thinks) a3;",
    ]
    assert taught == ["(thinks) a1;", "(thinks) a2;", "(thinks) a3;"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": "x", "b": "y"}, "row 1: the columns are a, b; needed are messages, instruction and output"),
        ({"messages": TURNS[1:], "x": 1}, "the tokenizer has no chat template"),
        ({"text": ""}, "holds nothing to learn from"),
        ({"prompt": [{"role": "user"}], "response": "x"}, "row 1: column 'prompt' holds list, not text"),
        ({"text": ["a", "b"]}, "column 'text' holds list, not text"),
        ({"prompt": "x", "response": None}, None),
    ],
)
def test_rows_that_teach_nothing_are_refused(tmp_path: Path, row: dict[str, Any], message: str | None) -> None:
    source = written(tmp_path, row)
    if message is None:  # the end of the text is an answer too
        assert len(read_examples(source, byte_tokenizer())) == 1
        return
    with pytest.raises(UserError, match=message):
        read_examples(source, byte_tokenizer())


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "'messages' must be a list of turns, each with 'role' and 'content'"),
        ([{"from": "human", "value": "x"}], "'messages' must be a list of turns"),
        ([{"role": "user"}, TURNS[2]], "chat template refuses the conversation"),
        ([{"role": "odd", "content": "x"}, TURNS[2]], "chat template refuses the conversation: no such role"),
    ],
)
def test_conversations_that_cannot_be_written_are_refused(tmp_path: Path, messages: Any, message: str) -> None:
    strict = tokenizer()
    strict.chat_template = "{% if messages[0].role == 'odd' %}{{ raise_exception('no such role') }}{% endif %}" + (
        TEMPLATE.replace("m['content']", "m['content'] + ''")
    )
    with pytest.raises(UserError, match=f"row 1: .*{message}"):
        read_examples(written(tmp_path, {"messages": messages}), strict)


def test_the_column_that_is_asked_for_comes_first_and_null_is_nothing(tmp_path: Path) -> None:
    row = {"instruction": None, "output": "2", "text": "all of it"}
    (whole,) = read_examples(written(tmp_path, row), tokenizer(), text_column="text")
    assert tokenizer().decode([*whole.tokens]) == "all of it<end>"
    (answer,) = read_examples(written(tmp_path, row), tokenizer())
    assert "None" not in tokenizer().decode([*answer.tokens])


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=20), length=st.integers(2, 16), seed=st.integers(0, 3))
def test_every_token_is_packed_once_and_sees_its_own_example(sizes: list[int], length: int, seed: int) -> None:
    examples = [Example([100 * number + i for i in range(size)], [True] * size) for number, size in enumerate(sizes)]
    packed = pack(examples, length, filling=-1, seed=seed)
    seen = []
    for index in range(len(packed)):
        row = packed[index]
        assert all(len(values) == length for values in row.values())
        starts = [place for place in range(length) if row["position_ids"][place] == 0]
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            tokens = row["input_ids"][start:end].tolist()
            assert row["position_ids"][start:end].tolist() == list(range(end - start))
            assert row["labels"][start] == IGNORED
            if tokens[0] == -1:
                assert set(row["labels"][start:end].tolist()) == {IGNORED}
                continue
            assert row["labels"][start + 1 : end].tolist() == tokens[1:]
            assert len({token // 100 for token in tokens}) == 1
            seen += tokens
    expected = [
        token
        for example in examples
        for start in range(0, len(example.tokens), length)
        for token in example.tokens[start : start + length]
        if len(example.tokens[start : start + length]) > 1
    ]
    assert sorted(seen) == sorted(expected)


def loss_of(model: PreTrainedModel, examples: list[Example], length: int, *, together: bool = True) -> float:
    packed = pack(examples, length, together=together)
    batch = {name: torch.stack([packed[i][name] for i in range(len(packed))]) for name in packed[0]}
    with torch.no_grad():
        loss: float = model(**batch, num_items_in_batch=1, use_cache=False).loss.item()
    return loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_loss_is_unpacked_loss(variant: str) -> None:
    model = tiny_model(variant)
    tokens = tiny_tokens(5, 13).tolist()
    examples = [Example(each[: 5 + 2 * n], [n % 2 == 0] * 2 + [True] * (3 + 2 * n)) for n, each in enumerate(tokens)]
    alone = sum(loss_of(model, [example], len(example.tokens)) for example in examples)
    packs = FAMILIES[model.config.model_type].separates_packed
    together = loss_of(model, examples, 30)
    assert len(pack(examples, 30)) < len(examples) == len(pack(examples, 30, together=False))
    assert (together == pytest.approx(alone, rel=1e-6)) == packs
    assert loss_of(model, examples, 30, together=False) == pytest.approx(alone, rel=1e-6)
