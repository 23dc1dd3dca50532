"""`generate`: continue a prompt by a checkpoint, and by the one that it was made from, and tell where they part."""

from dataclasses import dataclass
from typing import Any

import torch

from hifiprune.config.generate import GenerateConfig
from hifiprune.engine.compute import check_compute, load
from hifiprune.errors import UserError
from hifiprune.io.chat_templates import ChatTemplate
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.find_checkpoint import find_checkpoint


@dataclass(frozen=True)
class Continuation:
    """What a model generated: its tokens, as ids and as text each, and the text that they make together."""

    model: str
    text: str
    ids: list[int]
    tokens: list[str]


@dataclass(frozen=True, kw_only=True)
class GenerateResults:
    """Continuations of a prompt, first that of the model.

    Attributes:
        prompt: text that both continue, as the chat template wrote it.
        chat: whether a chat template wrote it.
        continuations: one a model.
        same_tokens: number of tokens that both have in common from the start; None without another model.
    """

    prompt: str
    chat: bool
    continuations: list[Continuation]
    same_tokens: int | None


def generate(model: str, config: GenerateConfig) -> GenerateResults:
    """Continue a prompt by one model, or by two on the same tokens.

    Args:
        model: local folder, hub id or GGUF file; its tokenizer and chat template write the prompt.
        config: options.

    Raises:
        UserError: the prompt is empty or too long, or the models have different vocabularies.
        RunError: not enough memory.
    """
    check_compute(config.compute)
    if not config.prompt.strip():
        raise UserError("the prompt is empty; give --prompt a text to continue")
    checkpoints = [find_checkpoint(name) for name in (model, *([config.against] if config.against else []))]
    tokenizer: Any = checkpoints[0].tokenizer()
    chat = config.chat and tokenizer.chat_template is not None
    text = _as_chat(config.prompt, tokenizer) if chat else config.prompt
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    for checkpoint in checkpoints:
        _check_room(checkpoint, ids, config.max_new_tokens)
    found = []
    for checkpoint in checkpoints:
        made = _continued(checkpoint, ids, config)
        tokens = [str(tokenizer.decode([token])) for token in made]
        answer = str(tokenizer.decode(made, skip_special_tokens=True))
        found.append(Continuation(checkpoint.name, answer, made, tokens))
    return GenerateResults(
        prompt=text, chat=chat, continuations=found, same_tokens=_shared(*(one.ids for one in found[:2]))
    )


def _as_chat(prompt: str, tokenizer: Any) -> str:
    """Return a question as the tokenizer's chat template writes it, up to where the answer begins."""
    with ChatTemplate(tokenizer) as template:
        return template.texts([{"role": "user", "content": prompt}, {"role": "assistant", "content": "-"}])[0][0].text


def _check_room(checkpoint: Checkpoint, ids: list[int], new: int) -> None:
    """Refuse a prompt that a model cannot read, or has no room behind."""
    config = checkpoint.config().get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and len(ids) + new > longest:
        raise UserError(
            f"the prompt's {len(ids):,} tokens and --max-new-tokens {new:,} are more than the {longest:,} positions "
            "that the model has; give less"
        )
    if ids and max(ids) >= config.vocab_size:
        raise UserError(
            f"{checkpoint.name} has a vocabulary of {config.vocab_size:,}, and the prompt has token {max(ids):,}; "
            "give a model with the same tokenizer"
        )


def _continued(checkpoint: Checkpoint, ids: list[int], config: GenerateConfig) -> list[int]:
    """Return the tokens that a model generates after a prompt."""
    model: Any = load(checkpoint, config.compute)
    torch.manual_seed(config.seed)
    prompt = torch.tensor([ids], device=model.device)
    sampling = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    how: dict[str, Any] = sampling if config.temperature else {"do_sample": False, "temperature": None, "top_p": None}
    end = model.generation_config.eos_token_id
    filler = end[0] if isinstance(end, list) else end
    made = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=config.max_new_tokens,
        pad_token_id=filler,
        **how,
    )
    return [int(token) for token in made[0, len(ids) :]]


def _shared(ours: list[int], theirs: list[int] | None = None) -> int | None:
    """Return the number of tokens that two continuations have in common from the start."""
    if theirs is None:
        return None
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((number for number, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
