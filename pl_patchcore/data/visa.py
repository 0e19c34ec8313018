"""VisA (Zou et al. 2022): the list of a split -> records.

Layout, as distributed: ``<category>/Data/Images/{Normal,Anomaly}/*.JPG``, ``<category>/Data/Masks/Anomaly/*.png`` and
``split_csv/{1cls,2cls_highshot,2cls_fewshot}.csv`` with the columns ``object``, ``split``, ``label``, ``image`` and
``mask``. The levels of the masks are class numbers: each above 0 is a defect. The split ``1cls`` is the one of
published figures: 90 % of the nominal images train. In the two-class splits some anomalous images are of the training
part; PatchCore has no use for them and leaves them out. Numbers of images: counted in ``1cls.csv``. Next: `base.py`.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, ClassVar, Literal

from pl_patchcore.data.base import NOMINAL, AnomalyDataModule, Record, tell_counts
from pl_patchcore.data.download import fetch_archive
from pl_patchcore.data.files import AGAIN, inside, nominal_only, read_text, require_files
from pl_patchcore.errors import UserError
from pl_patchcore.options import check_arguments

Split = Literal["1cls", "2cls_highshot", "2cls_fewshot"]
COUNTS = {  # of 1cls: training, nominal test, anomalous test images
    "candle": (900, 100, 100), "capsules": (542, 60, 100), "cashew": (450, 50, 100), "chewinggum": (453, 50, 100),
    "fryum": (450, 50, 100), "macaroni1": (900, 100, 100), "macaroni2": (900, 100, 100), "pcb1": (904, 100, 100),
    "pcb2": (901, 100, 100), "pcb3": (905, 101, 100), "pcb4": (904, 101, 100), "pipe_fryum": (450, 50, 100),
}  # fmt: skip
URL = "https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar"
SHA256 = "2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362"  # as anomalib has it
_COLUMNS = ["object", "split", "label", "image", "mask"]
_BY_HAND = f"fetch {URL}"
_HELP = f"set data.download, or {_BY_HAND}, unpack it, and give its folder as data.root"


class VisADataModule(AnomalyDataModule):
    """One category of VisA.

    Args:
        root: Folder that holds the categories (``candle``, ``capsules``, ...) and ``split_csv``.
        category: The category; ``pl-patchcore benchmark`` goes through all.
        split: The list in ``split_csv`` that says which images train.
        download: Fetch the data set (2 GB; CC BY 4.0) if ``root`` does not exist.
        url: Address it is fetched from; another than the default is not compared with the known checksum.
        **loading: Arguments of `AnomalyDataModule`.

    Raises:
        UserError: On use, if a list or a file that it names is missing, or a line of it makes no sense.
    """

    category_argument: ClassVar[str | None] = "category"

    def __init__(
        self,
        root: str = "data/visa",
        category: str | None = None,
        split: Split = "1cls",
        download: bool = False,
        url: str = URL,
        **loading: Any,
    ) -> None:
        check_arguments(VisADataModule.__init__, locals(), "data.")
        super().__init__(**loading)
        self.root, self.category, self.split = Path(root), category, split
        self.download, self.url = download, url

    def download_data(self) -> None:
        """Fetch all categories where that was asked for and ``root`` does not exist."""
        if self.download and not self.root.exists():
            fetch_archive(self.url, self.root, sha256=SHA256 if self.url == URL else None, by_hand=_BY_HAND)

    def categories(self) -> list[str]:
        """The categories that the list names, in alphabetical order."""
        return sorted({row["object"] for _, row in self._rows()})

    def load_records(self) -> tuple[list[Record], list[Record]]:
        """List the images of the category in the order of the list."""
        parts: dict[str, list[Record]] = {"train": [], "test": []}
        for where, row in self._rows():
            if row["object"] == self.category:
                parts[row["split"]].append(self._record(row, where))
        if not parts["train"] and not parts["test"]:
            chosen = "is not set" if self.category is None else f"is {self.category!r}, which is none of the data set"
            raise UserError(f"data.category {chosen}; choose one of {', '.join(self.categories())}.")
        require_files([*parts["train"], *parts["test"]], self._list())
        train = nominal_only(parts["train"], self._list())
        nominal = sum(record.label == 0 for record in parts["test"])
        published = COUNTS.get(str(self.category)) if self.split == "1cls" else None
        tell_counts(self._list(), (len(train), nominal, len(parts["test"]) - nominal), published)
        return train, parts["test"]

    def _list(self) -> Path:
        return self.root / "split_csv" / f"{self.split}.csv"

    def _rows(self) -> list[tuple[str, dict[str, str]]]:
        """Lines of the list, each with its place in words."""
        path = self._list()
        reader = csv.DictReader(io.StringIO(read_text(path, _HELP), newline=""))
        rows = []
        try:
            if reader.fieldnames != _COLUMNS:
                raise UserError(f"{path}: its first line must be {','.join(_COLUMNS)}; {AGAIN}.")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{where}: has not {len(_COLUMNS)} fields; {AGAIN}.")
                for name, known in (("split", ("train", "test")), ("label", ("normal", "anomaly"))):
                    if row[name] not in known:
                        raise UserError(f"{where}: {name} must be {' or '.join(known)}, got {row[name]!r}; {AGAIN}.")
                if bool(row["mask"]) != (row["label"] == "anomaly"):
                    raise UserError(f"{where}: an anomalous image has a mask, and a nominal one has none; {AGAIN}.")
                rows.append((where, row))
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: is no CSV ({error}); {AGAIN}.") from error
        return rows

    def _record(self, row: dict[str, str], where: str) -> Record:
        image, anomalous = inside(self.root, row["image"], where), row["label"] == "anomaly"
        mask = inside(self.root, row["mask"], where) if anomalous else None
        return Record(image, int(anomalous), "anomaly" if anomalous else NOMINAL, row["object"], mask, (0, 0))
