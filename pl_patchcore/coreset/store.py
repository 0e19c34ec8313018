"""The epoch's patch features -> one store of rows ``(N, D)``, in main memory or in a file.

It keeps each patch's feature, of which only the rows picked are read again (for `memory_bank.py`), and its random
projection, which the selection reads: one product for each `add`, so that neither batches nor place change a bit of it.
Rows are read in the order of the data set, whatever order they came in.

The file has no name, so that a fit that is killed leaves nothing. It is read and written by offset: a memory map was
measured to be no faster, and its pages count as the process's.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from pl_patchcore.coreset.plan import GIB, available_memory
from pl_patchcore.errors import UserError
from pl_patchcore.numerics import full_precision

LEFT_OUT = -1  # in place of an image's index
GROWTH = 1 << 16  # rows that are reserved at a time where the number of images is not known, and copied at a time


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
        >>> store.add(torch.tensor([[3.0, 4.0]]), image=7)
        >>> store.add(torch.tensor([[1.0, 2.0]]), image=5)
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
        self._numbers: list[int] = []  # of patches, of each of them
        self._places = _MemoryRows(1, torch.int32)  # of patches, where they are told
        self._features = self._projected = _rows(dimension, dtype, folder)
        try:
            self._places.reserve(0)
            self._features.reserve(rows or GROWTH)
            if projection is not None:
                self._projected = _rows(projection.shape[1], torch.float32, folder if projected_on_disk else None)
                self._projected.reserve(rows or GROWTH)
        except UserError:
            self.close()
            raise

    def __len__(self) -> int:
        return sum(number for _, number in self.images)

    @property
    def images(self) -> list[tuple[int, int]]:
        """Index of each image in the data set, ascending, and its number of patches."""
        pairs = zip(self._images, self._numbers, strict=True)
        return sorted((pair for pair in pairs if pair[0] != LEFT_OUT), key=lambda pair: pair[0])

    def leave_out(self, images: Container[int]) -> None:
        """Read from now on as if these images had not come; their space is free after `close`."""
        self._images = [LEFT_OUT if image in images else image for image in self._images]

    def add(self, patches: Tensor, image: int, *, more: bool = False, places: Tensor | None = None) -> None:
        """Append patches ``(n, D)`` of an image, any floating dtype and device; or ``more`` of the one before.

        ``image`` is its index in the data set, ``places`` are numbers of each patch's own, int ``(n,)``, that `places`
        gives back; all calls give them, or none. A full memory or disk, or a number that does not fit float16, is a
        `UserError`.
        """
        limit = torch.finfo(torch.float16).max
        if self.dtype == torch.float16 and patches.numel() and (largest := float(patches.abs().max())) > limit:
            raise UserError(f"a patch feature holds {largest:g}, beyond float16's 65504; set store.dtype: bfloat16.")
        if not more:
            self._images.append(image)
            self._numbers.append(0)
        self._numbers[-1] += len(patches)
        self._features.append(patches)
        if places is not None:
            self._places.append(places[:, None].cpu())
        if self._matrix is not None:
            self._matrix = self._matrix.to(patches.device)
            with full_precision(patches.device):
                self._projected.append(patches.float() @ self._matrix)

    def projected(self, rows: Tensor | None = None) -> Tensor:
        """Projections (or features, where there is none) of rows of the data set's order: int64 ``(n,)``, None for all.

        Returns float32 ``(n, d)``, on the CPU; of all rows, it may be the store's own memory.
        """
        whole = self._projected.whole if rows is None else None
        if whole is not None and all(a < b for a, b in itertools.pairwise([LEFT_OUT, *self._images])):
            return whole.float()
        return self._read(self._projected, torch.arange(len(self)) if rows is None else rows)

    def take(self, rows: Tensor) -> Tensor:
        """Copy rows of the data set's order: int64 ``(M,)`` -> float32 ``(M, D)``, on the CPU."""
        return self._read(self._features, rows)

    def places(self, rows: Tensor) -> Tensor:
        """The places of rows of the data set's order: int64 ``(M,)`` -> int32 ``(M, 1)``, on the CPU."""
        return self._read(self._places, rows, torch.int32)

    def _read(self, kept: _MemoryRows | _FileRows, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        result = torch.empty(len(rows), kept.width, dtype=dtype)
        order = torch.tensor(self._images, dtype=torch.int64).argsort(stable=True)[self._images.count(LEFT_OUT) :]
        numbers = torch.tensor(self._numbers, dtype=torch.int64)
        ends = numbers[order].cumsum(0)  # of the rows of each image, in the data set's order
        moved = (numbers.cumsum(0) - numbers)[order] - (ends - numbers[order])  # to where they lie
        for wanted, place in zip(rows.cpu().split(GROWTH), result.split(GROWTH), strict=True):
            place.copy_(kept.read(wanted + moved[torch.searchsorted(ends, wanted, right=True)]))
        return result

    def close(self) -> None:
        """Free memory and disk."""
        self._features.close()
        self._projected.close()
        self._places.close()


def _rows(width: int, dtype: torch.dtype, folder: str | None) -> _MemoryRows | _FileRows:
    return _MemoryRows(width, dtype) if folder is None else _FileRows(width, dtype, folder)


class _MemoryRows:
    """Rows in main memory, in chunks that are never concatenated."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype, self.length = width, dtype, 0
        self._chunks: list[Tensor] = []

    def reserve(self, rows: int) -> None:
        need = rows * self.width * self.dtype.itemsize
        try:
            if need > available_memory():
                raise MemoryError
            self._free = torch.empty(rows, self.width, dtype=self.dtype)  # rest of the last chunk
        except (RuntimeError, MemoryError) as error:
            raise UserError(
                f"no memory for {rows} more patch features of {self.width} numbers ({need / GIB:.1f} GiB); "
                "set store.kind: disk, or store.dtype: bfloat16 (half the bytes), or take fewer or smaller images."
            ) from error
        self._chunks.append(self._free)

    def append(self, rows: Tensor) -> None:
        self.length += len(rows)
        while len(rows):
            if not len(self._free):
                self.reserve(GROWTH)
            part, rows = rows.tensor_split([len(self._free)])
            self._free[: len(part)] = part
            self._free = self._free[len(part) :]

    def read(self, wanted: Tensor) -> Tensor:
        if len(self._chunks) == 1:
            return self._chunks[0][wanted]
        result, start = torch.empty(len(wanted), self.width, dtype=self.dtype), 0
        for chunk in self._chunks:
            here = (wanted >= start) & (wanted < start + len(chunk))
            result[here] = chunk[wanted[here] - start]
            start += len(chunk)
        return result

    @property
    def whole(self) -> Tensor | None:
        """All rows, where they lie in one chunk."""
        return self._chunks[0][: self.length] if len(self._chunks) == 1 else None

    def close(self) -> None:
        self._chunks, self._free, self.length = [], torch.empty(0, self.width, dtype=self.dtype), 0


class _FileRows:
    """Rows in a temporary file, at multiples of their size."""

    whole = None

    def __init__(self, width: int, dtype: torch.dtype, folder: str) -> None:
        self.width, self.dtype, self.length = width, dtype, 0
        self._folder, self._row, self._reserved = folder, width * dtype.itemsize, 0  # bytes of a row, rows
        try:  # unnamed where the system can (O_TMPFILE), unlinked at once where not
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - it outlives this call
        except OSError as error:
            raise UserError(
                f"store.folder {folder}: cannot hold a file ({error.strerror}); give a folder that can be written to."
            ) from error

    def reserve(self, rows: int) -> None:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), self._reserved * self._row, rows * self._row)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # what file systems without it answer
                raise self._full(error, rows) from error
        self._reserved += rows

    def append(self, rows: Tensor) -> None:
        while self._reserved < self.length + len(rows):
            self.reserve(GROWTH)
        array: Any = rows.to("cpu", self.dtype).contiguous().view(torch.uint8).flatten().numpy()
        left, offset = memoryview(array), self.length * self._row
        try:
            while left:
                done = os.pwrite(self._file.fileno(), left, offset)
                left, offset = left[done:], offset + done
        except OSError as error:
            raise self._full(error, self._reserved - self.length) from error
        self.length += len(rows)

    def read(self, wanted: Tensor) -> Tensor:
        rows, order = wanted.sort()
        into = torch.empty(len(rows), self.width, dtype=self.dtype)
        array: Any = into.view(torch.uint8).flatten().numpy()  # NumPy has no bfloat16
        breaks = (rows.diff() != 1).nonzero().flatten() + 1  # neighbours are read at once
        for first, last in itertools.pairwise(sorted({0, *breaks.tolist(), len(rows)})):
            left, offset = memoryview(array[first * self._row : last * self._row]), int(rows[first]) * self._row
            while left:
                done = os.preadv(self._file.fileno(), [left], offset)
                if not done:
                    raise OSError(errno.EIO, f"the feature store in {self._folder} ends too early")
                left, offset = left[done:], offset + done
        return into[order.argsort()]

    def close(self) -> None:
        self._file.close()

    def _full(self, error: OSError, rows: int) -> UserError:
        free = shutil.disk_usage(self._folder).free
        return UserError(
            f"no room for the feature store in {self._folder}: {rows * self._row / GIB:.2f} GiB more needed, "
            f"{free / GIB:.2f} GiB free ({error.strerror}); free some, set store.folder to a folder on a larger disk, "
            "or store.dtype: bfloat16 (half the bytes), or take fewer or smaller images."
        )
