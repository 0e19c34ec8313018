"""Options of `PatchCore` that come in groups, as frozen dataclasses: given as one of these or as a dict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pl_patchcore.errors import UserError

StoreKind = Literal["auto", "ram", "disk"]
StoreDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class StoreOptions:
    """Where the patch features of the training images are kept until the memory bank is selected.

    Args:
        kind: ``ram``, ``disk`` (a temporary file), or ``auto``: the disk where the fit would take more than half of the
            main memory available. The memory bank is the same.
        folder: Folder of the file; null: the system's folder for temporary files.
        dtype: ``float32``, or ``float16`` or ``bfloat16`` to halve the space: the memory bank's features are rounded
            so (the same ones are selected).
        selection_memory: GiB that greedy selection may take. Where that is too little to hold all projected features,
            it selects within chunks, then among the selected ones: at most 4 times as far from the patch features as
            the best coreset, where exact selection is at most 2 times as far. Null: select exactly.

    Raises:
        UserError: For a value that is out of range.
    """

    kind: StoreKind = "auto"
    folder: str | None = None
    dtype: StoreDtype = "float32"
    selection_memory: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(StoreKind):
            raise UserError(f"store.kind must be auto, ram or disk, got {self.kind!r}.")
        if self.dtype not in get_args(StoreDtype):
            raise UserError(f"store.dtype must be float32, float16 or bfloat16, got {self.dtype!r}.")
        memory = self.selection_memory
        if memory is not None and not (isinstance(memory, int | float) and memory > 0):
            raise UserError(f"store.selection_memory must be GiB above 0, got {memory!r}; leave it out for no limit.")
        if self.folder is not None and not isinstance(self.folder, str):
            raise UserError(f"store.folder must be the path of a folder, as text, got {self.folder!r}.")

    def check_method(self, coreset_method: str) -> None:
        """Refuse a limit of memory for a coreset method that knows none.

        Raises:
            UserError: If there is one.
        """
        if self.selection_memory is not None and coreset_method != "greedy":
            raise UserError(
                f"store.selection_memory goes with coreset_method greedy, got {coreset_method}; leave one of them out."
            )
