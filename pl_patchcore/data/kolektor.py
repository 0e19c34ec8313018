"""KolektorSDD2, surfaces of one product (Božič et al. 2021): folders -> records.

Layout, as distributed: ``{train,test}/NNNNN.png`` and a mask ``NNNNN_GT.png`` beside each; nominal are the images whose
mask is empty. Anomalous training images are left out, and so are the copies that the archive holds of some files.
Numbers of images: those of the paper. Next: `base.py`.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from pl_patchcore.data.base import NOMINAL, AnomalyDataModule, Record, tell_counts
from pl_patchcore.data.files import AGAIN, list_images, nominal_only
from pl_patchcore.errors import UserError
from pl_patchcore.options import check_arguments
from pl_patchcore.preprocessing import read_mask

COUNTS = (2085, 894, 110)  # training, nominal test, anomalous test images
_HELP = (
    "fetch https://data.vicos.si/datasets/KSDD/KolektorSDD2.zip, unpack it, and give the folder that holds train and "
    "test as data.root"
)


class KolektorSDD2DataModule(AnomalyDataModule):
    """KolektorSDD2.

    Args:
        root: Folder that holds ``train`` and ``test``.
        **loading: Arguments of `AnomalyDataModule`.

    Raises:
        UserError: On use, if a folder is missing or empty, or an image has no mask.
    """

    headline: ClassVar[tuple[str, ...]] = ("image_average_precision", "image_auroc", "pixel_auroc", "pro")

    def __init__(self, root: str = "data/kolektor_sdd2", **loading: Any) -> None:
        check_arguments(KolektorSDD2DataModule.__init__, locals(), "data.")
        super().__init__(**loading)
        self.root = Path(root)

    def load_records(self) -> tuple[list[Record], list[Record]]:
        """List the images by name; every mask is read."""
        train, test = self._split("train"), self._split("test")
        nominal = nominal_only(train, self.root / "train")
        clean = sum(record.label == 0 for record in test)
        tell_counts(self.root, (len(nominal), clean, len(test) - clean), COUNTS)
        return nominal, test

    def _split(self, split: str) -> list[Record]:
        folder = self.root / split
        images = [path for path in list_images(folder, _HELP) if re.fullmatch(r"\d+\.png", path.name)]
        if not images:
            raise UserError(f"{folder}: holds no image NNNNN.png; {_HELP}.")
        masks = [path.with_name(f"{path.stem}_GT.png") for path in images]
        if missing := [mask for mask in masks if not mask.is_file()]:
            raise UserError(f"{missing[0]}: no such mask ({len(missing)} are missing); {AGAIN}.")
        with ThreadPoolExecutor(max(1, self.num_workers)) as pool:
            marked = pool.map(lambda mask: bool(read_mask(mask).any()), masks)
            told = tqdm(marked, f"Reading the masks of {split}", len(masks), delay=2, unit=" masks")
            return [
                Record(image, int(defect), "defect" if defect else NOMINAL, "surface", mask if defect else None, (0, 0))
                for image, mask, defect in zip(images, masks, told, strict=True)
            ]
