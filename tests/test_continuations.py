"""Continuations are as likely as the whole text, read in one piece, says; texts that are shared are read once."""

import random
from collections import Counter
from typing import Any

import pytest
import torch

from hifiprune.evaluation.loglikelihood import likelihoods
from tests.families import FORMS, ROUTED, tiny_model


def naive(model: Any, text: list[int], continuation: list[int], longest: int) -> tuple[float, bool]:
    """By one forward over all of it."""
    whole = [*text, *continuation][-(longest + 1) :]
    with torch.no_grad():
        logs = model(torch.tensor([whole[:-1]])).logits[0, -len(continuation) :].log_softmax(-1)
    likely = sum(float(logs[place, token]) for place, token in enumerate(continuation))
    return likely, logs.argmax(1).tolist() == continuation


def questions(chance: random.Random) -> list[tuple[Any, list[int], list[int]]]:
    """Some texts, each with continuations of many lengths, all mixed."""
    found = []
    for length in (1, 7, 12, 30):
        text = chance.choices(range(61), k=length)
        found += [(None, text, chance.choices(range(61), k=count)) for count in (1, 1, 4, 2, 9)]
    chance.shuffle(found)
    return found


@pytest.mark.parametrize("variant", FORMS + ROUTED)
@pytest.mark.parametrize("longest", [50, 20])
def test_likelihoods_are_those_of_whole_texts(variant: str, longest: int) -> None:
    model, asked = tiny_model(variant), questions(random.Random(0))
    best = model(torch.tensor([asked[0][1]])).logits[0, -1].argmax().item()
    asked.append((None, asked[0][1], [best]))  # what the model would write
    ours = likelihoods(model, asked, longest=longest, batch_size=3)
    theirs = [naive(model, text, continuation, longest) for _, text, continuation in asked]
    assert [each for each, _ in ours] == pytest.approx([each for each, _ in theirs], abs=1e-5)  # float32 logits
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert ours[-1][1]


def test_a_text_is_read_once_and_all_answers_are_counted() -> None:
    model, asked = tiny_model("llama"), questions(random.Random(1))
    read: Counter[tuple[int, ...]] = Counter()
    told: list[int] = []
    forward = model.forward

    def counted(input_ids: torch.Tensor, **more: Any) -> Any:
        read[tuple(input_ids.shape)] += 1
        return forward(input_ids=input_ids, **more)

    model.forward = counted
    likelihoods(model, asked, longest=60, batch_size=5, done=told.append)
    assert sum(told) == len(asked)
    assert read == {(1, 1): 1, (1, 7): 1, (1, 12): 1, (1, 30): 1, (5, 8): 4}
