"""Anomaly scores or maps, and the ground truth -> area under the ROC curve.

The arithmetic is `curve.area`, the states are in `state.py`; next: `pro.py`.
"""

from __future__ import annotations

from torch import Tensor

from pl_patchcore.metrics.curve import area, exact_curve
from pl_patchcore.metrics.state import LABELS, MASKS, PIXEL_LIMIT, Mode, PixelMetric, ScoreMetric
from pl_patchcore.numerics import one_thread


def auroc(nominal: Tensor, anomalous: Tensor) -> float:
    """Area under the ROC curve, ties counted as half.

    Args:
        nominal: Anomaly scores of nominal images or pixels, ``(n,)``, floating point.
        anomalous: Anomaly scores of anomalous ones, ``(P,)``, of the same dtype and device.

    Returns:
        Figure in [0, 1]; NaN where either is empty. Cost: sorting ``nominal``.

    Example:
        >>> import torch
        >>> auroc(torch.tensor([40.0, 42.0]), torch.tensor([42.0, 70.0]))
        0.875
    """
    return area(exact_curve([nominal], anomalous)).value


class ImageAUROC(ScoreMetric):
    """AUROC of the images' anomaly scores, always exact; NaN without nominal or without anomalous images.

    Equal scores count as half, so that constant scores give 0.5. Scores that are NaN or infinite raise.

    Example:
        >>> import torch
        >>> metric = ImageAUROC()
        >>> metric.update(torch.tensor([20.0, 30.0, 70.0]), torch.tensor([0, 0, 1]))
        >>> metric.compute().item()
        1.0
    """

    nominal: list[Tensor]
    anomalous: list[Tensor]
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.add_list("nominal")
        self.add_list("anomalous")

    @one_thread()
    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add images: raw scores ``(B,)`` and labels ``(B,)``, 0 or 1, else a `UserError`."""
        scores = self.check_scores("scores", scores, "B")
        labels = self.check_truth("labels", labels, LABELS, scores)
        self.nominal.append(scores[labels == 0])
        self.anomalous.append(scores[labels == 1])

    @one_thread()
    def compute(self) -> Tensor:
        """AUROC of all updates, 0-d float64."""
        return self.figure(auroc(self.joined("nominal"), self.joined("anomalous")))


class PixelAUROC(PixelMetric):
    """AUROC of the pixels of all images; NaN without nominal or without anomalous pixels.

    Pixels whose mask is 255 (unknown) are left out. Equal scores count as half; scores that are NaN or infinite
    raise.

    Args:
        anomalous_only: Take only images with an anomalous pixel, as some published figures do: nominal images
            enter neither with their pixels nor otherwise.
        mode: ``exact`` keeps every pixel. ``streaming`` keeps a histogram of bounded memory, and after ``compute``
            ``error_bound`` says how far the true value may be. ``auto`` is exact up to ``pixel_limit`` pixels.
        pixel_limit: Largest number of pixels, over all processes, that ``auto`` keeps exactly.

    Example:
        >>> import torch
        >>> metric = PixelAUROC()
        >>> metric.update(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[0, 1, 255]]]))
        >>> metric.compute().item(), metric.error_bound
        (1.0, 0.0)
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, anomalous_only: bool = False, mode: Mode = "auto", pixel_limit: int = PIXEL_LIMIT) -> None:
        super().__init__(mode, pixel_limit)
        self.anomalous_only = anomalous_only

    @one_thread()
    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add images: raw maps ``(B, H, W)`` and masks ``(B, H, W)``, 0, 1 or 255, else a `UserError`."""
        maps = self.check_scores("maps", maps, "B H W")
        masks = self.check_truth("masks", masks, MASKS, maps)
        if self.anomalous_only:
            chosen = (masks == 1).flatten(1).any(dim=1)
            maps, masks = maps[chosen], masks[chosen]
        self.keep_flat(maps, masks)

    @one_thread()
    def compute(self) -> Tensor:
        """AUROC of all updates, 0-d float64."""
        return self.report(area(self.curves()(lambda _: True)))
