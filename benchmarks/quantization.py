"""What quantization costs a pruned model, and whether it is what it costs the dense one.

SmolLM2-135M-Instruct, dense and cut by 20% as `prune` does it, as they are and quantized by torchao: perplexity on
WikiText-2 test and KL divergence to the dense model on the same windows, with what the losses are beyond the sum of
both, and the bytes of the weights.
Writes `results/quantization.json`. Needs the extra `quantize`; takes half an hour on 2 cores.
"""

import argparse
import json
import math
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

import hifiprune as hp
from hifiprune.commands.demo import fetch_smollm2
from hifiprune.evaluation.bootstrap import bootstrap_mean
from hifiprune.evaluation.fidelity import Reference, measure_windows
from hifiprune.evaluation.text import held_windows
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.mlp import find_mlps
from hifiprune.run_record import describe_environment

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
METHODS = ("int8", "int8, activations too", "int4")
GROUP = 32
"""Inputs that share a scale in int4: must divide the hidden size, 576, and the width, 1,536 and 1,024."""
Losses = dict[str, Float[Tensor, "windows"]]


def config_of(method: str) -> TorchAoConfig:
    """What transformers is given."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
    )
    from torchao.quantization.granularity import PerGroup

    made = {
        "int8": Int8WeightOnlyConfig(),
        "int8, activations too": Int8DynamicActivationInt8WeightConfig(),
        "int4": IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=PerGroup(GROUP),
            mapping_type=MappingType.ASYMMETRIC,
        ),
    }
    return TorchAoConfig(made[method])


def weight_bytes(model: PreTrainedModel, *, packed: bool = False) -> int:
    """Bytes of all parameters in memory; `packed` as if two 4-bit values shared a byte, which they do on GPUs."""
    total = 0
    for weight in model.parameters():
        if not hasattr(weight, "__tensor_flatten__"):
            total += weight.nbytes
            continue
        for name in weight.__tensor_flatten__()[0]:
            halved = packed and name == "qdata" and getattr(weight, "target_dtype", None) is torch.int4  # type: ignore[attr-defined]
            total += getattr(weight, name).nbytes // (2 if halved else 1)
    return total


def weight_error(plain: PreTrainedModel, quantized: PreTrainedModel) -> float:
    """Of the MLPs' weights: norm of the rounding error over the norm of the weights."""
    error, size = 0.0, 0.0
    for one, other in zip(find_mlps(plain), find_mlps(quantized), strict=True):
        for each, rounded in zip(one.projections, other.projections, strict=True):
            values: Any = rounded.module.weight
            error += float((values.dequantize() - each.weight).double().square().sum())
            size += float(each.weight.double().square().sum())
    return math.sqrt(error / size)


def excess(cells: dict[tuple[str, str], Losses], method: str, metric: str) -> dict[str, float | None]:
    """What pruning and quantization together cost beyond the sum of what each costs, in nats, with its interval."""
    dense, pruned = ("dense", method), ("pruned", method)
    plain = cells["dense", "none"][metric]
    both = cells[pruned][metric] - plain
    return asdict(bootstrap_mean(both - (cells["pruned", "none"][metric] - plain) - (cells[dense][metric] - plain)))


