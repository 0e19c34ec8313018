"""Full float32 arithmetic where distances are decided."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast, TF32 and bf16 products inside the block, and gradients with them.

    The error bounds of `coreset.py` and `memory_bank.py` hold for IEEE float32 products only.

    Args:
        device: Device the block computes on.
    """
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


def product_margin(dimension: int) -> float:
    """Bound of the error of a float32 squared distance by product, relative to ``|a|^2 + |b|^2``.

    ``| fl(|a|^2 + |b|^2 - 2 a.b) - |a - b|^2 | <= margin * (|a|^2 + |b|^2)`` for rows of ``dimension`` numbers
    rounded to float32: ``dimension`` roundings in each sum and product, and a few for centring and adding.
    """
    return (2 * dimension + 16) * 2.0**-24
