"""Memory bank: patch features kept -> nearest neighbours of queries.

Holds the kept rows ``(M, D)`` as a buffer that is saved with the model. Search is exact: a float32 product (torch)
or an index (faiss) only proposes, distances by float64 differences decide, ties go to the lowest row. Next:
`anomaly_map.py`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pl_patchcore.errors import UserError
from pl_patchcore.exact_search import WAYS, ExactSearch, Way
from pl_patchcore.numerics import full_precision

Search = Literal["auto"] | Way


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
        if search not in ("auto", *WAYS):
            raise UserError(f"search must be auto, {', '.join(WAYS)}, got {search!r}.")
        self.search_by = search
        self.register_buffer("features", torch.empty(0, 0))
        self._exact: ExactSearch | None = None

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
        self._exact = None

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
            if self._exact is None or self._exact.near.device != self.features.device:
                self._exact = ExactSearch(self.features)
            return self._exact(queries.float(), k, self.search_by)

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
        self._exact = None
