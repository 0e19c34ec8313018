"""Float32 as exact as it is: full precision, bounds of its rounding; threads; the least distances of each query."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast, TF32 and bf16 products inside the block, and gradients with them.

    The error bounds of `distance_bounds.py` and `exact_search.py` hold for IEEE float32 products only.

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


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside the block.

    For many short operations on the CPU: where data loaders are at work on the same cores, each operation of two
    threads waits for one that is not running (measured: 20 times the time of one thread).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def product_margin(dimension: int) -> float:
    """Bound of the error of a float32 squared distance by product, relative to ``|a|^2 + |b|^2``.

    ``| fl(|a|^2 + |b|^2 - 2 a.b) - |a - b|^2 | <= margin * (|a|^2 + |b|^2)`` for rows of ``dimension`` numbers
    rounded to float32: ``dimension`` roundings in each sum and product, and a few for centring and adding.
    """
    return (2 * dimension + 16) * 2.0**-24


def product_slack(dimension: int, square: Tensor, longest: float) -> Tensor:
    """Bound of the error of squared distances by product from one row to others, beyond what they have in common.

    ``fl(|b|^2 - 2 a.b)`` is off by at most this much from ``|a - b|^2 - |a|^2``, with ``|a|^2`` the same number for
    all ``b``: every other error has a factor ``|b|``. So it tells rows ``b`` apart that are far from ``a``.

    Args:
        dimension: Of rows that were centred and rounded to float32.
        square: ``|a|^2``, of any shape.
        longest: The largest ``|b|``.
    """
    return product_margin(dimension) * longest * (square.sqrt() + longest)


def k_least(distance: Tensor, query: Tensor, queries: int, k: int) -> Tensor:
    """Places of the ``k`` least distances of each query, ties in order: ``(Q, k)``; pairs are sorted by query."""
    order = distance.sort(stable=True).indices
    order = order[query[order].sort(stable=True).indices]  # by query, then distance, then place
    count = torch.bincount(query, minlength=queries)
    return order[(count.cumsum(0) - count)[:, None] + torch.arange(k, device=query.device)]
