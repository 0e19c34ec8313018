"""MVTec AD (Bergmann et al. 2019), and data sets in its layout: folders -> records.

Layout, as distributed: ``<category>/train/good``, ``<category>/test/<defect>`` (``good`` among them) and
``<category>/ground_truth/<defect>/<image>_mask.png``, masks paired with images by name. Other data sets in this
layout are read as well, with images in any format; those that are published are subclasses, which say in their
`Layout` what is otherwise. Next: `base.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pl_patchcore.data.base import NOMINAL, AnomalyDataModule, Record, tell_counts
from pl_patchcore.data.download import fetch_archive
from pl_patchcore.data.files import is_folder, list_folders, list_images, pair_masks
from pl_patchcore.errors import UserError
from pl_patchcore.options import check_arguments

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """What tells a data set of categories from others in the layout of MVTec AD."""

    name: str  # of the data set
    root: str  # folder that is looked at where ``data.root`` names no other
    counts: Mapping[str, tuple[int, ...]]  # of each category the published numbers of images, as `base.PARTS`
    by_hand: str  # how a person gets the data set
    url: str | None = None  # of its archive; None where it can be had by hand only
    sha256: str | None = None  # of the archive
    strip: bool = False  # whether one folder at the top of the archive holds all others
    train: str = "train"  # folder of a category: training images, in a folder ``nominal``
    test: str = "test"  # likewise: test images, in folders ``nominal`` and those of the defects
    truth: str = "ground_truth"  # likewise: masks, in folders of the defects
    validation: str | None = None  # likewise: nominal images for thresholds, in a folder ``nominal``; None: none
    nominal: str = "good"  # name of the folders of nominal images

    @property
    def help(self) -> str:
        """How to get the data set, with ``data.download`` where that does it."""
        fetch = f"set data.download, or {self.by_hand}" if self.url else self.by_hand
        return f"{fetch}, unpack it, and give its folder as data.root"


# as published: 5354 images in all, 1725 of them test
COUNTS = {
    "bottle": (209, 20, 63), "cable": (224, 58, 92), "capsule": (219, 23, 109), "carpet": (280, 28, 89),
    "grid": (264, 21, 57), "hazelnut": (391, 40, 70), "leather": (245, 32, 92), "metal_nut": (220, 22, 93),
    "pill": (267, 26, 141), "screw": (320, 41, 119), "tile": (230, 33, 84), "toothbrush": (60, 12, 30),
    "transistor": (213, 60, 40), "wood": (247, 19, 60), "zipper": (240, 32, 119),
}  # fmt: skip


class MVTecDataModule(AnomalyDataModule):
    """One category of MVTec AD, or of a data set in its layout.

    Args:
        root: Folder that holds the categories; None: ``data/`` with the name of the data set, such as
            ``data/mvtec_ad``.
        category: The category; ``pl-patchcore benchmark`` goes through all.
        download: Fetch the data set if ``root`` does not exist; docs/data.md has its licence.
        url: Address it is fetched from, and not compared with the known checksum; None: the known address.
        **loading: Arguments of `AnomalyDataModule`.

    Raises:
        UserError: On use, if a folder is missing or empty, or an anomalous image has no mask.
    """

    category_argument: ClassVar[str | None] = "category"
    layout: ClassVar[Layout] = Layout(
        name="MVTec AD",
        root="data/mvtec_ad",
        counts=COUNTS,
        by_hand="fetch MVTec AD from https://www.mvtec.com/company/research/datasets/mvtec-ad",
        url=(
            "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/download/420938113-1629960298/"
            "mvtec_anomaly_detection.tar.xz"
        ),
        sha256="cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",  # as several who fetched it found it
    )

    def __init__(
        self,
        root: str | None = None,
        category: str | None = None,
        download: bool = False,
        url: str | None = None,
        **loading: Any,
    ) -> None:
        check_arguments(MVTecDataModule.__init__, locals(), "data.")
        super().__init__(**loading)
        self.root = Path(self.layout.root if root is None else root)
        self.category = category
        self.download, self.url = download, url
        if download and not (url or self.layout.url):
            raise UserError(f"data.download: {self.layout.name} can be had by hand only; {self.layout.help}.")

    def download_data(self) -> None:
        """Fetch all categories where that was asked for and ``root`` does not exist."""
        layout, url = self.layout, self.url or self.layout.url
        if self.download and url and not self.root.exists():
            sha256 = None if self.url else layout.sha256
            fetch_archive(url, self.root, sha256=sha256, strip=layout.strip, by_hand=layout.by_hand)

    def categories(self) -> list[str]:
        """The folders of ``root`` that hold a folder of training images, in alphabetical order."""
        layout, counts = self.layout, self.layout.counts
        found = [name for name in list_folders(self.root) if (self.root / name / layout.train).is_dir()]
        if not found and (self.root / layout.train).is_dir():
            raise UserError(
                f"{self.root}: is a category itself; set data.root to {self.root.absolute().parent} and data.category "
                f"to {self.root.absolute().name}."
            )
        if not found:
            needs = f"a folder with {layout.train}/{layout.nominal} and {layout.test}"
            raise UserError(f"{self.root}: holds no category ({needs}); {layout.help}.")
        missing = sorted(set(counts) - set(found))
        if missing and set(found) & set(counts):
            message = "%s: %d of %s's %d categories; missing: %s."
            log.warning(message, self.root, len(found), layout.name, len(counts), ", ".join(missing))
        return found

    def load_records(self) -> tuple[list[Record], list[Record]]:
        """List the images by name, nominal test images first, then the defects in alphabetical order."""
        layout, folder = self.layout, self.category_folder()
        train, test = (self._nominal(folder, part) for part in (layout.train, layout.test))
        validation = self.load_calibration_records()
        nominal, truths = len(test), folder / layout.truth
        if not is_folder(truths):
            log.warning("%s: there is no such folder of masks: there are no pixel figures.", truths)
        for defect in list_folders(folder / layout.test):
            root = folder / layout.test / defect
            if defect.lower() == layout.nominal or root == truths:
                continue
            images, masks = self._images(folder, layout.test, defect), {}
            if is_folder(truths):
                truth, remedy = truths / defect, f"give {truths} a folder {defect} with the mask of each image"
                masks = pair_masks(images, root, list_images(truth, remedy, recursive=True), truth, remedy)
            test += [self.anomalous_record(path, defect, masks.get(path)) for path in images]
        found = [len(train), nominal, len(test) - nominal, *[len(validation)] * bool(layout.validation)]
        tell_counts(folder, found, layout.counts.get(folder.name))
        return train, test

    def load_calibration_records(self) -> list[Record]:
        """List the nominal images of the folder for thresholds, where the data set has one."""
        return self._nominal(self.category_folder(), self.layout.validation) if self.layout.validation else []

    def category_folder(self) -> Path:
        """Folder of the category; a `UserError` if there is none."""
        if self.category is None:
            raise UserError(f"data.category is not set; choose one of {', '.join(self.categories())}.")
        folder = self.root / self.category
        if not is_folder(folder):
            raise UserError(f"{folder}: no such folder; choose one of {', '.join(self.categories())}.")
        return folder

    def anomalous_record(self, path: Path, defect: str, mask: Path | None) -> Record:
        """Record of an anomalous test image."""
        return Record(path, 1, defect, str(self.category), mask)

    def _nominal(self, folder: Path, split: str) -> list[Record]:
        images = self._images(folder, split, self.layout.nominal)
        return [Record(path, 0, NOMINAL, str(self.category)) for path in images]

    def _images(self, folder: Path, split: str, name: str) -> list[Path]:
        """Images of a folder of one of the splits; its name may be written in capitals."""
        there, layout = list_folders(folder / split), self.layout
        found = next((other for other in there if other.lower() == name.lower()), name)
        what = ", ".join(there) or "no folder"
        nominal = [f"{part}/{layout.nominal}" for part in (layout.train, layout.validation, layout.test) if part]
        remedy = f"a category holds {', '.join(nominal)} and {layout.test}/<defect>, and {folder / split} holds {what}"
        return list_images(folder / split / found, remedy)
