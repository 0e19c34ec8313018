"""After a prediction: ``predictions.csv``, and anomaly maps on request."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import IO, Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback

from pl_patchcore.anomaly_map import to_original
from pl_patchcore.report.files import output_folder, plain_console, whole_file

_CALIBRATED = ("anomalous", "normalized", "p_value")


class PredictionWriter(Callback):
    """Writes the anomaly score of every image as it comes.

    The CSV has the columns ``path``, ``score``, of a calibrated model ``anomalous`` (1 where the score is above the
    threshold, else 0), ``normalized`` (the score in units of the threshold) and ``p_value`` (share of nominal images
    that score so high), and, with maps, ``map``; it gets its name when it is whole. With several processes the first
    one writes it, in the order of the data set, once all are done; each writes the maps of its share.

    Args:
        maps: Also write each anomaly map, on the original image's pixels (NaN where the crop left them out), as
            float32 ``maps/<number>-<name>.npy``.
    """

    def __init__(self, maps: bool = False) -> None:
        self.maps = maps
        self._file: IO[str] | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the file under a temporary name."""
        folder = output_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        self._several = trainer.world_size > 1
        rank = f"-{trainer.global_rank}" if self._several else ""
        self._path = folder / "predictions.csv"
        self._partial = folder / f"predictions{rank}.csv.partial"
        self._maps = folder / "maps"
        if self.maps and trainer.local_rank == 0:
            self._path.unlink(missing_ok=True)  # it names the maps that go now
            for old in self._maps.glob("[0-9]" * 6 + "-*.npy"):  # of an earlier run
                old.unlink(missing_ok=True)  # machines may share the folder
        trainer.strategy.barrier()  # nobody writes a map before the old ones are gone
        self._file = self._partial.open("w", newline="", encoding="utf-8")
        self._csv = csv.writer(self._file)
        self._columns = _CALIBRATED if pl_module.image_threshold is not None else ()
        self._csv.writerow(["path", "score", *self._columns, *(["map"] if self.maps else [])])
        self._images = 0
        self._order: list[int] = []  # number in the data set of each image, where there are several processes

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write a batch."""
        columns = [outputs[name].tolist() for name in ("score", *self._columns)]
        for i, values in enumerate(zip(*columns, strict=True)):
            number = int(outputs["index"][i]) if self._several else self._images
            path = outputs["path"][i] if "path" in outputs else str(number)
            row = [path, *(repr(int(value) if isinstance(value, bool) else value) for value in values)]
            if self.maps:
                row.append(self._write_map(outputs, i, path, number))
            self._csv.writerow(row)
            self._images += 1
            if self._several:
                self._order.append(number)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the file its name."""
        self._close()
        if self._several:
            self._put_together(trainer, pl_module)
        if trainer.is_global_zero:
            self._partial.replace(self._path)
        if trainer.is_global_zero:
            plain_console().print(f"{self._images} anomaly scores written to {self._path}")

    def _put_together(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather all processes' rows in the first one's file."""
        with self._partial.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        parts = pl_module.processes().objects((self._order, rows))  # type: ignore[operator]
        if not trainer.is_global_zero:
            self._partial.unlink()
            return
        numbered = [pair for part in parts for pair in zip(*part, strict=True)]
        with self._partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *(row for _, row in sorted(numbered, key=lambda pair: pair[0]))])
        self._images = len(numbered)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave an unfinished file under its temporary name."""
        self._close()

    def _write_map(self, outputs: dict[str, Any], i: int, path: str, number: int) -> str:
        heat = outputs["anomaly_map"][i]
        if "crop_box" in outputs:
            size = outputs["original_size"][i].tolist()
            heat = to_original(heat, (size[0], size[1]), tuple(outputs["crop_box"][i].tolist()))
        target = self._maps / f"{number:06d}-{Path(path).stem}.npy"
        with whole_file(target) as partial:
            np.save(partial, heat.float().cpu().numpy())
        return f"{self._maps.name}/{target.name}"

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
