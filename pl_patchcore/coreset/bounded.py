"""Greedy selection with a bound on memory: within chunks, then among the rows that these kept.

Call the radius of a selection the largest distance of any row to the nearest selected one, and OPT the least radius
that any M points of the space can give. Greedy selection of M rows out of a set has a radius of at most twice the set's
OPT (Gonzalez 1985), and OPT of a part is at most OPT of the whole. Now M rows are picked in each chunk (radius at most
r_c, the largest of the chunks'), then M among these (radius r_u). A row has a pick of its chunk within r_c, and that
one a final pick within r_u:

    radius <= r_c + r_u <= 2 OPT + 2 OPT = 4 OPT

where exact greedy selection has 2 OPT. r_c + r_u is known when done, and returned. (Two rounds of greedy selection as
a 4-approximation: Malkomes et al., "Fast distributed k-center clustering with outliers on massive data", 2015.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pl_patchcore.coreset import greedy_selection
from pl_patchcore.coreset.farthest_first import Progress
from pl_patchcore.errors import UserError


def least_chunk_size(rows: int, size: int) -> int:
    """Fewest rows in memory with which ``size`` of ``rows`` can be selected in two rounds, about sqrt(N M).

    Example:
        >>> least_chunk_size(1_000_000, 10_000), least_chunk_size(100, 50)
        (100000, 100)
    """
    most = math.isqrt(rows // size) + 1  # more chunks hold fewer rows each, but keep more together
    return min(max(-(-rows // chunks), min(rows, chunks * size)) for chunks in range(1, most + 1))


def bounded_coreset(
    read: Callable[[Tensor], Tensor], rows: int, size: int, chunk_size: int, progress: Progress | None = None
) -> tuple[Tensor, float]:
    """Select rows that cover a set of which only a part fits in memory.

    Args:
        read: From ascending row indices, int64 ``(n,)``, to (projected) features ``(n, d)``; each row is read once,
            those that chunks keep twice.
        rows: Rows of the set, N.
        size: Rows to keep, M, ``1 <= size <= rows``.
        chunk_size: Rows read at once, at least `least_chunk_size`, else a `UserError`.
        progress: Called with the number of rows selected since the last call, in all rounds.

    Returns:
        Row indices in order of selection, int64 ``(M,)``, on the device of what ``read`` returns, and a bound of the
        radius, in the unit of the features (up to float32 rounding).

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [10.0], [11.0], [20.0], [21.0]])
        >>> picks, bound = bounded_coreset(lambda rows: points[rows], 6, 2, chunk_size=4)
        >>> picks.tolist(), bound  # the radius is 10, the best possible 5.5
        ([0, 5], 11.0)
    """
    least = least_chunk_size(rows, size)
    if chunk_size < least:
        raise UserError(
            f"selecting {size} of {rows} rows needs at least {least} of them in memory at once, got {chunk_size}; "
            "raise store.selection_memory or lower coreset_size."
        )
    count, kept, radius = -(-rows // chunk_size), torch.arange(rows), 0.0
    if count > 1:
        parts = []
        for chunk in kept.tensor_split([i * rows // count for i in range(1, count)]):
            picks, own_radius = _select(read(chunk), min(size, len(chunk)), progress)
            parts.append(chunk[picks.cpu()])
            radius = max(radius, own_radius)
        kept = torch.cat(parts).sort().values  # ascending, so that ties go to the lowest row
    picks, own_radius = _select(read(kept), size, progress)
    return kept.to(picks.device)[picks], radius + own_radius


def _select(features: Tensor, size: int, progress: Progress | None) -> tuple[Tensor, float]:
    picks, radii = greedy_selection(features, size, progress=progress)
    return picks, 0.0 if radii is None else float(radii[-1])
