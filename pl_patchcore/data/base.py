"""What all data sets share: the record of an image, the sample, the data set and the data module.

A data set is two lists of records (training and test). A sample is a plain dict, the same from every data
module; batches of it go through PatchCore unchanged. Next: `patchcore.py`, which takes the batches.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
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

from pl_patchcore.errors import UserError
from pl_patchcore.preprocessing import UNKNOWN, Preprocessing, check_image, read_image

log = logging.getLogger(__name__)

NOMINAL = "nominal"
Sample = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One image of a data set.

    Args:
        path: Image file.
        label: 0 nominal, 1 anomalous, as the data set's folders say, never from the mask; -1 not known.
        defect: Defect type, ``nominal`` for nominal images.
        category: Product or scene.
        mask_path: Ground-truth mask; None means all nominal for a nominal image, unknown for an anomalous one.
    """

    path: Path
    label: int
    defect: str
    category: str
    mask_path: Path | None = None

    def read(self) -> tuple[Image.Image, np.ndarray]:
        """Read the image, RGB, and its ground truth, uint8 ``(H, W)``: 0 nominal, 1 anomalous, 255 unknown.

        Grey levels of a mask above 127 of 255 are anomalous, of several channels the brightest counts. An anomalous
        image without a mask, or with an empty one, is unknown everywhere: its pixels count neither way.

        Raises:
            UserError: If the image or mask cannot be read, or their sizes differ.
        """
        image = read_image(self.path)
        mask = np.zeros((image.height, image.width), np.uint8)
        if self.label != 0 and self.mask_path is not None:
            levels = np.asarray(read_image(self.mask_path)).max(axis=2)
            if levels.shape != mask.shape:
                raise self.mismatch(levels.shape, mask.shape)
            mask = (levels > 127).astype(np.uint8)
        if self.label != 0 and not mask.any():
            mask[:] = UNKNOWN
        return image, mask

    def image(self) -> Image.Image:
        """Read the image, RGB."""
        return self.read()[0]

    def check(self) -> None:
        """Refuse, as `read` does, what shows without decoding the files (see `check_image`)."""
        size = check_image(self.path)
        if self.mask_path is not None and self.label == 1 and (found := check_image(self.mask_path)) != size:
            raise self.mismatch(found, size)

    def mismatch(self, found: tuple[int, ...], size: tuple[int, ...]) -> UserError:
        """Error for a mask whose size is not its image's."""
        return UserError(
            f"{self.mask_path}: mask of {found[0]}x{found[1]} pixels for an image of {size[0]}x{size[1]} "
            f"({self.path}); a mask must have its image's size."
        )


class ImageDataset(Dataset[Sample]):
    """Records as samples.

    A sample holds ``image``, ``mask``, ``original_size`` and ``crop_box`` as `Preprocessing.apply` gives them;
    ``label``, ``index`` in the data set; ``category``, ``defect`` and ``path`` as strings.

    Args:
        records: The images, in the data set's order.
        transform: Geometry and normalisation.
    """

    def __init__(self, records: Sequence[Record], transform: Preprocessing) -> None:
        self.records, self.transform = records, transform

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        names = {"category": record.category, "defect": record.defect, "path": str(record.path)}
        return self.transform.apply(*record.read()) | {"label": record.label, "index": index} | names


