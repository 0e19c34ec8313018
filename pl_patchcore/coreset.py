"""Patch features -> the rows kept as memory bank.

Reads projected features ``(N, d)``, returns row indices ``(M,)`` in order of selection; the first ``M'`` of them
are the coreset of size ``M'``, and greedy selection tells how far each of these leaves any row. Next:
`memory_bank.py`.

Greedy selection (Roth et al. 2022, Algorithm 1; Gonzalez 1985) is exact: the same rows in the same order as a
loop that computes every squared distance by float64 differences, rounds it to float32, and gives ties to the
lowest row. `farthest_first.py` computes it, hundreds of picks at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pl_patchcore.errors import UserError
from pl_patchcore.farthest_first import FarthestFirst, distinct_rows
from pl_patchcore.numerics import full_precision

CoresetMethod = Literal["greedy", "approximate", "random", "none"]


def coreset_rows(rows: int, ratio: float, size: int | None) -> int:
    """Number of rows to keep: ``size`` (at most all), or ``max(1, floor(ratio * rows))``.

    Example:
        >>> coreset_rows(784, 0.01, None), coreset_rows(784, 0.01, 1000)
        (7, 784)
    """
    return min(size, rows) if size is not None else max(1, int(ratio * rows))


def random_projection(dimension: int, target: int, seed: int) -> Tensor | None:
    """Gaussian random projection, drawn on the CPU.

    Args:
        dimension: Dimension of the features, D.
        target: Dimension after projection, d.
        seed: Seed of the draw.

    Returns:
        float32 ``(D, d)`` of variance 1 / d (distances keep their expected length), or None where ``D <= d``.
    """
    if dimension <= target:
        return None
    generator = torch.Generator().manual_seed(seed)
    matrix: Tensor = torch.randn(dimension, target, generator=generator) / target**0.5
    return matrix


class Selection(NamedTuple):
    """Rows selected, and how well they cover all rows.

    Args:
        rows: Row indices in order of selection, ``(M,)``, int64.
        radii: Coverage radii, ``(M + 1,)``, float32: the first m rows leave no row farther than ``radii[m]`` from
            the nearest of them; they never increase, and ``radii[0]`` is infinite. None where the order of
            selection doesn't tell.
    """

    rows: Tensor
    radii: Tensor | None = None


def select_coreset(
    features: Tensor,
    size: int,
    method: CoresetMethod = "greedy",
    *,
    seed: int = 0,
    seconds: float | None = None,
    progress: Callable[[int], object] | None = None,
) -> Selection:
    """Select ``size`` rows of ``features`` by one of the methods.

    Args:
        features: (Projected) patch features, ``(N, d)``, float32 or float64.
        size: Rows to keep, ``1 <= size <= N``; ignored by ``none``.
        method: ``greedy``: farthest point first, from row 0. ``approximate``: the authors' start, gaps are first
            taken as the mean distance to 10 random rows. ``random``: a uniform draw. ``none``: all rows.
        seed: Seed of the random choices.
        seconds: Time after which greedy selection stops with the rows it has, at least one.
        progress: Called with the number of rows selected since the last call.

    Returns:
        Rows in order of selection, on the device of ``features``; radii for ``greedy``.

    Raises:
        UserError: As `greedy_coreset`, or for an unknown method.
    """
    generator = torch.Generator().manual_seed(seed)
    if method == "greedy":
        return greedy_selection(features, size, seconds=seconds, progress=progress)
    if method == "approximate":
        anchors = torch.randperm(len(features), generator=generator)[:10].to(features.device)
        distances = [torch.linalg.vector_norm(features.double() - features[a].double(), dim=1) for a in anchors]
        gaps = torch.stack(distances).mean(0).square()
        return greedy_selection(features, size, gaps=gaps, seconds=seconds, progress=progress)
    if method == "random":
        return Selection(torch.randperm(len(features), generator=generator)[:size].to(features.device))
    if method == "none":
        return Selection(torch.arange(len(features), device=features.device))
    raise UserError(f"coreset_method must be greedy, approximate, random or none, got {method!r}.")


def greedy_coreset(
    features: Tensor,
    size: int,
    *,
    start: int = 0,
    gaps: Tensor | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Select rows that cover ``features``, farthest point first: the rows of `greedy_selection`.

    Example:
        >>> greedy_coreset(torch.tensor([[0.0], [1.0], [2.0], [10.0]]), 3).tolist()
        [0, 3, 2]
    """
    return greedy_selection(features, size, start=start, gaps=gaps, progress=progress).rows


