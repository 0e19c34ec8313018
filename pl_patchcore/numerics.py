"""Float32 as exact as it is: full precision, a product, bounds of its rounding; threads."""

from __future__ import annotations

import logging
import threading
import timeit
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

# torch tells of no public way to oneDNN's product with a shift; `torch.addmm` takes a tenth longer to twice as long.
has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

LEAST_BF16_SPEEDUP = 1.5  # times as fast as float32: products of bf16 for which a backbone is worth rounding
log = logging.getLogger(__name__)
_lock = threading.Lock()
_blocks = 0  # that threads are in
_restore: list[Callable[[], object]] = []  # settings of torch, as they were before the first of them began


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast, TF32, bf16 products and bf16 sums inside the block, and gradients with them.

    The error bounds of selection and search hold for IEEE float32 products only, and for bf16 ones that are summed in
    float32. Torch's settings are the process's: the first block of all threads changes them, the last restores them.
    """
    global _blocks
    cuda = torch.backends.cuda.matmul
    with _lock:
        _blocks += 1
        if _blocks == 1:
            if cuda.allow_bf16_reduced_precision_reduction:
                cuda.allow_bf16_reduced_precision_reduction = False
                _restore.append(partial(setattr, cuda, "allow_bf16_reduced_precision_reduction", True))
            if hasattr(torch.backends, "fp32_precision"):  # torch 2.9 refuses to name the older setting beside it
                general = torch.backends.fp32_precision
                for products in (cuda, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
                    if (before := products.fp32_precision) not in ("none", "ieee"):
                        products.fp32_precision = "ieee"
                        after = "none" if before == general else before  # "none": what holds for all
                        _restore.append(partial(setattr, products, "fp32_precision", after))
            elif (before := torch.get_float32_matmul_precision()) != "highest":
                torch.set_float32_matmul_precision("highest")
                _restore.append(partial(torch.set_float32_matmul_precision, before))
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            _blocks -= 1
            while not _blocks and _restore:
                _restore.pop()()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside the block: many short operations of two wait long where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shifted_product(rows: Tensor, others: Tensor, shift: Tensor) -> Tensor:
    """``rows @ others.T + shift`` in float32, ``(Q, M)``, of rows ``(Q, D)`` and ``(M, D)`` and numbers ``(M,)``."""
    if rows.device.type == "cpu" and has_onednn:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, others, shift, "none", [], "")
        return result
    return torch.addmm(shift, rows, others.T)


@cache
def product_speed(dtype: torch.dtype) -> float:
    """How many times as fast as a float32 product one of int8 or bf16 is on this CPU; 0 where its sums are not exact.

    Sums of int8 saturate on processors without VNNI; those of bf16 may be rounded to bf16 on the way.
    """
    if dtype == torch.int8 and not hasattr(torch, "_int_mm"):  # the only int8 product with int32 sums
        return 0.0
    seconds = []
    for kind in (torch.float32, dtype):
        multiply = torch._int_mm if kind == torch.int8 else torch.mm
        a, b = torch.full((256, 256), 127, dtype=kind), torch.full((2048, 256), 127, dtype=kind).T
        product = multiply(a, b)
        seconds.append(min(timeit.repeat(partial(multiply, a, b), number=1, repeat=3)))
    exact = bool((product == product.new_tensor(256 * 127**2)).all())
    return seconds[0] / seconds[1] if exact else 0.0


@cache
def bf16_is_fast(device: str) -> bool:
    """Whether products of bf16 are much faster than those of float32 on devices of a type; it is measured once."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device != "cpu":
        return False
    times = product_speed(torch.bfloat16)
    log.info(
        "inference auto: bf16 from %.1f times the speed of float32 on, here %.1f times.", LEAST_BF16_SPEEDUP, times
    )
    return times >= LEAST_BF16_SPEEDUP


def copies_in_order(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Bring equal rows of finite ``(M, D)`` together, the lowest first; rows of equal random projections are compared.

    Returns:
        An order, int64 ``(M,)``, and whether each row in it equals the one before, bool ``(M,)``.
    """
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(rows.shape[1], generator=g, dtype=torch.float64).to(rows.device)
    key, order = torch.cat([(part * weights).sum(1) for part in rows.split(256)]).sort(stable=True)
    copy = torch.diff(key, prepend=key[:1] + torch.nan) == 0
    for at in copy.nonzero()[:, 0].split(1024):
        copy[at] = (rows[order[at]] == rows[order[at - 1]]).all(1)
    return order, copy


def earlier_copies(rows: Tensor) -> Tensor:
    """How many rows equal to it stand before each row, int64 ``(M,)``, of finite rows ``(M, D)``.

    A constant background gives thousands of equal patches, none of which a product can rule out. But of the k nearest
    rows, ties to the lowest, each has fewer than k copies before it.

    Example:
        >>> earlier_copies(torch.tensor([[1.0], [2.0], [1.0], [1.0]])).tolist()
        [0, 0, 1, 2]
    """
    order, copy = copies_in_order(rows)
    place = torch.arange(len(order), device=order.device)
    first = place.masked_fill(copy, 0).cummax(0).values
    return torch.empty_like(order).index_copy_(0, order, place - first)


def product_margin(dimension: int) -> float:
    """Bound of the error of a float32 squared distance by product, relative to ``|a|^2 + |b|^2``.

    ``| fl(|a|^2 + |b|^2 - 2 a.b) - |a - b|^2 | <= margin * (|a|^2 + |b|^2)`` for rows of ``dimension`` numbers
    rounded to float32: ``dimension`` roundings in each sum and product, and a few for centring and adding.
    ``fl(|b|^2 - 2 a.b)`` alone is off by at most ``margin * |b| * (|a| + |b|)`` from ``|a - b|^2 - |a|^2``: every error
    has a factor ``|b|``. So it tells rows ``b`` apart that are far from ``a``.
    """
    return (2 * dimension + 16) * 2.0**-24


@cache
def _allow_sparse() -> None:
    """Torch warns once a process that sparse tensors of this kind are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), dtype=torch.float32)


def pair_products(a: Tensor, b: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """``(a[query] * b[row]).sum(1)``, float32 on the CPU, of pairs sorted by query; without copies, in a sixth."""
    _allow_sparse()
    ends = F.pad(torch.bincount(query, minlength=len(a)).cumsum(0), (1, 0))
    wanted = torch.sparse_csr_tensor(ends, row, torch.zeros(len(row), dtype=torch.float32), (len(a), len(b)))
    products: Tensor = torch.sparse.sampled_addmm(wanted, a, b.T, beta=0.0).values()
    return products


def k_least(values: Tensor, rows: Tensor, query: Tensor, queries: int, k: int) -> Tensor:
    """Places of the ``k`` least values of each query, ties to the lowest row: ``(Q, k)``; any where there are fewer."""
    order = rows.argsort()
    order = order[values[order].argsort(stable=True)]
    order = order[query[order].argsort(stable=True)]
    count = torch.bincount(query, minlength=queries)
    return order[((count.cumsum(0) - count)[:, None] + torch.arange(k, device=query.device)).clamp(max=len(order) - 1)]
