"""Anomaly maps and masks -> per-region overlap (PRO).

Definition: the mean over all regions of the share of the region covered, against the false-positive rate
(the share covered of **all** nominal pixels of **all** images given, nominal images among them), integrated
to a rate of 0.3 with the end point interpolated, and divided by 0.3 (Bergmann et al. 2020). A region is a
connected component of mask == 1 in one image; pixels that touch at a corner are connected (8 neighbours, as
in MVTec's evaluation code). Published tables differ: the official PatchCore numbers take anomalous images
only, and such figures cannot be compared with these.

The arithmetic is `auroc.curve_area`; next: `evaluation.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from pl_patchcore.errors import UserError
from pl_patchcore.metrics.auroc import MASKS, ScoreMetric, count_above, curve_area, sort_scores


def split_regions(anomaly_map: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split one map into the scores of its nominal pixels and those of its regions.

    Args:
        anomaly_map: Raw scores, ``(H, W)``.
        mask: 0 nominal, 1 anomalous, 255 unknown (in neither result), ``(H, W)``, on the map's device.

    Returns:
        Scores of the nominal pixels ``(n,)``; scores of the anomalous pixels ``(P,)``, region after region;
        area of each region in pixels ``(K,)``, int64, summing to P.

    Example:
        >>> mask = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 255]])
        >>> nominal, anomalous, areas = split_regions(torch.arange(9.0).reshape(3, 3), mask)
        >>> nominal.tolist(), anomalous.tolist(), areas.tolist()
        ([1.0, 3.0, 5.0, 6.0, 7.0], [0.0, 2.0, 4.0], [3])
    """
    labels, _ = ndimage.label((mask == 1).cpu().numpy(), structure=np.ones((3, 3)))  # (H, W), 0 outside
    regions = labels.ravel()
    pixels = np.flatnonzero(regions)
    pixels = pixels[np.argsort(regions[pixels], kind="stable")]  # (P,) region after region
    areas = torch.from_numpy(np.bincount(regions, minlength=1)[1:])
    anomalous = anomaly_map.flatten()[torch.from_numpy(pixels).to(anomaly_map.device)]
    return anomaly_map[mask == 0], anomalous, areas.to(anomaly_map.device)


def region_weights(areas: Tensor) -> Tensor:
    """Weight of each anomalous pixel, 1 / area of its region: all regions weigh the same.

    Args:
        areas: Area of each region, ``(K,)``, int64.

    Returns:
        Weights ``(P,)``, P the sum of the areas, float64 on the CPU.

    Example:
        >>> region_weights(torch.tensor([2, 1])).tolist()
        [0.5, 0.5, 1.0]
    """
    areas = areas.cpu()
    return areas.double().reciprocal().repeat_interleave(areas)


def pro(nominal: Tensor, anomalous: Tensor, areas: Tensor, fpr_limit: float = 0.3) -> Tensor:
    """Per-region overlap up to a false-positive rate, from `split_regions` of all images.

    Args:
        nominal: Scores of all nominal pixels, ``(n,)``, floating point.
        anomalous: Scores of the anomalous pixels, region after region, ``(P,)``.
        areas: Area of each region in pixels, ``(K,)``, int64, summing to P.
        fpr_limit: False-positive rate at which the integral ends, in (0, 1].

    Returns:
        Figure in [0, 1], 0-d float64 on the CPU; NaN without nominal pixels or without regions. Cost: sorting
        ``nominal``.

    Example:
        >>> nominal, anomalous = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 5.0, 0.0])
        >>> pro(nominal, anomalous, areas=torch.tensor([2, 1])).item()  # one region found, one missed
        0.5
    """
    counts = count_above(sort_scores([nominal]), anomalous)
    return curve_area(*counts, total=len(nominal), weights=region_weights(areas), fpr_limit=fpr_limit)


def check_fpr_limit(fpr_limit: float) -> float:
    """Return ``fpr_limit`` if it is in (0, 1].

    Raises:
        UserError: If it is not.
    """
    if not 0 < fpr_limit <= 1:
        raise UserError(f"fpr_limit must be in (0, 1], got {fpr_limit}; published PRO figures use 0.3.")
    return fpr_limit


class PRO(ScoreMetric):
    """Per-region overlap of all images; NaN without nominal pixels or without regions.

    Pixels whose mask is 255 (unknown) are left out.

    Args:
        fpr_limit: False-positive rate at which the integral ends, in (0, 1].

    Example:
        >>> metric = PRO()
        >>> metric.update(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[0, 1, 255]]]))
        >>> metric.compute().item()
        1.0
    """

    nominal: list[Tensor]
    anomalous: list[Tensor]
    areas: list[Tensor]

    def __init__(self, fpr_limit: float = 0.3) -> None:
        super().__init__()
        self.fpr_limit = check_fpr_limit(fpr_limit)
        self.add_list("nominal")
        self.add_list("anomalous")
        self.add_list("areas", torch.int64)

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Add images: raw anomaly maps ``(B, H, W)`` and masks ``(B, H, W)``, 0, 1 or 255 (unknown)."""
        maps = self.check_scores("maps", maps, "B H W")
        masks = self.check_truth("masks", masks, MASKS, maps)
        for anomaly_map, mask in zip(maps, masks, strict=True):
            nominal, anomalous, areas = split_regions(anomaly_map, mask)
            self.nominal.append(nominal)
            self.anomalous.append(anomalous)
            self.areas.append(areas)

    def compute(self) -> Tensor:
        """PRO of all updates, 0-d float64."""
        states = self.joined("nominal"), self.joined("anomalous"), self.joined("areas")
        return self.figure(pro(*states, fpr_limit=self.fpr_limit))
