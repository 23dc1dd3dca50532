"""Whether llama.cpp computes with an exported model what transformers computes with the checkpoint, and how nearly.

Prunes SmolLM2-135M-Instruct by 20%, exports it by llama.cpp's converter, loads it in llama-cpp-python and compares
token ids, greedy continuations, logits and perplexity with those of transformers in float32. The engine keeps keys and
values in f32 here, so that the file alone makes a difference; continuations are made with its default, f16, as well.
Ends with an error unless all tokens are the same, and those of continuations in f32 and f16. Writes
`results/llama_cpp.json`. `make test-llama-cpp` builds the engine first and runs this.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tokenizers.pre_tokenizers import Digits, Sequence
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

import hifiprune as hp
from hifiprune.cli.console import speaking
from hifiprune.commands.demo import fetch_smollm2, write_texts
from hifiprune.deployment.llama_cpp import SCRIPT
from hifiprune.errors import RunError
from hifiprune.io.atomic import replacing
from hifiprune.models.find_checkpoint import find_checkpoint

ROOT = Path(__file__).parent.parent
SDIST = "llama-cpp-python==0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
PARTS = (SCRIPT, "LICENSE", "conversion/", "gguf-py/gguf/")
"""What the converter consists of, in llama.cpp's folder."""
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_k_m")
EXACT = ("f32", "f16")
PACKAGES = ("llama-cpp-python", "transformers", "torch", "gguf", "sentencepiece")
NEW, WINDOWS, LENGTH = 32, 8, 256
PROMPTS = (
    "The capital of France is",
    "To make a good cup of tea, first",
    "def fibonacci(n):\n    ",
    "In 1969, the first people",
    "Water boils at 100 degrees, and",
    "<|im_start|>user\nWhat is a tree?<|im_end|>\n<|im_start|>assistant\n",
    "Naïve “café”, 你好",
    "3.14159 + 2 = ",
)


def fetch_converter(folder: Path) -> Path:
    """Get llama.cpp's converter (MIT), which llama-cpp-python's source package carries, into `folder`.

    The package is downloaded, not built.

    Raises:
        RunError: it cannot be had, or is not the one expected.
    """
    if (folder / SCRIPT).is_file():
        return folder
    with replacing(folder) as new:
        scratch = new.parent
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
        command += ["llama-cpp-python", "--dest", str(scratch), SDIST]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(scratch.glob("*.tar.gz"))
        if done.returncode or not archives:
            reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
            raise RunError(f"{SDIST} could not be downloaded ({reason})")
        found = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if found != SDIST_SHA256:
            raise RunError(f"{archives[0].name} has SHA-256 {found[:12]}, not {SDIST_SHA256[:12]}")
        with tarfile.open(archives[0]) as archive:
            for member in archive:
                path = member.name.partition("vendor/llama.cpp/")[2]
                if path.startswith(PARTS) and member.isfile():
                    member.name = path
                    archive.extract(member, new, filter="data")
    return folder


