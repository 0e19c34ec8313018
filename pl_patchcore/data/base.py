"""What all data sets share: the record of an image, the sample, the data set and the data module.

A data set is two lists of records (training and test). A sample is a plain dict, the same from every data
module; batches of it go through PatchCore unchanged. Next: `patchcore.py`, which takes the batches.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate
from tqdm import tqdm

from pl_patchcore.data.advice import spread, tell_geometry
from pl_patchcore.data.files import is_folder, list_images
from pl_patchcore.data.masks import MID_GREY, settle_masks
from pl_patchcore.errors import UserError
from pl_patchcore.options import check_arguments
from pl_patchcore.preprocessing import UNKNOWN, Header, Preprocessing, check_image, read_image, read_mask, shown

log = logging.getLogger(__name__)

NOMINAL = "nominal"
MOST_IN_BATCH = 65_536
PARTS = ("training", "nominal test", "anomalous test", "validation")
Sample = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One image of a data set.

    Args:
        path: Image file.
        label: 0 nominal, 1 anomalous, as the data set's folders say, never from the mask; -1 not known.
        defect: Defect type, ``nominal`` for nominal images.
        category: Product or scene.
        mask_path: Ground-truth mask, or a folder of several that are united; None means all nominal for a nominal
            image, unknown for an anomalous one.
        mask_above: Levels above this are anomalous, in a mask of 8 bits and in one of more; `settle_masks` sets it
            unless the data set does.
        group: Name of the group of images that it belongs to, such as a clip; calibration leaves a group out as a
            whole. Empty: it is a group of its own.
    """

    tells_defects: ClassVar[bool] = False  # whether `defect_regions` says more than the mask
    mask_is_image: ClassVar[bool] = True  # False: `read` is overridden, and knows what the mask says

    path: Path
    label: int
    defect: str
    category: str
    mask_path: Path | None = None
    mask_above: tuple[int, int] = MID_GREY
    group: str = ""

    def read(self, transform: Preprocessing | None = None) -> tuple[Image.Image, np.ndarray]:
        """Read the image, RGB, and its ground truth, uint8 ``(H, W)``: 0 nominal, 1 anomalous, 255 unknown.

        An anomalous image without a mask, or with an empty one, is unknown everywhere: its pixels count neither way.

        Args:
            transform: Says how images of more than 8 bits, and large ones, are read; None: as a model does by default.

        Raises:
            UserError: If the image or mask cannot be read, or their sizes differ.
        """
        transform = transform or Preprocessing()
        image = read_image(self.path, bits=transform.bits, max_pixels=transform.max_pixels)
        size = (image.height, image.width)
        return image, self.truth(size, transform) if self.label else np.zeros(size, np.uint8)

    def truth(self, size: tuple[int, int], transform: Preprocessing) -> np.ndarray:
        """Read the ground truth of an image of some size: see `read`."""
        mask = np.zeros(size, np.uint8)
        if self.label != 0:
            for path in self.masks():
                levels = read_mask(path, transform.max_pixels)
                if levels.shape != mask.shape:
                    raise self.mismatch(levels.shape, mask.shape)
                mask |= levels > self.mask_above[levels.dtype != np.uint8]
        if self.label != 0 and not mask.any():
            mask[:] = UNKNOWN
        return mask

    def defect_regions(self) -> list[tuple[np.ndarray, int]]:
        """The defects of the image, as `SPRO` takes them; none where they are not told apart."""
        return []

    def image(self) -> Image.Image:
        """Read the image, RGB."""
        return self.read()[0]

    def masks(self) -> list[Path]:
        """The mask files."""
        if self.mask_path is None or not is_folder(self.mask_path):
            return [] if self.mask_path is None else [self.mask_path]
        return list_images(self.mask_path, "put the masks of the image there, or remove the folder")

    def check(self, transform: Preprocessing | None = None) -> Header | None:
        """Refuse, as `read` does, what shows without decoding the files; return the image's header."""
        transform = transform or Preprocessing()
        header = check_image(self.path, transform.bits, transform.max_pixels)
        for path in self.masks() if self.label == 1 else []:
            found = check_image(path, max_pixels=transform.max_pixels, mask=True).size
            if found != header.size:
                raise self.mismatch(found, header.size)
        transform.check_region(header.size, self.path)
        return header

    def mismatch(self, found: tuple[int, ...], size: tuple[int, ...]) -> UserError:
        """Error for a mask whose size is not its image's."""
        return UserError(
            f"{shown(str(self.mask_path))}: mask of {found[0]}x{found[1]} pixels for an image of {size[0]}x{size[1]} "
            f"({shown(self.path)}); a mask must have its image's size."
        )


