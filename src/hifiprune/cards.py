"""The model card that every output carries: `README.md` in the hub's format, with what was done and measured."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hifiprune.announcements import accuracies, width_range, with_interval
from hifiprune.checkpoint import Checkpoint
from hifiprune.errors import UserError
from hifiprune.evaluation.fidelity import METRICS
from hifiprune.lineage import pruning_of
from hifiprune.output import replacing

CARD, TAG = "README.md", "hifiprune"
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What a card takes over from that of its base."""
START, END = "<!-- measured by hifiprune -->", "<!-- end of what was measured -->"
UNMEASURED = "Nothing has been measured yet: `hifiprune evaluate DIR --against DENSE --text FILE --card` does."
LIMITS = (
    "What was removed changed the model's predictions least, as estimated on the calibration text. On other texts, "
    "tasks and languages the loss may be larger. An estimate from the entropy of predictions, or from any other score, "
    "guarantees nothing about the predictions themselves: what is known of them is what was measured, above. All "
    "limits of the base model remain, and so does its licence."
)


def write_card(folder: Path, record: dict[str, Any], base: Checkpoint, name: str) -> None:
    """Write the card of a checkpoint.

    Args:
        folder: of the checkpoint.
        record: of the run that made it, as plain data.
        base: the checkpoint that it was made from.
        name: of the checkpoint.
    """
    before = read_card(base.folder) if not base.gguf else None
    carried = {key: found for key in CARRIED if before and (found := before.data.get(key))}
    origin = base.name if base.on_hub else before.data.get("base_model") if before and ours(before) else None
    facts: dict[str, Any] = {"pipeline_tag": "text-generation", "base_model": origin, "model_name": name} | carried
    code = ["custom_code"] if (folder / "modeling_pruned.py").is_file() else []
    data = ModelCardData(library_name="transformers", tags=[TAG, "pruned", *code], **facts)
    text = "\n\n".join([f"# {name}", *_story(record, str(origin or base.path.name)), _use(folder), "## Limits", LIMITS])
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(folder / CARD)


def read_card(folder: Path) -> ModelCard | None:
    """The card in a folder, if there is one that can be read."""
    try:
        return ModelCard((folder / CARD).read_text(), ignore_metadata_errors=True)
    except (OSError, ValueError):
        return None


def ours(card: ModelCard) -> bool:
    """Whether it is that of a checkpoint that we made."""
    return TAG in (card.data.get("tags") or [])


def check_cards(folders: Sequence[Path]) -> None:
    """Refuse folders whose card is not ours to change.

    Raises:
        UserError: one has no card, or that of somebody else's model.
    """
    for folder in folders:
        card = read_card(folder)
        if card is None or not ours(card):
            raise UserError(f"{folder} has no {CARD} of a checkpoint that hifiprune made; leave out --card")


def add_results(folder: Path, name: str, results: dict[str, Any], text: str | None) -> None:
    """Put what `evaluate` found for a model into its card, as text and as the hub's `model-index`.

    Args:
        folder: of the checkpoint.
        name: by which the results know it.
        results: of the run.
        text: that was measured on.
    """
    card = read_card(folder)
    assert card is not None
    row, source = results["models"][name], Path(text).name if text else ""
    data: Any = card.data
    data.model_name = data.get("model_name") or folder.name
    data.eval_results = [*_listed(row, source)]
    lines = [START, *_table(row, results, source), END]
    measured = "\n".join(lines)
    found = re.compile(f"{re.escape(START)}.*{re.escape(END)}", re.DOTALL)
    body = found.sub(lambda _: measured, card.text) if found.search(card.text) else f"{card.text}\n\n{measured}\n"
    with replacing(folder / CARD) as temporary:
        ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(temporary)


