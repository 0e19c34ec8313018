"""Training images -> a fitted model: the companion of `PatchCoreModel` and `EnsembleModel` while they are fitted.

Collects patch features batch by batch, selects each member's coreset, fills the memory banks, and has images scored for
calibration by `leave_one_out.py`. Plain torch; `patchcore.py` drives it from Lightning's hooks. The features are kept
by `coreset/collection.py`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pl_patchcore.calibration import draw_held_out, draw_one_of_each, is_held_out
from pl_patchcore.coreset.collection import Collection, ExpectedImages
from pl_patchcore.counted import Counted, Geometry, one_by_one
from pl_patchcore.data.base import ImageDataset
from pl_patchcore.data.batch import same_size_parts
from pl_patchcore.distributed import Processes, on_first_process
from pl_patchcore.ensemble import EnsembleModel
from pl_patchcore.errors import UserError
from pl_patchcore.leave_one_out import ImageLayout, NominalScore, TrainingScorer
from pl_patchcore.memory_bank import MemoryBank
from pl_patchcore.model import PatchCoreModel
from pl_patchcore.options import StoreOptions
from pl_patchcore.patch_features import Band
from pl_patchcore.references import ReferenceViews
from pl_patchcore.suspicious import TrainingImage, stands_out_above, tell, worst_groups

log = logging.getLogger(__name__)
log.addFilter(on_first_process)

RAW_LEVEL = 64.0  # an image that reaches it was hardly normalised: by ImageNet's mean and deviation, white is 2.6
MOST_COPIED = 0.1  # share of the images that may have a near-copy without a warning


class _Earlier(NamedTuple):
    """What a memory bank held before an update; nothing before a fit."""

    features: Tensor  # (M, D), float32, on the CPU
    places: Tensor  # of the rows' patches, (M, 2); (0, 2) where not known
    images: list[int]  # number of the image of each row, -1 where not known
    seen: int  # patch features that the rows were selected from

    @classmethod
    def of(cls, bank: MemoryBank, *, update: bool) -> _Earlier:
        if not update:
            return cls(torch.empty(0, dtype=torch.float32), bank.places[:0].cpu(), [], 0)
        if bank.position_radius is not None and len(bank.places) != bank.size:
            raise UserError("position_radius: the memory bank does not know the places of its rows; fit again.")
        images = bank.images.tolist() or [-1] * bank.size
        return cls(bank.features.float().cpu(), bank.places.clone().cpu(), images, int(bank.seen))


class _Part(NamedTuple):
    """What the network is given at once."""

    images: Tensor  # (b, 3, H, W)
    counted: Counted | None
    places: Sequence[int]  # of the images in the batch
    again: Sequence[bool]  # whether it is a further view of an image


class Fitting:
    """One fit of a model. The memory bank that it has is forgotten, or goes into the selection (``update``).

    Args:
        model: The model.
        store: Where patch features are kept until the coreset is selected.
        calibration_share: Share of the images held out from the memory bank, in [0, 1).
        leave_one_out: Most images (or groups) that are scored without their own rows, where none are held out; 0: none.
        drop_suspicious: Leave out those of them that stand out, and select again.
        seed: Seed of the draw of these.
        images: Images of the data set, if their number is known.
        batches: Batches to come in this process; infinite where that is not known.
        processes: Processes that fit the model together.
        neighbours: Processes that share this machine's memory.
        update: Select among the rows of the present memory bank, too.
        fixed_size: Whether the model is to refuse images of another size than those of the fit.
        pixels: Pixels of an image on average, where sizes differ; None: all are as large as the first one.
        references: Views of each image that go into the memory bank; None: the images as they are.

    Attributes:
        collections: Patch features of each member.
        count: Images taken in by this process.
        left_out: Training images that were left out because they, or others of their group, stand out.
        training_images: Those that were scored without their own rows, the highest score first.
    """

    def __init__(
        self,
        model: PatchCoreModel | EnsembleModel,
        *,
        store: StoreOptions | None = None,
        calibration_share: float = 0.0,
        leave_one_out: int = 0,
        drop_suspicious: bool = False,
        seed: int = 0,
        images: int | None = None,
        batches: float = math.inf,
        processes: Processes | None = None,
        neighbours: int = 1,
        update: bool = False,
        fixed_size: bool = False,
        pixels: float | None = None,
        references: ReferenceViews | None = None,
    ) -> None:
        self.members, self.pixels, self.references = model.members, pixels, references or ReferenceViews()
        self.model, self.store, self.share, self.seed = model, store or StoreOptions(), calibration_share, seed
        self.leave_one_out, self.groups = leave_one_out, dict[int, int]()  # group of each image of this process
        self.drop_suspicious, self.names = drop_suspicious, dict[int, str]()  # of images of this process
        self.left_out, self.training_images = frozenset[int](), list[TrainingImage]()
        self.images, self.batches, self.neighbours, self.fixed_size = images, batches, neighbours, fixed_size
        self.processes = processes or Processes(alone=True)
        self.held_out = None if images is None else draw_held_out(images, calibration_share, seed)
        self.collections: list[Collection] = []
        self.size: tuple[int, ...] = ()  # of the first image
        self.layouts: dict[int, ImageLayout] = {}  # of images that may be scored
        self.count = self.batch = 0  # images so far, and of the first batch
        banks, calibration, self.update = [member.memory_bank for member in self.members], model.calibration, update
        self.earlier = [_Earlier.of(bank, update=update) for bank in banks]
        self.earlier_scores = (calibration.scores.clone(), calibration.peaks.clone()) if update else None
        self.grids = [  # of the bank's images
            (int(bank.grid[0]), int(bank.grid[1])) if update else (0, 0) for bank in banks
        ]
        self.numbers: dict[int, int] = {}  # of each image's group, in the memory bank
        self.fixed = self.members[0].input_size.tolist() if update else [0, 0]
        self._forget()

    def _forget(self) -> None:
        for member in self.members:
            bank = member.memory_bank
            bank.fill(bank.features[:0, :0])
            bank.seen = torch.zeros_like(bank.seen)
            member.input_size = torch.zeros_like(member.input_size)
        self.model.calibration.clear()

    @torch.no_grad()
    def add(
        self,
        images: Tensor,
        index: Tensor | None = None,
        group: Tensor | None = None,
        names: Sequence[str] | None = None,
        counted: Counted | None = None,
        batch: int | None = None,
    ) -> None:
        """Take in a batch, or the images of one size in it.

        Args:
            images: ``(B, 3, H, W)``; all of one size, where the model is for one.
            index: Index of each image in the data set, int64 ``(B,)``; None: they come in its order.
            group: Number of the group that each image belongs to, int64 ``(B,)``; None: each is a group of its own.
            names: Name of each image, such as its file's; None: its index.
            counted: Which places of the images count; None: all.
            batch: Images of the whole batch; None: these are.

        Raises:
            UserError: If they are of another size than those before, if no patch of an image counts, or there is no
                room for their features.
        """
        if index is None:
            index = torch.arange(self.count, self.count + len(images))
        if self.fixed_size and self.size not in ((), tuple(images.shape[1:])):
            raise UserError(
                f"training images of {tuple(images.shape[1:])} after others of {self.size}; bring all to one size "
                "(model.transform does)."
            )
        if not self.size:
            self._look_at_first(images)
        groups = (index if group is None else group).tolist()
        self.groups.update(zip(index.tolist(), groups, strict=True))
        if self.leave_one_out:
            self.names.update(zip(index.tolist(), map(str, names or ()), strict=False))
        if self.held_out is None:
            held = [is_held_out(number, self.share, self.seed) for number in groups]
        else:
            held = [number in self.held_out for number in groups]
        self.count += len(images)
        self.batch = self.batch or batch or len(images)
        grids, stored = [], counted
        for place in range(len(self.members)):
            grid, counted, stored = self._collect(place, images, index.tolist(), held, stored)
            grids.append(grid)
        if self.leave_one_out or self.share:
            for i, number in enumerate(index.tolist()):
                own = [None if each is None else each[i : i + 1].packed() for each in (counted, stored)]
                self.layouts[number] = ImageLayout((images.shape[2], images.shape[3]), grids, *own)

    def add_batch(self, batch: Mapping[str, Any]) -> None:
        """Take in a batch as `OwnImages` gives it, of images of one size or several."""
        total = len(batch["image"])
        for part in same_size_parts(batch) if total else ():
            images, counted = part["image"].to(self.members[0].input_size.device), Counted.of(part)
            self.add(images, part["index"].cpu(), part["group"].cpu(), part.get("path"), counted, total)

    def _collect(
        self, place: int, images: Tensor, index: Sequence[int], held: Sequence[bool], counted: Counted | None
    ) -> tuple[tuple[int, int], Counted | None, Counted | None]:
        """Put the patch features that count into a member's collection.

        Returns patches down and across, what counts when the images are scored, and what is kept of them.
        """
        member, grid = self.members[place], (0, 0)
        found: tuple[list[Geometry], list[Geometry]] = [], []
        whole, placed = member.patch_features.tiling is None, member.memory_bank.position_radius is not None
        for part in self._parts(images, counted, held, whole=whole):
            inside: Tensor | None = None
            masked = member.foreground != "none" and (
                member.mask_references or self.leave_one_out > 0 or self.share > 0
            )
            bands: Iterable[Band] = member.patch_features.bands(part.images, raw=masked)
            scored = of_part = part.counted
            if masked:
                bands, scored = member.in_front(bands, part.images, part.counted)
            if member.mask_references and scored is not None:
                of_part = scored.where_found()
            for images_of, those in zip(found, (scored, of_part), strict=True):
                counts = [] if those is None else those.images
                images_of.extend(each for each, again in zip(counts, part.again, strict=False) if not again)
            for band in bands:
                grid, last = (band.rows, band.features.shape[2]), band.top + band.features.shape[1]
                if place == len(self.collections):
                    self._begin(member)
                if placed:
                    self._look_at_grid(place, grid)
                if of_part is not None and inside is None:
                    inside = of_part.patches(*grid).to(band.features.device)
                for i, features in enumerate(band.features.flatten(1, 2)):  # (h' w, D)
                    number = grid[0] * grid[1] if inside is None else int(inside[i].sum())
                    kept = None if inside is None else inside[i, band.top : last].flatten()
                    chosen = features if kept is None else features[kept]
                    cells = torch.arange(band.top * grid[1], last * grid[1]) if placed else None
                    cells = cells if cells is None or kept is None else cells[kept.cpu()]
                    at, more = part.places[i], band.top > 0 or part.again[i]
                    self.collections[place].add(chosen, index[at], number, held_out=held[at], more=more, places=cells)
        counted, stored = (Counted(each, images.device) if each else None for each in found)
        return grid, counted, stored

    def _look_at_grid(self, place: int, grid: tuple[int, int]) -> None:
        """Refuse images of another grid of patches than those before, where places are compared."""
        before = self.grids[place] = self.grids[place] if any(self.grids[place]) else grid
        if before != grid:
            raise UserError(
                f"position_radius needs one grid of patches, got {grid[0]}x{grid[1]} after {before[0]}x{before[1]}; "
                "bring all images to one size, or leave it out."
            )

    def _parts(self, images: Tensor, counted: Counted | None, held: Sequence[bool], *, whole: bool) -> Iterator[_Part]:
        """What the network is given of a batch: all images, or the views of one after the other, or one by one."""
        if whole and len(self.references) == 1:
            yield _Part(images, counted, range(len(images)), [False] * len(images))
            return
        at_once = self.batch if whole else 1
        for place, (image, of_image) in enumerate(one_by_one(images, counted)):
            views = enumerate([(image, of_image)] if held[place] else self.references.of(image, of_image))
            while chunk := list(islice(views, at_once)):
                inside = [each for _, (_, of_view) in chunk if of_view is not None for each in of_view.images]
                yield _Part(
                    torch.cat([view for _, (view, _) in chunk]),
                    None if counted is None else Counted(inside, counted.device),
                    [place] * len(chunk),
                    [number > 0 for number, _ in chunk],
                )

    def _look_at_first(self, images: Tensor) -> None:
        self.size = tuple(images.shape[1:])
        tell_tiles(self.model, images)
        if any(self.fixed) and self.fixed != list(self.size[1:]):
            raise UserError(
                f"new images of {self.size[1]}x{self.size[2]} pixels, but the memory bank is from images of "
                f"{self.fixed[0]}x{self.fixed[1]}; bring them to its size (model.transform does)."
            )
        if images.is_floating_point() and (highest := float(images.abs().max())) > RAW_LEVEL:
            log.warning(
                "training images reach %.0f: they look like levels from 0 to 255 that were never scaled to [0, 1] and "
                "normalised; model.transform does both.",
                highest,
            )
        self.references.check(images)

    def _begin(self, member: PatchCoreModel) -> None:
        """Reserve space for a member's features."""
        expected = None
        if math.isfinite(self.batches):
            world = self.processes.count
            held = len(self.held_out or ())
            own = int(self.batches) * self.batch
            everywhere = own * world
            if self.images is not None:
                own = min(own, -(-self.images // world))
                everywhere = min(everywhere, self.images - held)
            bank = own if self.images is None else min(own, self.images - held)
            first = math.prod(self.size[1:]) or 1  # pixels of the first image
            scale = 1.0 if self.pixels is None else self.pixels / first
            views = scale * len(self.references)
            expected = ExpectedImages(views * bank, scale * min(own, held), views * everywhere)
        self.collections.append(
            Collection(
                member.coreset,
                self.store,
                member.input_size.device,
                held_out=self.share > 0,
                expected=expected,
                check=member.memory_bank.check,
                neighbours=self.neighbours,
                promised=sum(collection.planned for collection in self.collections),
            )
        )

    @property
    def bank_bytes(self) -> int:
        """Bytes of the memory banks, as planned with the first batch; 0 where that is not known."""
        both = zip(self.members, self.collections, strict=False)
        return sum(member.memory_bank.features.itemsize * each.bank_numbers for member, each in both)

    @torch.no_grad()
    def select(self, *, shown: bool = False) -> None:
        """Select the coresets, fill the memory banks, and calibrate. All processes call it.

        Args:
            shown: Whether to show progress.

        Raises:
            UserError: On every process, if no image is left for the memory bank.
        """
        try:
            self._select(shown)
        except BaseException:
            self._forget()  # no half of a model
            raise

    def _select(self, shown: bool) -> None:
        height, width = (int(side) for side in self.processes.largest(*(self.size[1:] or (0, 0))))
        self._fill_all((height, width), shown)
        scored = self._score(shown)
        if self.leave_one_out:
            self._find_suspicious(scored)
        if self.left_out:
            for collection in self.collections:
                collection.leave_out(self.left_out)
            self.groups = {image: group for image, group in self.groups.items() if image not in self.left_out}
            self._fill_all((height, width), shown)
            scored = self._score(shown)
        self.training_images = [each._replace(group=self.numbers.get(each.image)) for each in self.training_images]
        self._calibrate(scored)

    def _fill_all(self, size: tuple[int, int], shown: bool) -> None:
        """Fill the memory banks of all members."""
        scales, self.numbers = [], self._number_groups()
        for place, member in enumerate(self.members):
            if place == len(self.collections):  # no image came to this process
                self._begin(member)
            self._fill(member, place, shown)
            if self.fixed_size:
                member.input_size = torch.tensor(size, device=member.input_size.device)
            scales.append(self._tell_coverage(member, self.collections[place]))
        if isinstance(self.model, EnsembleModel) and not self.update:  # or earlier scores would have another unit
            scale = torch.tensor(scales, dtype=torch.float32, device=self.model.scale.device)
            self.model.scale = torch.where(scale > 0, scale, torch.ones_like(scale))

    def _find_suspicious(self, scored: list[NominalScore]) -> None:
        """Find the images that stand out, and which are to be left out."""
        earlier = [] if self.earlier_scores is None else self.earlier_scores[0].tolist()
        above = stands_out_above([*earlier, *(each.score for each in scored)])
        ordered = sorted(scored, key=lambda each: (-each.score, each.image))
        suspects = [each.image for each in ordered if above is not None and each.score > above]
        if self.drop_suspicious:
            self.left_out = worst_groups(suspects, self.numbers)
        self.training_images = [
            TrainingImage(each.image, each.name, each.score, each.image in suspects, each.image in self.left_out, None)
            for each in ordered
        ]
        tell(self.training_images, above, len(self.left_out), len(self.numbers), self.drop_suspicious)

    def _number_groups(self) -> dict[int, int]:
        """Number of the group of each image of all processes; the earlier memory bank's numbers come before."""
        groups: dict[int, int] = {}
        for part in self.processes.objects(self.groups):
            groups |= part
        first = 1 + max([-1, *(number for bank in self.earlier for number in bank.images)])
        found: dict[int, int] = {}
        return {image: first + found.setdefault(groups[image], len(found)) for image in sorted(groups)}

    def _fill(self, member: PatchCoreModel, place: int, shown: bool) -> None:
        start, bank, collection = time.perf_counter(), member.memory_bank, self.collections[place]
        device = bank.features.device
        earlier = self.earlier[place]
        rows, radii = collection.select(earlier.features, earlier.seen, self.processes, shown=shown)
        images = [
            earlier.images[-1 - source] if source < 0 else self.numbers[source]
            for source in collection.sources.tolist()
        ]
        placed = self._places(place, member) if bank.position_radius is not None else (None, None)
        bank.fill(rows.to(device), radii, torch.tensor(images, dtype=torch.int32), *placed)
        bank.seen = torch.full_like(bank.seen, earlier.seen + collection.total)
        bank.recall(collection.sample().to(device))
        if member.scorer.num_neighbors > bank.size:
            log.warning(
                "num_neighbors is %d, but the memory bank has %d rows: the distances to all of them are averaged.",
                *(member.scorer.num_neighbors, bank.size),
            )
        log.info(
            "memory bank: %d of %d patch features, %d numbers each, selected in %.1f s.",
            *(
                bank.size,
                len(earlier.features) + collection.total,
                collection.dimension,
                time.perf_counter() - start,
            ),
        )

    def _places(self, place: int, member: PatchCoreModel) -> tuple[Tensor, tuple[int, int]]:
        """Row and column of the patch of each selected row, ``(M, 2)``, and the grid."""
        collection, earlier = self.collections[place], self.earlier[place].places
        for grid in self.processes.objects(self.grids[place]):
            if any(grid):
                self._look_at_grid(place, grid)
        height, width = self.grids[place]
        cells, old = collection.places, collection.sources < 0
        found = torch.stack([cells // width, cells % width], 1)
        found[old] = earlier[-1 - collection.sources[old]].long()
        return found, (height, width)

    def _tell_coverage(self, member: PatchCoreModel, collection: Collection) -> float:
        """Log how far patch features lie from the memory bank; their mean distance, those in it not counted."""
        bank = member.memory_bank
        sample = collection.sample().to(bank.features.device)
        nearest, _ = bank(sample, 2)
        log.info(
            "coverage: %d sampled patch features lie %.4g from the memory bank on average, %.4g at most.",
            *(len(sample), nearest[:, 0].mean().item(), nearest[:, 0].max().item()),
        )
        distance = torch.where(nearest[:, 0] > 0, nearest[:, 0], nearest[:, -1]).double()
        return float(member.scorer.in_units(distance).mean())

    def _score(self, shown: bool) -> list[NominalScore]:
        """Score the images that calibration needs, one of each group, on all processes; in the data set's order."""
        scorer, own = TrainingScorer(self.model, self.collections, self.layouts, self.names), list[NominalScore]()
        if self.share:
            own = list(scorer.held_out())
        elif self.leave_one_out:
            own = list(scorer.without_own_rows(self.numbers, self.leave_one_out, self.seed, shown=shown))
        scored = sorted(each for part in self.processes.objects(own) for each in part)
        drawn = draw_one_of_each({each.image: self.numbers[each.image] for each in scored}, self.seed)
        return [each for each in scored if each.image in drawn]

    def _calibrate(self, scored: list[NominalScore]) -> None:
        """Take in the scores; keep what an earlier fit found."""
        scores, peaks = (torch.tensor([each[at] for each in scored], dtype=torch.float32) for at in (1, 2))
        self.model.calibration.fill(scores, peaks, torch.tensor([each.image for each in scored]))
        if self.earlier_scores is not None:
            self.model.calibration.keep(*self.earlier_scores)
        if self.share and not scored:
            log.warning("calibration_share holds no image out; there are no thresholds.")
        if (copied := sum(each.copied for each in scored)) > MOST_COPIED * len(scored):
            log.warning(
                "%d of %d images have a near-copy among the training images, which makes the thresholds too low: tell "
                "which images belong together, by data.group_by, the column group of a manifest, or an entry 'group' "
                "of the batches.",
                *(copied, len(scored)),
            )

    def close(self) -> None:
        """Free the patch features."""
        for collection in self.collections:
            collection.close()
        self.collections = []


def tell_tiles(model: PatchCoreModel | EnsembleModel, images: Tensor) -> None:
    """Log what the tiles of images ``(B, 3, H, W)`` cost, of a model that cuts them."""
    if (tiling := model.members[0].patch_features.tiling) is not None:
        log.info(tiling.told(*images.shape[2:]))


def start_fitting(
    module: Any, loader: Any, batches: float, processes: Processes, neighbours: int = 1, *, update: bool = False
) -> Fitting:
    """Begin a fit of a `PatchCore`, as its options say; its memory bank is forgotten, or goes into the selection.

    Args:
        module: The `PatchCore`.
        loader: Loader of the training images.
        batches: Its batches in this process; infinite where that is not known.
        processes: Processes that fit the model together.
        neighbours: Processes that share this machine's memory.
        update: As in `Fitting`.
    """
    try:
        images: int | None = len(loader.dataset)
    except (AttributeError, TypeError):
        images = None
        if processes.count > 1:
            log.warning("a stream must give every process as many batches: where one has fewer, the others wait.")
    pixels = loader.dataset.mean_pixels() if isinstance(getattr(loader, "dataset", None), ImageDataset) else None
    return Fitting(
        module.model,
        store=module.store,
        calibration_share=module.calibration_share,
        leave_one_out=module.calibration_images if module.calibration == "leave_one_out" else 0,
        drop_suspicious=module.drop_suspicious,
        seed=module.seed,
        images=images,
        batches=batches,
        processes=processes,
        neighbours=neighbours,
        update=update,
        fixed_size=module.transform.size is not None,
        pixels=pixels,
        references=module.references,
    )
