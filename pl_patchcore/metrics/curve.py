"""Anomalous scores ranked among nominal ones -> areas, average precision, best F1.

One curve serves all figures. Lowering a threshold covers anomalous pixels (or images) and nominal ones; each
distinct anomalous score is a row: how many, of which weight, and how many nominal ones lie above it or tie with
it. AUROC weighs all anomalous pixels alike, PRO weighs each by 1 / area of its region; average precision and F1
count. Rows come from sorted scores (`exact_curve`) or from bins (`streaming.binned_curves`). In a bin that holds
several distinct values the order is unknown, and the true figure lies between all ties counted for and all
against: each function returns the middle and half the distance, which is 0 for exact rows.

Sources: Fawcett 2006 (ROC, ties as straight lines), Bergmann et al. 2020 (PRO). Next: `regions.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROUNDING = 1e-12  # allowance for float64 sums, part of every reported bound of binned rows


class Figure(NamedTuple):
    """A figure in [0, 1] and the largest distance of the true value from it (0: exact).

    Both are NaN where there is nothing anomalous or nothing nominal.
    """

    value: float
    bound: float


UNDEFINED = Figure(math.nan, math.nan)


class Curve(NamedTuple):
    """Distinct anomalous scores, descending, ranked among the nominal ones; tensors on the CPU.

    Attributes:
        scores: Thresholds ``(R,)``, float32; of a bin the smallest score in it.
        anomalous: Number of anomalous pixels (or images) at each, ``(R,)``, int64.
        weights: Their weight together, ``(R,)``: float64, or int64 in units of a fixed point.
        above: Number of nominal ones above, ``(R,)``, int64.
        at_least: Number of nominal ones above or equal, ``(R,)``, int64.
        mixed: Whether the row is a bin with several distinct values, ``(R,)``, bool.
        nominal: Number of nominal ones.
    """

    scores: Tensor
    anomalous: Tensor
    weights: Tensor
    above: Tensor
    at_least: Tensor
    mixed: Tensor
    nominal: int

    @property
    def exact(self) -> bool:
        """Whether the rows come from sorted scores, not from bins."""
        return self.weights.is_floating_point()


def descending(*ascending: Tensor, nominal: int) -> Curve:
    """Curve of columns that are given by ascending score."""
    return Curve._make([*(column.flip(0) for column in ascending), nominal])


def sort_scores(parts: Sequence[Tensor]) -> Tensor:
    """Join ``parts`` into one ascending tensor (a copy).

    On the CPU NumPy sorts: its vectorised sort takes a third of the time of torch's.
    """
    joined = torch.cat([part.detach() for part in parts])
    if joined.device.type != "cpu":
        return joined.sort().values
    joined.numpy().sort()
    return joined


def exact_curve(
    nominal: Sequence[Tensor], anomalous: Tensor, weights: Tensor | None = None, *, ordered: bool = False
) -> Curve:
    """Rank anomalous scores among nominal ones.

    Args:
        nominal: Nominal scores, one tensor or several ``(n,)``, floating point.
        anomalous: Anomalous scores, ``(P,)``, of the same dtype and device.
        weights: Weight of each anomalous score, ``(P,)``; None weighs all alike.
        ordered: Whether the nominal tensors are ascending already.

    Returns:
        The curve. Cost: sorting, and two binary searches for each distinct anomalous score.

    Example:
        >>> curve = exact_curve([torch.tensor([1.0, 2.0, 3.0])], torch.tensor([2.0, 9.0, 2.0]))
        >>> curve.scores.tolist(), curve.anomalous.tolist(), curve.above.tolist(), curve.at_least.tolist()
        ([9.0, 2.0], [1, 2], [0, 1], [0, 2])
    """
    anomalous = anomalous.detach()
    weights = torch.ones(len(anomalous), dtype=torch.float64) if weights is None else weights.double().cpu()
    on_cpu = anomalous.device.type == "cpu"  # where NumPy sorts faster
    order = torch.from_numpy(np.argsort(anomalous.numpy())) if on_cpu else anomalous.argsort()
    scores, row, counts = torch.unique_consecutive(anomalous[order], return_inverse=True, return_counts=True)
    row, counts = row.cpu(), counts.cpu()
    summed = torch.zeros(len(scores), dtype=torch.float64).index_add_(0, row, weights[order.cpu()])
    above, at_least = torch.zeros_like(counts), torch.zeros_like(counts)
    for part in nominal:
        ascending = part if ordered else sort_scores([part])
        above += (len(part) - torch.searchsorted(ascending, scores, right=True)).cpu()
        at_least += (len(part) - torch.searchsorted(ascending, scores)).cpu()
    columns = scores.cpu(), counts, summed, above, at_least, torch.zeros(len(scores), dtype=torch.bool)
    return descending(*columns, nominal=sum(map(len, nominal)))


def curve_area(
    above: Tensor, at_least: Tensor, total: int, weights: Tensor | None = None, fpr_limit: float = 1.0
) -> float:
    """Area under "weighted share of anomalous covered" against "share of nominal covered".

    Lowering the threshold covers both. An anomalous pixel of score s is uncovered up to the false-positive rate
    ``f_lo`` (share of nominal ones > s) and covered from ``f_hi`` (share of nominal ones >= s) on; between the
    two, where nominal ones tie with it, the curve is a straight line. So each adds, by itself, the area

    - ``limit - (f_lo + f_hi) / 2`` where ``f_hi <= limit``,
    - ``0`` where ``f_lo >= limit``,
    - ``(limit - f_lo)^2 / (2 (f_hi - f_lo))`` where the limit falls between them (interpolated end point),

    and the figure is the weighted mean of these, divided by the limit: the trapezoid rule on the full curve,
    without the curve. AUROC is limit 1 and equal weights; PRO is limit 0.3 and weight 1 / area of the region.

    Args:
        above: Number of nominal ones above each anomalous one, ``(P,)``, int64.
        at_least: Number of nominal ones above or equal to each, ``(P,)``, int64.
        total: Number of nominal ones; without any, or without anomalous ones, the figure is NaN.
        weights: Weight of each anomalous one, ``(P,)``; they need not sum to 1. None weighs all alike.
        fpr_limit: Share of nominal ones at which the integral ends, in (0, 1].

    Example:
        >>> curve_area(torch.tensor([0, 1]), torch.tensor([1, 1]), total=2)  # one tied, one below one of two
        0.625
    """
    if total == 0 or above.numel() == 0:
        return math.nan
    low, high = above.numpy() / total, at_least.numpy() / total
    tied = np.maximum(high - low, 1 / total)  # at least one, lest 0 / 0
    part = np.clip(fpr_limit - low, 0, None) ** 2 / (2 * tied)
    areas = np.where(high <= fpr_limit, fpr_limit - (low + high) / 2, part)
    shares = np.ones(len(areas)) if weights is None else weights.numpy().astype(np.float64)
    return float((areas * shares).sum() / shares.sum()) / fpr_limit  # NumPy's sum: the same for any thread count


def area(curve: Curve, fpr_limit: float = 1.0, *, weighted: bool = False) -> Figure:
    """Area under the curve up to the false-positive rate ``fpr_limit``, divided by it (see `curve_area`).

    With the curve's weights (PRO) where ``weighted``; otherwise every anomalous pixel weighs the same (AUROC).

    Example:
        >>> area(exact_curve([torch.tensor([40.0, 42.0])], torch.tensor([42.0, 70.0])))
        Figure(value=0.875, bound=0.0)
    """
    weights = curve.weights if weighted else curve.anomalous
    ties_for = torch.where(curve.mixed, curve.above, curve.at_least)
    best = curve_area(curve.above, ties_for, curve.nominal, weights, fpr_limit)
    if curve.exact:
        return Figure(best, best * 0)
    ties_against = torch.where(curve.mixed, curve.at_least, curve.above)
    worst = curve_area(ties_against, curve.at_least, curve.nominal, weights, fpr_limit)
    # each fixed-point weight is off by half a unit at most
    unit = int(curve.anomalous.sum()) / max(1.0, float(weights.double().sum())) if weighted else 0.0
    return Figure((best + worst) / 2, (best - worst) / 2 + unit + ROUNDING)


def auroc(nominal: Tensor, anomalous: Tensor) -> float:
    """Area under the ROC curve of nominal scores ``(n,)`` and anomalous ones ``(P,)``, ties counted as half.

    Both are floating point, of one dtype and device; NaN where either is empty. Cost: sorting ``nominal``.

    Example:
        >>> auroc(torch.tensor([40.0, 42.0]), torch.tensor([42.0, 70.0]))
        0.875
    """
    return area(exact_curve([nominal], anomalous)).value


def pro(nominal: Tensor, anomalous: Tensor, areas: Tensor, fpr_limit: float = 0.3) -> float:
    """Per-region overlap up to a false-positive rate (defined at `single.PRO`).

    Args:
        nominal: Scores of all nominal pixels, ``(n,)``, floating point.
        anomalous: Scores of the anomalous pixels, ``(P,)``.
        areas: Area in pixels of the region that each anomalous pixel belongs to, ``(P,)`` (`regions.pixel_areas`).
        fpr_limit: False-positive rate at which the integral ends, in (0, 1].

    Example:
        >>> nominal, anomalous = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 5.0, 0.0])
        >>> pro(nominal, anomalous, areas=torch.tensor([2, 2, 1]))  # one region found, one missed
        0.5
    """
    return area(exact_curve([nominal], anomalous, areas.double().reciprocal()), fpr_limit, weighted=True).value


def average_precision(curve: Curve) -> Figure:
    """Mean, over all anomalous pixels (or images), of the precision at the threshold that just covers each.

    The step-wise sum of scikit-learn's `average_precision_score`, without interpolation. In a mixed bin with p
    anomalous ones, t above it and f nominal ones down to its end, the j-th has precision ``(t + j) / (t + j + f)``
    at least, which is concave in j, so that p times the mean of first and last bounds their sum from below.

    Example:
        >>> average_precision(exact_curve([torch.tensor([1.0, 2.0])], torch.tensor([1.5, 3.0]))).value
        0.8333333333333333
    """
    if curve.nominal == 0 or len(curve.scores) == 0:
        return UNDEFINED
    count, mixed = curve.anomalous.numpy().astype(np.float64), curve.mixed.numpy()
    above, at_least = curve.above.numpy(), curve.at_least.numpy()
    covered = np.cumsum(count)
    best = covered / (covered + np.where(mixed, above, at_least))
    if curve.exact:
        return Figure(float((best * count).sum() / covered[-1]), 0.0)
    first = covered - count + 1
    last = covered / (covered + at_least)
    worst = np.where(mixed, (first / (first + at_least) + last) / 2, last)
    low, high = (float((values * count).sum() / covered[-1]) for values in (worst, best))
    return Figure((low + high) / 2, (high - low) / 2 + ROUNDING)


def best_f1(curve: Curve) -> tuple[Figure, float]:
    """Largest F1 over all thresholds. It looks at the ground truth: an oracle, no operating point.

    Returns:
        F1, and the threshold that reaches it (score >= threshold is called anomalous; of several the highest). With
        bins, the two belong together, and the true best F1 lies between the F1 and the F1 plus its bound.

    Example:
        >>> best_f1(exact_curve([torch.tensor([1.0, 2.0])], torch.tensor([1.5, 3.0])))
        (Figure(value=0.8, bound=0.0), 1.5)
    """
    if curve.nominal == 0 or len(curve.scores) == 0:
        return UNDEFINED, math.nan
    covered = curve.anomalous.numpy().cumsum().astype(np.float64)
    reached = 2 * covered / (covered[-1] + covered + curve.at_least.numpy())
    at = int(reached.argmax())
    value, bound = float(reached[at]), 0.0
    if not curve.exact:
        false = np.where(curve.mixed.numpy(), curve.above.numpy(), curve.at_least.numpy())
        bound = float((2 * covered / (covered[-1] + covered + false)).max()) - value + ROUNDING
    return Figure(value, bound), float(curve.scores[at])


def curve_points(curve: Curve, *, weighted: bool = False) -> tuple[Tensor, Tensor]:
    """Corners of the curve, for a plot: false-positive rate against share covered (ROC, or PRO if weighted).

    Returns:
        Two ascending tensors of one length, float64, from (0, 0) to (1, 1).

    Example:
        >>> curve_points(exact_curve([torch.tensor([1.0, 2.0])], torch.tensor([2.0])))
        (tensor([0.0000, 0.0000, 0.5000, 1.0000], dtype=torch.float64), tensor([0., 0., 1., 1.], dtype=torch.float64))
    """
    weights = (curve.weights if weighted else curve.anomalous).double()
    covered = weights.cumsum(0) / weights.sum()
    before = torch.cat([covered.new_zeros(1), covered[:-1]])
    fpr = torch.stack([curve.above, curve.at_least], dim=1).double().flatten() / curve.nominal
    share = torch.stack([before, covered], dim=1).flatten()
    zero, one = fpr.new_zeros(1), fpr.new_ones(1)
    return torch.cat([zero, fpr, one]), torch.cat([zero, share, one])
