"""Greedy selection with a bound on memory: within chunks, then among what they kept.

Reads projected features ``(N, d)`` some rows at a time, returns row indices ``(M,)`` in order of selection, as
`coreset.py` does, which it calls. Next: `memory_bank.py`.

**What it guarantees.** Call the radius of a selection the largest distance of any row to the nearest selected one,
and OPT the least radius any M points of the space can give. Greedy selection of M rows out of a set has a radius r
of at most twice the set's OPT: its M picks and the row farthest from them are M + 1 rows at pairwise distances of r
or more, two of them share the nearest of the M best points, so one of those two is r / 2 or more away from it
(Gonzalez 1985). OPT of a part is at most OPT of the whole, since the same points serve both. Now M rows are picked in
each chunk (radius at most r_c, the largest of the chunks'), then M among these (radius r_u). A row has a pick of its
chunk within r_c, and that one a final pick within r_u:

    radius <= r_c + r_u <= 2 OPT + 2 OPT = 4 OPT

where exact greedy selection has 2 OPT. r_c + r_u is known when done, and returned. (Two rounds of greedy selection as
a 4-approximation: Malkomes et al., "Fast distributed k-center clustering with outliers on massive data", 2015.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pl_patchcore.coreset import greedy_coreset
from pl_patchcore.errors import UserError


def least_at_once(rows: int, size: int) -> int:
    """Fewest rows in memory with which ``size`` of ``rows`` can be selected in two rounds, about sqrt(N M).

    Example:
        >>> least_at_once(1_000_000, 10_000), least_at_once(100, 50)
        (100000, 100)
    """
    most = math.isqrt(rows // size) + 1  # more chunks hold fewer rows each, but keep more together
    return min(max(-(-rows // chunks), min(rows, chunks * size)) for chunks in range(1, most + 1))


def bounded_coreset(
    read: Callable[[Tensor], Tensor],
    rows: int,
    size: int,
    at_once: int,
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, float]:
    """Select rows that cover a set of which only a part fits in memory.

    Args:
        read: From ascending row indices, int64 ``(n,)``, to (projected) features ``(n, d)``; each row is read once,
            those that chunks keep twice.
        rows: Rows of the set, N.
        size: Rows to keep, M, ``1 <= size <= rows``.
        at_once: Rows read at once, at least `least_at_once`; as many as ``rows`` select exactly.
        progress: Called with the number of rows selected since the last call, ``selections(...)`` in all.

    Returns:
        Row indices in order of selection, int64 ``(M,)``, on the device of what ``read`` returns, and a bound of the
        radius, in the unit of the features: no row is farther from the nearest selected one (up to float32 rounding).
        If all rows are read at once, this is the radius itself.

    Raises:
        UserError: As `greedy_coreset`, or if ``at_once`` is too few.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [10.0], [11.0], [20.0], [21.0]])
        >>> picks, bound = bounded_coreset(lambda rows: points[rows], 6, 2, at_once=4)
        >>> picks.tolist(), bound  # the radius is 10, the best possible 5.5
        ([0, 5], 11.0)
    """
    if at_once < least_at_once(rows, size):
        raise UserError(
            f"selecting {size} of {rows} rows needs at least {least_at_once(rows, size)} of them in memory at once, "
            f"got {at_once}; raise selection_memory or lower coreset_size."
        )
    if rows <= at_once:
        return _select(read(torch.arange(rows)), size, progress)
    kept, radius = [], 0.0
    for start, stop in _chunks(rows, at_once):
        chunk = torch.arange(start, stop)
        picks, gap = _select(read(chunk), min(size, len(chunk)), progress)
        kept.append(chunk[picks.cpu()])
        radius = max(radius, gap)
    union = torch.cat(kept).sort().values  # ascending, so that ties go to the lowest row
    picks, gap = _select(read(union), size, progress)
    return union.to(picks.device)[picks], radius + gap


def selections(rows: int, size: int, at_once: int) -> int:
    """Rows that `bounded_coreset` selects in all its rounds."""
    if rows <= at_once:
        return min(size + 1, rows)
    parts = [stop - start for start, stop in _chunks(rows, at_once)]
    union = sum(min(size, n) for n in parts)
    return sum(min(size + 1, n) for n in parts) + min(size + 1, union)


def _chunks(rows: int, at_once: int) -> Iterator[tuple[int, int]]:
    """First row and the one behind the last of the fewest chunks, of like sizes."""
    count = -(-rows // at_once)
    edges = [i * rows // count for i in range(count + 1)]
    return itertools.pairwise(edges)


def _select(features: Tensor, size: int, progress: Callable[[int], object] | None) -> tuple[Tensor, float]:
    """Greedy picks, and their radius: the next pick's distance to them, since it is the farthest row."""
    picks = greedy_coreset(features, min(size + 1, len(features)), progress=progress)
    if len(picks) <= size:
        return picks, 0.0
    last = features[picks[-1]].double()
    gaps = [torch.linalg.vector_norm(features[p].double() - last, dim=1).min() for p in picks[:-1].split(1 << 16)]
    return picks[:-1], float(torch.stack(gaps).min())
