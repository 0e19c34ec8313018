"""What exported files make of magnetic tiles, by format and precision, beside their checkpoint. Prints a table.

Magnetic Tile Defects, complete, with the split of published results and MobileNetV2: tiles squashed to 224 x 224, no
crop, 1 % of the patch features, thresholds from the fit. Each file scores the camera's image of all 583 test tiles, one
by one; figures of pixels are of the maps of the network's input, as a test has them. Packages: those of the extras
``onnx`` and ``openvino``.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_options import LARGER, SHARED, fitted
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pl_patchcore import PatchCore
from pl_patchcore.export import onnx_file, openvino_file, torch_file
from pl_patchcore.metrics import AnomalyEvaluation
from pl_patchcore.model import Inference
from pl_patchcore.options import ImageOptions
from pl_patchcore.preprocessing import ResizeBy

FORMATS = {"onnx": (onnx_file, ".onnx"), "openvino": (openvino_file, ".xml"), "torch": (torch_file, ".pt2")}
FILES: dict[str, tuple[ResizeBy, str, dict[str, Any]]] = {  # name: how the model resizes, format, options
    "ONNX": ("tensors", "onnx", {}),
    "OpenVINO": ("tensors", "openvino", {}),
    "torch.export": ("tensors", "torch", {}),
    "ONNX, bank float16": ("tensors", "onnx", {"bank_dtype": "float16"}),
    "ONNX, bank int8": ("tensors", "onnx", {"bank_dtype": "int8"}),
    "OpenVINO, bf16": ("tensors", "openvino", {"precision": "bf16"}),
    "ONNX, resize in the file": ("pillow", "onnx", {"resize_in_file": True}),
}
FIGURES = ("image_auroc", "pixel_auroc", "pro")
LEAST_TIES = 1e-12  # so that equal answers are told as 0


class Answers:
    """Scores and verdicts of all test tiles, and figures."""

    def __init__(self, found: Iterable[tuple[Any, torch.Tensor, bool]], tiles: Any) -> None:
        evaluation, self.scores, self.verdicts = AnomalyEvaluation(), list[float](), list[bool]()
        for (score, heat, anomalous), tile in zip(found, tiles, strict=True):
            self.scores.append(float(score))
            self.verdicts.append(anomalous)
            label = torch.tensor([tile["label"]])
            evaluation.update(torch.tensor([float(score)]), heat[None], label, tile["mask"][None], label)
        self.figures = evaluation.compute()

    def row(self, beside: "Answers") -> list[str]:
        changes = np.abs(np.array(self.scores) / np.array(beside.scores) - 1)
        flips = sum(a != b for a, b in zip(self.verdicts, beside.verdicts, strict=True))
        figures = [f"{self.figures[name]:.4f}" for name in FIGURES]
        shown = [f"{each:.1g}" if each > LEAST_TIES else "0" for each in (np.median(changes), changes.max())]
        return [*figures, *shown, str(flips)]


def by_model(model: PatchCore, tiles: Any, inference: Inference = "float32") -> Answers:
    for member in model.model.members:
        member.inference = inference

    def found() -> Iterable[tuple[Any, torch.Tensor, bool]]:
        for tile in tqdm(tiles, "The model"):
            with torch.inference_mode():
                outputs = model.judge(tile["image"][None])
            yield outputs["score"][0], outputs["anomaly_map"][0], bool(outputs["anomalous"][0])

    answers = Answers(found(), tiles)
    for member in model.model.members:
        member.inference = "float32"
    return answers


def by_file(model: PatchCore, tiles: Any, name: str, folder: str) -> tuple[Answers, float]:
    """Answers of a file, and its megabytes."""
    _, form, options = FILES[name]
    kind, ending = FORMATS[form]
    path = Path(folder, f"model{ending}")
    some = [tiles[i]["path"] for i in range(0, len(tiles), len(tiles) // 20)]
    model.export(path, form, some, map_at="input", **options)
    files = [path, path.with_suffix(".bin")] if form == "openvino" else [path]
    run = kind.session(*files, options.get("precision", "float32"))

    def found() -> Iterable[tuple[Any, torch.Tensor, bool]]:
        for tile in tqdm(tiles, name):
            outputs = run(np.array(model.transform.read(Path(tile["path"])))[None])
            yield outputs["score"][0], torch.from_numpy(outputs["anomaly_map"][0]), bool(outputs["anomalous"][0])

    return Answers(found(), tiles), sum(file.stat().st_size for file in files) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=FILES, default=[*FILES], help="files to measure")
    given = parser.parse_args()
    if not SHARED.is_dir():
        print(f"{SHARED} is not there: no magnetic tiles to measure on.")
        return
    logging.getLogger("pl_patchcore").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # of Lightning, about loaders
    console = Console(width=140)
    columns = ("MB", *FIGURES, "score change, median", "largest", "other verdicts")
    table = Table("what scores", *columns, title="Magnetic tiles, 583")
    for resize_by in dict.fromkeys(FILES[name][0] for name in given.only):
        model, data, _ = fitted(LARGER | {"images": ImageOptions(resize_by=resize_by), "calibration": "leave_one_out"})
        data.setup("test")
        tiles = data.test_dataloader().dataset
        own = by_model(model, tiles)
        rows = {f"checkpoint, resize_by: {resize_by}": ["", *own.row(own)]}
        rows["the same, inference: bf16"] = ["", *by_model(model, tiles, "bf16").row(own)]
        for name in given.only:
            if FILES[name][0] == resize_by:
                with tempfile.TemporaryDirectory() as folder:
                    answers, megabytes = by_file(model, tiles, name, folder)
                rows[name] = [f"{megabytes:.1f}", *answers.row(own)]
        for name, row in rows.items():
            table.add_row(name, *row)
            console.print(f"{name}: {', '.join(row)}")
    console.print(table)


if __name__ == "__main__":
    main()
