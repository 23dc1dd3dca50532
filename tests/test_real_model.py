"""The main job on the real model: from checkpoint, or GGUF file, to a smaller checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hifiprune import Budget, Calibration, UserError, evaluate, inspect, prune
from hifiprune.commands.demo import run, write_texts
from hifiprune.commands.inspect import PossibleWidth
from hifiprune.config.demo import DemoConfig
from hifiprune.config.evaluate import EvaluateConfig
from hifiprune.config.prune import PruneConfig
from hifiprune.config.texts import Text
from hifiprune.io.hashing import hash_model


def test_inspect_counts_the_real_model(smollm2_folder: Path) -> None:
    facts = inspect(str(smollm2_folder))
    assert facts.parameters["total"] == 134_515_008
    assert facts.widths["20%"] == PossibleWidth(1017, 1024, 26542080 / 134515008)


@pytest.mark.exhaustive  # the vocabulary of 49,152 tokens is read again and again, for a minute
def test_a_gguf_file_is_pruned_to_an_ordinary_checkpoint(
    smollm2_gguf: Path, smollm2_folder: Path, tmp_path: Path
) -> None:
    assert inspect(str(smollm2_gguf)).parameters["total"] == 134_515_008
    record = prune(
        str(smollm2_gguf), tmp_path / "out", PruneConfig(Budget(width=256), Calibration("python-docs", 2, 64))
    )
    dense = AutoModelForCausalLM.from_pretrained(smollm2_folder)
    assert record.results.model_hash == hash_model(dense)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.intermediate_size == 256
    assert getattr(model.config, "quantization_config", None) is None
    assert (
        tokenizer("Good morning").input_ids == AutoTokenizer.from_pretrained(smollm2_folder)("Good morning").input_ids
    )
    assert tokenizer.chat_template


@pytest.mark.exhaustive  # the real model, repaired on one thread, takes a minute
def test_the_demo_prunes_measures_and_records(smollm2_folder: Path, tmp_path: Path) -> None:
    summary = run(tmp_path, DemoConfig(str(smollm2_folder), 2, 128)).to_dict()
    assert summary == json.loads((tmp_path / "demo.json").read_text())
    results = summary["results"]
    assert results["width"] == {"before": 1536, "after": 1024}
    metrics = {name: estimate["value"] for name, estimate in results["metrics"].items()}
    assert metrics["dense_perplexity"] < metrics["perplexity"] < 100 * metrics["dense_perplexity"]
    assert 0.1 < metrics["top1_agreement"] < 1
    assert [len(sample["dense"]) > 20 for sample in results["continuations"]] == [True, True]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert sum(p.numel() for p in model.parameters()) == results["parameters"]["after"] == 107_972_928
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_the_demo_never_writes_over_what_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "evaluation.jsonl").write_text("mine")
    with pytest.raises(UserError, match="was not made by a demo"):
        run(tmp_path, DemoConfig(None, 2, 128))
    assert (tmp_path / "evaluation.jsonl").read_text() == "mine"


def test_the_demos_texts_share_no_paragraph(tmp_path: Path) -> None:
    parts = []
    for path in write_texts(tmp_path):
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        parts.append({paragraph for text in texts for paragraph in text.split("\n\n")})
    assert parts[0].isdisjoint(parts[1])
    assert all(sum(map(len, part)) > 100_000 for part in parts)


def test_perplexity_equals_that_of_the_models_own_loss(smollm2_folder: Path, tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog while the sun sets slowly behind the old stone mill. " * 4
    (tmp_path / "text.txt").write_text(text)
    record = evaluate(str(smollm2_folder), EvaluateConfig(Text(str(tmp_path / "text.txt"), 32)))
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder)
    stream = torch.tensor(AutoTokenizer.from_pretrained(smollm2_folder)(text).input_ids)
    windows = stream[: len(stream) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss
    metrics = record.results.models[str(smollm2_folder)].metrics
    assert metrics
    torch.testing.assert_close(
        torch.tensor(metrics["perplexity"].value).log(), loss.double().cpu(), rtol=1e-4, atol=0, check_dtype=False
    )
    assert record.results.windows == len(windows)
