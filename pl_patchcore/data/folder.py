"""Images of your own: folders, or a CSV list -> records.

One folder of nominal images is enough: a share of them is held out for a test, which tells the false-alarm rate at the
calibrated thresholds (``model.calibration_share``). Anomalous images add the figures of image level, masks those of
pixel level. Next: `base.py`.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pl_patchcore.data.base import NOMINAL, AnomalyDataModule, Record
from pl_patchcore.data.files import is_folder, list_images, pair_masks
from pl_patchcore.errors import UserError
from pl_patchcore.options import check_arguments
from pl_patchcore.preprocessing import check_file, shown

log = logging.getLogger(__name__)

_LABELS = {"nominal": 0, "0": 0, "anomalous": 1, "1": 1}
# names of folders that say what is in them
_OF_NOMINAL = {"good", "ok", "nominal", "normal", "train"}
_OF_OTHERS = {
    *("test", "bad", "ko", "ng", "nok", "not_good", "defect", "defects", "defective", "faulty"),
    *("abnormal", "anomaly", "anomalies", "anomalous"),
}
_OF_MASKS = {"ground_truth", "groundtruth", "gt", "mask", "masks", "labels", "annotations", "segmentation"}
_COLUMNS = ("path", "split", "label", "defect", "category", "mask", "group")


class FolderDataModule(AnomalyDataModule):
    """Images in folders, or listed in a CSV file. Folders are read with the folders inside them.

    Args:
        nominal: Folder of nominal images.
        test_nominal: Folder of nominal test images; None holds ``test_share`` of ``nominal`` out for the test.
        anomalous: Folder of anomalous test images; the folders directly inside it are the defect types.
        masks: Folder of their masks, with the names the images have in ``anomalous``, folders included, whatever the
            suffix (``scratch/01.jpg``: ``scratch/01.png`` or ``scratch/01_mask.png``), or folders of that name with
            several masks each. Above mid-grey is defect; if none is as bright, each level above 0 is.
        manifest: CSV file in place of the folders, with a header line. Columns: ``path`` (relative to the CSV file);
            ``label``, ``nominal`` or ``anomalous``; and as wanted ``split`` (``train``, ``test`` or ``calibration``;
            without it nominal images are split by ``test_share``), ``defect``, ``category``, ``mask``, ``group``.
        predict: Folder of images, or one image, for ``predict``; nothing else is needed then. None predicts the test
            images.
        calibration: Folder of nominal images that set the thresholds where ``model.calibration`` is ``images``.
        group_by: Regular expression that finds in an image's name, with the folders inside ``nominal``, what images of
            one thing have in common: its first group, or the whole match. Calibration by ``leave_one_out`` leaves such
            a group out as a whole, since near-copies that stay make thresholds too low. None: no groups, or the column
            ``group`` of the manifest.
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
        calibration: str | None = None,
        group_by: str | None = None,
        test_share: float = 0.2,
        split_seed: int = 0,
        category: str = "images",
        **loading: Any,
    ) -> None:
        check_arguments(FolderDataModule.__init__, locals(), "data.")
        super().__init__(**loading)
        named = {"nominal": nominal, "test_nominal": test_nominal, "anomalous": anomalous, "masks": masks}
        named["calibration"] = calibration
        self.folders = {name: Path(folder) for name, folder in named.items() if folder is not None}
        if manifest is not None and self.folders:
            raise UserError(f"data.manifest takes the place of data.{next(iter(self.folders))}; give one of them.")
        if manifest is not None and group_by is not None:
            raise UserError("data.group_by goes with folders; a manifest has the column group.")
        if masks is not None and anomalous is None:
            raise UserError("data.masks needs data.anomalous, the images they belong to.")
        if not 0 <= test_share < 1:
            raise UserError(f"test_share must be in [0, 1), got {test_share}.")
        try:
            self.group_by = None if group_by is None else re.compile(group_by)
        except re.error as error:
            raise UserError(f"data.group_by {group_by!r} is no regular expression: {error}.") from error
        self.manifest = None if manifest is None else Path(manifest)
        self.predict = None if predict is None else Path(predict)
        self._calibration: list[Record] = []
        self.test_share, self.split_seed, self.category = test_share, split_seed, category

    def load_records(self) -> tuple[list[Record], list[Record]]:
        """List the images in the order of their names, or of the CSV file."""
        if self.manifest is not None:
            return self._read_manifest(self.manifest)
        if not self.folders:
            if self.predict is not None:
                return [], []
            raise UserError(
                "no images are named: set data.nominal (a folder of nominal images) or data.manifest (a CSV file), or, "
                "to predict, data.predict."
            )
        listed = {
            name: list_images(folder, f"set data.{name} to a folder of images", recursive=True)
            for name, folder in self.folders.items()
        }
        for name in listed.keys() & {"nominal", "test_nominal", "calibration"}:
            _refuse_others(name, self.folders[name], listed[name])
            listed[name] = _once(self.folders[name], listed[name])
        train = self._grouped("nominal", listed.get("nominal", []))  # a test needs none
        self._calibration = self._grouped("calibration", listed.get("calibration", []))
        if "test_nominal" in listed:
            test = [Record(path, 0, NOMINAL, self.category) for path in listed["test_nominal"]]
        else:
            train, test = self._split(train)
        if "anomalous" in listed:
            images, root = listed["anomalous"], self.folders["anomalous"]
            _refuse_nominal(root, images)
            masks = {}
            if "masks" in listed:
                remedy = "add it, or use data.manifest, where an image may go without"
                masks = pair_masks(images, root, listed["masks"], self.folders["masks"], remedy)
            for path in images:
                inside = path.relative_to(root).parts
                defect = inside[0] if len(inside) > 1 else "anomalous"
                test.append(Record(path, 1, defect, self.category, masks.get(path)))
        apart = "nominal, test, calibration and anomalous images must lie apart"
        _refuse_twice([*train, *test, *self._calibration], apart)
        return train, test

    def describe(self) -> str:
        """One line; where there is no test image, with the option that would hold some out."""
        told = super().describe()
        return told if self.records[1] else f"{told} (data.test_share {self.test_share:g})"

    def load_calibration_records(self) -> list[Record]:
        """Images of the folder ``calibration``, or of this ``split`` of the CSV file."""
        _ = self.listed  # which finds them, to see that all images lie apart
        return self._calibration

    def _grouped(self, folder: str, paths: Sequence[Path]) -> list[Record]:
        """Nominal records of images in one of the folders, with their groups."""
        records = [Record(path, 0, NOMINAL, self.category) for path in paths]
        if self.group_by is None:
            return records
        names = [path.relative_to(self.folders[folder]).as_posix() for path in paths]
        found = [self.group_by.search(name) for name in names]
        if None in found:
            raise UserError(
                f"data.group_by {self.group_by.pattern!r} finds nothing in {shown(names[found.index(None)])}; give a "
                "regular expression that finds the group in every name."
            )
        return [
            replace(r, group=next(iter(m.groups()), None) or m[0]) for r, m in zip(records, found, strict=True) if m
        ]

    def load_predict_records(self) -> list[Record] | None:
        """Images to predict; whether they are anomalous is not known."""
        if self.predict is None:
            return None
        paths = [self.predict]
        if is_folder(self.predict):
            paths = list_images(self.predict, "look at data.predict", recursive=True)
        elif not self.predict.exists():
            raise UserError(f"{self.predict}: no such file or folder; set data.predict to the images to score.")
        return [Record(path, -1, "unknown", self.category) for path in paths]

    def _split(self, nominal: Sequence[Record]) -> tuple[list[Record], list[Record]]:
        number = round(self.test_share * len(nominal))
        tested = set(np.random.default_rng(self.split_seed).permutation(len(nominal))[:number].tolist())
        train = [record for i, record in enumerate(nominal) if i not in tested]
        return train, [record for i, record in enumerate(nominal) if i in tested]

    def _read_manifest(self, path: Path) -> tuple[list[Record], list[Record]]:
        try:
            check_file(path)
            text = path.read_text(encoding="utf-8-sig")
        except UserError as error:
            raise UserError(f"data.manifest: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: is not UTF-8 text ({error}); give data.manifest a CSV file in UTF-8.") from error
        if "\0" in text:
            raise UserError(f"{path}: holds null characters; give data.manifest a CSV file in UTF-8.")
        first = text.partition("\n")[0]
        delimiter = ";" if first.count(";") > first.count(",") else ","
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        names = rows.fieldnames or []
        strange = [f"has a column {name!r}" for name in names if name not in _COLUMNS]
        if strange or not {"path", "label"} <= set(names):
            what = (strange or ["lacks the columns path and label"])[0]
            raise UserError(f"{path}: {what}; its first line must name columns of {', '.join(_COLUMNS)}.")
        parts: dict[str, list[Record]] = {"train": [], "test": [], "calibration": [], "": []}
        try:
            for row in rows:
                record, split = self._read_line(row, path.parent, f"{path}, line {rows.line_num}")
                parts[split].append(record)
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.line_num}: is no CSV ({error}); look for a quote too many.") from error
        train, test = self._split(parts[""])
        train, test, self._calibration = parts["train"] + train, parts["test"] + test, parts["calibration"]
        _refuse_twice([*train, *test, *self._calibration], f"list it once in {path}")
        return train, test

    def _read_line(self, row: dict[str, Any], folder: Path, where: str) -> tuple[Record, str]:
        if None in row or None in row.values():
            raise UserError(f"{where}: has more or fewer fields than the first line.")
        row = dict.fromkeys(_COLUMNS, "") | {name: value.strip() for name, value in row.items()}
        if row["label"] not in _LABELS:
            raise UserError(f"{where}: label must be nominal or anomalous, got {row['label']!r}.")
        label = _LABELS[row["label"]]
        split = row["split"] or ("" if label == 0 else "test")
        if split not in ("", "train", "test", "calibration"):
            raise UserError(f"{where}: split must be train, test or calibration, got {split!r}.")
        if label == 1 and split in ("train", "calibration"):
            raise UserError(f"{where}: an anomalous image cannot train or calibrate; set its split to test.")
        if not row["path"]:
            raise UserError(f"{where}: names no path.")
        if label == 0 and row["mask"]:
            raise UserError(f"{where}: a nominal image has no mask; leave it empty.")
        mask = folder / row["mask"] if row["mask"] else None
        defect = (row["defect"] or "anomalous") if label else NOMINAL
        category, group = row["category"] or self.category, row["group"]
        return Record(folder / row["path"], label, defect, category, mask, group=group), split


