"""Every criterion on SmolLM2-135M-Instruct, compared as `hifiprune compare` does it; writes `results/criteria.json`.

Calibrated on C4, perplexity on WikiText-2 test, fidelity on other documents of C4, 3 draws of the calibration windows.
Takes about three hours on 2 cores; interrupted, it goes on where it stopped.
"""

import json
import shutil
from pathlib import Path

from rich.console import Console

from hifiprune.calibration import Calibration
from hifiprune.comparison import compare
from hifiprune.demonstration import fetch_smollm2
from hifiprune.texts import Text
from hifiprune.voice import Voice

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
CRITERIA = (
    "hfprune", "entropy-square", "cross-entropy", "cross-entropy-square", "self-distillation", "fisher", "wanda-sp",
    "flap", "minitron", "magnitude", "ppm", "random",
)  # fmt: skip
RATIOS = (0.2, 0.3, 0.4)
WINDOWS, SEEDS = 12, 3


def main() -> None:
    """Run or go on with the comparison, and keep its figures without the values by window."""
    model = fetch_smollm2(ROOT / ".cache" / "smollm2")
    folder = ROOT / ".cache" / "criteria"
    record = compare(
        str(model),
        folder,
        CRITERIA,
        RATIOS,
        Calibration(str(DATA / "c4" / "c4_documents.jsonl"), WINDOWS, 1024),
        [
            Text(str(DATA / "wikitext-2" / "wiki.test.raw"), 1024, 24, fidelity=False),
            Text(str(DATA / "c4" / "c4_short.jsonl"), 512, 8),
        ],
        seeds=SEEDS,
        round_to=1,
        overwrite=True,
        voice=Voice(Console(width=140)),
    )
    for cell in record.results["cells"]:
        del cell["windows"]
    document = json.loads(json.dumps(record.to_dict(), default=str).replace(f"{ROOT.parent}/", ""))
    (ROOT / "benchmarks" / "results" / "criteria.json").write_text(json.dumps(document, indent=1) + "\n")
    for name in ("perplexity", "kl"):
        shutil.copy(folder / f"{name}.svg", ROOT / "docs" / f"criteria-{name}.svg")


if __name__ == "__main__":
    main()
