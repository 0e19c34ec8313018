"""Regions of inspected images -> a file in COCO's format, which tools for annotation read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pl_patchcore.files import whole_file
from pl_patchcore.inspection import Inspection
from pl_patchcore.regions import Region

DIGITS = 6  # significant ones of a score in a file; what follows depends on the batch
CATEGORY = {"id": 1, "name": "defect", "supercategory": "anomaly"}


def coco_image(inspection: Inspection, number: int, path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Entry of the image in ``path``, with ``number`` as its id, and entries of its regions, which get ids later."""
    height, width = inspection.size
    scores = {"score": rounded(inspection.score), "anomalous": inspection.anomalous}
    image = {"id": number, "file_name": path, "height": height, "width": width} | scores
    return image, [_annotation(region, number, inspection.size) for region in inspection.regions]


def write_coco(path: Path, images: Sequence[dict[str, Any]], annotations: Sequence[dict[str, Any]]) -> None:
    """Write entries by `coco_image` of all images; the regions are numbered from 1."""
    numbered = [{"id": number} | entry for number, entry in enumerate(annotations, 1)]
    content = {"images": images, "annotations": numbered, "categories": [CATEGORY]}
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def rounded(value: float) -> float:
    """A number to 6 significant digits.

    Example:
        >>> rounded(1.5193347930908203)
        1.51933
    """
    return float(f"{value:.{DIGITS}g}")


def _annotation(region: Region, number: int, size: tuple[int, int]) -> dict[str, Any]:
    left, top, right, bottom = region.box
    return {
        "image_id": number,
        "category_id": CATEGORY["id"],
        "bbox": [left, top, right - left, bottom - top],
        "area": region.area,
        "segmentation": {"size": list(size), "counts": run_lengths(region, size)},
        "iscrowd": 0,
        "score": rounded(region.score),
    }


def run_lengths(region: Region, size: tuple[int, int]) -> list[int]:
    """COCO's run lengths of a region in an image of ``size``, column after column: outside, inside, outside and so on.

    Exact, holes and all, which a polygon of COCO's is not.
    """
    columns, rows = np.nonzero(region.mask.T)
    pixels = (region.box[0] + columns) * size[0] + region.box[1] + rows  # ascending
    breaks = np.nonzero(np.diff(pixels) != 1)[0]
    begins, ends = pixels[np.r_[0, breaks + 1]], pixels[np.r_[breaks, len(pixels) - 1]] + 1
    borders = np.r_[0, np.stack([begins, ends], 1).ravel(), size[0] * size[1]]
    return list(np.diff(borders).tolist())