def _refuse_twice(records: Sequence[Record], remedy: str) -> None:
    """Refuse an image that is listed twice, under whatever path."""
    first: dict[object, Path] = {}
    for record in records:
        if (other := first.setdefault(_file(record.path), record.path)) is not record.path:
            also = "" if other == record.path else f", also as {shown(other)}"
            raise UserError(f"{shown(record.path)}: is named twice{also}; {remedy}.")


def _file(path: Path) -> object:
    """What is the same for all links to a file, soft and hard; the path where there is none."""
    try:
        found = path.stat()
    except OSError:
        return path
    return found.st_dev, found.st_ino


def _once(folder: Path, images: Sequence[Path]) -> list[Path]:
    """Leave out links to files that the same folder lists already, lest one trains and the other tests."""
    files = {_file(path): path for path in reversed(images)}
    if len(files) < len(images):
        log.info("%s: %d links to images listed already are passed over.", folder, len(images) - len(files))
    return sorted(files.values())


def _refuse_others(name: str, folder: Path, images: Sequence[Path]) -> None:
    """Refuse a folder of nominal images that also holds others, by the names of folders inside, or masks."""
    folders = {path: {part.lower() for part in path.relative_to(folder).parts[:-1]} for path in images}
    masks = [path for path in images if path.stem.lower().endswith("_mask")]
    known = any(parts & _OF_NOMINAL for parts in folders.values())  # one of them says which are nominal
    strange = _OF_OTHERS | _OF_MASKS
    others = [path for path, parts in folders.items() if parts & strange or (known and not parts & _OF_NOMINAL)]
    if not masks and not others:
        return
    found = f"{len(masks or others)} of its {len(images)} images are {'masks' if masks else 'no nominal ones'} by name"
    message = (
        f"{folder}: {found}, such as {(masks or others)[0]}; set data.{name} to the folder of nominal images alone, or "
        "use MVTecDataModule for a category that holds train, test and ground_truth."
    )
    if masks or known:
        raise UserError(message)
    log.warning(message)


def _refuse_nominal(folder: Path, images: Sequence[Path]) -> None:
    """Refuse folders inside the anomalous ones that hold nominal images, or masks."""
    for path in images:
        if strange := [p for p in path.relative_to(folder).parts[:-1] if p.lower() in _OF_NOMINAL | _OF_MASKS]:
            raise UserError(
                f"{folder}: holds a folder {strange[0]}, whose images would count as anomalous; give data.anomalous a "
                "folder without it, or use MVTecDataModule for a category that holds train, test and ground_truth."
            )
