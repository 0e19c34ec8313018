"""Images of your own: folders, or a CSV list -> records.

The least that is needed is one folder of nominal images. A share of them is then held out as a test set without
anomalous images, which tells the false-alarm rate at the calibrated thresholds (``model.calibration_share``) and no
AUROC. With anomalous images, all figures of image level; with masks, those of pixel level. Next: `base.py`.
"""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pl_patchcore.data.base import NOMINAL, AnomalyDataModule, Record
from pl_patchcore.data.files import IMAGE_SUFFIXES, list_images
from pl_patchcore.errors import UserError

_LABELS = {"nominal": 0, "0": 0, "anomalous": 1, "1": 1}
_COLUMNS = ("path", "split", "label", "defect", "category", "mask")


class FolderDataModule(AnomalyDataModule):
    """Images in folders, or listed in a CSV file. Folders are read with the folders inside them.

    Args:
        nominal: Folder of nominal images.
        test_nominal: Folder of nominal test images; None holds ``test_share`` of ``nominal`` out for the test.
        anomalous: Folder of anomalous test images; the folders directly inside it are the defect types.
        masks: Folder of their masks, with the names the images have in ``anomalous``, folders included, whatever the
            suffix (``scratch/01.jpg``: ``scratch/01.png`` or ``scratch/01_mask.png``). Above mid-grey is defect.
        manifest: CSV file in place of the folders, with a header line. Columns: ``path`` (relative to the CSV file);
            ``label``, ``nominal`` or ``anomalous``; and as wanted ``split`` (``train`` or ``test``; without it nominal
            images are parted by ``test_share``), ``defect``, ``category``, ``mask``.
        predict: Folder of images, or one image, for ``predict``; nothing else is needed then. None predicts the test
            images.
        test_share: Share of the nominal images held out for the test, in [0, 1).
        split_seed: Seed of that draw.
        category: Name in tables of what the folders show.
        **loading: Arguments of `AnomalyDataModule`.

    Raises:
        UserError: If the arguments contradict each other; on use, if a folder is missing or empty, masks and images
            do not match, or a line of the CSV file makes no sense.
    """

    def __init__(
        self,
        nominal: str | None = None,
        test_nominal: str | None = None,
        anomalous: str | None = None,
        masks: str | None = None,
        manifest: str | None = None,
        predict: str | None = None,
        test_share: float = 0.2,
        split_seed: int = 0,
        category: str = "images",
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        folders = {"nominal": nominal, "test_nominal": test_nominal, "anomalous": anomalous, "masks": masks}
        given = [name for name, folder in folders.items() if folder is not None]
        if manifest is not None and given:
            raise UserError(f"data.manifest takes the place of data.{given[0]}; give one of them.")
        if masks is not None and anomalous is None:
            raise UserError("data.masks needs data.anomalous, the images they belong to.")
        if not 0 <= test_share < 1:
            raise UserError(f"test_share must be in [0, 1), got {test_share}.")
        self.folders = {name: Path(folder) for name, folder in folders.items() if folder is not None}
        self.manifest = None if manifest is None else Path(manifest)
        self.predict = None if predict is None else Path(predict)
        self.test_share, self.split_seed, self.category = test_share, split_seed, category

    def load_records(self) -> tuple[list[Record], list[Record]]:
        """List the images in the order of their names, or of the CSV file."""
        if self.manifest is not None:
            return self._read_manifest(self.manifest)
        if "nominal" not in self.folders:
            if self.predict is not None:
                return [], []
            raise UserError(
                "no images are named: set data.nominal (a folder of nominal images) or data.manifest (a CSV file); "
                "data.predict is enough to predict."
            )
        train = [Record(path, 0, NOMINAL, self.category) for path in self._images("nominal")]
        if "test_nominal" in self.folders:
            test = [Record(path, 0, NOMINAL, self.category) for path in self._images("test_nominal")]
        else:
            train, test = self._part(train)
        if "anomalous" in self.folders:
            test += self._anomalous()
        seen: set[Path] = set()
        for record in chain(train, test):
            if (place := record.path.resolve()) in seen:
                raise UserError(f"{record.path}: is named twice; nominal, test and anomalous images must lie apart.")
            seen.add(place)
        return train, test

    def load_predict_records(self) -> list[Record] | None:
        """Images to predict; whether they are anomalous is not known."""
        if self.predict is None:
            return None
        if not self.predict.exists():
            raise UserError(f"{self.predict}: no such file or folder; set data.predict to the images to score.")
        paths = list_images(self.predict, recursive=True) if self.predict.is_dir() else [self.predict]
        if not paths:
            raise UserError(f"{self.predict}: holds no image ({', '.join(IMAGE_SUFFIXES)}).")
        return [Record(path, -1, "unknown", self.category) for path in paths]

    def _images(self, name: str) -> list[Path]:
        folder = self.folders[name]
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; set data.{name} to a folder of images.")
        images = list_images(folder, recursive=True)
        if not images:
            raise UserError(f"{folder}: holds no image ({', '.join(IMAGE_SUFFIXES)}); look at data.{name}.")
        return images

    def _anomalous(self) -> list[Record]:
        folder, images = self.folders["anomalous"], self._images("anomalous")
        masks = self._masks(images) if "masks" in self.folders else {}
        records = []
        for path in images:
            inside = path.relative_to(folder).parts
            defect = inside[0] if len(inside) > 1 else "anomalous"
            records.append(Record(path, 1, defect, self.category, masks.get(path)))
        return records

    def _masks(self, images: Sequence[Path]) -> dict[Path, Path]:
        """Mask of each image: exactly one, and none left over."""
        folder, root = self.folders["masks"], self.folders["anomalous"]
        masks: dict[str, Path] = {}
        for path in self._images("masks"):
            key = _key(path, folder).removesuffix("_mask")
            if key in masks:
                raise UserError(f"{path}: is a second mask beside {masks[key]}; leave one.")
            masks[key] = path
        found: dict[str, Path] = {}
        for path in images:
            key = _key(path, root)
            if key in found:
                raise UserError(f"{path}: has the same name as {found[key]}; rename one, so that its mask is known.")
            if key not in masks:
                raise UserError(
                    f"{path}: has no mask {folder / path.relative_to(root).with_suffix('.png')}; "
                    "add it, or use data.manifest, where an image may go without."
                )
            found[key] = path
        if stray := sorted(set(masks) - set(found)):
            raise UserError(f"{masks[stray[0]]}: belongs to no image in {root}; remove it, or put the image back.")
        return {path: masks[key] for key, path in found.items()}

    def _part(self, nominal: Sequence[Record]) -> tuple[list[Record], list[Record]]:
        number = round(self.test_share * len(nominal))
        aside = set(np.random.default_rng(self.split_seed).permutation(len(nominal))[:number].tolist())
        train = [record for i, record in enumerate(nominal) if i not in aside]
        return train, [record for i, record in enumerate(nominal) if i in aside]

    def _read_manifest(self, path: Path) -> tuple[list[Record], list[Record]]:
        if not path.is_file():
            raise UserError(f"{path}: no such file; set data.manifest to a CSV file with the column path.")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 text ({error}); save it as CSV, UTF-8.") from error
        first = text.partition("\n")[0]
        rows = csv.DictReader(text.splitlines(), delimiter=";" if first.count(";") > first.count(",") else ",")
        names = rows.fieldnames or []
        if strange := [name for name in names if name not in _COLUMNS] or not {"path", "label"} <= set(names):
            what = f"has a column {strange[0]!r}" if isinstance(strange, list) else "lacks the columns path and label"
            raise UserError(f"{path}: {what}; its first line must name columns of {', '.join(_COLUMNS)}.")
        parts: dict[str, list[Record]] = {"train": [], "test": [], "": []}
        for row in rows:
            record, split = self._read_line(row, path, rows.line_num)
            parts[split].append(record)
        train, test = self._part(parts[""])
        return parts["train"] + train, parts["test"] + test

    def _read_line(self, row: dict[str, Any], manifest: Path, line: int) -> tuple[Record, str]:
        where = f"{manifest}, line {line}"
        if None in row or None in row.values():
            raise UserError(f"{where}: has more or fewer fields than the first line.")
        row = {name: value.strip() for name, value in row.items()}
        if row["label"] not in _LABELS:
            raise UserError(f"{where}: label must be nominal or anomalous, got {row['label']!r}.")
        label = _LABELS[row["label"]]
        split = row.get("split") or ("" if label == 0 else "test")
        if split not in ("", "train", "test"):
            raise UserError(f"{where}: split must be train or test, got {split!r}.")
        if label == 1 and split == "train":
            raise UserError(f"{where}: an anomalous image cannot train; set its split to test.")
        if not row["path"]:
            raise UserError(f"{where}: names no path.")
        image = manifest.parent / row["path"]
        mask = manifest.parent / row["mask"] if row.get("mask") else None
        if label == 0 and mask is not None:
            raise UserError(f"{where}: a nominal image has no mask; leave it empty.")
        defect = (row.get("defect") or "anomalous") if label else NOMINAL
        return Record(image, label, defect, row.get("category") or self.category, mask), split


def _key(path: Path, folder: Path) -> str:
    """Name inside ``folder`` without suffix; accents in one form, as file systems differ in that."""
    return unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
