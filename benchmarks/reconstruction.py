"""What training each block after the ridge is worth on SmolLM2-135M-Instruct, and what it costs.

Calibrated on C4, measured on WikiText-2 test (perplexity) and other documents of C4 (KL divergence from the dense
model). Writes `results/reconstruction.json`; a setting that is there already is not run again.
"""

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

import hifiprune as hp
from hifiprune.commands.demo import fetch_smollm2
from hifiprune.evaluation.fidelity import Reference, measure_windows
from hifiprune.evaluation.text import held_windows
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.pruning.reconstruct import Training
from hifiprune.pruning.repair import cut_and_repair_

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "reconstruction.json"


def main() -> None:
    """Run, or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--held-out", type=int, default=16, help="windows of 512 tokens to measure on, of each text")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 20, 60], help="0 is the ridge alone")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-4])
    parser.add_argument("--tokens", type=int, default=2048, help="of an optimizer step")
    parser.add_argument("--whole", action="store_true", help="train attention too")
    asked = parser.parse_args()
    folder = fetch_smollm2(ROOT / ".cache" / "smollm2")
    checkpoint = find_checkpoint(str(folder))
    tokenizer, console = checkpoint.tokenizer(), Console(width=140)
    source = hp.Calibration(str(DATA / "c4" / "c4_documents.jsonl"), asked.windows, asked.seq_len)
    windows = hp.load_windows(source, tokenizer)
    wikitext = held_windows(hp.Text(str(DATA / "wikitext-2" / "wiki.test.raw"), 512, asked.held_out), tokenizer)
    c4 = held_windows(hp.Text(str(DATA / "c4" / "c4_short.jsonl"), 512, asked.held_out), tokenizer)
    dense = checkpoint.load()
    reference = Reference.of(dense, c4)

    def measured(model: PreTrainedModel) -> dict[str, float]:
        loss = measure_windows(model, wikitext)["perplexity"].mean()
        return {"perplexity": math.exp(loss), "kl": float(measure_windows(model, c4, reference)["kl"].mean())}

    start = time.perf_counter()
    scores = hp.score(dense, windows)
    scoring = time.perf_counter() - start
    facts: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}
    shared = {name: vars(asked)[name] for name in ("windows", "seq_len", "ratio", "held_out")}
    for steps in asked.steps:
        for rate in asked.learning_rates if steps else asked.learning_rates[:1]:
            training = Training(steps, rate, asked.tokens, asked.whole) if steps else None
            setting = shared | {"training": training and asdict(training)}
            if any({name: row[name] for name in setting} == setting for row in facts["rows"]):
                continue
            model = checkpoint.load()
            plan = hp.allocate(scores, hp.Budget(ratio=asked.ratio), round_to=1)
            start = time.perf_counter()
            repair = cut_and_repair_(model, plan, windows, training=training)
            seconds = time.perf_counter() - start
            blocks = repair.reconstructions
            left = sum(block.error / block.before for block in blocks) / len(blocks) if blocks else None
            row = (
                setting
                | measured(model)
                | {"seconds": seconds, "scoring_seconds": scoring, "held_out_error_left": left}
            )
            console.print(row, highlight=False)
            facts["rows"].append(row)
            RESULTS.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
