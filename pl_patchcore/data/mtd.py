"""Magnetic Tile Defects (Huang et al. 2018): folders -> records.

Layout, as its authors publish it: ``MT_Free/Imgs/*.jpg`` (nominal) and ``MT_Blowhole``, ``MT_Break``, ``MT_Crack``,
``MT_Fray``, ``MT_Uneven`` (anomalous), a mask ``.png`` of the same stem beside each image. Protocol of the PatchCore
paper: 20 % of the nominal tiles and all anomalous ones are the test set, the other nominal tiles train. (The paper
counts 925 nominal tiles; the published set holds 952.)
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pl_patchcore.data.base import NOMINAL, AnomalyDataModule, Record
from pl_patchcore.data.download import fetch_archive
from pl_patchcore.data.files import list_images, read_text
from pl_patchcore.errors import UserError
from pl_patchcore.options import check_arguments

log = logging.getLogger(__name__)

COMMIT = "cc4eb530b57b9cb7225bf76023873043ffd50655"
URL = f"https://github.com/abin24/Magnetic-tile-defect-datasets./archive/{COMMIT}.zip"
COUNTS = {"Free": 952, "Blowhole": 115, "Break": 85, "Crack": 57, "Fray": 32, "Uneven": 103}  # as published
_BY_HAND = f"fetch {URL}"
_HELP = f"set data.download, or {_BY_HAND}, unpack it, and give its folder as data.root"


class MTDDataModule(AnomalyDataModule):
    """Magnetic Tile Defects.

    Args:
        root: Folder that holds ``MT_Free``, ``MT_Blowhole``, ...
        train_files: Text file with the names of the nominal training tiles, one a line (published results use
            one such list); None draws 80 % of them.
        split_seed: Seed of that draw.
        download: Fetch the data set (its authors' repository at a fixed commit) if ``root`` does not exist. Such
            archives have no lasting checksum; the published numbers of images are the check.
        url: Address it is fetched from.
        **loading: Arguments of `AnomalyDataModule`.

    Raises:
        UserError: On use, if a folder is missing or empty, an image has no mask, or a listed name is not there.
    """

    def __init__(
        self,
        root: str = "data/mtd",
        train_files: str | None = None,
        split_seed: int = 0,
        download: bool = False,
        url: str = URL,
        **loading: Any,
    ) -> None:
        check_arguments(MTDDataModule.__init__, locals(), "data.")
        super().__init__(**loading)
        self.root, self.download, self.url = Path(root), download, url
        self.train_files, self.split_seed = train_files, split_seed

    def download_data(self) -> None:
        """Fetch the data set where that was asked for and ``root`` does not exist."""
        if self.download and not self.root.exists():
            fetch_archive(self.url, self.root, name="magnetic_tile_defects.zip", strip=True, by_hand=_BY_HAND)

    def load_records(self) -> tuple[list[Record], list[Record]]:
        """List the tiles: nominal ones by name, then defects in alphabetical order."""
        nominal = self._images("Free")
        if self.train_files is None:
            order = np.random.default_rng(self.split_seed).permutation(len(nominal))
            training = {nominal[i].name for i in order[: int(0.8 * len(nominal))]}
        else:
            training = self._read_names(Path(self.train_files), nominal)
        records = [Record(path, 0, NOMINAL, "magnetic_tile") for path in nominal]
        train = [record for record in records if record.path.name in training]
        test = [record for record in records if record.path.name not in training]
        for defect in list(COUNTS)[1:]:
            for path in self._images(defect):
                mask = path.with_suffix(".png")
                if not mask.is_file():
                    raise UserError(f"{path}: has no mask {mask.name} beside it; {_HELP}.")
                test.append(Record(path, 1, defect.lower(), "magnetic_tile", mask))
        found = Counter(record.path.parts[-3].removeprefix("MT_") for record in (*train, *test))
        if other := [f"{found[kind]} of {count} MT_{kind}" for kind, count in COUNTS.items() if found[kind] != count]:
            log.warning("%s: not the published numbers of images: %s.", self.root, ", ".join(other))
        return train, test

    def _images(self, kind: str) -> list[Path]:
        folder = self.root / f"MT_{kind}" / "Imgs"
        images = [path for path in list_images(folder, _HELP) if path.suffix == ".jpg"]
        if not images:
            raise UserError(f"{folder}: holds no .jpg image; {_HELP}.")
        return images

    def _read_names(self, path: Path, nominal: list[Path]) -> set[str]:
        if not path.is_file():
            raise UserError(f"{path}: no such list of training tiles; leave train_files out to draw them.")
        listed = set(read_text(path, "give a list of file names, one a line").split())
        if strange := sorted(listed - {tile.name for tile in nominal}):
            raise UserError(
                f"{path}: {len(strange)} names are not in {nominal[0].parent}, such as {strange[0]}; "
                "give the list that belongs to this data set."
            )
        return listed
