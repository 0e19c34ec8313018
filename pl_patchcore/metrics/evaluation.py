"""Scores, maps and ground truth of a test set -> all figures, overall and for each defect type.

What the LightningModule feeds while it tests: one pass, one state (about the size of the maps) and one sort
of the nominal pixels for all figures together. Reads what `anomaly_map.py` returns; next: `report/`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pl_patchcore.errors import UserError
from pl_patchcore.metrics.auroc import LABELS, MASKS, ScoreMetric, auroc, count_above, curve_area, sort_scores
from pl_patchcore.metrics.pro import check_fpr_limit, region_weights, split_regions
from pl_patchcore.preprocessing import UNKNOWN

# image_auroc, pixel_auroc, pro: 0-d float64; nominal, anomalous, lost: numbers of images
Row = dict[str, Any]


def evaluate(
    scores: Tensor, images: Tensor, nominal: Tensor, anomalous: Tensor, areas: Tensor, fpr_limit: float = 0.3
) -> tuple[Row, dict[int, Row]]:
    """All figures from the state of an `AnomalyEvaluation`.

    Each defect type's nominal pixels are sorted once, those of the nominal images once, and every anomalous
    pixel is looked up in each: the overall figures add these counts up over all of them, a defect type's over
    its own and the nominal images'.

    Args:
        scores: Anomaly scores of the images, ``(N,)``.
        images: One row for each image, ``(N, 5)``, int64: label, group, number of nominal pixels, number of
            regions, and 1 if its mask is known anywhere.
        nominal: Scores of the nominal pixels, image after image.
        anomalous: Scores of the anomalous pixels, image after image and region after region, ``(P,)``.
        areas: Area of each region, ``(K,)``, int64, summing to P.
        fpr_limit: False-positive rate at which PRO's integral ends.

    Returns:
        The overall row and those of the groups, as `AnomalyEvaluation.compute` describes them, on the CPU.
    """
    scores, areas = scores.cpu(), areas.cpu()
    label, group, pixels, regions, known = images.cpu().unbind(1)
    defective = label == 1
    lost = defective & (known == 1) & (regions == 0)
    order = anomalous.argsort()  # sorted ones are looked up four times faster
    anomalous, order = anomalous[order], order.cpu()
    weights = region_weights(areas)[order]
    owner = group.repeat_interleave(regions).repeat_interleave(areas)[order]  # (P,) group of each pixel

    maps = torch.split(nominal, pixels.tolist())
    overall = torch.zeros(2, len(anomalous), dtype=torch.int64)  # nominal pixels above, and above or equal
    within = torch.zeros_like(overall)  # the same, among the nominal images' and the own group's pixels only
    members: dict[int | None, Tensor] = {None: ~defective}
    members |= {name: defective & (group == name) for name in sorted(set(group[defective].tolist()))}
    sizes = {}
    for name, member in members.items():
        ordered = sort_scores([nominal[:0], *(maps[index] for index in member.nonzero().flatten().tolist())])
        counts = torch.stack(count_above(ordered, anomalous))
        overall += counts
        within += counts if name is None else counts * (owner == name)
        sizes[name] = len(ordered)

    def row(member: Tensor, chosen: Tensor | slice, counts: Tensor, total: int) -> Row:
        above, at_least = counts[:, chosen]
        return {
            "image_auroc": auroc(scores[~defective], scores[member]),
            "pixel_auroc": curve_area(above, at_least, total),
            "pro": curve_area(above, at_least, total, weights[chosen], fpr_limit),
            "nominal": int((~defective).sum()),
            "anomalous": int(member.sum()),
            "lost": int((lost & member).sum()),
        }

    by_group = {
        name: row(member, owner == name, within, sizes[None] + sizes[name])
        for name, member in members.items()
        if name is not None
    }
    return row(defective, slice(None), overall, sum(sizes.values())), by_group


class AnomalyEvaluation(ScoreMetric):
    """Image AUROC, pixel AUROC and PRO of a test set, overall and for each defect type.

    A defect type's figures are those of a test set of all nominal images and of its own: other types' images
    do not enter, neither as positives nor with their nominal pixels. Pixels whose mask is 255 (unknown) count
    in no pixel figure.

    Args:
        fpr_limit: False-positive rate at which PRO's integral ends, in (0, 1].

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

    image_scores: list[Tensor]
    images: list[Tensor]
    nominal: list[Tensor]
    anomalous: list[Tensor]
    areas: list[Tensor]

    def __init__(self, fpr_limit: float = 0.3) -> None:
        super().__init__()
        self.fpr_limit = check_fpr_limit(fpr_limit)
        self.add_list("image_scores")
        self.add_list("images", torch.int64, columns=5)
        self.add_list("nominal")
        self.add_list("anomalous")
        self.add_list("areas", torch.int64)

    def update(self, scores: Tensor, maps: Tensor, labels: Tensor, masks: Tensor, groups: Tensor) -> None:
        """Add images.

        Args:
            scores: Raw anomaly scores, ``(B,)``.
            maps: Raw anomaly maps, ``(B, H, W)``.
            labels: 0 nominal or 1 anomalous, ``(B,)``.
            masks: 0 nominal, 1 anomalous or 255 unknown, ``(B, H, W)``; no 1 in nominal images.
            groups: Number of the defect type, ``(B,)``, int64; of no meaning for nominal images.

        Raises:
            UserError: If a shape or a value is not as above, or a score is not finite.
        """
        scores, maps = self.check_scores("scores", scores, "B"), self.check_scores("maps", maps, "B H W")
        if len(maps) != len(scores):
            raise UserError(
                f"maps must be one for each score, got {len(maps)} for {len(scores)} scores; pass both of one batch."
            )
        labels = self.check_truth("labels", labels, LABELS, scores)
        masks = self.check_truth("masks", masks, MASKS, maps)
        if groups.shape != labels.shape or groups.is_floating_point():
            raise UserError(
                f"groups must be integers of shape {tuple(labels.shape)}, got {groups.dtype} of shape "
                f"{tuple(groups.shape)}; number the defect types."
            )
        stray = int((masks[labels == 0] == 1).sum())
        if stray:
            raise UserError(
                f"masks of nominal images must hold no 1, got {stray} such pixels; label the image 1 or clear its mask."
            )
        nominal, anomalous, areas, regions = split_regions(maps, masks)
        self.nominal.append(nominal)
        self.anomalous.append(anomalous)
        self.areas.append(areas)
        pixels = (masks == 0).flatten(1).sum(dim=1)
        known = (masks != UNKNOWN).flatten(1).any(dim=1)
        rows = (labels, groups.to(self.device), pixels, regions, known)
        self.images.append(torch.stack([row.to(torch.int64) for row in rows], dim=1))
        self.image_scores.append(scores.clone())

    def compute(self) -> dict[str, Any]:
        """Figures of all updates.

        Returns:
            ``image_auroc``, ``pixel_auroc`` and ``pro``, 0-d float64, NaN where there are no positives or no
            negatives; ``nominal``, ``anomalous`` and ``lost``, numbers of images (lost: anomalous ones with a
            known mask that holds no anomalous pixel any more: resize and crop took the defect away);
            ``by_group``, a dict from each anomalous image's group to a dict of the same six keys.
        """
        overall, by_group = evaluate(
            self.joined("image_scores"),
            self.joined("images"),
            self.joined("nominal"),
            self.joined("anomalous"),
            self.joined("areas"),
            self.fpr_limit,
        )
        return {
            **self._placed(overall),
            "by_group": {name: self._placed(row) for name, row in by_group.items()},
        }

    def _placed(self, row: Row) -> Row:
        return {name: self.figure(value) if isinstance(value, Tensor) else value for name, value in row.items()}
