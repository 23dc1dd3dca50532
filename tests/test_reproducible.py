"""Deterministic algorithms where they are asked for, and what a record says of runs without them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hifiprune.engine.block_chain import BlockChain
from hifiprune.engine.reproducible import AGREEMENT, WORKSPACE, cumulative, deterministic, repeatability
from hifiprune.errors import RunError, UserError
from tests.commands import run
from tests.conftest import ROOT


def settings() -> tuple[bool, bool, bool]:
    module: Any = torch.utils.deterministic
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        module.fill_uninitialized_memory,
    )


@pytest.mark.parametrize("command", ["score", "prune"])
def test_a_command_computes_deterministically_and_restores_the_settings(
    command: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    before, within = settings(), []
    sweep: Any = BlockChain.sweep_all

    def spied(*arguments: object, **options: object) -> None:
        within.append(settings())
        sweep(*arguments, **options)

    monkeypatch.setattr("hifiprune.engine.block_chain.BlockChain.sweep_all", spied)
    text = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 16, "--device", "cpu")
    words = (*text, "--criterion", "fisher", *(("--width", 24) if command == "prune" else ()))
    found = [run(command, world / "dense", "--output", tmp_path / "plain", *words)]
    assert {*within} == {before}
    within.clear()
    found += [run(command, world / "dense", "--output", tmp_path / "same", *words, "--deterministic")]
    assert {*within} == {(True, False, False)}
    assert [each.code for each in found] == [0, 0], found[-1].err
    assert settings() == before
    names = [path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.safetensors")]
    assert all((tmp_path / "plain" / name).read_bytes() == (tmp_path / "same" / name).read_bytes() for name in names)
    assert names or (tmp_path / "plain").read_bytes() == (tmp_path / "same").read_bytes()


def test_an_operation_without_a_deterministic_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings()
    with pytest.raises(RunError, match=r"^kthvalue CUDA does not have .*; leave out --deterministic"), deterministic():
        raise RuntimeError("kthvalue CUDA does not have a deterministic implementation, but you set. More")
    with pytest.raises(RuntimeError, match="other"), deterministic():
        raise RuntimeError("other")
    assert settings() == before
    monkeypatch.delenv(WORKSPACE)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match=f"needs {WORKSPACE}=:4096:8"), deterministic():
        pass


def test_a_record_of_a_gpu_says_how_far_its_scores_repeat() -> None:
    gpu = torch.device("cuda")
    assert repeatability(torch.device("cpu")) == {}
    assert "99.86%" in repeatability(gpu)["repeatability"]
    with deterministic():
        assert repeatability(gpu) == {"repeatability": "bit-identical"}


def test_sums_of_integers_draw_the_same_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    probabilities = torch.randn(50, 3000).mul_(3).softmax(-1)
    wanted = cumulative(probabilities.clone())

    class OnGpu(Tensor):
        device = torch.device("cuda")

    with deterministic():
        found = cumulative(probabilities.as_subclass(OnGpu))
    torch.testing.assert_close(found.as_subclass(Tensor), probabilities.double().cumsum(-1).float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(wanted, probabilities.double().cumsum(-1).float(), rtol=1e-5, atol=1e-6)


def test_the_agreement_is_the_measured_one(shared: Path) -> None:
    lines = (shared / "gpu" / "2026-11-27-h100.jsonl").read_text(encoding="utf-8").splitlines()
    (again,) = [entry for entry in map(json.loads, lines) if entry["name"].startswith("hfprune again,")]
    assert not again["bit_equal"]
    assert f"{again['kept_alike_min']:.2%} of the same neurons" in AGREEMENT
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert f"{again['kept_alike_min']:.2%}" in page
    assert f"{again['kept_alike']:.2%} on average" in page
