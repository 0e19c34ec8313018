"""Greedy selection among rows that several processes hold: the rows that one process would select, on all of them.

Each process reads its own shard ``(n, d)``, and keeps bounds and gaps of its rows as `farthest_first.py` does. In each
round the processes exchange the few rows that can win it: they tell process 0 their candidates (number, gap, row) and
the largest gap that each has left outside them; process 0 picks among the candidates, some hundred times, and answers
with the picks and the candidates' new gaps. That is two collectives a round and about a hundred rounds, and no process
holds more than its shard, the candidates and the picks. Process 0 alone decides, so that machines whose arithmetic
differs in a last bit still agree. All travels as float64, which holds each number exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pl_patchcore.coreset import Selection, mean_gaps
from pl_patchcore.coreset.farthest_first import CANDIDATES, FarthestFirst, Progress, pick_among
from pl_patchcore.distributed import Processes
from pl_patchcore.numerics import full_precision

_AT_ONCE = 1 << 12  # rows that `rows_of_all` sends at a time


def select_shared_coreset(
    features: Tensor,
    numbers: Tensor,
    size: int,
    processes: Processes,
    method: Literal["greedy", "approximate"] = "greedy",
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Selection:
    """As `select_coreset`, of rows that are spread over processes; every process calls it.

    Args:
        features: (Projected) patch features of this process, ``(n, d)``; ``(0, d)`` where it has none.
        numbers: Number of each row, int64 ``(n,)``, ascending; all processes' together are 0 to N - 1.
        size: Rows to keep, in all.
        processes: The processes.
        method: As `select_coreset`; the others need no features, and draw the same on every process.
        seed: As there.
        progress: As there.

    Returns:
        Numbers of the rows in order of selection, int64 on the CPU, and radii, the same on every process.
    """
    with full_precision(features.device):
        search, gaps = _SharedFarthestFirst(features, size, numbers.to(features.device), processes), None
        if method == "approximate":
            order = torch.randperm(search.all_rows, generator=torch.Generator().manual_seed(seed))
            gaps = mean_gaps(features, rows_of_all(features.__getitem__, numbers, order[:10], processes))
        picks, radii = search.select(gaps, progress)
    return Selection(picks.cpu(), radii)


def rows_of_all(read: Callable[[Tensor], Tensor], numbers: Tensor, wanted: Tensor, processes: Processes) -> Tensor:
    """Rows of the numbers ``wanted``, int64 ``(m,)``, whichever process holds them; every process calls it.

    ``read`` gives this process's rows ``(p, d)`` by places in ``numbers``, int64 ``(n,)``, the ascending numbers of its
    rows.
    """
    ended, found = torch.cat([numbers, numbers.new_tensor([-1])]), []
    for some in wanted.to(numbers.device).split(_AT_ONCE):
        place = torch.searchsorted(ended[:-1], some)
        mine = ended[place] == some
        own = read(place[mine])
        parts = processes.objects((mine.nonzero().flatten().cpu(), own.cpu()))
        positions, rows = (torch.cat(each) for each in zip(*parts, strict=True))
        found.append(rows[positions.argsort()].to(own.device))
    return torch.cat(found)


class _SharedFarthestFirst(FarthestFirst):
    """As `FarthestFirst`, of one process's rows, which have ``numbers``; ``picks`` are the same on all processes."""

    least_pool = 2 * FarthestFirst.least_pool  # fewer rounds, for each waits for the slowest process

    def __init__(self, features: Tensor, size: int, numbers: Tensor, processes: Processes) -> None:
        super().__init__(features, size, processes)
        self.numbers = numbers[self.rows]
        self.most = -(-CANDIDATES // processes.count) + 16  # candidates of a shard: some more, for shards differ
        self.pick_rows = features.new_empty(self.size, features.shape[1])

    def exact_of(self, numbers: Tensor) -> Tensor:
        """As `FarthestFirst`."""
        return rows_of_all(lambda place: self.exact(self.rows[place]), self.numbers, numbers, self.processes)

    def pick(self, alive: Tensor, rest: float) -> float:
        """As `FarthestFirst`, among the candidates of all processes."""
        alive, rest, limit = self.candidates(alive, rest, self.most)
        columns = (self.numbers[alive, None], self.gap[alive, None], self.features[self.rows[alive]])
        own = torch.cat([column.double() for column in columns], 1)  # number, gap, row
        told = torch.full((1 + self.most, own.shape[1]), -1, dtype=torch.float64, device=own.device)
        told[0, :2], told[1 : 1 + len(own)] = own.new_tensor([rest, limit]), own
        shards = self.processes.gather_at_first(told)
        answer = told.new_zeros(1 + self.processes.count * self.most, 1 + told.shape[1])
        if shards is not None:
            self.answer(torch.stack(shards), answer)
        answer = self.processes.broadcast(answer)
        picks = answer[1 : 1 + int(answer[0, 0]), 1:]
        self.add(picks[:, 0].long(), picks[:, 2:] * self.scale, picks[:, 1].tolist())
        gaps = answer[1:, 0].view(-1, self.most)[self.processes.rank, : len(alive)]
        entered = ~gaps.isnan()
        self.set_gaps(alive[entered], gaps[entered].float())
        return float(answer[0, 1])

    def answer(self, shards: Tensor, answer: Tensor) -> None:
        """Write what process 0 answers to what all have told, ``(processes, 1 + candidates, 2 + d)``.

        In the first row the number of picks and the largest gap left; below, in the first column the new gaps of all
        candidates, in the order told (NaN: another row beats it), and beside it the picks: number, gap, row.
        """
        rest = float(shards[:, 0, 0].max())
        limit = int(shards[:, 0, 1][shards[:, 0, 0] == rest].min())
        candidates = shards[:, 1:].flatten(0, 1)
        numbers, gaps = candidates[:, 0], candidates[:, 1].float()
        order = numbers.argsort()
        order = order[(numbers[order] >= 0) & (gaps[order] >= rest)]
        exact, ties = candidates[order, 2:] * self.scale, int((numbers[order] < limit).sum())
        picked, pick_gaps, gap = pick_among(exact, gaps[order], rest, ties, self.size - self.count)
        answer[0, 0], answer[0, 1] = len(picked), max([rest, *gap.tolist()])
        answer[1:, 0] = torch.nan
        answer[1 + order, 0] = gap.double()
        answer[1 : 1 + len(picked), 1:] = candidates[order[picked]]
        answer[1 : 1 + len(picked), 2] = answer.new_tensor(pick_gaps)

    def add(self, numbers: Tensor, exact: Tensor, gaps: list[float]) -> None:
        """As `FarthestFirst`; also keep the rows, which may be another process's."""
        self.pick_rows[self.count : self.count + len(numbers)] = exact / self.scale
        super().add(numbers, exact, gaps)

    def exact_picks(self, places: Tensor) -> Tensor:
        """As `FarthestFirst`."""
        return self.pick_rows[places].double() * self.scale
