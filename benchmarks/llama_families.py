"""Which families llama.cpp's converter takes and llama.cpp computes as transformers does: tiny random models, cut.

Every variant of `tests/families.py` without experts or images gets SmolLM2's tokenizer, is cut, exported in f32 and run
on 20 random tokens. The converter knows tokenizers one by one, so those families that must have their own end there.
Writes `results/llama_families.json`. Needs llama-cpp-python: run `.venv-llama-cpp/bin/python -m
benchmarks.llama_families`, which takes 10 minutes, after `make test-llama-cpp`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hifiprune as hp
from benchmarks.llama import ROOT, fetch_converter
from hifiprune.commands.demo import fetch_smollm2
from hifiprune.errors import HifipruneError
from tests.families import MIXED, tiny_config

WIDTH = 24
SIZES: dict[str, Any] = {"vocab_size": 49152, "hidden_size": 32}
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_ctx": 64},  # which the real one's configuration has
    "opt": {"word_embed_proj_dim": 32},
    "phi": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
}
SAME, CLOSE = 1e-4, 1e-2
"""Largest difference of logits, as a share of their standard deviation."""


def main() -> None:
    """Try them all."""
    converter = fetch_converter(ROOT / ".cache" / "llama.cpp")
    tokenizer: Any = AutoTokenizer.from_pretrained(fetch_smollm2(ROOT / ".cache" / "smollm2"), trust_remote_code=False)
    facts = {}
    for variant in MIXED:
        with tempfile.TemporaryDirectory() as name:
            try:
                facts[variant] = tried(variant, Path(name), converter, tokenizer)
            except HifipruneError as error:
                last = str(error).partition("; a newer")[0].rpartition(" / ")[2]
                facts[variant] = {"refused": last.replace(f"{name}/", "")}
        sys.stdout.write(f"{variant}: {facts[variant]}\n")
        sys.stdout.flush()
    (ROOT / "benchmarks" / "results" / "llama_families.json").write_text(json.dumps(facts, indent=1) + "\n")


def tried(variant: str, folder: Path, converter: Path, tokenizer: Any) -> dict[str, Any]:
    """Largest difference of logits, or why there are none."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        tiny_config(variant, **SIZES, **SPECIAL.get(variant, {})), trust_remote_code=False
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    config = hp.PruneConfig(hp.Budget(width=WIDTH), round_to=1, criterion="magnitude", repair="none")
    hp.prune(str(folder / "dense"), folder / "cut", config)
    hp.export(str(folder / "cut"), folder / "cut.gguf", hp.ExportConfig(type="f32", converter=str(converter)))
    cut: Any = AutoModelForCausalLM.from_pretrained(folder / "cut", dtype=torch.float32, trust_remote_code=False).eval()
    ids = torch.randint(1000, 40000, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = cut(ids).logits[0].numpy()
    files = str(folder / "cut.gguf"), json.dumps(ids[0].tolist()), str(folder / "found.npy")
    words = [sys.executable, "-m", "benchmarks.llama_families", *files]
    if subprocess.run(words, capture_output=True, check=False, cwd=ROOT).returncode:
        return {"refused": "llama.cpp cannot load it"}
    found = np.load(folder / "found.npy")
    agreement = float((found.argmax(-1) == expected.argmax(-1)).mean())
    return {"difference": float(np.abs(found - expected).max() / expected.std()), "top1_agreement": agreement}


def run(path: str, ids: str, output: str) -> None:
    """The logits by llama.cpp, which may end the process."""
    import llama_cpp

    kind = llama_cpp.GGML_TYPE_F32
    llama = llama_cpp.Llama(path, n_ctx=64, n_batch=64, logits_all=True, type_k=kind, type_v=kind, verbose=False)
    llama.eval(json.loads(ids))
    np.save(output, np.array(llama.scores[: len(json.loads(ids))]))
    llama.close()


REASONS = {
    "code of its own": "rejected: has its own modeling code",
    "is not supported": "the converter does not support it",
    "rotary_pct": "the converter fails: it expects `rotary_pct`",
    "tokenizer.model": "not tried: needs its own tokenizer",
    "<|user|>": "not tried: needs its own tokenizer",
    "pre-tokenizer": "not tried: needs its own tokenizer",
    "Can not map tensor": "the converter fails: unknown tensor",
    "is invalid for input": "the converter fails: unexpected shape of a tensor",
    "q_layernorm": "the converter fails: unknown tensor",
    "cannot load": "converted; llama.cpp cannot load it",
}
"""Plain words for the errors that were recorded, by a part of each."""


def table(facts: dict[str, Any]) -> str:
    """Return the table of the page on export."""
    rows = ["| variant | largest difference of logits |", "|---|---|"]
    for variant, found in facts.items():
        if "refused" in found:
            text = next(words for part, words in REASONS.items() if part in found["refused"])
        else:
            size = found["difference"]
            text = f"{size:.0e}" + (
                ", the same" if size < SAME else ", close" if size < CLOSE else ", **another model**"
            )
        rows.append(f"| `{variant}` | {text} |")
    return "\n".join(rows)


if __name__ == "__main__":
    run(*sys.argv[1:]) if sys.argv[1:] else main()