def _story(record: dict[str, Any], base: str) -> Iterator[str]:
    """How the checkpoint was made, and where what was measured goes."""
    pruning = pruning_of(record)
    if pruning:
        arguments, results = pruning["arguments"], pruning["results"]
        parameters, widths = results["parameters"], results["width"]
        yield (
            f"`{base}` without {results['ratio']['reached']:.1%} of its parameters: MLP neurons, removed by hifiprune. "
            f"{parameters['before']:,} parameters became {parameters['after']:,}, MLPs of width {widths['before']:,} "
            f"ones of {width_range(widths['after'])}."
        )
        calibration = arguments["calibration"]
        made = [
            f"- neurons scored by `{results['criterion']}`, widths {arguments['sharing']['allocation']}",
            f"- calibrated on {calibration['num_samples']} windows of {calibration['seq_len']} tokens"
            if calibration
            else "- without any text",
            f"- output maps {'refitted in closed form' if arguments['repair'] == 'ridge' else 'left as they were'}",
        ]
        if record["command"] == "recover":
            made.append(f"- then trained: {_trained(record)}")
        yield "## How it was made"
        yield "\n".join(made)
        version = record["environment"]["versions"][TAG]
        yield f"`run.json` holds all arguments, versions and hashes (hifiprune {version})."
    else:
        yield f"`{base}`, trained by hifiprune: {_trained(record)}."
    yield "## What was measured"
    yield f"{START}\n{UNMEASURED}\n{END}"


def _trained(record: dict[str, Any]) -> str:
    training, results = record["arguments"]["training"], record["results"]
    how = "all weights" if training["method"] == "full" else f"low-rank changes of rank {training['lora_r']}"
    target = "the dense model's predictions" if training["distill_weight"] or training["match_hidden"] else "labels"
    perplexity = results["held_out_perplexity"]
    return (
        f"{how} on {target}, {results['best_step']} steps; perplexity of held-out rows {perplexity['before']:.4g} "
        f"before and {perplexity['after']:.4g} after"
    )


def _use(folder: Path) -> str:
    """How it is loaded."""
    mixed = (folder / "modeling_pruned.py").is_file()
    why = "Its layers differ in width, so it carries a modeling file of its own.\n\n" if mixed else ""
    trust = ", trust_remote_code=True" if mixed else ""
    return (
        f"## How to use it\n\n{why}```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("DIR"{trust})\n'
        'tokenizer = AutoTokenizer.from_pretrained("DIR")\n```'
    )


def _listed(row: dict[str, Any], source: str) -> Iterator[EvalResult]:
    """Results as the hub's index lists them."""
    for metric, estimate in row.get("metrics", {}).items():
        yield EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=source,
            metric_type=metric,
            metric_name=METRICS[metric][0],
            metric_value=estimate["value"],
        )
    for key, estimate in row.get("tasks", {}).items():
        task, _, metric = key.partition("/")
        yield EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=f"{task}, zero-shot",
            metric_type=metric,
            metric_value=estimate["value"],
        )


def _table(row: dict[str, Any], results: dict[str, Any], source: str) -> Iterator[str]:
    """Results for a reader."""
    if "metrics" in row:
        yield f"On {results['windows']} windows of {results['positions']} tokens of {source}, with 95% intervals:\n"
        yield "| metric | value | |\n|---|---|---|"
        for metric, estimate in row["metrics"].items():
            yield f"| {METRICS[metric][0]} | {with_interval(estimate, '.4g')} | {METRICS[metric][1]} |"
        yield ""
    if "tasks" in row:
        yield "Zero-shot, no examples in the prompt; with standard errors, and the difference to the dense model:\n"
        yield "| task | accuracy | difference |\n|---|---|---|"
        for key, estimate in accuracies(row).items():
            gain = row.get("differences", {}).get(key)
            error = "" if estimate["standard_error"] is None else f" ± {estimate['standard_error']:.3f}"
            yield f"| {key} | {estimate['value']:.3f}{error} | {with_interval(gain, '+.3f') if gain else ''} |"
