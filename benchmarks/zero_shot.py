"""Zero-shot accuracy on the ten tasks of the papers: SmolLM2-135M-Instruct, dense, pruned by 20%, and recovered.

Pruned by HFPrune's exact method, by `prune` without flags but `--round-to 1`, and by the best training-free setting, on
the same 41 windows of C4; recovered as far as `recovery.py` has got. Differences to the dense model are taken item by
item. Writes `results/zero_shot.json`. Takes hours on 2 cores; interrupted, it goes on with the next task.
"""

import argparse
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

import hifiprune as hp
from hifiprune.cli.console import speaking
from hifiprune.commands.demo import fetch_smollm2
from hifiprune.config import AllocationConfig
from hifiprune.config.evaluate import Tasks
from hifiprune.evaluation.zero_shot_tasks import Answers, TaskRunner, average, differences
from hifiprune.io.atomic import replacing
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.progress import labelled
from hifiprune.results import Estimate

ROOT = Path(__file__).parent.parent
PACK = ROOT.parent / "shared" / "evals" / "tasks"
SHORT, LONG = 200, 100
"""Items of most tasks, and of those with long prompts."""
ITEMS = {
    "hp_arc_easy": SHORT,
    "hp_arc_challenge": SHORT,
    "hp_boolq": SHORT,
    "hp_crows_pairs": SHORT,
    "hp_openbookqa": SHORT,
    "hp_piqa": SHORT,
    "hp_race_middle": LONG,
    "hp_social_iqa": SHORT,
    "hp_truthfulqa_mc2": LONG,
    "hp_winogrande": SHORT,
}
BUDGET, CALIBRATION = hp.Budget(ratio=0.2), hp.Calibration(str(ROOT.parent / "shared/data/c4/c4_documents.jsonl"), 41)
RECOVERED = ROOT / ".cache" / "recovery-30"
PRUNED = {
    "hfprune": hp.PruneConfig(BUDGET, CALIBRATION, preset="hfprune"),
    "entropy-square, repaired": hp.PruneConfig(BUDGET, CALIBRATION, round_to=1),
    "fisher, global, repaired": hp.PruneConfig(BUDGET, CALIBRATION, allocation=AllocationConfig("global"), round_to=1),
}


def main() -> None:
    """Run or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(ITEMS), choices=list(ITEMS))
    parser.add_argument("--models", nargs="+", help="of those that there are; all if not given")
    asked = parser.parse_args()
    folder = ROOT / ".cache" / "zero-shot"
    dense = fetch_smollm2(ROOT / ".cache" / "smollm2")
    models = {"dense": dense} | {name: folder / name.replace(", ", "-") for name in PRUNED}
    models["fisher, global, repaired"] = RECOVERED / "pruned-0.2"  # the same
    models |= {
        f"recovered: {path.stem.removeprefix('20-')}": path.with_suffix("") for path in RECOVERED.glob("20-*d.json")
    }
    names = asked.models or list(models)
    answers: dict[str, dict[str, Answers]] = {name: {} for name in names}
    for task in asked.tasks:
        for name in names:
            path = folder / f"{task}-{ITEMS[task]}-{name.replace(', ', '-').replace(' ', '-').replace(':', '')}.json"
            if not path.is_file():
                made = {key: asdict(each) for key, each in ask(task, build(name, dense, models[name])).items()}
                with replacing(path) as temporary:
                    temporary.write_text(json.dumps(made))
            for key, each in json.loads(path.read_text()).items():
                answers[name][key] = Answers(Estimate(**each["accuracy"]), tuple(each["items"]))
                Console().print(f"{key} {name}: {answers[name][key].accuracy}", highlight=False)
    rows = {}
    for name, own in answers.items():
        mean = average(own)
        assert mean is not None, "all of these have accuracies of items"
        rows[name] = {key: asdict(each.accuracy) for key, each in own.items()} | {"average": asdict(mean)}
        if name != "dense" and "dense" in answers:
            gains = differences(own, answers["dense"])
            rows[name] = {key: row | {"to_dense": asdict(gains[key])} for key, row in rows[name].items()}
    facts = {"items": {task: ITEMS[task] for task in asked.tasks}, "models": rows}
    (ROOT / "benchmarks" / "results" / "zero_shot.json").write_text(json.dumps(facts, indent=1) + "\n")


def build(name: str, dense: Path, folder: Path) -> Path:
    """A checkpoint, pruned now if it was not before."""
    if name in PRUNED and not folder.exists():
        hp.prune(str(dense), folder, PRUNED[name])
    return folder


def ask(task: str, folder: Path) -> dict[str, Answers]:
    """What a model answers."""
    model, checkpoint = loaded(folder), find_checkpoint(str(folder))
    with labelled(f"asking {folder.name}: {task}"):
        return exam(task).ask(model, checkpoint.tokenizer())


@cache
def exam(task: str) -> TaskRunner:
    """The items that every model is asked."""
    return TaskRunner(Tasks((task,), PACK, ITEMS[task]))


@cache
def loaded(folder: Path) -> PreTrainedModel:
    """In float32; all of them fit into memory."""
    return find_checkpoint(str(folder)).load(torch.float32)


def table(facts: dict[str, Any]) -> str:
    """Results as Markdown: accuracy in percent, and the difference to the dense model with its 95% interval."""
    names = [*facts["models"]]
    lines = [f"| | {' | '.join(names)} |", "|" + "---|" * (1 + len(names))]
    for key in facts["models"][names[0]]:
        cells = [_cell(facts["models"][name][key]) for name in names]
        lines.append(f"| {key.removeprefix('hp_')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    value = f"{100 * row['value']:.1f}"
    if "to_dense" not in row:
        return value
    low, high = (100 * row["to_dense"][end] for end in ("low", "high"))
    return f"{value} ({low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    with speaking():
        main()
