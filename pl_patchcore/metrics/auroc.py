"""Anomaly scores or maps, and the ground truth -> area under the ROC curve.

Reads raw scores: finite numbers of any range, never clamped, normalised or passed through a sigmoid (as
torchmetrics' own AUROC does with scores outside [0, 1], which turns large ones into ties). Scores are kept in
float32, ranks are counted in int64 and areas are computed in float64. `curve_area` is the arithmetic of all
figures of this folder; next: `pro.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from pl_patchcore.errors import UserError
from pl_patchcore.preprocessing import UNKNOWN


def curve_area(
    above: Tensor, at_least: Tensor, total: int, weights: Tensor | None = None, fpr_limit: float = 1.0
) -> Tensor:
    """Area under "weighted share of positives covered" against "share of negatives covered".

    Lowering the threshold covers both. A positive of score s is uncovered up to the false-positive rate
    ``f_lo`` (share of negatives > s) and covered from ``f_hi`` (share of negatives >= s) on; between the two,
    where negatives tie with it, the curve is a straight line. So each positive adds, by itself, the area

    - ``limit - (f_lo + f_hi) / 2`` where ``f_hi <= limit``,
    - ``0`` where ``f_lo >= limit``,
    - ``(limit - f_lo)^2 / (2 (f_hi - f_lo))`` where the limit falls between them (interpolated end point),

    and the figure is the weighted mean of these, divided by the limit: the trapezoid rule on the full curve,
    without the curve. Sorted negatives and two binary searches for each positive are all it takes. AUROC
    (Fawcett 2006) is limit 1 and equal weights; PRO is limit 0.3 and weight 1 / area of a positive's region.

    Args:
        above: Number of negatives above each positive, ``(P,)``, int64 (see `count_above`).
        at_least: Number of negatives above or equal to each positive, ``(P,)``, int64.
        total: Number of negatives.
        weights: Weight of each positive, ``(P,)``; they need not sum to 1. None weighs all alike.
        fpr_limit: Share of negatives at which the integral ends, in (0, 1].

    Returns:
        Figure in [0, 1], 0-d float64; NaN where there is no positive or no negative.

    Example:
        >>> curve_area(torch.tensor([0, 1]), torch.tensor([1, 1]), total=2)  # one tied, one below one of two
        tensor(0.6250, dtype=torch.float64)
    """
    if total == 0 or above.numel() == 0:
        return torch.tensor(torch.nan, dtype=torch.float64)
    low, high = above.double() / total, at_least.double() / total
    whole = fpr_limit - (low + high) / 2
    tied = (at_least - above).clamp(min=1).double() / total  # at least one, lest 0 / 0
    part = (fpr_limit - low).clamp(min=0).square() / (2 * tied)
    area = torch.where(high <= fpr_limit, whole, part)
    mean = area.mean() if weights is None else (area * weights).sum() / weights.sum()
    return mean / fpr_limit


def sort_scores(parts: Sequence[Tensor]) -> Tensor:
    """Join ``parts`` into one ascending tensor (a copy).

    On the CPU NumPy sorts: its vectorised sort takes a third of the time of torch's.
    """
    joined = torch.cat([part.detach() for part in parts])
    if joined.device.type != "cpu":
        return joined.sort().values
    joined.numpy().sort()
    return joined


def count_above(ordered: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Count the negatives above, and the negatives above or equal to, each positive.

    Args:
        ordered: Scores of the negatives, ascending, ``(n,)``.
        positives: Scores of the positives, ``(P,)``, any order (sorted ones are found faster).

    Returns:
        Two counts, each ``(P,)``, int64, on the CPU.

    Example:
        >>> count_above(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 9.0]))
        (tensor([1, 0]), tensor([2, 0]))
    """
    positives = positives.detach().contiguous()
    above = len(ordered) - torch.searchsorted(ordered, positives, right=True)
    at_least = len(ordered) - torch.searchsorted(ordered, positives)
    return above.cpu(), at_least.cpu()


def auroc(nominal: Tensor, anomalous: Tensor) -> Tensor:
    """Area under the ROC curve, ties counted as half.

    Args:
        nominal: Anomaly scores of nominal images or pixels, ``(n,)``, floating point.
        anomalous: Anomaly scores of anomalous ones, ``(P,)``, of the same dtype and device.

    Returns:
        Figure in [0, 1], 0-d float64 on the CPU; NaN where either is empty. Cost: sorting ``nominal``.

    Example:
        >>> auroc(torch.tensor([40.0, 42.0]), torch.tensor([42.0, 70.0])).item()
        0.875
    """
    return curve_area(*count_above(sort_scores([nominal]), anomalous), total=len(nominal))


