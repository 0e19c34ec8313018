"""Which places of the images of a batch count: those in the original image and in its region of interest.

Reads what `preprocessing.py` says of each image: ``original_size``, ``crop_box``, ``region``. One rule serves patches,
pixels and pictures: a place counts if its centre does. Next: `patch_features.py`, whose patches it picks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pl_patchcore.errors import UserError

EDGE = 0.01  # pixels by which a crop box may exceed its image by rounding


class Turn(NamedTuple):
    """A turn of an input around its centre, counter-clockwise, at the same size."""

    degrees: float
    size: tuple[int, int]  # height and width of the input, pixels

    def sources(self, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in the input before it what lies at these pixels after it was; beyond the edges, it is reflected.

        Args:
            y: Rows, of any shape that goes with that of ``x``; whole numbers are the middles of pixels.
            x: Columns.

        Returns:
            Rows and columns, float64, fractional, from 0 to the last.

        Example:
            >>> [float(each) for each in Turn(90, (5, 5)).sources(np.array(0), np.array(4))]
            [4.0, 4.0]
        """
        height, width = self.size
        angle = math.radians(self.degrees)
        sine, cosine = round(math.sin(angle), 15), round(math.cos(angle), 15)  # exactly 0 and 1 at right angles
        down, across = y - (height - 1) / 2, x - (width - 1) / 2
        rows = (height - 1) / 2 + cosine * down + sine * across
        columns = (width - 1) / 2 + cosine * across - sine * down
        return _reflected(rows, height), _reflected(columns, width)


class Geometry(NamedTuple):
    """Which part of an image its input covers, and which pixels of the image count."""

    size: tuple[int, int]  # height and width of the original image, pixels
    box: tuple[float, ...]  # top, left, bottom, right of the input in the original image, pixels
    region: np.ndarray | bytes | None  # which pixels count, (H, W), or the same packed by `Counted.packed`; None: all
    name: str  # the image's, for messages
    object: np.ndarray | None = None  # which parts of the input show the object, bool (h, w); None: all
    turn: Turn | None = None  # of the input, once it was cut out


class Counted:
    """Which places of the images of a batch count.

    Args:
        images: Geometry of each image.
        device: Device of what `at` returns.

    Example:
        >>> batch = {"original_size": torch.tensor([[2, 4]]), "crop_box": torch.tensor([[-1.0, 0.0, 3.0, 4.0]])}
        >>> Counted.of(batch).at(4, 1)[0, :, 0].tolist()
        [False, True, True, False]
    """

    def __init__(self, images: Sequence[Geometry], device: torch.device | str = "cpu") -> None:
        self.images, self.device = list(images), device

    @classmethod
    def of(cls, batch: Mapping[str, Any], device: torch.device | str = "cpu") -> Counted | None:
        """Of a batch (of one size) as our data sets make it; None where all of each image counts."""
        if "crop_box" not in batch or "original_size" not in batch:
            return None
        sizes = [tuple(size) for size in torch.as_tensor(batch["original_size"]).tolist()]
        boxes = [tuple(box) for box in torch.as_tensor(batch["crop_box"]).tolist()]
        regions = batch.get("region", [None] * len(sizes))
        beyond = (
            top < -EDGE or left < -EDGE or bottom > height + EDGE or right > width + EDGE
            for (height, width), (top, left, bottom, right) in zip(sizes, boxes, strict=True)
        )
        if "region" not in batch and not any(beyond):
            return None
        names = batch.get("path", [f"image {i}" for i in range(len(sizes))])
        arrays = [None if region is None else torch.as_tensor(region).cpu().numpy() for region in regions]
        return cls([Geometry(*each) for each in zip(sizes, boxes, arrays, names, strict=True)], device)

    @classmethod
    def of_objects(cls, images: Tensor, counted: Counted | None, found: Tensor) -> Counted:
        """Of images ``(B, 3, H, W)`` in which only an object counts, found in parts ``(B, h, w)`` of them."""
        size = (images.shape[2], images.shape[3])
        whole = [Geometry(size, (0.0, 0.0, *map(float, size)), None, f"image {i}") for i in range(len(images))]
        known = whole if counted is None else counted.images
        parts = [each._replace(object=part) for each, part in zip(known, found.cpu().numpy(), strict=True)]
        return cls(parts, images.device)

    def __getitem__(self, places: slice) -> Counted:
        return Counted(self.images[places], self.device)

    def packed(self) -> Counted:
        """The same in little memory, to be kept."""
        return Counted([each._replace(region=_packed(each.region)) for each in self.images], self.device)

    def whole(self) -> Counted:
        """The same, whatever objects were found."""
        return Counted([each._replace(object=None) for each in self.images], self.device)

    def where_found(self) -> Counted:
        """The same, with images in which no object was found taken whole."""
        images = [e if e.object is None or e.object.any() else e._replace(object=None) for e in self.images]
        return Counted(images, self.device)

    def turned(self, turn: Turn) -> Counted:
        """The same of the images' inputs when these are turned."""
        return Counted([each._replace(turn=turn) for each in self.images], self.device)

    def at(self, height: int, width: int) -> Tensor:
        """Which places of a grid laid over each image's input count: bool ``(B, height, width)``."""
        return torch.from_numpy(np.stack([_at(image, height, width) for image in self.images])).to(self.device)

    def patches(self, height: int, width: int) -> Tensor:
        """As `at`, of patches.

        Raises:
            UserError: If none of an image counts that is not turned.
        """
        inside = self.at(height, width)
        for image, some in zip(self.images, inside.flatten(1).any(1).tolist(), strict=True):
            if not some and image.turn is None:
                raise UserError(
                    f"{image.name}: the centre of no patch lies in its region of interest; give model.roi and "
                    "model.ignore that leave more of it, or raise resize."
                )
        return inside


