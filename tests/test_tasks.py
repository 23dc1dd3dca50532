"""Zero-shot accuracy by lm-evaluation-harness against accuracy computed here, choice by choice."""

import json
import logging
import math
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hifiprune import RunError, UserError
from hifiprune.evaluation import Estimate, check_tasks, harness, zero_shot

Item = dict[str, Any]
Question = tuple[list[tuple[str, str]], list[str], int]
"""The prompt and continuation of every choice, the choices as the harness measures their length, the right one."""

PAIR = """\
group: hp_pair
task: [hp_winogrande, hp_piqa]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: false}
"""


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    """The task files and a group of two; copied, because Python leaves compiled files beside theirs."""
    tasks = tmp_path / "evals" / "tasks"
    shutil.copytree(shared / "evals" / "tasks", tasks, copy_function=shutil.copyfile)
    tasks.chmod(0o755)
    (tasks / "hp_pair.yaml").write_text(PAIR)
    (tasks.parent / "data").symlink_to(shared.resolve() / "evals" / "data")
    return tasks


@pytest.fixture
def load(make_checkpoint: Callable[..., Path]) -> Callable[..., tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    def made(family: str = "llama", **options: object) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        path = make_checkpoint(family=family, max_position_embeddings=1024, **options)
        return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    return made


@pytest.fixture
def no_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that the harness's own tasks take to read."""
    monkeypatch.setattr(harness, "_own_tasks", dict)


def winogrande(item: Item) -> Question:
    """The blank is filled in the prompt; what follows it is the continuation of both."""
    before, after = item["sentence"].split("_")
    options = [before + item["option1"], before + item["option2"]]
    return [(option, " " + after.strip()) for option in options], options, int(item["answer"]) - 1


def piqa(item: Item) -> Question:
    """A space stands between the prompt and a solution, but does not count in its length."""
    solutions = [item["sol1"], item["sol2"]]
    return [(f"Question: {item['goal']}\nAnswer:", " " + each) for each in solutions], solutions, item["label"]


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, rest: str) -> float:
    """Of `rest` after `prompt`, which may end in a blank that then belongs to `rest`."""
    start = len(tokenizer(prompt.rstrip()).input_ids)
    tokens = torch.tensor(tokenizer(prompt + rest).input_ids)
    logs = model(tokens[None]).logits[0].double().log_softmax(-1)
    return float(logs[start - 1 : -1].gather(1, tokens[start:, None]).sum())


def expected(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Path, ask: Callable[[Item], Question], limit: int
) -> dict[str, Estimate]:
    """`acc` by log-likelihood, `acc_norm` by log-likelihood a character, of the first items."""
    hits: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for line in data.read_text().splitlines()[:limit]:
        pairs, choices, gold = ask(json.loads(line))
        values = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
        normed = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
        hits["acc"].append(max(values) == values[gold])
        hits["acc_norm"].append(max(normed) == normed[gold])
    found = {}
    for name, each in hits.items():
        share = sum(each) / len(each)
        margin = 1.96 * math.sqrt(share * (1 - share) / (len(each) - 1))
        found[name] = Estimate(share, share - margin, share + margin)
    return found


def same(first: Estimate, second: Estimate) -> bool:
    pairs = [(first.value, second.value), (first.low, second.low), (first.high, second.high)]
    return all(one == pytest.approx(other, abs=1e-12) for one, other in pairs)


@pytest.mark.usefixtures("no_defaults")
@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3"])
def test_accuracies_equal_those_computed_choice_by_choice(family: str, folder: Path, load: Callable[..., Any]) -> None:
    model, tokenizer = load(family)
    data = folder.parent / "data"
    wanted = {
        "hp_winogrande/acc": expected(model, tokenizer, data / "winogrande.jsonl", winogrande, 4)["acc"],
        "hp_piqa/acc_norm": expected(model, tokenizer, data / "piqa.jsonl", piqa, 4)["acc_norm"],
    }
    for batch_size in (1, 8):
        found = zero_shot(
            model, tokenizer, ["hp_winogrande", "hp_piqa"], include_path=folder, limit=4, batch_size=batch_size
        )
        assert list(found) == list(wanted)
        assert all(same(found[name], wanted[name]) for name in wanted), (found, wanted)


@pytest.mark.usefixtures("no_defaults")
def test_a_group_has_a_value_of_its_own_beside_its_tasks(folder: Path, load: Callable[..., Any]) -> None:
    model, tokenizer = load("smollm3")
    found = zero_shot(model, tokenizer, ["hp_pair"], include_path=folder, limit=4)
    assert set(found) == {"hp_winogrande/acc", "hp_piqa/acc_norm", "hp_pair/acc"}
    data = folder.parent / "data" / "piqa.jsonl"
    parts = [found["hp_winogrande/acc"], expected(model, tokenizer, data, piqa, 4)["acc"]]
    share = sum(part.value for part in parts) / 2
    margin = math.sqrt(sum((part.value - (part.low or 0)) ** 2 for part in parts)) / 2
    assert same(found["hp_pair/acc"], Estimate(share, share - margin, share + margin))


