"""Training images -> a fitted model: the companion of `PatchCoreModel` and `EnsembleModel` while they are fitted.

Collects patch features batch by batch, selects each member's coreset, fills the memory banks, and scores the images
that were held out for calibration. Plain torch; `patchcore.py` drives it from Lightning's hooks. The features are kept
by `coreset/collection.py`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from pl_patchcore.calibration import draw_held_out, is_held_out
from pl_patchcore.coreset.collection import Collection, ExpectedImages
from pl_patchcore.distributed import Processes, on_first_process
from pl_patchcore.ensemble import EnsembleModel
from pl_patchcore.errors import UserError
from pl_patchcore.model import PatchCoreModel
from pl_patchcore.options import StoreOptions

log = logging.getLogger(__name__)
log.addFilter(on_first_process)

RAW_LEVEL = 64.0  # an image that reaches it was hardly normalised: by ImageNet's mean and deviation, white is 2.6


class Fitting:
    """One fit of a model. The memory bank that it has is forgotten, or goes into the selection (``update``).

    Args:
        model: The model.
        store: Where patch features are kept until the coreset is selected.
        calibration_share: Share of the images held out from the memory bank, in [0, 1).
        seed: Seed of the draw of these.
        images: Images of the data set, if their number is known.
        batches: Batches to come in this process; infinite where that is not known.
        processes: Processes that fit the model together.
        neighbours: Processes that share this machine's memory.
        update: Select among the rows of the present memory bank, too.
        fixed_size: Whether the model is to refuse images of another size than those of the fit.

    Attributes:
        collections: Patch features of each member.
        count: Images taken in by this process.
    """

    def __init__(
        self,
        model: PatchCoreModel | EnsembleModel,
        *,
        store: StoreOptions | None = None,
        calibration_share: float = 0.0,
        seed: int = 0,
        images: int | None = None,
        batches: float = math.inf,
        processes: Processes | None = None,
        neighbours: int = 1,
        update: bool = False,
        fixed_size: bool = False,
    ) -> None:
        self.members = model.members
        self.model, self.store, self.share, self.seed = model, store or StoreOptions(), calibration_share, seed
        self.images, self.batches, self.neighbours, self.fixed_size = images, batches, neighbours, fixed_size
        self.processes = processes or Processes(alone=True)
        self.held_out = None if images is None else draw_held_out(images, calibration_share, seed)
        self.collections: list[Collection] = []
        self.size: tuple[int, ...] = ()
        self.count = 0
        banks = [member.memory_bank for member in self.members]
        self.earlier = [
            bank.features.float().cpu() if update else torch.empty(0, dtype=torch.float32) for bank in banks
        ]
        self.seen = [int(bank.seen) if update else 0 for bank in banks]
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
    def add(self, images: Tensor, index: Tensor | None = None) -> None:
        """Take in a batch.

        Args:
            images: ``(B, 3, H, W)``, all batches of one size.
            index: Index of each image in the data set, int64 ``(B,)``; None: they come in its order.

        Raises:
            UserError: If they are of another size than those before, or there is no room for their features.
        """
        if index is None:
            index = torch.arange(self.count, self.count + len(images))
        if self.size not in ((), tuple(images.shape[1:])):
            raise UserError(
                f"training images of {tuple(images.shape[1:])} after others of {self.size}; bring all to one size "
                "(model.transform does)."
            )
        if not self.size:
            self._look_at_first(images)
        if self.held_out is None:
            held = [is_held_out(i, self.share, self.seed) for i in index.tolist()]
        else:
            held = [i in self.held_out for i in index.tolist()]
        self.count += len(images)
        for place, member in enumerate(self.members):
            patches = member.patch_features(images)
            if place == len(self.collections):
                self._begin(member, len(images))
            self.collections[place].add(patches, index, torch.tensor(held, dtype=torch.bool))

    def _look_at_first(self, images: Tensor) -> None:
        self.size = tuple(images.shape[1:])
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

    def _begin(self, member: PatchCoreModel, batch: int) -> None:
        """Reserve space for a member's features."""
        expected = None
        if math.isfinite(self.batches):
            world = self.processes.count
            held = len(self.held_out or ())
            own = int(self.batches) * batch
            everywhere = own * world
            if self.images is not None:
                own = min(own, -(-self.images // world))
                everywhere = min(everywhere, self.images - held)
            bank = own if self.images is None else min(own, self.images - held)
            expected = ExpectedImages(bank, min(own, held), everywhere)
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
        scales = []
        for place, member in enumerate(self.members):
            if place == len(self.collections):  # no image came to this process
                self._begin(member, 0)
            self._fill(member, place, shown)
            if self.fixed_size:
                member.input_size = torch.tensor([height, width], device=member.input_size.device)
            scales.append(self._tell_coverage(member, self.collections[place]))
        if isinstance(self.model, EnsembleModel):
            scale = torch.tensor(scales, dtype=torch.float32, device=self.model.scale.device)
            self.model.scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        self._calibrate((height, width))

    def _fill(self, member: PatchCoreModel, place: int, shown: bool) -> None:
        start, bank, collection = time.perf_counter(), member.memory_bank, self.collections[place]
        device = bank.features.device
        rows, radii = collection.select(self.earlier[place], self.seen[place], self.processes, shown=shown)
        bank.fill(rows.to(device), None if radii is None else radii.to(device))
        bank.seen = torch.full_like(bank.seen, self.seen[place] + collection.total)
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
                len(self.earlier[place]) + collection.total,
                collection.dimension,
                time.perf_counter() - start,
            ),
        )

    def _tell_coverage(self, member: PatchCoreModel, collection: Collection) -> float:
        """Log how far patch features lie from the memory bank; their mean distance, those in it not counted."""
        bank = member.memory_bank
        sample = collection.sample().to(bank.features.device)
        nearest, _ = bank(sample, min(2, bank.size))
        log.info(
            "coverage: %d sampled patch features lie %.4g from the memory bank on average, %.4g at most.",
            *(len(sample), nearest[:, 0].mean().item(), nearest[:, 0].max().item()),
        )
        distance = torch.where(nearest[:, 0] > 0, nearest[:, 0], nearest[:, -1]).double()
        return float((distance.square() if member.scorer.distance == "squared" else distance).mean())

    def _calibrate(self, size: tuple[int, int]) -> None:
        """Score the held-out images of all processes."""
        found = [torch.empty(3, 0, dtype=torch.float64)]  # in each column an image's index, score, peak of its map
        for index, scores, maps in self._score_held_out(size):
            values = (torch.tensor([index]), scores, maps.flatten(1).amax(1))
            found.append(torch.stack([value.cpu().double() for value in values]))
        known = torch.cat(self.processes.objects(torch.cat(found, 1).T.contiguous()))  # (n, 3)
        _, scores, peaks = known[known[:, 0].argsort(stable=True)].float().unbind(1)
        device = self.members[0].input_size.device
        self.model.calibration.fill(scores.to(device), peaks.to(device))
        if self.share and not len(known):
            log.warning("calibration_share holds no image out; there are no thresholds.")

    def _score_held_out(self, size: tuple[int, int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        for images in zip(*(collection.held_out_images() for collection in self.collections), strict=True):
            parts = [
                member.scorer(patches.to(member.input_size.device), member.memory_bank, size)
                for member, (_, patches) in zip(self.members, images, strict=True)
            ]
            scores, maps = self.model.combined(parts) if isinstance(self.model, EnsembleModel) else parts[0]
            yield images[0][0], scores, maps

    def close(self) -> None:
        """Free the patch features."""
        for collection in self.collections:
            collection.close()
        self.collections = []
