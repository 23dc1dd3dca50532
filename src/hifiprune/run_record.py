"""`RunRecord`: arguments, environment, costs and results of a run; saved as `run.json`."""

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil
import torch

from hifiprune.io.atomic import replacing
from hifiprune.io.json_files import to_plain
from hifiprune.progress import logger
from hifiprune.results import Cost, Stage

LIBRARIES = ("hifiprune", "torch", "transformers", "safetensors", "tokenizers", "datasets")
R = TypeVar("R")


@dataclass
class RunRecord(Generic[R]):
    """A run's arguments, environment, stages and results.

    Attributes:
        command: name of the command.
        arguments: as given, defaults filled in.
        commits: commit of each model from the hub, by its name among the arguments.
        results: what came out, a class of `hifiprune.results`; empty until the run ends.
        stages: seconds and peak memory in bytes of each stage, in order.
        expected: what stages were expected to cost, before they began.
        environment: versions, platform and device.
        reused_parts: how many were there from an interrupted run, whose seconds the stages do not count.
    """

    command: str
    arguments: dict[str, Any]
    commits: dict[str, str] = field(default_factory=dict)
    results: R = field(default_factory=dict)  # type: ignore[assignment]
    stages: list[Stage] = field(default_factory=list)
    expected: list[Cost] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=lambda: describe_environment())
    reused_parts: int = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage: wall-clock seconds and peak memory (resident, and of a GPU if there is one)."""
        logger.debug(f"{name} ...")
        reset_peak_memory()
        start = time.perf_counter()
        yield
        seconds = round(time.perf_counter() - start, 3)
        self.stages.append(Stage(name, seconds, **peak_memory()))
        logger.debug(f"{name}: {seconds:.1f} s")

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data, as in its file."""
        facts: dict[str, Any] = json.loads(json.dumps({"format": "hifiprune-run-1", **to_plain(self)}, default=str))
        return facts

    def save(self, path: str | Path) -> None:
        """Write the record as JSON; only a file that hifiprune wrote is replaced."""
        with replacing(path, overwrite=True) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def describe_environment() -> dict[str, Any]:
    """Return library versions and a description of the machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def reset_peak_memory() -> None:
    """Reset the measurement of peak memory where the system allows it (Linux and CUDA)."""
    for gpu in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(gpu)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return


def peak_memory() -> dict[str, int]:
    """Return peak resident memory in bytes since `reset_peak_memory` (since the start if not on Linux), and of GPUs."""
    peaks = {"peak_memory_bytes": _high_water_bytes()}
    if torch.cuda.is_available():
        gpus = range(torch.cuda.device_count())
        peaks["peak_gpu_memory_bytes"] = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    return peaks


def _high_water_bytes() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
