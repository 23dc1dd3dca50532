"""Time hifiprune on one GPU, beside plain autograd and the papers' way, all in one run of about 6 minutes.

A random bfloat16 checkpoint in the shape of Llama-2-7B is scored in memory by every way and batch size, as ratios to
plain autograd without weight gradients and as shares of the card's product speed; then it goes through `prune` and
`score --stream`, each in a process of its own, and a smaller one through `recover`. Writes `results/gpu.json` on a GPU.
`--tiny` tries all of it on a small model, on a CPU too, and writes nothing.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

import hifiprune as hp
from benchmarks.scale import ROOT, SHAPES, make, run
from hifiprune.config.groups import CriterionOptions
from hifiprune.config.recover import RecoverConfig, TrainingConfig
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.mlp import find_mlps
from hifiprune.run_record import describe_environment
from hifiprune.scoring.score import score_all

LIMIT = 480
"""Seconds after which no further part begins."""
TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 512, "tie_word_embeddings": False,
}  # fmt: skip
TRAINED: dict[str, Any] = TINY | {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 8000,
}  # fmt: skip
PLAIN = "plain autograd without weight gradients"
TRAININGS = {
    "LoRA, distilled": TrainingConfig(),
    "LoRA, on labels": TrainingConfig(distill_weight=0.0),
    "all weights, distilled": TrainingConfig(method="full", learning_rate=1e-4),
    "all weights, on labels": TrainingConfig(method="full", learning_rate=1e-4, distill_weight=0.0),
}


class Bench:
    """What all parts share: device, sizes and a folder for files."""

    def __init__(self, folder: Path, *, tiny: bool):
        self.folder, self.tiny = folder, tiny
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.positions = 64 if tiny else 1024
        self.text = folder / "text.jsonl"
        letters = Random(0)
        rows = ("".join(letters.choices("etaoin shrdlu", k=4 * self.positions)) for _ in range(300))
        self.text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))

    def checkpoint(self) -> Path:
        """The checkpoint that is scored and pruned."""
        return make(TINY if self.tiny else SHAPES["7B"], self.folder / "dense")

    def calibration(self, windows: int) -> tuple[object, ...]:
        """Flags of a calibration text."""
        return "--calibration", self.text, "--num-samples", windows, "--seq-len", self.positions, "--sampler", "stream"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of some work, until the device is done."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def product_rate(self) -> float:
        """Operations a second of the largest product: the card's ceiling."""
        size = 512 if self.tiny else 8192
        left, right = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        return 2 * size**3 / median(self.seconds(lambda: left @ right) for _ in range(12))


def by_autograd(model: PreTrainedModel, windows: Tensor, batch: int, *, weight_gradients: bool) -> list[Tensor]:
    """Score by hooks on one graph over whole logits, in the papers' way if with weight gradients."""
    inputs: list[Tensor] = []

    def keep(_: torch.nn.Module, arguments: tuple[Tensor]) -> None:
        arguments[0].retain_grad()
        inputs.append(arguments[0])

    mlps = find_mlps(model)
    hooks = [mlp.output.module.register_forward_pre_hook(keep) for mlp in mlps]
    embedding: Any = model.get_input_embeddings()
    hooks.append(embedding.register_forward_hook(lambda *call: call[-1].requires_grad_()))
    for mlp in mlps if weight_gradients else ():
        for projection in (*mlp.inputs, mlp.output):
            projection.module.weight.requires_grad_()
    scores = [torch.zeros(mlp.neurons, device=model.device) for mlp in mlps]
    for tokens in windows.to(model.device).split(batch):
        logits = model(input_ids=tokens, use_cache=False).logits.float()
        entropy = -(functional.softmax(logits, -1) * functional.log_softmax(logits, -1)).sum(-1).mean(-1).sum()
        entropy.backward()
        for total, values in zip(scores, inputs, strict=True):
            assert values.grad is not None
            total.add_((values.float() * values.grad.float()).abs().sum((0, 1)).detach())
        inputs.clear()
        model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    return scores


def useful_operations(model: PreTrainedModel, positions: int) -> int:
    """Operations of a window: forward, activation gradients of all products but the lookup, causal attention."""
    config = model.config
    embedding: Any = model.get_input_embeddings()
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    weights -= embedding.weight.numel()
    return int(4 * weights * positions + 6 * config.num_hidden_layers * positions**2 * config.hidden_size)


def scoring(bench: Bench) -> dict[str, Any]:
    """Milliseconds a window and memory above the weights, of every way and batch size."""
    model = find_checkpoint(str(bench.checkpoint())).load(torch.bfloat16, bench.device).requires_grad_(False)
    vocabulary = model.config.get_text_config().vocab_size
    windows = torch.randint(vocabulary, (12, bench.positions), generator=torch.Generator().manual_seed(0))
    ceiling, useful = bench.product_rate(), useful_operations(model, bench.positions)

    def ours(criterion: str, batch: int | None, recompute: bool | None) -> Callable[[Tensor], object]:
        how: dict[str, Any] = {"batch_size": batch, "recompute": recompute, "model_hash": "0"}
        return lambda some: score_all(model, some, [(criterion, CriterionOptions())], **how)

    def plain(batch: int, weight_gradients: bool) -> Callable[[Tensor], object]:
        return lambda some: by_autograd(model, some, batch, weight_gradients=weight_gradients)

    ways: dict[str, tuple[int, Callable[[Tensor], object]]] = {}
    for batch in (1, 4):
        ways[f"{PLAIN}, batch {batch}"] = batch, plain(batch, False)
        ways[f"the papers' way, batch {batch}"] = batch, plain(batch, True)
        for name, recompute in (("kept", False), ("recomputed", True)):
            ways[f"hfprune {name}, batch {batch}"] = batch, ours("hfprune", batch, recompute)
    ways["hfprune by default"] = 4, ours("hfprune", None, None)
    ways |= {f"{name} by default": (4, ours(name, None, None)) for name in ("fisher", "wanda-sp", "self-distillation")}
    rows: dict[str, Any] = {}
    for name, (batch, work) in ways.items():
        try:
            rows[name] = _row(bench, work, windows, batch)
        except (torch.OutOfMemoryError, hp.RunError) as error:
            rows[name] = {"error": str(error)[:200]}
            continue
        beside = rows.get(f"{PLAIN}, batch {batch}", {}).get("ms")
        rows[name]["ratio_to_plain"] = beside and rows[name]["ms"] / beside
        rows[name]["share_of_ceiling"] = useful / rows[name]["ms"] * 1e3 / ceiling
    return {"product_tflops": ceiling / 1e12, "useful_tflop_a_window": useful / 1e12, "ways": rows}


