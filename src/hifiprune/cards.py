"""The model card that every output carries: `README.md` in the hub's format, with what was done and measured."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hifiprune.announcements import accuracies, asked_of, width_range, with_error, with_interval
from hifiprune.checkpoint import Checkpoint
from hifiprune.discovery import family_of
from hifiprune.errors import UserError
from hifiprune.evaluation.fidelity import METRICS
from hifiprune.lineage import pruning_of
from hifiprune.output import replacing

CARD, TAG = "README.md", "hifiprune"
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What a card takes over from that of its base."""
START, END = "<!-- measured by hifiprune -->", "<!-- end of what was measured -->"
PART = re.compile("<!-- (text|tasks) -->\n(.*?)\n(?=<!-- )", re.DOTALL)
"""What was measured on a text, or by tasks, between those."""
UNMEASURED = "Nothing has been measured yet: `hifiprune evaluate DIR --against DENSE --text FILE --card` does."
LIMITS = (
    "On texts, tasks and languages that were not measured the loss may be larger. An estimate from the entropy of "
    "predictions, or from any other score, guarantees nothing about the predictions themselves: what is known of them "
    "is what was measured, above. All limits of the base model remain, and so does its licence."
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


def add_results(folder: Path, name: str, results: dict[str, Any], text: str | None) -> None:
    """Put what `evaluate` found for a model into its card, as text and as the hub's `model-index`.

    What was measured before on a text stays if only tasks were asked now, and the other way round.

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
    fresh = {"text": "metrics" in row, "tasks": "tasks" in row}
    kept = [each for each in data.eval_results or [] if not fresh["text" if each.dataset_type == "text" else "tasks"]]
    data.eval_results = [*kept, *_listed(row, results, source)]
    parts = dict(PART.findall(card.text)) | dict(_tables(row, results, source))
    lines = [START, *(f"<!-- {kind} -->\n{part}" for kind, part in sorted(parts.items(), reverse=True)), END]
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
        text, scoring = arguments["calibration"], results["scoring"]
        read = "by weights alone"
        if "windows" in scoring:
            read = f"on {scoring['windows']} windows of {scoring['positions']} tokens"
        made = [
            f"- neurons scored by `{results['criterion']}` {read}, widths {arguments['sharing']['allocation']}",
            f"- output maps refitted in closed form on {text['num_samples']} windows of {text['seq_len']} tokens"
            if arguments["repair"] == "ridge"
            else "- output maps left as they were",
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
    family = family_of(Checkpoint(str(folder), folder).config())
    kind = "AutoModelForImageTextToText" if family.sees else "AutoModelForCausalLM"
    return (
        f"## How to use it\n\n{why}```python\nfrom transformers import {kind}, AutoTokenizer\n\n"
        f'model = {kind}.from_pretrained("DIR"{trust})\n'
        'tokenizer = AutoTokenizer.from_pretrained("DIR")\n```'
    )


def _listed(row: dict[str, Any], results: dict[str, Any], source: str) -> Iterator[EvalResult]:
    """Results as the hub's index lists them."""
    for metric, estimate in row.get("metrics", {}).items():
        if metric != "dense_perplexity":  # another model's
            yield EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=f"{source}, {results['windows']} windows of {results['positions']} tokens",
                metric_type=metric,
                metric_name=METRICS[metric][0],
                metric_value=estimate["value"],
            )
    for key, estimate in row.get("tasks", {}).items():
        task, _, metric = key.partition("/")
        size = asked_of(results["items"], task)
        yield EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=f"{task}, zero-shot" + (f", {size} items" if size else ""),
            metric_type=metric,
            metric_value=estimate["value"],
        )


def _tables(row: dict[str, Any], results: dict[str, Any], source: str) -> Iterator[tuple[str, str]]:
    """Results for a reader, by kind."""
    if "metrics" in row:
        lines = [f"On {results['windows']} windows of {results['positions']} tokens of {source}, with 95% intervals:\n"]
        lines += ["| metric | value | |\n|---|---|---|"]
        for metric, estimate in row["metrics"].items():
            title, meaning = (text.replace("|", "\\|") for text in METRICS[metric][:2])  # a bar would end the cell
            lines.append(f"| {title} | {with_interval(estimate, '.4g')} | {meaning} |")
        yield "text", "\n".join([*lines, ""])
    if "tasks" in row:
        reference = Path(results["reference"]).name
        lines = [f"Zero-shot, no examples in the prompt; with standard errors, and the difference to `{reference}`:\n"]
        lines += ["| task | items | accuracy | difference |\n|---|---|---|---|"]
        for key, estimate in accuracies(row).items():
            gain, size = row.get("differences", {}).get(key), asked_of(results["items"], key.partition("/")[0])
            difference = with_interval(gain, "+.3f") if gain else ""
            lines.append(f"| {key} | {size} | {with_error(estimate)} | {difference} |")
        yield "tasks", "\n".join([*lines, ""])
