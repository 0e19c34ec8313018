"""Anomaly map on the original image's pixels, and a threshold -> the regions above it. Next: `inspection.py`.

A region is a connected component, as in `metrics/regions.py`. Coordinates are x to the right and y down, in pixels of
the original image; the pixel in column x and row y covers x to x + 1 and y to y + 1. An outline goes along the edges of
pixels, so that its area and box are the region's own, to the pixel. (Contours between the centres of pixels, such as
those of scikit-image and contourpy, cut the corners off.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import ndimage

from pl_patchcore.metrics.regions import label_regions

Polygon = list[tuple[int, int]]  # corners (x, y); the last one joins the first


@dataclass(frozen=True, eq=False)
class Region:
    """A connected region of an image whose anomaly map lies above the pixel threshold.

    Args:
        box: Left, top, right and bottom, as `PIL.Image.Image.crop` takes it: right and bottom lie outside.
        area: Number of pixels.
        centroid: Mean of the pixels' centres, ``(x, y)``.
        peak: Pixel of the highest value, ``(x, y)``.
        score: That value.
        mask: Which pixels of the box are the region's, bool ``(bottom - top, right - left)``.
    """

    box: tuple[int, int, int, int]
    area: int
    centroid: tuple[float, float]
    peak: tuple[int, int]
    score: float
    mask: np.ndarray

    @cached_property
    def polygons(self) -> list[Polygon]:
        """The outer outline, then those of the holes."""
        left, top = self.box[:2]
        return [[(left + x, top + y) for x, y in polygon] for polygon in outlines(self.mask)]

    @property
    def outline(self) -> Polygon:
        """Outer outline, clockwise corners ``(x, y)``; where pixels touch at a corner it meets itself there."""
        return self.polygons[0]

    @property
    def holes(self) -> list[Polygon]:
        """Outlines of the holes."""
        return self.polygons[1:]

    def to_dict(self) -> dict[str, Any]:
        """All but the mask, as plain values."""
        return {
            "box": list(self.box),
            "area": self.area,
            "centroid": list(self.centroid),
            "peak": list(self.peak),
            "score": self.score,
            "outline": [list(corner) for corner in self.outline],
            "holes": [[list(corner) for corner in hole] for hole in self.holes],
        }


def find_regions(
    anomaly_map: np.ndarray, mask: np.ndarray, least_area: int = 1, corner: tuple[int, int] = (0, 0)
) -> list[Region]:
    """Find the regions of a mask, the largest first.

    Args:
        anomaly_map: ``(H, W)``, of any floating type.
        mask: bool ``(H, W)``.
        least_area: Pixels below which a region is left out.
        corner: Place of the arrays' first pixel in the image, ``(x, y)``, where they are a part of it.

    Example:
        >>> mask = np.array([[1, 1, 0, 0], [0, 0, 0, 1]], bool)
        >>> [(region.box, region.area, region.outline) for region in find_regions(mask * 5.0, mask)]
        [((0, 0, 2, 1), 2, [(0, 0), (2, 0), (2, 1), (0, 1)]), ((3, 1, 4, 2), 1, [(3, 1), (4, 1), (4, 2), (3, 2)])]
    """
    if not mask.any():
        return []
    labels, frame = label_regions(mask)
    heat, areas = anomaly_map[frame], np.bincount(labels[labels > 0])
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        if areas[number] < least_area:
            continue
        inside = labels[rows, columns] == number
        values = np.where(inside, heat[rows, columns], -np.inf)
        left, top = corner[0] + frame[1].start + columns.start, corner[1] + frame[0].start + rows.start
        height, width = inside.shape
        y, x = np.unravel_index(int(values.argmax()), inside.shape)
        middle = [float(places.mean()) for places in inside.nonzero()]
        found.append(
            Region(
                box=(left, top, left + width, top + height),
                area=int(areas[number]),
                centroid=(left + middle[1] + 0.5, top + middle[0] + 0.5),
                peak=(left + int(x), top + int(y)),
                score=float(values[y, x]),
                mask=inside,
            )
        )
    return sorted(found, key=lambda region: -region.area)


def outlines(mask: np.ndarray) -> list[Polygon]:
    """Outline a connected mask, bool ``(h, w)``, pixels that touch at a corner connected: the outer one, then holes.

    Along each line of the grid, the corners of a rectilinear outline are the ends of its edges two by two: first and
    second, third and fourth. So each corner has one neighbour along its row and one along its column.

    Example:
        >>> outlines(np.array([[1, 0], [0, 1]], bool))
        [[(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (1, 2), (1, 1), (0, 1)]]
    """
    padded = np.pad(mask, 1).astype(np.int8)
    parts = np.stack([padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]])  # of the 2 x 2 at a vertex
    number, falling = parts.sum(0), parts[0] == parts[3]
    crossing = (number == 2) & falling & (parts[1] == parts[2])  # two pixels that touch at a corner: two corners in one
    y, x = np.nonzero((number % 2 == 1) | crossing)
    copies = 1 + crossing[y, x]
    corners = np.repeat(np.arange(len(y)), copies)
    # of a crossing, the first copy has its edge to the left, the second one to the right; the edge upwards belongs to
    # the copy with which it goes around a pixel that is not the mask's
    second = np.concatenate([[False], corners[1:] == corners[:-1]])
    y, x, pixel_above_left = y[corners], x[corners], parts[0, y, x][corners] == 1
    along_column = np.lexsort((second ^ pixel_above_left, y, x))
    across = np.empty_like(along_column)
    across[along_column] = along_column[np.arange(len(y)) ^ 1]
    return _loops(x.tolist(), y.tolist(), across.tolist())


def _loops(x: list[int], y: list[int], across: list[int]) -> list[Polygon]:
    """Follow the edges from corner to corner; the first corner of all is the outer outline's."""
    found, seen = [], [False] * len(x)
    for start in range(len(x)):
        polygon: Polygon = []
        corner = start
        while not seen[corner]:
            other = corner ^ 1  # along its row: corners are in the order of rows
            seen[corner] = seen[other] = True
            polygon += [(x[corner], y[corner]), (x[other], y[other])]
            corner = across[other]
        if polygon:
            found.append(polygon)
    return found
