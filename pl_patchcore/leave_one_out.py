"""Patch features that a fit has collected -> anomaly scores of training images, for calibration.

Of images that were held out from the memory bank, or of images in it, each without its own rows. `fitting.py` collects
the features, and hands the scores to `calibration.py`. `score_without_rows` does the same for images read again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pl_patchcore.anomaly_map import peaks
from pl_patchcore.calibration import draw_one_of_each
from pl_patchcore.coreset.collection import Collection, StoredImage
from pl_patchcore.counted import Counted
from pl_patchcore.distributed import on_first_process
from pl_patchcore.ensemble import EnsembleModel
from pl_patchcore.memory_bank import ForeignRows, MemoryBank
from pl_patchcore.model import PatchCoreModel
from pl_patchcore.patch_features import Band

log = logging.getLogger(__name__)
log.addFilter(on_first_process)

BAND_PATCHES = 1 << 14  # of an image, that are read again at once
PROBES = 64  # patches of an image that `_is_copied` looks at
COPY_DISTANCE = 0.5  # of a patch to the nearest foreign row, in distances to the nearest one of yet another image
COPY_PATCHES = 0.15  # share of an image's patches that are so near, where the image has a near-copy


class ImageLayout(NamedTuple):
    """How the patches of an image lie."""

    size: tuple[int, int]  # height and width of the image, pixels
    grids: list[tuple[int, int]]  # patches down and across, of each member
    counted: Counted | None  # which places count; None: all
    stored: Counted | None  # of which the patch features are kept; None: all


class NominalScore(NamedTuple):
    """An image scored for calibration."""

    image: int  # its index in the data set
    score: float
    peak: float  # of its anomaly map
    copied: bool  # whether the memory bank holds a near-copy of it
    name: str


class TrainingScorer:
    """Scores training images of this process by their stored patch features.

    Args:
        model: The model, its memory banks filled.
        collections: Patch features of each member.
        layouts: Layout of each image, by its index in the data set.
        names: Name of each image, as far as they are known.
    """

    def __init__(
        self,
        model: PatchCoreModel | EnsembleModel,
        collections: Sequence[Collection],
        layouts: Mapping[int, ImageLayout],
        names: Mapping[int, str],
    ) -> None:
        self.model, self.collections, self.layouts, self.names = model, collections, layouts, names
        self.banks = [member.memory_bank for member in model.members]

    def held_out(self) -> Iterator[NominalScore]:
        """Score the images that were held out from the memory bank."""
        for images in zip(*(collection.held_out_images() for collection in self.collections), strict=True):
            yield self._scored(images, self.banks)

    def without_own_rows(
        self, numbers: Mapping[int, int], most: int, seed: int, *, shown: bool
    ) -> Iterator[NominalScore]:
        """Score one image of each group without the group's rows.

        Args:
            numbers: Number of the group of each image of all processes, as the memory banks have it.
            most: Groups to score.
            seed: Seed of the draw of these, and of the image of each.
            shown: Whether to show progress.
        """
        groups = {*numbers.values()}
        if any(int(bank.images[0]) in groups and (bank.images == bank.images[0]).all() for bank in self.banks):
            log.warning(
                "leave_one_out needs rows of two images (or groups of images) in the memory bank, and all are of one; "
                "there are no thresholds from these images."
            )
            return
        if self.banks[0].approximate:
            log.info(
                "leave_one_out searches exactly; %s finds larger distances, by as much as is said above.",
                self.banks[0].search,
            )
        drawn = draw_one_of_each(numbers, seed, most)
        searches, own = [bank.exact() for bank in self.banks], drawn & self.layouts.keys()
        images = zip(*(each.bank_images(drawn) for each in self.collections), strict=True)
        with tqdm(images, "Leave one out", len(own), unit=" images", disable=not shown, mininterval=0.5) as bar:
            start = time.perf_counter()
            for place, image in enumerate(bar):
                number = numbers[image[0].image]
                rows = [ForeignRows(bank, number, search) for bank, search in zip(self.banks, searches, strict=True)]
                scored = self._scored(image, rows)
                if not place:
                    log.info(
                        "leave_one_out: scoring %d of %d training images without their own rows, about %.0f s.",
                        *(len(drawn), len(numbers), (time.perf_counter() - start) * len(own)),
                    )
                yield scored._replace(copied=_is_copied(image[0], self.banks[0], rows[0]))

    def _scored(
        self, image: Sequence[StoredImage], banks: Sequence[MemoryBank] | Sequence[ForeignRows]
    ) -> NominalScore:
        """Score an image by its patch features of each member."""
        index = image[0].image
        size, grids, counted, kept = self.layouts[index]
        parts = [
            member.scorer(_bands(stored, grid, kept, member.input_size.device), bank, size, counted)
            for member, stored, grid, bank in zip(self.model.members, image, grids, banks, strict=True)
        ]
        score, maps = self.model.combined(parts) if isinstance(self.model, EnsembleModel) else parts[0]
        return NominalScore(index, float(score), float(peaks(maps)), False, self.names.get(index, str(index)))


def _bands(image: StoredImage, grid: tuple[int, int], counted: Counted | None, device: torch.device) -> Iterator[Band]:
    """The bands of patch features of an image, read again."""
    (h, w), done = grid, 0
    inside = torch.ones(h, w, dtype=torch.bool) if counted is None else counted.at(h, w)[0].cpu()
    rows = max(1, BAND_PATCHES // w)
    for top in range(0, h, rows):
        part = inside[top : top + rows].flatten()
        number = int(part.sum())
        read = image.take(torch.arange(done, done + number))
        features = read.new_zeros(len(part), read.shape[1])
        features[part] = read
        yield Band(features.view(1, -1, w, read.shape[1]).to(device), top, h)
        done += number


@torch.no_grad()
def score_without_rows(
    model: PatchCoreModel | EnsembleModel, images: Tensor, group: int | None, counted: Counted | None = None
) -> tuple[Tensor, Tensor]:
    """Score images as a fitted model does (see ``inference``), but without the memory banks' rows of one group.

    Args:
        model: The model.
        images: ``(B, 3, H, W)``, normalised.
        group: Number in `MemoryBank.images`; None leaves nothing out.
        counted: Which places of the images count; None: all.

    Returns:
        Anomaly scores ``(B,)`` and maps ``(B, H, W)``, float32.
    """
    if group is None:
        return model(images, counted)  # type: ignore[no-any-return]
    banks = [ForeignRows(member.memory_bank, group, member.memory_bank.exact()) for member in model.members]
    parts = [member(images, counted, bank=bank) for member, bank in zip(model.members, banks, strict=True)]
    return model.combined(parts) if isinstance(model, EnsembleModel) else parts[0]


def _is_copied(image: StoredImage, bank: MemoryBank, foreign: ForeignRows) -> bool:
    """Whether an image has a near-copy in the memory bank.

    The distance to the nearest foreign row is compared with that to the nearest one of yet another image (or to the
    8th nearest row, where all of them are of one image). Images of different things are about as far from the one as
    from the other.
    """
    probes = image.take(torch.arange(0, image.number, max(1, image.number // PROBES))).to(bank.features.device)
    distance, rows = foreign(probes, 8)
    other = bank.images[rows] != bank.images[rows[:, :1]]
    other[:, -1] = True
    second = distance.gather(1, other.int().argmax(1, keepdim=True))[:, 0]
    near = distance[:, 0] < COPY_DISTANCE * second
    return bool(near.float().mean() >= COPY_PATCHES)