class Engine:
    """A GGUF file in llama-cpp-python: its tokens, its logits, its greedy continuations."""

    def __init__(self, path: Path, cache: str = "F32"):
        import llama_cpp

        kind = getattr(llama_cpp, f"GGML_TYPE_{cache}")  # of keys and values
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=LENGTH, n_batch=LENGTH, n_threads=2, logits_all=True, type_k=kind, type_v=kind,
            verbose=False,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.llama.close()

    def tokens(self, text: str) -> list[int]:
        """What the engine makes of a text, with special tokens in it."""
        return [*self.llama.tokenize(text.encode(), add_bos=True, special=True)]

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Of every position."""
        self.llama.reset()
        self.llama.eval(ids)
        return torch.from_numpy(np.array(self.llama.scores[: len(ids)]))

    def greedy(self, ids: list[int]) -> list[int]:
        """The likeliest token, and so on."""
        made = [int(self.logits(ids)[-1].argmax())]
        while len(made) < NEW:
            self.llama.eval(made[-1:])
            made.append(int(np.argmax(self.llama.scores[self.llama.n_tokens - 1])))
        return made


class Reference:
    """The same by transformers, in float32."""

    def __init__(self, folder: Path):
        checkpoint = find_checkpoint(str(folder))
        self.model: PreTrainedModel = checkpoint.load(torch.float32)
        self.tokenizer: PreTrainedTokenizerBase = checkpoint.tokenizer()

    def tokens(self, text: str) -> list[int]:
        """What the tokenizer makes of a text."""
        return [*self.tokenizer(text).input_ids]

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """Of every position."""
        found: torch.Tensor = self.model(input_ids=torch.tensor([ids])).logits[0]
        return found

    def greedy(self, ids: list[int]) -> list[int]:
        """The likeliest token, and so on, past ends of text."""
        made: list[int] = []
        while len(made) < NEW:
            made.append(int(self.logits(ids + made)[-1].argmax()))
        return made

    def gap(self, ids: list[int]) -> float:
        """How much likelier the likeliest next token is than the second, in nats."""
        first, second = self.logits(ids)[-1].double().topk(2).values.tolist()
        return float(first - second)


def main() -> None:
    """Prune, export, compare."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense = fetch_smollm2(ROOT / ".cache" / "smollm2")
        calibration = hp.Calibration("python-docs", num_samples=2, seq_len=128)
        pruned = hp.prune(str(dense), folder / "pruned", hp.PruneConfig(hp.Budget(ratio=0.2), calibration))
        facts = {
            "versions": {name: version(name) for name in PACKAGES},
            "width": asdict(pruned.results.width),
            "new_tokens": NEW,
            "windows": [WINDOWS, LENGTH],
            **compared(folder, fetch_converter(ROOT / ".cache" / "llama.cpp")),
        }
    sys.stdout.write(f"{table(facts)}\n{words(facts)}\n")
    (ROOT / "benchmarks" / "results" / "llama_cpp.json").write_text(json.dumps(facts, indent=1) + "\n")
    if any(facts["types"][kind]["same_tokens"] != [NEW] * len(PROMPTS) for kind in EXACT):
        raise SystemExit("llama.cpp continued a prompt otherwise than transformers")
    if facts["tokenization"]["equal_with_digits_split"] != facts["tokenization"]["texts"]:
        raise SystemExit("llama.cpp made other tokens of a text than transformers")


def compared(folder: Path, converter: Path) -> dict[str, Any]:
    """The pruned model in `folder` in all types, beside transformers."""
    reference = Reference(folder / "pruned")
    texts = [json.loads(line)["text"] for line in write_texts(folder)[1].read_text().splitlines()]
    stream = reference.tokens("\n\n".join(texts))
    windows = [stream[start : start + LENGTH] for start in range(0, WINDOWS * LENGTH, LENGTH)]
    logits = [reference.logits(window) for window in windows]
    prompts = [reference.tokens(prompt) for prompt in PROMPTS]
    expected = [reference.greedy(prompt) for prompt in prompts]
    facts: dict[str, Any] = {"perplexity": perplexity(logits, windows), "types": {}}
    for kind in TYPES:
        path = folder / f"{kind}.gguf"
        written = hp.export(str(folder / "pruned"), path, hp.ExportConfig(type=kind, converter=str(converter)))
        with Engine(path) as engine, Engine(path, "F16") as usual:
            if "tokenization" not in facts:
                paragraphs = [*PROMPTS, *(part for text in texts for part in text.split("\n\n"))]
                facts["tokenization"] = tokenization(engine, reference, paragraphs)
            found = [engine.logits(window) for window in windows]
            same, usually = (
                [shared(each.greedy(prompt), made) for prompt, made in zip(prompts, expected, strict=True)]
                for each in (engine, usual)
            )
            facts["types"][kind] = {
                **{part: getattr(written, part) for part in ("bytes", "tensors", "remarks")},
                "same_tokens": same,
                "same_with_f16_cache": usually,
                "gaps_with_f16_cache": [
                    reference.gap(prompt + made[:number])
                    for prompt, made, number in zip(prompts, expected, usually, strict=True)
                    if number < NEW
                ],
                **closeness(logits, found),
                "perplexity": perplexity(found, windows),
            }
        path.unlink()
    return facts


