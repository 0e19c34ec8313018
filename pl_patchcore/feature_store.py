"""The epoch's patch features -> one store of rows ``(N, D)``, in main memory or in a file.

Two things are kept of each patch: its feature, of which only the rows picked are read again (for `memory_bank.py`),
and its random projection, which is what the selection looks at (`coreset.py`). Features are projected as they come,
one product an image, so that neither the batches nor the place of the store change a bit of the result. Space is
reserved before work is spent (`store_plan.py` says before that what it takes); where the number of images is not
known, it grows by chunks. Rows are read in the order of the data set, whatever order they came in.

The file has no name, or is removed by the system with the last handle, so that a fit that is killed leaves nothing.
It is written and read by offset, not memory-mapped: measured, a map is no faster at the picks, and its pages count
as the process's own.
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

from pl_patchcore.errors import UserError
from pl_patchcore.numerics import full_precision
from pl_patchcore.store_plan import GIB, available_memory

_GROW = 1 << 16  # rows added at a time where the number of images is not known
_FEWER = "a larger patch_stride, layers with fewer channels, smaller images or fewer images"


class FeatureStore:
    """Patch features of the images seen, and their projections.

    Args:
        dimension: Numbers in a patch feature, D.
        rows: Rows expected; space for them is reserved at once. More may come. None grows by chunks.
        projection: float32 ``(D, d)``, see `random_projection`; None: the selection reads the features themselves.
        folder: Folder of the file; None keeps the features in main memory.
        projected_on_disk: Keep the projections in a file too, where ``folder`` is given.
        dtype: What features are rounded to; projections are float32, of the features before rounding.

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
        *,
        projection: Tensor | None = None,
        folder: str | None = None,
        projected_on_disk: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dimension = dimension
        self._matrix = projection
        # index of each image, in order of arrival; numbers, since a small tensor kept of each batch would split the
        # allocator's free blocks, and each batch then take new memory
        self._images: list[int] = []
        self.patches = 1  # of an image
        self._features = _rows(dimension, dtype, folder)
        self._projected: _Memory | _File | None = None
        try:
            self._features.reserve(rows or _GROW)
            if projection is not None:
                self._projected = _rows(projection.shape[1], torch.float32, folder if projected_on_disk else None)
                self._projected.reserve(rows or _GROW)
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
            return kept.read(self._arrival(rows)).float()
        if (own := kept.whole()) and all(a < b for a, b in itertools.pairwise(self._images)):
            return own[0].float()
        result = torch.empty(len(self), kept.width)
        for part in torch.arange(len(self)).split(_GROW):
            result[part] = kept.read(self._arrival(part)).float()
        return result

    def forget_projected(self) -> None:
        """Free the projections, once selection is done."""
        if self._projected is not None:
            self._projected.close()

    def take(self, rows: Tensor) -> Tensor:
        """Copy rows of the data set's order: int64 ``(M,)`` -> float32 ``(M, D)``, on the CPU."""
        return self._features.read(self._arrival(rows.cpu())).float()

    def close(self) -> None:
        """Free memory and disk."""
        self._features.close()
        self.forget_projected()

    def _arrival(self, rows: Tensor) -> Tensor:
        """Where rows of the data set's order lie, int64."""
        if not len(rows):
            return rows
        order = torch.tensor(self._images).argsort(stable=True)
        return order[rows // self.patches] * self.patches + rows % self.patches


def _rows(width: int, dtype: torch.dtype, folder: str | None) -> _Memory | _File:
    return _Memory(width, dtype) if folder is None else _File(width, dtype, folder)


class _Memory:
    """Rows in main memory, in chunks that are never concatenated."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype, self.length = width, dtype, 0
        self._chunks: list[Tensor] = []
        self._used = 0  # rows used of the last chunk

    def reserve(self, rows: int) -> None:
        need = rows * self.width * self.dtype.itemsize
        try:
            if need > available_memory():
                raise MemoryError
            self._chunks.append(torch.empty(rows, self.width, dtype=self.dtype))
        except (RuntimeError, MemoryError) as error:
            raise UserError(
                f"no memory for {rows} more patch features of {self.width} numbers ({need / GIB:.1f} GiB); set store: "
                f"disk, store_dtype: bfloat16 (half the bytes), or take {_FEWER}."
            ) from error
        self._used = 0

    def append(self, rows: Tensor) -> None:
        _check_range(rows, self.dtype)
        while len(rows):
            if self._used == len(self._chunks[-1]):
                self.reserve(_GROW)
            part = rows[: len(self._chunks[-1]) - self._used]
            self._chunks[-1][self._used : self._used + len(part)] = part
            self._used += len(part)
            self.length += len(part)
            rows = rows[len(part) :]

    def read(self, wanted: Tensor) -> Tensor:
        if len(self._chunks) == 1:
            return self._chunks[0][wanted]
        result = torch.empty(len(wanted), self.width, dtype=self.dtype)
        for part in torch.arange(len(wanted)).split(_GROW):
            start = 0
            for chunk in self._chunks:
                here = part[(wanted[part] >= start) & (wanted[part] < start + len(chunk))]
                result[here] = chunk[wanted[here] - start]
                start += len(chunk)
        return result

    def whole(self) -> list[Tensor]:
        """All rows as one tensor, in a list; an empty list where they are not one."""
        return [self._chunks[0][: self.length]] if len(self._chunks) == 1 else []

    def close(self) -> None:
        self._chunks, self._used, self.length = [], 0, 0


class _File:
    """Rows in a temporary file, at multiples of their size."""

    def __init__(self, width: int, dtype: torch.dtype, folder: str) -> None:
        self.width, self.dtype, self.length = width, dtype, 0
        self._folder, self._row = folder, width * dtype.itemsize
        self._reserved = 0
        try:  # unnamed where the system can (O_TMPFILE), unlinked at once where not
            self._file = tempfile.TemporaryFile(  # noqa: SIM115 - it outlives this call
                dir=folder, prefix=f"pl-patchcore-{os.getpid()}-", suffix=".features", buffering=0
            )
        except OSError as error:
            raise UserError(
                f"store_dir {folder}: cannot hold a file ({error.strerror}); give a folder that can be written to."
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
        _check_range(rows, self.dtype)
        while self._reserved < self.length + len(rows):
            self.reserve(_GROW)
        for part in rows.split(_GROW):
            left = _bytes(part.to("cpu", self.dtype).contiguous())
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
        for part in torch.arange(len(wanted)).split(_GROW):  # each read in ascending order, then put in its places
            rows = sorted_rows[part]
            into = torch.empty(len(part), self.width, dtype=self.dtype)
            buffer = _bytes(into)
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

    def whole(self) -> list[Tensor]:
        return []

    def close(self) -> None:
        self._file.close()

    def _full(self, error: OSError, rows: int) -> UserError:
        free = shutil.disk_usage(self._folder).free
        return UserError(
            f"no room for the feature store in {self._folder}: {rows * self._row / GIB:.2f} GiB more needed, "
            f"{free / GIB:.2f} GiB free ({error.strerror}); free some, set store_dir to a folder on a larger disk, "
            f"store_dtype: bfloat16 (half the bytes), or take {_FEWER}."
        )


def _bytes(rows: Tensor) -> memoryview:
    """A contiguous tensor's memory, of any dtype (NumPy has no bfloat16)."""
    array: Any = rows.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def _check_range(rows: Tensor, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and len(rows) and (most := float(rows.abs().max())) > torch.finfo(dtype).max:
        raise UserError(f"a patch feature holds {most:g}, beyond float16's 65504; set store_dtype: bfloat16.")
