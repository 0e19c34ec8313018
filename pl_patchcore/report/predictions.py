"""After a prediction: ``predictions.csv``, and anomaly maps on request."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import IO, Any

import lightning as L
import numpy as np
from filelock import FileLock
from lightning.pytorch.callbacks import Callback

from pl_patchcore.anomaly_map import to_original
from pl_patchcore.files import hold, output_folder, plain_console, whole_file

CALIBRATED = ("anomalous", "normalized", "p_value")  # columns of a calibrated model
NAME_LENGTH = 48  # characters of an image's name in its map's, of at most 4 bytes each; file systems take 255 bytes


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
        self.file: IO[str] | None = None  # open while images are scored
        self.lock: FileLock | None = None  # on the folder, of the first process
        self.rows: list[tuple[int, list[str]]] = []  # number in the data set, row of the table

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the file under a temporary name."""
        folder = output_folder(trainer)
        if trainer.is_global_zero:
            self.lock = hold(folder)
        if self.maps and trainer.local_rank == 0:  # machines may share the folder
            (folder / "predictions.csv").unlink(missing_ok=True)  # it names the maps that go now
            for old in (folder / "maps").glob("[0-9]" * 6 + "-*.npy"):  # of an earlier run
                old.unlink(missing_ok=True)
        trainer.strategy.barrier()  # nobody writes a map before the old ones are gone
        rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        self.file = (folder / f"predictions{rank}.csv.partial").open("w", newline="", encoding="utf-8")
        calibrated = CALIBRATED if pl_module.image_threshold is not None else ()
        self.rows = [(-1, ["path", "score", *calibrated, *["map"] * self.maps])]
        csv.writer(self.file).writerow(self.rows[0][1])

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Write a batch."""
        if self.file is None:
            return
        columns = [outputs[name].tolist() for name in ("score", *CALIBRATED) if name in outputs]
        for i, values in enumerate(zip(*columns, strict=True)):
            number = int(outputs["index"][i]) if trainer.world_size > 1 else len(self.rows) - 1
            path = outputs["path"][i] if "path" in outputs else str(number)
            cell = f".{os.sep}{path}" if path.startswith(tuple("=+-@\t\r")) else path  # no formula of a spreadsheet
            row = [cell, *(repr(int(value) if isinstance(value, bool) else value) for value in values)]
            if self.maps:
                target = Path(self.file.name).parent / "maps" / f"{number:06d}-{Path(path).stem[:NAME_LENGTH]}.npy"
                _write_map(outputs, i, target)
                row.append(f"maps/{target.name}")
            csv.writer(self.file).writerow(row)
            self.rows.append((number, row))

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Give the file its name; of several processes, put all rows into the first one's."""
        if self.file is None:
            return
        self.file.close()
        partial, rows, self.file = Path(self.file.name), self.rows, None
        if trainer.world_size > 1:
            shares = pl_module.processes().objects(self.rows)
            if not trainer.is_global_zero:
                partial.unlink()
                return
            rows = sorted([*shares[0], *(pair for share in shares[1:] for pair in share[1:])], key=lambda pair: pair[0])
            with partial.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(row for _, row in rows)
        target = partial.replace(partial.parent / "predictions.csv")
        self._release()
        plain_console().print(f"{len(rows) - 1} anomaly scores written to {target}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave an unfinished file under its temporary name."""
        if self.file is not None:
            self.file.close()
            self.file = None
        self._release()

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.release()
        self.lock = None


def _write_map(outputs: dict[str, Any], i: int, target: Path) -> None:
    heat = outputs["anomaly_map"][i]
    if "crop_box" in outputs:
        height, width = outputs["original_size"][i].tolist()
        heat = to_original(heat, (height, width), tuple(outputs["crop_box"][i].tolist()))
    with whole_file(target) as partial:
        np.save(partial, heat.float().cpu().numpy())
