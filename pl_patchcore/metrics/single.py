"""Scores or maps, and the ground truth -> one figure each: AUROC, PRO, average precision, best F1.

The arithmetic is in `curve.py`, the states are in `state.py`; next: `evaluation.py`, which has all figures in one
pass. Figures are NaN without nominal or without anomalous scores. Pixels whose mask is 255 (unknown) do not count.
"""

from __future__ import annotations

import torch

from pl_patchcore.metrics.curve import Curve, Figure, average_precision, best_f1
from pl_patchcore.metrics.regions import pixel_areas
from pl_patchcore.metrics.state import LABELS, MASKS, PIXEL_LIMIT, Mode, PixelMetric
from pl_patchcore.numerics import one_thread


class ImageAUROC(PixelMetric):
    """AUROC of the images' anomaly scores, always exact; equal scores count as half.

    Example:
        >>> metric = ImageAUROC()
        >>> metric.update(torch.tensor([20.0, 30.0, 70.0]), torch.tensor([0, 0, 1]))
        >>> metric.compute().item()
        1.0
    """

    def __init__(self) -> None:
        super().__init__(mode="exact")

    @one_thread()
    def update(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Add images: raw scores ``(B,)`` and labels ``(B,)``, 0 or 1, else a `UserError`."""
        scores = self.check_scores("scores", scores, "B")
        self.keep_flat(scores, self.check_truth("labels", labels, LABELS, scores))


class PixelAUROC(PixelMetric):
    """AUROC of the pixels of all images; equal scores count as half. Modes and limits: see `PixelMetric`.

    Example:
        >>> metric = PixelAUROC()
        >>> metric.update(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[0, 1, 255]]]))
        >>> metric.compute().item(), metric.error_bound
        (1.0, 0.0)
    """

    @one_thread()
    def update(self, maps: torch.Tensor, masks: torch.Tensor) -> None:
        """Add images: raw maps ``(B, H, W)`` and masks ``(B, H, W)``, 0, 1 or 255, else a `UserError`."""
        maps = self.check_scores("maps", maps, "B H W")
        masks = self.check_truth("masks", masks, MASKS, maps)
        self.keep_flat(maps, masks, pixel_areas(masks) if self.weighted else None)


class PRO(PixelAUROC):
    """Per-region overlap of all images (also known as AUPRO).

    The mean over all regions of the share of the region covered, against the false-positive rate (the share covered
    of **all** nominal pixels of **all** images given, nominal images among them), integrated to a rate of 0.3 with
    the end point interpolated, and divided by 0.3 (Bergmann et al. 2020). A region is a connected component of
    mask == 1 in one image (8 neighbours). So PRO is the area under a ROC curve whose anomalous pixels weigh 1 / area
    of their region. The official PatchCore numbers take anomalous images only: they cannot be compared with these.

    An anomalous image whose mask is empty adds nominal pixels and no region; constant scores give ``fpr_limit / 2``.

    Args:
        fpr_limit: False-positive rate at which the integral ends, in (0, 1]; 0.05 and 0.01 are in use too.
        mode: As ``pixel_limit``, see `PixelMetric`.

    Example:
        >>> maps = torch.tensor([[[1.0, 2.0, 9.0], [3.0, 8.0, 4.0]]])  # (B, H, W)
        >>> masks = torch.tensor([[[1, 0, 1], [0, 0, 0]]])  # two regions of one pixel
        >>> metric = PRO(fpr_limit=1.0)
        >>> metric.update(maps, masks)
        >>> metric.compute().item()  # one above all nominal pixels, one below
        0.5
        >>> streaming = PRO(fpr_limit=1.0, mode="streaming")
        >>> abs(streaming(maps, masks).item() - 0.5) <= streaming.error_bound < 1e-9
        True
    """

    weighted = True

    def __init__(self, fpr_limit: float = 0.3, mode: Mode = "auto", pixel_limit: int = PIXEL_LIMIT) -> None:
        super().__init__(mode, pixel_limit, fpr_limit)


class AveragePrecision(PixelMetric):
    """Average precision: mean precision at the thresholds that just cover each anomalous pixel or image.

    The step-wise sum of scikit-learn's ``average_precision_score``. Limits and modes count scores: see `PixelMetric`.

    Example:
        >>> metric = AveragePrecision()
        >>> metric.update(torch.tensor([1.0, 1.5, 2.0, 3.0]), torch.tensor([0, 1, 0, 1]))
        >>> metric.compute().item()
        0.8333333333333333
    """

    @one_thread()
    def update(self, scores: torch.Tensor, truth: torch.Tensor) -> None:
        """Add raw scores of any shape, and the truth of each, 0, 1 or 255, else a `UserError`."""
        scores = self.check_scores("scores", scores)
        self.keep_flat(scores, self.check_truth("truth", truth, MASKS, scores))

    def of_curve(self, curve: Curve) -> Figure:
        """Average precision."""
        return average_precision(curve)


class BestF1(AveragePrecision):
    """Largest F1 over all thresholds: an oracle, since it takes the threshold from the ground truth.

    A score is called anomalous from the threshold on (score >= threshold). In streaming mode F1 and threshold belong
    together, and no threshold's F1 is larger by more than ``error_bound``.

    Example:
        >>> metric = BestF1()
        >>> metric.update(torch.tensor([1.0, 1.5, 2.0, 3.0]), torch.tensor([0, 1, 0, 1]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'oracle_f1': 0.8, 'oracle_threshold': 1.5}
    """

    @one_thread()
    def compute(self) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """``oracle_f1`` of all updates and its ``oracle_threshold``, 0-d float64."""
        figure, threshold = best_f1(self.curves()(lambda _: True))
        return {"oracle_f1": self.report(figure), "oracle_threshold": self.figure(threshold)}
