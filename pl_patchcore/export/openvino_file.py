"""Graph -> two files of OpenVINO, what is told in them, and what runs them: as `onnx_file.py`, by way of which it goes.

OpenVINO takes bfloat16 by itself where the processor has it, which moves scores by about a hundredth; so it is told.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pl_patchcore.export import onnx_file
from pl_patchcore.export.options import Precision
from pl_patchcore.export.runtime import Runtime

PACKAGES = ("onnx", "onnxscript", "openvino")
PRECISION = {"float32": "f32", "bf16": "bf16"}  # ours: its name there
TOLD_IN = "framework"  # group of the model's ``rt_info`` where OpenVINO puts the metadata of ONNX


def write(runtime: Runtime, graph: Path, weights: Path) -> None:
    """Record the graph, and write it; raises as `onnx_file.write`."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        onnx_file.write(runtime, path)
        _save(openvino.convert_model(path), graph, weights)


def tell(told: Mapping[str, str], graph: Path, weights: Path) -> None:
    """Put texts by name into the model's ``rt_info``, under ``framework``."""
    import openvino

    model = openvino.Core().read_model(graph, weights)
    for name, text in told.items():
        model.set_rt_info(text, [TOLD_IN, name])
    _save(model, graph, weights)


def _save(model: Any, graph: Path, weights: Path) -> None:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.xml")
        openvino.save_model(model, path, compress_to_fp16=False)
        graph.write_bytes(path.read_bytes())
        weights.write_bytes(path.with_suffix(".bin").read_bytes())


def session(graph: Path, weights: Path, precision: Precision = "float32") -> onnx_file.Run:
    """Run the files on the CPU."""
    import openvino

    core, hint = openvino.Core(), {"INFERENCE_PRECISION_HINT": PRECISION[precision]}
    compiled = core.compile_model(core.read_model(graph, weights), "CPU", hint)
    names = [each.get_any_name() for each in compiled.outputs]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        found = compiled({onnx_file.INPUT: images})
        return {name: found[name] for name in names}

    return run
