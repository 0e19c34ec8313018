"""What the sizes of a few images say about the model's geometry: a line each, where there is something to say."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from pl_patchcore.distributed import on_first_process
from pl_patchcore.metrics.regions import label_regions
from pl_patchcore.preprocessing import Preprocessing

if TYPE_CHECKING:
    from pl_patchcore.data.base import Record

log = logging.getLogger(__name__)
log.addFilter(on_first_process)

Patch = float | tuple[float, float]
LOOKED_AT = 16  # images, and masks
SQUASHED = 1.2  # ratio of the sides' scales from which on defects look different lying and standing
VARIED = 1.05  # ratio between aspect ratios of images that one resize does not fit
GRID = 16  # pixels: stride of the coarser of the layers that are usual
# Side of a patch in pixels of the original. The paper brings images of 700 to 1024 pixels to 256, so that a patch is 22
# to 32; half as much again is no longer what its figures are of.
LARGE_PATCH = 48


def tell_geometry(
    records: Sequence[Record],
    tests: Sequence[Record] | None,
    transform: Preprocessing,
    patch: Patch | None,
) -> None:
    """Say where images are squashed, and where a patch is large beside the images or their labelled defects.

    Headers are looked at, and some masks are read; no image is decoded.

    Args:
        records: Images that the model is to fit, or to score.
        tests: Test images of a fit; None where the model is fitted, and its settings are known.
        transform: Preprocessing of the model.
        patch: Pixels of the input from patch to patch, one number, or down and across; None: not known.
    """
    headers = (record.check(transform) for record in spread(records))
    sizes = [header.size for header in headers if header is not None]
    if not sizes:
        return
    if tests is not None and transform.resize_mode == "squash" and transform.resize is not None:
        _tell_squashed(sizes, transform)
    if patch is not None:
        _tell_patch(sizes, tests or (), transform, patch)


def spread(records: Sequence[Record]) -> list[Record]:
    """A few of the records, evenly spread."""
    places = np.linspace(0, len(records) - 1, min(LOOKED_AT, len(records))).round().astype(int)
    return [records[i] for i in places]


def _tell_squashed(sizes: Sequence[tuple[int, int]], transform: Preprocessing) -> None:
    """Say that images do not have the input's aspect ratio, and which size has theirs."""
    rows, columns = transform.resize if isinstance(transform.resize, tuple) else (transform.resize or 1,) * 2
    aspects = [width / height for height, width in sizes]
    aspect = float(np.median(aspects))
    stretch = aspect * rows / columns
    if max(stretch, 1 / stretch) <= SQUASHED:
        return
    remedy = "set model.resize_mode to longer_side, which keeps each one's"
    if max(aspects) / min(aspects) <= VARIED:
        height = math.sqrt(rows * columns / aspect)
        size = [max(GRID, GRID * round(side / GRID)) for side in (height, height * aspect)]
        crop = "" if transform.crop is None else " and model.crop to null"
        remedy = (
            f"set model.resize to {size}{crop}, which has their aspect ratio and about as many pixels, or "
            "model.resize_mode to longer_side"
        )
    log.info("the images are about %s and squashed to %s: %s.", _ratio(aspect), _ratio(columns / rows), remedy)


def _ratio(aspect: float) -> str:
    """Width to height in small whole numbers.

    Example:
        >>> _ratio(1.5), _ratio(9 / 16)
        ('3:2', '9:16')
    """
    found = Fraction(max(aspect, 1 / aspect)).limit_denominator(9)
    return f"{found.numerator}:{found.denominator}" if aspect >= 1 else f"{found.denominator}:{found.numerator}"


def _tell_patch(
    sizes: Sequence[tuple[int, int]], tests: Sequence[Record], transform: Preprocessing, patch: Patch
) -> None:
    """Say how large a patch is on the images, where it is larger than the paper's or than half a labelled defect."""
    scales = np.median([transform.scale(*size) for size in sizes], axis=0)
    down, across = scales * patch
    if max(scales) <= 1:
        return  # a larger resize would show nothing more
    found = []
    if max(down, across) > LARGE_PATCH:
        width, height = (5 * round(2 * side / 5) for side in (across, down))
        found = [f"defects under about {width} x {height} are hard to see"]
    masked = [record for record in tests if record.label == 1 and record.mask_path and record.mask_is_image]
    if (smallest := _smallest_defect(masked, transform, patch)) is not None:
        found.append(f"the smallest labelled defect of {min(LOOKED_AT, len(masked))} masks is {smallest}")
    if found:
        log.info(
            "a patch covers %.0f x %.0f pixels (width x height) of these images; %s: raise model.resize, with "
            "model.tile where that takes too much memory.",
            *(across, down, ", and ".join(found)),
        )


def _smallest_defect(masked: Sequence[Record], transform: Preprocessing, patch: Patch) -> str | None:
    """Width and height of the smallest of the images' largest defects in some masks, if it is under two patches.

    The largest of an image is what it can be found by; the longer side counts, as that of a scratch.
    """
    found = []
    for record in tqdm(spread(masked), "Looking at masks", delay=2, leave=False, unit=" masks"):
        header = record.check(transform)
        mask = np.zeros((1, 1), np.uint8) if header is None else record.truth(header.size, transform)
        boxes = ndimage.find_objects(label_regions(mask == 1)[0]) if (mask == 1).any() else []
        sides = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in boxes]
        units = np.multiply(transform.scale(*mask.shape), patch)  # a patch in pixels of this image
        if sides:
            found.append(max((max(np.divide(side, units)), side) for side in sides))
    patches, (height, width) = min(found, default=(2.0, (0, 0)))
    return f"{width} x {height}" if patches < 2 else None
