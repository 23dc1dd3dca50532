"""Zero-shot accuracy by the tasks of lm-evaluation-harness, an optional package: `hifiprune[tasks]`."""

import math
import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hifiprune.bounds import COUNT, check_number
from hifiprune.config.evaluate import Tasks
from hifiprune.engine.context import check_vocabulary
from hifiprune.evaluation.bootstrap import bootstrap_average
from hifiprune.evaluation.lm_eval_harness import (
    as_it_is,
    built_once,
    explained,
    files_explained,
    find_tasks,
    harness_quiet,
    seeded,
)
from hifiprune.evaluation.loglikelihood import Request, likelihoods
from hifiprune.io.hashing import hash_texts
from hifiprune.progress import track
from hifiprune.results import Estimate

METRICS = ("acc_norm", "acc", "pct_stereotype", "")
"""A task's main metric is the first of these that it has, or else its first metric: as the papers report the ten."""


def check_tasks(tasks: Tasks) -> None:
    """Check the task names before a model is loaded; takes about 20 seconds if a name is not in `include_path`.

    Raises:
        UserError: the harness is not installed, the folder does not exist, or a task is unknown or named twice.
    """
    find_tasks(tasks.names, tasks.include_path)


@dataclass(frozen=True)
class Answers:
    """A model's result on a task.

    Attributes:
        accuracy: the task's main metric, plus and minus 1.96 of the harness's standard errors where it has one (not
            clipped to 0 and 1).
        items: the metric of every item, if the task's is their mean; empty for a group.
    """

    accuracy: Estimate
    items: tuple[float, ...] = ()


class TaskRunner:
    """Zero-shot tasks of lm-evaluation-harness, loaded once and run on one model after another.

    Prompts longer than the context length lose their beginning. Log-probabilities are float32 whatever the model's
    dtype; the harness's command line keeps that dtype, and in bfloat16 the answers to a question often tie.
    """

    def __init__(self, tasks: Tasks):
        """Read the tasks' data, and build every prompt.

        Raises:
            UserError: as `Tasks.check`; or a task cannot be used.
            RunError: the data of a task cannot be had.
        """
        manager = find_tasks(tasks.names, tasks.include_path)
        self.tasks = tasks
        with harness_quiet(), seeded(), explained(tasks.names), files_explained(tasks.names):
            self._loaded = manager.load(list(tasks.names))
            self._drawn = {name: _drawn(len(task.eval_docs), tasks) for name, task in self._tasks.items()}
            for name, task in self._tasks.items():
                task.set_config("num_fewshot", 0)
                built_once(task, self._drawn[name])

    @property
    def _tasks(self) -> dict[str, Any]:
        tasks: dict[str, Any] = self._loaded["tasks"]
        return tasks

    @cached_property
    def prompts(self) -> list[str]:
        """Return the prompts, each with its answer."""
        return ["".join(map(str, each.args)) for task in self._tasks.values() for each in task.instances]

    @cached_property
    def identity(self) -> str:
        """Hash the tasks, prompts, and correct answers."""
        asked = [(name, task.eval_docs[number]) for name, task in self._tasks.items() for number in self._drawn[name]]
        answers = [f"{name}: {self._tasks[name].doc_to_target(item)}" for name, item in asked]
        return hash_texts([*self._tasks, *self.prompts, *answers])

    @property
    def items(self) -> dict[str, tuple[int, int]]:
        """Return for each task the number of items that are used, and the number it has."""
        return {name: (len(self._drawn[name]), len(task.eval_docs)) for name, task in self._tasks.items()}

    def ask(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
    ) -> dict[str, Answers]:
        """Run all tasks on a model and return the main metric of each.

        Args:
            model: model to evaluate, on its present device; it is not changed.
            tokenizer: its tokenizer.
            batch_size: prompts per step.

        Returns:
            answers for each `task/metric`, such as `piqa/acc_norm`.

        Raises:
            UserError: the batch size or a task cannot be used.
            RunError: memory ran out.
        """
        check_number("batch-size", batch_size, COUNT)
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        with harness_quiet(), seeded(), as_it_is(model), explained(self.tasks.names, batch_size):
            # the tokenizer gets a padding token, hence the copy
            asked = HFLM(
                model, "causal", tokenizer=deepcopy(tokenizer), batch_size=batch_size, softmax_dtype="float32",
                trust_remote_code=False,
            )  # fmt: skip
            done = track(range(sum(len(task.instances) for task in self._tasks.values())), "asking")
            answer: Any = asked._model_call
            vocabulary = model.config.get_text_config().vocab_size

            def count(prompts: int) -> None:
                for _ in range(prompts):
                    next(done, None)

            def counted(rows: torch.Tensor, *rest: Any, **more: Any) -> Any:
                check_vocabulary(int(rows.max()), vocabulary)
                count(len(rows))
                return answer(rows, *rest, **more)

            def continued(requests: list[Request], *_: Any, **__: Any) -> list[tuple[float, bool]]:
                check_vocabulary(max(max(*text, *answer) for _, text, answer in requests), vocabulary)
                return likelihoods(model, requests, longest=asked.max_length, batch_size=batch_size, done=count)

            asked._model_call = counted
            if model.device.type == "cpu":  # where tokens take the time, not steps
                asked._loglikelihood_tokens = continued
            # a task's metrics that are not means are resampled even when they are not the main one
            found = evaluate(asked, self._loaded, samples=self._drawn, bootstrap_iters=1000)
            for _ in done:  # prompts that shared a step
                pass
        samples = found["samples"]
        return dict(
            named
            for name, metrics in found["results"].items()
            for named in _main_metric(name, metrics, samples.get(name, []))
        )


