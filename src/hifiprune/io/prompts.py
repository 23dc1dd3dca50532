"""Read prompts for the model to answer: rows of instructions, prompts, conversations or texts become tokens."""

from collections.abc import Iterator
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hifiprune.errors import UserError
from hifiprune.io.chat_templates import ChatTemplate, cue, is_conversation
from hifiprune.io.text_sources import TEXT_COLUMNS, Part, Row, check_text, read_parts
from hifiprune.io.tokenization import special_tokens
from hifiprune.progress import note, track

COLUMNS = ("instruction", "prompt", *TEXT_COLUMNS)
"""Columns of a prompt, first match; answers beside them are not read."""


def read_prompts(source: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, seed: int = 0) -> list[list[int]]:
    """Read every row of a source as a prompt, up to where the model answers.

    Formats, first match: `messages` (a conversation, without an answer at its end); `instruction`, optionally `input`;
    `prompt`; a text. Each line of a plain text is a prompt. They are written by the tokenizer's chat template, or as
    plain text if it has none.

    Args:
        source: see `hifiprune.io.text_sources.read_parts`.
        tokenizer: of the model.
        seq_len: tokens of a window; prompts that leave no room for an answer in it are left out.
        seed: of the order in which a hub data set is read.

    Raises:
        UserError: there is no prompt that fits, or a row has none of these shapes.
    """
    start = special_tokens(tokenizer)[0]
    prompts: list[list[int]] = []
    with ChatTemplate(tokenizer, writing=cue) as template:
        for part in read_parts(source, seed):
            for number, row in enumerate(track(_rows(part), "reading the prompts, rows"), 1):
                try:
                    turns = _turns(row)
                    text = _text(turns, template) if turns else ""
                except UserError as error:
                    raise UserError(f"{part.where}, row {number}: {error}") from error
                tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                prompts += [tokens if template.is_there else start + tokens] if tokens else []
    fitting = [prompt for prompt in prompts if len(prompt) < seq_len]
    if not prompts:
        raise UserError(f"{source} holds no prompts")
    if not fitting:
        shortest = min(map(len, prompts))
        raise UserError(
            f"the shortest prompt of {source} has {shortest} tokens, which leaves no answer in a window of {seq_len}; "
            f"use --seq-len {2 * shortest} or more, or shorter prompts"
        )
    if len(fitting) < len(prompts):
        missing = len(prompts) - len(fitting)
        note(f"{missing} of {len(prompts)} prompts are left out: they have {seq_len} tokens or more, as a window has.")
    if not template.is_there:
        note("The tokenizer has no chat template: the prompts are plain text.")
    return fitting


def _rows(part: Part) -> Iterator[Row]:
    """Yield the rows of a file or data set; of a plain text, each line as one."""
    yield from part.rows
    for line in "".join(part.text or ()).splitlines():
        yield {"text": line}


def _turns(row: Row) -> list[Any]:
    """Return a row as a conversation that the model is to answer; none if it is blank."""
    if "messages" in row:
        turns: Any = row["messages"]
        if not (is_conversation(turns) and turns):
            raise UserError("'messages' must be a list of turns, each with 'role' and 'content'")
        return list(turns[:-1] if turns[-1]["role"] == "assistant" else turns)
    column = next((name for name in COLUMNS if name in row), None)
    if column is None:
        raise UserError(
            f"the columns are {', '.join(row)}; needed are messages, instruction, prompt, or a text called "
            f"{', '.join(TEXT_COLUMNS)}"
        )
    texts = [row[column], *([row.get("input")] if column == "instruction" else [])]
    if not all(isinstance(text, str | None) for text in texts):
        raise UserError(f"column '{column}' holds no text; conversations go in 'messages'")
    content = "\n\n".join(str(text) for text in texts if text)
    return [{"role": "user", "content": check_text(content)}] if content.strip() else []


def _text(turns: list[Any], template: ChatTemplate) -> str:
    """Return a conversation up to where the model answers, as the chat template writes it, or as plain text."""
    if template.is_there:
        return template.texts(turns)[0][0].text
    return "\n\n".join(check_text(str(turn.get("content") or "")) for turn in turns)
