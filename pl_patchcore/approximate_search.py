"""Approximate nearest neighbours by an index of faiss: rows proposed by the index, their distances exact.

Reads the bank ``(M, D)``, builds any index of faiss's factory strings (``HNSW32``, ``IVF1024,PQ64``), and keeps it as
one uint8 tensor that goes into the checkpoint; `memory_bank.py` calls it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pl_patchcore.errors import UserError
from pl_patchcore.exact_search import WAYS, faiss_threads

_PROBED = 16  # lists of an inverted file that a query looks into; faiss's own default of 1 misses too much
_PROPOSED = 16  # rows that an index proposes at least
_ANY = 161_280  # dimension while none is known: a multiple of most numbers of parts


def check_factory(search: str, dimension: int | None = None, rows: int | None = None) -> None:
    """Refuse an index that faiss cannot build, as far as is known.

    Args:
        search: Factory string of faiss.
        dimension: D, once it is known.
        rows: M, once it is known.

    Raises:
        UserError: With faiss's reason, or with the number of rows its training needs.

    Example:
        >>> check_factory("IVF16,PQ8", dimension=64)
        >>> check_factory("PQ7", dimension=64)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        pl_patchcore.errors.UserError: search 'PQ7' is none of ...
    """
    import faiss

    try:
        index = faiss.index_factory(dimension or _ANY, search)
    except RuntimeError as error:
        reason = re.split(r"Error: |failed: ", str(error))[-1].strip()
        raise UserError(
            f"search {search!r} is none of auto, {', '.join(WAYS)}, nor an index of faiss"
            f"{f' for {dimension} dimensions' if dimension else ''} ({reason}); HNSW32 is one."
        ) from error
    needed = _rows_needed(index, dimension or _ANY, search)
    if rows is not None and rows < needed:
        raise UserError(
            f"search {search!r} is trained on at least {needed} rows, the memory bank has {rows}; keep more patch "
            "features, or take fewer lists or bits."
        )


def _rows_needed(index: Any, dimension: int, search: str) -> int:
    """Rows without which an index cannot be trained."""
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain  # a C++ vector
        for i in range(chain.size()):
            if chain.at(i).d_out > chain.at(i).d_in:
                raise UserError(f"search {search!r} asks for more dimensions than the {dimension} that there are.")
        return max(index.d if chain.size() else 1, _rows_needed(index.index, dimension, search))
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None and not inverted.nlist:
        raise UserError(f"search {search!r} asks for 0 lists; IVF1024 asks for 1024.")
    quantizer = getattr(index if inverted is None else faiss.downcast_index(inverted), "pq", None)
    return max(1, 0 if inverted is None else inverted.nlist, 0 if quantizer is None else quantizer.ksub)


def build_index(search: str, features: Tensor) -> Tensor:
    """Train an index on the bank, fill it, and write it into a tensor.

    Args:
        search: Factory string of faiss.
        features: The bank, ``(M, D)``.

    Returns:
        uint8, on the CPU.

    Raises:
        UserError: As `check_factory`.
    """
    import faiss

    rows = features.float().cpu().contiguous().numpy()
    check_factory(search, rows.shape[1], len(rows))
    index = faiss.index_factory(rows.shape[1], search)
    with faiss_threads():
        index.train(rows)
        index.add(rows)
    written = torch.from_numpy(faiss.serialize_index(index))
    return torch.cat([torch.tensor([*search.encode(), 0], dtype=torch.uint8), written])  # what it is, what it holds


def is_built_for(data: Tensor, search: str, rows: int) -> bool:
    """Whether a tensor of `build_index` holds this kind of index, of so many rows."""
    name = torch.tensor([*search.encode(), 0], dtype=torch.uint8)
    return torch.equal(data[: len(name)].cpu(), name) and _read(data).ntotal == rows


def _read(data: Tensor) -> Any:
    import faiss

    start = int((data == 0).nonzero()[0]) + 1
    return faiss.deserialize_index(data[start:].cpu().numpy())


class ApproximateSearch:
    """Search by an index: it proposes rows, their exact distances sort them.

    Args:
        data: What `build_index` returned.
        features: The bank, ``(M, D)``.
    """

    def __init__(self, data: Tensor, features: Tensor) -> None:
        import faiss

        self.index, self.features = _read(data), features
        inverted = faiss.try_extract_index_ivf(self.index)
        if inverted is not None:
            inverted.nprobe = min(_PROBED, inverted.nlist)

    def __call__(
        self, queries: Tensor, k: int, exactly: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Find ``k`` near rows of each query.

        Args:
            queries: float32 ``(Q, D)``.
            k: Neighbours, at most M.
            exactly: Searches in place of the index for queries of which it finds too few rows.

        Returns:
            Distances float32 ``(Q, k)``, ascending, exact for the rows int64 ``(Q, k)``.
        """
        count = min(max(_PROPOSED, 2 * k), len(self.features))
        with faiss_threads():
            found = self.index.search(queries.cpu().contiguous().numpy(), count)[1]
        rows = torch.from_numpy(found).to(queries.device).sort(1).values  # -1 where there are no more
        distance = torch.empty(rows.shape, dtype=torch.float64, device=queries.device)
        size = max(1, (1 << 19) // (count * queries.shape[1]))
        parts = zip(distance.split(size), queries.split(size), rows.clamp(min=0).split(size), strict=True)
        for place, q, r in parts:
            place[:] = torch.linalg.vector_norm(q.double()[:, None] - self.features[r].double(), dim=2)
        distance[rows < 0] = torch.inf
        nearest, order = distance.sort(dim=1, stable=True)
        nearest, rows = nearest[:, :k].float(), rows.gather(1, order[:, :k])
        short = nearest[:, -1].isinf()
        if short.any():
            nearest[short], rows[short] = exactly(queries[short])
        return nearest, rows
