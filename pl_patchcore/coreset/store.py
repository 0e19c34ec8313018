"""The epoch's patch features -> one store of rows ``(N, D)``, in main memory or in a file.

Two things are kept of each patch: its feature, of which only the rows picked are read again (for `memory_bank.py`),
and its random projection, which the selection reads. Features are projected as they come, one product an image, so
that neither the batches nor the place of the store change a bit of the result. Space is reserved before work is spent
(`plan.py` says how much it takes); where the number of images is not known, it grows. Rows are read in the order of the
data set, whatever order they came in.

The file has no name, or the system removes it with the last handle, so that a fit that is killed leaves nothing. It is
read and written by offset, not memory-mapped: a map was measured to be no faster, and its pages count as the process's.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import tempfile
from typing import Any

import torch
from torch import Tensor

from pl_patchcore.coreset.plan import GIB, available_memory
from pl_patchcore.errors import UserError
from pl_patchcore.numerics import full_precision

GROWTH = 1 << 16  # rows that are reserved at a time where the number of images is not known, and copied at a time
_REMEDIES = (
    "store.dtype: bfloat16 (half the bytes), or take a larger patches.stride, layers with fewer channels, smaller "
    "images or fewer images"
)


class FeatureStore:
    """Patch features of the images seen, and their projections.

    Args:
        dimension: Numbers in a patch feature, D.
        rows: Rows expected; space for them is reserved at once. More may come. None: the store grows.
        projection: float32 ``(D, d)``, see `random_projection`; None: the selection reads the features themselves.
        folder: Folder of the file; None keeps the features in main memory.
        dtype: What features are rounded to; projections are float32, of the features before rounding.
        projected_on_disk: Keep the projections in a file too, where ``folder`` is given.

    Raises:
        UserError: If there is no room, in main memory or in ``folder``, for the rows expected.

    Example:
        >>> store = FeatureStore(2, folder=tempfile.gettempdir())
        >>> store.add(torch.tensor([[[[3.0, 4.0]]], [[[1.0, 2.0]]]]), torch.tensor([7, 5]))
        >>> store.take(torch.tensor([0, 1])).tolist()
        [[1.0, 2.0], [3.0, 4.0]]
        >>> store.close()
    """

    def __init__(
        self,
        dimension: int,
        rows: int | None = None,
        projection: Tensor | None = None,
        folder: str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        projected_on_disk: bool = False,
    ) -> None:
        self.dimension, self.dtype = dimension, dtype
        self._matrix = projection
        # index of each image, as it came; no tensors, of which one a batch would split the allocator's free memory
        self._images: list[int] = []
        self.patches = 1  # of an image
        self._features = _rows(dimension, dtype, folder)
        self._projected: _MemoryRows | _FileRows | None = None
        try:
            self._features.reserve(rows or GROWTH)
            if projection is not None:
                self._projected = _rows(projection.shape[1], torch.float32, folder if projected_on_disk else None)
                self._projected.reserve(rows or GROWTH)
        except UserError:
            self.close()
            raise

    def __len__(self) -> int:
        return self._features.length

    @property
    def images(self) -> list[int]:
        """Index of each image in the data set, ascending."""
        return sorted(self._images)

    def add(self, patches: Tensor, images: Tensor) -> None:
        """Append the patches of a batch.

        Args:
            patches: ``(B, h, w, D)``, any floating dtype and device, h and w the same in all calls.
            images: Index of each image in the data set, int64 ``(B,)``.

        Raises:
            UserError: If memory or disk is full, or a number does not fit float16.
        """
        limit = torch.finfo(torch.float16).max
        if self.dtype == torch.float16 and patches.numel() and (largest := float(patches.abs().max())) > limit:
            raise UserError(f"a patch feature holds {largest:g}, beyond float16's 65504; set store.dtype: bfloat16.")
        self.patches = patches.shape[1] * patches.shape[2]
        self._images += images.tolist()
        self._features.append(patches.reshape(-1, self.dimension))
        if self._projected is not None and self._matrix is not None:
            self._matrix = self._matrix.to(patches.device)
            with full_precision(patches.device):
                for image in patches.reshape(len(patches), -1, self.dimension):  # (h w, D)
                    self._projected.append(image.float() @ self._matrix)

    def projected(self, rows: Tensor | None = None) -> Tensor:
        """Projections (features, where there is no projection) of rows of the data set's order.

        Args:
            rows: int64 ``(n,)``; None for all.

        Returns:
            float32 ``(n, d)``, on the CPU; of all rows, it may be the store's own memory.
        """
        kept = self._features if self._projected is None else self._projected
        if rows is not None:
            return kept.read(self._arrival(rows.cpu())).float()
        if kept.whole is not None and all(a < b for a, b in itertools.pairwise(self._images)):
            return kept.whole.float()
        result = torch.empty(len(self), kept.width, dtype=torch.float32)
        for part in torch.arange(len(self)).split(GROWTH):
            result[part] = kept.read(self._arrival(part)).float()
        return result

    def take(self, rows: Tensor) -> Tensor:
        """Copy rows of the data set's order: int64 ``(M,)`` -> float32 ``(M, D)``, on the CPU."""
        return self._features.read(self._arrival(rows.cpu())).float()

    def close(self) -> None:
        """Free memory and disk."""
        self._features.close()
        if self._projected is not None:
            self._projected.close()

    def _arrival(self, rows: Tensor) -> Tensor:
        """Where rows of the data set's order lie, int64."""
        order = torch.tensor(self._images, dtype=torch.int64).argsort(stable=True)
        return order[rows // self.patches] * self.patches + rows % self.patches


def _rows(width: int, dtype: torch.dtype, folder: str | None) -> _MemoryRows | _FileRows:
    return _MemoryRows(width, dtype) if folder is None else _FileRows(width, dtype, folder)


class _MemoryRows:
    """Rows in main memory, in chunks that are never concatenated."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype, self.length = width, dtype, 0
        self._chunks: list[Tensor] = []
        self._used = 0  # rows of the last chunk

    def reserve(self, rows: int) -> None:
        need = rows * self.width * self.dtype.itemsize
        try:
            if need > available_memory():
                raise MemoryError
            self._chunks.append(torch.empty(rows, self.width, dtype=self.dtype))
        except (RuntimeError, MemoryError) as error:
            raise UserError(
                f"no memory for {rows} more patch features of {self.width} numbers ({need / GIB:.1f} GiB); "
                f"set store.kind: disk, {_REMEDIES}."
            ) from error
        self._used = 0

    def append(self, rows: Tensor) -> None:
        self.length += len(rows)
        while len(rows):
            if self._used == len(self._chunks[-1]):
                self.reserve(GROWTH)
            part = rows[: len(self._chunks[-1]) - self._used]
            self._chunks[-1][self._used : self._used + len(part)] = part
            self._used += len(part)
            rows = rows[len(part) :]

    def read(self, wanted: Tensor) -> Tensor:
        if len(self._chunks) == 1:
            return self._chunks[0][wanted]
        result, start = torch.empty(len(wanted), self.width, dtype=self.dtype), 0
        for chunk in self._chunks:
            here = ((wanted >= start) & (wanted < start + len(chunk))).nonzero().flatten()
            result[here] = chunk[wanted[here] - start]
            start += len(chunk)
        return result

    @property
    def whole(self) -> Tensor | None:
        """All rows, where they lie in one chunk."""
        return self._chunks[0][: self.length] if len(self._chunks) == 1 else None

    def close(self) -> None:
        self._chunks, self._used, self.length = [], 0, 0


class _FileRows:
    """Rows in a temporary file, at multiples of their size."""

    whole = None

    def __init__(self, width: int, dtype: torch.dtype, folder: str) -> None:
        self.width, self.dtype, self.length = width, dtype, 0
        self._folder, self._row = folder, width * dtype.itemsize  # bytes
        self._reserved = 0
        try:  # unnamed where the system can (O_TMPFILE), unlinked at once where not
            self._file = tempfile.TemporaryFile(  # noqa: SIM115 - it outlives this call
                dir=folder, prefix=f"pl-patchcore-{os.getpid()}-", suffix=".features", buffering=0
            )
        except OSError as error:
            raise UserError(
                f"store.folder {folder}: cannot hold a file ({error.strerror}); give a folder that can be written to."
            ) from error

    def reserve(self, rows: int) -> None:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._file.fileno(), self._reserved * self._row, rows * self._row)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # what file systems without it answer
                    raise self._full(error, rows) from error
        self._reserved += rows

    def append(self, rows: Tensor) -> None:
        while self._reserved < self.length + len(rows):
            self.reserve(GROWTH)
        for part in rows.split(GROWTH):
            left = memoryview(part.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()).cast("B")
            offset = self.length * self._row
            try:
                while left:
                    done = os.pwrite(self._file.fileno(), left, offset)
                    left, offset = left[done:], offset + done
            except OSError as error:
                raise self._full(error, self._reserved - self.length) from error
            self.length += len(part)

    def read(self, wanted: Tensor) -> Tensor:
        result = torch.empty(len(wanted), self.width, dtype=self.dtype)
        sorted_rows, order = wanted.sort()
        for part in torch.arange(len(wanted)).split(GROWTH):  # each read in ascending order, then put in its places
            rows = sorted_rows[part]
            into = torch.empty(len(part), self.width, dtype=self.dtype)
            array: Any = into.view(torch.uint8).numpy()  # NumPy has no bfloat16
            buffer = memoryview(array).cast("B")
            breaks = (rows.diff() != 1).nonzero().flatten() + 1  # neighbours are read at once
            starts = [0, *breaks.tolist()]
            for first, last in zip(starts, [*starts[1:], len(rows)], strict=True):
                self._read_into(buffer[first * self._row : last * self._row], int(rows[first]) * self._row)
            result[order[part]] = into
        return result

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            done = os.preadv(self._file.fileno(), [buffer], offset)
            if not done:
                raise OSError(errno.EIO, f"the feature store in {self._folder} ends too early")
            buffer, offset = buffer[done:], offset + done

    def close(self) -> None:
        self._file.close()

    def _full(self, error: OSError, rows: int) -> UserError:
        free = shutil.disk_usage(self._folder).free
        return UserError(
            f"no room for the feature store in {self._folder}: {rows * self._row / GIB:.2f} GiB more needed, "
            f"{free / GIB:.2f} GiB free ({error.strerror}); free some, set store.folder to a folder on a larger disk, "
            f"{_REMEDIES}."
        )
