"""What repair costs beside scoring and a plain forward pass, on SmolLM2-135M and windows of 1,024 tokens.

Each part is run on few and on more windows, interleaved over the rounds in one process: the difference is its time a
window, which grows with the text; the rest, solving for the projections, does not. Writes `results/repair.json`.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hifiprune as hp
from hifiprune.commands.demo import fetch_smollm2
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.pruning.repair import cut_and_repair_
from hifiprune.run_record import describe_environment

ROOT = Path(__file__).parent.parent
FEW, MORE, POSITIONS, ROUNDS = 2, 4, 1024, 2
RATIO = 0.2


def main() -> None:
    """Measure all parts, print the ratios, write the result."""
    checkpoint = find_checkpoint(str(fetch_smollm2(ROOT / ".cache" / "smollm2")))
    calibration = hp.Calibration("python-docs", MORE, POSITIONS, sampler="stream")
    windows = hp.load_windows(calibration, checkpoint.tokenizer())
    scores = hp.score(checkpoint.load(torch.float32), windows[:FEW])
    plan = hp.allocate(scores, hp.Budget(ratio=RATIO), round_to=1)

    def forward(model: PreTrainedModel, tokens: Tensor) -> None:
        with torch.no_grad():
            for window in tokens.split(1):
                model(input_ids=window, use_cache=False)

    parts: dict[str, Callable[[PreTrainedModel, Tensor], Any]] = {
        "forward": forward,
        "scoring": lambda model, tokens: hp.score(model, tokens, recompute=False),
        "sequential repair": lambda model, tokens: cut_and_repair_(model, plan, tokens),
        "parallel repair": lambda model, tokens: cut_and_repair_(model, plan, tokens, sequential=False),
    }
    seconds: dict[str, dict[int, list[float]]] = {name: {FEW: [], MORE: []} for name in parts}
    for number in range(ROUNDS):
        for name, part in parts.items():
            for count in (FEW, MORE):
                fresh = checkpoint.load(torch.float32)
                start = time.perf_counter()
                part(fresh, windows[:count])
                seconds[name][count].append(time.perf_counter() - start)
            print(f"round {number + 1}, {name}: {seconds[name][MORE][-1]:.1f} s for {MORE} windows")
    results = {}
    for name, measured in seconds.items():
        few, more = (median(measured[count]) for count in (FEW, MORE))
        window = (more - few) / (MORE - FEW)
        results[name] = {"seconds_per_window": window, "seconds_once": few - FEW * window}
    for result in results.values():
        result["to_forward"] = result["seconds_per_window"] / results["forward"]["seconds_per_window"]
        result["to_scoring"] = result["seconds_per_window"] / results["scoring"]["seconds_per_window"]
    facts = {"model": "SmolLM2-135M-Instruct", "positions": POSITIONS, "ratio": RATIO, "rounds": ROUNDS}
    document = {**facts, "environment": describe_environment(), "results": results, "seconds": seconds}
    (ROOT / "benchmarks" / "results" / "repair.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
