"""Patch features -> the rows kept as memory bank.

The greedy loop itself (Roth et al. 2022, Algorithm 1; Gonzalez 1985) is in `farthest_first.py`. It is exact: the same
rows in the same order as a loop that computes every squared distance by float64 differences, rounds it to float32, and
gives ties to the lowest row; `distance_bounds.py` lets it skip most of them.

Reads projected features ``(N, d)``, returns row indices ``(M,)`` in order of selection. The first M' of them are the
coreset of size M', and greedy selection tells how far each of these leaves any row. `bounded.py` selects where memory
is too small, `shared.py` where several processes hold the rows. `collection.py` collects the rows, in `store.py`, as
`plan.py` says. Next: `memory_bank.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from pl_patchcore.coreset.farthest_first import FarthestFirst, Progress, Selection
from pl_patchcore.errors import UserError
from pl_patchcore.numerics import full_precision

__all__ = ["CoresetMethod", "CoresetOptions", "Selection", "greedy_coreset", "greedy_selection", "select_coreset"]

CoresetMethod = Literal["greedy", "approximate", "random", "none"]


@dataclass(frozen=True)
class CoresetOptions:
    """Which rows are kept: `PatchCore`'s arguments ``coreset_method``, ``coreset_ratio`` and so on.

    Args:
        method: See `select_coreset`.
        ratio: Share of the rows kept, in (0, 1].
        size: Number of rows kept, in place of ``ratio``.
        projection_dim: Dimension after random projection; features of no more dimensions are not projected.
        seed: Seed of projection and selection.

    Raises:
        UserError: For a value that is out of range.
    """

    method: CoresetMethod = "greedy"
    ratio: float = 0.1
    size: int | None = None
    projection_dim: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(CoresetMethod):
            raise UserError(f"coreset_method must be greedy, approximate, random or none, got {self.method!r}.")
        if not 0 < self.ratio <= 1:
            raise UserError(f"coreset_ratio must be in (0, 1], got {self.ratio}; 0.1 keeps one patch in ten.")
        if self.size is not None and self.size < 1:
            raise UserError(f"coreset_size must be at least 1, got {self.size}; leave it out to use coreset_ratio.")
        if self.projection_dim < 1:
            raise UserError(f"projection_dim must be at least 1, got {self.projection_dim}.")

    @property
    def reads_features(self) -> bool:
        """Whether the selection reads (projected) features."""
        return self.method in ("greedy", "approximate")


def coreset_rows(rows: int, ratio: float, size: int | None) -> int:
    """Number of rows to keep: ``size`` (at most all), or ``max(1, floor(ratio * rows))``.

    Example:
        >>> coreset_rows(784, 0.01, None), coreset_rows(784, 0.01, 1000)
        (7, 784)
    """
    return min(size, rows) if size is not None else max(1, int(ratio * rows))


def random_projection(dimension: int, target: int, seed: int) -> Tensor | None:
    """Gaussian random projection from D = ``dimension`` to d = ``target``, drawn on the CPU with this seed.

    Returns:
        float32 ``(D, d)`` of variance 1 / d (distances keep their expected length), or None where ``D <= d``.
    """
    if dimension <= target:
        return None
    generator = torch.Generator().manual_seed(seed)
    matrix: Tensor = torch.randn(dimension, target, generator=generator, dtype=torch.float32) / target**0.5
    return matrix


def select_coreset(
    features: Tensor, size: int, method: CoresetMethod = "greedy", *, seed: int = 0, progress: Progress | None = None
) -> Selection:
    """Select ``size`` rows of ``features`` by one of the methods.

    Args:
        features: (Projected) patch features, ``(N, d)``, float32 or float64.
        size: Rows to keep, ``1 <= size <= N``; ignored by ``none``.
        method: ``greedy``: farthest point first, from row 0. ``approximate``: the authors' start, gaps are first
            taken as the mean distance to 10 random rows. ``random``: a uniform draw. ``none``: all rows.
        seed: Seed of the random choices.
        progress: Called with the number of rows selected since the last call.

    Returns:
        Rows in order of selection, on the device of ``features``; radii for ``greedy``.

    Raises:
        UserError: As `greedy_selection`, or for an unknown method.
    """
    CoresetOptions(method)  # refuses one that is unknown
    if method == "none":
        return Selection(torch.arange(len(features), device=features.device))
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)
    if method == "random":
        return Selection(order[:size])
    gaps = mean_gaps(features, features[order[:10]]) if method == "approximate" else None
    return greedy_selection(features, size, gaps=gaps, progress=progress)


def mean_gaps(features: Tensor, anchors: Tensor) -> Tensor:
    """Square of the mean distance of each row to the anchors, float64 ``(N,)``."""
    distances = [torch.linalg.vector_norm(features.double() - anchor.double(), dim=1) for anchor in anchors]
    return torch.stack(distances).mean(0).square()


def greedy_coreset(features: Tensor, size: int, *, progress: Progress | None = None) -> Tensor:
    """Select rows that cover ``features``, farthest point first: the rows of `greedy_selection`.

    Example:
        >>> greedy_coreset(torch.tensor([[0.0], [1.0], [2.0], [10.0]]), 3).tolist()
        [0, 3, 2]
    """
    return greedy_selection(features, size, progress=progress).rows


def greedy_selection(
    features: Tensor, size: int, *, gaps: Tensor | None = None, progress: Progress | None = None
) -> Selection:
    """Select rows that cover ``features``, farthest point first, and tell how well they do.

    Row 0 comes first, then the row with the largest distance to the rows already picked, and so on; ties go to the
    lowest row, and no row is picked twice. The coverage radius of the first m rows is at most twice that of the best m
    rows there are (Gonzalez 1985).

    Args:
        features: (Projected) patch features, ``(N, d)``, float32 or float64, any finite scale.
        size: Rows to keep, ``1 <= size <= N``.
        gaps: Squared distances ``(N,)`` to begin with in place of a first row; there are no radii then.
        progress: Called with the number of rows selected since the last call.

    Returns:
        ``size`` rows in order of selection, on the input's device, and their radii, on the CPU.

    Raises:
        UserError: If ``features`` is not 2-D or not finite, or ``size`` is out of range.

    Example:
        >>> rows, radii = greedy_selection(torch.tensor([[0.0], [1.0], [2.0], [10.0]]), 3)
        >>> rows.tolist(), radii.tolist()
        ([0, 3, 2], [inf, 10.0, 2.0, 1.0])
    """
    if features.ndim != 2 or not len(features):
        raise UserError(f"features must be (N, d) with N >= 1, got shape {tuple(features.shape)}.")
    if not 1 <= size <= len(features):
        raise UserError(f"size must be from 1 to the number of rows, {len(features)}, got {size}.")
    with full_precision(features.device):
        return FarthestFirst(features, size).select(gaps, progress)