def tokenization(engine: Engine, reference: Reference, texts: list[str]) -> dict[str, int]:
    """How many texts become the same tokens.

    SmolLM2's own tokenizer takes digits apart before anything else, and so does llama.cpp. transformers leaves that out
    when it makes a tokenizer of a GGUF file, which is where this checkpoint's is from.
    """
    own = [engine.tokens(text) for text in texts]
    equal = sum(ids == reference.tokens(text) for ids, text in zip(own, texts, strict=True))
    inner: Any = reference.tokenizer
    before = inner.backend_tokenizer.pre_tokenizer
    inner.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), before])
    split = sum(ids == reference.tokens(text) for ids, text in zip(own, texts, strict=True))
    inner.backend_tokenizer.pre_tokenizer = before
    return {"texts": len(texts), "equal": equal, "equal_with_digits_split": split}


def shared(one: list[int], other: list[int]) -> int:
    """How many tokens two continuations have in common from their start."""
    return next((number for number, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))


def perplexity(logits: list[torch.Tensor], windows: list[list[int]]) -> float:
    """Of all tokens but the first of each window."""
    losses = [
        -log_softmax(each[:-1].double(), -1).gather(1, torch.tensor(window[1:])[:, None])
        for each, window in zip(logits, windows, strict=True)
    ]
    return float(torch.cat(losses).mean().exp())


def closeness(theirs: list[torch.Tensor], ours: list[torch.Tensor]) -> dict[str, float]:
    """Mean KL divergence from transformers in nats, and the share of positions with the same likeliest token."""
    divergences, agreements = [], []
    for expected, found in zip(theirs, ours, strict=True):
        before, after = (log_softmax(each.double(), -1) for each in (expected, found))
        divergences.append((before.exp() * (before - after)).sum(-1))
        agreements.append((before.argmax(-1) == after.argmax(-1)).double())
    return {"kl": float(torch.cat(divergences).mean()), "top1_agreement": float(torch.cat(agreements).mean())}


def table(facts: dict[str, Any]) -> str:
    """Return the table of the page on export."""
    rows = ["| `--type` | file | same continuations | with a cache in f16 | same top token | KL, nats | perplexity |"]
    rows.append(f"|{'---|' * 7}")
    for kind, found in facts["types"].items():
        same, usual = found["same_tokens"], found["same_with_f16_cache"]
        cells = [f"`{kind}`", f"{found['bytes'] / 1e6:.1f} MB"]
        cells += [f"{each.count(facts['new_tokens'])} of {len(each)}" for each in (same, usual)]
        cells += [f"{found['top1_agreement']:.2%}", f"{found['kl']:.1e}", f"{found['perplexity']:.3f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def words(facts: dict[str, Any]) -> list[str]:
    """Return what the page on export says beside its table."""
    found, (before, after) = facts["tokenization"], (facts["width"][when] for when in ("before", "after"))
    return [
        f"cut from {before:,} to {after:,} neurons a layer",
        f"{facts['new_tokens']} tokens each",
        f"the perplexity in transformers is {facts['perplexity']:.3f}",
        f"{found['equal']:,} of {found['texts']:,} texts become the same tokens",
        f"two likeliest tokens are {max(facts['types']['f16']['gaps_with_f16_cache']):.3f} nats apart",
        f"llama-cpp-python {facts['versions']['llama-cpp-python']}, transformers {facts['versions']['transformers']}",
    ]


if __name__ == "__main__":
    with speaking():
        main()
