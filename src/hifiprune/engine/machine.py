"""Detect whether the machine is busy with other work, since every time estimate depends on it."""

import os
import time
from dataclasses import dataclass

import psutil
import torch

TRIAL_SECONDS = 0.2
TRIAL_SIZE = 512
"""Rows and columns of the matrices that are multiplied meanwhile."""
FULL_SHARE = 0.8
"""Share of the CPU time wanted that an idle machine gives."""
SLACK = 0.5
"""Cores that other processes may use besides ours before the machine counts as busy."""


@dataclass(frozen=True)
class Machine:
    """Load of the machine.

    Attributes:
        cores: number of cores that this process may use.
        threads: number of threads that it computes with.
        share: CPU time that its threads got in a trial, divided by its wall time.
        others: number of cores that other processes used during the trial.
    """

    cores: int
    threads: int
    share: float
    others: float

    @classmethod
    def now(cls) -> "Machine":
        """Measure the load during a fifth of a second of matrix products."""
        cores = (
            sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        )
        threads, matrix = torch.get_num_threads(), torch.ones(TRIAL_SIZE, TRIAL_SIZE)
        matrix @ matrix  # starts the threads
        busy, own, start = _busy_seconds(cores), time.process_time(), time.perf_counter()
        while (wall := time.perf_counter() - start) < TRIAL_SECONDS:
            matrix @ matrix
        own, busy = time.process_time() - own, _busy_seconds(cores) - busy
        share = own / (wall * min(threads, len(cores)))
        return cls(len(cores), threads, share, max(0.0, busy - own) / wall)

    @property
    def busy(self) -> bool:
        """Return whether work here takes longer than on an idle machine."""
        crowded = self.others + min(self.threads, self.cores) > self.cores + SLACK
        return self.share < FULL_SHARE or crowded

    def __str__(self) -> str:
        """Return the evidence that the machine is busy."""
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        return f"others use {self.others:.1f} of {cores}, {min(self.share, 1):.0%} of the CPU time wanted was had"


def condition(device: str | torch.device) -> str:
    """Return what an estimate of time that was made just now depends on, to end its sentence with."""
    if torch.device(device).type != "cpu":
        return ", if nothing else uses the GPU"
    machine = Machine.now()
    if not machine.busy:
        return ", if the machine is idle"
    advice = "; OMP_NUM_THREADS=1 may be faster" if machine.threads > 1 else ""
    return f". The machine is busy now ({machine}): this holds for as long as it stays so{advice}"


def _busy_seconds(cores: list[int]) -> float:
    """Return the CPU time of all processes on these cores, and what a hypervisor took from them."""
    times = psutil.cpu_times(percpu=True)
    counted = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(getattr(times[core], name, 0.0) for core in cores if core < len(times) for name in counted)
