"""Nearest neighbours in a memory bank that is dealt out: each process searches its rows for the queries of all.

For banks larger than one device. Queries ``(Q, D)`` of each process go to all, the distances that each finds come
back, and the least of them win; `memory_bank.py` calls it. Searches and fetches are collectives: every process takes
part in those of the others, and `serve`s them once its own images are done.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pl_patchcore.distributed import Processes

_DONE, _SEARCH, _FETCH = range(3)  # what a process asks for next


class SharedSearch:
    """One process's part of a bank, neighbouring rows, and what it does with the others.

    Args:
        processes: The processes.
        rows: Rows of the whole bank.

    Attributes:
        rows: Rows of the whole bank.
        own: First of this process's rows, and the one after its last.
    """

    def __init__(self, processes: Processes, rows: int) -> None:
        self.processes, self.rows = processes, rows
        each = -(-rows // processes.count)
        self.own = min(processes.rank * each, rows), min((processes.rank + 1) * each, rows)

    def search(
        self, queries: Tensor, k: int, nearest: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Find the ``k`` nearest rows of the whole bank.

        Args:
            queries: ``(Q, D)``; other processes may bring another number.
            k: Neighbours, at most ``rows``; the same on every process.
            nearest: Searches this process's rows.

        Returns:
            Distances float32 ``(Q, k)``, ascending, ties by row, and rows int64 ``(Q, k)``.
        """
        self._ask(_SEARCH, k)
        return self._search(queries, k, nearest)

    def fetch(self, rows: Tensor, features: Tensor) -> Tensor:
        """Rows of the whole bank by number ``(n,)``, float32 ``(n, D)``; ``features`` are this process's."""
        self._ask(_FETCH)
        return self._fetch(rows, features)

    def serve(self, features: Tensor, nearest: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
        """Take part in what the other processes ask for, until all are done."""
        while (asked := self._ask(_DONE))[0] != _DONE:
            if asked[0] == _SEARCH:
                self._search(features[:0].float(), asked[1], nearest)
            else:
                self._fetch(torch.empty(0, dtype=torch.int64, device=features.device), features)

    def whole(self, features: Tensor) -> Tensor:
        """The whole bank, of all processes' ``features``."""
        return torch.cat(self.processes.gather_rows(features))

    def _ask(self, what: int, k: int = 0) -> tuple[int, int]:
        told = torch.stack(self.processes.gather(torch.tensor([what, k]))).amax(0)
        return int(told[0]), int(told[1])

    def _search(
        self, queries: Tensor, k: int, nearest: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        every, mine = self._all(queries.float())
        distance = every.new_full((len(every), k), torch.inf)
        row = torch.full((len(every), k), self.rows, device=every.device)
        here = min(k, self.own[1] - self.own[0])
        if here and len(every):
            distance[:, :here], row[:, :here] = nearest(every, here)
            row[:, :here] += self.own[0]
        distance = torch.cat([part[mine] for part in self.processes.gather(distance)], 1)
        row = torch.cat([part[mine] for part in self.processes.gather(row)], 1)
        distance, order = distance.sort(dim=1, stable=True)  # ties stay in the order of rows
        return distance[:, :k], row.gather(1, order[:, :k])

    def _fetch(self, rows: Tensor, features: Tensor) -> Tensor:
        every, mine = self._all(rows)
        result = torch.zeros(len(every), features.shape[1], device=features.device)
        here = (every >= self.own[0]) & (every < self.own[1])
        result[here] = features[every[here] - self.own[0]].float()
        return self.processes.merge(result)[mine]

    def _all(self, own: Tensor) -> tuple[Tensor, slice]:
        """Rows of all processes, and where this one's stand among them."""
        parts = self.processes.gather_rows(own)
        first = sum(len(part) for part in parts[: self.processes.rank])
        return torch.cat(parts), slice(first, first + len(own))