def tell_counts(
    place: Path, found: Sequence[int], published: Sequence[int] | None, parts: Sequence[str] = PARTS
) -> None:
    """Warn where a copy of a data set holds other numbers of images than the published one.

    Args:
        place: Folder or list that the images are from.
        found: Numbers of images, one for each of the ``parts`` or the first of them.
        published: The same of the published set; None where they are not known.
        parts: What the numbers are of.
    """
    if published is not None and tuple(found) != tuple(published):
        told = ", ".join(f"{number} {part}" for number, part in zip(found, parts, strict=False))
        log.warning(
            "%s: %s images, where the published set has %s; its figures cannot be compared with published ones.",
            *(place, told, ", ".join(map(str, published))),
        )


def _tell_dark(records: Sequence[Record], transform: Preprocessing) -> None:
    """Warn where images of more than 8 bits use the lower quarter of their range only; a few are looked at."""
    few = records[:: max(1, len(records) // 4)][:4]
    highest = max((int(np.asarray(record.read(transform)[0]).max()) for record in few), default=255)
    if highest < 64:
        log.warning(
            "%s: nearly black: it has more than 8 bits, and is at most %d of 255 when scaled; if a camera of 12 bits "
            "made it, set model.images.bits=12.",
            *(few[0].path, highest),
        )


def _tell_crop(record: Record, transform: Preprocessing) -> None:
    """Say how much of each image the crop leaves out; one image is looked at."""
    size = header.size if transform.crop is not None and (header := record.check(transform)) is not None else None
    if (share := transform.left_out(size)) >= 0.005:
        log.info(
            "the crop leaves %.0f %% of each image out: nothing is found there; --model.crop null inspects all of it.",
            100 * share,
        )


def loader_error(error: Exception) -> Exception:
    """Explain that a loader process ended, if that is what an error of a run says; else the error itself."""
    told = "DataLoader worker" in str(error) and not str(error).startswith("Caught ")
    while_sending = isinstance(error, ConnectionResetError | EOFError)
    if not while_sending and not (isinstance(error, RuntimeError) and told):
        return error
    return UserError(
        f"a loader process ended unexpectedly ({str(error).partition('.')[0]}); if memory is short, lower "
        "data.num_workers or data.batch_size."
    )


class ImageDataset(Dataset[Sample]):
    """Records as samples.

    A sample holds ``image``, ``mask``, ``original_size``, ``crop_box`` and perhaps ``region`` as `Preprocessing.apply`
    gives them; ``label``, ``index`` in the data set, ``group`` (index of the first image of its group); ``category``,
    ``defect`` and ``path`` as strings.

    Args:
        records: The images, in the data set's order.
        transform: Geometry and normalisation.
        original_masks: Whether ``mask`` is as in the file, of the original's size, in place of the input's.
    """

    def __init__(self, records: Sequence[Record], transform: Preprocessing, *, original_masks: bool = False) -> None:
        self.records, self.transform, self.original_masks = records, transform, original_masks
        self.tells_defects = any(record.tells_defects for record in records)
        first: dict[str, int] = {}
        self.groups = [first.setdefault(r.group, i) if r.group else i for i, r in enumerate(records)]

    def __len__(self) -> int:
        return len(self.records)

    def mean_pixels(self) -> float | None:
        """Pixels of an input on average, by the headers of a few images; None where all have one size."""
        headers = [] if self.transform.size else [each.check(self.transform) for each in spread(self.records)]
        pixels = [math.prod(self.transform.geometry(*header.size).size) for header in headers if header is not None]
        return float(np.mean(pixels)) if pixels else None

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        names = {"category": record.category, "defect": record.defect, "path": str(record.path)}
        numbers = {"label": record.label, "index": index, "group": self.groups[index]}
        image, mask = record.read(self.transform)
        sample: Sample = self.transform.apply(image, mask, record.path)
        if self.original_masks:
            if "region" in sample:
                mask[sample["region"].numpy() == 0] = UNKNOWN
            sample["mask"] = torch.tensor(mask)
        if self.tells_defects:
            sample["defect_regions"] = record.defect_regions()
        return sample | numbers | names


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples as a batch, as torch does it; entries whose shapes differ between the samples stay lists of tensors.

    Nothing is padded to a neighbour's size.

    Example:
        >>> batch = collate([{"image": torch.zeros(3, 4, 4), "label": 0}, {"image": torch.zeros(3, 4, 6), "label": 1}])
        >>> [image.shape[2] for image in batch["image"]], batch["label"]
        ([4, 6], tensor([0, 1]))
    """
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in samples[0]}
    for name, values in batch.items():
        if not isinstance(values[0], list) and len({np.shape(value) for value in values}) == 1:
            batch[name] = default_collate(values)
    return batch


class AnomalyDataModule(L.LightningDataModule):
    """Base of the data modules: subclasses say which records they hold (`load_records`).

    The preprocessing is that of the Trainer's model, or set by hand (``data.transform = model.transform``).

    Args:
        batch_size: Images per batch.
        num_workers: Loader processes; None takes one per core, at most 8.
        validation: ``none`` (no validation set: nothing is tuned while fitting), or ``test`` to run ``validate`` on the
            test set, knowingly.
        shots: Train on so many nominal images only, drawn by ``shots_seed``; with one seed, the images of fewer shots
            are among those of more. None takes all.
        shots_seed: Seed of that draw.
        on_broken: ``error`` stops at the first file that cannot be read, after a look at headers and ends;
            ``skip`` decodes every file beforehand and leaves out those that cannot be read, counted and listed.
        shots_order: ``random``, or ``sorted``: no draw, but the first ``shots`` images by path, with seed 1 the next
            ones, and so on, as few-shot results are published.
    """

    category_argument: ClassVar[str | None] = None  # the constructor argument that selects one of `categories`
    category_all: ClassVar[str | None] = None  # its value that takes all of them together, if there is one
    headline: ClassVar[tuple[str, ...]] = ("image_auroc", "pixel_auroc", "pro")  # figures that the set is compared by
    download: bool = False  # whether `download_data` may fetch the data set

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int | None = None,
        validation: Literal["none", "test"] = "none",
        shots: int | None = None,
        shots_seed: int = 0,
        on_broken: Literal["error", "skip"] = "error",
        shots_order: Literal["random", "sorted"] = "random",
    ) -> None:
        check_arguments(AnomalyDataModule.__init__, locals(), "data.")
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        if batch_size > MOST_IN_BATCH:
            raise UserError(f"batch_size must be at most {MOST_IN_BATCH}, got {batch_size}.")
        cores = os.cpu_count() or 1
        if num_workers is not None and num_workers > max(32, 4 * cores):
            raise UserError(f"num_workers must be at most {max(32, 4 * cores)} on {cores} cores, got {num_workers}.")
        if shots is not None and shots < 1:
            raise UserError(f"shots must be at least 1, got {shots}; leave it out to train on all nominal images.")
        self.batch_size, self.validation, self.on_broken = batch_size, validation, on_broken
        self.num_workers = min(8, cores) if num_workers is None else num_workers
        self.loading: dict[str, Any] = {  # arguments that the loaders have in common
            "num_workers": self.num_workers,
            "collate_fn": collate,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
        }
        self.shots, self.shots_seed, self.shots_order = shots, shots_seed, shots_order
        self.skipped: list[str] = []  # what was wrong with each file left out
        self.transform: Preprocessing | None = None
        self._checked = False

    def load_records(self) -> tuple[list[Record], list[Record]]:
        """List the training records (nominal only) and the test records, in a fixed order."""
        raise TypeError(f"{type(self).__name__} must define load_records().")

    def categories(self) -> list[str]:
        """Products or scenes that ``category_argument`` selects one by one; empty where there is just one set."""
        return []

    def download_data(self) -> None:
        """Fetch the data set where that was asked for; called once per machine, before anything is read."""

    def load_predict_records(self) -> list[Record] | None:
        """List the images that ``predict`` scores; None: the test records."""
        return None

    def load_calibration_records(self) -> list[Record]:
        """List nominal images that set the thresholds where ``model.calibration`` is ``images``."""
        return []

    @cached_property
    def listed(self) -> tuple[list[Record], list[Record]]:
        """Training and test records as `load_records` lists them, once."""
        return self.load_records()

    @cached_property
    def records(self) -> tuple[list[Record], list[Record]]:
        """Training and test records."""
        train, test = self.listed
        if self.on_broken == "skip":
            broken = self._find_broken([*train, *test])
            train, test = ([r for r in part if r not in broken] for part in (train, test))
        test = settle_masks(test, max(1, self.num_workers), self._transform())
        if self.shots is not None:
            train = self._few(train, self.shots)
        return train, test

    def _few(self, train: list[Record], shots: int) -> list[Record]:
        """The ``shots`` training records to take, in the data set's order."""
        if shots > len(train):
            raise UserError(f"shots is {shots}, but there are only {len(train)} nominal training images; lower it.")
        if self.shots_order == "random":
            order = np.random.default_rng([self.shots_seed, 2]).permutation(len(train))[:shots]  # a stream of its own
        else:
            first = self.shots_seed * shots
            if first + shots > len(train):
                raise UserError(
                    f"shots_seed {self.shots_seed} takes images {first + 1} to {first + shots} of those in sorted "
                    f"order, but there are only {len(train)} nominal training images; lower it, or shots."
                )
            order = np.array(sorted(range(len(train)), key=lambda i: str(train[i].path))[first : first + shots])
        return [train[i] for i in sorted(order)]

    @cached_property
    def predict_records(self) -> list[Record]:
        """Records that ``predict`` scores."""
        found = self.load_predict_records()
        return self.records[1] if found is None else self._readable(found)

    @cached_property
    def calibration_records(self) -> list[Record]:
        """Records of nominal images that set the thresholds where ``model.calibration`` is ``images``."""
        return self._readable(self.load_calibration_records())

    def _readable(self, records: list[Record]) -> list[Record]:
        broken = self._find_broken(records) if self.on_broken == "skip" else set()
        return [record for record in records if record not in broken]

    def look(self, stage: str) -> None:
        """List the images of a stage, unless they may have to be fetched first: a wrong path shows before other work.

        Raises:
            UserError: If a folder or file is missing or empty.
        """
        if not self.download and (stage != "predict" or self.load_predict_records() is None):
            _ = self.listed

    def require(self, stage: str) -> None:
        """Refuse a stage (``fit``, ``validate``, ``test`` or ``predict``) whose set of images is empty."""
        if not (self.predict_records if stage == "predict" else self.records[stage != "fit"]):
            name = "training" if stage == "fit" else stage
            raise UserError(f"{type(self).__name__}: the {name} set is empty; look at the data module's options.")

    def prepare_data(self) -> None:
        """Fetch what is to be downloaded, and check every file that is to be read before any work is done."""
        self.download_data()
        predicting = self.trainer is not None and self.trainer.state.fn == "predict"
        parts = () if predicting else (*self.records, self.calibration_records)
        if self.trainer is None or predicting:
            parts = (*parts, self.predict_records)
        if not self._checked and self.on_broken == "error":
            records, transform = list(dict.fromkeys(chain(*parts))), self._transform()
            headers = [(record, header) for record in records if (header := record.check(transform)) is not None]
            pages = [record for record, header in headers if header.pages > 1]
            if pages:
                log.warning("%d files hold several pages, such as %s: the first is read.", len(pages), pages[0].path)
            _tell_dark([record for record, header in headers if header.deep], transform)
            self._checked = not predicting

    def _find_broken(self, records: list[Record]) -> set[Record]:
        """Decode every file, and say which records cannot be read."""
        broken, transform = {}, self._transform()

        def read(record: Record) -> None:
            try:
                record.read(transform)
            except UserError as error:
                broken[record] = str(error)

        with ThreadPoolExecutor(max(1, self.num_workers)) as pool:
            for _ in tqdm(pool.map(read, records), "Checking images", len(records), delay=2, unit=" images"):
                pass
        skipped = [broken[record] for record in records if record in broken]
        if broken:
            log.warning("%d files are left out (on_broken: skip):\n  %s", len(broken), "\n  ".join(skipped))
        self.skipped += skipped
        return set(broken)

    def _transform(self) -> Preprocessing:
        """The preprocessing set by hand, or else the model's, or else the default."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        found = self.transform or getattr(module, "transform", None)
        return found if isinstance(found, Preprocessing) else Preprocessing()

    def setup(self, stage: str) -> None:
        """Make the data sets, with the model's preprocessing unless one was set by hand."""
        if stage == "validate" and self.validation == "none":
            raise UserError(
                "the data module has no validation set; set data.validation=test to validate on the test set."
            )
        transform = self._transform()
        module = self.trainer.lightning_module if self.trainer is not None else None
        self.require(stage)
        if stage == "predict":
            self.predict_set = ImageDataset(self.predict_records, transform)
        else:
            train, test = self.records
            as_they_are = getattr(module, "metrics_size", "input") == "original"
            self.train_set = ImageDataset(train, transform)
            self.test_set = ImageDataset(test, transform, original_masks=as_they_are)
            self.calibration_set = ImageDataset(self.calibration_records, transform)
        if stage in ("fit", "test"):
            log.info("%s: %s", type(self).__name__, self.describe())
        if stage in ("fit", "predict"):
            records = self.predict_records if stage == "predict" else self.records[0]
            _tell_crop(records[0], transform)
            tests = None if stage == "predict" else self.records[1]
            tell_geometry(records, tests, transform, getattr(module, "pixels_per_patch", None))

    def describe(self) -> str:
        """One line: the number of images in each set."""
        train, test = self.records
        defects = Counter(record.defect for record in test)
        counts = ", ".join(f"{number} {defect}" for defect, number in defects.items())
        left_out = f"; {len(self.skipped)} unreadable files left out" if self.skipped else ""
        tested = f"{len(test)} test images ({counts})" if test else "no test images"
        return f"{len(train)} nominal training images; {tested}{left_out}"

    def train_dataloader(self) -> DataLoader[Sample]:
        """Nominal images in data-set order (PatchCore has no use for shuffling)."""
        return DataLoader(self.train_set, batch_size=self.batch_size, **self.loading)

    def val_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """Nothing, or the test set where ``validation="test"`` asks for it."""
        return self.test_dataloader() if self.validation == "test" else []

    def test_dataloader(self) -> DataLoader[Sample]:
        """Nominal and anomalous images."""
        return DataLoader(self.test_set, batch_size=self.batch_size, **self.loading)

    def calibration_dataloader(self) -> DataLoader[Sample] | None:
        """Nominal images that set the thresholds where ``model.calibration`` is ``images``; None if there are none."""
        data = self.calibration_set
        return DataLoader(data, batch_size=self.batch_size, **self.loading) if len(data) else None

    def predict_dataloader(self) -> DataLoader[Sample]:
        """The images of ``predict_records``."""
        data, trainer = self.predict_set, self.trainer
        sampler: DistributedSampler[Sample] | None = None
        if trainer is not None and 0 < len(data) < trainer.world_size:
            # gives each process an image, though there are too few, which Lightning's own sampler refuses;
            # images given to more than one process count once (`PatchCore`)
            sampler = DistributedSampler(data, trainer.world_size, trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=self.batch_size, sampler=sampler, **self.loading)
