"""Greedy selection among rows that several processes hold: the rows that one process would select, on all of them.

Each process reads its own shard ``(n, d)``, and keeps bounds and gaps of its rows as `farthest_first.py` does. In each
round the processes exchange the few rows that can win it. They tell process 0 their candidates (number, gap, row), the
largest gap that each has left outside them, and a sample of their largest bounds. Process 0 picks among the candidates,
some hundred times, and answers with the picks, the candidates' new gaps, and the largest bounds of all, which tell
where to cut the next pool. That is two collectives a round and about a hundred rounds, and no process holds more than
its shard, the candidates and the picks. Process 0 alone decides, so that machines whose arithmetic differs in a last
bit still agree. Numbers travel as float64, which holds each of them exactly. Next: `memory_bank.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pl_patchcore.coreset import CoresetMethod, Selection, mean_gaps
from pl_patchcore.coreset.farthest_first import (
    CANDIDATES,
    PICKED,
    POOL_GROWTH,
    SETTLED_ROWS,
    FarthestFirst,
    distinct_rows,
    pick_among,
    scale_of,
)
from pl_patchcore.distributed import Processes
from pl_patchcore.numerics import full_precision

_SAMPLED_BOUNDS = 128  # bounds, evenly spread, of as many rows as the first pool has


def select_shared_coreset(
    features: Tensor,
    numbers: Tensor,
    size: int,
    processes: Processes,
    method: CoresetMethod = "greedy",
    *,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Selection:
    """As `select_coreset`, of rows that are spread over processes; every process calls it.

    Args:
        features: (Projected) patch features of this process, ``(n, d)``; ``(0, d)`` where it has none.
        numbers: Number of each row among the rows of all processes, int64 ``(n,)``, ascending; all together they are
            0 to N - 1.
        size: Rows to keep, ``1 <= size <= N``, in all; ignored by ``none``.
        processes: The processes.
        method: As `select_coreset`.
        seed: As `select_coreset`.
        progress: As `select_coreset`.

    Returns:
        Numbers of the rows in order of selection, int64 on the CPU, and radii, the same on every process.

    Raises:
        UserError: On every process, if any process's features are not finite.
    """
    total, device = _sum(len(numbers), processes), features.device
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    if method in ("random", "none"):
        return Selection(order[:size] if method == "random" else torch.arange(total))
    own = float(torch.stack(torch.aminmax(features)).abs().max()) if len(features) else 0.0
    scale = scale_of(*processes.largest(own))
    with full_precision(device):
        gaps = None
        if method == "approximate":
            gaps = mean_gaps(features, rows_of_all(features.__getitem__, numbers, order[:10], processes))
        rows = distinct_rows(features) if len(features) else torch.empty(0, dtype=torch.int64, device=device)
        search = _SharedFarthestFirst(features, rows, scale, size + 1, numbers.to(device), processes)
        search.begin(0, gaps)
        search.run(size, progress)
    picks, radii = search.selection(size, total)
    return Selection(picks.cpu(), radii)


def rows_of_all(
    read: Callable[[Tensor], Tensor], numbers: Tensor, wanted: Tensor, processes: Processes
) -> Tensor:
    """Rows by their numbers, whichever process holds them, on every process; each calls it.

    Args:
        read: From places in ``numbers`` to this process's rows, float32 or float64 ``(p, d)``.
        numbers: Numbers of its rows, int64 ``(n,)``, ascending.
        wanted: Numbers, int64 ``(m,)``, the same on all processes.
        processes: The processes.
    """
    place, mine = places_of(numbers, wanted.to(numbers.device))
    rows = read(place)
    found = rows.new_zeros(len(wanted), rows.shape[1])
    found[mine] = rows
    return processes.merge(found)


def places_of(numbers: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Places in ``numbers``, ascending, of those of ``wanted`` that are there; and which these are, bool."""
    place = torch.searchsorted(numbers, wanted)
    mine = torch.cat([numbers, numbers.new_tensor([-1])])[place] == wanted
    return place[mine], mine


def _sum(value: int, processes: Processes) -> int:
    return sum(int(n) for n in processes.gather(torch.tensor([value], dtype=torch.int64)))


