"""Images larger than the network is given at once: which tiles cover an image, and what a layer sees of it.

Tiles start at multiples of the network's stride, so that a layer's cells are those that it has of the whole image. Each
patch is taken from the tile in which it lies most central. Where tiles overlap by twice as much as a cell depends on,
it is as if the network had seen the image whole. Next: `patch_features.py`, which runs the network on them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pl_patchcore.errors import UserError

PROBE_LENGTH = 1024  # pixels of the strip that `measure_layers` looks at; half of it is the farthest reach it can tell
PROBE_WIDTH = 64  # pixels across
UNCHANGED = 1e-7  # of a layer's standard deviation: a change below that is none
GPU_TILES = 8  # at once
MOST_OVERLAP = 0.5  # of a tile's side, that an overlap of none given may take: four times the work


class LayerGrid(NamedTuple):
    """A layer's cells along an axis: ``(n + offset) // stride`` of ``n`` pixels."""

    stride: int  # pixels from cell to cell
    offset: int  # pixels
    reach: float  # pixels beside a cell on which its value depends; infinite where it is all or cannot be told


class Span(NamedTuple):
    """A tile along one axis."""

    start: int  # pixels
    end: int
    first: int  # cells of the first layer's grid that are taken from it
    last: int  # the one behind them


class Window(NamedTuple):
    """A tile of an image."""

    row: Span
    column: Span
    grids: list[tuple[int, int]]  # neighbourhoods of the whole image, down and across, of each layer


def measure_layers(run: Callable[[Tensor], Sequence[Tensor]], strides: Sequence[int], like: Tensor) -> list[LayerGrid]:
    """Find the grid of each layer, and on how many pixels beside a cell its value depends.

    One half of a strip of noise is changed, then the other one, along both axes, and the cells are looked at that
    change with it.

    Args:
        run: Images ``(1, 3, H, W)`` of any size to layers ``(1, C, h, w)``.
        strides: Pixels from cell to cell of each layer.
        like: A tensor of the network's type and device.
    """
    strips = torch.randn(2, 3, PROBE_WIDTH, PROBE_LENGTH, generator=torch.Generator().manual_seed(0)).to(like)
    half, reaches = PROBE_LENGTH // 2, [0.0] * len(strides)
    for axis in (2, 3):
        before, after = (strip[None] if axis == 3 else strip[None].mT for strip in strips)
        mixed = torch.cat([after.narrow(axis, 0, half), before.narrow(axis, half, half)], axis)
        for number, layers in enumerate(zip(run(before), run(mixed), run(after), strict=True)):
            one, two, three = (layer[0].movedim(axis - 1, 0).flatten(1) for layer in layers)  # (cells, C w)
            least, stride = UNCHANGED * one.std(), strides[number]
            first = ((two - one).abs().amax(1) > least).nonzero()  # cells that change with the first half
            second = ((two - three).abs().amax(1) > least).nonzero()
            far = max((int(first.max()) + 1) * stride - half, half - int(second.min()) * stride)
            reaches[number] = max(reaches[number], far if far + stride < half else math.inf)
    return [
        LayerGrid(stride, _offset(run, number, stride, like), reach)
        for number, (stride, reach) in enumerate(zip(strides, reaches, strict=True))
    ]


def _offset(run: Callable[[Tensor], Sequence[Tensor]], layer: int, stride: int, like: Tensor) -> int:
    """The offset of a layer's number of cells, by the number of pixels at which there is one cell more."""
    low, high = PROBE_LENGTH // 4, PROBE_LENGTH // 4 + stride
    cells = run(like.new_zeros(1, 3, low, PROBE_WIDTH))[layer].shape[2]
    while high - low > 1:
        middle = (low + high) // 2
        if run(like.new_zeros(1, 3, middle, PROBE_WIDTH))[layer].shape[2] > cells:
            high = middle
        else:
            low = middle
    return (cells + 1) * stride - high