def main() -> None:
    """Prune if need be, and measure all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens of WikiText-2 to measure on")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 1,024 tokens of C4")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "quantization", help="for the pruned model")
    asked = parser.parse_args()
    model = fetch_smollm2(ROOT / ".cache" / "smollm2")
    pruned = asked.folder / "pruned"
    if not pruned.exists():
        calibration = hp.Calibration(str(DATA / "c4" / "c4_documents.jsonl"), asked.samples)
        hp.prune(str(model), pruned, hp.PruneConfig(hp.Budget(ratio=0.2), calibration))
    tokenizer = find_checkpoint(str(model)).tokenizer()
    windows = held_windows(hp.Text(str(DATA / "wikitext-2" / "wiki.test.raw"), 512, asked.windows), tokenizer)
    reference = Reference.of(find_checkpoint(str(model)).load(torch.float32), windows)

    cells: dict[tuple[str, str], Losses] = {}
    rows = []
    for name, folder in {"dense": model, "pruned": pruned}.items():
        plain = find_checkpoint(str(folder)).load(torch.float32)
        for method in ("none", *METHODS):
            own = plain
            if method != "none":
                own = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=torch.float32,
                    quantization_config=config_of(method),
                    trust_remote_code=False,
                )
            cells[name, method] = measure_windows(own, windows, reference)
            row = {"model": name, "method": method} | summary(cells[name, method]) | sizes(own)
            rows.append(row | ({} if method == "none" else {"weight_error": weight_error(plain, own)}))
            print(row, flush=True)
    calibration = json.loads((pruned / "run.json").read_text())["arguments"]["calibration"]
    facts = {
        "environment": describe_environment(),
        "torchao": version("torchao"),
        "windows": len(windows),
        "calibration": {"source": Path(calibration["source"]).name}
        | {key: calibration[key] for key in ("num_samples", "seq_len", "seed")},
        "group": GROUP,
        "results": rows,
        "excess": {
            method: {metric: excess(cells, method, metric) for metric in ("perplexity", "kl")} for method in METHODS
        },
    }
    (ROOT / "benchmarks" / "results" / "quantization.json").write_text(json.dumps(facts, indent=1) + "\n")


def summary(losses: Losses) -> dict[str, Any]:
    """Perplexity and KL divergence with their intervals."""
    return {
        "perplexity": asdict(bootstrap_mean(losses["perplexity"]).exp()),
        "kl": asdict(bootstrap_mean(losses["kl"])),
    }


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of the weights in memory, there if packed, and in the files."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stored = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return {
        "memory_bytes": weight_bytes(model),
        "packed_bytes": weight_bytes(model, packed=True),
        "file_bytes": stored,
    }


def table(facts: dict[str, Any]) -> str:
    """Results as Markdown, a row for each method."""
    rows = {(row["model"], row["method"]): row for row in facts["results"]}
    head = "| | dense: perplexity | KL | MB | pruned: perplexity | KL | MB | interaction: ln perplexity | KL |"
    lines = [head, "|" + "---|" * 9]
    for method in ("none", *METHODS):
        cells = [{"none": "float32"}.get(method, method)]
        for model in ("dense", "pruned"):
            row = rows[model, method]
            kl = "" if (model, method) == ("dense", "none") else f"{row['kl']['value']:.3f}"
            cells += [f"{row['perplexity']['value']:.1f}", kl, f"{row['file_bytes'] / 1e6:.0f}"]
        beyond = facts["excess"].get(method)
        cells += [_interval(beyond[metric]) if beyond else "" for metric in ("perplexity", "kl")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sentences(facts: dict[str, Any]) -> list[str]:
    """Other figures, as the page on quantization says them."""
    rows = {(row["model"], row["method"]): row for row in facts["results"]}
    dense, pruned = rows["dense", "int4"], rows["pruned", "int4"]
    factors = {
        key: row["perplexity"]["value"] / rows[key[0], "none"]["perplexity"]["value"] for key, row in rows.items()
    }
    return [
        *(
            f"{method} multiplies the perplexity of the dense model by {factors['dense', method]:.3f} and that of the "
            f"pruned one by {factors['pruned', method]:.3f}"
            for method in ("int8", "int4")
        ),
        f"two to a byte they would take {dense['packed_bytes'] / 1e6:.0f} and {pruned['packed_bytes'] / 1e6:.0f} MB",
        f"rounds the weights of the MLPs by {dense['weight_error']:.1%} of their norm in the dense model and by "
        f"{pruned['weight_error']:.1%} in the pruned one",
    ]


def _interval(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:+.3f} ({estimate['low']:+.3f} to {estimate['high']:+.3f})"


if __name__ == "__main__":
    main()
