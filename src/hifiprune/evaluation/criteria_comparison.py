"""Compare criteria from measured cells: means and spread, paired differences, overlaps, and scores by layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, stdev
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hifiprune.evaluation.bootstrap import bootstrap_paired
from hifiprune.evaluation.fidelity import estimate
from hifiprune.plan import Plan
from hifiprune.results import Estimate
from hifiprune.scoring.criteria import find_criterion
from hifiprune.study_results import CellValues, Overlap, Summary

Measured = dict[str, list[float]]
"""Metrics by window, perplexities as their logarithms; or the value of every task."""


@dataclass(frozen=True)
class Cell:
    """One criterion at one ratio with one draw of calibration windows: its plan, and the scores of each layer."""

    criterion: str
    ratio: float
    seed: int
    plan: Plan
    scores: list[Float[Tensor, "_"]]


def contrast(
    cells: Sequence[Cell], dense: Sequence[Measured], measured: Sequence[Sequence[Measured]], texts: int
) -> dict[str, Any]:
    """Return the fields of `CompareResults` that follow from what was measured.

    Args:
        cells: cells that were measured.
        dense: the dense model's metrics on each text, by window, perplexities as their logarithms; then on the tasks.
        measured: the same for each cell.
        texts: number of texts among them.
    """
    ratios = list(dict.fromkeys(cell.ratio for cell in cells))
    criteria = list(dict.fromkeys(cell.criterion for cell in cells))
    return {
        "dense": [_estimates(text) for text in dense[:texts]],
        "dense_tasks": {name: value for tasks in dense[texts:] for name, (value,) in tasks.items()},
        "cells": [
            CellValues(cell.criterion, cell.ratio, cell.seed, list(values))
            for cell, values in zip(cells, measured, strict=True)
        ],
        "summary": [
            _summary(name, ratio, text, metric, cells, measured)
            for text in range(len(dense))
            for metric in measured[0][text]
            if metric != "dense_perplexity"
            for ratio in ratios
            for name in criteria
        ],
        "overlap": {f"{ratio:g}": _overlaps([cell for cell in cells if cell.ratio == ratio]) for ratio in ratios},
        "mass": {
            name: _mass([cell for cell in cells if cell.criterion == name])
            for name in criteria
            if find_criterion(name).across_layers
        },
    }


def _summary(
    name: str, ratio: float, text: int, metric: str, cells: Sequence[Cell], measured: Sequence[Sequence[Measured]]
) -> Summary:
    """Compute mean and standard deviation over seeds, and the paired difference to the first criterion.

    For perplexity it is the difference of the logarithms, in nats per token.
    """

    def table(criterion: str) -> Float[Tensor, "seeds windows"]:
        chosen = [m for c, m in zip(cells, measured, strict=True) if (c.criterion, c.ratio) == (criterion, ratio)]
        return torch.tensor([texts[text][metric] for texts in chosen], dtype=torch.float64)

    values = table(name)
    by_seed = [_mean(metric, row) for row in values]
    difference = bootstrap_paired(values - table(cells[0].criterion))
    spread = stdev(by_seed) if len(by_seed) > 1 else None
    return Summary(text, metric, ratio, name, mean(by_seed), spread, difference)


def _mean(metric: str, windows: Float[Tensor, "windows"]) -> float:
    average = windows.double().mean()
    return float(average.exp() if metric.endswith("perplexity") else average)


def _estimates(measured: Measured) -> dict[str, Estimate]:
    return estimate({name: torch.tensor(values, dtype=torch.float64) for name, values in measured.items()})


def _overlaps(cells: Sequence[Cell]) -> Overlap:
    """Compute the Jaccard similarity of kept neurons, between criteria at a seed and between seeds of a criterion."""
    criteria = list(dict.fromkeys(cell.criterion for cell in cells))
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    pairs = list(combinations(seeds, 2))
    plans = {(cell.criterion, cell.seed): cell.plan for cell in cells}
    return Overlap(
        {a: {b: mean(jaccard(plans[a, s], plans[b, s]) for s in seeds) for b in criteria} for a in criteria},
        {name: mean(jaccard(plans[name, s], plans[name, t]) for s, t in pairs) if pairs else None for name in criteria},
    )


def jaccard(first: Plan, second: Plan) -> float:
    """Compute the Jaccard similarity of the neurons that two plans keep."""
    shared = sum(int(torch.isin(a, b).sum()) for a, b in zip(first.kept, second.kept, strict=True))
    return shared / (sum(first.widths) + sum(second.widths) - shared)


def _mass(cells: Sequence[Cell]) -> list[float]:
    """Compute each layer's share of the positive scores, averaged over a criterion's cells."""
    shares = []
    for cell in cells:
        sums = torch.stack([values.double().clamp(min=0).sum() for values in cell.scores])
        shares.append(sums / sums.sum())
    return [float(share) for share in torch.stack(shares).mean(0)]
