"""Calibration data: token windows drawn from any text, or sampled from the model."""

import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import cycle, groupby
from operator import itemgetter

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hifiprune.config.texts import Calibration
from hifiprune.errors import UserError
from hifiprune.io.distributed import processes
from hifiprune.io.prompts import read_prompts
from hifiprune.io.spool import Documents, stored_tokens
from hifiprune.io.text_files import is_pipe
from hifiprune.io.text_sources import SELF, check_there, read_documents
from hifiprune.io.tokenization import encode_pieces, special_tokens
from hifiprune.progress import track

GENERATED_TOGETHER = 16  # sequences sampled from the model at a time


@dataclass(frozen=True)
class Texts:
    """What is read before the model is loaded.

    Attributes:
        windows: windows of all sources but `self`.
        prompts: token ids of every prompt that the model answers.
    """

    windows: Int[Tensor, "_ positions"]
    prompts: list[list[int]] = field(default_factory=list)


def check_source(source: str, seq_len: int, longest: int | None) -> None:
    """Fail early: check a source's path and that its windows fit the model's `longest` sequence.

    Raises:
        UserError: a local source does not exist or cannot be read by every process, or windows are too long for the
            model.
    """
    check_there(source)
    if is_pipe(source) and processes() > 1:
        raise UserError(f"text {source} is a pipe, which {processes()} processes cannot share: write it to a file")
    if longest is not None and seq_len > longest:
        raise UserError(f"seq-len {seq_len} exceeds the model's {longest} positions; use --seq-len {longest}")


def load_windows(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None
) -> Int[Tensor, "windows positions"]:
    """Draw token windows; the same arguments give the same windows.

    Args:
        calibration: sources, and how windows are drawn from them.
        tokenizer: tokenizer of the model.
        model: dense model, which the source `self` is sampled from.

    Raises:
        UserError: a source cannot be read, or has too little text.
    """
    texts = read_texts(calibration, tokenizer)
    if not calibration.is_sampled:
        return texts.windows
    if model is None:
        raise UserError(f"the source '{SELF}' is sampled from the model: load_windows needs it")
    return sample_windows(model, calibration, texts)


