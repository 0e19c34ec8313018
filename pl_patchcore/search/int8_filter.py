"""A filter of exact search: a product of small integers rules out most rows of a bank. Next: `memory_bank.py`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_MOST_COMPONENTS = 255  # principal ones; with the length of the rest, a multiple of what processors multiply at once


class Int8Filter:
    """Coordinates of a bank's centred rows float32 ``(M, D)`` in int8.

    They are the first principal components and the length of what these leave out, so distances in them never exceed
    the true ones (triangle inequality). A random rotation spreads heavy tails over all of them, so that one step size
    suits all. Rounding moves a row by a length that is computed, so a row can be the nearest only if its rounded
    distance is at most the true distance of the row proposed, plus both lengths.
    """

    def __init__(self, rows: Tensor, length: int) -> None:
        sample, g = rows[:: max(1, len(rows) // 2048)], torch.Generator().manual_seed(0)
        axes = torch.randn(rows.shape[1], min(rows.shape[1], _MOST_COMPONENTS), generator=g, dtype=torch.float32)
        for _ in range(2):  # a randomised range finder: any orthonormal axes will do
            axes = torch.linalg.qr(sample.T @ (sample @ axes)).Q
        turn = torch.randn(axes.shape[1], axes.shape[1], generator=g, dtype=torch.float64)
        self.axes, self.step = torch.linalg.qr(axes.double() @ turn).Q, 1.0
        exact = torch.cat([self._coordinates(part) for part in rows.split(4096)])  # (M, K + 1)
        self.left_out = float(exact[:, -1].square().sum() / exact.square().sum().clamp(min=1e-300))
        self.step = float(exact.abs().max()) / 127 or 1.0
        rounded = exact.div_(self.step).round()
        self.moved = float(torch.linalg.vector_norm(exact - rounded, dim=1).max())  # steps
        fill = length - len(rows)  # rows that lose against all others
        self.rows = F.pad(rounded.to(torch.int8), (0, -exact.shape[1] % 8, 0, fill))
        self.minus_half = F.pad(-(rounded.square().sum(1) / 2).int(), (0, fill), value=-(1 << 30))

    def _coordinates(self, centred: Tensor) -> Tensor:
        """Float64 ``(Q, K + 1)``, in steps."""
        wide = centred.double()
        flat = wide @ self.axes
        rest = wide.square().sum(1, keepdim=True) - flat.square().sum(1, keepdim=True)
        return torch.cat([flat, rest.clamp(min=0).sqrt()], 1).div_(self.step)

    def scores(self, centred: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Half of (a query's squared length - its squared distance) for ``size`` rows, of rounded coordinates: int32.

        Also the queries' squared lengths and how far rounding has moved them, in steps, float64 ``(Q, 1)``.
        """
        exact = self._coordinates(centred)
        times = (exact.abs().amax(1, keepdim=True) / 127).ceil().clamp(1, 64)  # far queries; scores stay within 2^30
        rounded = (exact / times).round_().clamp_(-127, 127)
        padded = F.pad(rounded.to(torch.int8), (0, self.rows.shape[1] - exact.shape[1]))
        scores = torch._int_mm(padded, self.rows[:size].T)  # the only one with int32 sums, hence the underscore
        torch.addcmul(self.minus_half[:size], scores, times.int(), out=scores)
        moved: Tensor = torch.linalg.vector_norm(exact - rounded.mul_(times), dim=1, keepdim=True)
        return scores, rounded.square().sum(1, keepdim=True), moved
