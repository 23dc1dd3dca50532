"""Whether other readers take outputs as they take the dense model: configurations as publishers ship them, cut.

Tiny random models get the configuration files of well-known repositories, shrunk (`tests/published.py`), and are cut to
three quarters of their neurons; two of them to widths that differ by layer, in the layout deci. Each reader reads the
result, and the dense model whose removed neurons are set to zero: transformers 4.57.6, ours, mlx-lm on a CPU, and
llama.cpp's converter, of which tensors and settings are compared. Writes `results/readers.json`. Run it by
`make test-readers`, which makes the environments.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "readers.json"
OLD = Path(sys.prefix).with_name(f"{Path(sys.prefix).name}-4") / "bin" / "python"
IDS = np.random.default_rng(0).integers(1000, 40000, 20).tolist()
READ_DENSE = "the dense model was read"
SAME = 1e-4
"""Largest difference of logits, as a share of their standard deviation."""
DIFFERING: dict[str, dict[str, Any]] = {
    "llama-deci": {"intermediate_size": 768},
    "qwen2-deci": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0, "hidden_act": "silu",
        "hidden_size": 64, "initializer_range": 0.3, "intermediate_size": 768, "max_position_embeddings": 128,
        "max_window_layers": 2, "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 128, "tie_word_embeddings": True,
        "torch_dtype": "float32", "use_cache": True, "use_sliding_window": False, "vocab_size": 257,
    },
}  # fmt: skip
"""Configurations for widths that differ by layer, in the layout deci; the first on top of Llama's."""
WIDTHS = (".feed_forward_length", ".expert_feed_forward_length", ".expert_shared_feed_forward_length")
ARCHITECTURE, CARD = ("general.architecture", "general.file_type"), ("general.", "GGUF.")
"""What else stands under `general` is taken from a card or the folder's name."""


def main() -> None:
    """Have all readers read all models."""
    with tempfile.TemporaryDirectory() as scratch:
        names = make(Path(scratch))
        readers = {
            "transformers 4.57.6": (str(OLD), "transformers"),
            "transformers 5.23.0": (sys.executable, "transformers"),
            "mlx-lm 0.32.2": (sys.executable, "mlx"),
            "llama.cpp's converter": (sys.executable, "converter"),
        }
        facts: dict[str, dict[str, Any]] = {name: {} for name in names}
        for title, (python, how) in readers.items():
            for name in names:
                if name in DIFFERING and how == "converter":
                    continue  # hifiprune export makes files of these
                facts[name][title] = asked([python, __file__, how, f"{scratch}/{name}"])
                sys.stdout.write(f"{name}, {title}: {facts[name][title]}\n")
                sys.stdout.flush()
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")


def make(scratch: Path) -> list[str]:
    """Write every model cut, and dense with the removed neurons set to zero; return their names."""
    from transformers import AutoTokenizer

    import hifiprune as hp
    from benchmarks.llama import fetch_converter
    from hifiprune.commands.demo import fetch_smollm2
    from hifiprune.pruning.cut_checkpoint import cut_checkpoint
    from tests.published import PUBLISHED, publish

    fetch_converter(ROOT / ".cache" / "llama.cpp")
    source = fetch_smollm2(ROOT / ".cache" / "smollm2")
    tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    differing = DIFFERING | {"llama-deci": PUBLISHED["llama"] | DIFFERING["llama-deci"]}
    for name, published in (PUBLISHED | differing).items():
        facts = json.loads(json.dumps(published))
        (facts if "vocab_size" in facts else facts["text_config"])["vocab_size"] = len(tokenizer)
        dense = publish(scratch / name / "dense", facts)
        tokenizer.save_pretrained(dense)
        cut = scratch / name / "cut"
        if name in DIFFERING:
            cut_checkpoint(str(dense), cut, plan := differing_plan(dense))
        else:
            budget = hp.Budget(width=24 if "moe_intermediate_size" in facts else 48)
            hp.prune(str(dense), cut, hp.PruneConfig(budget, round_to=1, criterion="magnitude", repair="none"))
            plan = hp.Plan.load(cut / "hifiprune" / "plan.json")
        write_zeroed(dense, plan, scratch / name / "zeroed")
    return [*PUBLISHED, *DIFFERING]


def differing_plan(dense: Path) -> Any:
    """Keep 256, 512 or all 768 neurons of a layer, at random."""
    import torch

    import hifiprune as hp
    from hifiprune.models.find_checkpoint import find_checkpoint
    from hifiprune.models.mlp import find_mlps

    mlps, chance = find_mlps(find_checkpoint(str(dense)).skeleton()), torch.Generator().manual_seed(0)
    widths = [256 * (1 + layer % 3) for layer in range(len(mlps))]
    kept = [torch.randperm(768, generator=chance)[:width].sort().values for width in widths]
    return hp.Plan(kept, [768] * len(mlps), [mlp.name for mlp in mlps], None, 0.0, 0, 0)


def write_zeroed(dense: Path, plan: Any, folder: Path) -> None:
    """Write the dense model with the output columns of removed neurons set to zero."""
    import torch

    from hifiprune.models.mlp import find_mlps
    from tests.families import load

    model = load(dense)
    with torch.no_grad():
        for mlp, kept in zip(find_mlps(model), plan.kept, strict=True):
            removed = torch.ones(mlp.neurons, dtype=torch.bool).index_fill(0, kept, False)
            mlp.output.weight[:, removed] = 0
    model.save_pretrained(folder)
    for file in dense.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)


