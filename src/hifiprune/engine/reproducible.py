"""Bit-identical results of two runs on one GPU, where they are asked for; on a CPU they are so in any case."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from hifiprune.errors import RunError, UserError

P = ParamSpec("P")
T = TypeVar("T")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Variable that cuBLAS reads once, before its first product."""
STEPS = 2.0**52
"""Steps of a probability in a sum of integers, which is the same in any order."""
AGREEMENT = (
    "not bit-identical: of two runs on one H100 (2026-11-27) every layer kept at least 99.86% of the same neurons; "
    "--deterministic makes scores of one GPU equal"
)


def reproducible(command: Callable[P, T]) -> Callable[P, T]:
    """Let a command whose configuration says `compute.deterministic` compute so."""

    @wraps(command)
    def run(*arguments: P.args, **options: P.kwargs) -> T:
        computes = [getattr(each, "compute", None) for each in (*arguments, *options.values())]
        if not any(getattr(compute, "deterministic", False) for compute in computes):
            return command(*arguments, **options)
        with deterministic():
            return command(*arguments, **options)

    return run


@contextmanager
def deterministic() -> Iterator[None]:
    """Compute by deterministic algorithms alone within this context, attention included; settings are restored after.

    The variable for cuBLAS stays set, since it is read once in a process.

    Raises:
        UserError: CUDA runs already without that variable.
        RunError: the model needs an operation that has no deterministic form.
    """
    if torch.cuda.is_initialized() and WORKSPACE not in os.environ:
        raise UserError(f"--deterministic needs {WORKSPACE}=:4096:8 in the environment before CUDA starts: set it")
    os.environ.setdefault(WORKSPACE, ":4096:8")
    fills: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = fills.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        fills.fill_uninitialized_memory = False  # nothing here reads what it did not write
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise RunError(f"{str(error).split('.')[0]}; leave out --deterministic") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        fills.fill_uninitialized_memory = filling


def repeatability(device: torch.device) -> dict[str, str]:
    """Return what a record says of how far another run on the same GPU agrees; nothing for a CPU."""
    if device.type == "cpu":
        return {}
    return {"repeatability": "bit-identical" if torch.are_deterministic_algorithms_enabled() else AGREEMENT}


def cumulative(probabilities: Tensor) -> Tensor:
    """Return the sums of the first columns of a matrix; where it must be deterministic on a GPU by integers."""
    if probabilities.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return probabilities.cumsum_(-1)
    return (probabilities.double() * STEPS).long().cumsum(-1).double().div_(STEPS).to(probabilities)
