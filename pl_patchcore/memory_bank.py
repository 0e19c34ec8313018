"""Memory bank: patch features kept -> nearest neighbours of queries.

Holds the kept rows ``(M, D)`` as a buffer that is saved with the model. Search is exact (`exact_search.py`: a product
proposes, float64 differences decide, ties go to the lowest row) unless an index of faiss is asked for
(`approximate_search.py`). Next: `anomaly_map.py`.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pl_patchcore.approximate_search import ApproximateSearch, build_index, check_factory, is_built_for
from pl_patchcore.distributed import Processes
from pl_patchcore.errors import UserError
from pl_patchcore.exact_search import WAYS, ExactSearch
from pl_patchcore.numerics import full_precision
from pl_patchcore.shared_search import SharedSearch

log = logging.getLogger(__name__)

Search = str  # "auto", one of `WAYS`, or a factory string of faiss
BankDtype = Literal["float32", "float16", "bfloat16"]


class MemoryBank(nn.Module):
    """Nearest neighbours among the kept patch features.

    Args:
        search: Exact, with the same answers: ``torch`` (float32 product), ``pca`` (float32 product of principal
            components as a filter), ``bf16`` and ``int8`` (the same in low precision), ``faiss`` (``IndexFlatL2``,
            on the CPU); ``auto``: what is fastest here, by a short measurement on the first queries that is logged,
            and torch on a GPU. Approximate: a factory string of faiss, such as ``HNSW32`` or ``IVF1024,PQ64``; its
            distances are exact for the rows it finds.
        dtype: Type the rows are kept and saved in. Distances are exact to the rows so rounded. A search computes
            with a float32 copy of them.

    Attributes:
        features: The kept rows, ``(M, D)``; ``(0, 0)`` until filled; of a shared bank, this process's.
        index: The index of an approximate search, uint8; absent otherwise.
    """

    features: Tensor
    index: Tensor

    def __init__(self, search: Search = "auto", dtype: BankDtype = "float32") -> None:
        super().__init__()
        if dtype not in ("float32", "float16", "bfloat16"):
            raise UserError(f"bank_dtype must be float32, float16 or bfloat16, got {dtype!r}.")
        self.search_by, self.dtype = search, getattr(torch, dtype)
        self.approximate = search not in ("auto", *WAYS)
        self.register_buffer("features", torch.empty(0, 0, dtype=self.dtype))
        if self.approximate:
            check_factory(search)
            self.register_buffer("index", torch.empty(0, dtype=torch.uint8))
        self._exact: ExactSearch | None = None
        self._approximate: ApproximateSearch | None = None
        self._shared: SharedSearch | None = None

    def __len__(self) -> int:
        return len(self.features) if self._shared is None else self._shared.rows

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows by number, int64 of any shape ``(...)``: float32 ``(..., D)``."""
        if self._shared is None:
            return self.features[numbers].float()
        found = self._shared.fetch(numbers.flatten(), self.features)
        return found.view(*numbers.shape, found.shape[1])

    def share(self, processes: Processes) -> None:
        """Keep this process's share of the rows, those that are loaded later too; from then on search with the others.

        Every process must then make the same calls, and `serve` after its last. For exact search: an index is of the
        whole bank.
        """
        if self._shared is None:
            self._shared = SharedSearch(processes, len(self.features))
            self.features = self.features[slice(*self._shared.own)].clone()
            self._exact = None

    def serve(self) -> None:
        """Take part in the searches of processes that have more images than this one, until all are done."""
        if self._shared is not None:
            self._shared.serve(self.features, self._own_nearest)

    def unshare(self) -> None:
        """Be whole again, on every process."""
        if self._shared is not None:
            self.features, self._shared, self._exact = self._shared.whole(self.features), None, None

    def check(self, dimension: int, rows: int | None = None) -> None:
        """Refuse an index that cannot be built for a bank of ``(rows, dimension)``, before it is filled.

        Raises:
            UserError: With the reason.
        """
        if self.approximate:
            check_factory(self.search_by, dimension, rows)

    def fill(self, features: Tensor) -> None:
        """Replace the bank by ``features``, ``(M, D)``; ``(0, 0)`` empties it. Builds the index, if there is one.

        Raises:
            UserError: If they hold NaN or infinity, or the index cannot be built.
        """
        if not torch.isfinite(features).all():
            raise UserError("features hold NaN or infinity; look for a broken image or an overflow in half precision.")
        rounded = features.to(self.dtype)
        if not torch.isfinite(rounded).all():
            raise UserError(
                f"features reach {float(features.abs().max()):.3g}, too far for {self.dtype}; use bfloat16."
            )
        if self.approximate:
            data = build_index(self.search_by, rounded) if len(rounded) else torch.empty(0, dtype=torch.uint8)
            self.index = data.to(features.device)
        self.features = rounded
        self._exact = self._approximate = None

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
        if self._shared is not None:
            return self._shared.search(queries, k, self._own_nearest)
        if not self.approximate:
            return self._exactly(queries, k, self.search_by)
        if self._approximate is None:
            self._approximate = ApproximateSearch(self.index, self.features)
        return self._approximate(queries.float(), k, lambda few: self._exactly(few, k, "torch"))

    def _own_nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self._exactly(queries, k, self.search_by)

    def _exactly(self, queries: Tensor, k: int, way: str) -> tuple[Tensor, Tensor]:
        with full_precision(queries.device):
            if self._exact is None or self._exact.near.device != self.features.device:
                self._exact = ExactSearch(self.features)
            return self._exact(queries.float(), k, way)

    def recall(self, queries: Tensor) -> float:
        """Share of queries for which the approximate search finds a nearest row, and log it; 1 for exact search.

        Queries that are rows of the bank are left out, for an index finds them too easily; so give nominal patch
        features that were not kept. Test images, whose patches are farther, may do worse or better.

        Args:
            queries: ``(Q, D)``.
        """
        if not self.approximate:
            return 1.0
        nearest = self._exactly(queries, 1, "torch")[0][:, 0]
        found = self(queries)[0][:, 0]
        counted = nearest > 0 if (nearest > 0).any() else nearest >= 0
        recall = float((found <= nearest * (1 + 1e-6))[counted].double().mean())
        farther = float((found / nearest - 1)[counted & (nearest > 0)].double().nan_to_num().mean())
        log.info(
            "search %s finds the nearest row of %.1f %% of %d nominal patches that are not in the memory bank; "
            "distances are %.2f %% too large on average.",
            *(self.search_by, 100 * recall, int(counted.sum()), 100 * farther),
        )
        return recall

    def _check(self, queries: Tensor, k: int) -> None:
        if not len(self):
            raise UserError("the memory bank is empty; fit the model first, or load a checkpoint of a fitted one.")
        if not 1 <= k <= len(self):
            raise UserError(f"k must be from 1 to the size of the memory bank, {len(self)}, got {k}.")
        if queries.ndim != 2 or queries.shape[1] != self.features.shape[1]:
            raise UserError(f"queries must be (Q, {self.features.shape[1]}), got {tuple(queries.shape)}.")
        if len(queries) and not torch.isfinite(torch.stack(queries.aminmax())).all():  # NaN comes through
            raise UserError(
                "patch features hold NaN or infinity; look for a broken image or an overflow in half precision."
            )

    def _traced(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        features = self.features.float()
        mean = features.mean(0)
        near = features - mean
        square = torch.addmm(near.square().sum(1), queries - mean, near.T, alpha=-2)
        rows = square.topk(k, dim=1, largest=False).indices
        distance = torch.linalg.vector_norm(queries[:, None] - features[rows], dim=2)
        distance, order = distance.sort(1)
        return distance, rows.gather(1, order)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "features")
        if saved is not None and self._shared is not None:
            self._shared = SharedSearch(self._shared.processes, len(saved))
            saved = state_dict[prefix + "features"] = saved[slice(*self._shared.own)].clone()
        if saved is not None:  # its size is known only once fitted
            self.features = torch.empty(saved.shape, dtype=self.dtype, device=self.features.device)
        index = state_dict.pop(prefix + "index", None)  # of no use to another kind of search
        if self.approximate and saved is not None:
            if len(saved) and (index is None or not is_built_for(index, self.search_by, len(saved))):
                index = build_index(self.search_by, saved)
            elif index is None:
                index = self.index[:0]
            self.index = torch.empty(index.shape, dtype=torch.uint8, device=self.index.device)
            state_dict[prefix + "index"] = index
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._exact = self._approximate = None
