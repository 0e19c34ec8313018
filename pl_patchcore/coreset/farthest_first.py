"""The greedy loop: projected features ``(N, d)`` -> rows in order of selection, and their gaps.

The gap of a row is its squared distance to the nearest picked row; the next pick is the row with the largest gap.
`FarthestFirst.run` goes round by round, and picks some hundred rows in each; `pick_among` is the loop of single picks.

Each row has an upper bound of its gap, which may be stale: gaps only shrink, so it is never too low. A round brings the
rows with the largest bounds up to date (the pool), by one matrix product (`distance_bounds.py`). It computes the exact
gaps of those that can still win, by float64 differences, and picks among them as long as the largest gap beats all
other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pl_patchcore.coreset.distance_bounds import STEP, TINY, DistanceBounds, product_type
from pl_patchcore.distributed import Processes
from pl_patchcore.errors import UserError
from pl_patchcore.numerics import copies_in_order, product_margin

POOL_GROWTH = 4  # a pool has at most so many times the rows of the pool before, ...
POOL_PAIRS = 1 << 16  # ... and rows times the picks of the round before are fewer than this
SETTLED_ROWS = 2304  # rows whose exact gaps a round computes, at most
CANDIDATES = 768  # rows that a round picks among, at most: with more, each pick takes longer
BF16_PAIRS = 8  # exact distances per settled row, on average, from which float32 bounds are used in place of bf16
PICKED = -1.0  # gap of a picked row: below every real one

Progress: TypeAlias = Callable[[int], object]  # called with the number of rows selected since the last call


class Selection(NamedTuple):
    """Rows selected, and how well they cover all rows.

    Attributes:
        rows: Row indices in order of selection, ``(M,)``, int64.
        radii: Coverage radii, ``(M + 1,)``, float32: the first m rows leave no row farther than ``radii[m]`` from
            the nearest of them; they never increase, and ``radii[0]`` is infinite. None where the order of
            selection doesn't tell.
    """

    rows: Tensor
    radii: Tensor | None = None


class FarthestFirst:
    """State of one selection.

    Args:
        features: ``(N, d)``, float32 or float64.
        size: Rows to select, of all processes' rows.
        processes: The processes; None: this one alone.

    Raises:
        UserError: If the features are not finite.
    """

    least_pool = 6144  # rows of a pool, at least, where there are many rows

    def __init__(self, features: Tensor, size: int, processes: Processes | None = None) -> None:
        self.features, self.wanted, self.processes = features, size, processes or Processes(alone=True)
        (largest,) = self.processes.largest(float(torch.stack(features.aminmax()).abs().max()) if len(features) else 0)
        if not math.isfinite(largest):
            raise UserError("features hold NaN or infinity; look for a broken image or an overflow in half precision.")
        self.scale = 2.0 ** min(-math.frexp(largest)[1], 1000)  # brings features near 1: no square over- or underflows
        self.rows = self.numbers = distinct_rows(features)  # of equal gaps, that of the lowest number is picked
        shards = self.processes.objects((len(features), len(self.rows)))
        self.all_rows, self.total = (sum(each) for each in zip(*shards, strict=True))  # total: rows to pick among
        self.size = min(size + 1, self.total)  # rows to pick: one more, for the last radius
        self.pool_rows = self.least_pool = max(64, min(self.least_pool, self.total // 8))
        n, d, device = len(self.rows), features.shape[1], features.device
        self.chunk_size = chunk_size(device)
        self.mean = torch.zeros(d, dtype=torch.float64, device=device)
        for chunk in features.split(self.chunk_size):  # nothing is kept meanwhile: it would split the freed memory
            self.mean += chunk.double().sum(0)
        self.mean *= self.scale / max(len(features), 1)
        self.bound = torch.full((n,), torch.inf, dtype=torch.float32, device=device)  # >= the gap
        self.seen = torch.zeros(n, dtype=torch.int64, device=device)  # number of picks that the bound knows
        self.gap = torch.full((n,), torch.inf, dtype=torch.float32, device=device)  # exact ...
        self.known = torch.zeros(n, dtype=torch.int64, device=device)  # ... for so many picks
        self.picks = torch.empty(self.size, dtype=torch.int64, device=device)  # numbers of the picked rows ...
        self.count = 0  # ... so far
        self.pick_gaps: list[Tensor] = []  # gaps of the picks when they were picked; the first one's is infinite
        self.settled = self.pairs = 0  # rows so far, and exact distances computed for them
        self.write_centred(product_type(d, n * self.size, device))

    def write_centred(self, dtype: torch.dtype) -> None:
        """Write all rows, and the picks so far, for products of this type."""
        n, device = len(self.rows), self.features.device
        self.centred = self.pick_centred = self.features.new_empty(0)  # frees the memory of another type first
        self.bounds = DistanceBounds(self.features.shape[1], dtype)
        self.centred = torch.empty(n, self.bounds.width, dtype=dtype, device=device)
        self.slack = torch.empty(n, dtype=torch.float32, device=device)
        chunks = (each.split(self.chunk_size) for each in (self.rows, self.centred, self.slack))
        for rows, centred, slack in zip(*chunks, strict=True):
            slack[:] = self.bounds.left(self.exact(rows).sub_(self.mean), out=centred)[1]
        self.pick_centred = torch.empty(self.size, self.bounds.width, dtype=dtype, device=device)
        for i in range(0, self.count, self.chunk_size):
            part = torch.arange(i, min(i + self.chunk_size, self.count), device=device)
            self.pick_centred[part] = self.bounds.right(self.exact_picks(part).sub_(self.mean))

    def select(self, gaps: Tensor | None = None, progress: Progress | None = None) -> Selection:
        """Select rows; where every gap is 0, the lowest of those that are left.

        Args:
            gaps: Squared distances ``(N,)`` to begin with; None: row 0 is picked first.
            progress: Called with the number of rows selected since the last call.
        """
        if gaps is None:
            first = self.picks.new_zeros(1)
            self.add(first, self.exact_of(first), [math.inf])
            own = self.numbers == 0
            self.gap[own] = self.bound[own] = PICKED
            self.refresh(torch.arange(len(self.rows), device=self.rows.device))
        else:
            self.gap = (gaps[self.rows].double() * self.scale**2).float()
            self.bound = self.gap.clone()
        self.run(progress)
        picks = self.picks[: min(self.count, self.wanted)]
        if len(picks) < self.wanted:
            left = torch.ones(self.all_rows, dtype=torch.bool, device=picks.device)
            left[picks] = False
            picks = torch.cat([picks, left.nonzero().flatten()[: self.wanted - len(picks)]])
        if gaps is not None:
            return Selection(picks)
        known = torch.cat(self.pick_gaps)[: self.wanted + 1]
        radii = torch.zeros(self.wanted + 1, dtype=torch.float32)
        radii[: len(known)] = (known.double().sqrt() / self.scale).float()
        return Selection(picks, radii)

    def run(self, progress: Progress | None) -> None:
        """Pick until there are ``size`` picks or every gap is 0."""
        told, largest_gap = 0, math.inf
        while self.count < self.size and largest_gap > 0:
            before = self.count
            pool, rest = self.pool()
            self.refresh(pool)
            alive = pool[self.bound[pool] > rest]
            if len(alive) > (most := -(-SETTLED_ROWS // self.processes.count)):
                bound, order = self.bound[alive].topk(most + 1)
                if bound[-1] < bound[-2]:  # else thousands have the same bound
                    alive, rest = alive[order[:-1]], float(bound[-1])
            self.settle(alive)
            largest_gap = self.pick(alive, rest)
            picks = self.count - before
            wide = min(POOL_PAIRS // picks, self.total) if picks else self.total
            self.pool_rows = max(self.least_pool, min(wide, POOL_GROWTH * self.pool_rows))
            if progress is not None:
                progress(min(self.count, self.wanted) - told)
                told = min(self.count, self.wanted)

    def pool(self) -> tuple[Tensor, float]:
        """Positions of about ``pool_rows`` rows with the largest bounds, and a bound of all other rows' bounds."""
        size = -(-self.pool_rows // self.processes.count)
        if size >= len(self.rows):
            return torch.arange(len(self.rows), device=self.rows.device), PICKED
        sample = self.bound[::16]  # tells where to cut ten times sooner than all bounds would
        rest = float(sample.topk(min(size // 16 + 1, len(sample))).values[-1])
        pool = (self.bound > rest).nonzero().flatten()
        if not size <= 2 * len(pool) <= 4 * size:
            bound, pool = self.bound.topk(size + 1)
            pool, rest = pool[:-1], float(bound[-1])
        return pool, rest

    def refresh(self, pool: Tensor) -> None:
        """Lower the pool's bounds by the picks that they do not know."""
        for part, centred, slack, pieces in self.unseen(pool, self.seen):
            old = bound = self.bound[part]
            for _, picks in pieces:
                bound = torch.minimum(bound, self.bounds.least(centred, slack, picks))
            self.bound[part] = torch.where(old < 0, old, bound)
        self.seen[pool] = self.count

    def settle(self, alive: Tensor) -> None:
        """Make the gaps of ``alive`` exact: float64 differences to those picks that products cannot rule out."""
        for part, centred, slack, pieces in self.unseen(alive, self.known):
            limit = torch.minimum(self.bound[part], self.gap[part])
            for first, picks in pieces:
                row, pick = self.bounds.within(centred, slack, picks, limit)
                self.pairs += len(row)
                for r, p in zip(row.split(self.chunk_size), pick.split(self.chunk_size), strict=True):
                    difference = self.exact(self.rows[part[r]]) - self.exact_picks(first + p)
                    self.gap.scatter_reduce_(0, part[r], difference.square_().sum(1).float(), "amin")
        self.bound[alive] = self.gap[alive]
        self.known[alive] = self.count
        self.settled += len(alive)
        if self.bounds.dtype != torch.float32 and self.pairs > BF16_PAIRS * max(self.settled, 1024):
            self.write_centred(torch.float32)  # bf16 cannot tell rows apart that are so close to each other

    def unseen(self, positions: Tensor, seen: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, list[Any]]]:
        """Parts of rows that lack about as many picks: positions, centred rows, slack, and pieces of the picks lacking.

        A piece, of a product each, is the place of its first pick, and the centred picks.
        """
        pairs = 256 * self.chunk_size  # of a product: 2^20 on the CPU
        seen, order = seen[positions].sort()
        lacking, first = (self.count - seen).cpu(), 0
        while first < len(lacking):
            longest = int(lacking[first])
            alike = int((lacking[first:] >= 0.75 * longest).sum())
            most = max(self.chunk_size // 4, min(pairs // max(1, longest), self.chunk_size))
            part = positions[order[first : first + min(max(alike, self.chunk_size // 8), most)]]
            first += len(part)
            step = min(max(STEP, pairs // len(part) // STEP * STEP), self.chunk_size // 2)
            longest = min(self.count, -(-longest // STEP) * STEP)  # whole steps, with some picks that were seen
            starts = range(self.count - longest, self.count, step)
            pieces = [(i, self.pick_centred[i : min(i + step, self.count)]) for i in starts]
            yield part, self.centred.index_select(0, part), self.slack[part], pieces

    def pick(self, alive: Tensor, rest: float) -> float:
        """Pick among ``alive``, whose gaps are exact, while the largest beats all other rows; the largest gap left."""
        alive, rest, limit = self.candidates(alive, rest, CANDIDATES)
        exact, ties = self.exact(self.rows[alive]), int((self.numbers[alive] < limit).sum())
        picked, gaps, gap = pick_among(exact, self.gap[alive], rest, ties, self.size - self.count)
        self.add(self.numbers[alive[picked]], exact[picked], gaps)
        self.set_gaps(alive, gap)
        return float(max([rest, *gap.tolist()]))

    def candidates(self, alive: Tensor, rest: float, most: int) -> tuple[Tensor, float, int]:
        """Those of ``alive`` whose gap beats ``rest``, by number; the ``most`` largest gaps if there are more.

        Also the largest gap that any other row has, and the lowest number of the rows left out with that gap (0:
        unknown): a candidate of a lower number is picked before them.
        """
        alive = alive[self.gap[alive] > rest]
        alive = alive[self.numbers[alive].argsort()]
        if len(alive) <= most:
            return alive, rest, 0
        gap, order = self.gap[alive].sort(descending=True, stable=True)
        return alive[order[:most].sort().values], float(gap[most]), int(self.numbers[alive[order[most]]])

    def set_gaps(self, positions: Tensor, gap: Tensor) -> None:
        """Set gaps that know all picks."""
        self.gap[positions] = self.bound[positions] = gap
        self.known[positions] = self.seen[positions] = self.count

    def add(self, numbers: Tensor, exact: Tensor, gaps: list[float]) -> None:
        """Append picks: their numbers, their rows as `exact` gives them, overwritten, and their gaps."""
        part = slice(self.count, self.count + len(numbers))
        self.picks[part], self.count = numbers, part.stop
        self.pick_gaps.append(torch.tensor(gaps, dtype=torch.float32))
        self.pick_centred[part] = self.bounds.right(exact.sub_(self.mean))

    def exact_of(self, numbers: Tensor) -> Tensor:
        """As `exact`, of rows by number."""
        return self.exact(numbers)

    def exact_picks(self, places: Tensor) -> Tensor:
        """As `exact`, of picks, by their places in the order of selection."""
        return self.exact(self.picks[places])

    def exact(self, rows: Tensor) -> Tensor:
        """Features of rows, brought near 1, float64 ``(n, d)``."""
        return self.features.index_select(0, rows).double().mul_(self.scale)


def pick_among(exact: Tensor, gap: Tensor, rest: float, ties: int, most: int) -> tuple[Tensor, list[float], Tensor]:
    """Pick the row with the largest gap, the first of equals, lower the gaps, and so on while one is above ``rest``.

    Args:
        exact: Rows in ascending order of their number, float64 ``(S, d)``.
        gap: Their gaps, float32 ``(S,)``.
        rest: Largest gap of all other rows.
        ties: The first rows, so many, may also be picked with a gap equal to ``rest``, unless it is 0.
        most: Picks at most.

    Returns:
        Picks in order, int64, their gaps, and the gaps of all rows after them, float32 ``(S,)``.
    """
    device, exact = exact.device, exact.cpu()
    centred = (exact - exact.mean(0)).float()
    square = centred.square().sum(1)  # (S,)
    lower = torch.addmm(square, centred, centred.T, alpha=-2).add_(square[:, None])  # (S, S) squared distances, ...
    lower -= product_margin(centred.shape[1]) * (square + square[:, None]) + TINY  # ... made lower bounds of them
    rows, gaps, bounds = exact.numpy(), gap.cpu().numpy().copy(), lower.fill_diagonal_(math.inf).numpy()
    picks: list[int] = []
    pick_gaps: list[float] = []
    while len(picks) < most and len(gaps):
        best = int(gaps.argmax())
        if gaps[best] < rest or gaps[best] <= 0 or (gaps[best] == rest and best >= ties):
            break
        picks.append(best)
        pick_gaps.append(float(gaps[best]))
        gaps[best] = PICKED
        close = (bounds[best] <= gaps).nonzero()[0]
        if len(close):  # few: candidates lie far from each other
            difference = rows[close] - rows[best]
            gaps[close] = np.minimum(gaps[close], np.einsum("sd,sd->s", difference, difference).astype(np.float32))
    return torch.tensor(picks, dtype=torch.int64, device=device), pick_gaps, torch.from_numpy(gaps).to(device)


def distinct_rows(features: Tensor) -> Tensor:
    """Lowest row of each set of equal rows, which would tie in every round: int64, ascending."""
    order, copy = copies_in_order(features)
    keep = torch.ones_like(copy)
    keep[order[copy]] = False
    return keep.nonzero().flatten()


def chunk_size(device: torch.device) -> int:
    """Rows worked on at a time: on a GPU more, where starting a kernel takes longest."""
    return 1 << 12 if device.type == "cpu" else 1 << 15