def collate(samples: list[Sample]) -> Sample:
    """Stack samples into a batch; images of different shapes are refused by name."""
    shapes = {tuple(sample["image"].shape[1:]): sample["path"] for sample in samples}
    if len(shapes) > 1:
        (one, first), (other, second) = list(shapes.items())[:2]
        raise UserError(
            f"{second} is {other} pixels after preprocessing, {first} is {one}; "
            "set crop, or resize_mode 'squash', so that all images have one shape."
        )
    batch: Sample = default_collate(samples)
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
    """

    category_argument: ClassVar[str | None] = None  # the constructor argument that selects one of `categories`
    category_all: ClassVar[str | None] = None  # its value that takes all of them together, if there is one

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int | None = None,
        validation: Literal["none", "test"] = "none",
        shots: int | None = None,
        shots_seed: int = 0,
        on_broken: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        if num_workers is not None and num_workers < 0:
            raise UserError(f"num_workers must be 0 or more, got {num_workers}.")
        if shots is not None and shots < 1:
            raise UserError(f"shots must be at least 1, got {shots}; leave it out to train on all nominal images.")
        for name, choice, other in (
            ("validation", validation, "none or test"),
            ("on_broken", on_broken, "error or skip"),
        ):
            if choice not in other.split(" or "):
                raise UserError(f"{name} must be {other}, got {choice!r}.")
        self.batch_size, self.validation, self.on_broken = batch_size, validation, on_broken
        self.num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        self.loading: dict[str, Any] = {  # arguments that the loaders have in common
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
            "collate_fn": collate,
        }
        self.shots, self.shots_seed = shots, shots_seed
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

    @property
    def records(self) -> tuple[list[Record], list[Record]]:
        """Training and test records."""
        return self.lists[:2]

    @cached_property
    def lists(self) -> tuple[list[Record], list[Record], list[Record]]:
        """Training, test and predict records, listed once."""
        train, test = self.load_records()
        predict = self.load_predict_records()
        if self.on_broken == "skip":
            broken = self._find_broken([*train, *test, *(predict or [])])
            train, test = ([r for r in part if r not in broken] for part in (train, test))
            predict = predict and [r for r in predict if r not in broken]
        if self.shots is not None:
            if self.shots > len(train):
                raise UserError(
                    f"shots is {self.shots}, but there are only {len(train)} nominal training images; lower it."
                )
            order = np.random.default_rng([self.shots_seed, 2]).permutation(len(train))  # a stream of its own
            train = [train[i] for i in sorted(order[: self.shots])]
        return train, test, test if predict is None else predict

    def require(self, stage: str) -> None:
        """Refuse a stage (``fit``, ``validate``, ``test`` or ``predict``) whose set of images is empty."""
        train, test, predict = self.lists
        if not {"fit": train, "predict": predict}.get(stage, test):
            name = "training" if stage == "fit" else stage
            raise UserError(f"{type(self).__name__}: the {name} set is empty; look at the data module's options.")

    def prepare_data(self) -> None:
        """Fetch what is to be downloaded, and check every file of both sets before any work is done."""
        self.download_data()
        if not self._checked and self.on_broken == "error":
            for record in dict.fromkeys(chain(*self.lists)):
                record.check()
            self._checked = True

    def _find_broken(self, records: list[Record]) -> set[Record]:
        """Decode every file, and say which records cannot be read."""
        broken = {}

        def read(record: Record) -> None:
            try:
                record.read()
            except UserError as error:
                broken[record] = str(error)

        with ThreadPoolExecutor(max(1, self.num_workers)) as pool:
            for _ in tqdm(pool.map(read, records), "Checking images", len(records), delay=2, unit=" images"):
                pass
        self.skipped = [broken[record] for record in records if record in broken]
        if broken:
            log.warning("%d files are left out (on_broken: skip):\n  %s", len(broken), "\n  ".join(self.skipped))
        return set(broken)

    def setup(self, stage: str) -> None:
        """Make the data sets, with the model's preprocessing unless one was set by hand."""
        if stage == "validate" and self.validation == "none":
            raise UserError("there is no validation set; set data.validation=test to validate on the test set.")
        module = self.trainer.lightning_module if self.trainer is not None else None
        transform = self.transform or getattr(module, "transform", None)
        if not isinstance(transform, Preprocessing):
            transform = Preprocessing()
        self.require(stage)
        self.train_set, self.test_set, self.predict_set = (ImageDataset(part, transform) for part in self.lists)
        if stage in ("fit", "test"):
            log.info("%s: %s", type(self).__name__, self.describe())

    def describe(self) -> str:
        """One line: the number of images in each set."""
        train, test = self.records
        defects = Counter(record.defect for record in test)
        counts = ", ".join(f"{number} {defect}" for defect, number in defects.items())
        left_out = f"; {len(self.skipped)} unreadable files left out" if self.skipped else ""
        return f"{len(train)} nominal training images; {len(test)} test images ({counts}){left_out}"

    def train_dataloader(self) -> DataLoader[Sample]:
        """Nominal images in data-set order (PatchCore has no use for shuffling)."""
        return DataLoader(self.train_set, batch_size=self.batch_size, **self.loading)

    def val_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """Nothing, or the test set where ``validation="test"`` asks for it."""
        return self.test_dataloader() if self.validation == "test" else []

    def test_dataloader(self) -> DataLoader[Sample]:
        """Nominal and anomalous images."""
        return DataLoader(self.test_set, batch_size=self.batch_size, **self.loading)

    def predict_dataloader(self) -> DataLoader[Sample]:
        """The images of ``predict_records``."""
        data, trainer = self.predict_set, self.trainer
        sampler: DistributedSampler[Sample] | None = None
        if trainer is not None and 0 < len(data) < trainer.world_size:
            # gives each process an image, though there are too few, which Lightning's own sampler refuses;
            # images given to more than one process count once (`PatchCore`)
            sampler = DistributedSampler(data, trainer.world_size, trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=self.batch_size, sampler=sampler, **self.loading)
