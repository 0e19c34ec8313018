"""Anomaly maps and masks -> per-region overlap (PRO).

Definition: the mean over all regions of the share of the region covered, against the false-positive rate
(the share covered of **all** nominal pixels of **all** images given, nominal images among them), integrated
to a rate of 0.3 with the end point interpolated, and divided by 0.3 (Bergmann et al. 2020). A region is a
connected component of mask == 1 in one image; pixels that touch at a corner are connected (8 neighbours, as
in MVTec's evaluation code). Published tables differ: the official PatchCore numbers take anomalous images
only, and such figures cannot be compared with these.

So PRO is the area under a ROC curve whose anomalous pixels weigh 1 / area of their region, and the arithmetic is
`curve.area`; next: `thresholds.py`.
"""

from __future__ import annotations

from torch import Tensor

from pl_patchcore.errors import UserError
from pl_patchcore.metrics.curve import area, exact_curve
from pl_patchcore.metrics.regions import pixel_areas
from pl_patchcore.metrics.state import MASKS, PIXEL_LIMIT, Mode, PixelMetric
from pl_patchcore.numerics import one_thread


def pro(nominal: Tensor, anomalous: Tensor, areas: Tensor, fpr_limit: float = 0.3) -> float:
    """Per-region overlap up to a false-positive rate (see `PRO`).

    Args:
        nominal: Scores of all nominal pixels, ``(n,)``, floating point.
        anomalous: Scores of the anomalous pixels, ``(P,)``.
        areas: Area in pixels of the region that each anomalous pixel belongs to, ``(P,)`` (`regions.pixel_areas`).
        fpr_limit: False-positive rate at which the integral ends, in (0, 1].

    Returns:
        Figure in [0, 1]; NaN without nominal pixels or without regions. Cost: sorting ``nominal``.

    Example:
        >>> import torch
        >>> nominal, anomalous = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 5.0, 0.0])
        >>> pro(nominal, anomalous, areas=torch.tensor([2, 2, 1]))  # one region found, one missed
        0.5
    """
    return area(exact_curve([nominal], anomalous, areas.double().reciprocal()), fpr_limit, weighted=True).value


def check_fpr_limit(fpr_limit: float) -> float:
    """Return ``fpr_limit`` if it is in (0, 1].

    Raises:
        UserError: If it is not.
    """
    if not 0 < fpr_limit <= 1:
        raise UserError(f"fpr_limit must be in (0, 1], got {fpr_limit}; published PRO figures use 0.3.")
    return fpr_limit


class PRO(PixelMetric):
    """Per-region overlap of all images (also known as AUPRO); NaN without nominal pixels or without regions.

    For anyone with anomaly maps and masks: scores may have any range, larger meaning more anomalous. Pixels whose
    mask is 255 (unknown) are left out; an anomalous image whose mask is empty adds nominal pixels and no region;
    constant scores give ``fpr_limit / 2``; scores that are NaN or infinite raise.

    Args:
        fpr_limit: False-positive rate at which the integral ends, in (0, 1]; 0.05 and 0.01 are in use too.
        mode: ``exact`` keeps every pixel. ``streaming`` keeps a histogram of bounded memory, and after ``compute``
            ``error_bound`` says how far the true value may be. ``auto`` is exact up to ``pixel_limit`` pixels.
        pixel_limit: Largest number of pixels, over all processes, that ``auto`` keeps exactly.

    Example:
        >>> import torch
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
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, fpr_limit: float = 0.3, mode: Mode = "auto", pixel_limit: int = PIXEL_LIMIT) -> None:
        super().__init__(mode, pixel_limit)
        self.fpr_limit = check_fpr_limit(fpr_limit)

    @one_thread()
    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add images: raw maps ``(B, H, W)`` and masks ``(B, H, W)``, 0, 1 or 255, else a `UserError`."""
        maps = self.check_scores("maps", maps, "B H W")
        masks = self.check_truth("masks", masks, MASKS, maps)
        self.keep_flat(maps, masks, pixel_areas(masks)[0])

    @one_thread()
    def compute(self) -> Tensor:
        """PRO of all updates, 0-d float64."""
        return self.report(area(self.curves()(lambda _: True), self.fpr_limit, weighted=True))
