"""The epoch's patch features -> one store of rows ``(N, D)``.

Rows are kept in main memory, in chunks that are never concatenated: what is needed at the end is their random
projection (for `coreset.py`) and the rows picked (for `memory_bank.py`), and both are read chunk by chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pl_patchcore.errors import UserError

_GROW = 1 << 16  # rows added at a time where the number of images is not known


class FeatureStore:
    """Patch features of the images seen, float32, in main memory.

    Args:
        dimension: Numbers in a patch feature, D.
        rows: Rows expected; space for them is set aside at once (the system commits it as it is used). More
            may come. None grows by chunks.

    Raises:
        UserError: If there is no memory for the rows expected.
    """

    def __init__(self, dimension: int, rows: int | None = None) -> None:
        self.dimension = dimension
        self._chunks: list[Tensor] = []
        self._used = 0  # rows used of the last chunk
        self._images: list[Tensor] = []  # image index of each row, per batch
        self._grow(rows or _GROW)

    def __len__(self) -> int:
        return sum(len(chunk) for chunk in self._chunks[:-1]) + self._used

    def add(self, patches: Tensor, images: Tensor) -> None:
        """Append the patches of a batch.

        Args:
            patches: ``(B, h, w, D)``, any floating dtype and device.
            images: Index of each image in the data set, int64 ``(B,)``.
        """
        rows = patches.reshape(-1, self.dimension)
        self._images.append(images.cpu().repeat_interleave(patches.shape[1] * patches.shape[2]))
        while len(rows):
            if self._used == len(self._chunks[-1]):
                self._grow(_GROW)
            part = rows[: len(self._chunks[-1]) - self._used]
            self._chunks[-1][self._used : self._used + len(part)] = part
            self._used += len(part)
            rows = rows[len(part) :]

    def images(self) -> Tensor:
        """Index of the image each row is from, int64 ``(N,)``."""
        return torch.cat(self._images) if self._images else torch.empty(0, dtype=torch.int64)

    def order(self) -> Tensor:
        """Rows in the order of the data set, whatever order they came in, int64 ``(N,)``."""
        return self.images().argsort(stable=True)

    def project(self, matrix: Tensor | None) -> Tensor:
        """Project all rows in the order of the data set.

        Args:
            matrix: float32 ``(D, d)``, or None for the rows as they are.

        Returns:
            float32 ``(N, d)``.
        """
        order = self.order()
        result = torch.empty(len(self), self.dimension if matrix is None else matrix.shape[1])
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        start = 0
        for chunk in self._filled():
            for rows in chunk.split(_GROW):
                result[place[start : start + len(rows)]] = rows if matrix is None else rows @ matrix
                start += len(rows)
        return result

    def take(self, rows: Tensor) -> Tensor:
        """Copy rows of the data set's order: int64 ``(M,)`` -> float32 ``(M, D)``."""
        wanted = self.order()[rows.cpu()]
        result = torch.empty(len(wanted), self.dimension)
        start = 0
        for chunk in self._filled():
            here = (wanted >= start) & (wanted < start + len(chunk))
            result[here] = chunk[wanted[here] - start]
            start += len(chunk)
        return result

    def _filled(self) -> list[Tensor]:
        return [*self._chunks[:-1], self._chunks[-1][: self._used]]

    def _grow(self, rows: int) -> None:
        try:
            self._chunks.append(torch.empty(rows, self.dimension))
        except RuntimeError as error:
            gib = rows * self.dimension * 4 / 2**30
            raise UserError(
                f"no memory for {rows} patch features of {self.dimension} numbers ({gib:.1f} GiB); take fewer images, "
                "smaller images, a larger patch_stride, or layers with fewer channels."
            ) from error
        self._used = 0
