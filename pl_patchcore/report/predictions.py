"""After a prediction: ``predictions.csv``, ``defects.json``, pictures, ``report.html``, anomaly maps on request."""

from __future__ import annotations

import csv
from contextlib import ExitStack
from functools import cache
from functools import partial as bound
from pathlib import Path
from typing import IO, Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image

from pl_patchcore.anomaly_map import to_original
from pl_patchcore.data.base import ImageDataset
from pl_patchcore.data.batch import as_batch
from pl_patchcore.files import hold, output_folder, plain_console, spreadsheet_cell, whole_file
from pl_patchcore.inspection import GREY, Inspection, Settings, geometry, with_strip
from pl_patchcore.preprocessing import Preprocessing
from pl_patchcore.report.coco import DIGITS, coco_image, write_coco
from pl_patchcore.report.html import LARGE, Page, PageImage
from pl_patchcore.report.pictures import LONGEST_SIDE, colour_scale, file_name, overlay, remove_earlier, side_by_side

VERDICT = ("verdict", "anomalous", "threshold", "normalized", "p_value")  # columns of a model with a threshold
REGIONS = ("regions", "left", "top", "right", "bottom", "area")  # and of one with a threshold of pixels
GAP = 8  # pixels between an image and its map


class _Row(NamedTuple):
    """What is written of an image."""

    cells: list[Any]
    image: dict[str, Any]  # as `annotations`, of `coco_image`; its id is the number in the data set
    annotations: list[dict[str, Any]]


