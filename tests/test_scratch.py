"""What is set aside on the disk comes back as it was, takes no more room than it must, and leaves nothing there."""

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import hifiprune as hp
from hifiprune.config import CriterionOptions
from hifiprune.engine.offload import stream
from hifiprune.engine.spill import PAGE, Scratch, spill
from hifiprune.engine.verify import verified_chain
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.scoring.score import score_all
from tests.commands import refused, run
from tests.families import tiny_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_come_back_as_they_were(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = [torch.randn(3, 5, 7).to(dtype), torch.randn(7, 4).to(dtype).T, torch.zeros(0, 2, dtype=dtype)]
    tensors.append(torch.randn(3, PAGE // 2).to(dtype))  # of several pages
    kept = [spill(Scratch(tmp_path), tensor) for tensor in tensors]
    for _ in range(2):
        for tensor, each in zip(tensors, kept, strict=True):
            assert each().dtype == dtype
            assert torch.equal(each(), tensor)
    assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_room_is_used_again_and_never_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hifiprune.engine.spill.PAGE", 40)
    scratch, chance = Scratch(tmp_path), random.Random(0)
    alive: dict[int, tuple[torch.Tensor, Any]] = {}
    for _ in range(500):
        values = torch.randn(chance.choice((10, 20, 30)))
        alive[chance.randrange(7)] = values, scratch.keep(values)  # forgets what had this place
        assert all(torch.equal(kept(), values) for values, kept in alive.values())
    assert os.fstat(scratch._file.fileno()).st_size <= 8 * 120, "eight of the largest, and nothing between them"
    alive.clear()
    del values
    assert sorted(scratch._unused) == list(range(scratch._pages)), "all of it again"


def test_batches_of_another_size_take_the_room_of_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hifiprune.engine.spill.PAGE", 36)
    scratch = Scratch(tmp_path)
    for width in (7, 20, 33, 25, 40, 7):  # as activations of layers that differ
        kept = [scratch.keep(torch.zeros(9, width)) for _ in range(5)]
        del kept
    assert os.fstat(scratch._file.fileno()).st_size == 5 * 9 * 40 * 4


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    scratch = Scratch(tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(hp.RunError, match="No space left on device; free some space there or choose another --scratch"):
        scratch.keep(torch.zeros(3))


def test_a_file_cut_short_is_told(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    kept = scratch.keep(torch.zeros(300))
    os.ftruncate(scratch._file.fileno(), 100)
    with pytest.raises(hp.RunError, match=f"what was set aside in {tmp_path} cannot be read: the file ends too early"):
        kept()


def test_inputs_of_blocks_are_on_the_disk(
    make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hifiprune.engine.spill.PAGE", 32)
    scratch = Scratch(tmp_path)
    model = stream(find_checkpoint(str(make_checkpoint())), torch.float32, scratch=scratch)
    score_all(model, tiny_tokens(4, 9), [("hfprune", CriterionOptions())], model_hash="known")
    states = 4 * len(verified_chain(model).blocks) * 9 * model.config.hidden_size * 4
    assert os.fstat(scratch._file.fileno()).st_size == states


def test_scratch_that_cannot_be_used_is_refused(world: Path, tmp_path: Path) -> None:
    words = ("score", world / "dense", "--output", tmp_path / "scores", "--calibration", world / "calibration.txt")
    refused(
        run(*words, "--stream", "--scratch", tmp_path / "none"),
        "is not there, or cannot be written; choose another --scratch",
    )
    found = run(*words, "--num-samples", 2, "--seq-len", 9, "--in-memory", "--scratch", tmp_path)
    assert found.code == 0
    assert "The weights are in memory: --scratch is not used." in found.err
