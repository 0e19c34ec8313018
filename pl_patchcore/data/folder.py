"""Images of your own: folders, or a CSV list -> records.

One folder of nominal images is enough: a share of them is held out for a test, which tells the false-alarm rate at the
calibrated thresholds (``model.calibration_share``). Anomalous images add the figures of image level, masks those of
pixel level. Next: `base.py`.
"""

from __future__ import annotations

import csv
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pl_patchcore.data.base import NOMINAL, AnomalyDataModule, Record
from pl_patchcore.errors import UserError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_LABELS = {"nominal": 0, "0": 0, "anomalous": 1, "1": 1}
_COLUMNS = ("path", "split", "label", "defect", "category", "mask")


def list_images(folder: Path, remedy: str, recursive: bool = False) -> list[Path]:
    """List the image files in a folder by their suffix, upper or lower case, in the order of their names.

    Hidden files are passed over; other files that are no images are counted in a log line. With ``recursive`` also the
    images in folders inside, links followed, each folder once.

    Raises:
        UserError: If there is no such folder, or no image in it; it ends with the ``remedy``.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {remedy}.")
    files, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(here)
        folders[:] = [n for n in sorted(folders) if recursive and place not in seen and not n.startswith(".")]
        files += [Path(here, name) for name in names if place not in seen and not name.startswith(".")]
        seen.add(place)
    images = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise UserError(f"{folder}: holds no image ({', '.join(IMAGE_SUFFIXES)}); {remedy}.")
    if others := sorted(set(files) - set(images)):
        log.info("%s: %d files that are no images are passed over, such as %s.", folder, len(others), others[0].name)
    return images


def pair_masks(
    images: Sequence[Path], root: Path, masks: Sequence[Path], folder: Path, remedy: str
) -> dict[Path, Path]:
    """Mask of each image: exactly one, and none left over.

    Images in ``root`` and masks in ``folder`` have the same names but for the suffix, and ``_mask`` behind a mask's.

    Raises:
        UserError: If an image has no mask (then with the ``remedy``), a mask no image, or two have one name.
    """
    of_image, of_mask = _by_name(images, root), _by_name(masks, folder, "_mask")
    if missing := [name for name in of_image if name not in of_mask]:
        path, wanted = of_image[missing[0]], folder / missing[0]
        raise UserError(f"{path}: has no mask {wanted.name}_mask.png or {wanted}.png; {remedy}.")
    if stray := sorted(set(of_mask) - set(of_image)):
        raise UserError(f"{of_mask[stray[0]]}: belongs to no image in {root}; remove it, or put the image back.")
    return {path: of_mask[name] for name, path in of_image.items()}


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
        listed = {
            name: list_images(folder, f"set data.{name} to a folder of images", recursive=True)
            for name, folder in self.folders.items()
        }
        train = [Record(path, 0, NOMINAL, self.category) for path in listed["nominal"]]
        if "test_nominal" in listed:
            test = [Record(path, 0, NOMINAL, self.category) for path in listed["test_nominal"]]
        else:
            train, test = self._split(train)
        if "anomalous" in listed:
            images, root = listed["anomalous"], self.folders["anomalous"]
            masks = {}
            if "masks" in listed:
                remedy = "add it, or use data.manifest, where an image may go without"
                masks = pair_masks(images, root, listed["masks"], self.folders["masks"], remedy)
            for path in images:
                inside = path.relative_to(root).parts
                defect = inside[0] if len(inside) > 1 else "anomalous"
                test.append(Record(path, 1, defect, self.category, masks.get(path)))
        places = Counter(record.path.resolve() for record in (*train, *test))
        if twice := [place for place, times in places.items() if times > 1]:
            raise UserError(f"{twice[0]}: is named twice; nominal, test and anomalous images must lie apart.")
        return train, test

    def load_predict_records(self) -> list[Record] | None:
        """Images to predict; whether they are anomalous is not known."""
        if self.predict is None:
            return None
        if not self.predict.exists():
            raise UserError(f"{self.predict}: no such file or folder; set data.predict to the images to score.")
        paths = [self.predict]
        if self.predict.is_dir():
            paths = list_images(self.predict, "look at data.predict", recursive=True)
        return [Record(path, -1, "unknown", self.category) for path in paths]

    def _split(self, nominal: Sequence[Record]) -> tuple[list[Record], list[Record]]:
        number = round(self.test_share * len(nominal))
        tested = set(np.random.default_rng(self.split_seed).permutation(len(nominal))[:number].tolist())
        train = [record for i, record in enumerate(nominal) if i not in tested]
        return train, [record for i, record in enumerate(nominal) if i in tested]

    def _read_manifest(self, path: Path) -> tuple[list[Record], list[Record]]:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}: is not UTF-8 text ({error}); set data.manifest to a CSV file in UTF-8."
            ) from error
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
