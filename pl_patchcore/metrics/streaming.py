"""Scores of any range, batch after batch -> bins in bounded memory -> a curve with known error.

A float32 score has an integer key of the same order. Its upper 16 bits name a bucket (128 of them span a factor
of two), and every bucket that is met gets ``2^bits`` bins for the lower 16. All buckets share the budget: ``bits``
is the largest number that keeps all bins within `BINS`, at most 16, where a bin is a single float32. It is a
function of the set of buckets met, which only grows, and making bins coarser adds neighbours up. So the histogram
depends on the scores alone: not on their order, their batches or the number of processes, bit for bit.

Scores in a narrow band (300 +- 3 meets 4 buckets) are binned exactly; scores within a factor of two get 2^20
bins; the worst input (every float32 bucket met) still gets 2^11 bins for each factor of two. A bin remembers its
smallest and largest score: one that holds a single value adds no error. Weights of anomalous pixels, 1 / area of
the region, are summed in int64 as multiples of 2^-40.

Everything is torch and runs on the scores' device. Next: `state.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pl_patchcore.errors import UserError
from pl_patchcore.metrics.curve import Curve, descending

BINS = 2**20  # 34 MB: 32 bytes a bin
UNIT = 2**40  # fixed point of the weights
MOST = 2**62  # sum of weights that int64 holds with room to spare: 4 million regions
PIECE = 2**16  # pixels handled at once: their temporaries stay in the processor's cache

Cell = tuple[int, ...]  # what pixels are kept apart by: numbers that name a group of images


class Pixels(NamedTuple):
    """Scores of one cell ``(n,)``, float32; with areas ``(n,)`` they are anomalous, without nominal."""

    cell: Cell
    scores: Tensor
    areas: Tensor | None


class Histogram(NamedTuple):
    """Bins of all cells, ``U`` buckets of ``2^bits`` bins, one after another; the rest of the ``BINS`` is 0.

    Columns keep their size from the first score to the last: blocks of changing size would leave holes in the
    allocator's memory, several times the histogram in the end.

    Attributes:
        buckets: Cell and upper 16 bits of the key (its sign flipped), ``(U, C + 1)``, int64, rows ascending.
        nominal: Number of nominal pixels in each bin, ``(BINS,)``, int64.
        anomalous: Number of anomalous pixels, ``(BINS,)``, int64.
        weights: Sum of their weights, units of 2^-40, ``(BINS,)``, int64.
        lowest: 2^16 - lower 16 bits of the smallest key, 0 in empty bins, ``(BINS,)``, int32.
        highest: 1 + lower 16 bits of the largest key, 0 in empty bins, ``(BINS,)``, int32.
    """

    buckets: Tensor
    nominal: Tensor
    anomalous: Tensor
    weights: Tensor
    lowest: Tensor
    highest: Tensor

    @property
    def bits(self) -> int:
        """Binary logarithm of the number of bins in a bucket."""
        return max(0, min(16, (len(self.nominal) // max(1, len(self.buckets))).bit_length() - 1))


def score_keys(scores: Tensor) -> Tensor:
    """Keys, int32, in the order of the finite float32 ``scores``; 0.0 and -0.0 share one.

    Example:
        >>> score_keys(torch.tensor([-1.0, -0.0, 0.0, 1e-45, 1.0])).tolist()
        [-1065353217, 0, 0, 1, 1065353216]
    """
    bits = scores.view(torch.int32)
    if not len(bits) or bits.min() >= 0:  # no sign, the usual case
        return bits
    bits = (scores + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def key_scores(keys: Tensor) -> Tensor:
    """Scores, float32, of int32 ``keys`` made by `score_keys`."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)


def empty_histogram(columns: int, device: torch.device) -> Histogram:
    """Histogram without pixels, of cells of ``columns`` numbers, 1 or more."""
    return _zeros(torch.empty(0, columns + 1, dtype=torch.int64, device=device))


def add_pixels(histogram: Histogram, parts: Sequence[Pixels]) -> Histogram:
    """Add pixels; the given histogram is used up.

    Args:
        histogram: What was added before.
        parts: Pixels to add, on the histogram's device.

    Returns:
        The histogram of all. Cost: about half a millisecond for 65,536 pixels on one core; 34 MB are rewritten
        when a bucket is new, so it is best called with millions of pixels.

    Raises:
        UserError: If there are more than 4 million regions, whose weights int64 could not sum.
    """
    pieces = [piece for part in parts for piece in _pieces(part)]
    histogram = _add(histogram, pieces)
    if any(part.areas is not None for part in parts):
        _check_weights(histogram.weights)
    return histogram


