"""Memory bank: patch features kept -> nearest neighbours of queries.

Holds the kept rows ``(M, D)`` in buffers that are saved with the model. Search is exact (`search/exact.py`) unless an
index of faiss is asked for (`search/approximate.py`). Next: `anomaly_map.py`.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pl_patchcore.errors import UserError
from pl_patchcore.numerics import full_precision
from pl_patchcore.search.approximate import ApproximateSearch, build_index, check_factory
from pl_patchcore.search.exact import ExactSearch

log = logging.getLogger(__name__)

BankDtype = Literal["float32", "float16", "bfloat16"]


class MemoryBank(nn.Module):
    """Nearest neighbours among the kept patch features.

    Args:
        search: Exact, with the same answers: ``torch`` (a float32 product), ``int8`` (on the CPU, a smaller product of
            int8 numbers first), ``auto`` (what suits the bank and the machine, chosen when the bank is filled or
            loaded). Approximate: a factory string of faiss, such as ``HNSW32`` or ``IVF1024,PQ64``.
        dtype: Type the rows are kept and saved in. Distances are exact to the rows so rounded.

    Attributes:
        features: The kept rows, ``(M, D)``; ``(0, 0)`` until filled.
        radii: How far the first rows reach, by their number, float32 ``(M + 1,)``; ``(0,)`` where not known.
        seen: How many patch features the rows were selected from, int64.
        index: The index of an approximate search, uint8; ``(0,)`` otherwise.
    """

    features: Tensor
    radii: Tensor
    seen: Tensor
    index: Tensor

    def __init__(self, search: str = "auto", dtype: BankDtype = "float32") -> None:
        super().__init__()
        if dtype not in ("float32", "float16", "bfloat16"):
            raise UserError(f"bank_dtype must be float32, float16 or bfloat16, got {dtype!r}.")
        if search in ("pca", "bf16", "faiss"):
            raise UserError(f"search {search!r} is gone; use auto.")
        self.search, self.approximate = search, search not in ("auto", "torch", "int8")
        self.check()
        self.register_buffer("features", torch.empty(0, 0, dtype=getattr(torch, dtype)))
        self.register_buffer("radii", torch.empty(0, dtype=torch.float32))
        self.register_buffer("seen", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("index", torch.empty(0, dtype=torch.uint8))
        self._prepared: tuple[Tensor, int, Any] | None = None  # features, their version, the search among them
        self.register_load_state_dict_pre_hook(_make_room)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]

    @property
    def size(self) -> int:
        """Number of rows, M."""
        return self.features.shape[0]

    def check(self, dimension: int | None = None, rows: int | None = None) -> None:
        """Refuse an index that cannot be built for a bank of ``(rows, dimension)``, as far as they are known."""
        if self.approximate:
            check_factory(self.search, dimension, rows)

    def fill(self, features: Tensor, radii: Tensor | None = None) -> None:
        """Replace the bank by ``features``, ``(M, D)``; ``(0, 0)`` empties it. Builds the index, if there is one."""
        if not torch.isfinite(features).all():
            raise UserError("features hold NaN or infinity; look for a broken image or an overflow in half precision.")
        with torch.inference_mode(False):  # whose tensors do not tell when they are written to
            rounded = features.detach().to(self.features.dtype, copy=True)
            if not torch.isfinite(rounded).all():
                far = f"features reach {float(features.abs().max()):.3g}, too far for {rounded.dtype}"
                raise UserError(f"{far}; use bfloat16.")
            index, radii = self._built(rounded), self.radii[:0] if radii is None else radii
            self.index, self.radii = index.to(rounded.device), radii.to(rounded.device, torch.float32, copy=True)
            self.features = rounded
        _prepare(self)

    def cut(self, size: int) -> None:
        """Keep the first ``size`` rows, and the radii up to there."""
        self.fill(self.features[:size], self.radii[: size + 1])

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows by number, int64 of any shape ``(...)``: float32 ``(..., D)``."""
        return self.features[numbers].float()

    def forward(self, queries: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Find the ``k`` nearest rows of each query ``(Q, D)``, k at most M.

        While a graph is recorded (``torch.export``, ``torch.compile``) the float32 product alone chooses, and only
        rows nearer to each other than its rounding can come in another order.

        Returns:
            Euclidean distances float32 ``(Q, k)``, ascending, and rows int64 ``(Q, k)``, ties to the lowest.
        """
        features, prepared = self.features, self._prepared
        if torch.compiler.is_compiling():
            return _recorded(features.float(), queries.float(), k)
        if not len(features):
            raise UserError("the memory bank is empty; fit the model first, or load a checkpoint of a fitted one.")
        if not 1 <= k <= len(features):
            raise UserError(f"k must be from 1 to the size of the memory bank, {len(features)}, got {k}.")
        if queries.ndim != 2 or queries.shape[1] != features.shape[1]:
            raise UserError(f"queries must be (Q, {features.shape[1]}), got {tuple(queries.shape)}.")
        if len(queries) and not torch.isfinite(torch.stack(queries.aminmax())).all():  # NaN comes through
            raise UserError("patch features hold NaN or infinity; look for a broken image or an overflow in float16.")
        # _version: nothing public tells that a tensor was written to; tensors of inference mode do not have it.
        if not prepared or prepared[0] is not features or prepared[1] != features._version:
            prepared = _prepare(self)
        with full_precision(queries.device):
            found: tuple[Tensor, Tensor] = prepared[2](queries, k)
            return found

    def recall(self, queries: Tensor) -> float:
        """Share of queries for which the approximate search finds a nearest row, and log it; 1 for exact search.

        Queries that are rows of the bank are left out, for an index finds them too easily; so give nominal patch
        features ``(Q, D)`` that were not kept. Test images, whose patches are farther, may do worse or better.
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

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": None}


def _make_room(bank: MemoryBank, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Before a state dict is loaded: buffers of its sizes, and an index as this bank's search wants it."""
    if (features := state_dict.get(prefix + "features")) is not None:
        state_dict[prefix + "index"] = bank._built(features, state_dict.get(prefix + "index"))
    with torch.inference_mode(False):
        for name, buffer in bank.named_buffers():
            shape = state_dict.get(prefix + name, buffer).shape
            setattr(bank, name, torch.zeros(shape, dtype=buffer.dtype, device=buffer.device))


def _after_loading(bank: MemoryBank, _: object) -> None:
    _prepare(bank)


def _prepare(bank: MemoryBank, _: object = None) -> Any:
    """Prepare the search among the rows as they are now, if there are any."""
    with torch.inference_mode(False), full_precision(bank.features.device):
        if bank.features.is_inference():
            bank.features = bank.features.clone()
        features, bank._prepared = bank.features, None
        if len(features) and not features.is_meta:
            version = features._version
            made = ApproximateSearch(bank.index, features) if bank.approximate else ExactSearch(features, bank.search)
            bank._prepared = features, version, made
    return bank._prepared


def _recorded(features: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    mean = features.mean(0)
    centred = features - mean
    square = torch.addmm(centred.square().sum(1), queries - mean, centred.T, alpha=-2)
    rows = square.topk(k, dim=1, largest=False).indices
    distance, order = torch.linalg.vector_norm(queries[:, None] - features[rows], dim=2).sort(1)
    return distance, rows.gather(1, order)
