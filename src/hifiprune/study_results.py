"""What `compare` and `ablate` find; see `results`."""

from dataclasses import dataclass

from hifiprune.results import Estimate


@dataclass(frozen=True)
class HeldText:
    """A held-out text: number of windows, and tokens of each."""

    source: str
    windows: list[int]


@dataclass(frozen=True)
class CellValues:
    """What was measured by window, on each text and then by task, of one criterion at one ratio with one draw."""

    criterion: str
    ratio: float
    seed: int
    windows: list[dict[str, list[float]]]


@dataclass(frozen=True)
class Summary:
    """A criterion at a ratio by one metric on one text: mean and deviation over draws, difference to the first."""

    text: int
    metric: str
    ratio: float
    criterion: str
    mean: float
    spread: float | None
    difference: Estimate


@dataclass(frozen=True)
class Overlap:
    """Similarity of kept neurons: between criteria, and between draws of a criterion."""

    criteria: dict[str, dict[str, float]]
    seeds: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class CompareResults:
    """Results of `compare`.

    Attributes:
        model_hash: SHA-256 of the dense weights.
        data_hashes: SHA-256 of the windows of each draw.
        texts: held-out texts.
        widths: width and removed fraction, by ratio.
        dense: metrics of the dense model, by text.
        dense_tasks: accuracies of the dense model.
        cells: values by window.
        summary: means over draws.
        overlap: similarity of kept neurons, by ratio.
        mass: share of the score in each layer, of criteria whose scores can be added across layers.
    """

    model_hash: str
    data_hashes: list[str]
    texts: list[HeldText]
    widths: dict[str, tuple[int, float]]
    dense: list[dict[str, Estimate]]
    dense_tasks: dict[str, float]
    cells: list[CellValues]
    summary: list[Summary]
    overlap: dict[str, Overlap]
    mass: dict[str, list[float]]


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its interval; none where nothing can be ranked."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Correlations:
    """Rank correlations of a criterion's scores with the divergence measured."""

    all_layers: Correlation
    within_layers: Correlation


@dataclass(frozen=True)
class AblationTrial:
    """Neurons that were removed from a layer: the divergence measured, and the sum of their scores by criterion."""

    layer: int
    neurons: list[int]
    kl: float
    scores: dict[str, float]


@dataclass(frozen=True)
class AblateResults:
    """Results of `ablate`: correlations by criterion, then by kind of trial (`single` or `groups`)."""

    model_hash: str
    correlations: dict[str, dict[str, Correlations]]
    trials: list[AblationTrial]
