"""Scores and maps at a given threshold, and the ground truth -> F1 of images (ClassF1) and of pixels (SegF1).

The two of MVTec AD 2 (Heckler-Kram et al. 2025): the threshold is given, never taken from the ground truth, and what
exceeds it is called anomalous. Next: `evaluation.py`, which has both in its one pass.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pl_patchcore.errors import UserError
from pl_patchcore.metrics.curve import Figure
from pl_patchcore.metrics.state import LABELS, MASKS, RawMetric
from pl_patchcore.numerics import one_thread


def exceeds(scores: Tensor, threshold: float | None) -> Tensor:
    """Whether float32 ``scores`` exceed a float64 ``threshold``, compared as real numbers; None: none does.

    Example:
        >>> exceeds(torch.tensor([0.1, 0.2]), 0.1).tolist()  # the float32 next to 0.1 is 0.100000001
        [True, True]
    """
    lower = np.float32(math.inf if threshold is None else threshold)
    if threshold is not None and float(lower) > threshold:
        lower = np.nextafter(lower, np.float32(-np.inf))
    return scores > float(lower)  # no float32 lies between the two


def f1_at(hits: int, alarms: int, anomalous: int) -> float:
    """F1 of ``hits`` of so many ``anomalous`` ones and of false ``alarms``; NaN where nothing is anomalous.

    Example:
        >>> f1_at(hits=3, alarms=1, anomalous=4)
        0.75
    """
    return 2 * hits / (anomalous + hits + alarms) if anomalous else math.nan


class SegF1(RawMetric):
    """F1 of the pixels of all images together; pixels whose mask is 255 do not count. NaN without anomalous pixels.

    Args:
        threshold: A pixel is called anomalous when its score > threshold.

    Example:
        >>> metric = SegF1(threshold=2.0)
        >>> metric.update(torch.tensor([[[1.0, 3.0]], [[4.0, 5.0]]]), torch.tensor([[[0, 0]], [[1, 1]]]))
        >>> metric.compute().item()
        0.8
    """

    counts: Tensor

    def __init__(self, threshold: float) -> None:
        super().__init__()
        if not math.isfinite(threshold):
            raise UserError(f"threshold must be a finite number, got {threshold}; calibrate the model, or choose one.")
        self.threshold = threshold
        self.add_state("counts", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")  # as `f1_at` takes them

    @one_thread()
    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add images: raw maps ``(B, H, W)`` and masks ``(B, H, W)``, 0, 1 or 255, else a `UserError`."""
        maps = self.check_scores("maps", maps, "B H W")
        self.count(maps, self.check_truth("masks", masks, MASKS, maps))

    def count(self, scores: Tensor, truth: Tensor) -> None:
        """Add scores and the truth of each."""
        above, anomalous = exceeds(scores, self.threshold), truth == 1
        self.counts += torch.stack([(above & anomalous).sum(), (above & (truth == 0)).sum(), anomalous.sum()])

    def compute(self) -> Tensor:
        """F1 of all updates, 0-d float64."""
        return self.report(Figure(f1_at(*self.counts.tolist()), 0.0))


class ClassF1(SegF1):
    """F1 of images by their anomaly scores; NaN without anomalous images.

    Args:
        threshold: An image is called anomalous when its score > threshold.

    Example:
        >>> metric = ClassF1(threshold=2.0)
        >>> metric.update(torch.tensor([1.0, 3.0, 4.0, 5.0]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute().item()
        0.8
    """

    @one_thread()
    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add images: raw scores ``(B,)`` and labels ``(B,)``, 0 or 1, else a `UserError`."""
        scores = self.check_scores("scores", scores, "B")
        self.count(scores, self.check_truth("labels", labels, LABELS, scores))
