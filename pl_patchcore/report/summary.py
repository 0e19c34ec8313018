"""After a test: a table on the console, ``metrics.json``, pictures, and ``report.html``.

Reads the figures that `patchcore.py` has computed; files go to the run's folder.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from rich.table import Column, Table
from torch import Tensor

from pl_patchcore.counted import middles
from pl_patchcore.data.batch import as_batch
from pl_patchcore.errors import UserError
from pl_patchcore.files import hold, output_folder, plain_console, whole_file
from pl_patchcore.preprocessing import UNKNOWN
from pl_patchcore.regions import find_regions
from pl_patchcore.report.html import Page, PageImage
from pl_patchcore.report.pictures import Gallery, Shown

FIGURES = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pro": "PRO"}
ALARMS = {
    "image_detection_rate": "anomalous images above the threshold, share",
    "image_false_alarm_rate": "nominal images above the threshold, share",
    "pixel_false_alarm_rate": "nominal pixels above the threshold, share",
}


class TestReport(Callback):
    """Report of a test, or of a validation by ``validate``.

    Prints a table (all test images, then each defect type) and a plain line a figure; writes ``metrics.json``,
    ``pictures/`` with the most and least anomalous images and the errors, and ``report.html``, a page to look at all
    images, their scores and the threshold in a browser. With several processes the first one reports of all.

    Args:
        pictures: Images shown per group; 0 for none.
        page: Whether to write ``report.html``.
    """

    __test__ = False  # no test class, whatever its name suggests to pytest

    def __init__(self, pictures: int = 4, page: bool = True) -> None:
        if pictures < 0:
            raise UserError(f"pictures must be 0 or more, got {pictures}.")
        self.pictures, self.page = pictures, page
        self.held = ExitStack()  # of the first process releases the folder

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last test."""
        self.gallery, self.shown = Gallery(self.pictures), Page()
        self.seconds, self.images = 0.0, 0
        folder = output_folder(trainer)
        if trainer.is_global_zero:
            self.held.callback(hold(folder).release)

    def on_test_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = _now()

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Stop the clock; consider the batch's images for pictures and page."""
        self.seconds += _now() - self.started
        scores = outputs["score"].tolist()
        self.images += len(scores)
        if not (self.pictures or self.page):
            return
        batch = as_batch(batch)
        for i, score in enumerate(scores):
            order, label = int(outputs["index"][i]), int(batch["label"][i])
            name = batch["path"][i] if "path" in batch else f"image {order}"
            kind = batch["defect"][i] if "defect" in batch else ("nominal", "anomalous")[label]
            heat, mask = outputs["anomaly_map"][i], batch["mask"][i] if "mask" in batch else None
            if mask is not None and pl_module.metrics_size == "original":
                mask = _at_input(mask, batch["crop_box"][i].tolist(), heat.shape)
            title = f"{Path(name).name} ({kind})"
            item = Shown.of(score, order, title, batch["image"][i], heat, mask, pl_module.transform)
            if self.pictures:
                self.gallery.add(item, label)
            if self.page:
                self.shown.add(_for_page(item, name, label, kind, pl_module.pixel_threshold))

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Print and write."""
        folder = output_folder(trainer)
        others = pl_module.processes().objects((self.gallery, self.shown))[1:]
        if not trainer.is_global_zero:
            return
        for gallery, page in others:
            self.gallery.merge(gallery)
            self.shown.merge(page)
        seconds = self.seconds / max(1, self.images)
        headline = tuple(getattr(getattr(trainer, "datamodule", None), "headline", FIGURES))
        _write_json(folder / "metrics.json", pl_module, seconds, headline)
        written = self.gallery.write(folder / "pictures", pl_module.image_threshold, pl_module.pixel_threshold)
        figures, categories = pl_module.figures, pl_module.figures_by_category
        console = plain_console()
        console.print(_table("defect", figures, seconds))
        if len(categories) > 1:
            console.print(_table("category", {"all": figures["all"], **categories}, seconds))
        for line in (notes := list(_notes(figures["all"]))):
            console.print(line)
        console.print(f"Written to {folder}: metrics.json" + (f" and {written} pictures" if written else ""))
        for name, rate in _known(ALARMS, figures["all"]).items():
            console.print(f"{name} {rate}", highlight=False)
        for key in dict.fromkeys((*FIGURES, *headline)):
            console.print(f"{FIGURES.get(key, key)} {figures['all'].get(key, math.nan):.4f}", highlight=False)
        if self.page:
            values = _known(FIGURES | ALARMS, figures["all"]) | {"seconds per image": f"{seconds:.3g}"}
            thresholds = pl_module.image_threshold, pl_module.pixel_threshold
            page = self.shown.write(folder, f"Test report: {folder}", values, *thresholds, notes)
            console.print(f"To look at in a browser: {page}")
        self.held.close()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As before a test, but within a fit, which scores nothing."""
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)

    on_validation_batch_start = on_test_batch_start

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """As in a test."""
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, *args, **kwargs)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """As after a test."""
        if trainer.state.fn == "validate":
            self.on_test_end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the folder to others."""
        self.held.close()


def _notes(figures: dict[str, Any]) -> Iterator[str]:
    """What a reader of the figures should know: which images are lost, why there are no figures of a kind."""
    if lost := figures["lost"]:
        yield (
            f"{lost} anomalous images have lost their whole defect to the resize, the centre crop or the region, and "
            "count as anomalous all the same; --model.crop null keeps the whole image, a larger --model.resize small "
            "specks."
        )
    for kind in ("nominal", "anomalous"):
        if not figures[kind]:
            yield f"There are no {kind} test images: image AUROC needs both nominal and anomalous ones."
    if figures["anomalous"] and math.isnan(figures["pixel_auroc"]):
        yield "There are no masks with nominal and anomalous pixels: pixel AUROC and PRO need them."


def _now() -> float:
    """Seconds, once the GPU has done its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _write_json(path: Path, pl_module: Any, seconds: float, headline: tuple[str, ...]) -> None:
    def plain(row: dict[str, Any]) -> dict[str, Any]:
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}

    content = {
        **plain(pl_module.figures["all"]),
        "headline": headline,  # names of the figures that the data set is compared by
        "defects": {name: plain(row) for name, row in pl_module.figures.items() if name != "all"},
        "categories": {name: plain(row) for name, row in pl_module.figures_by_category.items()},
        "seconds_per_image": seconds,
        "memory_bank": pl_module.bank_shape,
        "image_threshold": pl_module.image_threshold,
        "pixel_threshold": pl_module.pixel_threshold,
        "metrics_size": pl_module.metrics_size,
        "model": dict(pl_module.hparams),
    }
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _at_input(mask: Tensor, crop_box: Sequence[float], size: Sequence[int]) -> Tensor:
    """Mask ``(H, W)`` of an original at the centres of its input's pixels; unknown beside the original."""
    top, left, bottom, right = crop_box
    (height, width), y, x = mask.shape, middles(size[0], top, bottom), middles(size[1], left, right)
    inside = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))
    found = mask.cpu().numpy()[np.ix_(y.clip(0, height - 1), x.clip(0, width - 1))]
    return torch.from_numpy(np.where(inside, found, UNKNOWN).astype(np.uint8))


