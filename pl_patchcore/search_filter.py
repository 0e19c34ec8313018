"""Filters of exact search: a product of coordinates, fewer or rounded, that rules out most rows of a bank.

Reads centred queries ``(Q, D)`` and a bank's centred rows ``(M, D)``, returns scores of all pairs and the least one
that a row no farther than a given distance can have; `exact_search.py` computes the distances of those above it.

The coordinates are those of the first K principal components and, as one more, the length of what these leave out.
Distances in them never exceed the true ones (triangle inequality, once more for the lengths). Where K is not far below
D, components would cost more than they save, and leave out what tells rows apart: the coordinates are then those of
the centred rows themselves. ``pca`` multiplies them in float32, ``bf16`` and ``int8`` rounded; a rounded distance is
off by at most the lengths of what rounding took from the two rows, which are computed. So a row can be the nearest
only if its rounded distance is at most the true distance of the best row proposed, plus both lengths.

For int8 the components are rotated at random, which spreads heavy tails over all of them: one step size then suits
them all, and int32 holds the product without error. Queries that reach farther than the bank, as defects do, take a
second digit, and so a second product, of the same step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pl_patchcore.numerics import product_slack, shifted_product

_LEFT_OUT = 0.04  # share of the variance that the principal components may leave out
_TURN = 8  # a product with D x K in float64 takes as long as a rounded one with this many times D rows
_INEXACT = 2.0**-18  # of a row's length: bounds centring, projection in float64, and rounding coordinates to float32
_DIGITS = 3  # bf16 numbers that hold a float32 one
_MOST = 1 << 29  # of a product in int32; rows that only fill up lie at -2^30
_LARGEST = 127  # of int8 ...
_LARGEST_16 = 79  # ... and where a sum of two products has 16 bits: (79 + 128) x 79 x 2 fits
_PART = 128  # queries that take a second product at once, so that memory for it is not new each time


def _largest(device: torch.device) -> int:
    """Largest int8 number that products are exact with: oneDNN shifts one factor by 128, and without VNNI saturates."""
    full = torch.full((24, 24), _LARGEST, dtype=torch.int8, device=device)
    exact = bool((torch._int_mm(full, full.T) == len(full) * _LARGEST**2).all())
    return _LARGEST if exact else _LARGEST_16


class Axes:
    """Principal components of a bank, rotated at random, and the length of what they leave out.

    Args:
        near: The bank's centred rows, float32 ``(M, D)``.

    Attributes:
        basis: The components, float64 ``(D, K)``; None where the rows themselves serve better.
        tail: Mean length of what they leave out.
    """

    basis: Tensor | None = None
    tail = 0.0

    def __init__(self, near: Tensor) -> None:
        size, dimension = near.shape
        sample = near[:: max(1, size // 8192)]
        try:
            energy, axes = torch.linalg.eigh((sample.T @ sample).cpu())  # any orthonormal axes will do, hence float32
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # seen of few rows that are mostly 0, ...
            return
        if not torch.isfinite(axes).all():  # ... and this too
            return
        left_out = 1 - energy.flip(0).cumsum(0) / energy.sum().clamp(min=1e-30)
        count = min(dimension, 64 * (int((left_out > _LEFT_OUT).sum()) // 64 + 1) - _DIGITS - 1)
        if count * (size + _TURN * dimension) > size * dimension:
            return
        turn = torch.randn(count, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.basis = torch.linalg.qr(axes.flip(1)[:, :count].double() @ turn).Q.to(near.device)  # (D, K)
        self.tail = float(self(sample)[:, -1].mean())

    def __call__(self, rows: Tensor) -> Tensor:
        """Coordinates, float64 ``(Q, K + 1)``, or ``(Q, D)`` where there is no basis, of centred rows ``(Q, D)``."""
        wide = rows.double()
        if self.basis is None:
            return wide
        flat = wide @ self.basis
        tail = (wide.square().sum(1) - flat.square().sum(1)).clamp(min=0).sqrt()
        return torch.cat([flat, tail[:, None] - self.tail], 1)


class Filter:
    """Scores of all rows of the bank by a product of coordinates: float32 (``pca``), or rounded to bf16 or int8.

    A score is half of (the query's squared length - the squared distance), in rounded coordinates.

    Args:
        way: ``pca``, ``bf16`` or ``int8``.
        axes: What gives the coordinates.
        exact: Coordinates of the bank's rows, float64 ``(M, K + 1)``.
        length: Number of rows that scores are given of, M' >= M; the last ones lose against all others.
    """

    def __init__(self, way: str, axes: Axes, exact: Tensor, length: int) -> None:
        self.way, self.axes = way, axes
        self.step = 1.0  # the unit of all that follows
        if way == "int8":
            self.largest = _largest(exact.device)
            self.step = float(exact.abs().max()) / self.largest or 1.0
        exact = exact / self.step
        rows, rest = self._round(exact)
        self.off = float(self._moved(exact, rest).max())
        half = rows.double().square().sum(1) / 2
        self.longest = math.sqrt(2 * float(half.max()))
        pad = length - len(rows)
        rows = F.pad(rows, (0, 0, 0, pad))
        if way == "bf16":  # the product comes back in bf16, so that half the length must be in it: as three digits
            digits, rest = [], F.pad(half, (0, pad), value=1e38)
            for _ in range(_DIGITS):
                digits.append(rest.bfloat16()[:, None])
                rest = rest - digits[-1][:, 0].double()
            rows = torch.cat([rows, *digits], 1)
        elif way == "int8":
            rows = F.pad(rows, (0, -rows.shape[1] % 8))  # what CUDA asks for
            self.half = F.pad(half.long(), (0, pad), value=1 << 30).int()
        else:
            self.half = F.pad(-half.float(), (0, pad), value=-torch.inf)
        self.rows = rows.T  # (K', M')

    def _round(self, exact: Tensor, times: Tensor | int = 1) -> tuple[Tensor, Tensor]:
        """Coordinates divided by ``times`` and rounded, and the rest, float64; both ``(Q, K')``."""
        if self.way == "int8":
            rows = (exact / times).round().clamp(-self.largest, self.largest).to(torch.int8)
        else:
            rows = exact.to(torch.bfloat16 if self.way == "bf16" else torch.float32)
        return rows, exact - rows.double() * times

    def _moved(self, exact: Tensor, rest: Tensor) -> Tensor:
        """How far rounding may have moved rows, float64 ``(Q, 1)``."""
        moved, length = (torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in (rest, exact))
        result: Tensor = moved + _INEXACT * (length + self.axes.tail / self.step)  # at least the row's whole length
        return result

    def scores(self, centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores ``(Q, M')`` of centred queries ``(Q, D)``.

        With them the queries' squared lengths, and how far rounding moved them, both float64 ``(Q, 1)``.
        """
        exact = self.axes(centred) / self.step
        if self.way == "int8":
            scores, rest = self._whole_numbers(exact)
        else:
            rows, rest = self._round(exact)
            if self.way == "bf16":
                scores = F.pad(rows, (0, _DIGITS), value=-1.0) @ self.rows
            else:
                scores = shifted_product(rows, self.rows.T, self.half)
        return scores, (exact - rest).square().sum(1, keepdim=True), self._moved(exact, rest)

    def _whole_numbers(self, exact: Tensor) -> tuple[Tensor, Tensor]:
        """Scores in int32, and what rounding took from the queries' coordinates ``(Q, K')``."""
        most = self.largest
        coarsest = _MOST // (most * math.sqrt(exact.shape[1]) * self.longest + 1)
        times = (exact.abs().amax(1, keepdim=True) / most).ceil().clamp(1, max(1, min(coarsest, 2 * most)))
        rows, rest = self._round(exact, times)
        scores = self._int_product(rows)
        far = (times[:, 0] > 1).nonzero()[:, 0]
        for start in range(0, len(far), _PART):
            few = far[start : start + _PART]
            low, rest[few] = self._round(rest[few])
            second = self._int_product(low)
            if len(few) == 1 + int(few[-1] - few[0]):  # next to each other: no copy
                scores[few[0] : few[-1] + 1].mul_(times[few].int()).add_(second)
            else:
                scores[few] = second.addcmul_(scores[few], times[few].int())
        return scores.sub_(self.half), rest

    def _int_product(self, rows: Tensor) -> Tensor:
        fill = max(0, 17 - len(rows)) if rows.device.type == "cuda" else 0  # it wants more than 16 rows
        product: Tensor = torch._int_mm(F.pad(rows, (0, len(self.rows) - rows.shape[1], 0, fill)), self.rows)
        return product[: len(rows)]

    def threshold(self, upper: Tensor, own: Tensor, off: Tensor) -> Tensor:
        """Least score that a row no farther than ``upper`` can have, in the type of the scores."""
        square = (upper / self.step + off + self.off).square()
        if self.way == "int8":
            return ((own - square) / 2).floor().clamp(min=1 - 2**30).int()
        slack = product_slack(self.rows.shape[0] + 8, own, self.longest)
        least = ((own - square - slack) / 2).float()
        return least.bfloat16() if self.way == "bf16" else least  # rounding keeps the order
