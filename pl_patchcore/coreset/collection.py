"""Training images' patch features -> the rows of the memory bank: collected batch by batch, then selected.

Reads patch features of one image after the other, keeps them in `store.py` where `plan.py` says, and returns the rows
that `select_coreset` keeps, or `bounded.py` where memory is too small, or `shared.py` where several processes have each
collected a shard. Next: `memory_bank.py`.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pl_patchcore.coreset import CoresetOptions, Selection, coreset_rows, random_projection, select_coreset
from pl_patchcore.coreset.bounded import bounded_coreset
from pl_patchcore.coreset.plan import GIB, StorePlan, available_memory, device_memory, lies_in_memory, rows_in
from pl_patchcore.coreset.shared import rows_of_all, select_shared_coreset
from pl_patchcore.coreset.store import FeatureStore
from pl_patchcore.distributed import Processes, on_first_process
from pl_patchcore.errors import UserError
from pl_patchcore.numerics import full_precision
from pl_patchcore.options import StoreOptions

log = logging.getLogger(__name__)
log.addFilter(on_first_process)

LARGE = 4 * GIB  # bytes of a fit that is told what would take less
SAMPLE_ROWS = 1000  # patch features that stand for all in `Collection.sample`


class ExpectedImages(NamedTuple):
    """Most images that can come, each as large as the first one; a larger one counts as several.

    For the memory bank and held out, of this process; for the bank, of all processes.
    """

    own: float
    held_out: float
    everywhere: float


class StoredImage(NamedTuple):
    """Patch features of an image that are kept."""

    image: int  # its index in the data set
    number: int  # of patches
    store: FeatureStore
    first: int  # row of the store

    def take(self, numbers: Tensor) -> Tensor:
        """Patch features by their numbers, int64 ``(n,)``: float32 ``(n, D)``, on the CPU."""
        return self.store.take(numbers + self.first)


class Collection:
    """Patch features of this process's training images, and what is selected from those of all processes.

    Args:
        coreset: Which rows to keep.
        store: Where patch features are kept until then.
        device: Device that selection computes on.
        held_out: Whether images will be held out for calibration.
        expected: How many images to expect; fewer may come. None: not known.
        check: Refuses a memory bank of so many numbers a row and so many rows (None: not known).
        neighbours: Processes that share this machine's memory.
        promised: Bytes of it that others will still take.

    Attributes:
        dimension: Numbers in a patch feature, D.
        total: Patch features for the memory bank, of all processes; known once `select` was called.
        sources: Index in the data set of the image that each selected row is from, int64 ``(M,)``, or -1 - k for row k
            of the earlier memory bank; known once `select` was called.
        planned: Bytes of main memory that the fit takes until `close`, as planned with the first batch.
        bank_numbers: Numbers in the memory bank, as planned with the first batch; 0 where that is not known.

    Raises:
        UserError: If the options contradict each other.
    """

    def __init__(
        self,
        coreset: CoresetOptions,
        store: StoreOptions,
        device: torch.device,
        *,
        held_out: bool = False,
        expected: ExpectedImages | None = None,
        check: Callable[[int, int | None], None] | None = None,
        neighbours: int = 1,
        promised: float = 0.0,
    ) -> None:
        store.check_method(coreset.method)
        self.coreset, self.options, self.device, self.holds_out = coreset, store, device, held_out
        self.expected, self.check, self.neighbours, self.promised = expected, check, neighbours, promised
        self.dimension, self.total, self.planned, self.bank_numbers = 0, 0, 0.0, 0
        self.sources = self._picked = torch.empty(0, dtype=torch.int64)  # picked: rows of the store, no earlier ones
        self._store: FeatureStore | None = None
        self._held_out: FeatureStore | None = None
        self._earlier = torch.empty(0, 0, dtype=torch.float32)  # an earlier memory bank, projected, (K, d)
        self._picks: Tensor | None = None
        self._processes = Processes(alone=True)
        self._indices = torch.empty(0, dtype=torch.int64)  # of the images of all processes, in data-set order
        self._ends = torch.empty(0, dtype=torch.int64)  # of the rows of each of them
        self._numbers: Tensor | None = None  # of this process's rows among those of all, where there are several

    def add(
        self,
        patches: Tensor,
        image: int,
        number: int,
        *,
        held_out: bool = False,
        more: bool = False,
        places: Tensor | None = None,
    ) -> None:
        """Store patch features of an image. The first ones plan for the whole data set, and reserve the space.

        Args:
            patches: ``(n, D)``, any floating dtype and device, D the same in all calls.
            image: Index of the image in the data set.
            number: Patches of the whole image.
            held_out: Whether the image is held out for calibration.
            more: Whether others of the image came right before.
            places: Number of each patch's place on the image's grid, int ``(n,)``, in all calls of all processes, or
                in none; see `places`.

        Raises:
            UserError: For what cannot fit, with the settings that help.
        """
        if self._store is None:
            self._reserve(number, patches.shape[1])
        store = self._held_out if held_out else self._store
        assert store is not None
        store.add(patches, image, more=more, places=None if held_out else places)

    def _reserve(self, number: int, d: int) -> None:
        coreset, store, folder = self.coreset, self.options, self.options.folder or tempfile.gettempdir()
        if not Path(folder).is_dir():
            raise UserError(f"store.folder {folder}: no such folder; make it, or leave store.folder out.")
        self.dimension = d
        kind, rows, held_out, everywhere, bank = store.kind, None, None, 0, None
        if self.expected is not None:
            rows, held_out, everywhere = (math.ceil(images * number) for images in self.expected)
            bank = everywhere if coreset.method == "none" else coreset_rows(everywhere, coreset.ratio, coreset.size)
        if self.check is not None:
            self.check(d, bank)
        if rows is None or held_out is None or bank is None:
            place = f"on disk in {folder}" if kind == "disk" else "in RAM"
            log.info("collecting patch features of %d numbers of an unknown number of images, %s.", d, place)
        else:
            plan = StorePlan(
                rows, held_out, d, min(d, coreset.projection_dim) if coreset.reads_features else 0, bank, store, folder,
                available_memory() / self.neighbours - self.promised, shutil.disk_usage(folder).free,
                lies_in_memory(folder), device_memory(self.device),
            ).chosen()  # fmt: skip
            self.planned, self.bank_numbers, kind = plan.peak, bank * d, plan.store.kind
            log.info("collecting %s.%s", plan, f" {plan.smaller()}" if plan.peak + plan.on_disk > LARGE else "")
        on_disk, dtype = folder if kind == "disk" else None, getattr(torch, store.dtype)
        bounded = store.selection_memory is not None
        self._store = FeatureStore(d, rows, self._projection(), on_disk, dtype=dtype, projected_on_disk=bounded)
        if self.holds_out:  # float32: these images are to be scored as new ones will be
            self._held_out = FeatureStore(d, held_out, folder=on_disk)

    def _projection(self) -> Tensor | None:
        if not self.coreset.reads_features:
            return None
        return random_projection(self.dimension, self.coreset.projection_dim, self.coreset.seed)

    def close(self) -> None:
        """Free everything."""
        for store in (self._store, self._held_out):
            if store is not None:
                store.close()
        self._store = self._held_out = self._picks = None

    def select(
        self, earlier: Tensor, seen: int, processes: Processes, *, shown: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Select the coreset among the rows of an earlier memory bank and those collected. All processes call it.

        Args:
            earlier: The earlier bank, ``(K, D)``, the same on all processes; empty where there is none.
            seen: Patch features that the earlier bank was selected from, 0 where there is none.
            processes: The processes.
            shown: Whether to show progress.

        Returns:
            The bank's rows, float32 ``(M, D)`` on the CPU, and their radii (see `Selection`), the same everywhere.

        Raises:
            UserError: On every process, if there is nothing for a memory bank.
        """
        self._join(processes)
        coreset, matrix = self.coreset, self._projection()
        earlier = earlier.float().cpu() if len(earlier) else torch.empty(0, self.dimension, dtype=torch.float32)
        with full_precision(earlier.device):
            self._earlier = earlier if matrix is None else earlier @ matrix
        number = len(earlier) + self.total
        size = min(number, coreset_rows(seen + self.total, coreset.ratio, coreset.size))
        chunk_size, memory = number, self.options.selection_memory
        if memory is not None:
            chunk_size = min(number, rows_in(memory, min(self.dimension, coreset.projection_dim)))
        rounds = 1 if chunk_size == number else 1 + math.ceil(number / chunk_size)
        with tqdm(total=rounds * size, desc="Coreset", unit=" patches", disable=not shown, mininterval=0.5) as bar:
            if chunk_size == number:
                selection = self._select_exactly(number, size, bar.update)
            else:
                picks, far = bounded_coreset(self._projected, number, size, chunk_size, bar.update)
                selection, told = Selection(picks), (chunk_size, far)
                log.info("selected %d rows at once: no patch feature is farther than %.4g (projected).", *told)
        numbers = selection.rows.cpu()
        image = torch.searchsorted(self._ends, (numbers - len(earlier)).clamp(min=0), right=True)
        self.sources = torch.where(numbers < len(earlier), -1 - numbers, self._indices[image])
        self._picked = numbers[numbers >= len(earlier)] - len(earlier)
        return _rows_of_both(numbers, earlier, self._features), selection.radii

    def places(self) -> Tensor:
        """What `add` was told of the places of the selected rows that are new, int64; all processes call it."""
        return self._of_all(self._stored.places, self._picked)[:, 0].long()

    def _join(self, processes: Processes) -> None:
        """Find out what all processes have collected, and what numbers this one's rows have among theirs."""
        self.options.check_processes(processes.count)
        dimension = int(processes.largest(self.dimension)[0])
        if self._store is None and dimension:  # no image came to this process
            self.dimension = dimension
            self._store = FeatureStore(dimension, 1, self._projection())
        parts = processes.objects(self._stored.images if dimension else [])
        indices = torch.tensor([index for part in parts for index, _ in part], dtype=torch.int64)
        rows = torch.tensor([number for part in parts for _, number in part], dtype=torch.int64)
        self._indices, order = indices.sort(stable=True)
        self._ends = rows[order].cumsum(0)
        if not len(order):
            raise UserError("no training image is left for the memory bank; lower calibration_share.")
        self.total, self._processes = int(self._ends[-1]), processes
        if processes.count > 1:
            mine = order.argsort().split([len(part) for part in parts])[processes.rank].tolist()
            starts = (self._ends - rows[order]).tolist()
            spans = [torch.arange(starts[place], int(self._ends[place])) for place in mine]
            self._numbers = torch.cat([torch.empty(0, dtype=torch.int64), *spans])

    def _select_exactly(self, number: int, size: int, progress: Callable[[int], object]) -> Selection:
        method, seed, processes = self.coreset.method, self.coreset.seed, self._processes
        if method == "random" or method == "none":
            return select_coreset(torch.empty(number, 0, dtype=torch.float32), size, method, seed=seed)
        if self._numbers is None:
            selection = select_coreset(self._projected(), size, method, seed=seed, progress=progress)
            self._picks = selection.rows
            return selection
        if processes.rank:
            self._earlier = self._earlier[:0]  # process 0 brings the earlier bank
        numbers = torch.cat([torch.arange(len(self._earlier)), self._numbers + number - self.total])
        return select_shared_coreset(self._projected(), numbers, size, processes, method, seed=seed, progress=progress)

    @property
    def _stored(self) -> FeatureStore:
        assert self._store is not None
        return self._store

    def _projected(self, numbers: Tensor | None = None) -> Tensor:
        """Projected features by number, those of the earlier bank first; None: all. On the device."""
        read = self._stored.projected
        if numbers is not None:
            return _rows_of_both(numbers, self._earlier, read).to(self.device)
        return (torch.cat([self._earlier, read()]) if len(self._earlier) else read()).to(self.device)

    def _features(self, numbers: Tensor) -> Tensor:
        return self._of_all(self._stored.take, numbers)

    def _of_all(self, read: Callable[[Tensor], Tensor], numbers: Tensor) -> Tensor:
        """What ``read`` gives of new rows by number, int64 ``(M,)``, whichever process holds them."""
        return read(numbers) if self._numbers is None else rows_of_all(read, self._numbers, numbers, self._processes)

    @property
    def selected(self) -> tuple[Tensor, Tensor] | None:
        """Projected features and the picks among them, where one process selected exactly; until `close`."""
        return None if self._picks is None else (self._projected(), self._picks)

    def sample(self) -> Tensor:
        """At most 1000 patch features, spread over the training images of all processes, float32 ``(S, D)``."""
        places = torch.linspace(0, self.total - 1, min(SAMPLE_ROWS, self.total), dtype=torch.float32)
        return self._features(places.long().clamp(max=self.total - 1))

    def held_out_images(self) -> Iterator[StoredImage]:
        """Each held-out image of this process."""
        return self._images(self._held_out)

    def bank_images(self, wanted: Container[int]) -> Iterator[StoredImage]:
        """Each image for the memory bank whose index is ``wanted``, as the store has rounded its features."""
        return self._images(self._store, wanted)

    def leave_out(self, images: Container[int]) -> None:
        """Go on as if these images had not come; the next `select` selects among the others."""
        if self._store is not None:
            self._store.leave_out(images)

    def _images(self, store: FeatureStore | None, wanted: Container[int] | None = None) -> Iterator[StoredImage]:
        if store is None:
            return
        first = 0
        for index, number in store.images:
            if wanted is None or index in wanted:
                yield StoredImage(index, number, store, first)
            first += number


def _rows_of_both(numbers: Tensor, earlier: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
    """Rows by number: those of ``earlier`` come first, ``read`` gives the others."""
    if not len(earlier):
        return read(numbers)
    old, result = numbers < len(earlier), torch.empty(len(numbers), earlier.shape[1], dtype=earlier.dtype)
    result[old], result[~old] = earlier[numbers[old]], read(numbers[~old] - len(earlier))
    return result
