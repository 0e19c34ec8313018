"""Exact nearest neighbours: a cheap product over the whole bank proposes rows, float64 differences decide.

Reads queries ``(Q, D)`` and the bank ``(M, D)``; `memory_bank.py` calls it. A bound of the product's error says which
rows may be among the nearest. Queries that leave too many in doubt go to the next, more precise product: of int8
coordinates, of float32 rows, of float64 ones. All give the same answers.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pl_patchcore.numerics import earlier_copies, int8_product, k_least, pair_products, product_margin, shifted_product

log = logging.getLogger(__name__)

_SCORES = 1 << 23  # held at once on the CPU (32 MiB); 8 times as many on a GPU, where starting a kernel takes longest
_NUMBERS = 1 << 17  # float64 numbers gathered at once on the CPU (1 MiB, which a cache holds); 8 times on a GPU
_GROUP = 128  # rows of the bank looked at together
_SAFE = 2.0**40  # float32 holds the squares of numbers up to this, and down to its reciprocal
_SMALL = 1 << 21  # numbers in a bank for which the int8 filter is not worth its other work
_FASTER = 2.0  # times as fast as float32: an int8 product that pays
_COMPONENTS = 255  # principal components; with the length of the rest, a multiple of what processors multiply at once
_LEFT_OUT = 0.06  # share of the variance that they may leave out
_LOOK = 16  # queries of a block that the int8 filter is tried with first
_INEXACT = 2.0**-18  # of a row's length: bounds what float32 does to centring and to the distance of the row proposed


class Int8Filter:
    """Coordinates of a bank's centred rows float32 ``(M, D)`` in int8.

    They are the first principal components and, as one more, the length of what these leave out. Distances in them
    never exceed the true ones (triangle inequality, once more for the lengths). A random rotation spreads heavy tails
    over all of them, so that one step size suits all. Rounding moves a row by a length that is computed, so a row can
    be the nearest only if its rounded distance is at most the true distance of the row proposed, plus both lengths.
    """

    def __init__(self, rows: Tensor, length: int) -> None:
        sample, g = rows[:: max(1, len(rows) // 2048)], torch.Generator().manual_seed(0)
        axes = torch.randn(rows.shape[1], min(rows.shape[1], _COMPONENTS), generator=g, dtype=torch.float32)
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


class ExactSearch:
    """Nearest neighbours in a bank ``(M, D)``, finite, prepared for any number of searches, as ``search`` says."""

    def __init__(self, features: Tensor, search: str) -> None:
        self.features, (size, dimension), on_cpu = features, features.shape, features.device.type == "cpu"
        low, high = features.aminmax(dim=0)
        largest = float((high.double() - low.double()).max())  # no number of a row is farther from its mean
        self.mean, self.scale = features.mean(0, dtype=torch.float64), 1.0
        if 1 / _SAFE < largest < _SAFE and features.dtype != torch.float64:
            self.mean = self.mean.float()  # any shift will do that all rows have in common
        else:
            self.scale = 2.0 ** -math.frexp(largest)[1]
        copies = earlier_copies(features)
        self.order = F.pad(copies.argsort(stable=True), (0, -size % _GROUP))  # (M',) first copies, second copies, ...
        self.enough = copies.bincount().cumsum(0).tolist()  # by k - 1: rows that have fewer than k copies before them
        self.centred = torch.zeros(len(self.order), dimension, dtype=torch.float32, device=features.device)
        for place, rows in zip(self.centred[:size].split(1024), self.order[:size].split(1024), strict=True):
            place[:] = (features[rows] - self.mean) * self.scale
        self.norm = self.centred.square().sum(1)
        self.minus_half = F.pad(self.norm[:size] / -2, (0, len(self.order) - size), value=-torch.inf)
        self.longest = float(self.norm.max().sqrt())
        self.filter, why = None, "a small bank" if on_cpu else "a GPU"
        if on_cpu and (search == "int8" or (search == "auto" and size * dimension >= _SMALL)):
            faster = int8_product()
            why = f"int8 products are {faster:.1f} times as fast here"
            if faster and (search == "int8" or faster >= _FASTER):
                made = Int8Filter(self.centred[:size], len(self.centred))
                why += f", {made.axes.shape[1]} components leave out {made.left_out:.1%}"
                self.filter = made if search == "int8" or made.left_out <= _LEFT_OUT else None
        name = "float32 product" if self.filter is None else "int8 filter"
        log.info("nearest neighbours among %d rows of %d numbers: %s (%s).", size, dimension, name, why)

    def __call__(self, queries: Tensor, k: int, product: str = "int8") -> tuple[Tensor, Tensor]:
        """Distances float32 ``(Q, k)``, ascending, and rows int64 ``(Q, k)``, ties to the lowest; k from 1 to M."""
        distance = torch.empty(len(queries), k, dtype=torch.float32, device=queries.device)
        found = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        at_once = 1 if queries.device.type == "cpu" else 8
        size = self.enough[min(k, len(self.enough)) - 1]
        size += -size % _GROUP
        blocks = 1 + len(queries) * size * (4 if product == "float64" else 1) // (at_once * _SCORES)
        for block, nearest, rows in zip(
            *(each.tensor_split(blocks) for each in (queries, distance, found)), strict=True
        ):
            used = "float32" if self.filter is None and product == "int8" else product
            if used == "int8" and len(block) > 32 * _LOOK:  # does it rule out enough for most?
                unsure = self._candidates(block[:: len(block) // _LOOK], k, size, used)[2]
                used = "float32" if 2 * int(unsure.sum()) > len(unsure) else used
            query, place, unsure = self._candidates(block, k, size, used)
            row, step = self.order[place], max(1, at_once * _NUMBERS // block.shape[1])
            exact = torch.empty(len(row), dtype=torch.float64, device=block.device)
            for q, r, part in zip(query.split(step), row.split(step), exact.split(step), strict=True):
                difference = block.index_select(0, q).double().sub_(self.features.index_select(0, r))
                torch.linalg.vector_norm(difference, dim=1, out=part)
            if len(row):
                best = k_least(exact, row, query, len(block), k)
                nearest[:], rows[:] = exact[best], row[best]
            if unsure.any():
                nearest[unsure], rows[unsure] = self(block[unsure], k, "float32" if used == "int8" else "float64")
        return distance, found

    def _candidates(self, queries: Tensor, k: int, size: int, product: str) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of queries and rows, of the first ``size``, that may be among the k nearest: ``(P,)``, by query.

        Also the queries that leave too many rows in doubt, and have no pairs, bool ``(Q,)``.
        """
        exactly, small = product == "float64", self.filter if product == "int8" else None
        centred = (queries - self.mean) * self.scale
        centred = centred.double() if exactly else centred.float()
        length = torch.linalg.vector_norm(centred, dim=1, keepdim=True)  # (Q, 1)
        margin = product_margin(centred.shape[1]) * (2.0**-29 if exactly else 1)
        slack = margin * self.longest * (length + self.longest)
        if small:
            scores, square, moved = small.scores(centred, size)
        elif exactly:
            parts = self.order[: min(size, len(self.features))].split(4096)
            wide = ((self.features[part].double() - self.mean) * self.scale for part in parts)
            scores = torch.cat([torch.addmm(part.square().sum(1) / -2, centred, part.T) for part in wide], 1)
            scores = F.pad(scores, (0, size - scores.shape[1]), value=-torch.inf)
        else:
            scores = shifted_product(centred, self.centred[:size], self.minus_half[:size])
        group = _GROUP if 4 * k * _GROUP <= size else 1
        grouped = scores.unflatten(1, (-1, group))
        best = grouped.amax(2)  # (Q, groups)
        top, place = best.topk(k, dim=1)  # of k groups, so that k rows are as near as the last of them
        threshold = top[:, -1:]
        if small:  # the score of a row as far as the k-th nearest may be
            row = place * group + grouped[torch.arange(len(queries))[:, None], place].argmax(2)  # (Q, k)
            near = self.norm[row] - 2 * torch.linalg.vecdot(centred[:, None], self.centred[row])
            near = near.amax(1, keepdim=True) + length.square() + margin * (length.square() + self.longest**2)
            reach = near.clamp(min=0).sqrt() + _INEXACT * (length + self.longest)
            reach = reach.double() / small.step + moved + small.moved
            threshold = ((square - reach.square()) / 2).floor().clamp(min=1 - (1 << 30)).int()
        else:
            threshold = threshold - slack
        may = best >= threshold
        unsure = ((may.sum(1) > max(4 * k, may.shape[1] * 7 // 8)) | ~(length[:, 0] < 1e15)) & (not exactly)
        query, part = (may & ~unsure[:, None]).nonzero(as_tuple=True)
        pair, place = (grouped[query, part] >= threshold[query]).nonzero(as_tuple=True)
        query, row = query[pair], part[pair] * group + place
        unsure |= (torch.bincount(query, minlength=len(queries)) > max(32 * k, size // 16)) & (not exactly)
        kept = ~unsure[query]
        query, row = query[kept], row[kept]
        if small and len(query):  # a float32 product tells nearly all pairs apart
            near = self.norm[row] - 2 * pair_products(centred, self.centred, query, row)
            kept = near <= (near[k_least(near, row, query, len(queries), k)[:, -1:]] + 2 * slack)[query, 0]
            query, row = query[kept], row[kept]
        return query, row, unsure
