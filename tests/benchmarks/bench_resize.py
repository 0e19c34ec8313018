"""What the resize of one image takes: Pillow's, ours in tensors, and that in exported files. Prints a table.

Colour images of noise, squashed to 224 x 224, bilinear, on all threads; each in the form that its way takes them, and
until the levels are there. The ways take turns, with a pause and a call that is not counted before each; medians.
"""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_inference import Call, milliseconds
from measuring import silence
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pl_patchcore import Preprocessing
from pl_patchcore.export import onnx_file
from pl_patchcore.export.geometry import Frame
from pl_patchcore.resize import resized

SIDE = 224  # of the network's input, pixels
SIZES = ((256, 256), (1024, 1024), (2000, 3000))
TURNS = 9


class Graph(nn.Module):
    """The resize alone, as an exported file has it."""

    def __init__(self) -> None:
        super().__init__()
        self.frame = Frame(Preprocessing(SIDE, None, resize_by="tensors"))

    def forward(self, image: Tensor) -> Tensor:
        levels: Tensor = self.frame(image)[0]
        return levels


def ways(folder: Path) -> dict[str, Call]:
    def by_pillow(images: np.ndarray) -> object:
        return np.asarray(Image.fromarray(images[0]).resize((SIDE, SIDE), Image.Resampling.BILINEAR))

    def in_tensors(images: np.ndarray) -> object:
        return resized(torch.from_numpy(images), (SIDE, SIDE), (0, 0), (SIDE, SIDE), "bilinear")

    calls: dict[str, Call] = {"Pillow": by_pillow, "tensors": in_tensors}
    if not find_spec("onnxscript"):
        return calls
    path, example = folder / "resize.onnx", torch.zeros(2, 300, 400, 3, dtype=torch.uint8)
    open_axes = dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)
    how: dict[str, Any] = {"dynamo": True, "verbose": False, "dynamic_shapes": (open_axes,)}
    torch.onnx.export(Graph().eval(), (example,), path, input_names=["image"], **how)
    if find_spec("onnxruntime"):
        calls["ONNX Runtime"] = onnx_file.session(path)
    if find_spec("openvino"):
        import openvino

        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        calls["OpenVINO"] = lambda images: compiled({"image": images})
    return calls


def main() -> None:
    silence()
    with tempfile.TemporaryDirectory() as folder:
        calls = ways(Path(folder))
        table = Table(f"ms, {torch.get_num_threads()} threads (times Pillow's)", *calls)
        for size in SIZES:
            found = milliseconds(calls, np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8), TURNS)
            cells = [f"{value:.1f} ({value / found['Pillow']:.1f})" for value in found.values()]
            table.add_row(f"{size[0]} x {size[1]}", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
