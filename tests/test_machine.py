"""Whether the machine is busy: tried with real work, and told with every estimate."""

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hifiprune.engine.machine import Machine, condition
from tests.commands import run

BUSY = Machine(cores=2, threads=2, share=0.25, others=1.5)
SAID = (
    "The machine is busy now (others use 1.5 of 2 cores, 25% of the CPU time wanted was had): this holds for as long "
    "as it stays so; OMP_NUM_THREADS=1 may be faster"
)


def spin() -> None:
    while True:
        pass


@pytest.fixture
def crowd() -> Iterator[None]:
    """Twice as many processes as cores, which compute without end."""
    count = 2 * len(os.sched_getaffinity(0))
    workers = [multiprocessing.get_context("fork").Process(target=spin, daemon=True) for _ in range(count)]
    for worker in workers:
        worker.start()
    yield
    for worker in workers:
        worker.kill()
        worker.join()


@pytest.mark.stopwatch
def test_a_crowded_machine_is_busy(crowd: None) -> None:
    machine = Machine.now()
    assert machine.busy
    assert machine.cores == len(os.sched_getaffinity(0))
    assert machine.share < 0.8 or machine.others > 0.5


@pytest.mark.parametrize(
    ("machine", "busy"),
    [
        (Machine(2, 2, 0.97, 0.02), False),
        (Machine(2, 2, 0.45, 0.02), True),  # the CPU time alone tells, as where a container is held back
        (Machine(2, 2, 0.90, 0.80), True),  # another process alone tells
        (Machine(8, 4, 0.97, 3.0), False),  # there is room for both
    ],
)
def test_whichever_tells_counts(machine: Machine, busy: bool) -> None:
    assert machine.busy is busy


def test_an_estimate_says_what_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert condition("cpu") == ", if the machine is idle"
    assert condition("cuda:1") == ", if nothing else uses the GPU"
    monkeypatch.setattr(Machine, "now", lambda: BUSY)
    assert condition("cpu") == f". {SAID}"
    monkeypatch.setattr(Machine, "now", lambda: Machine(1, 1, 0.25, 1.5))
    assert condition("cpu").endswith(
        "(others use 1.5 of 1 core, 25% of the CPU time wanted was had): this holds for as long as it stays so"
    )


def test_no_command_calls_a_busy_machine_idle(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told where a trial was made, not again with each stage that the trial was for."""
    monkeypatch.setattr(Machine, "now", lambda: BUSY)
    dense, text = world / "dense", ("--seq-len", 24)
    calibration = ("--calibration", world / "calibration.txt", "--num-samples", 3, *text)
    score = run("score", dense, "--output", tmp_path / "s", *calibration)
    prune = run("prune", dense, "--output", tmp_path / "p", "--neuron-ratio", 0.3, "--round-to", 1, *calibration)
    evaluate = run("evaluate", dense, "--text", world / "held.txt", *text)
    groups = ("--neurons", 3, "--groups", 0)
    ablate = run(
        "ablate",
        dense,
        "--scores",
        tmp_path / "s",
        "--text",
        world / "held.txt",
        *text,
        *groups,
        "--output",
        tmp_path / "a",
    )
    criteria = ("--criteria", "magnitude,random", "--ratios", 0.1, "--round-to", 1, "--seeds", 1)
    compare = run("compare", dense, "--output", tmp_path / "c", *calibration, "--text", world / "held.txt", *criteria)
    for result, estimates in ((score, 1), (prune, 1), (evaluate, 1), (ablate, 1), (compare, 2)):
        assert result.code == 0, result.err
        assert result.err.count(SAID) == estimates, result.err
        assert "idle" not in result.err
