"""Scores of any range, batch after batch -> bins in bounded memory -> a curve with known error.

A float32 score has an integer key of the same order. Its upper 16 bits name a bucket (128 of them span a factor
of two), and every bucket that is met gets ``2^bits`` bins for the lower 16. All buckets share the budget: ``bits``
is the largest number that keeps all bins within `BINS` (`APART` times that where cells have several numbers), at
most 16, where a bin is a single float32. So the histogram depends on the scores alone: not on their order, their
batches or the number of processes, bit for bit.

Measured bounds: 1e-5 for continuous scores within a factor of two, 7e-5 for a normal distribution around 0. A bin that
holds a single value adds no error. Weights of anomalous pixels, 1 / area of the region, are summed in int64. Bins are
filled on the scores' device, and read on the CPU. Next: `state.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pl_patchcore.errors import UserError
from pl_patchcore.metrics.curve import Cell, Chosen, Column, Curve, Curves, descending

BINS = 2**17  # 4 MB: 28 bytes a bin
APART = 8  # times as many where many cells share them, each named by several numbers
MIXED = -1  # a bin that holds several scores
UNIT = 2**40  # fixed point of the weights
MOST = 2**62  # sum of weights that int64 holds with room to spare: 4 million regions
PIECE = 2**16  # pixels handled at once: their temporaries stay in the processor's cache


class Pixels(NamedTuple):
    """Scores of one cell ``(n,)``, float32; with areas ``(n,)`` they are anomalous, with none ``(0,)`` nominal."""

    cell: Cell
    scores: Tensor
    areas: Tensor = torch.empty(0, dtype=torch.int32)


class Histogram(NamedTuple):
    """Bins of all cells, ``U`` buckets of ``2^bits`` bins, one after another; the rest of all ``N`` is 0.

    Columns keep one size: blocks of changing size would leave holes in the allocator's memory.

    Attributes:
        buckets: Cell and upper 16 bits of the key (its sign flipped), ``(U, C + 1)``, int64, rows ascending.
        nominal: Number of nominal pixels in each bin, ``(N,)``, int64.
        anomalous: Number of anomalous pixels, ``(N,)``, int64.
        weights: Sum of their weights, units of 2^-40, ``(N,)``, int64.
        single: 1 + lower 16 bits of the one key met, 0 in empty bins, `MIXED` where keys differ, ``(N,)``, int32.
    """

    buckets: Tensor
    nominal: Tensor
    anomalous: Tensor
    weights: Tensor
    single: Tensor

    @property
    def bits(self) -> int:
        """Binary logarithm of the number of bins in a bucket."""
        return max(0, min(16, (len(self.nominal) // max(1, len(self.buckets))).bit_length() - 1))


def zeros(buckets: Tensor, size: int = 0) -> Histogram:
    """Histogram of these buckets, without pixels, with room for ``size`` bins."""
    kinds = torch.int64, torch.int64, torch.int64, torch.int32
    return Histogram(buckets, *(torch.zeros(size, dtype=kind, device=buckets.device) for kind in kinds))


def nonzero(flags: Tensor) -> Tensor:
    """Indices of the true ``flags`` ``(n,)``; on the CPU by NumPy, which is several times faster."""
    on_cpu = flags.device.type == "cpu"
    return torch.from_numpy(np.flatnonzero(flags.numpy())) if on_cpu else flags.nonzero().flatten()


def select(values: Tensor, chosen: Tensor) -> Tensor:
    """``values[chosen]``, a copy; on the CPU by NumPy, which is several times faster."""
    on_cpu = values.device.type == "cpu"
    return torch.from_numpy(values.numpy()[chosen.numpy()]) if on_cpu else values[chosen]


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


def key_scores(keys: Column) -> Column:
    """Scores, float32, of int32 ``keys`` made by `score_keys`."""
    bits: Column = keys ^ ((keys >> 31) & 0x7FFFFFFF)
    return bits.view(np.float32)


def add_pixels(histogram: Histogram, parts: Sequence[Pixels]) -> Histogram:
    """Add pixels, on the histogram's device; the given histogram is used up.

    Cost: about a millisecond for 65,536 pixels on one core; all bins are rewritten when a bucket is new, so it is best
    called with millions of pixels. More than 4 million regions are a `UserError`: int64 could not sum their weights.
    """
    pieces = [
        Pixels(part.cell, part.scores[start : start + PIECE], part.areas[start : start + PIECE])
        for part in parts
        for start in range(0, len(part.scores), PIECE)
    ]
    while pieces := _add_known(histogram, pieces):
        cells = {piece.cell for piece in pieces}
        met = [_buckets(cell, torch.cat([piece.scores for piece in pieces if piece.cell == cell])) for cell in cells]
        histogram = merge([histogram, zeros(torch.cat(met))])
    _check_weights(histogram.weights)
    return histogram


def _add_known(histogram: Histogram, pieces: Sequence[Pixels]) -> list[Pixels]:
    """Add ``pieces`` in place; returns those, left out, that have a new bucket: rare after the first."""
    first = {cell: _first_bins(histogram, cell) for cell in {piece.cell for piece in pieces}}
    late = []
    for piece in pieces:
        cell, scores, areas = piece
        keys = score_keys(scores)
        bins = first[cell].index_select(0, (keys >> 16) + 2**15)
        if bool(bins.min() < 0):
            late.append(piece)
            continue
        lower = keys & 0xFFFF
        bins += lower >> (16 - histogram.bits)
        _note(histogram.single, bins, lower + 1)
        column = histogram.anomalous if len(areas) else histogram.nominal
        if column.device.type == "cpu":
            np.add.at(column.numpy(), bins.numpy(), 1)  # half the time of torch's scatter_add_
        else:
            column.scatter_add_(0, bins, torch.ones_like(bins))
        if len(areas):
            histogram.weights.scatter_add_(0, bins, (UNIT + areas.long() // 2) // areas.long())
    return late


def _first_bins(histogram: Histogram, cell: Cell) -> Tensor:
    """First bin of each bucket of ``cell``, ``(2^16,)``, int64, -1 where it has none."""
    own = (histogram.buckets[:, :-1] == histogram.buckets.new_tensor(cell)).all(dim=1).nonzero().flatten()
    first = torch.full((2**16,), -1, dtype=torch.int64, device=own.device)
    first[histogram.buckets[own, -1]] = own << histogram.bits
    return first


def _note(single: Tensor, bins: Tensor, keys: Tensor) -> None:
    """Note the keys met in ``bins`` (see `Histogram.single`); one bin may come several times."""
    held = single.index_select(0, bins)
    news = nonzero((held ^ keys) > 0)  # neither equal nor MIXED, whose sign stays
    if len(news):  # few, once most bins are mixed or the scores repeat
        bins, keys, held = (values.index_select(0, news) for values in (bins, keys, held))
        single.scatter_(0, bins, torch.where(held == 0, keys, MIXED))  # of several, any one stays,
        single[bins[single.index_select(0, bins) != keys]] = MIXED  # and the others find it there


def _buckets(cell: Cell, scores: Tensor) -> Tensor:
    """Rows of `Histogram.buckets` that the scores need."""
    upper = torch.bincount((score_keys(scores) >> 16) + 2**15).nonzero()
    return torch.cat([upper.new_tensor(cell).expand(len(upper), -1), upper], dim=1)


def merge(histograms: Sequence[Histogram]) -> Histogram:
    """Histogram of all buckets and pixels in several, with bins as coarse as the budget asks for."""
    _check_weights(*(histogram.weights for histogram in histograms))
    rows = torch.cat([histogram.buckets for histogram in histograms])
    buckets, place = torch.unique(rows, dim=0, return_inverse=True)
    budget = BINS if buckets.shape[1] == 2 else APART * BINS
    merged = zeros(buckets, max(budget, len(buckets)))
    for histogram in histograms:
        own, place = place[: len(histogram.buckets)], place[len(histogram.buckets) :]
        if not len(own) or not len(histogram.nominal):
            continue
        for before, after in zip(histogram[1:], merged[1:], strict=True):
            finer = before[: len(own) << histogram.bits].view(len(own), 2**merged.bits, -1)
            added = finer.sum(2, dtype=finer.dtype)
            bins = after[: len(buckets) << merged.bits].view(len(buckets), -1)  # a view
            if after is merged.single:  # the keys of two bins differ
                added, held = torch.where(finer.count_nonzero(2) > 1, MIXED, added), bins[own]
                bins[own] = torch.where((held == 0) | (added == 0) | (held == added), held | added, MIXED)
            else:
                bins[own] += added
    return merged


def _check_weights(*weights: Tensor) -> None:
    if sum(float(each.double().sum()) for each in weights) > MOST:
        raise UserError(
            f"masks have more than {MOST // UNIT:,} regions, whose weights streaming mode cannot sum; look for noise "
            "in the masks, or use mode='exact'."
        )


def binned_curves(histogram: Histogram) -> Curves:
    """Curves with a row for each bin of anomalous pixels, ``mixed`` where it holds several scores of any pixels."""
    cells, cell = torch.unique(histogram.buckets[:, :-1], dim=0, return_inverse=True)
    names, cell_of, upper = [tuple(name) for name in cells.tolist()], cell.cpu().numpy(), histogram.buckets[:, -1].cpu()
    columns = [column.cpu().numpy() for column in histogram[1:]]
    filled = np.flatnonzero(columns[-1])
    bucket, inside = filled >> histogram.bits, filled & (2**histogram.bits - 1)
    keys = (upper.numpy()[bucket] << 16) + (inside << (16 - histogram.bits))

    def curve(chosen: Chosen) -> Curve:
        own = np.flatnonzero(np.array([chosen(name) for name in names], bool)[cell_of[bucket]])
        own = own[keys[own].argsort(kind="stable")]
        key, starts = np.unique(keys[own], return_index=True)  # bins of one key, of several cells, side by side
        nominal, anomalous, weights = (np.add.reduceat(column[filled[own]], starts) for column in columns[:3])
        single = columns[3][filled[own]]
        least, most = np.minimum.reduceat(single, starts), np.maximum.reduceat(single, starts)
        mixed = (least != most) | (most == MIXED)
        scores = key_scores((np.where(mixed, key, (key & ~0xFFFF) + most - 1) - 2**31).astype(np.int32))
        covered, total = nominal.cumsum(), int(nominal.sum())
        rows = scores, anomalous, weights, total - covered, total - covered + nominal, mixed
        return descending(total, *(column[anomalous > 0] for column in rows))

    return curve
