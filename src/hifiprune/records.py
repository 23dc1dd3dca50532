"""Records of runs as other commands read them: `run.json` and `compare.json`, as far as they are read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from hifiprune.results import BenchResults, EvaluateResults, PruneResults, RecoverResults, Stage
from hifiprune.study_results import CompareResults

Stages = Annotated[list[Stage], Field(min_length=1)]


@dataclass(frozen=True)
class Allocation:
    """How widths were decided."""

    method: str


@dataclass(frozen=True)
class Source:
    """A text."""

    source: str


@dataclass(frozen=True)
class CalibrationText(Source):
    """Calibration windows, and the sources that were mixed in with their shares."""

    num_samples: int
    seq_len: int
    mixed: list[tuple[str, float]] = field(default_factory=list)

    @property
    def sources(self) -> list[str]:
        """Return all sources."""
        return [self.source, *(source for source, _ in self.mixed)]


@dataclass(frozen=True)
class PruneArguments:
    """How a checkpoint was pruned."""

    model: str
    repair: str
    calibration: CalibrationText | None
    allocation: Allocation | None = None
    sharing: dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Return how widths were decided; version 0.1 called that `sharing`."""
        return self.allocation.method if self.allocation else str(self.sharing.get("allocation", "uniform"))


@dataclass(frozen=True)
class PruneRun:
    """`run.json` of `prune`."""

    command: Literal["prune"]
    arguments: PruneArguments
    results: PruneResults
    stages: Stages
    commits: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingArguments:
    """How a model was trained."""

    method: str
    lora_r: int
    distill_weight: float
    match_hidden: float


@dataclass(frozen=True)
class RecoverArguments:
    """How a checkpoint was trained."""

    model: str
    training: TrainingArguments


@dataclass(frozen=True, kw_only=True)
class ReadRecoverResults(RecoverResults):
    """Results of `recover`, with the record of the run before read as well."""

    teacher_hash: str | None = None
    pruning: "Lineage | None"


@dataclass(frozen=True)
class RecoverRun:
    """`run.json` of `recover`."""

    command: Literal["recover"]
    arguments: RecoverArguments
    results: ReadRecoverResults
    stages: Stages


Lineage = Annotated[PruneRun | RecoverRun, Field(discriminator="command")]
"""The record of a run that made a checkpoint."""


@dataclass(frozen=True)
class EvaluateArguments:
    """The text that was measured on; its name alone in records of version 0.1."""

    text: str | Source | None


@dataclass(frozen=True)
class EvaluateRun:
    """`run.json` of `evaluate`."""

    command: Literal["evaluate"]
    arguments: EvaluateArguments
    results: EvaluateResults

    @property
    def measured_on(self) -> str:
        """Describe the text."""
        text = self.arguments.text
        source = Path(text.source if isinstance(text, Source) else str(text)).name
        return f"{self.results.windows} windows of {self.results.positions} tokens of {source}"


@dataclass(frozen=True)
class BenchRun:
    """`run.json` of `bench`."""

    command: Literal["bench"]
    results: BenchResults


@dataclass(frozen=True)
class CompareRun:
    """`compare.json`."""

    command: Literal["compare"]
    results: CompareResults


ReportedRun = Annotated[PruneRun | RecoverRun | EvaluateRun | BenchRun | CompareRun, Field(discriminator="command")]
"""A record that a report shows."""
