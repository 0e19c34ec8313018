"""Scores of any range, batch after batch -> bins in bounded memory -> a curve with known error.

A float32 score has an integer key of the same order. Its upper 16 bits name a bucket (128 of them span a factor
of two), and every bucket that is met gets ``2^bits`` bins for the lower 16. All buckets share the budget: ``bits``
is the largest number that keeps all bins within `BINS` (`APART` times that where cells have several numbers), at
most 16, where a bin is a single float32. It is a function of the set of buckets met, which only grows, and making
bins coarser adds neighbours up. So the histogram depends on the scores alone: not on their order, their batches or
the number of processes, bit for bit.

Scores within a factor of two get 2^17 bins (300 +- 3 meets 4 buckets); the worst input (every float32 bucket met)
still gets 2^8 bins for each factor of two. Measured bounds: 1e-5 for continuous scores within a factor of two, 7e-5
for a normal distribution around 0. So few bins stay in the processor's cache, which is half of the speed. A bin
remembers whether it met more than one score: one that holds a single value adds no error. Weights of anomalous
pixels, 1 / area of the region, are summed in int64 as multiples of 2^-40.

Everything runs on the scores' device. Next: `state.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pl_patchcore.errors import UserError
from pl_patchcore.metrics.curve import Curve, descending

BINS = 2**17  # 4 MB: 28 bytes a bin
APART = 8  # times as many where many cells share them, each named by several numbers
MIXED = -1  # a bin that holds several scores
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
    """Bins of all cells, ``U`` buckets of ``2^bits`` bins, one after another; the rest of all ``N`` is 0.

    Columns keep their size from the first score to the last: blocks of changing size would leave holes in the
    allocator's memory, several times the histogram in the end.

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


