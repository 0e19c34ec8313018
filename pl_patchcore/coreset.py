"""Patch features -> the rows kept as memory bank.

Reads projected features ``(N, d)``, returns row indices ``(M,)`` in order of selection; the first ``M'`` of them
are the coreset of size ``M'``, and greedy selection tells how far each of these leaves any row. Next:
`memory_bank.py`.

Greedy selection (Roth et al. 2022, Algorithm 1; Gonzalez 1985) is exact: the same rows in the same order as a
loop that computes every squared distance by float64 differences, rounds it to float32, and gives ties to the
lowest row. It is computed in blocks: each row carries an upper bound of its gap (squared distance to the nearest
kept row) that may be stale, only the rows with the largest bounds are brought up to date, by one matrix product
(`distance_bounds.py`), and float64 differences decide among the few that remain. Stale bounds cannot be too low,
since gaps only shrink, so no candidate is missed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pl_patchcore.distance_bounds import STEP, TINY, DistanceBounds, product_type
from pl_patchcore.errors import UserError
from pl_patchcore.numerics import full_precision, product_margin

CoresetMethod = Literal["greedy", "approximate", "random", "none"]

_CHUNK = 1 << 12  # rows copied at once
_POOL = 4096  # rows brought up to date in a round, and more ...
_WORK = 1 << 16  # ... after a round of few picks, as long as they make fewer pairs with those than this; ...
_WIDER = 4  # ... and at most so many times the rows of that round
_TILE = 1024  # rows of one product ...
_PRODUCT = 1 << 20  # ... and pairs ...
_WIDE = 2048  # ... and picks, at most
_LIKE = 0.75  # rows of one product have this share of the longest history among them ...
_FEW = 512  # ... if so many have
_PAIRS = 1 << 12  # float64 differences computed at once
_CROWD = 512  # candidates a round picks among; more cost more a pick than another round saves
_SETTLED = 3 * _CROWD  # rows whose gaps a round computes
_SAMPLE = 16  # one row in so many tells where the largest bounds begin
_CROWDED = 8  # pairs left by products for each row settled, on average, that are too many
_PICKED = -1.0  # gap of a picked row: below every real one


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
        rows = _distinct_rows(features, start)
        scale = float(torch.ldexp(torch.ones((), dtype=torch.float64), -torch.frexp(largest.double().cpu())[1]))
        search = _Greedy(features, rows, scale, min(size + 1, len(rows)))  # one more, for its gap
        search.begin(start, gaps)
        finished = search.run(deadline, size, progress)
    picks = rows[search.picks[: search.count]]
    return _selection(picks, len(features), size, finished, None if gaps is not None else search.gaps, scale)


def _selection(
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


class _Greedy:
    """State of one selection among ``rows`` (distinct, ascending but for the start) of ``features``."""

    widest = _POOL

    def __init__(self, features: Tensor, rows: Tensor, scale: float, size: int, total: int | None = None) -> None:
        self.features, self.rows, self.scale = features, rows, scale
        self.numbers = rows  # by position, as all that follows; ties go to the lowest
        self.size = size
        self.total = len(rows) if total is None else total  # of all processes
        self.most = _SETTLED
        self.smallest = self.width = max(64, min(self.widest, self.total // 8))
        n, d = len(rows), features.shape[1]
        device = features.device
        self.mean = torch.zeros(d, dtype=torch.float64, device=device)
        for part in features.split(_CHUNK):  # nothing kept between the copies: it would part the memory they leave
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
        parts = (each.split(_CHUNK) for each in (torch.arange(n, device=device), self.near, self.slack))
        for part, near, slack in zip(*parts, strict=True):
            slack[:] = self.products.left(self._exact(part).sub_(self.mean), out=near)[1]
        self.pick_near = torch.empty(self.size, self.products.width, dtype=dtype, device=device)
        for part in torch.arange(self.count, device=device).split(_CHUNK) if self.count else ():
            self.pick_near[part] = self.products.right(self._exact_picks(part).sub_(self.mean))

    def begin(self, start: int, gaps: Tensor | None) -> None:
        if gaps is None:
            first = int((self.rows == start).nonzero())
            self._add(torch.tensor([first], device=self.rows.device), [math.inf])
            self.key[first] = self.bound[first] = _PICKED
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
            self.width = max(self.smallest, min(worth, _WIDER * self.width))
        if progress is not None:
            progress(min(self.count, wanted) - reported)
        return self.count == self.size

    def _is_late(self, deadline: float) -> bool:
        return self.count > 1 and time.monotonic() > deadline

    def _pool(self, width: int) -> tuple[Tensor, float]:
        """Return about ``width`` rows with the largest bounds, and the largest bound there may be among the others."""
        if width >= len(self.rows):
            return torch.arange(len(self.rows), device=self.rows.device), _PICKED
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
                for r, p in zip(row.split(_PAIRS), pick.split(_PAIRS), strict=True):
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
            wide = max(_TILE, min(_PRODUCT // max(1, longest), _CHUNK))
            part = rows[order[first : first + min(max(1 << (like - 1).bit_length(), _FEW), wide)]]
            first += len(part)
            step = min(max(STEP, _PRODUCT // len(part) // STEP * STEP), _WIDE)
            starts = range(self.count - longest, self.count, step)
            pieces = [(i, self.pick_near[i : min(i + step, self.count)]) for i in starts]
            yield part, self.near.index_select(0, part), self.slack[part], pieces

    def _pick(self, alive: Tensor, rest: float) -> float:
        """Pick among ``alive``, whose keys are exact, while the largest beats all other rows.

        Returns:
            Largest gap left, in ``alive`` or outside.
        """
        alive, rest, limit = self._candidates(alive, rest, _CROWD)
        ties = int((self.numbers[alive] < limit).sum())
        exact, key = self._exact(alive).cpu(), self.key[alive].cpu()
        chosen, gaps, key = _farthest_first(exact, key, max(rest, 0.0), ties, self.size - self.count)
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
        return self.features[self.rows[positions]].double().mul_(self.scale)


def _farthest_first(
    exact: Tensor, key: Tensor, floor: float, ties: int, most: int
) -> tuple[list[int], list[float], Tensor]:
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
        keys[best] = _PICKED
        close = (bounds[best] <= keys).nonzero()[0]
        if len(close):  # few: candidates lie far from each other
            gap = rows[close] - rows[best]
            keys[close] = np.minimum(keys[close], np.einsum("sd,sd->s", gap, gap).astype(np.float32))
    return chosen, gaps, torch.from_numpy(keys)


def _distinct_rows(features: Tensor, start: int | None) -> Tensor:
    """Lowest row of each set of equal rows, ascending; ``start`` stands for its own set.

    Equal rows (a constant background gives thousands) would tie in every round. A wrapping integer hash finds
    them; rows are compared before any is set aside, so a collision only costs time.
    """
    words = features.shape[1] * features.element_size() / 8  # 64 bits each; half a one of an odd number of float32
    weights = torch.randint(-(2**62), 2**62, (math.ceil(words),), generator=torch.Generator().manual_seed(0))
    weights = (2 * weights + 1).to(features.device)
    hashed = torch.empty(len(features), dtype=torch.int64, device=features.device)
    for part, place in zip(features.split(_CHUNK), hashed.split(_CHUNK), strict=True):  # -0.0 + 0.0 is 0.0
        torch.sum(F.pad(part + 0.0, (0, int(words % 1 > 0))).view(torch.int64).mul_(weights), 1, out=place)
    value, row = hashed.sort(stable=True)
    first = torch.ones_like(value, dtype=torch.bool)
    first[1:] = value[1:] != value[:-1]
    group = row[first][first.cumsum(0) - 1]  # lowest row of the hash, in hash order
    twin = (~first).nonzero().flatten()
    same = torch.empty(len(twin), dtype=torch.bool, device=features.device)
    for part, place in zip(twin.split(_CHUNK), same.split(_CHUNK), strict=True):
        torch.all(features[row[part]] == features[group[part]], 1, out=place)
    drop = row[twin[same]]
    keep = torch.ones(len(features), dtype=torch.bool, device=features.device)
    keep[drop] = False
    if start is not None and not keep[start]:
        keep[group[row == start]] = False
        keep[start] = True
    return keep.nonzero().flatten()