def zero_shot(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, *, batch_size: int = 8
) -> dict[str, Estimate]:
    """Run zero-shot tasks on one model and return the main metric of each; see `TaskRunner`."""
    answers = TaskRunner(tasks).ask(model, tokenizer, batch_size=batch_size)
    return {name: each.accuracy for name, each in answers.items()}


def average(answers: dict[str, Answers]) -> Estimate | None:
    """Average over tasks, plus and minus 1.96 standard errors; None if no metric is a mean of items."""
    each = [found.accuracy for found in answers.values() if found.items]
    if not each:
        return None
    value = sum(estimate.value for estimate in each) / len(each)
    if any(estimate.high is None for estimate in each):
        return Estimate(value, None, None)
    margin = math.sqrt(
        sum((estimate.high - estimate.value) ** 2 for estimate in each if estimate.high is not None)
    ) / len(each)
    return Estimate(value, value - margin, value + margin)


def differences(answers: dict[str, Answers], reference: dict[str, Answers]) -> dict[str, Estimate]:
    """Compute the difference between two models in every task, and on average under the name `average`.

    Both answered the same items, so differences are taken item by item; the 95% intervals are percentiles of a
    bootstrap over the items of each task.
    """
    pairs = {name: (found.items, reference[name].items) for name, found in answers.items() if found.items}
    gains = {name: torch.tensor(ours) - torch.tensor(theirs) for name, (ours, theirs) in pairs.items()}
    found = {name: bootstrap_average([gain]) for name, gain in gains.items()}
    return found | ({"average": bootstrap_average(list(gains.values()))} if gains else {})


def _drawn(count: int, tasks: Tasks) -> list[int]:
    """Return the indices of the items to use: a random sample, in order, or all."""
    return sorted(random.Random(tasks.seed).sample(range(count), min(count, tasks.limit or count)))


def _main_metric(
    name: str, metrics: dict[str, Any], samples: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, Answers]]:
    """Pick the metric to report, if any, from the harness's `metric,filter` and `metric_stderr,filter`."""
    keys = [key for key in metrics if "," in key and "_stderr," not in key]
    wanted = [key for metric in METRICS for key in keys if key.startswith(f"{metric}," if metric else "")]
    for key in wanted[:1]:
        metric, _, filtered = key.partition(",")
        value, error = float(metrics[key]), metrics.get(f"{metric}_stderr,{filtered}")
        # the error of a single item is "N/A"
        margin = 1.96 * float(error) if isinstance(error, int | float) else None
        interval = (None, None) if margin is None else (value - margin, value + margin)
        items = [each[metric] for each in samples if each["filter"] == filtered]
        means = all(isinstance(each, int | float) for each in items) and items
        items = items if means and math.isclose(sum(items) / len(items), value, abs_tol=1e-9) else []
        yield f"{name}/{metric}", Answers(Estimate(value, *interval), tuple(map(float, items)))