def key_scores(keys: Tensor) -> Tensor:
    """Scores, float32, of int32 ``keys`` made by `score_keys`."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)


def add_pixels(histogram: Histogram, parts: Sequence[Pixels]) -> Histogram:
    """Add pixels; the given histogram is used up.

    Args:
        histogram: What was added before.
        parts: Pixels to add, on the histogram's device.

    Returns:
        The histogram of all. Cost: about a millisecond for 65,536 pixels on one core; all bins are rewritten
        when a bucket is new, so it is best called with millions of pixels.

    Raises:
        UserError: If there are more than 4 million regions, whose weights int64 could not sum.
    """
    pieces = [piece for part in parts for piece in _pieces(part)]
    if not len(histogram.buckets) and pieces:  # the first piece has most buckets: the others need not wait for room
        histogram = _grow(histogram, pieces[:1])
    if late := _add_known(histogram, pieces):
        histogram = _grow(histogram, late)
        _add_known(histogram, late)
    if any(part.areas is not None for part in parts):
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
        column = histogram.nominal if areas is None else histogram.anomalous
        if column.device.type == "cpu":
            np.add.at(column.numpy(), bins.numpy(), 1)  # half the time of torch's scatter_add_
        else:
            column.scatter_add_(0, bins, torch.ones_like(bins))
        if areas is not None:
            histogram.weights.scatter_add_(0, bins, (UNIT + areas.long() // 2) // areas.long())
    return late


def pack(histogram: Histogram) -> Tensor:
    """Rows of the populated bins, ``(n, C + 6)``, int64, to send to other processes.

    Columns: cell, upper 16 bits, first lower 16 bits of the bin, and the columns of `Histogram`.
    """
    filled = histogram.single.nonzero().flatten()
    position = (filled & (2**histogram.bits - 1)) << (16 - histogram.bits)
    columns = torch.stack([position, *(column[filled].long() for column in histogram[1:])], dim=1)
    return torch.cat([histogram.buckets[filled >> histogram.bits], columns], dim=1)


def unpack(rows: Tensor) -> Histogram:
    """Histogram of the `pack`-ed rows of any number of histograms, in any order."""
    buckets, place = torch.unique(rows[:, :-5], dim=0, return_inverse=True)
    _check_weights(rows[:, -2])
    merged = _zeros(buckets)
    bins = (place << merged.bits) + (rows[:, -5] >> (16 - merged.bits))
    for column, values in zip(merged[1:4], rows[:, -4:-1].unbind(1), strict=True):
        column.scatter_add_(0, bins, values)
    mixed = rows[:, -1] == MIXED
    _note(merged.single, bins[~mixed], rows[~mixed, -1].int())
    merged.single[bins[mixed]] = MIXED
    return merged


def binned_curves(histogram: Histogram) -> Callable[[Callable[[Cell], bool]], Curve]:
    """Curves of the pixels of several cells together.

    Returns:
        Function of a condition on cells. Its curve has one row for each bin that holds anomalous pixels of the cells
        chosen; ``mixed`` where it holds more than one distinct score, nominal ones counted too; weights in units of
        2^-40.
    """
    buckets, *columns = (column.cpu() for column in histogram)
    filled = nonzero(columns[-1] != 0)
    bucket, inside = filled >> histogram.bits, filled & (2**histogram.bits - 1)
    keys = (buckets[bucket, -1] << 16) + (inside << (16 - histogram.bits))
    names, sizes = torch.unique_consecutive(buckets[:, :-1], dim=0, return_counts=True)
    starts = torch.searchsorted(filled, sizes.cumsum(0)[:-1] << histogram.bits)  # of all cells but the first
    parts = (column.tensor_split(starts) for column in (keys, *(column[filled] for column in columns)))
    cells = {
        tuple(name): (
            pad(own, (0, 1), value=2**32),
            pad(nominal.cumsum(0), (1, 0)),
            *(pad(column, (0, 1)) for column in rest),
        )
        for name, own, nominal, *rest in zip(names.tolist(), *parts, strict=False)
    }  # by ascending key, and a bin beyond the last

    def curve(chosen: Callable[[Cell], bool]) -> Curve:
        own = [bins for name, bins in cells.items() if chosen(name)]
        met = [keys[nonzero(anomalous > 0)] for keys, _, anomalous, _, _ in own]
        wanted = torch.unique(torch.cat([torch.empty(0, dtype=torch.int64), *met]))
        positive, weight, above, at_least, single = (torch.zeros_like(wanted) for _ in range(5))
        for keys, below, anomalous, weights, singles in own:
            at = torch.searchsorted(keys, wanted)
            same = keys[at] == wanted
            above += below[-1] - below[at + same]
            at_least += below[-1] - below[at]
            positive += anomalous[at] * same
            weight += weights[at] * same
            other = singles[at] * same
            single = torch.where((single == 0) | (other == 0) | (single == other), single | other, MIXED)
        mixed = single == MIXED
        scores = key_scores((torch.where(mixed, wanted, (wanted & ~0xFFFF) + single - 1) - 2**31).int())
        nominal = sum(int(below[-1]) for _, below, *_ in own)
        return descending(scores, positive, weight, above, at_least, mixed, nominal=nominal)

    return curve


def _zeros(buckets: Tensor) -> Histogram:
    """Histogram of these buckets, without pixels."""
    budget = BINS if buckets.shape[1] == 2 else APART * BINS
    size, device = max(budget, len(buckets)), buckets.device
    nominal, anomalous, weights = (torch.zeros(size, dtype=torch.int64, device=device) for _ in range(3))
    return Histogram(buckets, nominal, anomalous, weights, torch.zeros(size, dtype=torch.int32, device=device))


def _grow(histogram: Histogram, pieces: Sequence[Pixels]) -> Histogram:
    """Make room for the buckets of ``pieces``, with coarser bins where the budget asks for it; in place."""
    met: dict[Cell, Tensor] = {}
    for cell, scores, _ in pieces:
        met.setdefault(cell, torch.zeros(2**16, dtype=torch.bool, device=scores.device))
        met[cell].index_fill_(0, (score_keys(scores) >> 16).long() + 2**15, True)
    rows = [histogram.buckets]
    for cell, flags in met.items():
        upper = flags.nonzero()
        rows.append(torch.cat([upper.new_tensor(cell).expand(len(upper), -1), upper], dim=1))
    buckets, place = torch.unique(torch.cat(rows), dim=0, return_inverse=True)
    old, place = len(histogram.buckets), place[: len(histogram.buckets)]
    grown = Histogram(buckets, *histogram[1:]) if len(buckets) <= len(histogram.nominal) else _zeros(buckets)
    if old:
        for before, after in zip(histogram[1:], grown[1:], strict=True):
            finer = before[: old << histogram.bits].view(old, 2**grown.bits, -1)
            coarser = finer.sum(2, dtype=finer.dtype)
            if before is histogram.single:  # the keys of two bins differ
                coarser = torch.where(finer.count_nonzero(2) > 1, MIXED, coarser)
            after.zero_()
            after[: len(buckets) << grown.bits].view(len(buckets), -1)[place] = coarser
    return grown


def _pieces(part: Pixels) -> Iterator[Pixels]:
    for start in range(0, len(part.scores), PIECE):
        end = start + PIECE
        yield Pixels(part.cell, part.scores[start:end], None if part.areas is None else part.areas[start:end])


def _note(single: Tensor, bins: Tensor, keys: Tensor) -> None:
    """Note the keys met in ``bins`` (see `Histogram.single`); one bin may come several times."""
    held = single.index_select(0, bins)
    news = nonzero((held ^ keys) > 0)  # neither equal nor MIXED, whose sign stays
    if len(news):  # few, once most bins are mixed or the scores repeat
        bins, keys, held = (values.index_select(0, news) for values in (bins, keys, held))
        single.scatter_(0, bins, torch.where(held == 0, keys, MIXED))  # of several, any one stays,
        single[bins[single.index_select(0, bins) != keys]] = MIXED  # and the others find it there


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
