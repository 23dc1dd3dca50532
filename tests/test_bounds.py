"""Numbers out of range are refused by one table, on the command line before anything is imported, and by the API."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest

import hifiprune as hp
from hifiprune.bounds import Bounds, check_number, meant
from hifiprune.cli.app import app
from hifiprune.config import CriterionOptions, Tasks
from hifiprune.config.options import declared_options
from hifiprune.config.recover import TrainingConfig
from hifiprune.errors import UserError
from tests.commands import refused, run

CONFIGS: list[type] = [
    getattr(hp, name) for name in hp.__all__ if name.endswith("Config") and name not in ("ComputeConfig",)
]
BOUNDS: dict[str, Bounds] = {
    option.name: option.option.bounds
    for config in CONFIGS
    for option in declared_options(config)
    if option.option.bounds
}
"""By the names of options, wherever they are declared."""
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ratio", 0.0, "ratio 0 must lie in (0, 1)"),
        ("ratio", INF, "ratio inf must lie in (0, 1)"),
        ("ratio", NAN, "ratio nan must lie in (0, 1)"),
        ("ratio", 20.0, "ratio 20 must lie in (0, 1); did you mean 0.2?"),
        ("ratio", 1.25, "ratio 1.25 must lie in (0, 1); did you mean 0.25?"),
        ("ratio", "0.2", "ratio '0.2' must be a number"),
        ("neuron_ratio", 1.0, "neuron-ratio 1 must lie in (0, 1)"),
        ("floor", NAN, "floor nan must lie in [0, 1]"),
        ("floor", -0.1, "floor -0.1 must lie in [0, 1]"),
        ("alpha", INF, "alpha inf must lie in [0, 1]"),
        ("held_out", 1.0, "held-out 1 must lie in (0, 1)"),
        ("learning_rate", INF, "learning-rate inf must be a finite number"),
        ("learning_rate", -1.0, "learning-rate -1 must be above 0"),
        ("weight_decay", NAN, "weight-decay nan must be a finite number"),
        ("weight_decay", -1.0, "weight-decay -1 must be at least 0"),
        ("temperature", INF, "temperature inf must be a finite number"),
        ("match_hidden", -1.0, "match-hidden -1 must be at least 0"),
        ("match_hidden", NAN, "match-hidden nan must be a finite number"),
        ("match_hidden", INF, "match-hidden inf must be a finite number"),
        ("weight_decay", INF, "weight-decay inf must be a finite number"),
        ("max_minutes", INF, "max-minutes inf must be a finite number"),
        ("epochs", -INF, "epochs -inf must be a finite number"),
        ("seeds", 0, "seeds 0 must be at least 1"),
        ("seeds", 100_000_000, "seeds 100000000 must be at most 1000"),
        ("seed", -1, "seed -1 must lie in 0 to 4294967295"),
        ("seed", 2**32, "seed 4294967296 must lie in 0 to 4294967295"),
        ("num_samples", 2**31, "num-samples 2147483648 must be at most 2147483647"),
        ("num_samples", 4.5, "num-samples 4.5 must be a whole number"),
        ("num_samples", True, "num-samples True must be a whole number"),
        ("batch_size", 0, "batch-size 0 must be at least 1"),
        ("seq_len", 1, "seq-len 1 must be at least 2"),
        ("rounds", 0, "rounds 0 must be at least 1"),
        ("groups", -1, "groups -1 must be at least 0"),
    ],
)
def test_numbers_out_of_range(name: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        check_number(name.replace("_", "-"), value, BOUNDS[name])
    assert str(refusal.value) == message


def test_ends_of_ranges() -> None:
    ends = {"floor": (0, 1), "weight_decay": (0,), "match_hidden": (0.0,), "groups": (0,), "rounds": (1, 1000)}
    for name, values in (ends | {"seed": (0, 2**32 - 1), "seq_len": (2, 2**31 - 1)}).items():
        for value in values:
            check_number(name, value, BOUNDS[name])


def test_every_number_of_every_command_has_a_range() -> None:
    for config in CONFIGS:
        for option in declared_options(config):
            if option.kind in (int, float):
                assert option.option.bounds, f"{config.__name__} has {option.name}"
    for command in app.registered_commands:
        assert command.callback
        for name, parameter in signature(command.callback).parameters.items():
            if any(f"[{kind}" in str(parameter.annotation) for kind in ("int", "float")):
                assert name in BOUNDS or name == "threads", (
                    f"{command.callback.__name__} takes {name}, and no config does"
                )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingConfig(weight_decay=-1.0), "weight-decay -1 must be at least 0"),
        (lambda: TrainingConfig(learning_rate=INF), "learning-rate inf must be a finite number"),
        (lambda: hp.Budget(neuron_ratio=INF), r"neuron-ratio inf must lie in \(0, 1\)"),
        (lambda: CriterionOptions(temperature=INF), "temperature inf must be a finite number"),
        (lambda: hp.Calibration("x", num_samples=2**40), "num-samples 1099511627776 must be at most"),
        (lambda: hp.ComputeConfig(batch_size=0), "batch-size 0 must be at least 1"),
        (lambda: hp.Text("x", max_windows=0), "max-windows 0 must be at least 1"),
        (lambda: Tasks(("piqa",), limit=0), "limit 0 must be at least 1"),
    ],
)
def test_the_api_has_the_same_ranges(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("0,2", "; write 0.2"), (",5", "; write 0.5"), ("20%", "; write 0.2"), ("2.5 %", "; write 0.025"),
        ("1/5", "; write 0.2"), ("1/0", ""), ("1,024", "; write 1024"), ("-0,5", "; write -0.5"), ("fifth", ""),
        ("1.5", ""), ("", ""),
    ],
)  # fmt: skip
def test_numbers_as_people_write_them(text: str, hint: str) -> None:
    assert meant(text) == hint


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("prune", "x", "--output", "y", "--ratio", "0,2"),
            "--ratio '0,2' is no number; write 0.2 (see 'hifi",
        ),
        (("prune", "x", "--output", "y", "--ratio", "20%"), "--ratio '20%' is no number; write 0.2"),
        (("prune", "x", "--output", "y", "--width", "1.5"), "--width '1.5' is no whole number (see"),
        (("prune", "x", "--output", "y", "--num-samples", "1,024"), "'1,024' is no whole number; write 1024"),
        (("prune", "x", "--output", "y", "--ratoi", "1"), "there is no option --ratoi; did you mean --ratio"),
        (("prune", "x", "--output", "y", "--floor", "nan"), "floor nan must lie in [0, 1]"),
        (("recover", "x", "--data", "y", "--learning-rate", "inf"), "learning-rate inf must be a finite number"),
        (("recover", "x", "--data", "y", "--max-rows", "0"), "max-rows 0 must be at least 1"),
        (("evaluate", "x", "--max-windows", "0"), "max-windows 0 must be at least 1"),
        (("bench", "x", "y", "--rounds", "1001"), "rounds 1001 must be at most 1000"),
        (("prun", "x"), "no such command 'prun'. Did you mean 'prune'?"),
        (("inspect",), "missing argument 'MODEL' (see 'hifiprune inspect --help')"),
        (("score", "x", "--output"), "option '--output' requires an argument"),
    ],
)
def test_command_lines_that_cannot_be_read(words: tuple[str, ...], message: str) -> None:
    refused(run(*words), message)
    assert run(*words).err.count("\n") == 1
