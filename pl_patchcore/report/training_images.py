"""After a fit with leave-one-out scores: ``training_images.csv``, and pictures of the images least like the rest."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch.utils.data import IterableDataset

from pl_patchcore.counted import Counted
from pl_patchcore.data.batch import as_batch, same_size_parts
from pl_patchcore.errors import UserError
from pl_patchcore.files import output_folder, plain_console, spreadsheet_cell, whole_file
from pl_patchcore.inspection import with_strip
from pl_patchcore.leave_one_out import score_without_rows
from pl_patchcore.report.pictures import Shown, colour_scale, file_name, overlay, remove_earlier, side_by_side
from pl_patchcore.suspicious import TrainingImage


class TrainingImagesReport(Callback):
    """Lists the training images by their leave-one-out scores when a fit ends.

    Those least like the rest come first.
    ``training_images.csv`` has the columns ``path`` (the index in the data set, where batches tell no path), ``score``,
    ``stands_out`` and ``left_out`` (1 or 0; see ``drop_suspicious`` of `PatchCore`). ``training_images/`` has pictures
    of the first ones, beside each the same with the anomaly map in colours, against the memory bank without the image's
    own rows; there are none of a stream. With several processes the first one writes them. Without leave-one-out
    scores nothing is written.

    Args:
        pictures: Images shown; 0 for none.
    """

    def __init__(self, pictures: int = 4) -> None:
        if pictures < 0:
            raise UserError(f"pictures must be 0 or more, got {pictures}.")
        self.pictures = pictures

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write, in place of what an earlier fit wrote."""
        folder = output_folder(trainer)
        if not trainer.is_global_zero:
            return
        table, listed = folder / "training_images.csv", getattr(pl_module, "training_images", [])
        table.unlink(missing_ok=True)
        remove_earlier(folder / "training_images", r"[0-9]{3}-.*\.jpg")
        if not listed:
            return
        with whole_file(table) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "score", "stands_out", "left_out"), *map(_row, listed)])
        written = self._draw(trainer, pl_module, listed, folder / "training_images")
        said = f" and {written} pictures" if written else ""
        plain_console().print(f"Training images, those least like the rest first: {table}{said}")

    def _draw(self, trainer: L.Trainer, model: Any, listed: list[TrainingImage], folder: Path) -> int:
        """Draw the first images; returns the number of pictures."""
        loader: Any = trainer.train_dataloader
        dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
        if dataset is None or collate is None or isinstance(dataset, IterableDataset):
            return 0
        for number, each in enumerate(shown := listed[: self.pictures], 1):
            batch = same_size_parts(as_batch(collate([dataset[each.image]])))[0]
            image = batch["image"].to(model.device)
            with trainer.precision_plugin.forward_context():
                _, maps = score_without_rows(model.model, image, each.group, Counted.of(batch, model.device))
            item = Shown.of(each.score, number, each.name, image[0], maps[0], None, model.transform)
            with whole_file(folder / f"{file_name(f'{number:03d}', each.name)}.jpg") as partial:
                _picture(item, each, model.pixel_threshold).save(partial, quality=90)
        return len(shown)


def _row(each: TrainingImage) -> tuple[Any, ...]:
    return spreadsheet_cell(each.name), f"{each.score:.6g}", int(each.stands_out), int(each.left_out)


def _picture(item: Shown, each: TrainingImage, threshold: float | None) -> Image.Image:
    """The image, beside it with the map in colours."""
    image, heat = Image.fromarray(item.picture), item.anomaly_map.cpu().numpy()
    low, high = colour_scale(threshold) if threshold is not None else (0.0, float(np.nanmax(heat)))
    both = side_by_side(image, overlay(image, heat, low, high))
    state = "left out" if each.left_out else "stands out" if each.stands_out else "does not stand out"
    return with_strip(both, f"score {each.score:.4g}, {state}; map from {low:g} to {high:.4g}")
