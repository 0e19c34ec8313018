"""Images of your own: folders, or a CSV list -> records.

The least that is needed is one folder of nominal images. A share of them is then held out as a test set without
anomalous images, which tells the false-alarm rate at the calibrated thresholds (``model.calibration_share``) and no
AUROC. With anomalous images, all figures of image level; with masks, those of pixel level. Next: `base.py`.
"""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pl_patchcore.data.base import NOMINAL, AnomalyDataModule, Record
from pl_patchcore.data.files import list_images
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
            images are split by ``test_share``), ``defect``, ``category``, ``mask``.
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
            train, test = self._split(train)
        if "anomalous" in self.folders:
            test += self._anomalous(self.folders["anomalous"])
        seen: set[Path] = set()
        for record in (*train, *test):
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
        paths = [self.predict]
        if self.predict.is_dir():
            paths = list_images(self.predict, recursive=True, remedy="look at data.predict")
        return [Record(path, -1, "unknown", self.category) for path in paths]

    def _images(self, name: str) -> list[Path]:
        return list_images(self.folders[name], recursive=True, remedy=f"set data.{name} to a folder of images")

    def _anomalous(self, folder: Path) -> list[Record]:
        images = self._images("anomalous")
        masks = self._masks(images, folder) if "masks" in self.folders else {}
        records = []
        for path in images:
            inside = path.relative_to(folder).parts
            defect = inside[0] if len(inside) > 1 else "anomalous"
            records.append(Record(path, 1, defect, self.category, masks.get(path)))
        return records

    def _masks(self, images: Sequence[Path], root: Path) -> dict[Path, Path]:
        """Mask of each image: exactly one, and none left over."""
        folder = self.folders["masks"]
        masks = _by_name(self._images("masks"), folder, "_mask")
        named = _by_name(images, root)
        if missing := [path for name, path in named.items() if name not in masks]:
            raise UserError(
                f"{missing[0]}: has no mask {folder / missing[0].relative_to(root).with_suffix('.png')}; "
                "add it, or use data.manifest, where an image may go without."
            )
        if stray := sorted(set(masks) - set(named)):
            raise UserError(f"{masks[stray[0]]}: belongs to no image in {root}; remove it, or put the image back.")
        return {path: masks[name] for name, path in named.items()}

    def _split(self, nominal: Sequence[Record]) -> tuple[list[Record], list[Record]]:
        number = round(self.test_share * len(nominal))
        tested = set(np.random.default_rng(self.split_seed).permutation(len(nominal))[:number].tolist())
        train = [record for i, record in enumerate(nominal) if i not in tested]
        return train, [record for i, record in enumerate(nominal) if i in tested]

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
        strange = [f"has a column {name!r}" for name in names if name not in _COLUMNS]
        if strange or not {"path", "label"} <= set(names):
            what = (strange or ["lacks the columns path and label"])[0]
            raise UserError(f"{path}: {what}; its first line must name columns of {', '.join(_COLUMNS)}.")
        parts: dict[str, list[Record]] = {"train": [], "test": [], "": []}
        for row in rows:
            record, split = self._read_line(row, path.parent, f"{path}, line {rows.line_num}")
            parts[split].append(record)
        train, test = self._split(parts[""])
        return parts["train"] + train, parts["test"] + test

    def _read_line(self, row: dict[str, Any], folder: Path, where: str) -> tuple[Record, str]:
        if None in row or None in row.values():
            raise UserError(f"{where}: has more or fewer fields than the first line.")
        row = dict.fromkeys(_COLUMNS, "") | {name: value.strip() for name, value in row.items()}
        if row["label"] not in _LABELS:
            raise UserError(f"{where}: label must be nominal or anomalous, got {row['label']!r}.")
        label = _LABELS[row["label"]]
        split = row["split"] or ("" if label == 0 else "test")
        if split not in ("", "train", "test"):
            raise UserError(f"{where}: split must be train or test, got {split!r}.")
        if label == 1 and split == "train":
            raise UserError(f"{where}: an anomalous image cannot train; set its split to test.")
        if not row["path"]:
            raise UserError(f"{where}: names no path.")
        if label == 0 and row["mask"]:
            raise UserError(f"{where}: a nominal image has no mask; leave it empty.")
        mask = folder / row["mask"] if row["mask"] else None
        defect = (row["defect"] or "anomalous") if label else NOMINAL
        return Record(folder / row["path"], label, defect, row["category"] or self.category, mask), split


def _by_name(paths: Sequence[Path], folder: Path, ending: str = "") -> dict[str, Path]:
    """Paths by their names inside ``folder``, without suffix and ``ending``."""
    found: dict[str, Path] = {}
    for path in paths:
        name = path.relative_to(folder).with_suffix("").as_posix().removesuffix(ending)
        name = unicodedata.normalize("NFC", name)  # accents in one form, as file systems differ in that
        if name in found:
            raise UserError(f"{path}: has the same name as {found[name]}; rename one, so that the mask is known.")
        found[name] = path
    return found
