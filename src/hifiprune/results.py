"""What commands find, as records of runs hold it: fields are keys of the JSON.

A field whose default is None is left out of the JSON where it is None (see `io.json_files.to_plain`).
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from pydantic import Field
from typing_extensions import TypedDict

PASSAGES = "passages.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """A mean over windows or items with its 95% interval, which needs at least two of them."""

    value: float
    low: float | None
    high: float | None

    def exp(self) -> "Estimate":
        """Return the estimate of `exp` of the mean; percentiles carry over because `exp` is monotone."""
        low, high = (None if bound is None else math.exp(min(bound, 700.0)) for bound in (self.low, self.high))
        return Estimate(math.exp(min(self.value, 700.0)), low, high)


@dataclass(frozen=True)
class Accuracy(Estimate):
    """The accuracy on a task, with its standard error."""

    standard_error: float | None


@dataclass(frozen=True)
class Cost:
    """Expected cost of a step, named as in `Stage`: peak bytes of memory (of a GPU, on one), and bytes written."""

    step: str
    seconds: float
    memory: int
    disk: int = 0


@dataclass(frozen=True)
class Stage:
    """Cost of a step of a run."""

    name: str
    seconds: float
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int | None = None


@dataclass(frozen=True)
class Pair(Generic[T]):
    """A figure of the dense and of the pruned model, or of a model before and after training."""

    before: T
    after: T


@dataclass(frozen=True)
class Ratio:
    """Fraction of all parameters to remove, where it was given, and that was removed."""

    asked: float | None
    reached: float


class Scoring(TypedDict, total=False):
    """Windows that were scored on, if any were, and other settings."""

    windows: int
    positions: int


@dataclass(frozen=True)
class Refit:
    """Squared residual of an output projection before and after its refit; no damping if the plain cut was better.

    Attributes:
        name: of the MLP.
        damping: that was chosen.
        plain_error: of the plain cut on held-out tokens, relative to the squared output.
        error: of the refit on them.
        fitted_share: what the refit leaves of the plain cut's residual on the tokens that it was fitted to.
    """

    name: str
    damping: float | None
    plain_error: float
    error: float
    fitted_share: float | None = None


@dataclass(frozen=True)
class Reconstruction:
    """Held-out error of a block before and after its training, and the step whose state stayed; 0 for none."""

    name: str
    before: float
    error: float
    step: int


@dataclass(frozen=True, kw_only=True)
class ScoreResults:
    """Results of `score`: the criterion, its mean objective, and what was scored on what."""

    criterion: str
    objective_nats: float | None
    model_hash: str
    data_hash: str
    scoring: Scoring
    stability: list[dict[str, float]] | None = None


@dataclass(frozen=True, kw_only=True)
class PruneResults(ScoreResults):
    """Results of `prune`."""

    width: Pair[int | Annotated[list[int], Field(min_length=1)]]
    parameters: Pair[int]
    asked: str
    ratio: Ratio
    neuron_ratio_reached: float
    weight_bytes: Pair[int]
    repair: list[Refit] | None = None
    reconstruction: list[Reconstruction] | None = None


@dataclass(frozen=True, kw_only=True)
class DemoResults(PruneResults):
    """Results of `demo`: also the continuations of each `prompt` by the `dense` and the `pruned` model."""

    metrics: dict[str, Estimate]
    measured_on: str
    continuations: list[dict[str, str]]
    dense: str | None = None
    calibration: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class RecoverResults:
    """Results of `recover`, with the record of the run that made the model it started from, as that is."""

    held_out_perplexity: Pair[float | None]
    best_step: int
    steps: int
    trouble: str | None
    losses: list[tuple[int, float]]
    held_out_losses: list[tuple[int, float]]
    model_hash: str | None = None
    data_hash: str | None = None
    teacher_hash: str | None
    pruning: Any


@dataclass(frozen=True)
class Dense:
    """The dense model that others were measured against."""

    name: str
    parameters: int


@dataclass(frozen=True)
class Measured:
    """What was measured of a model on the text, and by tasks."""

    parameters: int
    metrics: dict[str, Estimate] | None = None
    tasks: dict[str, Accuracy] | None = None
    average: Accuracy | None = None
    differences: dict[str, Estimate] | None = None

    @property
    def accuracies(self) -> dict[str, Accuracy]:
        """Return the accuracy on each task, and on average where that is defined."""
        return (self.tasks or {}) | ({"average": self.average} if self.average else {})


@dataclass(frozen=True)
class EvaluateResults:
    """Results of `evaluate`; `items` are those asked and those there, by task; differences are to `reference`."""

    models: Annotated[dict[str, Measured], Field(min_length=1)]
    dense: Dense | None = None
    windows: int | None = None
    positions: int | None = None
    reference: str | None = None
    items: dict[str, tuple[int, int]] | None = None


@dataclass(frozen=True)
class Token:
    """A token of a passage; after the first with KL divergence in nats and likeliest tokens of both models."""

    text: str
    kl: float | None = None
    dense: list[tuple[str, float]] | None = None
    pruned: list[tuple[str, float]] | None = None


Passages = dict[str, list[list[Token]]]
"""`passages.json`, by model."""


@dataclass(frozen=True)
class Workload:
    """Size of one generation request: sequences, prompt and new tokens of each, and whether `torch.compile` is used."""

    batch_size: int
    length: int
    new_tokens: int
    compiled: bool = False


@dataclass(frozen=True)
class Spread:
    """A figure over several rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """Prefill or a decode step: seconds, operations, and the speed-up over dense beside what operations promise."""

    seconds: Spread
    operations: float
    speedup: Spread
    promised: float
    share: float | None
    told_apart: bool | None = None


@dataclass(frozen=True)
class Timings:
    """Prefill (to the first token) and decode (each later one)."""

    first: Timing
    later: Timing


@dataclass(frozen=True)
class TimedWorkload:
    """Timings of every model, and the largest spread between rounds."""

    workload: Workload
    noise: float
    models: Annotated[dict[str, Timings], Field(min_length=1)]


@dataclass(frozen=True)
class BenchedModel:
    """Sizes of a model, its narrowest and widest MLP, and medians over the rounds."""

    parameters: int
    weight_bytes: int
    widths: list[int]
    unaligned: list[int]
    loading: float
    peak_memory_bytes: float
    peak_gpu_memory_bytes: float | None = None


@dataclass(frozen=True)
class BenchResults:
    """Results of `bench`."""

    models: dict[str, BenchedModel]
    workloads: list[TimedWorkload]
    threads: int
    device: str
    dtype: str
    remarks: list[str]
