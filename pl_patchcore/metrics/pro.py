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


def split_regions(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split maps into the scores of their nominal pixels and those of their regions.

    Args:
        maps: Raw anomaly maps, ``(B, H, W)``.
        masks: 0 nominal, 1 anomalous, 255 unknown (in no result), ``(B, H, W)``, on the maps' device.

    Returns:
        Scores of the nominal pixels ``(n,)``, image after image; scores of the anomalous pixels ``(P,)``,
        image after image and region after region; area of each region in pixels ``(K,)``, int64; number of
        regions of each image ``(B,)``, int64. Regions are labelled on the CPU.

    Example:
        >>> masks = torch.tensor([[[1, 0, 1], [0, 1, 0], [0, 0, 255]]])
        >>> [part.tolist() for part in split_regions(torch.arange(9.0).reshape(1, 3, 3), masks)]
        [[1.0, 3.0, 5.0, 6.0, 7.0], [0.0, 2.0, 4.0], [3], [1]]
    """
    empty = np.empty(0, np.int64)  # so that a batch of no images passes
    pixels, areas = [empty], [empty]
    for index, mask in enumerate((masks == 1).cpu().numpy()):
        labels = ndimage.label(mask, structure=np.ones((3, 3)))[0].ravel()  # 1, 2, ... inside, 0 outside
        inside = np.flatnonzero(labels)
        inside = inside[np.argsort(labels[inside], kind="stable")]  # region after region
        pixels.append(index * mask.size + inside)
        areas.append(np.bincount(labels, minlength=1)[1:])
    anomalous = maps.flatten()[torch.from_numpy(np.concatenate(pixels)).to(maps.device)]
    regions = torch.tensor([len(area) for area in areas[1:]], dtype=torch.int64, device=maps.device)
    return maps[masks == 0], anomalous, torch.from_numpy(np.concatenate(areas)).to(maps.device), regions


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
        """Add images: raw maps ``(B, H, W)`` and masks ``(B, H, W)``, 0, 1 or 255, else a `UserError`."""
        maps = self.check_scores("maps", maps, "B H W")
        masks = self.check_truth("masks", masks, MASKS, maps)
        nominal, anomalous, areas, _ = split_regions(maps, masks)
        self.nominal.append(nominal)
        self.anomalous.append(anomalous)
        self.areas.append(areas)

    def compute(self) -> Tensor:
        """PRO of all updates, 0-d float64."""
        states = self.joined("nominal"), self.joined("anomalous"), self.joined("areas")
        return self.figure(pro(*states, fpr_limit=self.fpr_limit))
