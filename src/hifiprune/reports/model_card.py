"""Write model cards: `README.md` in the hub's format, with pruning steps and results."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hifiprune.errors import UserError
from hifiprune.evaluation.fidelity import METRICS
from hifiprune.formatting import format_accuracy, format_interval, format_items, repaired, width_range
from hifiprune.io.atomic import replacing, update_manifest
from hifiprune.io.manifest import is_unchanged
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.detect import family_of
from hifiprune.models.lineage import record_of
from hifiprune.progress import note
from hifiprune.records import PruneRun, RecoverRun
from hifiprune.reports.card_metadata import CARD, TAG, base_metadata, called, ours, plain, read_card
from hifiprune.results import EvaluateResults, Measured
from hifiprune.version import __version__

START, END = "<!-- measured by hifiprune -->", "<!-- end of what was measured -->"
MEASURED = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
PART = re.compile("<!-- (text|tasks) -->\n(.*?)\n(?=<!-- )", re.DOTALL)
"""Matches the results on a text, or of tasks, in a card."""
UNMEASURED = "Nothing has been measured yet"
LOADED = re.compile(r'from_pretrained\("(?:[^"\\]|\\.)*"')
"""Matches the loading call in a card's code."""
LIMITS = (
    "On texts, tasks and languages that were not measured the loss may be larger. An estimate from the entropy of "
    "predictions, or from any other score, guarantees nothing about the predictions themselves: what is known of them "
    "is what was measured, above. All limits of the base model remain, and so does its licence."
)


@dataclass(frozen=True)
class Story:
    """How a checkpoint was made, in Markdown.

    Attributes:
        summary: one paragraph on the result.
        steps: steps in order, one list item each.
    """

    summary: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Base:
    """The base model, as a card describes it.

    Attributes:
        name: display name of the model.
        metadata: inherited metadata.
        story: how hifiprune made that model, if it did.
    """

    name: str
    metadata: dict[str, Any]
    story: Story | None = None


def describe_base(checkpoint: Checkpoint) -> Base:
    """Read what a card will need of the base model, before the work: no file of it can fail the run afterwards.

    Args:
        checkpoint: the base model.
    """
    story = None
    try:
        record = record_of(checkpoint)
        story = _story(record) if record else None
    except UserError:
        note(f"run.json of {checkpoint.name} does not say how it was made: the output's card will not either.")
    name = checkpoint.name if checkpoint.on_hub else str(checkpoint.path)
    return Base(called(name), base_metadata(checkpoint), story)


def write_card(folder: Path, base: Base, name: str) -> None:
    """Write the card of a checkpoint.

    Args:
        folder: of the checkpoint, with the record of the run that made it.
        base: the model that it was made from.
        name: of the checkpoint.
    """
    facts: dict[str, Any] = {"pipeline_tag": "text-generation", "model_name": name} | base.metadata
    code = ["custom_code"] if (folder / "modeling_pruned.py").is_file() else []
    data = ModelCardData(library_name="transformers", tags=[TAG, "pruned", *code], **facts)
    record = record_of(Checkpoint(str(folder), folder))
    assert record
    story = _story(record, base)
    parts = [
        f"# {plain(name)}",
        story.summary,
        "## How it was made",
        "\n".join(f"- {step}" for step in story.steps),
        f"`run.json` holds all arguments, versions and hashes (hifiprune {__version__}).",
        "## What was measured",
        f"{START}\n{UNMEASURED}: `hifiprune evaluate` with `--card` puts results here.\n{END}",
        _use(folder, name),
        "## Limits",
        LIMITS,
    ]
    text = "\n\n".join(parts)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(folder / CARD)


def for_repository(card: ModelCard, repository: str) -> str:
    """Return the content of a card whose code loads the model from the hub."""
    card.text = LOADED.sub(lambda _: f'from_pretrained("{repository}"', card.text)
    return str(card.content)


def is_measured(card: ModelCard) -> bool:
    """Return whether the card of one of our checkpoints holds results."""
    return UNMEASURED not in card.text


