"""Anomalous scores ranked among nominal ones -> areas, average precision, best F1.

One curve serves all figures. Rows come from sorted scores (`exact_curve`) or from bins (`streaming.binned_curves`).
In a bin that holds several distinct values the order is unknown, and the true figure lies between all ties counted for
and all against: each function returns the middle and half the distance, which is 0 for exact rows.

All in NumPy on the CPU: it sorts in a third of torch's time, and its sums are the same for any number of threads.
Sources: Fawcett 2006 (ROC, ties as straight lines), Bergmann et al. 2020 (PRO). Next: `regions.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ROUNDING = 1e-12  # allowance for float64 sums, part of every reported bound of binned rows

Column = np.ndarray[Any, Any]


class Figure(NamedTuple):
    """A figure in [0, 1] and the largest distance of the true value from it; NaN without anomalous or nominal ones."""

    value: float
    bound: float


UNDEFINED = Figure(math.nan, math.nan)


class Curve(NamedTuple):
    """Distinct anomalous scores, descending, ranked among the nominal ones.

    Attributes:
        nominal: Number of nominal ones.
        scores: Thresholds ``(R,)``; of a bin the smallest score in it.
        anomalous: Number of anomalous pixels (or images) at each, ``(R,)``, int64.
        weights: Their weight together, ``(R,)``: float64, or of bins int64 in units of a fixed point.
        above: Number of nominal ones above, ``(R,)``, int64; ``at_least`` those above or equal.
        mixed: Whether the row is a bin with several distinct values, ``(R,)``, bool.
    """

    nominal: int
    scores: Column
    anomalous: Column
    weights: Column
    above: Column
    at_least: Column
    mixed: Column

    @property
    def exact(self) -> bool:
        """Whether the rows come from sorted scores, not from bins."""
        return bool(self.weights.dtype == np.float64)

    @property
    def defined(self) -> bool:
        """Whether there is something nominal and something anomalous."""
        return self.nominal > 0 and len(self.scores) > 0


Cell = tuple[int, ...]  # what pixels are kept apart by: numbers that name a group of images
Chosen = Callable[[Cell], bool]  # whether a cell is one of those asked for
Curves = Callable[[Chosen], Curve]  # gives the curve of all pixels of the chosen cells


def descending(nominal: int, *ascending: Column) -> Curve:
    """Curve of columns that are given by ascending score."""
    return Curve(nominal, *(np.flip(column).copy() for column in ascending))


def sort_scores(parts: Sequence[Tensor]) -> Column:
    """Join ``parts`` into one ascending array (a copy)."""
    joined: Column = torch.cat([part.detach().cpu() for part in parts]).numpy()
    joined.sort()
    return joined


def exact_curve(nominal: Sequence[Column], anomalous: Tensor, areas: Tensor | None = None) -> Curve:
    """Rank anomalous scores ``(P,)`` among nominal ones, by two binary searches for each distinct anomalous score.

    Args:
        nominal: Nominal scores, one array or several ``(n,)``, each ascending (`sort_scores`).
        anomalous: Anomalous scores, of the same dtype.
        areas: Area of the region of each, ``(P,)``, whose reciprocal is its weight; None weighs all alike.

    Example:
        >>> curve = exact_curve([np.array([1.0, 2.0, 3.0])], torch.tensor([2.0, 9.0, 2.0]))
        >>> curve.scores.tolist(), curve.anomalous.tolist(), curve.above.tolist(), curve.at_least.tolist()
        ([9.0, 2.0], [1, 2], [0, 1], [0, 2])
    """
    ranked: Column = anomalous.detach().cpu().numpy()
    weights = np.ones(len(ranked)) if areas is None else 1 / areas.cpu().double().numpy()
    order = np.argsort(ranked)
    ranked = ranked[order]
    first = np.append(True, ranked[1:] != ranked[:-1])[: len(ranked)]  # of those that tie
    scores, row, none = ranked[first], first.cumsum() - 1, np.zeros(first.sum(), np.int64)
    above = sum((len(part) - np.searchsorted(part, scores, side="right") for part in nominal), none)
    at_least = sum((len(part) - np.searchsorted(part, scores) for part in nominal), none)
    summed = np.bincount(row, weights[order]).astype(np.float64)  # int64 where there is no row
    return descending(sum(map(len, nominal)), scores, np.bincount(row), summed, above, at_least, none > 0)


def area(curve: Curve, fpr_limit: float = 1.0, *, weighted: bool = False) -> Figure:
    """Area under "share of anomalous covered" against "share of nominal covered", up to ``fpr_limit`` of these.

    An anomalous pixel of score s is uncovered up to the false-positive rate ``f_lo`` (share of nominal ones > s) and
    covered from ``f_hi`` (share of nominal ones >= s) on; between the two, where nominal ones tie with it, the curve is
    a straight line. So each adds, by itself, the area

    - ``limit - (f_lo + f_hi) / 2`` where ``f_hi <= limit``,
    - ``0`` where ``f_lo >= limit``,
    - ``(limit - f_lo)^2 / (2 (f_hi - f_lo))`` where the limit falls between them (interpolated end point),

    and the figure is the mean of these, ``weighted`` by the curve's weights or not, divided by the limit. AUROC is
    limit 1 and equal weights; PRO is limit 0.3 and weights of 1 / area of the pixel's region.

    Example:
        >>> area(exact_curve([np.array([40.0, 42.0])], torch.tensor([42.0, 70.0])))
        Figure(value=0.875, bound=0.0)
    """
    if not curve.defined:
        return UNDEFINED
    weights = (curve.weights if weighted else curve.anomalous).astype(np.float64)

    def mean(above: Column, at_least: Column) -> float:
        low, high = above / curve.nominal, at_least / curve.nominal
        tied = np.maximum(high - low, 1 / curve.nominal)  # at least one, lest 0 / 0
        part = np.clip(fpr_limit - low, 0, None) ** 2 / (2 * tied)
        areas = np.where(high <= fpr_limit, fpr_limit - (low + high) / 2, part)
        return float((areas * weights).sum() / weights.sum()) / fpr_limit

    best = mean(curve.above, np.where(curve.mixed, curve.above, curve.at_least))
    if curve.exact:
        return Figure(best, 0.0)
    worst = mean(np.where(curve.mixed, curve.at_least, curve.above), curve.at_least)
    # each fixed-point weight is off by half a unit at most
    unit = int(curve.anomalous.sum()) / max(1.0, float(weights.sum())) if weighted else 0.0
    return Figure((best + worst) / 2, (best - worst) / 2 + unit + ROUNDING)


def average_precision(curve: Curve) -> Figure:
    """Mean, over all anomalous pixels (or images), of the precision at the threshold that just covers each.

    The step-wise sum of scikit-learn's `average_precision_score`, without interpolation. In a mixed bin with p
    anomalous ones, t above it and f nominal ones down to its end, the j-th has precision ``(t + j) / (t + j + f)``
    at least, which is concave in j, so that p times the mean of first and last bounds their sum from below.

    Example:
        >>> average_precision(exact_curve([np.array([1.0, 2.0])], torch.tensor([1.5, 3.0]))).value
        0.8333333333333333
    """
    if not curve.defined:
        return UNDEFINED
    count = curve.anomalous.astype(np.float64)
    covered = np.cumsum(count)
    best = covered / (covered + np.where(curve.mixed, curve.above, curve.at_least))
    first, last = covered - count + 1, covered / (covered + curve.at_least)
    worst = np.where(curve.mixed, (first / (first + curve.at_least) + last) / 2, last)
    low, high = (float((values * count).sum() / covered[-1]) for values in (worst, best))
    return Figure(high, 0.0) if curve.exact else Figure((low + high) / 2, (high - low) / 2 + ROUNDING)


def best_f1(curve: Curve) -> tuple[Figure, float]:
    """Largest F1 over all thresholds, and the highest threshold that reaches it: score >= threshold is anomalous.

    With bins the two belong together, and the true best F1 lies between the F1 and the F1 plus its bound.

    Example:
        >>> best_f1(exact_curve([np.array([1.0, 2.0])], torch.tensor([1.5, 3.0])))
        (Figure(value=0.8, bound=0.0), 1.5)
    """
    if not curve.defined:
        return UNDEFINED, math.nan
    covered = curve.anomalous.cumsum().astype(np.float64)
    reached = 2 * covered / (covered[-1] + covered + curve.at_least)
    at = int(reached.argmax())
    value, bound = float(reached[at]), 0.0
    if not curve.exact:
        false = np.where(curve.mixed, curve.above, curve.at_least)
        bound = float((2 * covered / (covered[-1] + covered + false)).max()) - value + ROUNDING
    return Figure(value, bound), float(curve.scores[at])
