"""Maps and defects with saturation areas -> sPRO, the saturated per-region overlap of MVTec LOCO.

A defect counts as found once so many of its pixels are: its saturation area (a missing object may be anywhere in the
place left free for it). At each threshold sPRO is the mean over all defects of ``min(found pixels / saturation area,
1)``. The false-positive rate is the share found of all pixels of no defect. The figure is the area below the curve up
to a rate of 0.05 or another, divided by it, with the end point interpolated.

Only a defect's largest scores matter, as many as its saturation area, each with the weight 1 / saturation area. So
sPRO is PRO of these pixels, and the curve, the bins and their bounds are those of `curve.py` and `streaming.py`.

Source: Bergmann et al. 2022, "Beyond Dents and Scratches: Logical Constraints in Unsupervised Anomaly Detection and
Localization", and its evaluation code, which takes thresholds until the curve's points are 0.001 apart where this
takes all, so that it agrees to about as much. Next: `named.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from pl_patchcore.errors import UserError
from pl_patchcore.metrics.curve import Chosen, area
from pl_patchcore.metrics.evaluation import Row, rows
from pl_patchcore.metrics.state import LABELS, PIXEL_LIMIT, Mode, PixelMetric, check_fpr_limit
from pl_patchcore.numerics import one_thread

Defect = tuple[Any, int]  # mask (H, W), bool, array or tensor; saturation area in pixels
LIMITS = (0.05, 0.3)  # false-positive rates: that of published tables of MVTec LOCO, and that of PRO


class SPRO(PixelMetric):
    """Saturated per-region overlap of all defects; see the module.

    Args:
        fpr_limits: False-positive rates at which the integrals end, each in (0, 1].
        mode: As ``pixel_limit``, see `PixelMetric`. In streaming mode, figures come with their bounds.

    Example:
        >>> maps = torch.tensor([[[1.0, 2.0, 3.0]], [[9.0, 0.0, 4.0]]])
        >>> missing = torch.tensor([[True, True, False]])  # one pixel of two is enough
        >>> metric = SPRO(fpr_limits=(1.0,))
        >>> metric.update(maps, [[], [(missing, 1)]])
        >>> metric.compute()["spro_1"].item()
        1.0
    """

    columns = 3
    weighted = True
    images: list[Tensor]

    def __init__(
        self, fpr_limits: Sequence[float] = LIMITS, mode: Mode = "auto", pixel_limit: int = PIXEL_LIMIT
    ) -> None:
        super().__init__(mode, pixel_limit)
        for limit in fpr_limits:
            check_fpr_limit(limit)
        self.fpr_limits = tuple(fpr_limits)
        self.add_list("images", torch.int64, self.columns)

    @one_thread()
    def update(
        self,
        maps: Tensor | Sequence[Tensor],
        defects: Sequence[Sequence[Defect]],
        labels: Tensor | None = None,
        groups: Tensor | None = None,
        categories: Tensor | None = None,
    ) -> None:
        """Add images.

        Args:
            maps: Raw anomaly map of each image, ``(H, W)``, of any size; NaN where a pixel does not count.
            defects: Of each image the masks ``(H, W)``, bool, of its defects, which may overlap, and their saturation
                areas in pixels; none of a nominal image. An area larger than the mask saturates with the mask.
            labels: 0 nominal or 1 anomalous, ``(B,)``; None: anomalous are those with defects. An anomalous image
                without defects does not count.
            groups: Number of the defect type, ``(B,)``, int64; None: all of number 0.
            categories: Number of the category, in the same way.

        Raises:
            UserError: If a shape or a value is not as above, or a score is infinite.
        """
        labels = torch.tensor([len(own) > 0 for own in defects]) if labels is None else labels
        if not len(maps) == len(defects) == len(labels):
            raise UserError(
                f"defects must be a list for each map, got {len(maps)} maps, {len(defects)} lists and {len(labels)} "
                "labels; give [] for an image without."
            )
        labels = self.check_truth("labels", labels, LABELS, torch.empty(len(maps)))
        cells = self.check_cells(labels, groups, categories)
        for cell, scores, own in zip(cells, maps, defects, strict=True):
            self._add(cell, scores, own)
        self.images = [torch.cat([*self.images, cells])]

    def _add(self, cell: Tensor, scores: Tensor, defects: Sequence[Defect]) -> None:
        """Add an image, whose label, group and category are ``cell``."""
        free, found = ~scores.isnan(), [scores.new_empty(0)]
        counted = free.clone()
        for mask, saturation in defects:
            mask = torch.as_tensor(mask, device=scores.device)
            if mask.dtype != torch.bool or mask.shape != scores.shape or saturation < 1 or not cell[0]:
                raise UserError(
                    f"a defect must be a bool mask of its map's size {tuple(scores.shape)} and a saturation area of 1 "
                    f"pixel or more, in an image of label 1; got {mask.dtype} of {tuple(mask.shape)}, {saturation} "
                    f"and label {int(cell[0])}."
                )
            inside = scores[mask & counted]
            found.append(inside.topk(min(int(saturation), len(inside))).values)
            free &= ~mask
        nominal = scores[free] if defects or not cell[0] else scores.new_empty(0)
        nominal, anomalous = (self.check_scores("maps", part) for part in (nominal, torch.cat(found)))
        segment = torch.cat([cell, cell.new_tensor([len(nominal), len(anomalous)])])
        areas = torch.cat([torch.full((len(part),), len(part), dtype=torch.int32) for part in found])
        self.keep(segment[None], nominal, anomalous, areas)

    @one_thread()
    def compute(self) -> Row:  # type: ignore[override]
        """Figures of all updates.

        Returns:
            ``spro_0.05`` and ``spro_0.3`` or those of other limits, 0-d float64, NaN without defects or without
            pixels of none; in streaming mode each with its bound, ``spro_0.05_bound``; ``by_group`` and
            ``by_category`` as `AnomalyEvaluation`; and ``mean_spro_0.05``, the mean of the groups: published figures
            of MVTec LOCO are those of structural and logical anomalies.
        """
        curve = self.curves()

        def row(chosen: Chosen) -> Row:
            own = curve(chosen)
            areas = {name: area(own, limit, weighted=True) for name, limit in limits.items()}
            return self.figures(areas, bounds=not own.exact)

        limits = {f"spro_{limit:g}": limit for limit in self.fpr_limits}
        found = rows(dim_zero_cat(self.images).cpu(), row)
        for name in limits:
            groups = [group[name].item() for group in found["by_group"].values()]
            found[f"mean_{name}"] = self.figure(float(np.mean(groups or [np.nan])))
        return found
