"""Training images -> a fitted model: the companion of `PatchCoreModel` and `EnsembleModel` while they are fitted.

In order (`patchcore.py` calls what is public from Lightning's hooks):

1. `start_fitting` makes a `Fitting`, which notes what an update keeps of the model, and empties the model.
2. `Fitting.add_batch`, once a batch, gives the images of one size to `Fitting.add`. This draws which are held out, and
   for each member makes views of the others, computes patch features, and puts those that count into a `Collection`
   (`coreset/collection.py`).
3. `Fitting.select`: the groups of images are numbered; each member's coreset is selected and its memory bank filled;
   images are scored for calibration (`leave_one_out.py`); those that stand out are named (`suspicious.py`). If any are
   to be left out, banks are filled and images scored again without them. The scores go into the calibration.
4. `Fitting.close` frees the patch features.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress, islice
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
from pl_patchcore.preprocessing import shown
from pl_patchcore.references import ReferenceViews
from pl_patchcore.suspicious import TrainingImage, stands_out_above, tell, worst_groups

log = logging.getLogger(__name__)
log.addFilter(on_first_process)

RAW_LEVEL = 64.0  # an image that reaches it was hardly normalised: by ImageNet's mean and deviation, white is 2.6
MOST_COPIED = 0.1  # share of the images that may have a near-copy without a warning


class _Earlier(NamedTuple):
    """What a memory bank holds before a fit: nothing, but in an update."""

    features: Tensor  # (M, D), float32, on the CPU
    places: Tensor  # of the rows' patches, (M, 2); (0, 2) where not known
    images: list[int]  # number of the image of each row, -1 where not known
    seen: int  # patch features that the rows were selected from

    @classmethod
    def of(cls, bank: MemoryBank) -> _Earlier:
        if bank.position_radius is not None and len(bank.places) != bank.size:
            raise UserError("position_radius: the memory bank does not know the places of its rows; fit again.")
        images = bank.images.tolist() or [-1] * bank.size
        return cls(bank.features.float().cpu(), bank.places.cpu(), images, int(bank.seen))


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
        self.model, self.members = model, model.members
        self.store, self.references, self.seed = store or StoreOptions(), references or ReferenceViews(), seed
        self.share, self.leave_one_out, self.drop_suspicious = calibration_share, leave_one_out, drop_suspicious
        self.scores_images, self.views = leave_one_out > 0 or calibration_share > 0, len(self.references)  # of each
        self.images, self.batches, self.pixels, self.fixed_size = images, batches, pixels, fixed_size
        self.processes, self.neighbours, self.update = processes or Processes(alone=True), neighbours, update
        self.held_out = None if images is None else draw_held_out(images, calibration_share, seed)
        self.collections: list[Collection] = []
        self.size: tuple[int, ...] = ()  # of the first image
        self.count = self.batch = 0  # images so far, and of the first batch
        self.groups: dict[int, int] = {}  # of each image of this process
        self.names: dict[int, str] = {}  # of images of this process
        self.layouts: dict[int, ImageLayout] = {}  # of images that may be scored
        self.numbers: dict[int, int] = {}  # of each image's group, in the memory banks
        self.left_out, self.training_images = frozenset[int](), list[TrainingImage]()
        if not update:
            self._forget()
        banks = [member.memory_bank for member in self.members]
        self.earlier = [_Earlier.of(bank) for bank in banks]
        self.earlier_scores = model.calibration.scores, model.calibration.peaks
        self.earlier_size = self.members[0].input_size.tolist()  # of images; zeros: any
        self.grids = [(int(bank.grid[0]), int(bank.grid[1])) for bank in banks]  # of images; zeros: not known yet
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
        """Take in images of one size.

        Args:
            images: ``(B, 3, H, W)``; all of one size, where the model is for one.
            index: Index of each image in the data set, int64 ``(B,)``; None: they come in its order.
            group: Number of the group that each image belongs to, int64 ``(B,)``; None: each is a group of its own.
            names: Name of each image, such as its file's; None: its index.
            counted: Which places of the images count; None: all.
            batch: Images of the whole batch; None: these are.

        Raises:
            UserError: If they are of another size than those before, if no patch of an image counts, if patch features
                are not finite, or there is no room for them.
        """
        numbers = list(range(self.count, self.count + len(images))) if index is None else index.tolist()
        groups = numbers if group is None else group.tolist()
        told = [f"image {number}" for number in numbers] if names is None else [str(name) for name in names]
        if self.fixed_size and self.size not in ((), tuple(images.shape[1:])):
            raise UserError(
                f"training images of {tuple(images.shape[1:])} after others of {self.size}; bring all to one size "
                "(model.transform does)."
            )
        if not self.size:
            self._look_at_first(images)
        self.groups.update(zip(numbers, groups, strict=True))
        if self.leave_one_out and names is not None:
            self.names.update(zip(numbers, told, strict=True))
        if self.held_out is None:
            held = [is_held_out(each, self.share, self.seed) for each in groups]
        else:
            held = [each in self.held_out for each in groups]
        self.count += len(images)
        self.batch = self.batch or batch or len(images)
        found = [self._collect(place, images, numbers, told, held, counted) for place in range(len(self.members))]
        if self.scores_images:
            size, grids = (images.shape[2], images.shape[3]), [grid for grid, _, _ in found]
            for i, number in enumerate(numbers):
                inside = (None if each is None else each[i : i + 1].packed() for each in found[-1][1:])
                self.layouts[number] = ImageLayout(size, grids, *inside)

    def add_batch(self, batch: Mapping[str, Any]) -> None:
        """Take in a batch as `OwnImages` gives it, of images of one size or several."""
        total = len(batch["image"])
        for part in same_size_parts(batch) if total else ():
            images, counted = part["image"].to(self.members[0].input_size.device), Counted.of(part)
            self.add(images, part["index"].cpu(), part["group"].cpu(), part.get("path"), counted, total)

    def _collect(
        self,
        place: int,
        images: Tensor,
        index: Sequence[int],
        names: Sequence[str],
        held: Sequence[bool],
        counted: Counted | None,
    ) -> tuple[tuple[int, int], Counted | None, Counted | None]:
        """Put the patch features that count into a member's collection.

        Returns patches down and across, what counts when the images are scored, and what is kept of them.
        """
        member, grid = self.members[place], (0, 0)
        found: tuple[list[Geometry], list[Geometry]] = [], []  # of the images: what is scored, what is kept
        whole, placed = member.patch_features.tiling is None, member.memory_bank.position_radius is not None
        masked = member.foreground != "none" and (member.mask_references or self.scores_images)
        for part in self._parts(images, counted, held, whole=whole):
            inside: Tensor | None = None
            bands: Iterable[Band] = member.patch_features.bands(part.images, raw=masked)
            bands = _finite(bands, [names[at] for at in part.places], None if masked else part.counted)
            scored = of_part = part.counted
            if masked:
                bands, scored = member.in_front(bands, part.images, part.counted)
            if member.mask_references and scored is not None:
                of_part = scored.where_found()
            for images_of, those in zip(found, (scored, of_part), strict=True):
                counts = [] if those is None else those.images
                images_of.extend(each for each, again in zip(counts, part.again, strict=False) if not again)
            for band in bands:
                h, w = band.features.shape[1:3]
                grid, cells = (band.rows, w), torch.arange(h * w, device=band.features.device) + band.top * w
                if placed:
                    self._look_at_grid(place, grid)
                if of_part is not None and inside is None:
                    inside = of_part.patches(*grid).to(band.features.device)
                for i, features in enumerate(band.features.flatten(1, 2)):  # (h' w, D)
                    kept = slice(None) if inside is None else inside[i, band.top : band.top + h].flatten()
                    number = band.rows * w if inside is None else int(inside[i].sum())
                    own, more = cells[kept] if placed else None, band.top > 0 or part.again[i]
                    at, chosen = part.places[i], features[kept]
                    self._collection(place).add(chosen, index[at], number, held_out=held[at], more=more, places=own)
        scores, keeps = (Counted(each, images.device) if each else None for each in found)
        return grid, scores, keeps

    def _look_at_grid(self, place: int, grid: tuple[int, int]) -> None:
        """Refuse images of another grid of patches than those before, where places are compared."""
        if not any(self.grids[place]):
            self.grids[place] = grid
        if (before := self.grids[place]) != grid:
            raise UserError(
                f"position_radius needs one grid of patches, got {grid[0]}x{grid[1]} after {before[0]}x{before[1]}; "
                "bring all images to one size, or leave it out."
            )

    def _parts(self, images: Tensor, counted: Counted | None, held: Sequence[bool], *, whole: bool) -> Iterator[_Part]:
        """What the network is given of a batch: all images, or the views of one after the other, or one by one."""
        if whole and self.views == 1:
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
        if any(self.earlier_size) and self.earlier_size != list(self.size[1:]):
            raise UserError(
                f"new images of {self.size[1]}x{self.size[2]} pixels, but the memory bank is from images of "
                f"{self.earlier_size[0]}x{self.earlier_size[1]}; bring them to its size (model.transform does)."
            )
        if images.is_floating_point() and (highest := float(images.abs().max())) > RAW_LEVEL:
            log.warning(
                "training images reach %.0f: they look like levels from 0 to 255 that were never scaled to [0, 1] and "
                "normalised; model.transform does both.",
                highest,
            )
        self.references.check(images)

    def _collection(self, place: int) -> Collection:
        """Patch features of a member; the first call plans for the images to come."""
        if place == len(self.collections):
            member = self.members[place]
            self.collections.append(
                Collection(
                    member.coreset,
                    self.store,
                    member.input_size.device,
                    held_out=self.share > 0,
                    expected=self._expected(),
                    check=member.memory_bank.check,
                    neighbours=self.neighbours,
                    promised=sum(collection.planned for collection in self.collections),
                )
            )
        return self.collections[place]

    def _expected(self) -> ExpectedImages | None:
        """Most images that can come, each as large as the first one; None where that is not known."""
        if not math.isfinite(self.batches):
            return None
        own, held = int(self.batches) * self.batch, len(self.held_out or ())
        everywhere = own * self.processes.count
        images = everywhere if self.images is None else self.images
        own = min(own, -(-images // self.processes.count))
        scale = 1.0 if self.pixels is None else self.pixels / (math.prod(self.size[1:]) or 1)
        views = scale * self.views
        return ExpectedImages(
            views * min(own, images - held), scale * min(own, held), views * min(everywhere, images - held)
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
            scored = self._fill_and_score(shown)
            if self.leave_one_out:
                self._find_suspicious(scored)
            if self.left_out:
                for collection in self.collections:
                    collection.leave_out(self.left_out)
                self.groups = {image: group for image, group in self.groups.items() if image not in self.left_out}
                scored = self._fill_and_score(shown)
            self.training_images = [each._replace(group=self.numbers.get(each.image)) for each in self.training_images]
            self._calibrate(scored)
        except BaseException:
            self._forget()  # no half of a model
            raise

    def _fill_and_score(self, shown: bool) -> list[NominalScore]:
        """Fill all memory banks, and score the images that calibration needs."""
        self.numbers = self._number_groups()
        scales = [self._fill(place, shown) for place in range(len(self.members))]
        if self.fixed_size:
            height, width = (int(side) for side in self.processes.largest(*(self.size[1:] or (0, 0))))
            for member in self.members:
                member.input_size = member.input_size.new_tensor([height, width])
        if isinstance(self.model, EnsembleModel) and not self.update:  # or earlier scores would have another unit
            scale = torch.tensor(scales, dtype=torch.float32, device=self.model.scale.device)
            self.model.scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return self._score(shown)

    def _number_groups(self) -> dict[int, int]:
        """Number of the group of each image of all processes; the earlier memory bank's numbers come before."""
        groups: dict[int, int] = {}
        for part in self.processes.objects(self.groups):
            groups |= part
        first = 1 + max([-1, *(number for bank in self.earlier for number in bank.images)])
        found: dict[int, int] = {}
        return {image: first + found.setdefault(groups[image], len(found)) for image in sorted(groups)}

    def _fill(self, place: int, shown: bool) -> float:
        """Fill a member's memory bank; the mean distance of patch features to it, those in it not counted."""
        start, member, earlier = time.perf_counter(), self.members[place], self.earlier[place]
        bank, collection = member.memory_bank, self._collection(place)
        rows, radii = collection.select(earlier.features, earlier.seen, self.processes, shown=shown)
        sources = collection.sources.tolist()
        images = [earlier.images[-1 - each] if each < 0 else self.numbers[each] for each in sources]
        placed = self._places(place) if bank.position_radius is not None else (None, None)
        bank.fill(rows.to(bank.features.device), radii, torch.tensor(images, dtype=torch.int32), *placed)
        bank.seen = torch.full_like(bank.seen, earlier.seen + collection.total)
        sample = collection.sample().to(bank.features.device)
        bank.recall(sample)
        if member.scorer.num_neighbors > bank.size:
            log.warning(
                "num_neighbors is %d, but the memory bank has %d rows: the distances to all of them are averaged.",
                *(member.scorer.num_neighbors, bank.size),
            )
        total = len(earlier.features) + collection.total
        log.info(
            "memory bank: %d of %d patch features, %d numbers each, selected in %.1f s.",
            *(bank.size, total, collection.dimension, time.perf_counter() - start),
        )
        nearest, _ = bank(sample, 2)
        log.info(
            "coverage: %d sampled patch features lie %.4g from the memory bank on average, %.4g at most.",
            *(len(sample), nearest[:, 0].mean().item(), nearest[:, 0].max().item()),
        )
        distance = torch.where(nearest[:, 0] > 0, nearest[:, 0], nearest[:, -1]).double()
        return float(member.scorer.in_units(distance).mean())

    def _places(self, place: int) -> tuple[Tensor, tuple[int, int]]:
        """Row and column of the patch of each selected row, ``(M, 2)``, and the grid."""
        collection, earlier = self.collections[place], self.earlier[place].places
        for grid in self.processes.objects(self.grids[place]):
            if any(grid):
                self._look_at_grid(place, grid)
        old, cells, width = collection.sources < 0, collection.places(), self.grids[place][1]
        found = torch.empty(len(old), 2, dtype=torch.int64)
        found[old] = earlier[-1 - collection.sources[old]].long()
        found[~old] = torch.stack([cells // width, cells % width], 1)
        return found, self.grids[place]

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

    def _find_suspicious(self, scored: list[NominalScore]) -> None:
        """Find the images that stand out, and which are to be left out."""
        above = stands_out_above([*self.earlier_scores[0].tolist(), *(each.score for each in scored)])
        ordered = sorted(scored, key=lambda each: (-each.score, each.image))
        suspects = [each.image for each in ordered if above is not None and each.score > above]
        if self.drop_suspicious:
            self.left_out = worst_groups(suspects, self.numbers)
        self.training_images = [
            TrainingImage(each.image, each.name, each.score, each.image in suspects, each.image in self.left_out, None)
            for each in ordered
        ]
        tell(self.training_images, above, len(self.left_out), len(self.numbers), self.drop_suspicious)

    def _calibrate(self, scored: list[NominalScore]) -> None:
        """Take in the scores; keep what an earlier fit found."""
        scores, peaks = (torch.tensor([each[at] for each in scored], dtype=torch.float32) for at in (1, 2))
        self.model.calibration.fill(scores, peaks, torch.tensor([each.image for each in scored]))
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


def _finite(bands: Iterable[Band], names: Sequence[str], counted: Counted | None) -> Iterator[Band]:
    """Bands of the images' patch features; refuses NaN and infinity where an image counts (None: everywhere)."""
    for band in bands:
        if not torch.stack(band.features.aminmax()).isfinite().all():  # NaN comes through
            broken = ~band.features.isfinite().all(3)  # (b, h', w)
            if counted is not None:
                inside = counted.patches(band.rows, broken.shape[2]).to(broken.device)
                broken &= inside[:, band.top : band.top + broken.shape[1]]
            if (name := next(compress(names, broken.flatten(1).any(1).tolist()), None)) is not None:
                raise UserError(
                    f"patch features of {shown(name)} hold NaN or infinity; look for a broken image or an overflow in "
                    "half precision."
                )
        yield band


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
