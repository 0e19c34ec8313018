"""Scores, maps and ground truth of a test set -> all figures: overall, for each defect type, for each category.

Pixels are kept apart by (label, defect type, category), and each row of figures is the curve of a union of those.
Reads what `anomaly_map.py` returns; next: `named.py`, which gives defect types their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from pl_patchcore.errors import UserError
from pl_patchcore.metrics.curve import Chosen, Curve, area, average_precision, best_f1, exact_curve, sort_scores
from pl_patchcore.metrics.regions import pixel_areas
from pl_patchcore.metrics.state import LABELS, MASKS, PIXEL_LIMIT, Mode, PixelMetric
from pl_patchcore.metrics.streaming import select
from pl_patchcore.metrics.thresholded import exceeds, f1_at
from pl_patchcore.numerics import one_thread
from pl_patchcore.preprocessing import UNKNOWN

Row = dict[str, Any]
SMALL_LIMITS = (0.05, 0.01)  # of PRO, beside the main one


def rows(images: Tensor, row: Callable[[Chosen], Row]) -> Row:
    """The row of all images, ``by_group`` those of each group, and ``by_category`` those of each category.

    Args:
        images: Cells: label, group (0 for nominal images) and category of each image, ``(N, 3)``, int64.
        row: Figures of chosen cells: of a group all nominal images and its own, of a category all its images.
    """
    label, group, category = images.unbind(1)
    overall, categories = row(lambda _: True), category.unique().tolist()

    def of_group(name: int) -> Row:
        return row(lambda cell: cell[0] == 0 or cell[1] == name)

    def of_category(name: int) -> Row:
        return row(lambda cell: cell[2] == name)

    return {
        **overall,
        "by_group": {name: of_group(name) for name in group[label == 1].unique().tolist()},
        "by_category": {name: of_category(name) if len(categories) > 1 else overall for name in categories},
    }


class AnomalyEvaluation(PixelMetric):
    """All figures of a test set, in one pass.

    A defect type's figures are those of a test set of all nominal images and of its own: other types' images do not
    enter. A category's figures are those of its own images. Pixels whose mask is 255 (unknown) count in no pixel
    figure. Figures of images are always exact.

    Args:
        fpr_limit: False-positive rate at which the integral of ``pro`` ends, in (0, 1].
        mode: As ``pixel_limit``, see `PixelMetric`. In streaming mode, pixel figures come with their bounds.
        image_threshold: An image is called anomalous when its score > threshold; None calls none.
        pixel_threshold: The same for pixels.

    Example:
        >>> metric = AnomalyEvaluation()
        >>> maps = torch.tensor([[[1.0, 2.0]], [[1.0, 9.0]], [[3.0, 0.0]]])
        >>> masks = torch.tensor([[[0, 0]], [[0, 1]], [[0, 1]]])
        >>> labels, groups = torch.tensor([0, 1, 1]), torch.tensor([0, 4, 5])
        >>> metric.update(maps.amax(dim=(1, 2)), maps, labels, masks, groups)
        >>> figures = metric.compute()
        >>> figures["image_auroc"].item(), figures["pixel_auroc"].item(), figures["pro"].item()
        (1.0, 0.5, 0.5)
        >>> {group: row["pro"].item() for group, row in figures["by_group"].items()}
        {4: 1.0, 5: 0.0}
    """

    columns = 3
    images: list[Tensor]
    image_scores: list[Tensor]

    def __init__(
        self,
        fpr_limit: float = 0.3,
        mode: Mode = "auto",
        pixel_limit: int = PIXEL_LIMIT,
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
    ) -> None:
        super().__init__(mode, pixel_limit, fpr_limit)
        self.image_threshold, self.pixel_threshold = image_threshold, pixel_threshold
        self.add_list("image_scores")
        self.add_list("images", torch.int64, 9)  # cell and `columns` in `update` of each image

    @one_thread()
    def update(
        self,
        scores: Tensor,
        maps: Tensor,
        labels: Tensor,
        masks: Tensor,
        groups: Tensor,
        categories: Tensor | None = None,
    ) -> None:
        """Add images.

        Args:
            scores: Raw anomaly scores, ``(B,)``.
            maps: Raw anomaly maps, ``(B, H, W)``.
            labels: 0 nominal or 1 anomalous, ``(B,)``.
            masks: 0 nominal, 1 anomalous or 255 unknown, ``(B, H, W)``; no 1 in nominal images.
            groups: Number of the defect type, ``(B,)``, int64; of no meaning for nominal images.
            categories: Number of the category, ``(B,)``, int64; None puts all in category 0.

        Raises:
            UserError: If a shape or a value is not as above, or a score is not finite.
        """
        scores, maps = self.check_scores("scores", scores, "B"), self.check_scores("maps", maps, "B H W")
        if len(maps) != len(scores):
            raise UserError(f"maps must be one for each score, got {len(maps)} for {len(scores)} scores; pass both.")
        labels = self.check_truth("labels", labels, LABELS, scores)
        masks = self.check_truth("masks", masks, MASKS, maps)
        cells = self.check_cells(labels, groups, categories)
        nominal, anomalous = masks == 0, masks == 1
        sizes = [chosen.flatten(1).sum(dim=1) for chosen in (nominal, anomalous)]
        if stray := int(sizes[1][labels == 0].sum()):
            raise UserError(
                f"masks of nominal images must hold no 1, got {stray} such pixels; label the image 1 or clear its mask."
            )
        lost = (labels == 1) & (sizes[1] == 0) & (masks != UNKNOWN).flatten(1).any(dim=1)
        segments = torch.cat([cells, torch.stack(sizes, dim=1)], dim=1)
        segments[:, 0] += lost  # 2: anomalous, but lost
        self.keep(segments, select(maps, nominal), select(maps, anomalous), pixel_areas(masks))
        above, alarm = exceeds(maps, self.pixel_threshold), exceeds(scores, self.image_threshold)
        pixel_alarms, pixel_hits = ((above & chosen).flatten(1).sum(dim=1) for chosen in (nominal, anomalous))
        columns = torch.stack([lost, *sizes, pixel_alarms, pixel_hits, alarm], dim=1)
        # one tensor each: hundreds of small ones that stay, between large ones that go, leave the heap full of holes
        self.images = [torch.cat([*self.images, torch.cat([cells, columns], dim=1)])]
        self.image_scores = [torch.cat([*self.image_scores, scores])]

    @one_thread()
    def compute(self) -> dict[str, Any]:  # type: ignore[override]
        """Figures of all updates.

        Returns:
            0-d float64 each, NaN where there is nothing anomalous or nothing nominal:

            - ``image_auroc``, ``image_average_precision``, ``oracle_image_f1``, ``oracle_image_f1_threshold``;
            - ``pixel_auroc``, ``pixel_auroc_anomalous`` (of anomalous images that are not lost),
              ``pixel_average_precision``, ``oracle_pixel_f1``, ``oracle_pixel_f1_threshold``, ``pro``, ``pro_0.05``,
              ``pro_0.01``; in streaming mode each has its bound, ``pixel_auroc_bound`` and so on (not the threshold);
            - of thresholds that are set, shares above them: ``image_detection_rate`` of the anomalous images,
              ``image_false_alarm_rate`` of the nominal images, ``pixel_false_alarm_rate`` of the nominal pixels;
            - ``class_f1`` and ``seg_f1``, F1 of images and of the pixels of all images at these thresholds;
            - ``nominal``, ``anomalous`` and ``lost``, numbers of images (lost: anomalous ones with a known mask that
              holds no anomalous pixel any more: resize and crop took the defect away);

            and ``by_group`` and ``by_category``, dicts from each anomalous image's group, and from each image's
            category, to a dict of the same keys but these two.
        """
        scores, images = dim_zero_cat(self.image_scores).cpu(), dim_zero_cat(self.images).cpu()
        curve = self.curves()

        def row(chosen: Chosen) -> Row:
            members = torch.tensor([chosen(tuple(cell)) for cell in images[:, :3].tolist()], dtype=torch.bool)
            pixels = self._pixel_row(curve(chosen), curve(lambda cell: cell[0] == 1 and chosen(cell)))
            return self._image_row(scores[members], images[members]) | pixels

        return rows(images[:, :3], row)

    def _image_row(self, scores: Tensor, images: Tensor) -> Row:
        nominal = images[:, 0] == 0
        lost, pixels, anomalous_pixels, pixel_alarms, pixel_hits = images[:, 3:8].sum(dim=0).tolist()
        alarm = images[:, 8] == 1
        curve = exact_curve([sort_scores([scores[nominal]])], scores[~nominal])
        f1, threshold = best_f1(curve)
        figures = {
            "image_auroc": area(curve).value,
            "image_average_precision": average_precision(curve).value,
            "oracle_image_f1": f1.value,
            "oracle_image_f1_threshold": threshold,
        }
        counts = {"nominal": int(nominal.sum()), "anomalous": int((~nominal).sum()), "lost": lost}
        if self.image_threshold is not None:
            figures["image_detection_rate"] = float(alarm[~nominal].double().mean())
            figures["image_false_alarm_rate"] = float(alarm[nominal].double().mean())
            figures["class_f1"] = f1_at(int(alarm[~nominal].sum()), int(alarm[nominal].sum()), counts["anomalous"])
        if self.pixel_threshold is not None:
            figures["pixel_false_alarm_rate"] = pixel_alarms / pixels if pixels else math.nan
            figures["seg_f1"] = f1_at(pixel_hits, pixel_alarms, anomalous_pixels)
        return {name: self.figure(value) for name, value in figures.items()} | counts

    def _pixel_row(self, curve: Curve, anomalous_images: Curve) -> Row:
        f1, threshold = best_f1(curve)
        figures = {
            "pixel_auroc": area(curve),
            "pixel_auroc_anomalous": area(anomalous_images),
            "pixel_average_precision": average_precision(curve),
            "oracle_pixel_f1": f1,
            "pro": area(curve, self.fpr_limit, weighted=True),
        } | {f"pro_{limit}": area(curve, limit, weighted=True) for limit in SMALL_LIMITS}
        return self.figures(figures, bounds=not curve.exact) | {"oracle_pixel_f1_threshold": self.figure(threshold)}
