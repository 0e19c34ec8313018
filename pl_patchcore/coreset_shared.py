"""Greedy selection among rows that several processes hold: the rows that `coreset.py` selects, on all of them.

Each process reads its own shard ``(n, d)``, and keeps its rows' bounds and gaps as `farthest_first.py` does. A round
exchanges the few rows that can win it, hundreds of picks at a time: the processes tell process 0 their candidates
(row, gap, number), the largest gap each has left outside them, and a sample of their largest bounds; process 0 picks
among the candidates, and answers with the picks, the candidates' new gaps, and the largest bounds of all, by which
the next round's rows are parted from the others. That is two collectives a round and about a hundred rounds, and no
process holds more than its shard, the candidates, and the picks. Process 0 alone decides, so that machines whose
arithmetic differs in a last bit still agree. Next: `memory_bank.py`.
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
    SETTLED,
    WIDER,
    FarthestFirst,
    distinct_rows,
    pick_among,
)
from pl_patchcore.numerics import full_precision

_HEAD = 6  # int32 words of three float64 numbers
_SAMPLES = 128  # bounds that tell where to part as many rows as the first round has
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
        self.step = max(1, self.width // _SAMPLES)
        self.largest = features.new_full((self._samples,), math.inf, dtype=torch.float32)  # bounds of all

    def begin(self, start: int, gaps: Tensor | None) -> None:
        if gaps is not None:
            super().begin(start, gaps)
            return
        own = (self.numbers == start).nonzero().flatten()
        first = torch.tensor([start])
        row = _fetch(self.features[self.rows[own]], self.numbers[own], first, self.processes)
        self._take(first, row, [math.inf])
        self.key[own] = self.bound[own] = PICKED
        self._refresh(torch.arange(len(self.rows), device=self.rows.device))

    @property
    def _samples(self) -> int:
        """How many of the largest bounds are told, so that the next round can be as wide as it may."""
        return WIDER * self.width // self.step + 1

    def _is_late(self, deadline: float) -> bool:
        self.deadline = deadline
        return self.late

    def _pool(self, width: int) -> tuple[Tensor, float]:
        """As `FarthestFirst`, by one bound for all processes, which process 0 told in the last round."""
        if width >= self.total:
            return torch.arange(len(self.rows), device=self.rows.device), PICKED
        rest = float(self.largest[width // self.step])
        return (self.bound > rest).nonzero().flatten(), rest

    def _pick(self, alive: Tensor, rest: float) -> float:
        each = -(-CROWD // self.processes.count) + _MORE
        alive, rest, limit = self._candidates(alive, rest, each)
        candidates = self._words(alive, each)
        most = each * self.processes.count
        lengths = [_HEAD, self._samples, most, most * candidates.shape[1]]
        every = self.processes.gather_at_first(torch.cat([self._told(rest, limit), candidates.flatten()]))
        answer = candidates.new_zeros(sum(lengths))
        if every is not None:
            part = self._answer(torch.stack(every), most)
            answer[: len(part)] = part
        head, largest, keys, picks = self.processes.broadcast(answer).split(lengths)
        count, late, left = _read(head, torch.float64).tolist()
        numbers, gaps, rows = self._read_words(picks.view(most, -1)[: int(count)])
        self._take(numbers, rows, gaps.tolist())
        self.late, self.largest = bool(late), _read(largest, torch.float32)
        key = _read(keys.view(-1, each)[self.processes.rank, : len(alive)], torch.float32)
        entered = ~key.isnan()
        self._know(alive[entered], key[entered])
        return float(left)

    def _answer(self, told: Tensor, most: int) -> Tensor:
        """What process 0 answers to what all have told, ``(processes, words)``.

        Number of picks, whether time is up, and the largest gap left; the largest bounds of all; the keys of ``most``
        candidates, in the order told, NaN where another row beats them; and the picks.
        """
        heads, largest, words = told.split([_HEAD, self._samples, told.shape[1] - _HEAD - self._samples], 1)
        rests, limits, _ = _read(heads, torch.float64).unbind(1)
        rest, limit = float(rests.max()), int(limits[rests == rests.max()].min())
        words = words.reshape(most, -1)
        numbers, keys, _ = self._read_words(words)
        order = numbers.argsort()
        order = order[(numbers[order] >= 0) & (keys[order] >= rest)]
        exact, ties = self._read_words(words[order])[2].double() * self.scale, int((numbers[order] < limit).sum())
        floor, wanted = max(rest, 0.0), self.size - self.count
        chosen, gaps, key = pick_among(exact.cpu(), keys[order].cpu(), floor, ties, wanted)
        late = self.count + len(chosen) > 1 and time.monotonic() > self.deadline
        head = torch.tensor([len(chosen), late, max([rest, *key.tolist()])], dtype=torch.float64)
        largest = _read(largest, torch.float32).flatten().topk(self._samples).values
        keys.fill_(torch.nan)[order] = key.to(keys.device)
        picks = words[order[torch.tensor(chosen, dtype=torch.int64, device=order.device)]]
        picks[:, -3] = torch.tensor(gaps, dtype=torch.float32).view(torch.int32).to(picks.device)
        head = head.view(torch.int32).to(picks.device)
        return torch.cat([head, largest.view(torch.int32), keys.view(torch.int32), picks.flatten()])

    def _told(self, rest: float, limit: int) -> Tensor:
        """``rest`` and ``limit``, as `_candidates` gives them, and a sample of the largest bounds, as int32."""
        sample = self.bound[:: self.step]
        largest = sample.new_full((self._samples,), PICKED)
        values = sample.topk(min(len(sample), len(largest))).values
        largest[: len(values)] = values
        head = torch.tensor([rest, limit, 0], dtype=torch.float64).view(torch.int32)
        return torch.cat([head.to(largest.device), largest.view(torch.int32)])

    def _words(self, alive: Tensor, length: int) -> Tensor:
        """Row, key and number of each candidate, as int32; ``length`` of them, the last ones of number -1."""
        columns = (self.features[self.rows[alive]], self.key[alive][:, None], self.numbers[alive][:, None])
        words = torch.cat([column.contiguous().view(torch.int32) for column in columns], 1)
        padded = words.new_full((length, words.shape[1]), -1)
        padded[: len(words)] = words
        return padded

    def _read_words(self, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers, keys and rows of `_words`."""
        numbers = _read(words[:, -2:], torch.int64)[:, 0]
        return numbers, _read(words[:, -3], torch.float32), _read(words[:, :-3], self.features.dtype)

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
