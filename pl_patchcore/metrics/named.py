"""Batches of a test, as `data/base.py` makes them -> figures by the names of defect types; next: `report/`."""

from __future__ import annotations

import reprlib
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pl_patchcore.anomaly_map import to_original
from pl_patchcore.distributed import Processes
from pl_patchcore.errors import UserError
from pl_patchcore.metrics.aupimo import AUPIMO
from pl_patchcore.metrics.evaluation import AnomalyEvaluation, Row
from pl_patchcore.metrics.spro import SPRO
from pl_patchcore.metrics.state import Mode
from pl_patchcore.preprocessing import UNKNOWN

Rows = dict[str, Row]
MetricsSize = Literal["input", "original"]


class TestFigures:
    """Figures of one test, by the names of defect types and categories; built when a test starts.

    Args:
        image_threshold: As ``pixel_threshold`` and ``mode``, see `AnomalyEvaluation`.
        device: Where figures are computed: that of the anomaly maps.
        size: Pixels that are compared: those of the ``input``, or of the ``original`` image, to which maps are brought.

    Example:
        >>> figures = TestFigures()
        >>> batch = {"label": [0, 1], "defect": ["nominal", "scratch"], "mask": torch.tensor([[[0, 0]], [[0, 1]]])}
        >>> figures.add(batch, torch.tensor([2.0, 9.0]), torch.tensor([[[1.0, 2.0]], [[1.0, 9.0]]]))
        >>> by_defect, by_category = figures.compute(Processes())
        >>> {name: row["pro"] for name, row in by_defect.items()}, by_category
        ({'all': 1.0, 'scratch': 1.0}, {})
    """

    __test__ = False  # no test class, whatever its name suggests to pytest

    def __init__(
        self,
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
        mode: Mode = "auto",
        device: torch.device | str = "cpu",
        size: MetricsSize = "input",
    ) -> None:
        made = AnomalyEvaluation(mode=mode, image_threshold=image_threshold, pixel_threshold=pixel_threshold)
        self.evaluation, self.size = made.to(device), size
        self.aupimo, self.spro = AUPIMO(mode=mode).to(device), SPRO(mode=mode).to(device)
        self.defects: dict[int, str] = {}
        self.categories: dict[int, str] = {}

    def add(self, batch: dict[str, Any], scores: Tensor, maps: Tensor | Sequence[Tensor]) -> None:
        """Add the images of a batch, with their scores ``(B,)`` and maps ``(B, H, W)``, or a list of maps ``(H, W)``.

        It holds ``label``, and where known ``mask`` (else all pixels are unknown), ``defect`` and ``category``; for the
        size ``original`` also ``original_size`` and ``crop_box``, and masks of that size. Pixels that do not count are
        unknown: their map is NaN, or ``region`` leaves them out. ``defect_regions`` are the defects of each image as
        `SPRO.update` takes them, of the original's size.

        Raises:
            UserError: If there is no label, or the original's size is not known or not the mask's, or a list lacks an
                image's mask; as `update`.
        """
        if "label" not in batch:
            raise UserError("a test batch needs labels (0 nominal, 1 anomalous): a dict with 'label', or a tuple.")
        if not len(scores):
            return
        labels, masks = torch.as_tensor(batch["label"], device=scores.device), batch.get("mask")
        _check_masks(masks, len(scores))
        defects = batch.get("defect", ["anomalous"] * len(scores))
        groups = _numbers(defects)
        self.defects |= {g: d for g, d, y in zip(groups.tolist(), defects, labels.tolist(), strict=True) if y == 1}
        categories = torch.zeros_like(groups)
        if "category" in batch:
            categories = _numbers(batch["category"])
            self.categories |= dict(zip(categories.tolist(), batch["category"], strict=True))
        if "defect_regions" in batch:
            known = "crop_box" in batch and "original_size" in batch
            on_defects = [_on_original(batch, i, heat) for i, heat in enumerate(maps)] if known else maps
            self.spro.update(on_defects, batch["defect_regions"], labels, groups, categories)
        if self.size == "input" and isinstance(maps, Tensor) and not isinstance(masks, list):
            self._update(scores, maps, labels, masks, groups, categories)
            return
        for i, heat in enumerate(maps):  # sizes differ
            if self.size == "original":
                _check_original(batch, i)
                heat = _on_original(batch, i, heat)
            one, mask = slice(i, i + 1), None if masks is None else masks[i][None]
            self._update(scores[one], heat[None], labels[one], mask, groups[one], categories[one])

    def _update(
        self, scores: Tensor, maps: Tensor, labels: Tensor, masks: Tensor | None, groups: Tensor, categories: Tensor
    ) -> None:
        """Add images of one size; where the map is NaN the mask is unknown."""
        masks = torch.full_like(maps, UNKNOWN, dtype=torch.uint8) if masks is None else masks
        if (absent := maps.isnan()).any():
            maps, masks = maps.masked_fill(absent, 0), torch.where(absent, UNKNOWN, masks.to(maps.device))
        self.evaluation.update(scores, maps, labels, masks, groups, categories)
        self.aupimo.update(maps, masks, labels, groups, categories)

    def compute(self, processes: Processes) -> tuple[Rows, Rows]:
        """Figures of all processes, which must all call this: rows of plain numbers, as `AnomalyEvaluation.compute`.

        With ``aupimo``, and where batches hold ``defect_regions`` with `SPRO`'s.
        By ``all`` and each defect type, and by each category (none where batches do not name them).
        """
        overall: Row = {}
        used = any(processes.objects(self.spro.update_called))
        for metric in (self.evaluation, self.aupimo, self.spro) if used else (self.evaluation, self.aupimo):
            metric.distributed_available_fn = lambda: processes.count > 1
            overall = _joined(overall, metric.compute())
        for others in processes.objects((self.defects, self.categories)):
            self.defects, self.categories = self.defects | others[0], self.categories | others[1]
        by_defect = {_own_name(self.defects[number]): _plain(row) for number, row in overall["by_group"].items()}
        rows = overall["by_category"] if self.categories else {}
        by_category = {_own_name(self.categories.get(number, str(number))): _plain(row) for number, row in rows.items()}
        return {"all": _plain(overall)} | dict(sorted(by_defect.items())), dict(sorted(by_category.items()))


