"""Rows of a memory bank as a file keeps them: in 32 or fewer bits a number. Used by `runtime.py`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_patchcore.errors import UserError

FileDtype = Literal["float32", "float16", "int8"]
_INT8 = 127  # largest code


class Rows(nn.Module):
    """Rows, their mean taken off, which the products want.

    Args:
        features: The rows, ``(M, D)``, of any floating type.
        dtype: ``float32``; ``float16``; or ``int8``, with a step for each row.

    Attributes:
        number: Of rows, M.
        centre: Their mean, float32 ``(D,)``.

    Raises:
        UserError: If a row is too long for float16.
    """

    codes: Tensor
    steps: Tensor
    centre: Tensor

    def __init__(self, features: Tensor, dtype: FileDtype = "float32") -> None:
        super().__init__()
        self.dtype, self.number, rows = dtype, len(features), features.float()
        self.register_buffer("centre", features.double().mean(0).float())
        if dtype == "float32":
            codes = (features.double() - self.centre.double()).float()
        elif dtype == "float16":
            codes = rows.half()
            if not codes.isfinite().all():
                raise UserError("bank_dtype float16 does not hold numbers beyond 65504, and the memory bank has such.")
        else:
            steps = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / _INT8  # (M, 1)
            codes = (rows / steps).round().clamp(-_INT8, _INT8).to(torch.int8)
            self.register_buffer("steps", steps)
        self.register_buffer("codes", codes)

    def forward(self) -> Tensor:
        """All rows, centred, float32 ``(M, D)``."""
        return self._centred(self.codes, self.steps if self.dtype == "int8" else None)

    def taken(self, numbers: Tensor) -> Tensor:
        """Some rows by their numbers ``(...)``: as ``forward``, ``(..., D)``."""
        steps = F.embedding(numbers, self.steps) if self.dtype == "int8" else None
        return self._centred(F.embedding(numbers, self.codes), steps)

    def rounded(self) -> Tensor:
        """All rows as they come out of the file, float32 ``(M, D)``; rounded once more they are the same."""
        return self.forward() + self.centre

    def _centred(self, codes: Tensor, steps: Tensor | None) -> Tensor:
        if self.dtype == "float32":
            return codes
        return (codes.float() if steps is None else codes.float() * steps) - self.centre