def asked(words: list[str]) -> dict[str, Any]:
    """What a reader, which may end its process, makes of a model; or whether it fails at the dense one already."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode == 0:
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return facts
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
    return {"failed" if READ_DENSE in done.stdout else "refused": last}


def compare(how: str, folder: Path) -> dict[str, Any]:
    """What one reader makes of both."""
    read = {"transformers": by_transformers, "mlx": by_mlx, "converter": converted}[how]
    expected = read(folder / "zeroed")
    sys.stdout.write(f"{READ_DENSE}\n")
    sys.stdout.flush()
    found = read(folder / "cut")
    if how == "converter":
        return compare_files(expected, found)
    return {"difference": float(np.abs(found - expected).max() / expected.std())}


def by_transformers(folder: Path) -> Any:
    """Logits by transformers, of whatever version runs this."""
    import torch
    import transformers

    facts = json.loads((folder / "config.json").read_text())
    (name,), code = facts["architectures"], "auto_map" in facts
    kind: Any = transformers.AutoModelForCausalLM if code else getattr(transformers, name)
    how = {"attn_implementation": "eager", "output_loading_info": True}
    model, report = kind.from_pretrained(folder, trust_remote_code=code, **how)
    assert not report["missing_keys"], f"missing: {sorted(report['missing_keys'])[:3]}"
    assert not report["mismatched_keys"], f"mismatched: {report['mismatched_keys'][:3]}"
    with torch.no_grad():
        return model.float().eval()(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].numpy()


def by_mlx(folder: Path) -> Any:
    """Logits by mlx-lm."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return np.array(model(mx.array([IDS])).astype(mx.float32))[0]


def converted(folder: Path) -> Path:
    """A GGUF file in float32 by llama.cpp's converter."""
    script, path = ROOT / ".cache" / "llama.cpp" / "convert_hf_to_gguf.py", folder.with_suffix(".gguf")
    words = [sys.executable, str(script), str(folder), "--outfile", str(path), "--outtype", "f32"]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        line = next((line for line in reversed(done.stderr.splitlines()) if "rror" in line), "without a word")
        raise SystemExit(f"{folder.name}: {line}")
    return path


def compare_files(zeroed: Path, cut: Path) -> dict[str, Any]:
    """Whether files hold the same settings but for widths, and the same tensors but for what is zero."""
    from gguf import GGUFReader

    dense, small = GGUFReader(zeroed), GGUFReader(cut)
    ours, theirs = ({key: field.contents() for key, field in each.fields.items()} for each in (small, dense))
    other = [
        key for key in sorted(ours.keys() | theirs.keys())
        if not key.endswith(WIDTHS) and (key in ARCHITECTURE or not key.startswith(CARD))
        and ours.get(key) != theirs.get(key)
    ]  # fmt: skip
    expected = {tensor.name: tensor.data for tensor in dense.tensors}
    found = {tensor.name: tensor.data for tensor in small.tensors}
    for name in [name for name in expected if "ffn_down" in name and name.endswith("weight")]:
        parts = [name.replace("ffn_down", part) for part in ("ffn_gate", "ffn_up")]
        group = {part: expected[part] for part in (*parts, name) if part in expected}
        expected |= without_zeros(group, name)
    different = [
        name for name in sorted(found.keys() | expected.keys())
        if name not in found or name not in expected or not np.array_equal(found[name], expected[name])
    ]  # fmt: skip
    return {"tensors": len(found), "different_tensors": different, "different_settings": other}


def without_zeros(group: dict[str, Any], down: str) -> dict[str, Any]:
    """The matrices of an MLP, or of stacked experts, without neurons whose column of the output projection is zero."""
    matrices = group[down] if group[down].ndim == 3 else group[down][None]
    kept = [np.flatnonzero(matrix.any(0)) for matrix in matrices]
    smaller = {}
    for name, values in group.items():
        stacked = values if values.ndim == 3 else values[None]
        if name == down:
            rows = [matrix[:, own] for matrix, own in zip(stacked, kept, strict=True)]
        else:
            rows = [_rows(matrix, own, group[down].shape[-1]) for matrix, own in zip(stacked, kept, strict=True)]
        smaller[name] = np.stack(rows) if values.ndim == 3 else rows[0]
    return smaller


def _rows(matrix: Any, kept: Any, width: int) -> Any:
    """The rows of neurons, of a gate and what it gates too where both lie in one matrix."""
    return np.concatenate([part[kept] for part in np.split(matrix, len(matrix) // width)])


def table(facts: dict[str, dict[str, Any]]) -> str:
    """The table of the page on deployment."""
    titles = [*next(iter(facts.values()))]
    rows = [f"| configuration of | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for name, answers in facts.items():
        rows.append(f"| `{name}` | {' | '.join(_cell(answers.get(title, {})) for title in titles)} |")
    return "\n".join(rows)


def _cell(answer: dict[str, Any]) -> str:
    if not answer:
        return "not run"
    if "refused" in answer:
        return "not the dense model either"
    if "failed" in answer:
        return "**fails**"
    if "tensors" in answer:
        return "**other**" if answer["different_tensors"] or answer["different_settings"] else "the same"
    return "the same" if answer["difference"] < SAME else f"**{answer['difference']:.0e}**"


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.stdout.write(json.dumps(compare(sys.argv[1], Path(sys.argv[2]))) + "\n")
    else:
        main()
