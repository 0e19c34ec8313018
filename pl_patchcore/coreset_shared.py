"""Greedy selection among rows that several processes hold: the rows that `coreset.py` selects, on all of them.

Each process reads its own shard ``(n, d)``, and keeps its rows' bounds and gaps as `farthest_first.py` does. A round
exchanges the few rows that can win it, hundreds of picks at a time: the processes tell their candidates (number,
gap, row), the largest gap each has left outside them, and a sample of their largest bounds, by which all part the
next round's rows from the others; process 0 picks among the candidates, and tells the picks. That is two
collectives a round and about a hundred rounds, and no process holds more than its shard, the candidates, and the
picks. Process 0 alone decides, so that machines whose arithmetic differs in a last bit still agree. Next:
`memory_bank.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pl_patchcore.coreset import CoresetMethod, Selection, selection_of
from pl_patchcore.distributed import Processes
from pl_patchcore.errors import UserError
from pl_patchcore.farthest_first import (
    CROWD,
    PICKED,
    POOL,
    SAMPLE,
    SETTLED,
    WIDER,
    FarthestFirst,
    distinct_rows,
    pick_among,
)
from pl_patchcore.numerics import full_precision

_MORE = 16  # candidates that a process tells beyond its share of the crowd


def select_shared_coreset(
    features: Tensor,
    numbers: Tensor,
    size: int,
    processes: Processes,
    method: CoresetMethod = "greedy",
    *,
    seed: int = 0,
    seconds: float | None = None,
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
        seconds: As `select_coreset`; the clock of process 0 counts.
        progress: As `select_coreset`.

    Returns:
        Numbers of the rows in order of selection, int64 on the CPU, and radii, the same on every process.

    Raises:
        UserError: On every process, if any process's features are not finite.
    """
    total = sum(int(n) for n in processes.gather(torch.tensor([len(numbers)])))
    generator = torch.Generator().manual_seed(seed)
    if method == "none":
        return Selection(torch.arange(total))
    if method == "random":
        return Selection(torch.randperm(total, generator=generator)[:size])
    own = float(torch.stack(torch.aminmax(features)).abs().max()) if len(features) else 0.0
    (largest,) = processes.largest(own)
    if not math.isfinite(largest):
        raise UserError("features hold NaN or infinity; look for a broken image or an overflow in half precision.")
    with full_precision(features.device):
        gaps = None
        if method == "approximate":
            anchors = torch.randperm(total, generator=generator)[:10]
            rows = _fetch(features, numbers, anchors, processes).double()
            distances = [torch.linalg.vector_norm(features.double() - row, dim=1) for row in rows]
            gaps = torch.stack(distances).mean(0).square()
        first = (numbers == 0).nonzero().flatten().tolist()
        rows = distinct_rows(features, first[0] if first else None) if len(features) else numbers[:0]
        scale = 2.0 ** -math.frexp(largest)[1]
        search = _SharedFarthestFirst(features, rows, scale, size + 1, numbers, processes)
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        search.begin(0, gaps)
        finished = search.run(deadline, size, progress)
    picks = search.picks[: search.count].cpu()
    return selection_of(picks, total, size, finished, None if gaps is not None else search.gaps, scale)


def _fetch(features: Tensor, numbers: Tensor, wanted: Tensor, processes: Processes) -> Tensor:
    """Rows of the numbers ``wanted``, wherever they are, on every process."""
    place = torch.searchsorted(numbers, wanted.to(numbers.device)).clamp(max=max(len(numbers) - 1, 0))
    rows = torch.zeros(len(wanted), features.shape[1], dtype=features.dtype, device=features.device)
    if len(numbers):
        mine = numbers[place] == wanted.to(numbers.device)
        rows[mine] = features[place[mine]]
    return processes.merge(rows)


