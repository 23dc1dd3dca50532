"""How many windows a step has, and of which blocks the graphs are kept, by the free memory of a GPU."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import init_empty_weights
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hifiprune as hp
from hifiprune.commands.cost_model import Estimator
from hifiprune.commands.trial import Pace
from hifiprune.config import CriterionOptions
from hifiprune.engine.memory import GPU_BYTES, Graphs, choose_batch, choose_graphs, working_bytes
from hifiprune.engine.verify import verified_chain
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.scoring.accumulate import Pass, PassConfig
from hifiprune.scoring.score import passes_of, score
from tests.families import tiny_model, tiny_tokens

GPU = torch.device("cuda")
MEASURED = {1: (1.362, 6.165), 2: (2.139, 11.75), 4: (3.694, 22.68), 8: (6.968, 44.93)}
"""GB above the weights for windows of 1,024 tokens, by their number, with blocks recomputed and with all graphs kept:
the shape of Llama-2-7B in bfloat16 on an H100, 2026-11-27."""


def shape(hidden: int, width: int, layers: int, vocabulary: int = 32_000) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        dtype=torch.bfloat16,
    )
    with init_empty_weights():
        model: PreTrainedModel = LlamaForCausalLM._from_config(config)
    return model


def llama_7b() -> PreTrainedModel:
    return shape(4096, 11_008, 32)


@pytest.mark.parametrize("windows", MEASURED)
def test_estimates_of_memory_are_near_what_was_measured(windows: int) -> None:
    for recompute, measured in zip((True, False), MEASURED[windows], strict=True):
        estimated = working_bytes(llama_7b(), 1024 * windows, Graphs(recompute), GPU) / 1e9
        assert estimated / 1.35 <= measured <= estimated * 1.3


@pytest.mark.parametrize("free", [60, 24, 14, 6, 3])
def test_a_gpu_is_kept_busy_within_its_room(free: int) -> None:
    model, room = llama_7b(), min(free / 2, 8.0)
    size = choose_batch(model, 1024, GPU, free * 10**9)
    graphs = choose_graphs(model, size * 1024, GPU, free * 10**9)
    assert size == (2 if room >= 3 else 1), "two windows keep an H100 busy, one does not"
    recomputed, whole = MEASURED[size]
    needed = recomputed + (graphs.kept - 1) / 31 * (whole - recomputed) if graphs.recompute else whole
    assert needed <= 1.15 * room or (size == 1 and graphs == Graphs(recompute=True))
    assert needed + 0.35 * room >= min(room, whole), "and little of the room is left unused"


def test_larger_models_need_fewer_windows_and_a_cpu_takes_one() -> None:
    shapes = [shape(576, 1536, 30), shape(2048, 8192, 16), llama_7b(), shape(8192, 28_672, 80)]
    sizes = [choose_batch(model, 1024, GPU, 10**11) for model in shapes]
    assert all(one > other for one, other in pairwise(sizes))
    assert sizes[2:] == [2, 1]
    for model, size in zip(shapes, sizes, strict=True):
        assert working_bytes(model, 1024 * size, Graphs(recompute=True), GPU) <= GPU_BYTES
        assert choose_batch(model, 1024, torch.device("cpu"), 10**11) == 1
    assert choose_graphs(llama_7b(), 1024, torch.device("cpu"), 10**10) == Graphs(recompute=True)
    assert choose_graphs(llama_7b(), 4096, torch.device("cpu"), 10**11) == Graphs(recompute=False)


def test_kept_graphs_change_nothing_but_how_often_blocks_run() -> None:
    model, tokens = tiny_model("llama", torch.float32).requires_grad_(False), tiny_tokens(2)
    chain, jobs = verified_chain(model), passes_of([("hfprune", CriterionOptions())])[0]
    found = {}
    for graphs in (Graphs(recompute=False), *(Graphs(recompute=True, kept=kept) for kept in (1, 2, 3))):
        with patch.object(chain, "run_block", side_effect=chain.run_block) as blocks:
            totals = Pass(chain, tokens, PassConfig(1, graphs)).run(jobs).totals[jobs[0]]
        found[graphs] = torch.cat([totals[layer] for layer in sorted(totals)])
        assert blocks.call_count == len(tokens) * (3 + (3 - graphs.kept if graphs.recompute else 0))
    assert all(torch.equal(one, other) for one, other in pairwise(found.values()))


def test_scoring_takes_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hifiprune.scoring.score.choose_batch", lambda *_: 3)
    monkeypatch.setattr("hifiprune.scoring.score.choose_graphs", lambda *_: Graphs(recompute=True, kept=2))
    model = tiny_model("llama", torch.float32)
    found = score(model, tiny_tokens(7)).settings
    assert (found["batch_size"], found["recompute"], found["kept_graphs"]) == (3, True, 2)
    assert score(model, tiny_tokens(2)).settings["batch_size"] == 2, "there are no more"
    asked = score(model, tiny_tokens(7), batch_size=1, recompute=False).settings
    assert (asked["batch_size"], asked["recompute"]) == (1, False)
    assert "kept_graphs" not in asked


def test_the_estimate_goes_by_the_same_choice(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = Estimator(find_checkpoint(str(checkpoint)), hp.ComputeConfig(device="cpu"))
    paces = {True: Pace(20.0, 1.0), False: Pace(15.0, 1.0)}
    monkeypatch.setattr(estimator, "_tried", lambda work, size, positions, jobs, recompute: paces[recompute])
    request: Any = [("hfprune", CriterionOptions())]
    layers = estimator.layers
    assert estimator.scoring(request, 8, 16).seconds == 8 * (layers * 15 + 1)
    monkeypatch.setattr("hifiprune.commands.cost_model.choose_batch", lambda *_: 4)
    monkeypatch.setattr("hifiprune.commands.cost_model.choose_graphs", lambda *_: Graphs(recompute=True, kept=2))
    assert estimator.scoring(request, 8, 16).seconds == 2 * ((layers - 2) * 20 + 2 * 15 + 1)


def test_as_many_tokens_keep_a_gpu_busy_as_was_measured(shared: Path) -> None:
    lines = (shared / "gpu" / "2026-11-27-h100.jsonl").read_text(encoding="utf-8").splitlines()
    entries = {entry["name"]: entry for entry in map(json.loads, lines) if entry["phase"] == "cost7b"}
    one, two, four = (entries[f"hfprune, batch {size}, recompute False"]["ms_per_window"] for size in (1, 2, 4))
    assert one > 1.4 * two, "one window of 1,024 tokens leaves the GPU waiting"
    assert two < 1.03 * four, "more than two gain nothing"
    assert choose_batch(llama_7b(), 1024, GPU, 10**11) == 2
    for size, (recomputed, whole) in MEASURED.items():
        assert entries[f"hfprune, batch {size}, recompute True"]["peak_gb"] == recomputed
        assert entries[f"hfprune, batch {size}, recompute False"]["peak_gb"] == pytest.approx(whole, abs=0.01)
