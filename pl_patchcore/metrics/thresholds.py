"""Scores or maps, and the ground truth -> average precision, best F1, false alarms.

All take scores of any shape, of images ``(B,)`` or of pixels ``(B, H, W)``, with the truth of each: 0 nominal,
1 anomalous, 255 unknown (left out). Scores that are NaN or infinite raise. Next: `evaluation.py`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pl_patchcore.errors import UserError
from pl_patchcore.metrics.curve import average_precision, best_f1
from pl_patchcore.metrics.state import MASKS, PIXEL_LIMIT, Mode, PixelMetric, ScoreMetric
from pl_patchcore.numerics import one_thread


def exceeds(scores: Tensor, threshold: float) -> Tensor:
    """Whether float32 ``scores`` exceed a float64 ``threshold``, compared as real numbers.

    Example:
        >>> exceeds(torch.tensor([0.1, 0.2]), 0.1).tolist()  # the float32 next to 0.1 is 0.100000001
        [True, True]
    """
    lower = np.float32(threshold)
    if float(lower) > threshold:
        lower = np.nextafter(lower, np.float32(-np.inf))
    return scores > float(lower)  # no float32 lies between the two


class AveragePrecision(PixelMetric):
    """Average precision: mean precision at the thresholds that just cover each anomalous pixel or image.

    The step-wise sum of scikit-learn's ``average_precision_score``. NaN without nominal or without anomalous ones;
    constant scores give the share of anomalous ones.

    Args:
        mode: ``exact`` keeps every score. ``streaming`` keeps a histogram of bounded memory, and after ``compute``
            ``error_bound`` says how far the true value may be. ``auto`` is exact up to ``pixel_limit`` scores.
        pixel_limit: Largest number of scores, over all processes, that ``auto`` keeps exactly.

    Example:
        >>> metric = AveragePrecision()
        >>> metric.update(torch.tensor([1.0, 1.5, 2.0, 3.0]), torch.tensor([0, 1, 0, 1]))
        >>> metric.compute().item()
        0.8333333333333333
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, mode: Mode = "auto", pixel_limit: int = PIXEL_LIMIT) -> None:
        super().__init__(mode, pixel_limit)

    @one_thread()
    def update(self, scores: Tensor, truth: Tensor) -> None:
        """Add raw scores of any shape, and the truth of each, 0, 1 or 255, else a `UserError`."""
        scores = self.check_scores("scores", scores, None)
        self.keep_flat(scores, self.check_truth("truth", truth, MASKS, scores))

    @one_thread()
    def compute(self) -> Tensor:
        """Average precision of all updates, 0-d float64."""
        return self.report(average_precision(self.curves()(lambda _: True)))


class BestF1(AveragePrecision):
    """Largest F1 over all thresholds: an oracle, since it takes the threshold from the ground truth.

    A score is called anomalous from the threshold on (score >= threshold). NaN without nominal or without anomalous
    ones. In streaming mode F1 and threshold belong together, and no threshold's F1 is larger by more than
    ``error_bound``.

    Args:
        mode: ``exact`` keeps every score. ``streaming`` keeps a histogram of bounded memory, and after ``compute``
            ``error_bound`` says how far the true value may be. ``auto`` is exact up to ``pixel_limit`` scores.
        pixel_limit: Largest number of scores, over all processes, that ``auto`` keeps exactly.

    Example:
        >>> metric = BestF1()
        >>> metric.update(torch.tensor([1.0, 1.5, 2.0, 3.0]), torch.tensor([0, 1, 0, 1]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'oracle_f1': 0.8, 'oracle_threshold': 1.5}
    """

    @one_thread()
    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """``oracle_f1`` of all updates and its ``oracle_threshold``, 0-d float64."""
        figure, threshold = best_f1(self.curves()(lambda _: True))
        return {"oracle_f1": self.report(figure), "oracle_threshold": self.figure(threshold)}


class FalseAlarmRate(ScoreMetric):
    """Share of the nominal pixels or images whose score exceeds a threshold; NaN where there are none.

    Exact, in constant memory, whatever the scores. The threshold should come from held-out nominal data, not from
    the images counted here.

    Args:
        threshold: Finite number; a score is an alarm when score > threshold.

    Example:
        >>> metric = FalseAlarmRate(threshold=2.0)
        >>> metric.update(torch.tensor([1.0, 2.0, 2.5, 9.0]), torch.tensor([0, 0, 0, 1]))
        >>> metric.compute().item()
        0.3333333333333333
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    alarms: Tensor
    nominal: Tensor

    def __init__(self, threshold: float) -> None:
        super().__init__()
        if not math.isfinite(threshold):
            raise UserError(f"threshold must be a finite number, got {threshold}.")
        self.threshold = threshold
        self.add_state("alarms", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("nominal", torch.tensor(0), dist_reduce_fx="sum")

    @one_thread()
    def update(self, scores: Tensor, truth: Tensor) -> None:
        """Add raw scores of any shape, and the truth of each, 0, 1 or 255, else a `UserError`."""
        scores = self.check_scores("scores", scores, None)
        nominal = self.check_truth("truth", truth, MASKS, scores) == 0
        self.alarms += (nominal & exceeds(scores, self.threshold)).sum()
        self.nominal += nominal.sum()

    @one_thread()
    def compute(self) -> Tensor:
        """False-alarm rate of all updates, 0-d float64."""
        return self.figure(int(self.alarms) / int(self.nominal) if self.nominal else math.nan)
