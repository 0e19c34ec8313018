"""Real-IAD (Wang et al. 2024): the JSON list of a category -> records.

Layout, as distributed: images and masks below ``realiad_1024`` (or another resolution) ``/<category>``, and lists
``realiad_jsons/<category>.json`` (all five views), ``realiad_jsons_sv`` (one view) and others. A list holds ``meta``
(``prefix``: the folder of its paths; ``normal_class``), ``train`` and ``test``, of which each entry has ``category``,
``anomaly_class``, ``image_path`` and ``mask_path`` (null for nominal images). Labels are those of the list: images in a
folder ``NG`` may be nominal in their view. Lists of noisy training sets (``realiad_jsons_fuiad_0.1``) put anomalous
images among the nominal ones; these train, too. Next: `base.py`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

from pl_patchcore.data.base import NOMINAL, AnomalyDataModule, Record
from pl_patchcore.data.files import AGAIN, inside, read_json, require_files
from pl_patchcore.errors import UserError
from pl_patchcore.options import check_arguments

log = logging.getLogger(__name__)

CATEGORIES = (
    "audiojack", "bottle_cap", "button_battery", "end_cap", "eraser", "fire_hood", "mint", "mounts", "pcb",
    "phone_battery", "plastic_nut", "plastic_plug", "porcelain_doll", "regulator", "rolled_strip_base", "sim_card_set",
    "switch", "tape", "terminalblock", "toothbrush", "toy", "toy_brick", "transistor1", "u_block", "usb",
    "usb_adaptor", "vcpill", "wooden_beads", "woodstick", "zipper",
)  # fmt: skip
_KEYS = {"category", "anomaly_class", "image_path", "mask_path"}
_HELP = (
    "ask for Real-IAD at https://realiad4ad.github.io/Real-IAD, unpack its lists (realiad_jsons) and images "
    "(realiad_1024), and give the folder that holds them as data.root"
)


class RealIADDataModule(AnomalyDataModule):
    """One category of Real-IAD.

    Args:
        root: Folder that holds the images and the lists.
        category: The category; ``pl-patchcore benchmark`` goes through all.
        images: Folder of the images inside ``root``.
        lists: Folder of the lists inside ``root``; ``realiad_jsons_sv`` for one view.
        **loading: Arguments of `AnomalyDataModule`.

    Raises:
        UserError: On use, if a list or a file that it names is missing, or an entry of it makes no sense.
    """

    category_argument: ClassVar[str | None] = "category"
    headline: ClassVar[tuple[str, ...]] = ("image_auroc", "pro")

    def __init__(
        self,
        root: str = "data/real_iad",
        category: str | None = None,
        images: str = "realiad_1024",
        lists: str = "realiad_jsons",
        **loading: Any,
    ) -> None:
        check_arguments(RealIADDataModule.__init__, locals(), "data.")
        super().__init__(**loading)
        self.root, self.category, self.images, self.lists = Path(root), category, Path(images), Path(lists)

    def categories(self) -> list[str]:
        """The categories that have a list, in alphabetical order."""
        found = sorted(path.stem for path in (self.root / self.lists).glob("*.json"))
        if not found:
            raise UserError(f"{self.root / self.lists}: no such folder, or no list <category>.json in it; {_HELP}.")
        missing = sorted(set(CATEGORIES) - set(found))
        if missing:
            message = "%s: %d of Real-IAD's %d categories; missing: %s."
            log.warning(message, self.root / self.lists, len(found), len(CATEGORIES), ", ".join(missing))
        return found

    def load_records(self) -> tuple[list[Record], list[Record]]:
        """List the images of the category in the order of its list."""
        if self.category is None:
            raise UserError(f"data.category is not set; choose one of {', '.join(self.categories())}.")
        path = self.root / self.lists / f"{self.category}.json"
        content = read_json(path, f"choose another data.category, or {_HELP}")
        meta = content.get("meta") if isinstance(content, dict) else None
        if not isinstance(meta, dict) or not all(isinstance(meta.get(key), str) for key in ("prefix", "normal_class")):
            raise UserError(f"{path}: must hold meta with prefix and normal_class, train and test; {AGAIN}.")
        folder = inside(self.root / self.images, meta["prefix"], str(path))
        train = _records(content.get("train"), f"{path}, train", folder, None)  # all that trains is taken as nominal
        test = _records(content.get("test"), f"{path}, test", folder, meta["normal_class"])
        require_files([*train, *test], path)
        return train, test


def _records(entries: Any, where: str, folder: Path, normal_class: str | None) -> list[Record]:
    """Records of ``train`` or ``test``, all of them nominal if ``normal_class`` is None."""
    if not isinstance(entries, list):
        raise UserError(f"{where}: must be a list; {AGAIN}.")
    records = []
    for number, entry in enumerate(entries):
        place = f"{where}, entry {number}"
        if not isinstance(entry, dict) or set(entry) != _KEYS:
            raise UserError(f"{place}: must hold exactly {', '.join(sorted(_KEYS))}; {AGAIN}.")
        mask = entry["mask_path"]
        if not all(isinstance(entry[key], str) for key in _KEYS - {"mask_path"}) or not isinstance(mask, str | None):
            raise UserError(f"{place}: must hold names, and a name or null as mask_path; {AGAIN}.")
        image, category = inside(folder, entry["image_path"], place), entry["category"]
        if normal_class is None or mask is None or entry["anomaly_class"] == normal_class:
            records.append(Record(image, 0, NOMINAL, category))
        else:
            mask_path = inside(folder, mask, place)
            records.append(Record(image, 1, entry["anomaly_class"], category, mask_path, (0, 0)))
    return records
