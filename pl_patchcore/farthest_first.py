"""Farthest-first traversal in blocks: projected features ``(N, d)`` -> rows in order of selection, and their gaps.

`coreset.py` and `coreset_shared.py` call it. Each row carries an upper bound of its gap (squared distance to the
nearest picked row) that may be stale. A round brings the rows with the largest bounds up to date, by one matrix
product (`distance_bounds.py`), computes by float64 differences the gaps of those that can still win, and picks among
them for as long as the largest beats all other rows. Stale bounds cannot be too low, since gaps only shrink, so no
candidate is missed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pl_patchcore.distance_bounds import STEP, TINY, DistanceBounds, product_type
from pl_patchcore.numerics import product_margin, times_at_once

_CHUNK = 1 << 12  # rows copied at once
POOL = 6144  # rows brought up to date in a round, and more ...
_WORK = 1 << 16  # ... after a round of few picks, as long as they make fewer pairs with those than this; ...
WIDER = 4  # ... and at most so many times the rows of that round
_TILE = 1024  # rows of one product ...
_PRODUCT = 1 << 20  # ... and pairs ...
_WIDE = 2048  # ... and picks, at most
_LIKE = 0.75  # rows of one product have this share of the longest history among them ...
_FEW = 512  # ... if so many have
_PAIRS = 1 << 12  # float64 differences computed at once
CROWD = 768  # candidates a round picks among; more cost more a pick than another round saves
SETTLED = 3 * CROWD  # rows whose gaps a round computes
_SAMPLE = 16  # one row in so many tells where the largest bounds begin
_CROWDED = 8  # pairs left by products for each row settled, on average, that are too many
PICKED = -1.0  # gap of a picked row: below every real one


class FarthestFirst:
    """State of one selection.

    Args:
        features: ``(N, d)``, float32 or float64, finite.
        rows: Those to pick among, distinct and ascending, as `distinct_rows` gives them.
        scale: Power of two that brings the features near 1, so that squares neither over- nor underflow.
        size: Rows to pick, at most as many as there are to pick among.
        total: Rows to pick among on all processes; None where this is the only one.

    Attributes:
        count: Rows picked so far.
        picks: Their positions in ``rows``, int64 ``(size,)``, of which the first ``count`` are set.
        gaps: Squared and scaled gap of each pick when it was picked, in parts; infinite for the first one.
    """

    widest = POOL

    def __init__(self, features: Tensor, rows: Tensor, scale: float, size: int, total: int | None = None) -> None:
        self.features, self.rows, self.scale = features, rows, scale
        self.numbers = rows  # by position, as all that follows; ties go to the lowest
        self.size = size
        self.total = len(rows) if total is None else total  # of all processes
        self.most = SETTLED
        self.times = times_at_once(features.device)
        self.smallest = self.width = max(64, min(self.widest, self.total // 8))
        n, d = len(rows), features.shape[1]
        device = features.device
        self.mean = torch.zeros(d, dtype=torch.float64, device=device)
        chunk = _CHUNK * self.times
        for part in features.split(chunk):  # nothing kept between the copies: it would part the memory they leave
            self.mean += part.double().sum(0)
        self.mean *= scale / max(len(features), 1)
        self.bound = torch.full((n,), torch.inf, device=device)  # >= the gap
        self.seen = torch.zeros(n, dtype=torch.int64, device=device)  # picks that bound knows
        self.key = torch.full((n,), torch.inf, device=device)  # the exact gap ...
        self.known = torch.zeros(n, dtype=torch.int64, device=device)  # ... to this many picks
        self.picks = torch.empty(self.size, dtype=torch.int64, device=device)  # positions in rows
        self.count = 0
        self.gaps: list[Tensor] = []  # squared and scaled, of each pick when it was picked
        self.settled = self.pairs = 0  # rows so far, and pairs computed for them
        self._write_down(product_type(d, n * self.size, device))

    def _write_down(self, dtype: torch.dtype) -> None:
        """Write all rows, and the picks so far, for products of this type."""
        n, device = len(self.rows), self.features.device
        self.near = self.pick_near = self.features.new_empty(0)  # the memory of those of another type comes first
        self.products = DistanceBounds(self.features.shape[1], dtype)
        self.near = torch.empty(n, self.products.width, dtype=dtype, device=device)
        self.slack = torch.empty(n, device=device)
        chunk = _CHUNK * self.times
        parts = (each.split(chunk) for each in (torch.arange(n, device=device), self.near, self.slack))
        for part, near, slack in zip(*parts, strict=True):
            slack[:] = self.products.left(self._exact(part).sub_(self.mean), out=near)[1]
        self.pick_near = torch.empty(self.size, self.products.width, dtype=dtype, device=device)
        for part in torch.arange(self.count, device=device).split(chunk) if self.count else ():
            self.pick_near[part] = self.products.right(self._exact_picks(part).sub_(self.mean))

    def begin(self, start: int, gaps: Tensor | None) -> None:
        """Pick row ``start``, or take squared distances ``(N,)`` as the gaps to start from."""
        if gaps is None:
            first = int((self.rows == start).nonzero())
            self._add(torch.tensor([first], device=self.rows.device), [math.inf])
            self.key[first] = self.bound[first] = PICKED
            self._refresh(torch.arange(len(self.rows), device=self.rows.device))
        else:
            self.key = (gaps[self.rows].double() * self.scale**2).float()
            self.bound = self.key.clone()

    def run(self, deadline: float, wanted: int, progress: Callable[[int], object] | None) -> bool:
        """Pick until there are ``size`` or every gap is 0: True; or until ``deadline``, two picks at least: False."""
        reported = 0
        while self.count < self.size and not self._is_late(deadline):
            if progress is not None:
                progress(min(self.count, wanted) - reported)
                reported = min(self.count, wanted)
            pool, rest = self._pool(self.width)
            self._refresh(pool)
            before = self.count
            alive = pool[self.bound[pool] > rest]
            if len(alive) > self.most:
                bound, order = self.bound[alive].topk(self.most + 1)
                if bound[-1] < bound[-2]:  # no mass ties
                    alive, rest = alive[order[:-1]], float(bound[-1])
            self._settle(alive)
            if self._pick(alive, rest) <= 0:
                return True  # every gap is 0
            picks = self.count - before
            worth = min(_WORK // picks, self.total) if picks else self.total
            self.width = max(self.smallest, min(worth, WIDER * self.width))
        if progress is not None:
            progress(min(self.count, wanted) - reported)
        return self.count == self.size

    def _is_late(self, deadline: float) -> bool:
        return self.count > 1 and time.monotonic() > deadline

    def _pool(self, width: int) -> tuple[Tensor, float]:
        """Return about ``width`` rows with the largest bounds, and the largest bound there may be among the others."""
        if width >= len(self.rows):
            return torch.arange(len(self.rows), device=self.rows.device), PICKED
        sample = self.bound[::_SAMPLE]  # which tells where to part them, in a tenth of the time
        rest = float(sample.topk(min(width // _SAMPLE + 1, len(sample))).values[-1])
        pool = (self.bound > rest).nonzero().flatten()
        if not width <= 2 * len(pool) <= 4 * width:
            values, pool = self.bound.topk(width + 1)
            pool, rest = pool[:-1], float(values[-1])
        return pool, rest

    def _refresh(self, pool: Tensor) -> None:
        """Lower the pool's bounds by the picks they have not seen."""
        for part, near, slack, pieces in self._unseen(pool, self.seen):
            old = bound = self.bound[part]
            for _, picks in pieces:
                bound = torch.minimum(bound, self.products.least(near, slack, picks))
            self.bound[part] = torch.where(old < 0, old, bound)
        self.seen[pool] = self.count

    def _settle(self, alive: Tensor) -> None:
        """Make the keys of ``alive`` exact: float64 differences of the pairs that products cannot rule out."""
        for part, near, slack, pieces in self._unseen(alive, self.known):
            limit = torch.minimum(self.bound[part], self.key[part])
            for first, picks in pieces:
                row, pick = self.products.within(near, slack, picks, limit)
                self.pairs += len(row)
                for r, p in zip(*(each.split(_PAIRS * self.times) for each in (row, pick)), strict=True):
                    gap = self._exact(part[r]) - self._exact_picks(first + p)
                    self.key.scatter_reduce_(0, part[r], gap.square_().sum(1).float(), "amin")
        self.bound[alive] = self.key[alive]
        self.known[alive] = self.count
        self.settled += len(alive)
        if self.near.dtype != torch.float32 and self.pairs > _CROWDED * max(self.settled, _TILE):
            self._write_down(torch.float32)  # bf16 cannot tell rows so close to each other apart

    def _unseen(self, rows: Tensor, seen: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, list[tuple[int, Tensor]]]]:
        """Rows with like histories together, written down, and the picks they have not seen, as products take them.

        Of each part of the picks also the number of its first.
        """
        done, order = seen[rows].sort()
        left, first = (self.count - done).cpu(), 0  # picks
        while first < len(left):
            longest = int(left[first])
            like = int((left[first:] >= _LIKE * longest).sum())
            wide = self.times * max(_TILE, min(_PRODUCT // max(1, longest), _CHUNK))
            part = rows[order[first : first + min(max(1 << (like - 1).bit_length(), self.times * _FEW), wide)]]
            first += len(part)
            step = min(max(STEP, self.times * _PRODUCT // len(part) // STEP * STEP), self.times * _WIDE)
            longest = min(self.count, -(-longest // STEP) * STEP)  # whole steps, with some that were seen
            starts = range(self.count - longest, self.count, step)
            pieces = [(i, self.pick_near[i : min(i + step, self.count)]) for i in starts]
            yield part, self.near.index_select(0, part), self.slack[part], pieces

    def _pick(self, alive: Tensor, rest: float) -> float:
        """Pick among ``alive``, whose keys are exact, while the largest beats all other rows.

        Returns:
            Largest gap left, in ``alive`` or outside.
        """
        alive, rest, limit = self._candidates(alive, rest, CROWD)
        ties = int((self.numbers[alive] < limit).sum())
        exact, key = self._exact(alive).cpu(), self.key[alive].cpu()
        chosen, gaps, key = pick_among(exact, key, max(rest, 0.0), ties, self.size - self.count)
        self._add(alive[torch.tensor(chosen, dtype=torch.int64, device=alive.device)], gaps)
        self._know(alive, key)
        return float(max([rest, *key.tolist()]))

    def _candidates(self, alive: Tensor, rest: float, most: int) -> tuple[Tensor, float, int]:
        """Those of ``alive`` that beat ``rest``, by number; of more than ``most`` the first ones in order of selection.

        Returns:
            With them the largest gap that any other row has, and the lowest number of those left out with that gap: a
            candidate of a lower number beats them all with the same gap. 0 where that is not known.
        """
        alive = alive[self.key[alive] > rest]
        alive = alive[self.numbers[alive].argsort()]
        if len(alive) <= most:
            return alive, rest, 0
        key, order = self.key[alive].sort(descending=True, stable=True)
        limit = int(self.numbers[alive[order[most]]])
        return alive[order[:most].sort().values], float(key[most]), limit

    def _know(self, alive: Tensor, key: Tensor) -> None:
        """Set the keys of ``alive``, which know all picks."""
        self.key[alive] = self.bound[alive] = key.to(self.key.device)
        self.known[alive] = self.seen[alive] = self.count

    def _add(self, positions: Tensor, gaps: list[float]) -> None:
        self.gaps.append(torch.tensor(gaps, dtype=torch.float32))
        part = slice(self.count, self.count + len(positions))
        self.picks[part] = positions
        self.pick_near[part] = self.products.right(self._exact(positions).sub_(self.mean))
        self.count = part.stop

    def _exact_picks(self, numbers: Tensor) -> Tensor:
        return self._exact(self.picks[numbers])

    def _exact(self, positions: Tensor) -> Tensor:
        return self.features.index_select(0, self.rows.index_select(0, positions)).double().mul_(self.scale)


def pick_among(exact: Tensor, key: Tensor, floor: float, ties: int, most: int) -> tuple[list[int], list[float], Tensor]:
    """Pick the row with the largest key, the first of equals, lower the keys, and so on while one is above ``floor``.

    Args:
        exact: Rows in ascending order of their number, float64 ``(S, d)``, on the CPU.
        key: Their gaps, float32 ``(S,)``.
        floor: Largest gap elsewhere.
        ties: First rows, so many, that may be picked with a gap equal to ``floor`` too, if it is not 0.
        most: Picks at most.

    Returns:
        Picks in order, their gaps, and the keys of all rows after them, float32 ``(S,)``.
    """
    near = (exact - exact.mean(0)).float()
    square = near.square().sum(1)  # (S,)
    least = torch.addmm(square, near, near.T, alpha=-2).add_(square[:, None])  # (S, S) squared distances ...
    least -= product_margin(near.shape[1]) * (square + square[:, None]) + TINY  # ... that are not too large
    rows, keys, bounds = exact.numpy(), key.numpy().copy(), least.fill_diagonal_(math.inf).numpy()
    chosen: list[int] = []
    gaps: list[float] = []
    while len(chosen) < most and len(keys):
        best = int(keys.argmax())
        if keys[best] < floor or keys[best] <= 0 or (keys[best] == floor and best >= ties):
            break
        chosen.append(best)
        gaps.append(float(keys[best]))
        keys[best] = PICKED
        close = (bounds[best] <= keys).nonzero()[0]
        if len(close):  # few: candidates lie far from each other
            gap = rows[close] - rows[best]
            keys[close] = np.minimum(keys[close], np.einsum("sd,sd->s", gap, gap).astype(np.float32))
    return chosen, gaps, torch.from_numpy(keys)


def distinct_rows(features: Tensor, start: int | None) -> Tensor:
    """Lowest row of each set of equal rows, int64, ascending; ``start`` stands for its own set.

    Equal rows (a constant background gives thousands) would tie in every round. A wrapping integer hash finds
    them; rows are compared before any is set aside, so a collision only costs time.
    """
    words = features.shape[1] * features.element_size() / 8  # 64 bits each; half a one of an odd number of float32
    weights = torch.randint(-(2**62), 2**62, (math.ceil(words),), generator=torch.Generator().manual_seed(0))
    weights = (2 * weights + 1).to(features.device)
    hashed = torch.empty(len(features), dtype=torch.int64, device=features.device)
    chunk = _CHUNK * times_at_once(features.device)
    for part, place in zip(features.split(chunk), hashed.split(chunk), strict=True):  # -0.0 + 0.0 is 0.0
        torch.sum(F.pad(part + 0.0, (0, int(words % 1 > 0))).view(torch.int64).mul_(weights), 1, out=place)
    value, row = hashed.sort(stable=True)
    first = torch.ones_like(value, dtype=torch.bool)
    first[1:] = value[1:] != value[:-1]
    group = row[first][first.cumsum(0) - 1]  # lowest row of the hash, in hash order
    twin = (~first).nonzero().flatten()
    same = torch.empty(len(twin), dtype=torch.bool, device=features.device)
    for part, place in zip(twin.split(chunk), same.split(chunk), strict=True):
        torch.all(features[row[part]] == features[group[part]], 1, out=place)
    drop = row[twin[same]]
    keep = torch.ones(len(features), dtype=torch.bool, device=features.device)
    keep[drop] = False
    if start is not None and not keep[start]:
        keep[group[row == start]] = False
        keep[start] = True
    return keep.nonzero().flatten()