def check_cards(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints whose card is not ours to change.

    Raises:
        UserError: one is on the hub, has no card, or that of somebody else's model.
    """
    for checkpoint in checkpoints:
        if checkpoint.on_hub:
            raise UserError(f"{checkpoint.name} is on the hub: --card changes the cards of folders on this disk")
        card = read_card(checkpoint.folder)
        if card is None or not ours(card):
            raise UserError(f"{checkpoint.name} has no {CARD} of a checkpoint that hifiprune made; leave out --card")
        try:
            str(card.content)
        except Exception as error:  # whatever the hub's library raises of metadata that it cannot write again
            raise UserError(
                f"{CARD} of {checkpoint.name} has metadata that cannot be written again: {error}"
            ) from error


def add_results(folder: Path, name: str, results: EvaluateResults, text: str | None) -> None:
    """Add the results of `evaluate` to a model's card, as text and as the hub's `model-index`.

    Earlier results on a text stay if only tasks were run now, and the other way round.

    Args:
        folder: checkpoint directory.
        name: name of the model in the results.
        results: results of the run.
        text: text that was measured on.
    """
    card, unchanged = read_card(folder), is_unchanged(folder, CARD)
    assert card is not None
    row, source = results.models[name], plain(Path(text).name) if text else ""
    data: Any = card.data
    data.model_name = data.get("model_name") or folder.name
    fresh = {"text": bool(row.metrics), "tasks": bool(row.tasks)}
    kept = [each for each in data.eval_results or [] if not fresh["text" if each.dataset_type == "text" else "tasks"]]
    data.eval_results = [*kept, *_listed(row, results, source)]
    parts = dict(PART.findall(card.text)) | dict(_tables(row, results, source))
    lines = [START, *(f"<!-- {kind} -->\n{part}" for kind, part in sorted(parts.items(), reverse=True)), END]
    measured = "\n".join(lines)
    body, replaced = MEASURED.subn(lambda _: measured, card.text, count=1)
    body = body if replaced else f"{body}\n\n{measured}\n"
    with replacing(folder / CARD) as temporary:
        ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(temporary)
    if unchanged:
        update_manifest(folder, CARD)


def _story(record: PruneRun | RecoverRun, base: Base | None = None) -> Story:
    """Return how the run of a record made its checkpoint, told from the dense model on.

    Args:
        record: of `prune` or `recover`.
        base: the model that it started from; if not given, what the record itself says of it.
    """
    name = base.name if base else called(record.arguments.model)
    if isinstance(record, PruneRun):
        return _pruned(record, name)
    before = record.results.pruning
    story = base.story if base else _story(before) if before else None
    if story:
        return Story(story.summary, (*story.steps, f"then trained: {_trained(record)}"))
    return Story(f"`{name}`, trained by hifiprune.", (f"trained: {_trained(record)}",))


def _pruned(record: PruneRun, name: str) -> Story:
    """Return how a model of this name was pruned."""
    arguments, results, text = record.arguments, record.results, record.arguments.calibration
    read = "by weights alone"
    if "windows" in results.scoring:
        read = f"on {results.scoring['windows']:,} windows of {results.scoring['positions']:,} tokens"
    return Story(
        f"`{name}` with {results.ratio.reached:.1%} of its parameters pruned (MLP neurons, by hifiprune). "
        f"{results.parameters.before:,} parameters became {results.parameters.after:,}, MLP width "
        f"{results.width.before:,} became {width_range(results.width.after)}.",
        (
            f"neurons scored by `{plain(results.criterion)}` {read}, widths {plain(arguments.method)}",
            f"{repaired(arguments.repair)} on {text.num_samples:,} windows of {text.seq_len:,} tokens"
            if arguments.repair != "none" and text
            else "no repair",
        ),
    )


def _trained(record: RecoverRun) -> str:
    """Return how a run of `recover` trained, and which state it wrote."""
    training, results = record.arguments.training, record.results
    how = "all weights" if training.method == "full" else f"low-rank changes of rank {training.lora_r:,}"
    target = "the dense model's predictions" if training.distill_weight or training.match_hidden else "labels"
    steps = f"{how} on {target}, {results.steps:,} steps"
    if results.best_step == 0:
        return f"{steps}, none of which was better than the start: the weights are as they were before"
    perplexity = results.held_out_perplexity
    return (
        f"{steps}, the best state that of step {results.best_step:,}; perplexity of held-out rows "
        f"{perplexity.before:.4g} before and {perplexity.after:.4g} after"
    )


def _use(folder: Path, name: str) -> str:
    """Return how it is loaded, by its name until it has one on the hub."""
    mixed = (folder / "modeling_pruned.py").is_file()
    why = "Its layers differ in width, so it carries a modeling file of its own.\n\n" if mixed else ""
    trust = ", trust_remote_code=True" if mixed else ""
    family = family_of(Checkpoint(str(folder), folder).config())
    kind = "AutoModelForImageTextToText" if family.takes_images else "AutoModelForCausalLM"
    where = json.dumps(name, ensure_ascii=False)
    return (
        f"## How to use it\n\n{why}```python\nfrom transformers import {kind}, AutoTokenizer\n\n"
        f"model = {kind}.from_pretrained({where}{trust})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({where})\n```"
    )


def _listed(row: Measured, results: EvaluateResults, source: str) -> Iterator[EvalResult]:
    """Yield results in the form of the hub's index."""
    for metric, estimate in (row.metrics or {}).items():
        if metric != "dense_perplexity":  # another model's
            yield EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=f"{source}, {results.windows} windows of {results.positions} tokens",
                metric_type=metric,
                metric_name=METRICS[metric][0],
                metric_value=estimate.value,
            )
    for key, accuracy in (row.tasks or {}).items():
        task, _, metric = key.partition("/")
        size = format_items(results.items or {}, task)
        yield EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=f"{task}, zero-shot" + (f", {size} items" if size else ""),
            metric_type=metric,
            metric_value=accuracy.value,
        )


def _tables(row: Measured, results: EvaluateResults, source: str) -> Iterator[tuple[str, str]]:
    """Yield result tables with their kind."""
    if row.metrics:
        lines = [f"On {results.windows} windows of {results.positions} tokens of {source}, with 95% intervals:\n"]
        lines += ["| metric | value | |\n|---|---|---|"]
        for metric, estimate in row.metrics.items():
            title, meaning = (text.replace("|", "\\|") for text in METRICS[metric][:2])  # a bar would end the cell
            lines.append(f"| {title} | {format_interval(estimate, '.4g')} | {meaning} |")
        yield "text", "\n".join([*lines, ""])
    if row.tasks:
        reference = plain(Path(results.reference or "").name)
        lines = [f"Zero-shot, no examples in the prompt; with standard errors, and the difference to `{reference}`:\n"]
        lines += ["| task | items | accuracy | difference |\n|---|---|---|---|"]
        for key, accuracy in row.accuracies.items():
            gain, size = (row.differences or {}).get(key), format_items(results.items or {}, key.partition("/")[0])
            difference = format_interval(gain, "+.3f") if gain else ""
            lines.append(f"| {key} | {size} | {format_accuracy(accuracy)} | {difference} |")
        yield "tasks", "\n".join([*lines, ""])