class _SharedFarthestFirst(FarthestFirst):
    """As `FarthestFirst`, of one process's rows; ``picks`` are numbers among all rows."""

    widest = 2 * POOL  # fewer rounds, for each is told

    def __init__(
        self, features: Tensor, rows: Tensor, scale: float, size: int, numbers: Tensor, processes: Processes
    ) -> None:
        distinct = sum(int(n) for n in processes.gather(torch.tensor([len(rows)])))
        super().__init__(features, rows, scale, min(size, distinct), distinct)
        self.most = -(-SETTLED // processes.count)
        self.numbers, self.processes = numbers[rows], processes
        self.pick_rows = features.new_empty(self.size, features.shape[1])
        self.late = False
        self.step = max(1, min(SAMPLE, self.width // 64))
        self.largest = torch.full((WIDER * self.width // self.step + 1,), math.inf)  # of a sample of all bounds

    def begin(self, start: int, gaps: Tensor | None) -> None:
        if gaps is not None:
            super().begin(start, gaps)
            return
        own = (self.numbers == start).nonzero().flatten()
        numbers, _, rows, _, _ = self._exchange(own, 1, PICKED, 0)
        self._take(numbers, rows, [math.inf])
        self.key[own] = self.bound[own] = PICKED
        self._refresh(torch.arange(len(self.rows), device=self.rows.device))

    def _is_late(self, deadline: float) -> bool:
        self.deadline = deadline
        return self.late

    def _pool(self, width: int) -> tuple[Tensor, float]:
        """As `FarthestFirst`, by one bound for all processes, which they have told each other in the last round."""
        if width >= self.total:
            return torch.arange(len(self.rows), device=self.rows.device), PICKED
        rest = float(self.largest[width // self.step])
        return (self.bound > rest).nonzero().flatten(), rest

    def _pick(self, alive: Tensor, rest: float) -> float:
        each = -(-CROWD // self.processes.count) + _MORE
        alive, rest, limit = self._candidates(alive, rest, each)
        numbers, key, rows, rest, limit = self._exchange(alive, each, rest, limit)
        if not len(numbers):
            return rest
        answer = torch.zeros(3, 1 + len(numbers), dtype=torch.float64)  # of each: what all are told, then by row
        if self.processes.rank == 0:
            exact, ties = (rows.double() * self.scale).cpu(), int((numbers < limit).sum())
            picked, gaps, keys = pick_among(exact, key.cpu(), max(rest, 0.0), ties, self.size - self.count)
            late = self.count + len(picked) > 1 and time.monotonic() > self.deadline
            answer[:, 0] = torch.tensor([len(picked), late, max([rest, *keys.tolist()])])
            answer[0, 1 : 1 + len(picked)] = torch.tensor(picked)
            answer[1, 1 : 1 + len(picked)] = torch.tensor(gaps)
            answer[2, 1:] = keys
        answer = self.processes.broadcast(answer)
        count, late, left = answer[:, 0].tolist()
        self.late = bool(late)
        chosen = answer[0, 1 : 1 + int(count)].long().to(numbers.device)
        self._take(numbers[chosen], rows[chosen], answer[1, 1 : 1 + int(count)].tolist())
        alive = alive[self.key[alive] >= rest]
        self._know(alive, answer[2, 1:][torch.searchsorted(numbers, self.numbers[alive]).cpu()].float())
        return float(left)

    def _exchange(self, alive: Tensor, each: int, rest: float, limit: int) -> tuple[Tensor, Tensor, Tensor, float, int]:
        """Bring all processes' candidates together, at most ``each`` of one, and what `_pool` will part rows by.

        Returns:
            Numbers, keys and rows of those that no process's ``rest`` beats, by number; the largest ``rest``, and the
            ``limit`` that goes with it, as `_candidates` gives them.
        """
        columns = (self.features[self.rows[alive]], self.key[alive][:, None], self.numbers[alive][:, None])
        words = [column.contiguous().view(torch.int32) for column in columns]
        told = words[0].new_full((each, sum(word.shape[1] for word in words)), -1)
        told[: len(alive)] = torch.cat(words, 1)
        sample = self.bound[:: self.step]
        largest = sample.new_full((WIDER * self.width // self.step + 1,), PICKED)
        values = sample.topk(min(len(sample), len(largest))).values
        largest[: len(values)] = values
        head = torch.tensor([rest, limit], dtype=torch.float64).view(torch.int32).to(told.device)
        parts = (head, largest.view(torch.int32), told.flatten())
        every = torch.stack(self.processes.gather(torch.cat(parts)))  # (processes, words)
        heads, samples, rows = every.split([len(part) for part in parts], 1)
        rests, limits = _read(heads, torch.float64).unbind(1)
        rest, limit = float(rests.max()), int(limits[rests == rests.max()].min())
        self.largest = _read(samples, torch.float32).flatten().topk(len(largest)).values
        every = rows.reshape(-1, told.shape[1])
        numbers, key = _read(every[:, -2:], torch.int64)[:, 0], _read(every[:, -3], torch.float32)
        order = numbers.argsort()
        order = order[(numbers[order] >= 0) & (key[order] >= rest)]
        return numbers[order], key[order], _read(every[order, :-3], self.features.dtype), rest, limit

    def _take(self, numbers: Tensor, rows: Tensor, gaps: list[float]) -> None:
        """Add picks, by number and row."""
        self.gaps.append(torch.tensor(gaps, dtype=torch.float32))
        part = slice(self.count, self.count + len(numbers))
        self.picks[part], self.pick_rows[part] = numbers, rows
        self.pick_near[part] = self.products.right(rows.double() * self.scale - self.mean)
        self.count = part.stop

    def _exact_picks(self, numbers: Tensor) -> Tensor:
        return self.pick_rows[numbers].double() * self.scale


def _read(words: Tensor, dtype: torch.dtype) -> Tensor:
    return words.clone(memory_format=torch.contiguous_format).view(dtype)