class PredictionWriter(Callback):
    """Writes verdict, score and regions of every image as it comes.

    ``predictions.csv`` has the columns ``path``, ``score`` (numbers of 6 significant digits); of a model with
    thresholds ``verdict`` (``ok`` or ``defect``), ``anomalous`` (1 where the score is above the threshold, else 0),
    ``threshold``, ``normalized`` (the score in units of the threshold), ``p_value`` (share of nominal images that score
    so high), ``regions`` (their number) and of the largest one ``left``, ``top``, ``right``, ``bottom`` and ``area``,
    pixels of the original image; then ``picture`` and ``map``, where they are written. It gets its name when it is
    whole. Of several processes the first one writes it, in the order of the data set. Of a model with thresholds
    ``defects.json`` has all regions in COCO's format. ``report.html`` shows all images, their scores and the threshold
    in a browser.

    Args:
        maps: Also write each anomaly map, on the original image's pixels (NaN where these do not count), as
            float32 ``maps/<number>-<name>.npy``.
        pictures: Write ``pictures/<number>-<name>.jpg`` of each image: with outlines and verdict, and, of a model with
            thresholds, beside it with the map in colours; the middle colour is the threshold's.
        least_area: Pixels of the original image below which a region is left out.
        page: Whether to write ``report.html``.
    """

    def __init__(self, maps: bool = False, pictures: bool = True, least_area: int = 1, page: bool = True) -> None:
        Settings(least_area=least_area)  # refuses what is none
        self.maps, self.pictures, self.least_area, self.page = maps, pictures, least_area, page
        self.settings = Settings()  # of the model under way
        self.file: IO[str] | None = None  # open while images are scored
        self.held = ExitStack()  # closes the file, and of the first process releases the folder

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Open the file under a temporary name."""
        folder = output_folder(trainer)
        if trainer.is_global_zero:
            self.held.callback(hold(folder).release)
        self.settings = Settings(pl_module.image_threshold, pl_module.pixel_threshold, self.least_area)
        if trainer.local_rank == 0:  # machines may share the folder
            self._remove_old(folder)
        trainer.strategy.barrier()  # nobody writes a map before the old ones are gone
        rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        partial = folder / f"predictions{rank}.csv.partial"
        self.file = self.held.enter_context(partial.open("w", newline="", encoding="utf-8"))
        csv.writer(self.file).writerow(self._header())
        self.rows, self.shown = list[_Row](), Page()

    def _remove_old(self, folder: Path) -> None:
        """Remove what an earlier run wrote of each image, and before it the files that name these."""
        (folder / "defects.json").unlink(missing_ok=True)
        if self.maps or self.pictures:
            (folder / "predictions.csv").unlink(missing_ok=True)
        if self.maps:
            remove_earlier(folder / "maps", r"[0-9]{6}-.*\.npy")
        if self.pictures:
            remove_earlier(folder / "pictures", r"[0-9]{6}-.*\.jpg")

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0
    ) -> None:
        """Write a batch."""
        if self.file is None:
            return
        loaders: Any = trainer.predict_dataloaders
        loader = loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders
        dataset = getattr(loader, "dataset", None)
        for i in range(len(outputs["score"])):
            number = int(outputs["index"][i]) if trainer.world_size > 1 else len(self.rows)
            if isinstance(dataset, ImageDataset):
                original = bound(_read, dataset, int(outputs["index"][i]))
            else:
                original = bound(_input, pl_module.transform, batch, outputs, i)
            place, region = _geometry(outputs, i), outputs["region"][i] if "region" in outputs else None
            found = Inspection.of(outputs, i, place, cache(original), self.settings, region)  # a file is read once
            row = self._row(found, outputs, i, number)
            csv.writer(self.file).writerow(row.cells)
            self.rows.append(row)
            if self.page:
                self.shown.add(_for_page(found, row))

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Give the file its name; of several processes, put all rows into the first one's."""
        if self.file is None:
            return
        self.file.close()
        partial, rows, self.file, self.rows = Path(self.file.name), self.rows, None, []
        folder, threshold, pixel_threshold = partial.parent, self.settings.threshold, self.settings.pixel_threshold
        if trainer.world_size > 1:
            shares = pl_module.processes().objects((rows, self.shown))
            if not trainer.is_global_zero:
                partial.unlink()
                return
            for _, page in shares[1:]:
                self.shown.merge(page)
            rows = sorted((row for share, _ in shares for row in share), key=lambda row: row.image["id"])
            with partial.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([self._header(), *(row.cells for row in rows)])
        if pixel_threshold is not None:
            annotations = [annotation for row in rows for annotation in row.annotations]
            write_coco(folder / "defects.json", [row.image for row in rows], annotations)
        if self.page:
            self.shown.write(folder, f"Predictions: {folder}", {}, threshold, pixel_threshold)
        target, console = partial.replace(folder / "predictions.csv"), plain_console()
        self.held.close()
        console.print(f"{len(rows)} anomaly scores written to {target}")
        if self.page:
            console.print(f"To look at in a browser: {folder / 'report.html'}")
        if threshold is not None:
            defects = sum(row.image["anomalous"] is True for row in rows)
            console.print(f"{defects} of {len(rows)} defect (threshold {threshold:.4g})", highlight=False)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave an unfinished file under its temporary name."""
        self.held.close()
        self.file = None

    def _header(self) -> list[str]:
        verdict = VERDICT if self.settings.threshold is not None else ()
        regions = REGIONS if self.settings.pixel_threshold is not None else ()
        return ["path", "score", *verdict, *regions, *["picture"] * self.pictures, *["map"] * self.maps]

    def _row(self, found: Inspection, outputs: dict[str, Any], i: int, number: int) -> _Row:
        """Write picture and map of an image; return the rest."""
        assert self.file is not None  # since on_predict_start
        folder, path = Path(self.file.name).parent, outputs["path"][i] if "path" in outputs else str(number)
        values: dict[str, Any] = {
            "path": spreadsheet_cell(path),
            "score": found.score,
            "verdict": found.verdict,
            "anomalous": None if found.anomalous is None else int(found.anomalous),
            "threshold": found.threshold,
            "normalized": float(outputs["normalized"][i]) if "normalized" in outputs else None,
            "p_value": found.p_value,
            "regions": len(found.regions),
        }
        if found.regions:
            largest = found.regions[0]
            values |= dict(zip(REGIONS[1:], (*largest.box, largest.area), strict=True))
        name = file_name(f"{number:06d}", path)
        if self.pictures:
            values["picture"] = f"pictures/{name}.jpg"
            with whole_file(folder / values["picture"]) as partial:
                _picture(found).save(partial, quality=90, subsampling=0)
        if self.maps:
            values["map"] = f"maps/{name}.npy"
            with whole_file(folder / values["map"]) as partial:
                np.save(partial, found.anomaly_map)
        cells = [f"{cell:.{DIGITS}g}" if isinstance(cell, float) else cell for cell in map(values.get, self._header())]
        return _Row(cells, *coco_image(found, number, path))


def _for_page(found: Inspection, row: _Row) -> PageImage:
    picture = found.picture(LARGE)
    scale = picture.width / found.size[1]
    lines = [np.array(polygon) * scale for region in found.regions for polygon in region.polygons]
    heat, image = found.map_of_size(picture.height, picture.width), row.image
    return PageImage(image["file_name"], found.score, np.asarray(picture), heat, lines, order=image["id"])


def _geometry(outputs: dict[str, Any], i: int) -> tuple[tuple[int, int], tuple[float, ...]]:
    """Size of the original image and the part that the input covers; what says nothing of it is the original."""
    height, width = outputs["anomaly_map"][i].shape
    if "crop_box" not in outputs:
        return (height, width), (0.0, 0.0, float(height), float(width))
    return geometry({name: outputs[name][i] for name in ("original_size", "crop_box")})


def _read(dataset: ImageDataset, index: int) -> Image.Image:
    """An image of one of our data sets."""
    return dataset.records[index].read(dataset.transform)[0]


def _input(transform: Preprocessing, batch: Any, outputs: dict[str, Any], i: int) -> Image.Image:
    """What the model's input shows of an image of any loader; grey where the crop has left the original out."""
    image, (size, box) = as_batch(batch)["image"][i], _geometry(outputs, i)
    levels = image if image.dtype == torch.uint8 else transform.denormalise(image) * 255  # (3, H, W)
    full = np.empty((*size, 3), np.uint8)
    for number, channel in enumerate(levels.cpu()):  # one at a time, as an image may be large
        full[..., number] = to_original(channel, size, box).nan_to_num_(GREY[number]).round_().byte().numpy()
    return Image.fromarray(full)


def _picture(found: Inspection) -> Image.Image:
    """The image with outlines; of a model with thresholds beside it with the map in colours."""
    drawn = found.draw(LONGEST_SIDE)
    if found.pixel_threshold is None:
        return drawn
    image = found.picture(LONGEST_SIDE)
    low, high = colour_scale(found.pixel_threshold)
    coloured = overlay(image, found.map_of_size(image.height, image.width), low, high)
    return side_by_side(drawn, with_strip(coloured, f"map: {low:g} to {high:.4g}"), GAP)