def _check_masks(masks: Any, images: int) -> None:
    """Refuse a list that is not of a mask for each image."""
    if masks is None or isinstance(masks, Tensor):
        return
    wrong = [mask for mask in masks if not isinstance(mask, Tensor)] if isinstance(masks, list) else [masks]
    if wrong or len(masks) != images:
        got = reprlib.repr(wrong[0]) if wrong else len(masks)
        raise UserError(
            f"the entry 'mask' of a batch must hold a mask (H, W) for each of the {images} images, got {got}; where "
            "there is none give one of 255 (unknown)."
        )


def _check_original(batch: dict[str, Any], i: int) -> None:
    """Refuse an image whose geometry is not known, or whose mask is not of the original's size."""
    if "original_size" not in batch or "crop_box" not in batch:
        raise UserError(
            "metrics_size is original, but batches hold no 'original_size' and 'crop_box'; use one of our data "
            "modules, give both (see Preprocessing.apply), or set metrics_size to input."
        )
    height, width = batch["original_size"][i].tolist()
    if "mask" in batch and batch["mask"][i].shape != (height, width):
        raise UserError(
            f"metrics_size is original, but a mask has {'x'.join(map(str, batch['mask'][i].shape))} pixels where the "
            f"original has {height}x{width}; give masks as they are in the files, or set metrics_size to input."
        )


def _on_original(batch: dict[str, Any], i: int, heat: Tensor) -> Tensor:
    """Map of image ``i`` on the pixels of the original, NaN where these do not count."""
    height, width = batch["original_size"][i].tolist()
    found = to_original(heat, (height, width), tuple(batch["crop_box"][i].tolist()))
    return found if "region" not in batch else found.where(batch["region"][i].to(found.device) > 0, torch.nan)


def _numbers(names: Sequence[str]) -> Tensor:
    """Number of each name, the same on every process."""
    return torch.tensor([zlib.crc32(name.encode()) for name in names], dtype=torch.int64)


def _own_name(name: str) -> str:
    """Name of a row; that of all images is taken."""
    return f"{name} (by name)" if name == "all" else name


def _joined(row: Row, more: Row) -> Row:
    """Row of the figures of both, and of those of groups and categories."""
    nested = {key: _joined(row[key], value) for key, value in more.items() if isinstance(value, dict) and key in row}
    return row | more | nested


def _plain(row: Row) -> Row:
    found = {key: value for key, value in row.items() if not isinstance(value, dict) and key != "per_image"}
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in found.items()}
