"""Memory bank: patch features kept -> nearest neighbours of queries.

Holds the kept rows ``(M, D)`` as a buffer that is saved with the model. Search is exact: a float32 product (torch)
or an index (faiss) only proposes, distances by float64 differences decide, ties go to the lowest row. Next:
`anomaly_map.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pl_patchcore.errors import UserError
from pl_patchcore.numerics import full_precision, product_margin

Search = Literal["auto", "torch", "faiss"]

_BLOCK = 1 << 24  # distances held at once: 64 MiB
_PAIRS = 1 << 23  # float64 numbers gathered at once: 64 MiB
_SPARE = 4  # neighbours asked of faiss beyond k, so that rounding can be ruled out


class MemoryBank(nn.Module):
    """Nearest neighbours among the kept patch features.

    Args:
        search: ``torch``: float32 product, on the bank's device. ``faiss``: ``IndexFlatL2`` on the CPU.
            ``auto``: torch. The answers are the same.

    Attributes:
        features: The kept rows, float32 ``(M, D)``; ``(0, 0)`` until filled.
    """

    features: Tensor

    def __init__(self, search: Search = "auto") -> None:
        super().__init__()
        if search not in ("auto", "torch", "faiss"):
            raise UserError(f"search must be auto, torch or faiss, got {search!r}.")
        self.search_by = search
        self.register_buffer("features", torch.empty(0, 0))
        self._derived: tuple[Tensor, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.features)

    def fill(self, features: Tensor) -> None:
        """Replace the bank by ``features``, float32 ``(M, D)``; ``(0, 0)`` empties it.

        Raises:
            UserError: If they hold NaN or infinity.
        """
        if not torch.isfinite(features).all():
            raise UserError("features hold NaN or infinity; look for a broken image or an overflow in half precision.")
        self.features = features
        self._derived = None

    def forward(self, queries: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Find the ``k`` nearest rows of each query.

        While a graph is recorded (``torch.export``, ``torch.compile``) the float32 product
        alone chooses, and only rows nearer to each other than its rounding can come in another order.

        Args:
            queries: Patch features, ``(Q, D)``.
            k: Neighbours, at most M.

        Returns:
            Euclidean distances float32 ``(Q, k)``, ascending, and rows int64 ``(Q, k)``.

        Raises:
            UserError: If the bank is empty or smaller than ``k``, dimensions differ, or queries are not finite.
        """
        if torch.compiler.is_compiling():
            return self._traced(queries.float(), k)
        self._check(queries, k)
        if not len(queries):
            return queries.new_zeros(0, k), torch.zeros(0, k, dtype=torch.int64, device=queries.device)
        with full_precision(queries.device):
            search = self._by_faiss if self.search_by == "faiss" else self._by_product
            block = max(1, _BLOCK // len(self))
            parts = [search(part, k) for part in queries.float().split(block)]
            return torch.cat([d for d, _ in parts]), torch.cat([r for _, r in parts])

    def _check(self, queries: Tensor, k: int) -> None:
        if not len(self):
            raise UserError("the memory bank is empty; fit the model first, or load a checkpoint of a fitted one.")
        if not 1 <= k <= len(self):
            raise UserError(f"k must be from 1 to the size of the memory bank, {len(self)}, got {k}.")
        if queries.ndim != 2 or queries.shape[1] != self.features.shape[1]:
            raise UserError(f"queries must be (Q, {self.features.shape[1]}), got {tuple(queries.shape)}.")
        if not torch.isfinite(queries).all():
            raise UserError(
                "patch features hold NaN or infinity; look for a broken image or an overflow in half precision."
            )

    def _centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, centred rows and their squared norms: products of centred rows round less."""
        if self._derived is None or self._derived[0].device != self.features.device:
            mean = self.features.double().mean(0).float()
            near = self.features - mean
            self._derived = mean, near, near.square().sum(1)
        return self._derived

    def _by_product(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        mean, near, norm = self._centred()
        centred = queries - mean
        own = centred.square().sum(1, keepdim=True)  # (Q, 1)
        square = torch.addmm(norm, centred, near.T, alpha=-2)  # (Q, M), squared distance less the query's norm
        smallest = square.amin(1, keepdim=True) if k == 1 else square.topk(k, largest=False).values[:, -1:]
        # the k-th distance is at most smallest + slack, and a product overstates by at most the slack again
        slack = product_margin(queries.shape[1]) * (own + norm.max())
        query, row = (square <= smallest + 2 * slack).nonzero(as_tuple=True)
        return self._decide(queries, query, row, k)

    def _decide(self, queries: Tensor, query: Tensor, row: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Choose the ``k`` nearest among candidate pairs (sorted by query, then row; at least k of each query)."""
        size = max(1, _PAIRS // queries.shape[1])
        distance = torch.cat(
            [
                torch.linalg.vector_norm(queries[q].double() - self.features[r].double(), dim=1)
                for q, r in zip(query.split(size), row.split(size), strict=True)
            ]
        )
        order = distance.sort(stable=True).indices
        order = order[query[order].sort(stable=True).indices]  # by query, then distance, then row
        count = torch.bincount(query, minlength=len(queries))
        first = count.cumsum(0) - count
        chosen = order[first[:, None] + torch.arange(k, device=query.device)]  # (Q, k)
        return distance[chosen].float(), row[chosen]

    def _by_faiss(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        import faiss

        mean, near, norm = self._centred()
        centred = queries - mean
        asked = min(k + _SPARE, len(self))
        with _faiss_threads():
            square, row = faiss.knn(centred.cpu().numpy(), near.cpu().numpy(), asked)
        rows = torch.from_numpy(row).to(queries.device).sort(1).values  # (Q, asked)
        query = torch.arange(len(queries), device=queries.device).repeat_interleave(asked)
        distance, found = self._decide(queries, query, rows.flatten(), k)
        if asked < len(self):  # sure only where the last one proposed is farther than rounding could explain
            own = centred.square().sum(1)
            slack = product_margin(queries.shape[1]) * (own + norm.max())
            last = torch.from_numpy(square[:, -1]).to(queries.device)
            unsure = (last - slack <= distance[:, -1].square()).nonzero().flatten()
            if len(unsure):
                distance[unsure], found[unsure] = self._by_product(queries[unsure], k)
        return distance, found

    def _traced(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        mean = self.features.mean(0)
        near = self.features - mean
        square = torch.addmm(near.square().sum(1), queries - mean, near.T, alpha=-2)
        rows = square.topk(k, dim=1, largest=False).indices
        distance = torch.linalg.vector_norm(queries[:, None] - self.features[rows], dim=2)
        distance, order = distance.sort(1)
        return distance, rows.gather(1, order)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "features")
        if saved is not None:  # its size is known only once fitted
            self.fill(torch.empty_like(saved, device=self.features.device).zero_())
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._derived = None


@contextmanager
def _faiss_threads() -> Iterator[None]:
    """Let faiss use as many threads as torch, and restore its setting."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