class _SharedFarthestFirst(FarthestFirst):
    """As `FarthestFirst`, of one process's rows, which have ``numbers``; ``picks`` are the same on all processes."""

    least_pool = 2 * FarthestFirst.least_pool  # fewer rounds, for each waits for the slowest process

    def __init__(
        self, features: Tensor, rows: Tensor, scale: float, size: int, numbers: Tensor, processes: Processes
    ) -> None:
        distinct = _sum(len(rows), processes)
        super().__init__(features, rows, scale, min(size, distinct), distinct)
        self.numbers, self.processes = numbers[rows], processes
        self.settled_rows = -(-SETTLED_ROWS // processes.count)
        self.shard_candidates = -(-CANDIDATES // processes.count) + 16  # some more, for shards differ
        self.pick_rows = features.new_empty(self.size, features.shape[1])
        self.step = max(1, self.least_pool // _SAMPLED_BOUNDS)  # one bound of so many is told
        self.largest = torch.full((self.told_bounds,), math.inf, dtype=torch.float64, device=features.device)

    @property
    def told_bounds(self) -> int:
        """How many of the largest bounds are told, so that the next pool can have all the rows that it may have."""
        return POOL_GROWTH * self.pool_rows // self.step + 1

    def begin(self, start: int, gaps: Tensor | None) -> None:
        """As `FarthestFirst`; ``gaps`` are of this process's rows."""
        if gaps is not None:
            super().begin(start, gaps)
            return
        first = torch.tensor([start], dtype=torch.int64, device=self.numbers.device)
        row = rows_of_all(lambda place: self.exact(self.rows[place]), self.numbers, first, self.processes)
        self.add(first, row, [math.inf])
        own, _ = places_of(self.numbers, first)
        self.gap[own] = self.bound[own] = PICKED
        self.refresh(torch.arange(len(self.rows), device=self.rows.device))

    def pool(self) -> tuple[Tensor, float]:
        """As `FarthestFirst`, cut by one bound for all processes, which process 0 told in the last round."""
        if self.pool_rows >= self.total:
            return torch.arange(len(self.rows), device=self.rows.device), PICKED
        rest = float(self.largest[self.pool_rows // self.step])
        return (self.bound > rest).nonzero().flatten(), rest

    def pick(self, alive: Tensor, rest: float) -> float:
        """As `FarthestFirst`, among the candidates of all processes."""
        alive, rest, limit = self.candidates(alive, rest, self.shard_candidates)
        sample = self.bound[:: self.step]
        largest = torch.full((self.told_bounds,), PICKED, dtype=torch.float64, device=sample.device)
        values = sample.topk(min(len(sample), len(largest))).values
        largest[: len(values)] = values
        d = self.features.shape[1]
        candidates = torch.full((self.shard_candidates, 2 + d), -1, dtype=torch.float64, device=sample.device)
        columns = (self.numbers[alive, None], self.gap[alive, None], self.features[self.rows[alive]])
        candidates[: len(alive)] = torch.cat([column.double() for column in columns], 1)  # number, gap, row
        told = torch.cat([largest.new_tensor([rest, limit]), largest, candidates.flatten()])
        shards = self.processes.gather_at_first(told)
        most = self.shard_candidates * self.processes.count
        lengths = [2, len(largest), most, most * (2 + d)]
        answer = told.new_zeros(sum(lengths)) if shards is None else self.answer(torch.stack(shards), len(largest))
        (count, left), self.largest, gaps, picks = self.processes.broadcast(answer).split(lengths)
        picks = picks.view(most, 2 + d)[: int(count)]
        self.add(picks[:, 0].long(), picks[:, 2:] * self.scale, picks[:, 1].tolist())
        own = gaps.view(-1, self.shard_candidates)[self.processes.rank, : len(alive)]
        entered = ~own.isnan()
        self.set_gaps(alive[entered], own[entered].float())
        return float(left)

    def answer(self, shards: Tensor, bounds: int) -> Tensor:
        """What process 0 answers to what all have told, ``(processes, numbers)``.

        Returns:
            Number of picks and the largest gap left; the largest bounds of all; the new gaps of all candidates, in the
            order told (NaN: another row beats it); the picks, padded to as many. Float64.
        """
        heads, largest, rows = shards.split([2, bounds, shards.shape[1] - 2 - bounds], 1)
        rests, limits = heads.unbind(1)
        rest, limit = float(rests.max()), int(limits[rests == rests.max()].min())
        candidates = rows.reshape(self.processes.count * self.shard_candidates, -1)
        numbers, gaps = candidates[:, 0], candidates[:, 1].float()
        order = numbers.argsort()
        order = order[(numbers[order] >= 0) & (gaps[order] >= rest)]
        ties, most = int((numbers[order] < limit).sum()), self.size - self.count
        exact = (candidates[order, 2:] * self.scale).cpu()
        chosen, pick_gaps, gap = pick_among(exact, gaps[order].cpu(), max(rest, 0.0), ties, most)
        gaps.fill_(torch.nan)[order] = gap.to(gaps.device)
        picks = torch.zeros_like(candidates)
        picks[: len(chosen)] = candidates[order[torch.tensor(chosen, dtype=torch.int64, device=order.device)]]
        picks[: len(chosen), 1] = picks.new_tensor(pick_gaps)
        head = picks.new_tensor([len(chosen), max([rest, *gap.tolist()])])
        return torch.cat([head, largest.flatten().topk(bounds).values, gaps.double(), picks.flatten()])

    def add(self, numbers: Tensor, exact: Tensor, gaps: list[float]) -> None:
        """As `FarthestFirst`; also keep the rows, which may be another process's."""
        self.pick_rows[self.count : self.count + len(numbers)] = exact / self.scale
        super().add(numbers, exact, gaps)

    def exact_picks(self, places: Tensor) -> Tensor:
        """As `FarthestFirst`."""
        return self.pick_rows[places].double() * self.scale