def _add(histogram: Histogram, pieces: Sequence[Pixels]) -> Histogram:
    starts: dict[Cell, Tensor] = {}
    for number, (cell, scores, areas) in enumerate(pieces):
        keys = score_keys(scores)
        upper, lower = (keys >> 16) + 2**15, keys & 0xFFFF
        if cell not in starts:
            starts[cell] = _first_bins(histogram, cell)
        first = starts[cell].index_select(0, upper)
        if len(first) and bool(first.min() < 0):
            histogram = _grow(histogram, _met(pieces[number:]))
            starts = {cell: _first_bins(histogram, cell)}
            first = starts[cell].index_select(0, upper)
        bins = first + (lower >> (16 - histogram.bits))
        histogram.lowest.scatter_reduce_(0, bins, 2**16 - lower, "amax")
        histogram.highest.scatter_reduce_(0, bins, lower + 1, "amax")
        _count(histogram.nominal if areas is None else histogram.anomalous, bins)
        if areas is not None:
            histogram.weights.scatter_add_(0, bins, (UNIT + areas.long() // 2) // areas.long())
    return histogram


def pack(histogram: Histogram) -> Tensor:
    """Rows of the populated bins, ``(n, C + 7)``, int64, to send to other processes.

    Columns: cell, upper 16 bits, first lower 16 bits of the bin, and the five counts of `Histogram`.
    """
    filled = histogram.highest.nonzero().flatten()
    position = (filled & (2**histogram.bits - 1)) << (16 - histogram.bits)
    counts = [column[filled].long() for column in histogram[1:]]
    return torch.cat(
        [histogram.buckets[filled >> histogram.bits], torch.stack([position, *counts], dim=1)],
        dim=1,
    )


def unpack(rows: Tensor) -> Histogram:
    """Histogram of the `pack`-ed rows of one or several histograms, in any order."""
    buckets, place = torch.unique(rows[:, :-6], dim=0, return_inverse=True)
    _check_weights(rows[:, -3])
    merged = _zeros(buckets)
    bins = (place << merged.bits) + (rows[:, -6] >> (16 - merged.bits))
    for column, values in zip(merged[1:4], rows[:, -5:-2].unbind(1), strict=True):
        column.scatter_add_(0, bins, values)
    for column, values in zip(merged[4:], rows[:, -2:].int().unbind(1), strict=True):
        column.scatter_reduce_(0, bins, values, "amax")
    return merged


class Bins(NamedTuple):
    """Populated bins of one cell by ascending key: as `Histogram`, and nominal pixels below each bin ``(n + 1,)``."""

    keys: Tensor
    below: Tensor
    anomalous: Tensor
    weights: Tensor
    lowest: Tensor
    highest: Tensor


def cell_bins(histogram: Histogram) -> dict[Cell, Bins]:
    """Split a histogram by cell, on the CPU; ``anomalous`` and ``weights`` are empty where a cell has none."""
    histogram = Histogram(*(column.cpu() for column in histogram))
    bits = histogram.bits
    cells, sizes = torch.unique_consecutive(histogram.buckets[:, :-1], dim=0, return_counts=True)
    result, start = {}, 0
    for cell, size in zip(cells.tolist(), sizes.tolist(), strict=True):
        filled = histogram.highest[start << bits : start + size << bits].nonzero().flatten() + (start << bits)
        keys = (histogram.buckets[:, -1][filled >> bits] << 16) + ((filled & (2**bits - 1)) << (16 - bits))
        nominal, anomalous, weights, lowest, highest = (column[filled] for column in histogram[1:])
        if not anomalous.any():
            anomalous = weights = anomalous[:0].clone()
        below = torch.cat([nominal.new_zeros(1), nominal.cumsum(0)])
        result[tuple(cell)] = Bins(keys, below, anomalous, weights, lowest, highest)
        start += size
    return result


def binned_curve(cells: Iterable[Bins]) -> Curve:
    """Curve of the pixels of several cells together.

    Returns:
        One row for each bin that holds anomalous pixels; ``mixed`` where it holds more than one distinct score,
        nominal ones counted too; weights in units of 2^-40.
    """
    cells = list(cells)
    found = [(cell, cell.anomalous.nonzero().flatten()) for cell in cells]
    empty = torch.empty(0, dtype=torch.int64)
    keys, row = torch.unique(torch.cat([empty, *(cell.keys[at] for cell, at in found)]), return_inverse=True)
    anomalous, weights, above, at_least = (torch.zeros_like(keys) for _ in range(4))
    anomalous.index_add_(0, row, torch.cat([empty, *(cell.anomalous[at] for cell, at in found)]))
    weights.index_add_(0, row, torch.cat([empty, *(cell.weights[at] for cell, at in found)]))
    lowest, highest = torch.zeros_like(keys), torch.zeros_like(keys)
    for cell in cells:
        at = torch.searchsorted(cell.keys, keys)
        here = at.clamp(max=max(len(cell.keys) - 1, 0))
        same = cell.keys[here] == keys
        above += cell.below[-1] - cell.below[at + same]
        at_least += cell.below[-1] - cell.below[at]
        lowest = torch.maximum(lowest, cell.lowest[here] * same)
        highest = torch.maximum(highest, cell.highest[here] * same)
    scores = key_scores(((keys & ~0xFFFF) + 2**16 - lowest - 2**31).int())
    mixed = lowest + highest != 2**16 + 1
    nominal = sum(int(cell.below[-1]) for cell in cells)
    return descending(scores, anomalous, weights, above, at_least, mixed, nominal)


def _zeros(buckets: Tensor) -> Histogram:
    size, device = max(BINS, len(buckets)), buckets.device
    counts = [torch.zeros(size, dtype=torch.int64, device=device) for _ in range(3)]
    ends = [torch.zeros(size, dtype=torch.int32, device=device) for _ in range(2)]
    return Histogram(buckets, *counts, *ends)


def _grow(histogram: Histogram, met: Tensor) -> Histogram:
    """Make room for the buckets ``met``, with coarser bins where the budget asks for it; in place."""
    buckets, place = torch.unique(torch.cat([histogram.buckets, met]), dim=0, return_inverse=True)
    old, place = len(histogram.buckets), place[: len(histogram.buckets)]
    grown = Histogram(buckets, *histogram[1:]) if len(buckets) <= len(histogram.nominal) else _zeros(buckets)
    if old:
        for index, (before, after) in enumerate(zip(histogram[1:], grown[1:], strict=True)):
            finer = before[: old << histogram.bits].view(old, 2**grown.bits, -1)
            coarser = finer.sum(2) if index < 3 else finer.amax(2)
            after.zero_()
            after[: len(buckets) << grown.bits].view(len(buckets), -1)[place] = coarser
    return grown


def _pieces(part: Pixels) -> Iterator[Pixels]:
    for start in range(0, len(part.scores), PIECE):
        end = start + PIECE
        yield Pixels(part.cell, part.scores[start:end], None if part.areas is None else part.areas[start:end])


def _met(pieces: Sequence[Pixels]) -> Tensor:
    """Buckets of ``pieces``, ``(V, C + 1)``."""
    seen: dict[Cell, Tensor] = {}
    for cell, scores, _ in pieces:
        flags = seen.setdefault(cell, torch.zeros(2**16, dtype=torch.bool, device=scores.device))
        flags.scatter_(0, ((score_keys(scores) >> 16) + 2**15).long(), True)
    rows = []
    for cell, flags in seen.items():
        upper = flags.nonzero()
        rows.append(torch.cat([upper.new_tensor(cell).expand(len(upper), -1), upper], dim=1))
    return torch.cat(rows)


def _count(column: Tensor, bins: Tensor) -> None:
    if column.device.type == "cpu":
        np.add.at(column.numpy(), bins.numpy(), 1)  # half the time of torch's scatter_add_
    else:
        column.scatter_add_(0, bins, torch.ones_like(bins))


def _first_bins(histogram: Histogram, cell: Cell) -> Tensor:
    """First bin of each bucket of ``cell``, ``(2^16,)``, int64, -1 where it has none."""
    own = (histogram.buckets[:, :-1] == histogram.buckets.new_tensor(cell)).all(dim=1).nonzero().flatten()
    first = torch.full((2**16,), -1, dtype=torch.int64, device=own.device)
    first[histogram.buckets[own, -1]] = own << histogram.bits
    return first


def _check_weights(weights: Tensor) -> None:
    if float(weights.double().sum()) > MOST:
        raise UserError(
            f"masks have more than {MOST // UNIT:,} regions, whose weights streaming mode cannot sum; look for noise "
            "in the masks, or use mode='exact'."
        )
