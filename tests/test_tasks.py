"""Zero-shot accuracy by lm-evaluation-harness against accuracy computed here, choice by choice."""

import json
import logging
import math
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hifiprune import RunError, UserError
from hifiprune.config.evaluate import Tasks
from hifiprune.evaluation import lm_eval_harness
from hifiprune.evaluation.zero_shot_tasks import Answers, TaskRunner, average, check_tasks, differences, zero_shot
from hifiprune.results import Estimate
from tests.commands import Interruption, refused, run
from tests.processes import forked

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
    monkeypatch.setattr(lm_eval_harness, "_own_tasks", dict)


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
    """`acc` by log-likelihood, `acc_norm` by log-likelihood a character, of the items that are drawn."""
    hits: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    lines = data.read_text().splitlines()
    for line in (lines[number] for number in sorted(random.Random(0).sample(range(len(lines)), limit))):
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
        tasks = Tasks(
            (
                "hp_winogrande",
                "hp_piqa",
            ),
            folder,
            limit=4,
        )
        found = zero_shot(model, tokenizer, tasks, batch_size=batch_size)
        assert list(found) == list(wanted)
        assert all(same(found[name], wanted[name]) for name in wanted), (found, wanted)


@pytest.mark.usefixtures("no_defaults")
def test_prompts_begin_as_the_tokenizer_begins_a_text(
    folder: Path, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load()
    start = [("<end>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<end> $A", special_tokens=start)
    asked: list[list[int]] = []

    def recorded(_: Any, requests: list[Any], **__: Any) -> list[tuple[float, bool]]:
        asked.extend(text for _, text, _ in requests)
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr("hifiprune.evaluation.zero_shot_tasks.likelihoods", recorded)
    TaskRunner(Tasks(("hp_piqa",), folder, limit=4)).ask(model, tokenizer)
    assert len(asked) == 8
    assert all(text[0] == tokenizer.eos_token_id != text[1] for text in asked)


@pytest.mark.usefixtures("no_defaults")
def test_a_group_has_a_value_of_its_own_beside_its_tasks(folder: Path, load: Callable[..., Any]) -> None:
    model, tokenizer = load("smollm3")
    found = zero_shot(model, tokenizer, Tasks(("hp_pair",), folder, limit=4))
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
    zero_shot(
        model,
        tokenizer,
        Tasks(
            (
                "hp_winogrande",
                "hp_piqa",
            ),
            folder,
            limit=2,
        ),
    )
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
    with lm_eval_harness.seeded():
        first = draw()
    assert [draw(), draw()] == drawn
    with lm_eval_harness.seeded():
        assert draw() == first


@pytest.mark.usefixtures("no_defaults")
def test_a_head_of_its_own_is_not_tied_whatever_the_configuration_says(folder: Path, load: Callable[..., Any]) -> None:
    model, tokenizer = load("smollm3", tie_word_embeddings=True)
    torch.manual_seed(0)
    head = nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.lm_head.weight = head
    data = folder.parent / "data" / "piqa.jsonl"
    wanted = expected(model, tokenizer, data, piqa, 4)["acc_norm"]
    found = zero_shot(model, tokenizer, Tasks(("hp_piqa",), folder, limit=4))["hp_piqa/acc_norm"]
    assert model.lm_head.weight is head
    assert same(found, wanted)
    model.tie_weights()
    assert wanted.value != expected(model, tokenizer, data, piqa, 4)["acc_norm"].value, "or the test could not fail"


@pytest.mark.usefixtures("no_defaults")
def test_one_item_has_no_interval(folder: Path, load: Callable[..., Any]) -> None:
    model, tokenizer = load()
    found = zero_shot(model, tokenizer, Tasks(("hp_winogrande",), folder, limit=1))["hp_winogrande/acc"]
    assert found.value in {0.0, 1.0}
    assert (found.low, found.high) == (None, None)


def test_the_harness_own_tasks_are_read_only_for_names_not_in_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    index = lm_eval_harness.find_tasks(["hp_piqa"], folder).task_index

    def own() -> dict[str, Any]:
        read.append("all")
        return {"far": index["hp_piqa"]}

    monkeypatch.setattr(lm_eval_harness, "_own_tasks", own)
    check_tasks(Tasks(("hp_zero_shot",), folder))
    assert read == []
    check_tasks(
        Tasks(
            (
                "hp_piqa",
                "far",
            ),
            folder,
        )
    )
    assert read == ["all"]
    (folder / "hp_pair.yaml").write_text(PAIR.replace("hp_piqa", "far"))
    check_tasks(Tasks(("hp_pair",), folder))
    assert read == ["all", "all"]


@pytest.mark.exhaustive  # the harness reads thousands of files to know its own tasks
def test_an_unknown_task_suggests_the_nearest_also_of_the_harness_own(folder: Path) -> None:
    with pytest.raises(UserError, match=r"unknown task 'hp_piqua'; did you mean 'hp_piqa'\?") as caught:
        check_tasks(
            Tasks(
                (
                    "hp_piqua",
                    "hp_winogrande",
                    "winogrand",
                ),
                folder,
            )
        )
    assert "unknown task 'winogrand'; did you mean 'winogrande'?" in str(caught.value)
    assert "'hp_winogrande'" not in str(caught.value)
    check_tasks(
        Tasks(
            (
                "piqa",
                "hp_piqa",
            ),
            folder,
        )
    )
    check_tasks(
        Tasks(
            (
                "papers",
                "hellaswag",
            )
        )
    )


@pytest.mark.usefixtures("no_defaults")
def test_what_cannot_be_run_is_said(folder: Path, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load()
    with pytest.raises(UserError, match="limit 0 must be at least 1"):
        zero_shot(model, tokenizer, Tasks(("hp_piqa",), folder, limit=0))
    with pytest.raises(UserError, match="batch-size 0 must be at least 1"):
        zero_shot(model, tokenizer, Tasks(("hp_piqa",), folder), batch_size=0)
    with pytest.raises(UserError, match="no task is named"):
        check_tasks(Tasks((), folder))
    with pytest.raises(UserError, match=r"elsewhere does not exist"):
        check_tasks(Tasks(("hp_piqa",), folder / "elsewhere"))
    with pytest.raises(UserError, match="hp_piqa would run twice"):
        check_tasks(
            Tasks(
                (
                    "hp_pair",
                    "hp_piqa",
                ),
                folder,
            )
        )
    (folder.parent / "data").unlink()
    with pytest.raises(RunError, match=r"the data of hp_piqa cannot be had: .*piqa.jsonl"):
        zero_shot(model, tokenizer, Tasks(("hp_piqa",), folder, limit=1))
    (folder / "hp_pair.yaml").write_text("task: hp_pair\noutput_type: guesswork\n")
    with pytest.raises(UserError, match=r"the harness cannot run hp_pair: .*'guesswork'"):
        zero_shot(model, tokenizer, Tasks(("hp_pair",), folder))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'hifiprune\[tasks\]'"):
        check_tasks(Tasks(("hp_piqa",), folder))


@pytest.mark.exhaustive  # the harness's command line starts slowly
def test_accuracies_equal_those_of_the_harness_own_command(
    folder: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path, names = make_checkpoint(max_position_embeddings=1024), sorted(file.stem for file in folder.glob("hp_*.yaml"))
    names = [name for name in names if name not in ("hp_pair", "hp_zero_shot")]
    exam = TaskRunner(Tasks(tuple(names), folder, limit=12, seed=1))
    found = exam.ask(AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path))
    drawn = {name: sorted(random.Random(1).sample(range(size), 12)) for name, (_, size) in exam.items.items()}
    words = [
        *("lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={path},dtype=float32"),
        *("--device", "cpu", "--batch_size", "8", "--tasks", ",".join(names), "--include_path", str(folder)),
        *("--samples", json.dumps(drawn), "--output_path", str(tmp_path / "theirs")),
    ]

    def harness() -> None:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.tasks import TaskManager

        TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)  # thousands of files
        sys.argv = words
        cli_evaluate()

    done = forked(tmp_path / "told", harness)
    assert done.codes == [0], done.err
    (written,) = (tmp_path / "theirs").rglob("results*.json")
    theirs = json.loads(written.read_text())["results"]
    assert {name.partition("/")[0] for name in found} == set(drawn)
    assert len(found) == 10
    lengths = [name for name in found if name.endswith("acc_norm")]
    assert lengths == [f"hp_{task}/acc_norm" for task in ("arc_challenge", "arc_easy", "openbookqa", "piqa")]
    for name, answers in found.items():
        task, _, metric = name.partition("/")
        rounding = 1e-6 if task == "hp_truthfulqa_mc2" else 0  # its score is a share of probability
        assert answers.accuracy.value == pytest.approx(theirs[task][f"{metric},none"], rel=rounding, abs=0)
        assert answers.accuracy.high is not None
        margin = answers.accuracy.high - answers.accuracy.value
        assert margin / 1.96 == pytest.approx(theirs[task][f"{metric}_stderr,none"], rel=1e-6)


def without_error(accuracy: float) -> Answers:
    return Answers(Estimate(accuracy, None, None))


def answered(*hits: float) -> Answers:
    return Answers(Estimate(sum(hits) / len(hits), None, None), hits)


def test_differences_are_taken_item_by_item() -> None:
    chance = random.Random(0)
    theirs = [float(chance.random() < 0.6) for _ in range(400)]
    ours = [0.0 if chance.random() < 0.05 else hit for hit in theirs]  # the same but for a few lost
    others = theirs[::-1]
    reference = {
        "a/acc": answered(*theirs),
        "b/acc": answered(*others),
        "group/acc": without_error(0.5),
    }
    found = differences(reference | {"a/acc": answered(*ours), "group/acc": without_error(1.0)}, reference)
    assert list(found) == ["a/acc", "b/acc", "average"]
    lost = (sum(ours) - sum(theirs)) / 400
    assert found["a/acc"].value == pytest.approx(lost)
    assert found["b/acc"] == Estimate(0.0, 0.0, 0.0), "the very same answers have no uncertain difference"
    assert found["average"].value == pytest.approx(lost / 2)
    error = math.sqrt(-lost * (1 + lost) / 400)  # of a share of items lost
    for name, scale in (("a/acc", 1), ("average", 2)):
        low, high = found[name].low or 0, found[name].high or 0
        assert low == pytest.approx((lost - 1.96 * error) / scale, abs=0.3 * error)
        assert high == pytest.approx((lost + 1.96 * error) / scale, abs=0.3 * error)


def test_the_average_is_that_of_tasks_and_not_of_items() -> None:
    answers = {
        "a/acc": Answers(Estimate(0.5, 0.3, 0.7), (1.0, 0.0)),
        "b/acc": Answers(Estimate(0.9, 0.9, 0.9), (1.0,) * 9 + (0.0,)),
        "group/acc": without_error(0.1),
    }
    assert (
        average(
            {
                "group/acc": without_error(0.1),
                "wikitext/word_perplexity": without_error(9.0),
            }
        )
        is None
    )
    assert differences({"group/acc": without_error(0.1)}, answers) == {}
    found = average(answers)
    assert found is not None
    assert found.value == pytest.approx(0.7)
    assert same(found, Estimate(0.7, 0.6, 0.8))


@pytest.mark.usefixtures("no_defaults")
def test_an_exam_is_read_once_and_taken_by_one_model_after_another(
    folder: Path, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = Tasks(
        (
            "hp_winogrande",
            "hp_piqa",
        ),
        folder,
        limit=25,
        seed=3,
    )
    exam = TaskRunner(tasks)
    assert exam.items == {"hp_winogrande": (25, 1267), "hp_piqa": (25, 1838)}
    (model, tokenizer), (other, _) = load(), load("qwen3")
    seen: list[int] = []

    def noted(numbers: range, what: str) -> Iterator[int]:
        for number in numbers:
            seen.append(number)
            yield number

    built: Counter[str] = Counter()
    for task in exam._tasks.values():
        monkeypatch.setattr(task, "construct_requests", lambda *_, **__: built.update(["again"]))
    monkeypatch.setattr(lm_eval_harness, "find_tasks", None)
    with monkeypatch.context() as patched:
        patched.setattr("hifiprune.evaluation.zero_shot_tasks.track", noted)
        first = exam.ask(model, tokenizer)
    second, again = exam.ask(other, tokenizer), exam.ask(model, tokenizer)
    assert not built, "prompts are built once"
    monkeypatch.undo()
    assert again == first != second
    assert seen == list(range(len(exam.prompts))), "progress goes to the end"
    assert first == TaskRunner(tasks).ask(model, tokenizer)
    assert TaskRunner(replace(tasks, seed=4)).prompts != exam.prompts


@pytest.mark.usefixtures("no_defaults")
def test_an_exam_is_known_by_its_name_its_prompts_and_the_right_answers(folder: Path) -> None:
    task = (folder / "hp_piqa.yaml").read_text()
    (folder / "twin.yaml").write_text(task.replace("task: hp_piqa", "task: twin"))
    known = [TaskRunner(Tasks((name,), folder, limit=5)).identity for name in ("hp_piqa", "hp_piqa", "twin")]
    assert known[0] == known[1] != known[2]
    (folder / "hp_piqa.yaml").write_text(task.replace("doc_to_target: label", "doc_to_target: '{{1 - label}}'"))
    other = TaskRunner(Tasks(("hp_piqa",), folder, limit=5))
    assert other.prompts == TaskRunner(Tasks(("twin",), folder, limit=5)).prompts
    assert other.identity != known[0]


@pytest.mark.usefixtures("no_defaults")
def test_mistakes_in_a_file_of_tasks_are_the_users(folder: Path) -> None:
    task = (folder / "hp_piqa.yaml").read_text()
    for right, wrong in (("{{goal}}", "{{gaol}}"), ("validation_split: ", "validation_split: not_")):
        assert right in task
        (folder / "hp_piqa.yaml").write_text(task.replace(right, wrong))
        with pytest.raises(UserError, match="a file of hp_piqa refers to an unknown field"):
            TaskRunner(Tasks(("hp_piqa",), folder, limit=5))


@pytest.mark.usefixtures("no_defaults")
def test_evaluate_measures_several_models_and_goes_on_after_an_interruption(
    folder: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, small = (
        make_checkpoint(name, family=family, max_position_embeddings=1024)
        for name, family in (("dense", "llama"), ("small", "qwen3"))
    )
    text = tmp_path / "text.txt"
    text.write_text("some words to measure on, " * 40)
    arguments = (
        *("evaluate", small, "--against", dense, "--text", text, "--seq-len", 32, "--output", tmp_path / "out"),
        *("--tasks", "hp_winogrande,hp_piqa", "--task-path", folder, "--limit", 25),
    )
    asked: list[str] = []
    ask = TaskRunner.ask

    def stopped(exam: TaskRunner, *rest: Any, **how: Any) -> Any:
        asked.append(exam.tasks.names[0])
        if len(asked) == 4:
            raise Interruption
        return ask(exam, *rest, **how)

    monkeypatch.setattr(TaskRunner, "ask", stopped)
    with pytest.raises(Interruption):
        run(*arguments)
    assert not (tmp_path / "out").exists()
    result = run(*arguments)
    assert result.code == 0, result.err
    assert asked == ["hp_winogrande", "hp_piqa"] * 2 + ["hp_piqa"], "what was answered is not asked again"
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["reused_parts"] == 4
    assert not list(tmp_path.glob("out.*"))
    models = record["results"]["models"]
    row, base = models[str(small)], models[str(dense)]
    wanted = zero_shot(
        AutoModelForCausalLM.from_pretrained(small),
        AutoTokenizer.from_pretrained(small),
        Tasks(
            (
                "hp_winogrande",
                "hp_piqa",
            ),
            folder,
            limit=25,
        ),
    )
    assert {name: found["value"] for name, found in row["tasks"].items()} == {
        name: estimate.value for name, estimate in wanted.items()
    }
    for name, gain in row["differences"].items():
        ours, theirs = (each["average"] if name == "average" else each["tasks"][name] for each in (row, base))
        assert gain["value"] == pytest.approx(ours["value"] - theirs["value"])
    assert any(gain["value"] for gain in row["differences"].values()), "or the test could not fail"
    assert "differences" not in base
    assert row["metrics"]["kl"]["value"] > 0
    assert record["results"]["items"] == {"hp_winogrande": [25, 1267], "hp_piqa": [25, 1838]}
    for part in ("25 of 1,267", "acc_norm", "±", "random choice", "difference to dense"):
        assert part in " ".join(result.out.split())


def test_what_evaluate_cannot_measure_is_refused(make_checkpoint: Callable[..., Path]) -> None:
    model = make_checkpoint()
    refused(run("evaluate", model), "nothing to measure: give --text, --tasks or both")
    refused(run("evaluate", model, model, "--text", "x.txt"), "would be measured twice")
    larger = make_checkpoint("larger", vocab_size=300)
    (larger.parent / "x.txt").write_text("words")
    text = ("--text", larger.parent / "x.txt", "--seq-len", 8)
    refused(run("evaluate", model, larger, *text), "the vocabularies differ (257 and 300 tokens)")
    refused(run("evaluate", model, "--limit", 3, "--text", "x.txt"), "--limit need --tasks")
    refused(run("evaluate", model, "--tasks", "piqa", "--limit", 0), "limit 0 must be at least 1")
