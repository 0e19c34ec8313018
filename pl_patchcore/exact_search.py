"""Exact nearest neighbours: a cheap product over the whole bank proposes, float64 differences decide.

Reads queries ``(Q, D)`` and the bank's rows ``(M, D)``, returns distances and rows; `memory_bank.py` calls it.

Every way gives the same answers, ties to the lowest row. ``torch`` filters by a float32 product of the rows
themselves, ``pca``, ``bf16`` and ``int8`` by a smaller one (`search_filter.py`); ``faiss`` proposes a few rows more
than asked for.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pl_patchcore.distinct_rows import DistinctRows
from pl_patchcore.numerics import k_least, one_thread, product_slack, shifted_product, times_at_once
from pl_patchcore.search_filter import Axes, Filter

log = logging.getLogger(__name__)

Way = Literal["torch", "pca", "bf16", "int8", "faiss"]
WAYS: tuple[Way, ...] = ("torch", "pca", "bf16", "int8", "faiss")

_BLOCK = 1 << 23  # scores held at once on the CPU: 32 MiB
_EVEN = 256  # of so many queries, or a multiple of it, products take the least time each
_GROUP = 128  # rows of the bank looked at together
_NUMBERS = 1 << 17  # float64 numbers gathered at once on the CPU: 1 MiB, which a cache holds; ...
_MANY_NUMBERS = 1 << 22  # ... on other devices, and float32 ones
_STEP = 256  # rows centred at once
_EXTREME = 2.0**-100  # a scale beyond which, or its reciprocal, float32 would over- or underflow
_ADDED = 2.0**-21  # of both rows' squared lengths: bounds what faiss loses by adding them to a product
_SPARE = 4  # neighbours asked of faiss beyond k, so that rounding can be ruled out
_SPUN = 1 << 22  # numbers that one thread centres before torch's others would end their wait, on cores that faiss wants
_SMALL = 1 << 21  # numbers in a bank for which nothing is worth measuring
_FEW = 64  # queries too few to measure with
_HOPELESS = 3.0  # times as slow as the fastest on few queries: a way not worth measuring on more
_AT_ONCE = 4096  # queries that faiss multiplies at once, the faster for each
_MORE = 8  # times as many queries: another way may suit them better
_ASLEEP = 1.1  # times what is measured that faiss takes between torch's work: its threads are its own, and sleep then
_PATIENCE = 3  # failures of a filter in a row: one image unlike all others is not worth seconds of measuring
_IN_FLOAT64 = 2.0**-29  # of the rounding in float32
_TIED = 32  # queries decided at once where any number of rows may be left


class ExactSearch:
    """Nearest neighbours among the rows of a bank.

    Args:
        features: The bank, ``(M, D)``, finite.

    Attributes:
        chosen: Way that ``auto`` has chosen, None before it has measured.
        survivors: Rows per query that the last search computed float64 or float32 distances of, on average.
    """

    def __init__(self, features: Tensor) -> None:
        self._times = times_at_once(features.device)
        self._distinct = DistinctRows(features)
        self.features = features = self._distinct.features
        self.chosen: Way | None = None
        self.survivors = 0.0
        self._unsure = 0  # queries of the last search that its filter could not thin out
        self._failed = 0  # searches in a row in which it could not thin out most
        self._measuring = False
        self._measured = 0  # queries of the call that was measured
        self._hopeless: set[Way] = set()  # too slow to be measured again
        self._filters: dict[str, Filter] = {}
        self._axes: Axes | None = None
        self._flat: Tensor | None = None  # the bank's coordinates, while filters are made of them
        self.mean = features.mean(0, dtype=torch.float64)
        largest = max(float((part.double() - self.mean).abs().max()) for part in features.split(4096))
        self.scale = 2.0 ** -math.frexp(largest)[1]  # squares then neither over- nor underflow
        self._plain = _EXTREME < self.scale < 1 / _EXTREME
        if self._plain:  # any shift will do that all rows have in common, and one in float32 takes a third of the time
            self.mean = self.mean.float()
        rows = -(-len(features) // _GROUP) * _GROUP
        self.near = features.new_zeros(rows, features.shape[1], dtype=torch.float32)  # (M', D), padded
        for part, place in zip(features.split(4096), self.near.split(4096), strict=False):
            place[: len(part)] = self._centre(part)
        self.norm = self.near.square().sum(1)  # (M',)
        self.longest = float(self.norm.max().sqrt())
        self.half = -self.norm / 2
        self.half[len(features) :] = -torch.inf

    def _centre(self, rows: Tensor) -> Tensor:
        result = torch.empty_like(rows, dtype=torch.float32)
        step = self._times * _STEP
        for part, place in zip(rows.split(step), result.split(step), strict=True):  # which a cache holds
            if self._plain:
                torch.sub(part, self.mean, out=place).mul_(self.scale)
            else:
                place[:] = part.double().sub_(self.mean).mul_(self.scale)
        return result

    def __call__(self, queries: Tensor, k: int, way: str) -> tuple[Tensor, Tensor]:
        """Find the ``k`` nearest rows of each query.

        Args:
            queries: float32 ``(Q, D)``, finite.
            k: Neighbours, from 1 to M.
            way: One of `WAYS`, or ``auto``: the one that is fastest on this machine for these queries (faiss by a
                tenth), measured at the first call with at least 64 of them, and at one with 8 times as many; torch
                off the CPU and for small banks.

        Returns:
            Distances float32 ``(Q, k)``, ascending, and rows int64 ``(Q, k)``.
        """
        distinct = min(k, len(self.features))
        used: Way = self._choose(queries, distinct) if way == "auto" else way  # type: ignore[assignment]
        distance, rows = self._distinct.bank_rows(*self._search(queries, distinct, used), k)
        if way == "auto" and used == self.chosen != "torch" and len(queries) >= _FEW:
            self._failed = self._failed + 1 if 2 * self._unsure > len(queries) else 0
            if self._failed == _PATIENCE:
                log.info("nearest neighbours: %s no longer rules out enough rows; measuring again.", used)
                self.chosen, self._failed = None, 0
        return distance.float(), rows

    def _search(self, queries: Tensor, k: int, way: Way) -> tuple[Tensor, Tensor]:
        """Distances float64 ``(Q, k)`` and numbers of distinct rows."""
        self.survivors, self._unsure = 0.0, 0
        found = self._in_blocks(queries, k, way)
        self.survivors /= max(1, len(queries))
        if not self._measuring:
            self._flat = None
        return found

    # The ways

    def _in_blocks(self, queries: Tensor, k: int, way: Way) -> tuple[Tensor, Tensor]:
        most = _AT_ONCE if way == "faiss" else max(1, self._times * _BLOCK // len(self.near))
        even = most // _EVEN * _EVEN or most
        count = max(0, -((most - len(queries)) // even))  # until no more are left than fit at once
        blocks = queries.split([even] * count + [len(queries) - even * count])
        return _joined([self._by_faiss(b, k) if way == "faiss" else self._by_filter(b, k, way) for b in blocks])

    def _by_filter(self, queries: Tensor, k: int, way: Way) -> tuple[Tensor, Tensor]:
        centred = self._centre(queries)
        if way == "torch":
            own = _length(centred)  # (Q, 1)
            scores = shifted_product(centred, self.near, self.half)
        else:
            scores, own, off = self._filter(way).scores(centred)
        group = _GROUP if 4 * k * _GROUP <= len(self.near) else 1
        grouped = scores.unflatten(1, (-1, group))
        best = grouped.amax(2)  # (Q, groups)
        top, place = best.topk(k, dim=1)  # of k groups, so that k rows are as near as the last of them
        if way == "torch":
            threshold = top[:, -1:] - product_slack(centred.shape[1], own, self.longest)
        else:
            index = torch.arange(len(queries), device=queries.device)[:, None]
            row = place * group + grouped[index, place].argmax(2)  # (Q, k)
            distance = self._distance(queries, index.expand(-1, k).flatten(), row.flatten()).view(-1, k)
            upper = distance.amax(1, keepdim=True) * self.scale * (1 + 1e-9)
            threshold = self._filter(way).threshold(upper, own, off)
        over = ((best >= threshold).sum(1) > max(4 * k, best.shape[1] * 7 // 8)) | ~(own[:, 0] < 1e30)
        query, part = ((best >= threshold) & ~over[:, None]).nonzero(as_tuple=True)
        pair, place = (grouped[query, part] >= threshold[query]).nonzero(as_tuple=True)
        query, row = query[pair], part[pair] * group + place
        count = torch.bincount(query, minlength=len(queries))
        over |= (count > max(32 * k, len(self.features) // 16)) | (count < k)
        if not over.any():
            return self._decide(queries, centred, query, row, k)
        distance = queries.new_empty(len(queries), k, dtype=torch.float64)
        rows = torch.empty_like(distance, dtype=torch.int64)
        sure = ~over
        if sure.any():
            kept, new = sure[query], sure.cumsum(0) - 1
            distance[sure], rows[sure] = self._decide(queries[sure], centred[sure], new[query[kept]], row[kept], k)
        self._unsure += int(over.sum())
        unsure = queries[over]
        if way == "torch":
            few = unsure.split(max(1, _BLOCK // len(self.near)))
            distance[over], rows[over] = _joined([self._by_all(part, k) for part in few])
        else:
            distance[over], rows[over] = self._by_filter(unsure, k, "torch")
        return distance, rows

    def _by_faiss(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        import faiss

        size = len(self.features)
        with one_thread() if queries.numel() < _SPUN else nullcontext():
            centred = self._centre(queries)
        asked = min(k + _SPARE, size)
        with faiss_threads():
            square, row = faiss.knn(centred.cpu().numpy(), self.near[:size].cpu().numpy(), asked)
        rows, squares = (torch.from_numpy(each).to(queries.device) for each in (row, square))  # (Q, asked)
        lost = (rows < 0).any(1)  # overflow in float32
        own = _length(centred)
        slack = product_slack(queries.shape[1], own, self.longest) + _ADDED * (own + self.longest**2)
        close = ~(squares > squares[:, k - 1 : k] + 2 * slack) | lost[:, None]
        query, place = close.nonzero(as_tuple=True)
        pair = (query * size + rows[query, place].clamp(min=0)).sort().values
        distance, found = self._decide(queries, centred, pair // size, pair % size, k)
        if asked < size:  # sure only where the last one proposed is farther than rounding could explain
            lost |= close[:, -1]
        if lost.any():
            distance[lost], found[lost] = self._in_blocks(queries[lost], k, "torch")
        return distance, found

    def _by_all(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """A product in float64 proposes: for rows too close to each other, or too far, for one in float32."""
        centred = (queries.double() - self.mean) * self.scale
        scores = queries.new_empty(len(queries), len(self.features), dtype=torch.float64)
        for part, place in zip(self.features.split(4096), scores.split(4096, 1), strict=True):
            near = (part.double() - self.mean) * self.scale
            place[:] = torch.addmm(-near.square().sum(1) / 2, centred, near.T)
        slack = _IN_FLOAT64 * product_slack(queries.shape[1], _length(centred), self.longest)
        passed = scores >= scores.topk(k, dim=1).values[:, -1:] - slack
        parts = []
        for few, part in zip(queries.split(_TIED), passed.split(_TIED), strict=True):
            query, row = part.nonzero(as_tuple=True)
            every = self._distance(few, query, row)
            chosen = k_least(every, query, len(few), k)
            parts.append((every[chosen], row[chosen]))
        return _joined(parts)

    # Deciding among the survivors

    def _decide(self, queries: Tensor, centred: Tensor, query: Tensor, row: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Choose the ``k`` nearest among candidate pairs (sorted by query, then row; at least k of each query)."""
        self.survivors += len(query)
        if len(query) > 2 * k * len(queries):
            near = self.norm[row] - 2 * self._products(centred, query, row)
            last = near[k_least(near, query, len(queries), k)[:, -1]]
            slack = product_slack(centred.shape[1], _length(centred)[:, 0], self.longest)
            kept = ~(near > (last + 2 * slack)[query])  # NaN where the query is too far for float32
            query, row = query[kept], row[kept]
        distance = self._distance(queries, query, row)
        chosen = k_least(distance, query, len(queries), k)
        return distance[chosen], row[chosen]

    def _distance(self, queries: Tensor, query: Tensor, row: Tensor) -> Tensor:
        size = max(1, (_NUMBERS if queries.device.type == "cpu" else _MANY_NUMBERS) // queries.shape[1])
        distance = queries.new_empty(len(query), dtype=torch.float64)
        for q, r, place in zip(query.split(size), row.split(size), distance.split(size), strict=True):
            difference = queries.index_select(0, q).double()
            difference -= self.features.index_select(0, r)
            torch.linalg.vector_norm(difference, dim=1, out=place)
        return distance

    def _products(self, centred: Tensor, query: Tensor, row: Tensor) -> Tensor:
        """Float32 products of pairs of rows; on the CPU without copying the rows, six times as fast."""
        if centred.device.type != "cpu":
            size = max(1, _MANY_NUMBERS // centred.shape[1])
            pairs = zip(query.split(size), row.split(size), strict=True)
            return torch.cat([torch.linalg.vecdot(centred[q], self.near[r]) for q, r in pairs])
        start = F.pad(torch.bincount(query, minlength=len(centred)).cumsum(0), (1, 0))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse", UserWarning)  # "CSR support is in beta"
            wanted = torch.sparse_csr_tensor(start, row, torch.zeros(len(row)), (len(centred), len(self.near)))
        products: Tensor = torch.sparse.sampled_addmm(wanted, centred, self.near.T, beta=0.0).values()
        return products

    # Which to use

    def _filter(self, way: Way) -> Filter:
        if way not in self._filters:
            size = len(self.features)
            if self._axes is None:
                self._axes = Axes(self.near[:size])
            if self._flat is None:
                self._flat = torch.cat([self._axes(part) for part in self.near[:size].split(4096)])
            self._filters[way] = Filter(way, self._axes, self._flat, len(self.near))
        return self._filters[way]

    def _choose(self, queries: Tensor, k: int) -> Way:
        if self.near.device.type != "cpu" or self.near.numel() < _SMALL or 4 * k * _GROUP > len(self.near):
            return "torch"
        if len(queries) >= _FEW and (self.chosen is None or len(queries) >= _MORE * self._measured):
            self.chosen, self._measured = self._measure(queries, k), len(queries)
            for way in set(self._filters) - {self.chosen}:
                del self._filters[way]
        return self.chosen or "torch"

    def _measure(self, queries: Tensor, k: int) -> Way:
        """Time each way on some of the queries; the fastest."""
        start = time.perf_counter()
        count = min(len(queries), max(_FEW, _BLOCK // len(self.near)))  # as many as are searched at once
        sample = queries[torch.linspace(0, len(queries) - 1, count, device=queries.device).long()]
        seconds: dict[Way, float] = {}
        survivors = {}
        self._measuring = True
        expected = self._search(sample[:_FEW], k, "torch")[0].float()
        for way in WAYS:
            if way in self._hopeless or (way == "int8" and not hasattr(torch, "_int_mm")):
                continue
            if way == "pca" and self._filter(way).axes.basis is None:
                continue  # it would be the product of torch over again
            found = self._search(sample[:_FEW], k, way)[0].float()  # which also builds the filter
            if not torch.equal(found, expected):
                log.warning("nearest neighbours: %s computes wrong products on this machine and is not used.", way)
                continue
            seconds[way] = self._timed(sample[:_FEW], k, way) * len(sample) / _FEW
            if way != "faiss" and seconds[way] > _HOPELESS * min(seconds.values()):  # faiss is slow on few
                self._hopeless.add(way)
            else:
                seconds[way] = self._timed(sample, k, way)
            survivors[way] = self.survivors
        for times in (2, 2, 1.2, 1.2):  # the closer to the fastest, the more turns
            for way in seconds:
                if seconds[way] < times * min(seconds.values()):
                    seconds[way] = min(seconds[way], self._timed(sample, k, way))
        more = queries[:_AT_ONCE]
        rivals = [way for way in seconds if seconds[way] < (1.5 if way == "faiss" else 1.2) * min(seconds.values())]
        if len(more) > count and "faiss" in rivals:
            for way in rivals:
                seconds[way] = math.inf
            for way in rivals * 2:
                seconds[way] = min(seconds[way], self._timed(more, k, way) * count / len(more))
        self._measuring, self._flat = False, None
        chosen = min(seconds, key=lambda way: seconds[way] * (_ASLEEP if way == "faiss" else 1))
        log.info(
            "nearest neighbours: %s chosen for %d rows of %d numbers; %d queries took %s (measured in %.2f s).",
            *(chosen, *self.features.shape, count),
            ", ".join(f"{way} {1e3 * seconds[way]:.1f} ms ({survivors[way]:.1f} rows each)" for way in seconds),
            time.perf_counter() - start,
        )
        return chosen

    def _timed(self, queries: Tensor, k: int, way: Way) -> float:
        start = time.perf_counter()
        self._search(queries, k, way)
        return time.perf_counter() - start


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([distance for distance, _ in parts]), torch.cat([rows for _, rows in parts])


def _length(rows: Tensor) -> Tensor:
    """Squared lengths of rows, ``(Q, 1)``, without a copy of the rows."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return length.square()


@contextmanager
def faiss_threads() -> Iterator[None]:
    """Let faiss use as many threads as torch, and restore its setting."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
