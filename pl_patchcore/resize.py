"""Resize of images in tensors: Pillow's antialiased filters as matrices, unrounded, alike in Python and in a graph.

An output position weighs the input positions around it by a triangle (``bilinear``) or a cubic (``bicubic``), which is
widened by the scale where the image becomes smaller. Rows first, then columns; nothing is rounded to 8 bits in between
or after, and levels are clipped to 0 to 255 once, at the end. So the result is Pillow's within one grey level, without
depending on Pillow's version, on its order of the two passes, or on a runtime's own resize.

All of it can be recorded by ``torch.export`` at sizes that are open: positions are whole numbers, computed exactly.
Next: `preprocessing.py`, which normalises what comes out.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Filter = Literal["bilinear", "bicubic"]
SUPPORT = {"bilinear": 1, "bicubic": 2}  # how far a filter reaches, in pixels of the coarser side
BAND = 16  # output positions that are computed at once, of the input positions that any of them needs
_CUBIC = -0.5  # the slope at 1 of Pillow's cubic; torch's without antialiasing is -0.75
_CACHED = 2**20  # levels


def resize_matrix(
    old: int, new: int | Tensor, first: int | Tensor, count: int, kind: Filter, device: torch.device | None = None
) -> Tensor:
    """Weights of a resize along one axis.

    Args:
        old: Positions before; may be a dimension that is open in a graph.
        new: Positions after, all of them: a number, or int64 ``()``.
        first: The first position after that is wanted, likewise; below 0 and from ``new`` on, the ends are repeated.
        count: Positions after that are wanted.
        kind: The filter.
        device: Where the weights are wanted.

    Returns:
        float32 ``(count, old)``; a row sums to 1.

    Example:
        >>> resize_matrix(4, 2, 0, 2, "bilinear").mul(7).round().tolist()  # sevenths
        [[3.0, 3.0, 1.0, 0.0], [0.0, 1.0, 3.0, 3.0]]
    """
    wanted = _within(torch.arange(count, device=device) + first, new)
    return _weights(torch.arange(old, device=device), wanted, old, new, kind)


def resized(
    images: Tensor,
    size: tuple[int, int] | tuple[Tensor, Tensor],
    first: tuple[int, int] | tuple[Tensor, Tensor],
    count: tuple[int, int],
    kind: Filter,
) -> Tensor:
    """Resize images and cut a window out, whose edges are repeated beyond the resized image.

    The product with `resize_matrix` along both axes, up to the last bits. With ``size`` in numbers it is computed in
    bands, which takes time and memory as the filter's width, not as the image.

    Args:
        images: Levels ``(B, H, W, C)``, uint8 or floating-point.
        size: Height and width of the resized images: numbers, or int64 ``()``.
        first: Top and left of the window, likewise; may be negative.
        count: Height and width of the window.
        kind: The filter.

    Returns:
        Levels in [0, 255], float32 ``(B, C, *count)``, contiguous.
    """
    batch, height, width, channels = images.shape
    rows = _along(images.reshape(batch, height, width * channels), size[0], first[0], count[0], kind)
    rows = rows.reshape(batch, count[0], width, channels).permute(0, 2, 3, 1)  # (B, W, C, rows)
    both = _along(rows.reshape(batch, width, channels * count[0]), size[1], first[1], count[1], kind)
    both = both.reshape(batch, count[1], channels, count[0]).permute(0, 2, 3, 1)
    return both.clamp(0, 255).contiguous()


def _along(levels: Tensor, new: int | Tensor, first: int | Tensor, count: int, kind: Filter) -> Tensor:
    """Resize ``(B, old, K)`` to ``(B, count, K)``, float32."""
    old = levels.shape[1]
    if isinstance(new, Tensor):  # how many input positions a band needs would depend on numbers in the graph
        return torch.matmul(resize_matrix(old, new, first, count, kind, levels.device), levels.float())
    every = torch.arange(-(-count // BAND) * BAND, device=levels.device)  # whole bands
    wanted = _within(every + first, new).reshape(-1, BAND)  # (bands, BAND)
    reach = 2 * SUPPORT[kind] * torch.sym_max(old, new)  # in units of half an input position / new
    length = torch.sym_min(old, ((BAND - 1) * 2 * old + 2 * reach) // (2 * new) + 2)
    lowest = torch.div((2 * wanted[:, 0] + 1) * old - reach, 2 * new, rounding_mode="floor")
    lowest = lowest.clamp(min=0).clamp(max=old - length)  # (bands,) a band's first input position
    used = lowest[:, None] + torch.arange(length, device=levels.device)  # (bands, length)
    weights = _weights(used[:, None], wanted, old, new, kind)  # (bands, BAND, length)
    # (bands at once, ...): in Python as many as stay in the processor's cache, and take next to no memory
    at_once = len(used) if torch.compiler.is_compiling() else max(1, _CACHED // (length * levels[:, 0].numel()))
    parts = zip(weights.split(at_once), used.split(at_once), strict=True)
    found = torch.cat(  # (B, bands, BAND, K)
        [
            torch.matmul(part, levels.index_select(1, rows.flatten()).float().unflatten(1, rows.shape))
            for part, rows in parts
        ],
        dim=1,
    )
    return found.flatten(1, 2)[:, :count]


def _within(positions: Tensor, size: int | Tensor) -> Tensor:
    """Positions 0 to ``size - 1``; those beyond become the nearest."""
    return torch.minimum(positions.clamp(min=0), torch.as_tensor(size) - 1)


def _weights(used: Tensor, wanted: Tensor, old: Any, new: Any, kind: Filter) -> Tensor:
    """Weights of input positions ``(..., 1, L)`` or ``(L,)`` for output positions ``(..., n)``: ``(..., n, L)``."""
    gap = ((2 * used + 1) * new - (2 * wanted[..., None] + 1) * old).abs()  # in units of half a position / new
    wide = torch.maximum(torch.as_tensor(new), torch.full((), old, dtype=torch.int64))
    x = (gap.double() / (2 * wide).double()).float()  # in units of the filter
    if kind == "bilinear":
        weights = (1 - x).clamp(min=0)
    else:
        near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * _CUBIC
        weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    normalised: Tensor = weights / weights.sum(-1, keepdim=True)
    return normalised
