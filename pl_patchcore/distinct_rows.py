"""Rows of a bank that are equal to others: searched once, counted as often as they are there.

Reads the bank's rows ``(M, D)``, gives the distinct ones ``(U, D)`` to `exact_search.py`, and turns what it finds among
them into rows of the bank. A constant background gives thousands of equal patches, none of which a filter can rule out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pl_patchcore.numerics import k_least


class DistinctRows:
    """The distinct rows of a bank, in order of their first copies.

    Args:
        features: The bank, ``(M, D)``, finite.

    Attributes:
        features: The distinct rows, ``(U, D)``; ``features`` itself where all are distinct.
    """

    def __init__(self, features: Tensor) -> None:
        size, device = len(features), features.device
        g = torch.Generator().manual_seed(0)
        weights = torch.randint(-(2**62), 2**62, (features.shape[1],), generator=g).to(device)
        parts = (part.float() + 0.0 for part in features.split(1024))  # of -0.0, 0.0
        key = torch.cat([(part.view(torch.int32) * weights).sum(1) for part in parts])  # modulo 2^64, in any order
        copies = key.sort(stable=True).indices  # equal rows side by side, the first copy first
        new = torch.ones(size, dtype=torch.bool, device=device)
        for at in (torch.diff(key[copies]) == 0).nonzero()[:, 0].split(1024):
            new[at + 1] = (features[copies[at + 1]] != features[copies[at]]).any(1)
        first, order = copies[new].sort()
        self.features = features
        self._all = len(first) == size
        if self._all:
            return
        self.features = features[first]
        start = new.nonzero()[:, 0]
        self._size, self._copies = size, copies
        self._start = start[order]  # (U,), of a row's copies among all
        self._count = torch.diff(start, append=start.new_tensor([size]))[order]  # (U,)

    def bank_rows(self, distance: Tensor, found: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` nearest rows of the bank, ties to the lowest row.

        Args:
            distance: To the ``min(k, U)`` nearest distinct rows, ascending, ``(Q, min(k, U))``.
            found: Which ones, int64.
            k: Neighbours, at most M.

        Returns:
            Distances ``(Q, k)``, and rows of the bank, int64 ``(Q, k)``.
        """
        if self._all:
            return distance, found
        if k == 1:
            return distance, self._copies[self._start[found]]
        count = self._count[found].clamp(max=k).flatten()
        place = torch.arange(len(count), device=found.device).repeat_interleave(count)  # in ``found``, flattened
        nth = torch.arange(len(place), device=found.device) - (count.cumsum(0) - count)[place]
        rows = self._copies[self._start[found.flatten()[place]] + nth]
        query = place // found.shape[1]
        order = (query * self._size + rows).argsort()
        order = order[k_least(distance.flatten()[place[order]], query[order], len(found), k)]
        return distance.flatten()[place[order]], rows[order]