def _for_page(item: Shown, name: str, label: int, kind: str, pixel_threshold: float | None) -> PageImage:
    """An image as the page takes it; its size is the network's, or that of a picture."""
    heat = item.anomaly_map.cpu().numpy()
    regions = [] if pixel_threshold is None else find_regions(heat, heat > pixel_threshold)
    lines = [polygon for region in regions for polygon in region.polygons]
    return PageImage(name, item.score, item.picture, heat, lines, item.truth, label, kind, item.order)


def _known(names: dict[str, str], figures: dict[str, Any]) -> dict[str, str]:
    """Figures that there are, by their full names, to be read."""
    named = {name: figures.get(key, math.nan) for key, name in names.items()}
    return {name: f"{value:.4g}" for name, value in named.items() if not math.isnan(value)}


def _table(what: str, figures: dict[str, dict[str, Any]], seconds: float) -> Table:
    numbers = (Column(name, justify="right") for name in (*FIGURES.values(), "nominal", "anomalous", "s / image"))
    table = Table(Column(what, overflow="fold"), *numbers)  # a defect type's name is never cut short
    for name, row in figures.items():
        values = ["–" if math.isnan(row[key]) else f"{row[key]:.4f}" for key in FIGURES]
        per_image = f"{seconds:.4f}" if name == "all" else ""
        table.add_row(name, *values, str(row["nominal"]), str(row["anomalous"]), per_image, end_section=name == "all")
    return table