def greedy_selection(
    features: Tensor,
    size: int,
    *,
    start: int = 0,
    gaps: Tensor | None = None,
    seconds: float | None = None,
    progress: Callable[[int], object] | None = None,
) -> Selection:
    """Select rows that cover ``features``, farthest point first, and tell how well they do.

    Each pick is the row with the largest distance to the rows already picked; ties go to the lowest row, and no
    row is picked twice. The coverage radius of the first m rows is at most twice that of the best m rows there
    are (Gonzalez 1985).

    Args:
        features: (Projected) patch features, ``(N, d)``, float32 or float64, any finite scale.
        size: Rows to keep, ``1 <= size <= N``.
        start: Row picked first.
        gaps: Squared distances ``(N,)`` to start from in place of a first row; there are no radii then.
        seconds: Time after which selection stops with the rows it has, at least one. None takes its time.
        progress: Called with the number of rows selected since the last call.

    Returns:
        Rows in order of selection, on the input's device, ``size`` of them unless time was up.

    Raises:
        UserError: If ``features`` is not 2-D or not finite, or ``size`` or ``start`` is out of range.

    Example:
        >>> rows, radii = greedy_selection(torch.tensor([[0.0], [1.0], [2.0], [10.0]]), 3)
        >>> rows.tolist(), radii.tolist()
        ([0, 3, 2], [inf, 10.0, 2.0, 1.0])
    """
    if features.ndim != 2 or not len(features):
        raise UserError(f"features must be (N, d) with N >= 1, got shape {tuple(features.shape)}.")
    if not 1 <= size <= len(features):
        raise UserError(f"size must be from 1 to the number of rows, {len(features)}, got {size}.")
    if not 0 <= start < len(features):
        raise UserError(f"start must be a row from 0 to {len(features) - 1}, got {start}.")
    largest = torch.stack(torch.aminmax(features)).abs().max()  # NaN if any is
    if not torch.isfinite(largest):
        raise UserError("features hold NaN or infinity; look for a broken image or an overflow in half precision.")
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    with full_precision(features.device):
        rows = distinct_rows(features, start)
        scale = float(torch.ldexp(torch.ones((), dtype=torch.float64), -torch.frexp(largest.double().cpu())[1]))
        search = FarthestFirst(features, rows, scale, min(size + 1, len(rows)))  # one more, for its gap
        search.begin(start, gaps)
        finished = search.run(deadline, size, progress)
    picks = rows[search.picks[: search.count]]
    return selection_of(picks, len(features), size, finished, None if gaps is not None else search.gaps, scale)


def selection_of(
    picks: Tensor, total: int, size: int, finished: bool, gaps: list[Tensor] | None, scale: float
) -> Selection:
    """What a search of one pick more than ``size`` found; ``gaps`` of its picks, None where they tell no radii."""
    if finished and len(picks) < size:  # every gap is 0: the lowest rows not yet picked
        left = torch.ones(total, dtype=torch.bool, device=picks.device)
        left[picks] = False
        picks = torch.cat([picks, left.nonzero().flatten()[: size - len(picks)]])
    elif len(picks) <= size and not finished:
        picks = picks[:-1]  # the last one's gap tells of those before it
    picks = picks[:size]
    if gaps is None:
        return Selection(picks)
    gap = torch.cat(gaps)
    radii = torch.zeros(len(picks) + 1)
    radii[: len(gap)] = (gap.double().sqrt() / scale).float()[: len(radii)]
    return Selection(picks, radii)
