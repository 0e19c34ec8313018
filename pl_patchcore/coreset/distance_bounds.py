"""Bounds of squared distances by one matrix product, in float32, or in bf16 where that is faster.

Reads centred rows, float64 ``(n, d)``. `farthest_first.py` uses the bounds to skip what need not be computed exactly.

Rows a and b, rounded to a' and b', are written as ``[a', |a'|^2, 1, +-1]`` and ``[-2 b', 1, |b'|^2, s_b]``, so that
the product of the two is the rounded rows' squared distance D, plus or minus the slack s_b, with an error relative to
itself. (In bf16 each norm takes three columns, which together have as many digits as float32.) Rounding moved the rows
by e_a and e_b, which are computed. With ``e = e_a + e_b``, for any t > 0,

    (1 - t) (D - e^2 / t)  <=  |a - b|^2  <=  (1 + t) (D + e^2 / t),    e^2 <= 2 e_a^2 + 2 e_b^2

(triangle inequality, and ``2 x e <= t x^2 + e^2 / t``). So each row has a slack of its own, ``s = 2 e^2 / t``, which
also holds the error that sums in float32 can make (`product_margin`). In float32, t is 0 and that error covers e too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pl_patchcore.numerics import product_margin, product_speed

TINY = 1e-34  # added to squared distances: more than a sum of flushed denormals can lose
STEP = 64  # rows; products in bf16 are padded to multiples of it
_COLUMNS = 64  # columns that `within` looks at together
_MEASURED_FLOPS = 1 << 33  # floating-point operations from which measuring the faster type pays
_LEAST_SPEEDUP = 1.25  # times as fast as float32: a bf16 product that pays


class DistanceBounds:
    """How rows are written for products, and the bounds that these give.

    Args:
        dimension: Numbers in a row, d.
        dtype: ``torch.float32`` or ``torch.bfloat16``.
    """

    def __init__(self, dimension: int, dtype: torch.dtype) -> None:
        short = dtype == torch.bfloat16
        self.dtype = dtype
        self.digits = 3 if short else 1  # columns of a squared norm
        self.spread = 2.0**-7 if short else 0.0  # t above
        self.rounding = 2.0**-8 if short else 0.0  # twice the error of rounding the product, relative
        self.width = dimension + 2 * self.digits + 1
        self.margin = product_margin(dimension + 8)
        self._block = torch.empty(0, dtype=dtype)

    def left(self, rows: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows of one side, ``(n, width)``, and their slack, float32 ``(n,)``, from float64 ``(n, d)``, overwritten."""
        rounded, norm, slack = self._rounded(rows)
        return torch.cat([rounded, norm, rounded.new_ones(len(rows), self.digits + 1)], 1, out=out), slack

    def right(self, rows: Tensor) -> Tensor:
        """Rows of the other side, ``(n, width)``, from float64 ``(n, d)``, overwritten."""
        rounded, norm, slack = self._rounded(rows)
        ones = rounded.new_ones(len(rows), self.digits)
        return torch.cat([rounded.mul_(-2), ones, norm, (slack * (1 + 2.0**-7))[:, None].to(self.dtype)], 1)

    def _rounded(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rounded = rows.to(self.dtype)
        moved = (rows - rounded).square_().sum(1) if self.spread else 0.0
        square = torch.linalg.vector_norm(rows.copy_(rounded), dim=1).square_()
        slack = self.margin * square
        if self.spread:
            slack += 2 / self.spread * moved
        digits = []
        for _ in range(self.digits):
            digits.append(square.to(self.dtype))
            square = square - digits[-1].double()
        return rounded, torch.stack(digits, 1), slack.float()

    def least(self, left: Tensor, slack: Tensor, right: Tensor) -> Tensor:
        """Upper bound of each left row's least squared distance, float32 ``(n,)``."""
        square = _comparable(self._product(left, right)).amin(1).view(self.dtype).float().clamp_(min=0)
        return (square * (1 + self.rounding) + slack + TINY) * (1 + self.spread)

    def within(self, left: Tensor, slack: Tensor, right: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs whose squared distance may be ``limit`` ``(n,)`` or less: places ``(p,)`` in ``left`` and ``right``."""
        below = left.clone()
        below[:, -1] = -1
        most = (limit / (1 - self.spread) + slack + TINY) * (1 + self.rounding)
        square = self._product(below, right)
        stride = min(_COLUMNS, square.shape[1])
        groups = square[:, : square.shape[1] // stride * stride].unflatten(1, (-1, stride))  # (n, groups, stride)
        row, column = (_comparable(groups).amin(1).view(self.dtype) <= most[:, None]).nonzero(as_tuple=True)
        hit, group = (groups[row, :, column] <= most[row, None]).nonzero(as_tuple=True)
        row, pick = row[hit], group * stride + column[hit]
        rest, last = (square[:, groups[0].numel() :] <= most[:, None]).nonzero(as_tuple=True)
        return torch.cat([row, rest]), torch.cat([pick, last + groups[0].numel()])

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """Product of the two sides, in memory that the next product overwrites."""
        rows, columns = len(left), len(right)
        if self.dtype != torch.float32:  # each new shape costs bf16 a millisecond, and half a MiB for good
            left, right = _padded(left, _few_lengths(rows)), _padded(right, -(-columns // STEP) * STEP)
        if self._block.numel() < len(left) * len(right) or self._block.device != left.device:
            self._block = left.new_empty(len(left) * len(right))
        block = self._block[: len(left) * len(right)].view(len(left), len(right))
        return torch.mm(left, right.T, out=block)[:rows, :columns]


def _comparable(square: Tensor) -> Tensor:
    """Let bf16 be compared as int16, many times faster; the order is the same, except among negative numbers."""
    return square.view(torch.int16) if square.dtype == torch.bfloat16 else square


def _padded(rows: Tensor, length: int) -> Tensor:
    return F.pad(rows, (0, 0, 0, length - len(rows))) if len(rows) < length else rows


def _few_lengths(rows: int) -> int:
    """Least of 1, 2, 3, 4, 6, 8, 12, ... steps that holds so many rows."""
    power = STEP << max(0, -(-rows // STEP) - 1).bit_length()
    return 3 * power // 4 if power > 2 * STEP and rows <= 3 * power // 4 else power


def product_type(dimension: int, pairs: int, device: torch.device) -> torch.dtype:
    """Type whose products of so many pairs of rows take least time: bf16 where there are many and it is fast here."""
    many = device.type == "cpu" and 2 * dimension * pairs >= _MEASURED_FLOPS
    return torch.bfloat16 if many and product_speed(torch.bfloat16) > _LEAST_SPEEDUP else torch.float32
