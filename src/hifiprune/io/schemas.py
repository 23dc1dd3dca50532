"""The shape of every file that commands leave and others read again, as far as they read it."""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

Count = Annotated[int, Field(gt=0)]
Index = Annotated[int, Field(ge=0, lt=2**31)]


class Estimate(TypedDict):
    """A value with its interval."""

    value: float
    low: float | None
    high: float | None


class Stage(TypedDict):
    """What a step of a run cost."""

    name: str
    seconds: float
    peak_memory_bytes: int
    peak_gpu_memory_bytes: NotRequired[int]


class PlanFile(TypedDict):
    """`plan.json`."""

    format: Literal["hifiprune-plan-1"]
    kept: Annotated[list[list[Index]], Field(min_length=1)]
    neurons: list[Count]
    names: list[str]
    ratio_asked: float | None
    ratio_reached: float
    parameters_before: Annotated[int, Field(ge=0)]
    parameters_after: Annotated[int, Field(ge=0)]
    criterion: str
    model_hash: str
    data_hash: str


class ScoresFacts(TypedDict):
    """What scores say of themselves in the metadata of their file."""

    format: Literal["hifiprune-scores-1"]
    names: Annotated[list[str], Field(min_length=1)]
    parameters_per_neuron: list[Count]
    total_parameters: Count
    criterion: str
    objective: float | None
    model_hash: str
    data_hash: str
    settings: dict[str, Any]


class Sizes(TypedDict):
    """Numbers before and after."""

    before: int
    after: int


class Widths(TypedDict):
    """Width before, and after: one for all MLPs, or each by itself."""

    before: int
    after: int | Annotated[list[int], Field(min_length=1)]


class Reached(TypedDict):
    """Fraction of all parameters that is gone."""

    reached: float


class Windows(TypedDict):
    """Calibration windows."""

    num_samples: int
    seq_len: int


class Allocation(TypedDict):
    """How widths were decided."""

    method: str


class FormerAllocation(TypedDict):
    """How widths were decided, as hifiprune 0.1 wrote it."""

    allocation: str


class PruneArguments(TypedDict):
    """How a checkpoint was pruned."""

    model: str
    repair: str
    calibration: Windows | None
    allocation: NotRequired[Allocation]
    sharing: NotRequired[FormerAllocation]


class Scoring(TypedDict):
    """Windows that were scored on, if any were."""

    windows: NotRequired[int]
    positions: NotRequired[int]


class PruneResults(TypedDict):
    """What a pruning came to."""

    parameters: Sizes
    width: Widths
    ratio: Reached
    criterion: str
    scoring: Scoring
    model_hash: str


class PruneRun(TypedDict):
    """`run.json` of `prune`."""

    command: Literal["prune"]
    arguments: PruneArguments
    commits: NotRequired[dict[str, str]]
    results: PruneResults
    stages: Annotated[list[Stage], Field(min_length=1)]


class Method(TypedDict):
    """How a model was trained."""

    method: str


class RecoverArguments(TypedDict):
    """How a checkpoint was trained."""

    training: Method


class RecoverResults(TypedDict):
    """What training came to."""

    best_step: int
    held_out_losses: list[tuple[int, float]]
    pruning: "Lineage | None"


class RecoverRun(TypedDict):
    """`run.json` of `recover`."""

    command: Literal["recover"]
    arguments: RecoverArguments
    results: RecoverResults
    stages: Annotated[list[Stage], Field(min_length=1)]


Lineage = Annotated[PruneRun | RecoverRun, Field(discriminator="command")]
"""The record of a run that made a checkpoint."""


class Measured(TypedDict):
    """What was measured of a model."""

    parameters: int
    metrics: NotRequired[dict[str, Estimate]]
    tasks: NotRequired[dict[str, Estimate]]
    average: NotRequired[Estimate]


class Dense(TypedDict):
    """The dense model that others were measured beside."""

    name: str
    parameters: int


class EvaluateResults(TypedDict):
    """Measurements of every model."""

    models: Annotated[dict[str, Measured], Field(min_length=1)]
    dense: NotRequired[Dense]
    windows: NotRequired[int]
    positions: NotRequired[int]
    items: NotRequired[dict[str, tuple[int, int]]]


class Source(TypedDict):
    """A text."""

    source: str


class EvaluateArguments(TypedDict):
    """The text that was measured on; by its name alone in records of version 0.1."""

    text: str | Source | None


class EvaluateRun(TypedDict):
    """`run.json` of `evaluate`."""

    command: Literal["evaluate"]
    arguments: EvaluateArguments
    results: EvaluateResults


class Spread(TypedDict):
    """A figure over several rounds."""

    median: float
    low: float
    high: float


class Part(TypedDict):
    """The gain in reading or in writing."""

    speedup: Spread
    promised: float
    share: float | None


class Timed(TypedDict):
    """The gains of a model."""

    first: Part
    later: Part


class Work(TypedDict):
    """What was timed."""

    batch_size: int
    length: int
    compiled: bool


class Workload(TypedDict):
    """The gains of every model in one kind of work."""

    workload: Work
    models: Annotated[dict[str, Timed], Field(min_length=1)]


class BenchResults(TypedDict):
    """Timings of every model."""

    models: dict[str, dict[str, Any]]
    workloads: list[Workload]
    remarks: list[str]


class BenchRun(TypedDict):
    """`run.json` of `bench`."""

    command: Literal["bench"]
    results: BenchResults


class Summary(TypedDict):
    """A criterion at a ratio by one metric, over all draws."""

    text: int
    metric: str
    criterion: str
    ratio: float
    mean: float
    spread: float | None


class CompareResults(TypedDict):
    """What a comparison came to."""

    texts: list[Source]
    summary: list[Summary]
    dense: list[dict[str, Estimate]]


class CompareRun(TypedDict):
    """`compare.json`."""

    command: Literal["compare"]
    results: CompareResults


ReportedRun = Annotated[PruneRun | RecoverRun | EvaluateRun | BenchRun | CompareRun, Field(discriminator="command")]
"""A record that a report shows."""


class Token(TypedDict):
    """A token of a passage; from the second on, what both models expected there."""

    text: str
    kl: NotRequired[float]
    dense: NotRequired[list[tuple[str, float]]]
    pruned: NotRequired[list[tuple[str, float]]]


Passages = dict[str, list[list[Token]]]
"""`passages.json`, by model."""


PASSAGES = "passages.json"
