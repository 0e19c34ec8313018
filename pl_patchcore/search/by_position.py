"""Search among the rows of a bank whose patches lay near a query's place: exact, for parts that are always aligned.

A row is in reach of a query if its patch lay at most ``radius`` cells from the query's, down and across. Where fewer
than k rows are in reach, the reach of that place grows, cell by cell, until there are k: no distance is ever infinite.
Next: `memory_bank.py`, which calls it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pl_patchcore.errors import UserError
from pl_patchcore.numerics import k_least, product_margin

_GATHERED = 1 << 20  # float64 numbers gathered at once (8 MiB)
_FLOAT64_TO_FLOAT32 = 2.0**-29  # of their rounding


class Places(NamedTuple):
    """Where queries lie on a grid of patches."""

    at: Tensor  # row and column of each, int64 (Q, 2)
    grid: tuple[int, int]  # patches down and across

    @classmethod
    def of_rows(cls, images: int, top: int, rows: int, grid: tuple[int, int], device: torch.device) -> Places:
        """Those of so many images, of some rows of the grid from ``top`` on, one row after the other."""
        y = torch.arange(top, top + rows, device=device)
        found = torch.cartesian_prod(y, torch.arange(grid[1], device=device)).view(-1, 2)
        return cls(found.repeat(images, 1), grid)


def in_reach(places: Tensor, of_rows: Tensor, radius: int, k: int) -> Tensor:
    """Which rows of a bank are in reach of each place, at least ``k``: bool ``(Q, M)``.

    Args:
        places: Row and column, ``(Q, 2)``.
        of_rows: The same of the bank's rows, ``(M, 2)``.
        radius: Cells.
        k: Rows, at most M.

    Example:
        >>> in_reach(torch.tensor([[0, 0]]), torch.tensor([[1, 1], [0, 2], [5, 0]]), 1, 2).tolist()
        [[True, True, False]]
    """
    far = (places[:, None] - of_rows).abs().amax(2)  # (Q, M), cells
    least = far.topk(k, dim=1, largest=False).values[:, -1:].clamp(min=radius)
    return far <= least


class PositionSearch:
    """Nearest neighbours in a bank ``(M, D)``, finite, among the rows in reach.

    Args:
        features: The bank's rows, ``(M, D)``.
        places: Row and column of each one's patch, ``(M, 2)``.
        grid: Patches down and across of the images that they are from.
        radius: Cells.
    """

    def __init__(self, features: Tensor, places: Tensor, grid: tuple[int, int], radius: int) -> None:
        self.features, self.places, self.grid, self.radius = features, places.long(), grid, radius
        self.margin = product_margin(features.shape[1]) * _FLOAT64_TO_FLOAT32
        cells = self.places[:, 0] * grid[1] + self.places[:, 1]
        self.order = cells.argsort(stable=True)  # rows, place by place, the lowest first
        counts = torch.bincount(cells, minlength=grid[0] * grid[1])
        self.ends = [0, *counts.cumsum(0).tolist()]  # of the rows of each place, in that order

    def __call__(
        self, queries: Tensor, k: int, places: Places, left_out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Distances float32 ``(Q, k)``, ascending, and rows int64 ``(Q, k)``, ties to the lowest.

        Args:
            queries: ``(Q, D)``.
            k: Neighbours, of at least so many rows.
            places: Where the queries lie.
            left_out: Rows that are not there, bool ``(M,)``; None: none.

        Raises:
            UserError: If they lie on another grid than the bank's rows.
        """
        if places.grid != self.grid:
            (h, w), (height, width) = self.grid, places.grid
            raise UserError(
                f"position_radius: the memory bank is of {h}x{w} patches an image, this one has {height}x{width}; "
                "bring images to the size of those of the fit."
            )
        distance = torch.empty(len(queries), k, dtype=torch.float32, device=queries.device)
        found = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        cells = places.at[:, 0] * self.grid[1] + places.at[:, 1]
        order, (cell, counts) = cells.argsort(stable=True), cells.unique(return_counts=True)
        for number, own in zip(cell.tolist(), order.split(counts.tolist()), strict=True):
            y, x = divmod(number, self.grid[1])
            rows = self._near(y, x, k, left_out)
            distance[own], found[own] = self._nearest(queries[own], rows, k)
        return distance, found

    def _near(self, y: int, x: int, k: int, left_out: Tensor | None) -> Tensor:
        """Rows in reach of a place, int64 ``(n,)``."""
        (h, w), reach = self.grid, self.radius
        left, right = max(0, x - reach), min(w, x + reach + 1)
        above = range(max(0, y - reach), min(h, y + reach + 1))
        rows = torch.cat([self.order[self.ends[row * w + left] : self.ends[row * w + right]] for row in above])
        rows = rows if left_out is None else rows[~left_out[rows]]
        if len(rows) >= k:
            return rows
        here = torch.arange(len(self.places), device=self.places.device)
        here = here if left_out is None else here[~left_out]
        place = self.places.new_tensor([[y, x]])
        return here[in_reach(place, self.places[here], reach, k)[0]]

    def _nearest(self, queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest of ``rows``: float64 products rule out those that cannot be, float64 differences decide."""
        query, bank = queries.double(), self.features[rows].double()
        lengths, others = query.square().sum(1, keepdim=True), bank.square().sum(1)
        square = torch.addmm(others, query, bank.T, alpha=-2).add_(lengths)  # (q, n)
        bound = square.topk(k, dim=1, largest=False).values[:, -1:] + 2 * self.margin * (lengths + others.max())
        number, place = (square <= bound).nonzero(as_tuple=True)
        step = max(1, _GATHERED // queries.shape[1])
        pairs = zip(number.split(step), place.split(step), strict=True)
        exact = torch.cat([torch.linalg.vector_norm(query[q] - bank[r], dim=1) for q, r in pairs])
        best = k_least(exact, rows[place], number, len(queries), k)
        return exact[best].float(), rows[place][best]
