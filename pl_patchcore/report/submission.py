"""What the evaluation server of MVTec AD 2 takes: anomaly maps of its private images -> a folder, checked and packed.

The folder holds ``anomaly_images/<category>/{test_private,test_private_mixed}/<image>.tiff`` (maps of the image's size,
float16, one channel, not compressed) and ``anomaly_images_thresholded/...png`` (255 where a map is above the threshold
of pixels, else 0), of all eight categories and nothing else. Rules: those of the data set's own ``check_and_prepare_
data_for_upload.py``. One category is predicted at a time; when the last one is there the folder is checked and packed.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pl_patchcore.anomaly_map import to_original
from pl_patchcore.data import mvtec_ad_2
from pl_patchcore.errors import UserError
from pl_patchcore.files import plain_console, whole_file
from pl_patchcore.inspection import geometry

KINDS = {"anomaly_images": ".tiff", "anomaly_images_thresholded": ".png"}  # folder: suffix of its files
HIGHEST = float(np.finfo(np.float16).max)  # of a map
_THREADS = 8  # that check files


class SubmissionWriter(Callback):
    """Writes a submission for the evaluation server of MVTec AD 2 while ``predict`` scores a category of it.

    Call ``predict`` for each category, each with the model of that category and the same folder. At the end of each
    its files are checked; when all eight are there, the whole folder is checked, and packed as ``<folder>.tar.gz``,
    ready to be uploaded. The folder takes 40 GB.

    Args:
        folder: Folder of the submission, of all categories.

    Raises:
        UserError: Before images are scored, if the data set is another one, the model has no threshold of pixels, or
            its crop leaves out a part of the images; at the end, if a file is missing or is not as it should be.
    """

    def __init__(self, folder: str = "submission") -> None:
        self.folder = Path(folder)
        self.category = ""  # under way
        self.threshold = 0.0  # of pixels

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse what makes no submission."""
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, mvtec_ad_2.MVTecAD2DataModule):
            raise UserError(f"a submission is of MVTecAD2DataModule, got {type(data).__name__}; leave the writer out.")
        if pl_module.pixel_threshold is None:
            raise UserError(
                "a submission needs a threshold of pixels, and the model has none; fit it with model.calibration "
                "images, those in validation/good, or set model.pixel_threshold."
            )
        if pl_module.transform.crop is not None:
            raise UserError(
                f"a submission needs a score of every pixel, and the model crops images to {pl_module.transform.crop}; "
                "fit it with model.crop null."
            )
        self.category, self.threshold = data.category_folder().name, float(pl_module.pixel_threshold)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the maps of a batch."""
        for i, path in enumerate(outputs["path"]):
            place = geometry({name: outputs[name][i] for name in ("original_size", "crop_box")})
            self._write(Path(path), to_original(outputs["anomaly_map"][i], *place))

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check the category; with the last one check all, and pack them."""
        trainer.strategy.barrier()  # the others have written theirs, too
        if not trainer.is_global_zero:
            return
        check_submission(self.folder, [self.category])
        there = {path.name for path in (self.folder / "anomaly_images").iterdir()}
        if missing := sorted(set(mvtec_ad_2.PRIVATE_COUNTS) - there):
            said = f"Submission {self.folder}: {self.category} is complete; to come: {', '.join(missing)}"
        else:
            check_submission(self.folder)
            said = f"Submission complete, to be uploaded to https://benchmark.mvtec.com: {pack(self.folder)}"
        plain_console().print(said)

    def _write(self, path: Path, heat: Tensor) -> None:
        """Write a map ``(H, W)``; pixels that do not count, NaN, have the lowest score of the image."""
        nothing = heat.isnan()
        heat = torch.where(nothing, heat[~nothing].min(), heat) if nothing.any() and not nothing.all() else heat
        if not heat.abs().max() <= HIGHEST:
            raise UserError(
                f"{path}: its scores are not all numbers up to {HIGHEST:g}, as float16 takes; fit with model.distance "
                "euclidean."
            )
        tiff, png = (self.folder / kind / self.category / path.parent.name for kind in KINDS)
        with whole_file(tiff / f"{path.stem}.tiff") as partial:
            import tifffile  # of no use elsewhere

            tifffile.imwrite(partial, heat.cpu().numpy().astype(np.float16), photometric="minisblack")
        with whole_file(png / f"{path.stem}.png") as partial:
            Image.fromarray((heat > self.threshold).byte().mul(255).cpu().numpy()).save(partial)


def check_submission(folder: str | Path, categories: Iterable[str] | None = None) -> None:
    """See whether the evaluation server of MVTec AD 2 would take a submission.

    Args:
        folder: Folder of the submission.
        categories: Look at these only; None: all eight must be there, and nothing else.

    Raises:
        UserError: Naming the first file or folder that is missing, is too many, or is not as it should be.
    """
    folder, counts = Path(folder), mvtec_ad_2.PRIVATE_COUNTS
    files: list[Path] = []
    if categories is None:
        _compare(folder, KINDS)
    for kind, suffix in KINDS.items():
        if categories is None:
            _compare(folder / kind, counts)
        for category in counts if categories is None else categories:
            place = folder / kind / category
            _compare(place, mvtec_ad_2.PRIVATE)
            for part, ending in mvtec_ad_2.PRIVATE.items():
                names = [f"{number:03d}_{ending}{suffix}" for number in range(counts[category])]
                files += _compare(place / part, names)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = tqdm(pool.map(_wrong, files), "Checking the submission", len(files), delay=2, unit=" files")
        for path, wrong in zip(files, found, strict=True):
            if wrong:
                raise UserError(f"{path}: {wrong}; predict this category again.")


def pack(folder: Path) -> Path:
    """Write a submission as ``<folder>.tar.gz``, with the folder's name at its top; return its path."""
    target = folder.with_name(f"{folder.absolute().name}.tar.gz")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with whole_file(target) as partial, tarfile.open(partial, "w:gz") as packed:
        for path in tqdm(files, "Packing the submission", delay=2, unit=" files"):
            packed.add(path, Path(folder.absolute().name, path.relative_to(folder)))
    return target


def _compare(folder: Path, names: Iterable[str]) -> list[Path]:
    """Refuse a folder that does not hold exactly what is to have these names; return that."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder in the submission; predict what it should hold.")
    there, wanted = set(folder.iterdir()), [folder / name for name in names]
    if missing := sorted({*wanted} - there):
        raise UserError(
            f"{missing[0]}: is missing in the submission, one of {len(missing)}; predict this category again."
        )
    if stray := sorted(there - {*wanted}):
        raise UserError(f"{stray[0]}: belongs to no submission, one of {len(stray)}; remove it.")
    return wanted


def _wrong(path: Path) -> str:
    """What is wrong with a file, empty if nothing is."""
    import tifffile

    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                right = image.mode == "L" and {level for _, level in image.getcolors() or ()} <= {0, 255}
            return "" if right else "must have one channel of 8 bits with the levels 0 and 255"
        with tifffile.TiffFile(path) as file:
            (series,) = file.series
            right = series.dtype == np.float16 and len(series.shape) == 2
            return "" if right else f"must have one channel of float16, has {series.dtype} of shape {series.shape}"
    except Exception as error:  # a damaged file makes the libraries raise nearly anything
        return f"cannot be read ({error})"
