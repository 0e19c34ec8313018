"""Bounds of squared distances by one matrix product, in float32, or in bf16 where that is faster.

Reads centred rows, float64 ``(n, d)``; `farthest_first.py` rules out with them what need not be computed exactly.

Rows a and b, rounded to a' and b', are written as ``[a', |a'|^2, 1, +-1]`` and ``[-2 b', 1, |b'|^2, s_b]``, so that
the product of the two is the rounded rows' squared distance D, plus or minus the slack s_b, and comes back with an
error relative to itself: in bf16, the norms are three columns each, as many digits as float32 has. Rounding moved
the rows by e_a and e_b, which are computed; with ``e = e_a + e_b``, for any t > 0,

    (1 - t) (D - e^2 / t)  <=  |a - b|^2  <=  (1 + t) (D + e^2 / t),    e^2 <= 2 e_a^2 + 2 e_b^2

(triangle inequality, and ``2 x e <= t x^2 + e^2 / t``). So each row brings its own slack, ``s = 2 e^2 / t``, and
in it a bound of what summing in float32 can do (`product_margin`). In float32, t is 0, and that bound covers e too.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pl_patchcore.numerics import product_margin

_DIGITS = {torch.float32: 1, torch.bfloat16: 3}  # columns of a squared norm
_SPREAD = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}  # t above
_ROUND = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}  # twice what rounding the product takes, relative
TINY = 1e-34  # above what a sum of flushed denormals can lose
STEP = 64  # numbers of rows, of either side, that bf16 products are done of
_COLUMNS = 64  # of a product, of which every so-many-th are looked at together
_WORTH = 1 << 33  # floating-point operations to come that are worth a measurement


class DistanceBounds:
    """How rows are written down for products, and what these tell.

    Args:
        dimension: Numbers in a row, d.
        dtype: ``torch.float32`` or ``torch.bfloat16``.
    """

    def __init__(self, dimension: int, dtype: torch.dtype) -> None:
        self.dtype, self.digits = dtype, _DIGITS[dtype]
        self.spread, self.round = _SPREAD[dtype], _ROUND[dtype]
        self.width = dimension + 2 * self.digits + 1
        self.margin = product_margin(dimension + 8)
        self._block = torch.empty(0, dtype=dtype)

    def left(self, rows: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows of one side, ``(n, width)``, and their slack, float32 ``(n,)``, from float64 ``(n, d)``, overwritten."""
        near, norm, slack = self._rounded(rows)
        ones = near.new_ones(len(rows), self.digits + 1)
        return torch.cat([near, norm, ones], 1, out=out), slack

    def right(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows of the other side, ``(n, width)``, from float64 ``(n, d)``, overwritten."""
        near, norm, slack = self._rounded(rows)
        ones = near.new_ones(len(rows), self.digits)
        return torch.cat([near.mul_(-2), ones, norm, (slack * (1 + 2.0**-7))[:, None].to(self.dtype)], 1, out=out)

    def _rounded(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        near = rows.to(self.dtype)
        moved = (rows - near).square_().sum(1) if self.spread else 0.0
        square = torch.linalg.vector_norm(rows.copy_(near), dim=1).square_()
        slack = self.margin * square
        if self.spread:
            slack += 2 / self.spread * moved
        digits = []
        for _ in range(self.digits):
            digits.append(square.to(self.dtype))
            square = square - digits[-1].double()
        return near, torch.stack(digits, 1), slack.float()

    def least(self, left: Tensor, slack: Tensor, right: Tensor) -> Tensor:
        """Upper bound of each row's least squared distance, float32 ``(n,)``."""
        square = _ordered(self._product(left, right)).amin(1).view(self.dtype).float().clamp_(min=0)
        return (square * (1 + self.round) + slack + TINY) * (1 + self.spread)

    def within(self, left: Tensor, slack: Tensor, right: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs, by their places ``(p,)`` in ``left`` and ``right``, that squared ``limit`` ``(n,)`` can't rule out."""
        below = left.clone()
        below[:, -1] = -1
        most = (limit / (1 - self.spread) + slack + TINY) * (1 + self.round)
        square = self._product(below, right)
        stride = min(_COLUMNS, square.shape[1])
        groups = square[:, : square.shape[1] // stride * stride].unflatten(1, (-1, stride))  # looked at together
        row, column = (_ordered(groups).amin(1).view(self.dtype) <= most[:, None]).nonzero(as_tuple=True)
        hit, group = (groups[row, :, column] <= most[row, None]).nonzero(as_tuple=True)
        row, pick = row[hit], group * stride + column[hit]
        rest, last = (square[:, groups[0].numel() :] <= most[:, None]).nonzero(as_tuple=True)
        return torch.cat([row, rest]), torch.cat([pick, last + groups[0].numel()])

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """Product of the two sides; good until the next one is asked for, which takes the same memory."""
        rows, columns = len(left), len(right)
        if self.dtype != torch.float32:  # a new shape costs bf16 a millisecond of preparation and half a MiB for good
            left, right = _padded(left, _few_lengths(rows)), _padded(right, -(-columns // STEP) * STEP)
        if self._block.numel() < len(left) * len(right) or self._block.device != left.device:
            self._block = left.new_empty(len(left) * len(right))
        block = self._block[: len(left) * len(right)].view(len(left), len(right))
        return torch.mm(left, right.T, out=block)[:rows, :columns]


def _ordered(square: Tensor) -> Tensor:
    """bf16 numbers as integers, whose least one is found many times faster: in the same order, negative ones apart."""
    return square.view(torch.int16) if square.dtype == torch.bfloat16 else square


def _padded(rows: Tensor, length: int) -> Tensor:
    return F.pad(rows, (0, 0, 0, length - len(rows))) if len(rows) < length else rows


def _few_lengths(rows: int) -> int:
    """Least length of 1, 2, 3, 4, 6, 8, 12, ... steps that holds so many rows."""
    power = STEP << max(0, -(-rows // STEP) - 1).bit_length()
    return 3 * power // 4 if power > 2 * STEP and rows <= 3 * power // 4 else power


def product_type(dimension: int, pairs: int, device: torch.device) -> torch.dtype:
    """Type in which products of ``pairs`` pairs of rows are done soonest: bf16 only where a measurement says so."""
    if device.type != "cpu" or 2 * dimension * pairs < _WORTH:
        return torch.float32
    return _measured_type(dimension, torch.get_num_threads())


@functools.cache
def _measured_type(dimension: int, threads: int) -> torch.dtype:
    rows = torch.randn(1024, dimension, generator=torch.Generator().manual_seed(0)).double()
    exact = torch.cdist(rows[:64], rows[64:]).square()
    few: dict[torch.dtype, float] = {}
    many: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        bounds = DistanceBounds(dimension, dtype)
        (left, slack), right = bounds.left(rows.clone()), bounds.right(rows.clone())
        found = bounds.least(left[:64], slack[:64], right[64:]) / exact.amin(1)
        if not ((found >= 1) & (found < 1.1)).all():
            continue  # a machine that sums in bf16
        few[dtype] = _seconds(lambda: bounds.least(left[:64], slack[:64], right[64:]), 2)  # noqa: B023
        if few[dtype] < 2 * few[torch.float32]:  # a processor without bf16 takes fifteen times as long
            many[dtype] = _seconds(lambda: bounds.least(left, slack, right), 4)  # noqa: B023
    low, full = (many.get(dtype, float("inf")) for dtype in (torch.bfloat16, torch.float32))
    return torch.bfloat16 if low < 0.8 * full else torch.float32


def _seconds(call: Callable[[], object], turns: int) -> float:
    """What the fastest of some turns takes."""
    taken = []
    for _ in range(turns):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)