@dataclass(frozen=True)
class TileOptions:
    """How images that are larger than a tile are cut.

    Args:
        tile: Side of a tile, or ``(height, width)``, pixels.
        overlap: Pixels that neighbours share; None: as many as make patch features those of the whole image, but at
            most half of a tile's side.
        batch: Tiles that the network is given at once; None: one on the CPU, 8 on a GPU.

    Raises:
        UserError: If one is not positive.
    """

    tile: int | tuple[int, int]
    overlap: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        if np.shape(self.tile) not in ((), (2,)) or np.min(self.tile) < 1:
            raise UserError(f"tile must be at least 1 pixel, one number or (height, width), got {self.tile}.")
        if self.batch is not None and self.batch < 1:
            raise UserError(f"tile_batch must be at least 1, got {self.batch}.")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a tile, pixels."""
        height, width = (self.tile, self.tile) if isinstance(self.tile, int) else self.tile
        return height, width


class Tiling:
    """Where the tiles of an image lie, and what is taken from each.

    Args:
        options: Size of the tiles and their overlap.
        layers: Grids of the network's layers; the first gives the patch grid.
        patch_size: Side of a neighbourhood, cells.
        patch_stride: Step between neighbourhoods, cells.
        padded: Whether the network takes tiles of this size only: images are continued by their edges.

    Attributes:
        step: Pixels that tiles start at multiples of.
        overlap: Pixels that neighbours share at least, down and across.
        enough: Pixels of overlap that make patch features those of the whole image; infinite where none do.

    Raises:
        UserError: If tiles are smaller than a few cells, or nearly covered by their overlap.

    Example:
        >>> tiling = Tiling(TileOptions(64, overlap=16), [LayerGrid(8, 7, 4.0)], 1, 1, padded=False)
        >>> tiling.along(0, 101)
        [Span(start=0, end=64, first=0, last=6), Span(start=40, end=101, first=6, last=13)]
    """

    def __init__(
        self, options: TileOptions, layers: Sequence[LayerGrid], patch_size: int, patch_stride: int, *, padded: bool
    ) -> None:
        self.size, self.batch, self.layers, self.padded = options.size, options.batch, list(layers), padded
        self.step = math.lcm(*(layer.stride for layer in layers)) * patch_stride
        self.patch_stride, self.patch = patch_stride, layers[0].stride * patch_stride  # cells, pixels
        around = patch_size // 2 + 1  # cells: the neighbourhood's, and the next one for the resize between layers
        self.enough = 2 * max(layer.reach + around * layer.stride for layer in layers) + self.patch
        most = [side - self.step for side in self.size]
        if min(most) < self.step:
            raise UserError(
                f"tile {self.size[0]}x{self.size[1]} is too small: the layers' stride is {self.step} pixels; set at "
                f"least {2 * self.step}."
            )
        self.wanted = options.overlap
        if self.wanted is not None and self.wanted > min(most):
            raise UserError(
                f"tile_overlap {self.wanted} must be at most {min(most)}, for tiles of {self.size[0]}x{self.size[1]} "
                f"to move on by the layers' stride of {self.step} pixels; lower it or raise tile."
            )
        self.overlap = [self._shared(side) for side in self.size]

    def _shared(self, side: int) -> int:
        """Pixels that neighbours of tiles of this side share."""
        return int(min(self.enough, MOST_OVERLAP * side, side - self.step)) if self.wanted is None else self.wanted

    def along(self, axis: int, pixels: int) -> list[Span]:
        """Tiles along an axis (0: down, 1: across) of so many pixels, spread evenly."""
        return self._spread(self.size[axis], pixels)

    def _spread(self, tile: int, pixels: int) -> list[Span]:
        advance = (tile - self._shared(tile)) // self.step
        last = max(0, -(-(pixels - tile) // self.step))  # start of the last one, steps
        after = -(-last // advance)  # tiles after the first one
        starts = [round(k * last / max(1, after)) * self.step for k in range(after + 1)]
        ends = [start + tile if self.padded else min(start + tile, pixels) for start in starts]
        between = [round((start + end) / 2 / self.patch) for start, end in zip(starts[1:], ends[:-1], strict=True)]
        bounds = [0, *between, self.grid(0, pixels)]
        return [Span(*each) for each in zip(starts, ends, bounds[:-1], bounds[1:], strict=True)]

    def holds(self, height: int, width: int) -> bool:
        """Whether the network is given an image of so many pixels whole."""
        if self.padded:
            return (height, width) == self.size
        return height <= self.size[0] and width <= self.size[1]

    def calls(self, height: int, width: int, device: torch.device) -> int:
        """How often the network is called for an image of so many pixels."""
        if self.holds(height, width):
            return 1
        return len(self.along(0, height)) * len(list(self.batches(self.along(1, width), device)))

    def told(self, height: int, width: int) -> str:
        """What the tiles of an image of so many pixels cost, in a sentence."""
        row, column = self.along(0, height), self.along(1, width)
        more = self._more(self.size, (height, width))
        text = f"images of {height}x{width} pixels in {len(row) * len(column)} tiles of {self.size[0]}x{self.size[1]}, "
        text += f"that share {self.overlap[0]} pixels: {more:.0%} of the pixels are computed again"
        sizes = ((self.size[0] + k * self.step, self.size[1] + k * self.step) for k in itertools.count(1))
        if more and not self.padded:
            half = next(size for size in sizes if self._more(size, (height, width)) <= more / 2)
            text += f", tile [{half[0]}, {half[1]}] would halve that"
        if max(len(row), len(column)) > 1 and (short := min(self.overlap)) < self.enough:
            needed = f"from {self.enough:.0f} on" if math.isfinite(self.enough) else "at no overlap"
            text += f"; patch features are those of the whole image {needed}, and nearly so with {short}"
        return f"{text}."

    def _more(self, size: Sequence[int], image: Sequence[int]) -> float:
        """Pixels that tiles of this size compute beyond those of the image, as a share of them."""
        sides = [sum(span.end - span.start for span in self._spread(*each)) for each in zip(size, image, strict=True)]
        return max(0.0, math.prod(sides) / math.prod(image) - 1)

    def grid(self, layer: int, pixels: int) -> int:
        """Neighbourhoods of a layer along so many pixels."""
        found = self.layers[layer]
        cells = -(-pixels // found.stride) if self.padded else (pixels + found.offset) // found.stride
        return (cells - 1) // self.patch_stride + 1

    def batches(self, spans: Sequence[Span], device: torch.device) -> Iterator[Sequence[Span]]:
        """Tiles of a row that the network is given at once: neighbours of one size."""
        at_once = self.batch or (1 if device.type == "cpu" else GPU_TILES)
        for _, group in itertools.groupby(spans, lambda span: span.end - span.start):
            alike = list(group)
            yield from (alike[first : first + at_once] for first in range(0, len(alike), at_once))

    def cut(self, images: Tensor, row: Span, column: Span) -> Tensor:
        """A tile of images ``(B, 3, H, W)``."""
        tile = images[:, :, row.start : row.end, column.start : column.end]
        down, across = row.end - row.start - tile.shape[2], column.end - column.start - tile.shape[3]
        if not (down or across):
            return tile
        y, x = (torch.arange(side, device=images.device) for side in (row.end - row.start, column.end - column.start))
        return tile[:, :, y.clamp(max=tile.shape[2] - 1)[:, None], x.clamp(max=tile.shape[3] - 1)]

    def parts(self, layers: Sequence[Tensor], window: Window) -> list[Tensor]:
        """Of each layer of a tile, ``(B, C, h, w)``, the patches that lie most central in it: ``(B, C, h', w')``."""
        found, (row, column, grids) = [], window
        for layer, grid, own in zip(layers, grids, self.layers, strict=True):
            part = layer.permute(0, 2, 3, 1)  # as it lies in memory
            for axis, span in ((0, row), (1, column)):
                start = span.start // (own.stride * self.patch_stride)
                at = (torch.arange(span.first, span.last, dtype=torch.float64) + 0.5) * (grid[axis] / grids[0][axis])
                at = (at - 0.5).clamp(0, grid[axis] - 1) - start
                first, most = at.floor(), part.shape[1 + axis] - 1
                places = (each.clamp(0, most).long().to(part.device) for each in (first, first + 1))
                one, two = (part.index_select(1 + axis, each) for each in places)
                weight = (at - first).to(part)[:, None] if axis else (at - first).to(part)[:, None, None]
                part = one if own is self.layers[0] else torch.lerp(one, two, weight)
            found.append(part.permute(0, 3, 1, 2))
        return found
