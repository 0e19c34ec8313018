"""Where an image goes, in a graph of open sizes: images -> the network's input; its map -> the image's pixels.

Repeats `Preprocessing.geometry` and `anomaly_map.to_original` in tensors: all positions are whole numbers. Upsampling,
the Gaussian and the way back are linear and act on each axis alone, so together they are one matrix an axis. Of images
of one size all of it is constant, and so is which of their places count. Next: `runtime.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pl_patchcore.counted import Counted
from pl_patchcore.preprocessing import Preprocessing
from pl_patchcore.resize import resized


class Axis(NamedTuple):
    """Where the network's input lies along one axis; numbers, dimensions of the graph, or int64 ``()``."""

    pixels: Any  # of the image
    fitted: Any  # pixels of the resized image
    first: Any  # of these, the input's first
    count: Any  # pixels of the input


class Frame(nn.Module):
    """Images as a camera gives them -> levels of the network's input.

    Args:
        transform: Preprocessing of the model.
        size: Height and width of the images that it takes; None: any, or, if they come resized, the input's.

    Attributes:
        ready: Whether images come resized and cropped.
        size: Height and width of the images that it takes; None: any.
        whole: Whether the network's input is all of an image, pixel by pixel.
        known: Where the input lies in an image of that size.
        counted: Which places of such an image count; None: all.
        region: Which of its pixels, bool ``(H, W)``; None: all.
    """

    region: Tensor | None
    paint: Tensor

    def __init__(self, transform: Preprocessing, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.transform, self.ready = transform, comes_resized(transform)
        self.size = transform.size if self.ready else size
        self.whole = self.ready or not (transform.resize or transform.crop or transform.crop_multiple)
        self.counted: Counted | None = None
        self.known: tuple[Axis, Axis] | None = None
        self.register_buffer("region", None)
        if size is not None:
            self.known = _axes_of(transform, size)
            sample = transform.apply(Image.new("RGB", size[::-1]))
            self.counted = Counted.of({name: value[None] for name, value in sample.items()})
            if "region" in sample:
                self.register_buffer("region", sample["region"] > 0)
                self.register_buffer("paint", torch.tensor(transform.paint, dtype=torch.uint8))

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Axis, Axis] | None]:
        """Levels float32 ``(B, 3, h, w)`` of images uint8 ``(B, H, W, 3)``, and where they lie; None: everywhere."""
        if self.region is not None:
            images = torch.where(self.region[..., None], images, self.paint)
        if self.whole:
            return images.permute(0, 3, 1, 2).float(), None
        rows, columns = axes = self.known or self.axes(images.shape[1], images.shape[2])
        if self.transform.resize is None:
            for dim, axis in ((1, rows), (2, columns)):
                images = images.index_select(dim, torch.arange(axis.count) + axis.first)
            return images.permute(0, 3, 1, 2).float(), axes
        _, size, first, count = zip(rows, columns, strict=True)
        levels = resized(images, size, first, count, self.transform.interpolation)
        return levels.round() if self.transform.levels else levels, axes

    def axes(self, height: int, width: int) -> tuple[Axis, Axis]:
        """Where the input lies in an image of a size that is open in the graph."""
        given, pixels, step = self.transform, (height, width), self.transform.crop_multiple or 1
        fitted: Any = [torch.full((), n, dtype=torch.int64) for n in pixels]
        if given.resize is not None and given.resize_mode == "shorter_side":
            short = torch.minimum(*fitted)
            fitted = [torch.div(given.resize * n, short, rounding_mode="floor") for n in fitted]
        elif given.resize is not None:
            fitted = both(given.resize)
        whole: Any = pixels if given.resize is None else fitted
        window = whole if given.crop is None else both(given.crop)
        rows, columns = (
            Axis(n, of, 0 if given.crop is None else _half(of - count), count - count % step)
            for n, of, count in zip(pixels, fitted, window, strict=True)
        )
        return rows, columns


def comes_resized(transform: Preprocessing) -> bool:
    """Whether Pillow resizes images before a model, or a file, is given them."""
    return transform.resize is not None and transform.resize_by == "pillow"


def _axes_of(transform: Preprocessing, size: tuple[int, int]) -> tuple[Axis, Axis]:
    """Where the input lies in an image of a known size."""
    known = transform.geometry(*size)
    rows, columns = (
        Axis(n, fitted, part.start - edge[0], part.stop - part.start + sum(edge))
        for n, fitted, part, edge in zip(size, known.fitted, (known.rows, known.columns), known.edges, strict=True)
    )
    return rows, columns


def both(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def sides(size: Sequence[int]) -> str:
    """Height x width, for messages, of these or of an image's shape."""
    return f"{size[0]}x{size[1]}"


def _half(number: int | Tensor) -> int | Tensor:
    """Half of a whole number, rounded; halves to the even one, as Python does."""
    return (number.double() / 2).round().long() if isinstance(number, Tensor) else round(number / 2)


def map_matrix(pixels: int, cells: int, sigma: float) -> Tensor:
    """What `anomaly_map` does along one axis: bilinear upsampling, then the Gaussian, float32 ``(pixels, cells)``.

    Args:
        pixels: Of the map; it and ``cells`` may be dimensions of a graph.
        cells: Of the grid of patches.
        sigma: Standard deviation, pixels; 0: no Gaussian.

    Example:
        >>> map_matrix(4, 2, 0).tolist()
        [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    upsampled = _between((2 * torch.arange(pixels) + 1) * cells, 2 * pixels, cells)
    if sigma == 0:
        return upsampled
    radius = int(4 * sigma + 0.5)
    turn = torch.full((), 2 * pixels, dtype=torch.int64)
    place = torch.arange(-radius, pixels + radius).remainder(turn)  # the edge is repeated, as in `smoothed`
    place = torch.minimum(place, turn - 1 - place)
    weights = torch.exp(torch.arange(-radius, radius + 1).double().square() / (-2 * sigma**2))
    kernel = (weights / weights.sum()).float()[None, None]
    return F.conv1d(upsampled[place].T[:, None], kernel)[:, 0].T


def back_matrix(axis: Axis) -> tuple[Tensor, Tensor]:
    """From a map of the input to the image's pixels along one axis: ``(pixels, count)``; which lie in the crop, bool.

    Example:
        >>> matrix, inside = back_matrix(Axis(pixels=4, fitted=4, first=1, count=2))
        >>> matrix.tolist(), inside.tolist()
        ([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [False, True, True, False])
    """
    place = (2 * torch.arange(axis.pixels) + 1) * axis.fitted - 2 * axis.first * axis.pixels
    unit = 2 * axis.pixels
    return _between(place, unit, axis.count), (place >= 0) & (place <= unit * axis.count)


def _between(place: Tensor, unit: int, cells: int) -> Tensor:
    """Weights of cells around places on their axis, which are whole numbers of 1 / ``unit``: ``(n, cells)``."""
    at = (place.double() / unit - 0.5).clamp(min=0).minimum(torch.full((), cells, dtype=torch.float64) - 1)
    return (1 - (at[:, None] - torch.arange(cells)).abs()).clamp(min=0).float()
