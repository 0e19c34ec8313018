"""Greedy selection among rows that several processes hold: the rows that `coreset.py` selects, on all of them.

Each process reads its own shard ``(n, d)``, and keeps its rows' bounds and gaps as `coreset.py` does. A round
exchanges the few rows that can win it, hundreds of picks at a time: the processes tell the largest gap each has left
outside its candidates, then the candidates (number, gap, row); process 0 picks among all of them, and tells the
picks. That is three collectives a round and about a hundred rounds, and no process holds more than its shard, the
candidates, and the picks. Process 0 alone decides, so that machines whose arithmetic differs in a last bit still
agree. Next: `memory_bank.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pl_patchcore.coreset import (
    _CROWD,
    _PICKED,
    CoresetMethod,
    Selection,
    _distinct_rows,
    _farthest_first,
    _Greedy,
    _selection,
)
from pl_patchcore.distributed import Processes
from pl_patchcore.errors import UserError
from pl_patchcore.numerics import full_precision


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
        rows = _distinct_rows(features, first[0] if first else None) if len(features) else numbers[:0]
        scale = 2.0 ** -math.frexp(largest)[1]
        search = _SharedGreedy(features, rows, scale, size + 1, numbers, processes)
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        search.begin(0, gaps)
        finished = search.run(deadline, size, progress)
    picks = search.picks[: search.count].cpu()
    return _selection(picks, total, size, finished, None if gaps is not None else search.gaps, scale)


def _fetch(features: Tensor, numbers: Tensor, wanted: Tensor, processes: Processes) -> Tensor:
    """Rows of the numbers ``wanted``, wherever they are, on every process."""
    place = torch.searchsorted(numbers, wanted.to(numbers.device)).clamp(max=max(len(numbers) - 1, 0))
    rows = torch.zeros(len(wanted), features.shape[1], dtype=features.dtype, device=features.device)
    if len(numbers):
        mine = numbers[place] == wanted.to(numbers.device)
        rows[mine] = features[place[mine]]
    return processes.merge(rows)


class _SharedGreedy(_Greedy):
    """As `_Greedy`, of one process's rows; ``picks`` are numbers among all rows."""

    def __init__(
        self, features: Tensor, rows: Tensor, scale: float, size: int, numbers: Tensor, processes: Processes
    ) -> None:
        self.numbers, self.processes = numbers[rows], processes  # by position, as bound and key are
        distinct = sum(int(n) for n in processes.gather(torch.tensor([len(rows)])))
        super().__init__(features, rows, scale, min(size, distinct))
        self.pick_rows = features.new_empty(self.size, features.shape[1])
        self.late = False

    def begin(self, start: int, gaps: Tensor | None) -> None:
        if gaps is not None:
            super().begin(start, gaps)
            return
        own = (self.numbers == start).nonzero().flatten()
        numbers, _, rows = self._exchange(own, 1)
        self._take(numbers, rows, [math.inf])
        self.key[own] = self.bound[own] = _PICKED
        self._refresh(torch.arange(len(self.rows), device=self.rows.device))

    def _is_late(self, deadline: float) -> bool:
        self.deadline = deadline
        return self.late

    def _pick(self, alive: Tensor, rest: float) -> float:
        most = self.size - self.count
        if len(alive) > _CROWD:
            values, order = self.key[alive].topk(_CROWD + 1)
            if values[0] > values[-1]:
                alive, rest = alive[order[:-1]], max(rest, float(values[-1]))
            else:
                most = min(most, 64)
        told = torch.stack(self.processes.gather(torch.tensor([rest, len(alive), most], dtype=torch.float64)))
        rest, largest, most = float(told[:, 0].max()), int(told[:, 1].max()), int(told[:, 2].min())
        alive = alive[self.key[alive] > rest]
        if not largest:
            return rest
        numbers, key, rows = self._exchange(alive, largest)
        if not len(numbers):
            return rest
        answer = torch.zeros(3 + 4 * len(numbers), dtype=torch.float64)
        if self.processes.rank == 0:
            exact = (rows.double() * self.scale).cpu().numpy()
            picked, lowered, key_after, new_after = _farthest_first(exact, key.cpu().numpy(), max(rest, 0.0), most)
            left = max(rest, float(key_after.max(initial=_PICKED)))
            late = self.count + len(picked) > 1 and time.monotonic() > self.deadline
            answer[:3] = torch.tensor([len(picked), late, left])
            answer[3:] = torch.from_numpy(
                np.concatenate([_fill(picked, len(numbers)), _fill(lowered, len(numbers)), key_after, new_after])
            )
        answer = self.processes.broadcast(answer)
        chosen, gaps, keys, new = answer[3:].view(4, -1)
        count, self.late = int(answer[0]), bool(answer[1])
        place = torch.searchsorted(numbers, self.numbers[alive]).cpu()
        self._write(alive, keys[place].float().numpy(), new[place].long().numpy())
        chosen = chosen[:count].long().to(numbers.device)
        self._take(numbers[chosen], rows[chosen], gaps[:count].tolist())
        return float(answer[2])

    def _exchange(self, alive: Tensor, largest: int) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers, keys and rows of all processes' ``alive``, at most ``largest`` of each, sorted by number."""
        numbers, rows = self.numbers[alive], self.features[self.rows[alive]].contiguous()
        packed = torch.cat([_bytes(numbers), _bytes(self.key[alive]), _bytes(rows)], 1)
        padded = packed.new_full((largest, packed.shape[1]), 255)  # number -1
        padded[: len(packed)] = packed
        all_packed = torch.cat(self.processes.gather(padded))
        numbers = _read(all_packed[:, :8], torch.int64)[:, 0]
        order = numbers.argsort()
        order = order[numbers[order] >= 0]
        key = _read(all_packed[order, 8:12], torch.float32)[:, 0]
        return numbers[order], key, _read(all_packed[order, 12:], rows.dtype)

    def _take(self, numbers: Tensor, rows: Tensor, gaps: list[float]) -> None:
        """Add picks, by number and row."""
        self.gaps.append(torch.tensor(gaps, dtype=torch.float32))
        part = slice(self.count, self.count + len(numbers))
        self.picks[part], self.pick_rows[part] = numbers, rows
        self.pick_near[part] = self.products.right(rows.double() * self.scale - self.mean)
        self.count = part.stop

    def _exact_picks(self, numbers: Tensor) -> Tensor:
        return self.pick_rows[numbers].double() * self.scale


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1, 1).view(torch.uint8) if tensor.ndim == 1 else tensor.view(torch.uint8)


def _read(packed: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.flatten().clone().view(dtype).view(len(packed), packed.shape[1] // dtype.itemsize)


def _fill(values: list[int] | list[float], length: int) -> np.ndarray:
    return np.pad(np.asarray(values, np.float64), (0, length - len(values)))
