"""MVTec AD (Bergmann et al. 2019), and data sets in its layout: folders -> records.

Layout, as distributed: ``<category>/train/good``, ``<category>/test/<defect>`` (``good`` among them) and
``<category>/ground_truth/<defect>/<image>_mask.png``, masks paired with images by name. Other data sets in this
layout are read as well, with images in any format. Next: `base.py`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

from pl_patchcore.data.base import NOMINAL, AnomalyDataModule, Record
from pl_patchcore.data.download import fetch_archive
from pl_patchcore.data.files import is_folder, list_folders, list_images, pair_masks
from pl_patchcore.errors import UserError
from pl_patchcore.options import check_arguments

log = logging.getLogger(__name__)

# nominal training images, nominal test images, anomalous test images, as published: 5354 in all, 1725 of them test
COUNTS = {
    "bottle": (209, 20, 63), "cable": (224, 58, 92), "capsule": (219, 23, 109), "carpet": (280, 28, 89),
    "grid": (264, 21, 57), "hazelnut": (391, 40, 70), "leather": (245, 32, 92), "metal_nut": (220, 22, 93),
    "pill": (267, 26, 141), "screw": (320, 41, 119), "tile": (230, 33, 84), "toothbrush": (60, 12, 30),
    "transistor": (213, 60, 40), "wood": (247, 19, 60), "zipper": (240, 32, 119),
}  # fmt: skip
URL = (
    "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/download/420938113-1629960298/"
    "mvtec_anomaly_detection.tar.xz"
)
SHA256 = "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"  # as several who fetched it have found it
_BY_HAND = "fetch MVTec AD from https://www.mvtec.com/company/research/datasets/mvtec-ad"
_HELP = f"set data.download, or {_BY_HAND}, unpack it, and give its folder as data.root"


class MVTecDataModule(AnomalyDataModule):
    """One category of MVTec AD, or of a data set in its layout.

    Args:
        root: Folder that holds the categories (``bottle``, ``cable``, ...).
        category: The category; ``pl-patchcore benchmark`` goes through all.
        download: Fetch the data set (5 GB; CC BY-NC-SA 4.0, not for commercial use) if ``root`` does not exist.
        url: Address it is fetched from; another than the default is not compared with the known checksum.
        **loading: Arguments of `AnomalyDataModule`.

    Raises:
        UserError: On use, if a folder is missing or empty, or an anomalous image has no mask.
    """

    category_argument: ClassVar[str | None] = "category"

    def __init__(
        self,
        root: str = "data/mvtec_ad",
        category: str | None = None,
        download: bool = False,
        url: str = URL,
        **loading: Any,
    ) -> None:
        check_arguments(MVTecDataModule.__init__, locals(), "data.")
        super().__init__(**loading)
        self.root = Path(root)
        self.category = category
        self.download, self.url = download, url

    def download_data(self) -> None:
        """Fetch all categories where that was asked for and ``root`` does not exist."""
        if self.download and not self.root.exists():
            fetch_archive(self.url, self.root, sha256=SHA256 if self.url == URL else None, by_hand=_BY_HAND)

    def categories(self) -> list[str]:
        """The folders of ``root`` that hold a ``train`` folder, in alphabetical order."""
        found = [name for name in list_folders(self.root) if (self.root / name / "train").is_dir()]
        if not found and (self.root / "train").is_dir():
            raise UserError(
                f"{self.root}: is a category itself; set data.root to {self.root.absolute().parent} and data.category "
                f"to {self.root.absolute().name}."
            )
        if not found:
            raise UserError(f"{self.root}: holds no category (a folder with train/good and test); {_HELP}.")
        missing = sorted(set(COUNTS) - set(found))
        if missing and set(found) & set(COUNTS):
            log.warning("%s: %d of MVTec AD's 15 categories; missing: %s.", self.root, len(found), ", ".join(missing))
        return found

    def load_records(self) -> tuple[list[Record], list[Record]]:
        """List the images by name, nominal test images first, then the defects in alphabetical order."""
        if self.category is None:
            raise UserError(f"data.category is not set; choose one of {', '.join(self.categories())}.")
        folder = self.root / self.category
        if not is_folder(folder):
            raise UserError(f"{folder}: no such folder; choose one of {', '.join(self.categories())}.")
        train, test = (
            [Record(path, 0, NOMINAL, self.category) for path in self._images(folder, split, "good")]
            for split in ("train", "test")
        )
        nominal, truths = len(test), folder / "ground_truth"
        if not is_folder(truths):
            log.warning("%s: there is no such folder of masks: there are no pixel figures.", truths)
        for defect in list_folders(folder / "test"):
            if defect.lower() == "good":
                continue
            images = self._images(folder, "test", defect)
            root, masks = folder / "test" / defect, {}
            if is_folder(truths):
                truth, remedy = truths / defect, f"give {truths} a folder {defect} with the mask of each image"
                masks = pair_masks(images, root, list_images(truth, remedy, recursive=True), truth, remedy)
            test += [Record(path, 1, defect, self.category, masks.get(path)) for path in images]
        found = (len(train), nominal, len(test) - nominal)
        published = COUNTS.get(self.category)
        if published is not None and found != published:
            log.warning(
                "%s: %d training, %d nominal and %d anomalous test images, where the published set has %d, %d and %d; "
                "its figures cannot be compared with published ones.",
                *(folder, *found, *published),
            )
        return train, test

    @staticmethod
    def _images(folder: Path, split: str, name: str) -> list[Path]:
        """Images of a folder inside ``train`` or ``test``; its name may be written in capitals."""
        there = list_folders(folder / split)
        found = next((other for other in there if other.lower() == name.lower()), name)
        what = ", ".join(there) or "no folder"
        remedy = f"a category holds train/good, test/good and test/<defect>, and {folder / split} holds {what}"
        return list_images(folder / split / found, remedy)
