"""Zero-shot accuracy by the tasks of lm-evaluation-harness, an optional package: `hifiprune[tasks]`."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hifiprune.errors import UserError
from hifiprune.evaluation.harness import as_it_is, explained, find_tasks, quiet, seeded
from hifiprune.evaluation.intervals import Estimate


@dataclass(frozen=True)
class Tasks:
    """Which tasks to run; see `zero_shot`."""

    names: Sequence[str]
    include_path: str | Path | None = None
    limit: int | None = None


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, Estimate]:
    """The main metric of each task without examples in the prompt, by lm-evaluation-harness, in silence.

    A task's main metric is `acc_norm` where it has that, else `acc`, else its first. The interval is 1.96 of the
    harness's standard errors to each side of the value, with nothing to keep it between 0 and 1. Prompts longer than
    the model's positions lose their beginning. Log-probabilities are float32 whatever the model's dtype; the harness's
    command line keeps that dtype, and in bfloat16 the answers of a question often tie.

    Args:
        model: the model, measured where it is and as it is, and left so.
        tokenizer: its tokenizer.
        tasks: names of tasks, groups or tags; of a group its own value, if it defines one, and that of every task.
        include_path: folder of task files, which come before the harness's own tasks.
        limit: only the first items of each task.
        batch_size: prompts per step.

    Returns:
        an estimate for each `task/metric`, such as `piqa/acc_norm`; without interval where the harness has no error.

    Raises:
        UserError: as `check_tasks`; or the limit, the batch size or a task cannot be used.
        RunError: the data of a task cannot be had, or memory ran out.
    """
    for name, number in (("limit", limit), ("batch size", batch_size)):
        if number is not None and number < 1:
            raise UserError(f"{name} {number} must be at least 1")
    manager = find_tasks(tasks, include_path)
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with quiet(), seeded(), as_it_is(model), explained(tasks, batch_size):
        loaded = manager.load(list(tasks))
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", 0)
        # the tokenizer gets a padding token, hence the copy
        wrapped = HFLM(model, "causal", tokenizer=deepcopy(tokenizer), batch_size=batch_size, softmax_dtype="float32")
        # a task's metrics that are not means are resampled even when they are not the main one
        results = evaluate(wrapped, loaded, limit=limit, bootstrap_iters=1000, log_samples=False)["results"]
    return dict(estimate for name, metrics in results.items() for estimate in _main_metric(name, metrics))


def check_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> None:
    """Fail before a model is loaded; takes some 20 seconds if a name is not found in `include_path`.

    Raises:
        UserError: the harness is not installed, the folder does not exist, or a task is unknown or named twice.
    """
    find_tasks(tasks, include_path)


def _main_metric(name: str, metrics: dict[str, Any]) -> Iterator[tuple[str, Estimate]]:
    """The one metric to report, if there is any, from the harness's `metric,filter` and `metric_stderr,filter`."""
    keys = [key for key in metrics if "," in key and "_stderr," not in key]
    wanted = [key for metric in ("acc_norm,", "acc,", "") for key in keys if key.startswith(metric)]
    for key in wanted[:1]:
        value, error = float(metrics[key]), metrics.get(key.replace(",", "_stderr,", 1))
        # the error of a single item is "N/A"
        margin = 1.96 * float(error) if isinstance(error, int | float) else None
        interval = () if margin is None else (value - margin, value + margin)
        yield f"{name}/{key.partition(',')[0]}", Estimate(value, *interval)
