"""What exported files make of magnetic tiles, by format and precision, beside their checkpoint. Prints a table.

Magnetic Tile Defects, complete, with the split of published results and MobileNetV2: tiles squashed to 224 x 224, no
crop, 1 % of the patch features, thresholds from the fit. Each file scores the camera's image of all 583 test tiles, one
by one; figures of pixels are of the maps of the network's input, as a test has them. Packages: those of the extras
``onnx`` and ``openvino``.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_options import FIGURES, LARGER, fitted
from measuring import parser_of, ready_for_tiles
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pl_patchcore import PatchCore
from pl_patchcore.export.write import FORMATS, KINDS
from pl_patchcore.metrics import AnomalyEvaluation
from pl_patchcore.options import ImageOptions
from pl_patchcore.patch_features import Inference
from pl_patchcore.preprocessing import ResizeBy

FILES: dict[str, tuple[ResizeBy, str, dict[str, Any]]] = {  # name: how the model resizes, format, options
    "ONNX": ("tensors", "onnx", {}),
    "OpenVINO": ("tensors", "openvino", {}),
    "torch.export": ("tensors", "torch", {}),
    "ONNX, bank float16": ("tensors", "onnx", {"bank_dtype": "float16"}),
    "ONNX, bank int8": ("tensors", "onnx", {"bank_dtype": "int8"}),
    "OpenVINO, bf16": ("tensors", "openvino", {"precision": "bf16"}),
    "ONNX, resize in the file": ("pillow", "onnx", {"resize_in_file": True}),
}
LEAST_TIES = 1e-12  # so that equal answers are told as 0


class Answers:
    """Scores and verdicts of all test tiles, and figures, by what gives the outputs for a tile."""

    def __init__(self, outputs_of: Callable[[Any], Mapping[str, Any]], tiles: Any, name: str) -> None:
        evaluation, self.scores, self.verdicts = AnomalyEvaluation(), list[float](), list[bool]()
        for tile in tqdm(tiles, name):
            found = {key: torch.as_tensor(value) for key, value in outputs_of(tile).items()}
            self.scores.append(float(found["score"]))
            self.verdicts.append(bool(found["anomalous"]))
            label = torch.tensor([tile["label"]])
            evaluation.update(found["score"], found["anomaly_map"], label, tile["mask"][None], label)
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
    with torch.inference_mode():
        answers = Answers(lambda tile: model.judge(tile["image"][None]), tiles, "The model")
    for member in model.model.members:
        member.inference = "float32"
    return answers


def by_file(model: PatchCore, tiles: Any, name: str, folder: str) -> tuple[Answers, float]:
    """Answers of a file, and its megabytes."""
    _, form, options = FILES[name]
    files = [Path(folder, f"model{ending}") for ending in FORMATS[form]]
    some = [tiles[i]["path"] for i in range(0, len(tiles), len(tiles) // 20)]
    model.export(files[0], form, some, map_at="input", **options)
    run = KINDS[form].session(*files, **(options if form == "openvino" else {}))
    answers = Answers(lambda tile: run(np.array(model.transform.read(Path(tile["path"])))[None]), tiles, name)
    return answers, sum(file.stat().st_size for file in files) / 1e6


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="*", choices=FILES, default=[*FILES], help="files to measure")
    given = parser.parse_args()
    if not ready_for_tiles():
        return
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