LABELS = {0: "nominal", 1: "anomalous"}
MASKS = {**LABELS, UNKNOWN: "unknown"}


class ScoreMetric(Metric):
    """Base of the metrics: states are lists of tensors, joined over batches and processes.

    Each state is declared once, with its dtype. A process that saw no image hands in an empty tensor of that
    dtype when states are gathered (torchmetrics would hand in float32, which int64 states cannot be gathered
    with).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self._empty: dict[str, Tensor] = {}

    def add_list(self, name: str, dtype: torch.dtype = torch.float32, columns: int | None = None) -> None:
        """Declare a list state of vectors, or of matrices with ``columns``."""
        self.add_state(name, [], dist_reduce_fx="cat")
        self._empty[name] = torch.empty((0,) if columns is None else (0, columns), dtype=dtype)

    def joined(self, name: str) -> Tensor:
        """State ``name`` as one tensor, in the order of the updates."""
        state: Tensor | list[Tensor] = getattr(self, name)
        return dim_zero_cat(state) if len(state) else self._empty[name].to(self.device)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes (see `torchmetrics.Metric.sync`)."""
        for name in self._empty:
            if len(getattr(self, name)) == 0:
                setattr(self, name, [self.joined(name)])
        super().sync(*args, **kwargs)

    def check_scores(self, name: str, scores: Tensor, dims: str) -> Tensor:
        """Check raw scores of shape ``dims``; returns them in float32 on the metric's device.

        Raises:
            UserError: If the shape is wrong, or a score is NaN, infinite or beyond float32.
        """
        if scores.ndim != len(dims.split()):
            raise UserError(f"{name} must have dimensions {dims}, got shape {tuple(scores.shape)}; reshape them.")
        kept = scores.detach().float()
        finite = torch.isfinite(kept)
        if not finite.all():
            raise UserError(
                f"{name} must be finite float32 numbers, got {scores[~finite][0].item()} among "
                f"{int((~finite).sum())} such of {scores.numel()}; look for broken images or features."
            )
        return kept.to(self.device)

    def check_truth(self, name: str, truth: Tensor, allowed: dict[int, str], scores: Tensor) -> Tensor:
        """Check that ``truth`` holds an ``allowed`` value for each score; returns it on the metric's device.

        Raises:
            UserError: If it does not.
        """
        if truth.shape != scores.shape:
            raise UserError(
                f"{name} must have the shape of the scores or maps, got {tuple(truth.shape)} for "
                f"{tuple(scores.shape)}; pass one value for each."
            )
        wrong = torch.stack([truth != value for value in allowed]).all(dim=0)
        if wrong.any():
            meaning = ", ".join(f"{value} ({word})" for value, word in allowed.items())
            raise UserError(f"{name} must hold {meaning}, got {truth[wrong][0].item()}; convert them first.")
        return truth.to(self.device)

    def figure(self, value: Tensor) -> Tensor:
        """Move a figure to the metric's device."""
        return value.to(self.device, torch.float32 if self.device.type == "mps" else torch.float64)


class _AUROC(ScoreMetric):
    nominal: list[Tensor]
    anomalous: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_list("nominal")
        self.add_list("anomalous")

    def compute(self) -> Tensor:
        """AUROC of all updates, 0-d float64."""
        return self.figure(auroc(self.joined("nominal"), self.joined("anomalous")))


class ImageAUROC(_AUROC):
    """AUROC of the images' anomaly scores; NaN without nominal or without anomalous images.

    Example:
        >>> metric = ImageAUROC()
        >>> metric.update(torch.tensor([20.0, 30.0, 70.0]), torch.tensor([0, 0, 1]))
        >>> metric.compute().item()
        1.0
    """

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add images: raw scores ``(B,)`` and labels ``(B,)``, 0 or 1, else a `UserError`."""
        scores = self.check_scores("scores", scores, "B")
        labels = self.check_truth("labels", labels, LABELS, scores)
        self.nominal.append(scores[labels == 0])
        self.anomalous.append(scores[labels == 1])


class PixelAUROC(_AUROC):
    """AUROC of the pixels of all images; NaN without nominal or without anomalous pixels.

    Pixels whose mask is 255 (unknown) are left out.

    Example:
        >>> metric = PixelAUROC()
        >>> metric.update(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[0, 1, 255]]]))
        >>> metric.compute().item()
        1.0
    """

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add images: raw maps ``(B, H, W)`` and masks ``(B, H, W)``, 0, 1 or 255, else a `UserError`."""
        maps = self.check_scores("maps", maps, "B H W")
        masks = self.check_truth("masks", masks, MASKS, maps)
        self.nominal.append(maps[masks == 0])
        self.anomalous.append(maps[masks == 1])
