"""Float32 as exact as it is: full precision, products, bounds of their rounding; threads; least distances."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

_TIMES = 8
_TILE = 1024  # columns of a product by `torch.addmm` on the CPU, which takes longer each with more


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast, TF32 and bf16 products inside the block, and gradients with them.

    The error bounds of `distance_bounds.py` and `exact_search.py` hold for IEEE float32 products only, and for bf16
    ones that are summed in float32.

    Args:
        device: Device the block computes on.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _no_shortcuts(), _no_short_sums():
        yield


def _no_shortcuts() -> AbstractContextManager[None]:
    """Products of float32 numbers by nothing less, inside the block."""
    if hasattr(torch.backends, "fp32_precision"):  # torch 2.9, which refuses to name the older setting beside it
        return _no_shortcuts_of_libraries()
    return _highest()


@contextmanager
def _no_shortcuts_of_libraries() -> Iterator[None]:
    products = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    changed = [(each, each.fp32_precision) for each in products if each.fp32_precision not in ("none", "ieee")]
    for each, _ in changed:
        each.fp32_precision = "ieee"
    try:
        yield
    finally:
        for each, before in changed:  # "none": what holds for all
            general = torch.backends.fp32_precision  # type: ignore[attr-defined]
            each.fp32_precision = "none" if before == general else before


@contextmanager
def _no_short_sums() -> Iterator[None]:
    """Parts of bf16 products on a GPU summed in float32, inside the block."""
    products = torch.backends.cuda.matmul
    if not products.allow_bf16_reduced_precision_reduction:
        yield
        return
    products.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        products.allow_bf16_reduced_precision_reduction = True


@contextmanager
def _highest() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
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


def times_at_once(device: torch.device) -> int:
    """How many times as much as on the CPU is worth doing at once: elsewhere, starting a kernel takes longest."""
    return 1 if device.type == "cpu" else _TIMES


def shifted_product(rows: Tensor, others: Tensor, shift: Tensor) -> Tensor:
    """``rows @ others.T + shift`` in float32, ``(Q, M)``, of rows ``(Q, D)`` and ``(M, D)`` and numbers ``(M,)``.

    On the CPU by oneDNN where torch brings it: a tenth faster than what `torch.addmm` takes, twice on few rows.
    """
    if rows.device.type != "cpu":
        return torch.addmm(shift, rows, others.T)
    if has_onednn():
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, others, shift, "none", [], "")
        return result
    result = rows.new_empty(len(rows), len(others))
    parts = (each.split(_TILE, -1) for each in (result, shift, others.T))
    for place, some, columns in zip(*parts, strict=True):
        torch.addmm(some, rows, columns, out=place)
    return result


def has_onednn() -> bool:
    """Whether torch can multiply by oneDNN directly; its name for that begins with an underscore."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