def _row(bench: Bench, work: Callable[[Tensor], object], windows: Tensor, batch: int) -> dict[str, Any]:
    """Time a way by what further windows take, so that what a call does once is left out."""
    work(windows[:batch])
    before = 0
    if bench.device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    fewer, more = windows[: len(windows) // 3], windows
    once = [bench.seconds(lambda: work(more)) - bench.seconds(lambda: work(fewer)) for _ in range(3)]
    row: dict[str, Any] = {"ms": 1e3 * max(median(once), 1e-9) / (len(more) - len(fewer))}
    if bench.device == "cuda":
        row["gb_above_weights"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    return row


def pruning(bench: Bench) -> dict[str, Any]:
    """The command `prune` from its start to its end, with stages."""
    words = ("--output", bench.folder / "pruned", "--overwrite", "--ratio", 0.2, "--round-to", 8 if bench.tiny else 128)
    return _told(run("prune", bench.checkpoint(), *words, *bench.calibration(4 if bench.tiny else 128)))


def streaming(bench: Bench) -> dict[str, Any]:
    """The command `score` with weights in memory and streamed."""
    text, result = bench.calibration(4 if bench.tiny else 32), {}
    for flag in ("--in-memory", "--stream"):
        words = ("--output", bench.folder / "scores", "--overwrite", "--criterion", "hfprune", flag)
        result[flag] = _told(run("score", bench.checkpoint(), *words, *text))
    scored = [result[flag]["stages"]["scoring"]["seconds"] for flag in ("--stream", "--in-memory")]
    return result | {"ratio": scored[0] / scored[1]}


def _told(measured: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a command and of its stages, beside what was expected."""
    record = measured["record"]
    stages = {stage.pop("name"): stage for stage in record["stages"]}
    for cost in record["expected"]:
        stages.get(cost["step"], {})["expected_seconds"] = cost["seconds"]
    return {"seconds": measured["seconds"], "stages": stages}


def recovery(bench: Bench) -> dict[str, Any]:
    """Tokens a second of training a smaller model, by what further steps take."""
    dense, pruned = bench.folder / "small", bench.folder / "small-pruned"
    make(TINY if bench.tiny else TRAINED, dense)
    text = hp.Calibration(str(bench.text), 4, bench.positions, sampler="stream")
    hp.prune(str(dense), pruned, hp.PruneConfig(hp.Budget(neuron_ratio=0.2), text, round_to=8, overwrite=True))
    batch, result = (2, {}) if bench.tiny else (8, {})
    for name, training in list(TRAININGS.items())[: 1 if bench.tiny else None]:
        seconds = [_trained(bench, pruned, training, batch, steps) for steps in ((1, 6) if bench.tiny else (10, 40))]
        tokens = batch * bench.positions * (5 if bench.tiny else 30)
        result[name] = {"tokens_per_second": tokens / max(seconds[1] - seconds[0], 1e-9)}
    return result


def _trained(bench: Bench, model: Path, training: TrainingConfig, batch: int, steps: int) -> float:
    """Seconds of the training stage."""
    training = replace(
        training,
        max_steps=steps,
        per_device_batch_size=batch,
        gradient_accumulation_steps=1,
        seq_len=bench.positions,
        evaluate_every=10_000,
    )
    config = RecoverConfig(training, overwrite=True)
    record = hp.recover(str(model), bench.folder / "recovered", str(bench.text), config)
    return sum(stage.seconds for stage in record.stages if stage.name == "training")


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "scoring": scoring,
    "pruning": pruning,
    "streaming": streaming,
    "recovery": recovery,
}


def main() -> None:
    """Measure all parts, or some; print and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    if not torch.cuda.is_available() and not asked.tiny:
        print("benchmarks/gpu.py needs an NVIDIA GPU, and torch sees none; --tiny tries it on a CPU", file=sys.stderr)
        sys.exit(2)
    begun, path = time.monotonic(), ROOT / "benchmarks" / "results" / "gpu.json"
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() and not asked.tiny else {}
    facts["environment"] = describe_environment()
    with TemporaryDirectory(prefix="hifiprune-gpu-") as folder:
        bench = Bench(Path(folder), tiny=asked.tiny)
        for name in asked.parts:
            if time.monotonic() - begun > LIMIT:
                print(f"{name}: left out, {LIMIT} s are over", file=sys.stderr)
                continue
            facts[name] = PARTS[name](bench)
            print(json.dumps({name: facts[name]}, indent=1), flush=True)
            if bench.device == "cuda":
                torch.cuda.empty_cache()
                if not asked.tiny:
                    path.write_text(json.dumps(facts, indent=1) + "\n")
        shutil.rmtree(bench.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
