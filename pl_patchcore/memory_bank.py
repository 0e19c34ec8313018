"""Memory bank: patch features kept -> nearest neighbours of queries.

Holds the kept rows ``(M, D)`` in buffers that are saved with the model. Search is exact unless an index of faiss is
asked for (`search/approximate.py`): a product over the whole bank, with a bound of its error, says which rows may be
among the nearest; float64 differences decide. Queries that leave too many rows in doubt go to the next, more precise
product: of int8 coordinates (`search/int8_filter.py`), float32 rows, float64 rows. Next: `anomaly_map.py`.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_patchcore.errors import UserError
from pl_patchcore.numerics import (
    earlier_copies,
    full_precision,
    k_least,
    pair_products,
    product_margin,
    product_speed,
    shifted_product,
)
from pl_patchcore.search.approximate import ApproximateSearch, build_index, check_factory
from pl_patchcore.search.by_position import Places, PositionSearch, in_reach
from pl_patchcore.search.int8_filter import Int8Filter

log = logging.getLogger(__name__)

BankDtype = Literal["float32", "float16", "bfloat16"]
_CPU_SCORES = 1 << 23  # scores held at once on the CPU (32 MiB); a GPU, slow to start a kernel, takes 8 times as many
_CPU_GATHERED = 1 << 17  # float64 numbers gathered at once on the CPU (1 MiB, which a cache holds); 8 times on a GPU
_GROUP_ROWS = 128  # rows of the bank looked at together
_SMALL_BANK_NUMBERS = 1 << 21  # numbers in a bank for which the int8 filter is not worth its other work
_LEAST_INT8_SPEEDUP = 2.0  # times as fast as float32: an int8 product that pays
_MOST_VARIANCE_LEFT_OUT = 0.06  # share of the variance that the filter's components may leave out
_FLOAT32_ERROR = 2.0**-18  # of a row's length: bounds what float32 does to centring and to a proposed row's distance


class MemoryBank(nn.Module):
    """Nearest neighbours among the kept patch features.

    Args:
        search: Exact, with the same answers: ``torch`` (a float32 product), ``int8`` (on the CPU, a smaller product of
            int8 numbers first), ``auto`` (what suits the bank and the machine, chosen when the bank is filled or
            loaded). Approximate: a factory string of faiss, such as ``HNSW32`` or ``IVF1024,PQ64``.
        dtype: Type the rows are kept and saved in. Distances are exact to the rows so rounded.
        position_radius: Compare queries whose places are given to rows of patches at most so many cells away only, down
            and across; None: to all rows. See `search/by_position.py`.

    Attributes:
        features: The kept rows, ``(M, D)``; ``(0, 0)`` until filled.
        radii: How far the first rows reach, by their number, float32 ``(M + 1,)``; ``(0,)`` where not known.
        seen: How many patch features the rows were selected from, int64.
        images: Number of the image, or of the group of images, that each row comes from, int32 ``(M,)``, -1 where not
            known; ``(0,)`` where none is known.
        places: Row and column of each row's patch on its image's grid, int32 ``(M, 2)``; ``(0, 2)`` where not known.
        grid: Patches down and across of all the images, int64 ``(2,)``; zeros where not known.
        index: The index of an approximate search, uint8; ``(0,)`` otherwise.
    """

    features: Tensor
    radii: Tensor
    seen: Tensor
    images: Tensor
    places: Tensor
    grid: Tensor
    index: Tensor

    def __init__(self, search: str = "auto", dtype: BankDtype = "float32", position_radius: int | None = None) -> None:
        super().__init__()
        if dtype not in ("float32", "float16", "bfloat16"):
            raise UserError(f"bank_dtype must be float32, float16 or bfloat16, got {dtype!r}.")
        self.search, self.approximate = search, search not in ("auto", "torch", "int8")
        if self.approximate and position_radius is not None:
            raise UserError(
                f"position_radius goes with exact search only, got search {search!r}; leave one of them out."
            )
        self.position_radius = position_radius
        self.check()
        self.register_buffer("features", torch.empty(0, 0, dtype=getattr(torch, dtype)))
        self.register_buffer("radii", torch.empty(0, dtype=torch.float32))
        self.register_buffer("seen", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("images", torch.empty(0, dtype=torch.int32))
        self.register_buffer("places", torch.empty(0, 2, dtype=torch.int32))
        self.register_buffer("grid", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("index", torch.empty(0, dtype=torch.uint8))
        self._prepared: tuple[Any, int, Any] = None, 0, None  # features, their version, the search among them
        self._near: PositionSearch | None = None  # where there is a radius, prepared with it

    @property
    def size(self) -> int:
        """Number of rows, M."""
        return self.features.shape[0]

    def check(self, dimension: int | None = None, rows: int | None = None) -> None:
        """Refuse an index that cannot be built for a bank of ``(rows, dimension)``, as far as they are known."""
        if self.approximate:
            check_factory(self.search, dimension, rows)

    @torch.inference_mode(False)  # its tensors would not tell when they are written to
    def fill(
        self,
        features: Tensor,
        radii: Tensor | None = None,
        images: Tensor | None = None,
        places: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        """Replace the bank by ``features``, ``(M, D)``; ``(0, 0)`` empties it. Builds the index, if there is one.

        Args:
            features: The rows.
            radii: See the attribute; None: not known.
            images: See the attribute; None: not known.
            places: See the attribute; None: not known.
            grid: See the attribute; None: not known.
        """
        if not torch.isfinite(features).all():
            raise UserError("features hold NaN or infinity; look for a broken image or an overflow in half precision.")
        rounded = features.detach().to(self.features.dtype, copy=True)
        if not torch.isfinite(rounded).all():
            far = f"features reach {float(features.abs().max()):.3g}, too far for {rounded.dtype}"
            raise UserError(f"{far}; use bfloat16.")
        self.index, radii = self._built(rounded).to(rounded.device), self.radii[:0] if radii is None else radii
        self.radii = radii.to(rounded.device, torch.float32, copy=True)
        self.images = (self.images[:0] if images is None else images).to(rounded.device, torch.int32, copy=True)
        self.places = (self.places[:0] if places is None else places).to(rounded.device, torch.int32, copy=True)
        self.grid = torch.tensor(grid or (0, 0), dtype=torch.int64, device=rounded.device)
        self.features = rounded
        self._prepare()

    def forward(self, queries: Tensor, k: int = 1, places: Places | None = None) -> tuple[Tensor, Tensor]:
        """Find the ``k`` nearest rows of each query ``(Q, D)``; all M rows where there are no more.

        Where ``places`` are given and there is a ``position_radius``, among the rows in reach alone.

        While a graph is recorded (``torch.export``, ``torch.compile``) the float32 product alone chooses, and only
        rows nearer to each other than its rounding can come in another order.

        Returns:
            Euclidean distances float32 ``(Q, k)``, ascending, and rows int64 ``(Q, k)``, ties to the lowest.

        Raises:
            UserError: If the bank is empty, k is below 1, or the queries have another shape, or hold NaN or infinity.
        """
        size, dimension = self.features.shape
        k = min(k, size)
        if torch.compiler.is_compiling():
            features, queries = self.features.float(), queries.float()
            mean = features.mean(0)
            centred = features - mean
            square = torch.addmm(centred.square().sum(1), queries - mean, centred.T, alpha=-2)
            if places is not None and self.position_radius is not None:
                near = in_reach(places.at, self.places, self.position_radius, k)
                square = square.masked_fill(~near, torch.inf)
            rows = square.topk(k, dim=1, largest=False).indices
            distance, order = torch.linalg.vector_norm(queries[:, None] - features[rows], dim=2).sort(1)
            return distance, rows.gather(1, order)
        if not size:
            raise UserError("the memory bank is empty; fit the model first, or load a checkpoint of a fitted one.")
        if k < 1:
            raise UserError(f"k must be at least 1, got {k}.")
        if queries.ndim != 2 or queries.shape[1] != dimension:
            raise UserError(f"queries must be (Q, {dimension}), got {tuple(queries.shape)}.")
        if len(queries) and not torch.isfinite(torch.stack(queries.aminmax())).all():  # NaN comes through
            raise UserError("patch features hold NaN or infinity; look for a broken image or an overflow in float16.")
        # _version: nothing public tells that a tensor was written to; tensors of inference mode do not have it.
        features, version, search = self._prepared
        if features is not self.features or version != features._version:
            search = self._prepare()
        with full_precision(queries.device):
            if places is not None and self.position_radius is not None:
                return self.near(queries, k, places)
            distance, rows = search(queries, k)
            if self.approximate and (short := distance[:, -1].isinf()).any():  # the index finds too few rows
                distance[short], rows[short] = ExactSearch(self.features, "torch")(queries[short], k)
            return distance, rows

    @torch.no_grad()
    def near(self, queries: Tensor, k: int, places: Places, left_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `forward`, among the rows in reach; see `PositionSearch`.

        Raises:
            UserError: If the places of the rows are not known, or the queries lie on another grid.
        """
        if self._near is None or self._near.features is not self.features:
            if self.position_radius is None or len(self.places) != self.size:
                raise UserError("the memory bank does not know the places of its rows; fit again with position_radius.")
            height, width = self.grid.tolist()
            self._near = PositionSearch(self.features, self.places, (height, width), self.position_radius)
        return self._near(queries, k, places, left_out)

    def exact(self) -> MemoryBank | ExactSearch:
        """Exact search among the rows as they are now, whatever ``search`` says: the bank, if it is exact."""
        if not self.approximate:
            return self
        with full_precision(self.features.device):
            return ExactSearch(self.features, "auto")

    def recall(self, queries: Tensor) -> float:
        """Share of queries for which the approximate search finds a nearest row, and log it; 1 for exact search.

        Give nominal patch features ``(Q, D)``. Rows of the bank are left out, which an index finds too easily.
        """
        if not self.approximate:
            return 1.0
        with full_precision(queries.device):
            nearest = ExactSearch(self.features, "torch")(queries, 1)[0]
        counted = nearest > 0 if nearest.any() else nearest >= 0
        times = (self(queries)[0][counted] / nearest[counted]).nan_to_num(1.0).double()
        recall = float((times <= 1 + 1e-6).double().mean())
        log.info(
            "search %s finds the nearest row of %.1f %% of %d nominal patches that are not in the memory bank; "
            "distances are %.2f %% too large on average.",
            *(self.search, 100 * recall, len(times), 100 * float(times.mean() - 1)),
        )
        return recall

    def _built(self, features: Tensor, index: Tensor | None = None) -> Tensor:
        """The index of an approximate search among ``features``, if ``index`` is not it; empty for an exact one."""
        if not self.approximate or not len(features):
            return torch.empty(0, dtype=torch.uint8)
        if index is not None and len(index):
            found = ApproximateSearch(index, features)
            if found.name == self.search and found.index.ntotal == len(features):
                return index
        return build_index(self.search, features)

    @torch.inference_mode(False)
    def _prepare(self) -> Any:
        """Prepare the search among the rows as they are now, if there are any."""
        if self.features.is_inference():
            self.features = self.features.clone()
        features, search = self.features, None
        version = features._version  # before the preparation: what is written meanwhile is noticed
        if len(features) and not features.is_meta:
            with full_precision(features.device):
                by_index = ApproximateSearch(self.index, features) if self.approximate else None
                search = by_index or ExactSearch(features, self.search)
        self._prepared = features, version, search
        return search

    @torch.inference_mode(False)
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Give the buffers the sizes of those saved, and build the index if another was saved; torch documents this."""
        if (features := state_dict.get(prefix + "features")) is not None:
            state_dict[prefix + "index"] = self._built(features, state_dict.get(prefix + "index"))
            state_dict.setdefault(prefix + "images", self.images.new_empty(0))  # older files have none of these
            state_dict.setdefault(prefix + "places", self.places.new_empty(0, 2))
            state_dict.setdefault(prefix + "grid", torch.zeros_like(self.grid))
        for name, buffer in self.named_buffers():
            if (saved := state_dict.get(prefix + name)) is not None:
                setattr(self, name, buffer.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": (None, 0, None), "_near": None}


class ForeignRows:
    """A memory bank without the rows of one image (or group of images); `AnomalyScorer` takes it in a bank's place.

    Args:
        bank: A memory bank that knows the images of its rows.
        image: Number in ``bank.images`` whose rows are left out.
        search: The bank's exact search, from `MemoryBank.exact`.

    Attributes:
        features: All rows of the bank, ``(M, D)``.
        size: Number of rows that are not left out.
    """

    def __init__(self, bank: MemoryBank, image: int, search: MemoryBank | ExactSearch) -> None:
        self.bank, self.position_radius = bank, bank.position_radius
        self.features, self.search, self.own = bank.features, search, bank.images == image
        self.left_out = int(self.own.sum())
        self.size = bank.size - self.left_out

    def __call__(self, queries: Tensor, k: int = 1, places: Places | None = None) -> tuple[Tensor, Tensor]:
        """As `MemoryBank`: more and more neighbours are asked for, until k of them are foreign."""
        k = min(k, self.size)
        if places is not None and self.position_radius is not None:
            return self.bank.near(queries, k, places, self.own)
        distance = torch.empty(len(queries), k, dtype=torch.float32, device=queries.device)
        rows = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        left, asked = torch.arange(len(queries), device=queries.device), k
        while len(left):
            asked = min(4 * asked, k + self.left_out)
            with full_precision(queries.device):
                nearest, found = self.search(queries[left], asked)
            own = self.own[found]  # (Q, asked)
            first = own.int().argsort(stable=True, dim=1)[:, :k]  # foreign rows come first, by distance as they were
            done = (~own).sum(1) >= k
            distance[left[done]], rows[left[done]] = nearest.gather(1, first)[done], found.gather(1, first)[done]
            left = left[~done]
        return distance, rows


class ExactSearch:
    """Nearest neighbours in a bank ``(M, D)``, finite, prepared for any number of searches, as ``search`` says."""

    def __init__(self, features: Tensor, search: str) -> None:
        self.features, (size, dimension) = features, features.shape
        self.margin = product_margin(dimension)
        low, high = features.aminmax(dim=0)
        largest = float((high.double() - low.double()).max())  # no number of a row is farther from its mean
        # by a power of two, which is exact, to numbers whose squares float32 can hold
        self.scale = 2.0 ** -min(max(math.frexp(largest)[1], -126), 126)
        self.mean = features.mean(0, dtype=torch.float64).to(torch.promote_types(features.dtype, torch.float32))
        copies = earlier_copies(features)
        self.order = F.pad(copies.argsort(stable=True), (0, -size % _GROUP_ROWS))  # (M',) first copies, second, ...
        self.enough = copies.bincount().cumsum(0).tolist()  # by k - 1: rows that have fewer than k copies before them
        self.centred = features[self.order].to(self.mean.dtype).sub_(self.mean).mul_(self.scale).float()  # (M', D)
        self.norm = self.centred.square().sum(1)
        self.minus_half = F.pad(self.norm[:size] / -2, (0, len(self.order) - size), value=-torch.inf)
        self.longest = float(self.norm.max().sqrt())
        self.filter, why = None, "asked for" if search == "torch" else "a small bank"
        if features.device.type != "cpu":
            why = "a GPU"
        elif search == "int8" or (search == "auto" and size * dimension >= _SMALL_BANK_NUMBERS):
            faster = product_speed(torch.int8)
            why = f"int8 products are {faster:.1f} times as fast here"
            if faster and (search == "int8" or faster >= _LEAST_INT8_SPEEDUP):
                made = Int8Filter(self.centred[:size], len(self.centred))
                why += f", {made.axes.shape[1]} components leave out {made.left_out:.1%}"
                self.filter = made if search == "int8" or made.left_out <= _MOST_VARIANCE_LEFT_OUT else None
        name = "float32 product" if self.filter is None else "int8 filter"
        log.info("nearest neighbours among %d rows of %d numbers: %s (%s).", size, dimension, name, why)

    def __call__(self, queries: Tensor, k: int, product: str = "int8") -> tuple[Tensor, Tensor]:
        """Distances float32 ``(Q, k)``, ascending, and rows int64 ``(Q, k)``, ties to the lowest; k from 1 to M."""
        distance = torch.empty(len(queries), k, dtype=torch.float32, device=queries.device)
        found = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        at_once = 1 if queries.device.type == "cpu" else 8
        size = self.enough[min(k, len(self.enough)) - 1]
        size += -size % _GROUP_ROWS
        blocks = 1 + len(queries) * size // (at_once * _CPU_SCORES)
        product = "float32" if self.filter is None and product == "int8" else product
        parts = (each.tensor_split(blocks) for each in (queries, distance, found))
        for block, nearest, rows in zip(*parts, strict=True):
            query, place, unsure = self._candidates(block, k, size, product)
            row, step = self.order[place], max(1, at_once * _CPU_GATHERED // block.shape[1])
            pairs = zip(query.split(step), row.split(step), strict=True)
            differences = (block.index_select(0, q).double().sub_(self.features.index_select(0, r)) for q, r in pairs)
            exact = torch.cat([torch.linalg.vector_norm(each, dim=1) for each in differences])  # (P,)
            if len(row):
                best = k_least(exact, row, query, len(block), k)
                nearest[:], rows[:] = exact[best], row[best]
            if unsure.any():
                nearest[unsure], rows[unsure] = self(block[unsure], k, "float32" if product == "int8" else "float64")
        return distance, found

    def _candidates(self, queries: Tensor, k: int, size: int, product: str) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of queries and rows, of the first ``size``, that may be among the k nearest: ``(P,)``, by query.

        Also the queries that leave too many rows in doubt, and have no pairs, bool ``(Q,)``.
        """
        exactly, small = product == "float64", self.filter if product == "int8" else None
        centred = ((queries.double() if exactly else queries) - self.mean) * self.scale
        centred = centred if exactly else centred.float()
        length = torch.linalg.vector_norm(centred, dim=1, keepdim=True)  # (Q, 1)
        margin = self.margin * (2.0**-29 if exactly else 1)
        slack = margin * self.longest * (length + self.longest)
        if small:
            scores, square, moved = small.scores(centred, size)
        elif exactly:
            wide = ((self.features[rows].double() - self.mean) * self.scale for rows in self.order[:size].split(4096))
            scores = torch.cat([torch.addmm(rows.square().sum(1) / -2, centred, rows.T) for rows in wide], 1)
            scores[:, len(self.features) :] = -torch.inf  # `order` has been padded
        else:
            scores = shifted_product(centred, self.centred[:size], self.minus_half[:size])
        group = _GROUP_ROWS if 4 * k * _GROUP_ROWS <= size else 1
        grouped = scores.unflatten(1, (-1, group))
        best = grouped.amax(2)  # (Q, groups)
        top, place = best.topk(k, dim=1)  # of k groups, so that k rows are as near as the last of them
        if small:  # the score of a row as far as the k-th nearest may be
            row = place * group + grouped[torch.arange(len(queries))[:, None], place].argmax(2)  # (Q, k)
            near = self.norm[row] - 2 * torch.linalg.vecdot(centred[:, None], self.centred[row])
            near = near.amax(1, keepdim=True) + length.square() + margin * (length.square() + self.longest**2)
            reach = near.clamp(min=0).sqrt() + _FLOAT32_ERROR * (length + self.longest)
            reach = reach.double() / small.step + moved + small.moved
            threshold = ((square - reach.square()) / 2).floor().clamp(min=1 - (1 << 30)).int()
        else:
            threshold = top[:, -1:] - slack
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