def read_texts(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Draw the windows of every source but `self`, and read the prompts, if there are any.

    Raises:
        UserError: a source cannot be read, has too little text, or no prompt.
    """
    drawn = [_draw(part, tokenizer) for part in calibration.parts if not part.is_sampled]
    windows = _mixed(drawn, calibration.seed) if drawn else torch.empty(0, calibration.seq_len, dtype=torch.int64)
    if calibration.prompts is None:
        return Texts(windows)
    return Texts(windows, read_prompts(calibration.prompts, tokenizer, calibration.seq_len, calibration.seed))


def _mixed(parts: list[Int[Tensor, "_ positions"]], seed: int) -> Int[Tensor, "windows positions"]:
    """Return the windows of all parts in random order, so that what repair holds out is of each; one part as it is."""
    windows = torch.cat(parts)
    order = random.Random(seed).sample(range(len(windows)), len(windows))
    return windows[torch.tensor(order)] if len(parts) > 1 else windows


def _draw(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "windows positions"]:
    """Draw the windows of a single source of text."""
    read = read_documents(calibration.source, calibration.text_column, calibration.seed)
    if calibration.sampler == "stream":
        return draw_stream(read, tokenizer, calibration)
    documents = Documents(read)
    if calibration.sampler == "auto" and len(documents) == 1:
        return draw_stream(documents, tokenizer, calibration)
    return draw_documents(documents, tokenizer, calibration)


def draw_documents(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, calibration: Calibration
) -> Int[Tensor, "windows positions"]:
    """Draw one random window from each of `num_samples` random documents that are longer than a window."""
    chance, start = random.Random(calibration.seed), window_start(tokenizer, calibration)
    length = calibration.seq_len - len(start)
    windows = []
    for number in chance.sample(range(len(documents)), len(documents)):
        if documents.bytes_of(number) + 2 < length:  # a token is a byte at least, but for a start and an end
            continue
        tokens = stored_tokens(_joined(_pieces([documents[number]]), tokenizer))[len(start) :]
        if len(tokens) > length:
            first = chance.randrange(len(tokens) - length + 1)
            windows.append(tokens[first : first + length].clone())
        if len(windows) == calibration.num_samples:
            return with_start(start, torch.stack(windows))
    joined = len(join_documents(documents, tokenizer)[len(start) :]) // length
    raise _too_little(calibration, len(windows), "documents", joined)


def draw_stream(
    documents: Iterable[Iterable[str]],
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration,
) -> Int[Tensor, "windows positions"]:
    """Draw `num_samples` random windows, without overlap, from the documents joined into one stream."""
    stream = join_documents(documents, tokenizer)
    start = window_start(tokenizer, calibration)
    text, length = stream[len(start) :], calibration.seq_len - len(start)
    places = [_after_start(text, first, start) for first in range(0, len(text) - length + 1, length)]
    places = [first for first in places if first + length <= len(text)]
    if not places:
        asked = f"no window of {calibration.seq_len}"
        raise UserError(
            f"too little text in {calibration.source}: its {len(stream)} tokens make {asked}; use more text"
        )
    if len(places) < calibration.num_samples:
        raise _too_little(calibration, len(places), "stream")
    chosen = random.Random(calibration.seed).sample(places, calibration.num_samples)
    return with_start(start, torch.stack([text[first : first + length] for first in chosen]))


def _after_start(text: Int[Tensor, "tokens"], first: int, start: Int[Tensor, "start"]) -> int:
    """Return where a window begins, which gets a start of its own: after that of a document that begins there."""
    while len(start) and torch.equal(text[first : first + len(start)], start):
        first += len(start)
    return first


def window_start(
    tokenizer: PreTrainedTokenizerBase, calibration: Calibration | None = None, seq_len: int = 0
) -> Int[Tensor, "start"]:
    """Return the tokens that every window begins with: those that the tokenizer writes before a text, if any.

    Args:
        tokenizer: tokenizer of the model.
        calibration: settings of the windows, which may be without.
        seq_len: tokens per window where there is no calibration.

    Raises:
        UserError: they leave no room for text.
    """
    start = special_tokens(tokenizer)[0] if calibration is None or calibration.bos else []
    length = calibration.seq_len if calibration else seq_len
    if len(start) >= length:
        raise UserError(
            f"the tokenizer begins a text with {len(start)} tokens of its own, which leaves no text in a window of "
            f"{length}; use --seq-len {len(start) + 1} or more"
        )
    return torch.tensor(start, dtype=torch.int64)


def join_documents(
    documents: Iterable[Iterable[str]],
    tokenizer: PreTrainedTokenizerBase,
    most: int | None = None,
) -> Int[Tensor, "tokens"]:
    """Tokenize documents into one stream, with the end-of-text token between them.

    Args:
        documents: documents in pieces, which are read once and in order.
        tokenizer: tokenizer of the model.
        most: number of tokens after which no more is read.
    """
    return stored_tokens(_joined(track(_pieces(documents), "reading the text, pieces"), tokenizer), most)


def _pieces(documents: Iterable[Iterable[str]]) -> Iterator[tuple[int, str]]:
    """Yield every piece of every document with the number of its document."""
    return ((number, piece) for number, document in enumerate(documents) for piece in document)


def _joined(pieces: Iterable[tuple[int, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    started = False
    for _, group in groupby(pieces, key=itemgetter(0)):
        yield separator if started else []
        for tokens in encode_pieces(tokenizer, map(itemgetter(1), group)):
            started = started or bool(tokens)
            yield tokens


def cut_windows(
    text: Int[Tensor, "tokens"], seq_len: int, start: Int[Tensor, "start"]
) -> Int[Tensor, "windows positions"]:
    """Cut consecutive windows without overlap, each beginning with `start`; a last incomplete one is dropped.

    A window cut right before a document's own start tokens begins with these alone, not with two of them.
    """
    length, windows = seq_len - len(start), []
    first = _after_start(text, 0, start)
    while first + length <= len(text):
        windows.append(text[first : first + length])
        first = _after_start(text, first + length, start)
    return with_start(start, torch.stack(windows)) if windows else text.new_empty(0, seq_len)


def start_token(config: PretrainedConfig) -> int:
    """Return the token that text sampled from a model begins with: its start token, or else its first end token.

    Raises:
        UserError: the configuration names none, or one that is not in the vocabulary.
    """
    text = config.get_text_config()
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    start = next((token for token in (text.bos_token_id, *ends) if token is not None), None)
    if start is None:
        raise UserError("the model names no start or end token to sample text from; give a text as --calibration")
    if not 0 <= start < text.vocab_size:
        raise UserError(
            f"text sampled from the model would begin with token {start}, and its vocabulary has {text.vocab_size}; "
            "correct bos_token_id and eos_token_id in config.json, or give a text as --calibration"
        )
    return int(start)


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Return the tokens that end an answer, as the generation settings and the configuration of a model name them."""
    named = [getattr(model.generation_config, "eos_token_id", None), model.config.get_text_config().eos_token_id]
    return {
        token for tokens in named for token in (tokens if isinstance(tokens, list) else [tokens]) if token is not None
    }


def with_start(start: Int[Tensor, "start"], windows: Int[Tensor, "windows rest"]) -> Int[Tensor, "windows positions"]:
    """Begin every window with the same tokens."""
    return torch.cat((start.expand(len(windows), -1), windows), 1) if len(start) else windows


@torch.no_grad()
def sample_windows(
    model: PreTrainedModel,
    calibration: Calibration,
    texts: Texts | None = None,
) -> Int[Tensor, "windows positions"]:
    """Sample windows from the model's own distribution, at temperature 1, with the KV cache.

    Each begins with the model's start token. With prompts it is one conversation after another, in random order: a
    prompt, the model's answer up to a token that ends it, and the next prompt; the last answer is cut at the end.
    Entropy pruning needs no labels and no teacher; with this it needs no data either.

    Args:
        model: dense model.
        calibration: how many windows, and with which share of them the model is mixed with other sources.
        texts: windows of the other sources, with which the sampled ones are mixed, and prompts.

    Raises:
        UserError: the model names no start or end token to begin with.
    """
    generator = torch.Generator(model.device).manual_seed(calibration.seed)
    read, prompts = (
        (texts.windows, texts.prompts) if texts else (torch.empty(0, calibration.seq_len, dtype=torch.int64), [])
    )
    beginnings = cycle(random.Random(calibration.seed).sample(prompts, len(prompts)) or [[start_token(model.config)]])
    given = [deque(next(beginnings)) for _ in range(calibration.num_samples - len(read))]  # tokens that are not sampled
    first = torch.tensor([[tokens.popleft()] for tokens in given], device=model.device)
    windows, ends = list(first.split(GENERATED_TOGETHER)), end_tokens(model)
    steps = calibration.seq_len - 1
    cache = None
    for step in track(range(len(windows) * steps), "sampling text from the model"):
        group = step // steps
        cache = None if step % steps == 0 else cache
        output = model(input_ids=windows[group][:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        likely = output.logits[:, -1].float().softmax(-1)
        tokens = torch.multinomial(likely, 1, generator=generator)
        if prompts:
            for row, prompt in enumerate(given[group * GENERATED_TOGETHER :][: len(tokens)]):
                if prompt:
                    tokens[row] = prompt.popleft()
                elif int(tokens[row]) in ends:
                    prompt.extend(next(beginnings))
        windows[group] = torch.cat((windows[group], tokens), 1)
    sampled = torch.cat(windows).cpu()
    return _mixed([sampled, read], calibration.seed) if len(read) else sampled


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