def _packed(region: np.ndarray | bytes | None) -> bytes | None:
    return zlib.compress(np.packbits(region > 0).tobytes(), 1) if isinstance(region, np.ndarray) else region


def _at(image: Geometry, height: int, width: int) -> np.ndarray:
    (h, w), (top, left, bottom, right), region, _, found, turn = image
    y, x = middles(height, top, bottom)[:, None], middles(width, left, right)[None]
    if turn is not None:
        down, across = (side / number for side, number in zip(turn.size, (height, width), strict=True))
        rows, columns = (np.arange(height) + 0.5) * down - 0.5, (np.arange(width) + 0.5) * across - 0.5
        rows, columns = turn.sources(rows[:, None], columns[None])
        y = np.floor(top + (rows + 0.5) * ((bottom - top) / turn.size[0])).astype(np.int64)
        x = np.floor(left + (columns + 0.5) * ((right - left) / turn.size[1])).astype(np.int64)
    inside: np.ndarray = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    if found is not None:
        inside &= found[np.ix_(middles(height, 0, found.shape[0]), middles(width, 0, found.shape[1]))]
    if isinstance(region, bytes):
        region = np.unpackbits(np.frombuffer(zlib.decompress(region), np.uint8), count=h * w).reshape(h, w)
    if region is not None:
        inside &= region[y.clip(0, h - 1), x.clip(0, w - 1)] > 0
    return inside


def _reflected(places: np.ndarray, number: int) -> np.ndarray:
    """Places among so many pixels: beyond the middles of the outer ones they turn back, as often as it takes."""
    period = max(1, 2 * (number - 1))
    along = np.abs(places) % period
    found: np.ndarray = np.minimum(along, period - along).clip(0, number - 1)
    return found


def middles(number: int, low: float, high: float) -> np.ndarray:
    """Pixels, int64 ``(number,)``, in which the middles of so many places lie that share ``low`` to ``high`` evenly.

    Example:
        >>> middles(3, -1.0, 5.0)
        array([0, 2, 4])
    """
    found: np.ndarray = np.floor(low + (np.arange(number) + 0.5) * ((high - low) / number)).astype(np.int64)
    return found


def one_by_one(images: Tensor, counted: Counted | None) -> Iterator[tuple[Tensor, Counted | None]]:
    """Images ``(B, 3, H, W)`` one by one, ``(1, 3, H, W)``, with what counts of each."""
    for i in range(len(images)):
        yield images[i : i + 1], None if counted is None else counted[i : i + 1]
