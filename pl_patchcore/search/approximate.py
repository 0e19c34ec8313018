"""Approximate nearest neighbours: an index of faiss (``HNSW32``, ``IVF1024,PQ64``) proposes, distances are exact.

faiss is imported where an index is made or read: most models have none.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from pl_patchcore.errors import UserError

_PROBED_LISTS = 16  # of an inverted file, that a query looks into; faiss's own default of 1 misses too much
_PROPOSED_ROWS = 16  # that an index proposes at least
_ANY_DIMENSION = 161_280  # while none is known: a multiple of most numbers of parts


def check_factory(search: str, dimension: int | None = None, rows: int | None = None) -> None:
    """Refuse an index that faiss cannot build of ``(rows, dimension)``, as far as they are known: `UserError`."""
    import faiss

    try:
        made = faiss.index_factory(dimension or _ANY_DIMENSION, search)  # kept: what it is cast to does not own it
    except RuntimeError as error:
        got = f"{search!r}, for {dimension} dimensions" if dimension else f"{search!r}"
        reason = re.split(r"Error: |failed: ", str(error))[-1].strip()
        raise UserError(
            f"search must be auto, torch, int8 or an index of faiss such as HNSW32, got {got} ({reason})."
        ) from error
    index: Any = faiss.downcast_index(made)  # C++ underneath
    needed = [1]  # rows that each stage is trained on
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain  # a C++ vector
        stages = [chain.at(i) for i in range(chain.size())]
        if any(stage.d_out > stage.d_in for stage in stages):
            raise UserError(f"search {search!r} asks for more dimensions than the {dimension} that there are.")
        needed += [stage.d_in for stage in stages]
        index = faiss.downcast_index(index.index)
    if (inverted := faiss.try_extract_index_ivf(index)) is not None:
        index = faiss.downcast_index(inverted)
        if not index.nlist:
            raise UserError(f"search {search!r} asks for 0 lists; IVF1024 asks for 1024.")
        needed.append(index.nlist)
    needed += [index.pq.ksub] if hasattr(index, "pq") else []
    if rows is not None and rows < max(needed):
        what = f"search {search!r} is trained on at least {max(needed)} rows, the memory bank has {rows}"
        raise UserError(f"{what}; keep more patch features, or take fewer lists or bits.")


def build_index(search: str, features: Tensor) -> Tensor:
    """Train an index on the bank ``(M, D)`` and fill it: uint8, its factory string, a zero, and what faiss writes."""
    import faiss

    rows = features.float().cpu().contiguous().numpy()
    check_factory(search, rows.shape[1], len(rows))
    index = faiss.index_factory(rows.shape[1], search)
    index.train(rows)
    index.add(rows)
    name = torch.tensor([*search.encode(), 0], dtype=torch.uint8)
    return torch.cat([name, torch.from_numpy(faiss.serialize_index(index))])


class ApproximateSearch:
    """Search by what `build_index` returned among the bank's rows ``(M, D)``; ``name`` is its factory string."""

    def __init__(self, index: Tensor, features: Tensor) -> None:
        import faiss

        end = int(index.argmin())  # the first zero
        self.features, self.name = features, bytes(index[:end].tolist()).decode()
        self.index = faiss.deserialize_index(index[end + 1 :].cpu().numpy())
        if (inverted := faiss.try_extract_index_ivf(self.index)) is not None:
            inverted.nprobe = min(_PROBED_LISTS, inverted.nlist)

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Distances float32 ``(Q, k)``, ascending, infinite where rows are missing, and rows int64 ``(Q, k)``."""
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        count = min(max(_PROPOSED_ROWS, 2 * k), len(self.features))
        found = self.index.search(queries.float().cpu().contiguous().numpy(), count)[1]
        rows = torch.from_numpy(found).to(queries.device).sort(1).values  # -1 where there are no more
        size = max(1, (1 << 19) // (count * queries.shape[1]))  # queries whose proposals fit in 4 MiB
        parts = zip(queries.double().split(size), rows.clamp(min=0).split(size), strict=True)
        distance = torch.cat([torch.linalg.vector_norm(q[:, None] - self.features[r], dim=2) for q, r in parts])
        nearest, order = distance.masked_fill_(rows < 0, torch.inf).sort(dim=1, stable=True)
        return nearest[:, :k].float(), rows.gather(1, order[:, :k])