@pytest.mark.usefixtures("no_defaults")
def test_nothing_is_changed_and_nothing_said(
    folder: Path, load: Callable[..., Any], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load()
    model.train().lm_head.requires_grad_(False)
    model.model.norm.eval()
    shown, level = tqdm.__init__, logging.getLogger("lm_eval").level

    def state() -> list[object]:
        modes = [module.training for module in model.modules()]
        weights = [(id(p), p.requires_grad, p.device, p.tolist()) for p in model.parameters()]
        configs = [model.config.to_dict(), model.generation_config.to_dict()]
        return [modes, weights, configs, sorted(vars(model)), torch.get_rng_state().tolist()]

    before, tokenizer_before = state(), (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer))
    capfd.readouterr()
    zero_shot(model, tokenizer, ["hp_winogrande", "hp_piqa"], include_path=folder, limit=2)
    assert ("".join(capfd.readouterr()), caplog.records) == ("", [])
    assert state() == before
    assert (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer)) == tokenizer_before
    assert tokenizer.pad_token is None, "or the harness would have no cause to set one"
    assert (tqdm.__init__, logging.getLogger("lm_eval").level) == (shown, level)


def test_a_task_that_shuffles_does_so_alike_each_time_and_no_one_else_notices() -> None:
    def draw() -> tuple[float, float]:
        return random.random(), float(np.random.random())

    random.seed(7)
    np.random.seed(7)
    drawn = [draw(), draw()]
    random.seed(7)
    np.random.seed(7)
    with harness.seeded():
        first = draw()
    assert [draw(), draw()] == drawn
    with harness.seeded():
        assert draw() == first


@pytest.mark.usefixtures("no_defaults")
def test_a_head_of_its_own_is_not_tied_whatever_the_configuration_says(folder: Path, load: Callable[..., Any]) -> None:
    model, tokenizer = load("smollm3", tie_word_embeddings=True)
    torch.manual_seed(0)
    head = nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.lm_head.weight = head
    data = folder.parent / "data" / "piqa.jsonl"
    wanted = expected(model, tokenizer, data, piqa, 4)["acc_norm"]
    found = zero_shot(model, tokenizer, ["hp_piqa"], include_path=folder, limit=4)["hp_piqa/acc_norm"]
    assert model.lm_head.weight is head
    assert same(found, wanted)
    model.tie_weights()
    assert wanted.value != expected(model, tokenizer, data, piqa, 4)["acc_norm"].value, "or the test could not fail"


@pytest.mark.usefixtures("no_defaults")
def test_one_item_has_no_interval(folder: Path, load: Callable[..., Any]) -> None:
    model, tokenizer = load()
    found = zero_shot(model, tokenizer, ["hp_winogrande"], include_path=folder, limit=1)["hp_winogrande/acc"]
    assert found.value in {0.0, 1.0}
    assert (found.low, found.high) == (None, None)


def test_the_harness_own_tasks_are_read_only_for_names_not_in_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    index = harness.find_tasks(["hp_piqa"], folder).task_index

    def own() -> dict[str, Any]:
        read.append("all")
        return {"far": index["hp_piqa"]}

    monkeypatch.setattr(harness, "_own_tasks", own)
    check_tasks(["hp_zero_shot"], folder)
    assert read == []
    check_tasks(["hp_piqa", "far"], folder)
    assert read == ["all"]
    (folder / "hp_pair.yaml").write_text(PAIR.replace("hp_piqa", "far"))
    check_tasks(["hp_pair"], folder)
    assert read == ["all", "all"]


def test_an_unknown_task_suggests_the_nearest_also_of_the_harness_own(folder: Path) -> None:
    with pytest.raises(UserError, match=r"unknown task 'hp_piqua'; did you mean 'hp_piqa'\?") as caught:
        check_tasks(["hp_piqua", "hp_winogrande", "winogrand"], folder)
    assert "unknown task 'winogrand'; did you mean 'winogrande'?" in str(caught.value)
    assert "'hp_winogrande'" not in str(caught.value)
    check_tasks(["piqa", "hp_piqa"], folder)


@pytest.mark.usefixtures("no_defaults")
def test_what_cannot_be_run_is_said(folder: Path, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load()
    with pytest.raises(UserError, match="limit 0 must be at least 1"):
        zero_shot(model, tokenizer, ["hp_piqa"], include_path=folder, limit=0)
    with pytest.raises(UserError, match="batch size 0 must be at least 1"):
        zero_shot(model, tokenizer, ["hp_piqa"], include_path=folder, batch_size=0)
    with pytest.raises(UserError, match="no task is named"):
        check_tasks([], folder)
    with pytest.raises(UserError, match=r"elsewhere does not exist"):
        check_tasks(["hp_piqa"], folder / "elsewhere")
    with pytest.raises(UserError, match="hp_piqa would run twice"):
        check_tasks(["hp_pair", "hp_piqa"], folder)
    (folder.parent / "data").unlink()
    with pytest.raises(RunError, match=r"the data of hp_piqa cannot be had: .*piqa.jsonl"):
        zero_shot(model, tokenizer, ["hp_piqa"], include_path=folder, limit=1)
    (folder / "hp_pair.yaml").write_text("task: hp_pair\noutput_type: guesswork\n")
    with pytest.raises(UserError, match=r"the harness cannot run hp_pair: .*'guesswork'"):
        zero_shot(model, tokenizer, ["hp_pair"], include_path=folder)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'hifiprune\[tasks\]'"):
        check_tasks(["hp_piqa"], folder)
