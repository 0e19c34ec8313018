"""Training images' patch features -> the rows of the memory bank: collected batch by batch, then selected.

Reads patch features ``(B, h, w, D)``, keeps them in `feature_store.py` where `store_plan.py` says, and returns the
rows that `coreset.py` keeps, or `coreset_bounded.py` where memory is too small, or `coreset_shared.py` where several
processes have collected a share each. Next: `memory_bank.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pl_patchcore.coreset import Selection, coreset_rows, random_projection, select_coreset
from pl_patchcore.coreset_bounded import bounded_coreset, selections
from pl_patchcore.coreset_shared import select_shared_coreset
from pl_patchcore.distributed import Processes, on_first_process, places
from pl_patchcore.errors import UserError
from pl_patchcore.feature_store import FeatureStore
from pl_patchcore.store_plan import (
    StorePlan,
    at_once_in,
    available_memory,
    device_memory,
    duration,
    free_on_disk,
    lies_in_memory,
    product_rate,
    store_folder,
)

log = logging.getLogger(__name__)
log.addFilter(on_first_process)

_LOOKED_AT = 1000  # stored patch features that tell of all


class ExpectedImages(NamedTuple):
    """Most images that can come: for the memory bank and for calibration, of this process; for the bank, of all."""

    own: int
    aside: int
    everywhere: int


class Collection:
    """Patch features of this process's training images, and what is selected from those of all processes.

    Args:
        settings: The arguments of `PatchCore`, by name.
        device: Device that selection computes on.

    Attributes:
        grid: Patches of an image, down and across.
        total: Patch features for the memory bank, of all processes; known once `join` was called.
        peak: Bytes that the fit takes until `close`, as planned.
        selected: Projected patch features and the picks among them, where `select` was told to keep them.
    """

    def __init__(self, settings: Mapping[str, Any], device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.grid = (0, 0)
        self.total = 0
        self.peak = 0.0
        self.selected: tuple[Tensor, Tensor] | None = None
        self.store: FeatureStore | None = None
        self.held_out: FeatureStore | None = None
        self._processes = Processes(alone=True)
        self._numbers: Tensor | None = None  # of stored rows among those of all processes, where there are several

    # Collecting

    def reserve(
        self,
        shape: tuple[int, ...],
        images: ExpectedImages | None,
        check: Callable[[int, int | None], None],
        neighbours: int = 1,
        promised: float = 0.0,
    ) -> None:
        """Plan for the whole data set, told or refused, and reserve the space.

        Args:
            shape: Of a batch of patch features: B, h, w, D.
            images: How many images to expect; None where that is not known.
            check: Refuses a memory bank of so many numbers a row and so many rows (None: not known).
            neighbours: Processes that share this machine's memory.
            promised: Bytes of it that others will still take.

        Raises:
            UserError: For what cannot fit, with the settings that would.
        """
        settings, (_, h, w, d) = self.settings, shape
        self.grid = (h, w)
        folder, dtype = store_folder(settings["store_dir"]), getattr(torch, settings["store_dtype"])
        reads = settings["coreset_method"] in ("greedy", "approximate")
        rows, held_out = None, None
        if images is None:
            check(d, None)
            store = "ram" if settings["store"] == "auto" else settings["store"]
            place = f"on disk in {folder}" if store == "disk" else "in RAM"
            log.info("collecting patch features of %d numbers of an unknown number of images, %s.", d, place)
        else:
            rows, held_out, number = (count * h * w for count in images)
            every = settings["coreset_method"] == "none"
            size = number if every else coreset_rows(number, settings["coreset_ratio"], settings["coreset_size"])
            check(d, size)
            plan = StorePlan(
                rows, held_out, d, min(d, settings["projection_dim"]) if reads else 0, size,
                settings["store"], folder, dtype, settings["selection_memory"],
                available_memory() / neighbours - promised, free_on_disk(folder), lies_in_memory(folder),
                device_memory(self.device), settings["coreset_method"] == "greedy",
            ).chosen()  # fmt: skip
            self.peak, store = plan.peak, plan.store
            seconds = plan.seconds(product_rate(plan.projected, self.device)) if reads else 0.0
            log.info("collecting %s; selection takes about %s (an estimate).", plan, duration(seconds))
        on_disk = folder if store == "disk" else None
        self.store = FeatureStore(
            d, rows, projection=self._projection(d), folder=on_disk,
            projected_on_disk=settings["selection_memory"] is not None, dtype=dtype,
        )  # fmt: skip
        if not settings["calibration_share"]:
            return
        try:  # float32: held-out images are to be scored as new ones will be
            self.held_out = FeatureStore(d, held_out or 64 * h * w, folder=on_disk)
        except UserError:
            self.close()
            raise

    def add(self, patches: Tensor, index: Tensor, aside: Tensor) -> None:
        """Store patch features ``(B, h, w, D)`` of images with these indices, those set ``aside`` apart."""
        for store, chosen in ((self.store, ~aside), (self.held_out, aside)):
            if store is not None and chosen.any():
                store.add(patches[chosen.to(patches.device)], index[chosen])

    def close(self) -> None:
        """Free everything."""
        for store in (self.store, self.held_out):
            if store is not None:
                store.close()
        self.store = self.held_out = self.selected = None

    # Selecting

    def join(self, processes: Processes) -> None:
        """Find out what all processes have collected, and what numbers this one's rows have among theirs.

        Raises:
            UserError: On every process, if there is nothing for a memory bank.
        """
        shape = (0, 0, 0, 0) if self.store is None else (self.store.dimension, self.store.patches, *self.grid)
        dimension, patches, *grid = (int(n) for n in processes.largest(*shape))
        if self.store is None and dimension:  # no image came here
            self.store = FeatureStore(dimension, 1, projection=self._projection(dimension))
        self.grid = (grid[0], grid[1])
        place, images = places(self._stored.images if dimension else [], processes)
        if not images:
            raise UserError("no training image is left for the memory bank; lower calibration_share.")
        self.total, self._processes = images * patches, processes
        if processes.count > 1:
            self._numbers = (place[:, None] * patches + torch.arange(patches)).flatten()

    def select(
        self, kept: Tensor, seen: int, *, keep: bool = False, shown: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Select the coreset among the rows of an earlier memory bank and those collected.

        Args:
            kept: The earlier bank, ``(K, D)``, empty where there is none.
            seen: Patch features that the coreset stands for, all earlier ones too.
            keep: Whether to leave what was selected from, and the picks, in ``selected``.
            shown: Whether to show progress.

        Returns:
            The bank's rows, float32 ``(M, D)`` on the CPU, and their coverage radii (`coreset.Selection`); the same on
            every process.
        """
        settings, store = self.settings, self._stored
        number = len(kept) + self.total
        size = min(number, coreset_rows(seen, settings["coreset_ratio"], settings["coreset_size"]))
        at_once = number
        if settings["selection_memory"] is not None:
            projected = min(store.dimension, settings["projection_dim"])
            at_once = min(at_once, at_once_in(settings["selection_memory"], projected))
        total = size if at_once == number else selections(number, size, at_once)
        with tqdm(total=total, desc="Coreset", unit=" patches", disable=not shown, mininterval=0.5) as bar:
            if at_once < number:
                picks, radius = bounded_coreset(self._projected(kept), number, size, at_once, bar.update)
                selection = Selection(picks)
                log.info(
                    "selected %d rows at once: no patch feature is farther than %.4g (projected).", at_once, radius
                )
            else:
                selection = self._select_exactly(kept, size, keep, bar.update)
        store.forget_projected()
        picks = selection.rows.cpu()
        bank = torch.empty(len(picks), store.dimension)
        old = picks < len(kept)
        bank[old], bank[~old] = kept[picks[old]], self.rows(picks[~old] - len(kept))
        if len(picks) < size and settings["coreset_method"] in ("greedy", "approximate"):
            log.warning("coreset_seconds: time was up with %d of %d patch features selected.", len(picks), size)
        return bank, selection.radii

    def _select_exactly(self, kept: Tensor, size: int, keep: bool, progress: Callable[[int], object]) -> Selection:
        method, processes = self.settings["coreset_method"], self._processes
        projected = torch.empty(len(kept) + self.total, 0)
        before = kept if processes.rank == 0 else kept[:0]  # process 0 brings the earlier bank
        if method in ("greedy", "approximate"):
            projected = self._projected(before)(None)
        options: Any = {
            "seed": self.settings["seed"], "seconds": self.settings["coreset_seconds"], "progress": progress
        }  # fmt: skip
        if self._numbers is None:
            selection = select_coreset(projected, size, method, **options)
            if keep and projected.shape[1]:
                self.selected = (projected, selection.rows)
            return selection
        own = torch.cat([torch.arange(len(before)), self._numbers + len(kept)]).to(self.device)
        selection = select_shared_coreset(projected, own, size, processes, method, **options)
        log.info(
            "selected by %d processes together, with %d collectives of %.3g MB from each.",
            *(processes.count, processes.collectives, processes.bytes / 1e6),
        )
        return selection

    def _projection(self, dimension: int) -> Tensor | None:
        if self.settings["coreset_method"] not in ("greedy", "approximate"):
            return None
        return random_projection(dimension, self.settings["projection_dim"], self.settings["seed"])

    def _projected(self, kept: Tensor) -> Callable[[Tensor | None], Tensor]:
        """What gives projected rows, by number or all, of the earlier bank and then of the store."""
        store, matrix = self._stored, self._projection(self._stored.dimension)
        before = kept if matrix is None else kept @ matrix

        def projected(rows: Tensor | None) -> Tensor:
            if not len(kept):
                return store.projected(rows).to(self.device)
            if rows is None:
                return torch.cat([before, store.projected()]).to(self.device)
            old = rows.cpu() < len(kept)
            result = torch.empty(len(rows), before.shape[1])
            result[old] = before[rows.cpu()[old]]
            result[~old] = store.projected(rows.cpu()[~old] - len(kept))
            return result.to(self.device)

        return projected

    # Reading what was collected

    @property
    def dimension(self) -> int:
        """Numbers in a patch feature, D."""
        return self._stored.dimension

    @property
    def _stored(self) -> FeatureStore:
        assert self.store is not None
        return self.store

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows by their numbers, whichever process holds them: int64 ``(M,)`` -> float32 ``(M, D)``, on the CPU."""
        if self._numbers is None:
            return self._stored.take(numbers)
        result = torch.zeros(len(numbers), self._stored.dimension)
        if len(self._numbers):
            place = torch.searchsorted(self._numbers, numbers).clamp(max=len(self._numbers) - 1)
            mine = self._numbers[place] == numbers
            result[mine] = self._stored.take(place[mine])
        return self._processes.merge(result)

    def sample(self) -> Tensor:
        """At most 1000 rows, evenly spread over the training images of all processes."""
        return self.rows(torch.linspace(0, self.total - 1, min(_LOOKED_AT, self.total)).long())

    def held_out_images(self) -> Iterator[tuple[int, Tensor]]:
        """Index and patch features ``(1, h, w, D)`` of each image set aside, one at a time."""
        if self.held_out is None or not len(self.held_out):
            return
        h, w = self.grid
        for index, rows in zip(self.held_out.images, torch.arange(len(self.held_out)).split(h * w), strict=True):
            yield index, self.held_out.take(rows).view(1, h, w, -1)
