"""Graph -> a file of ``torch.export``, what is told in it, and what runs it: as `onnx_file.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from pl_patchcore.export import onnx_file
from pl_patchcore.export.runtime import Runtime

PACKAGES = ()
TOLD_IN = "metadata.json"  # name in the file's ``extra_files``


def write(runtime: Runtime, path: Path) -> None:
    """Record the graph, and write it; raises as `onnx_file.recorded`."""
    program = onnx_file.recorded(torch.export.export, runtime)
    with path.open("wb") as file:
        torch.export.save(program, file)


def tell(told: Mapping[str, str], path: Path) -> None:
    """Put texts by name into the file, as JSON."""
    with path.open("rb") as file:
        program = torch.export.load(file)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={TOLD_IN: json.dumps(dict(told))})


def session(path: Path) -> onnx_file.Run:
    """Run a file on the CPU."""
    with path.open("rb") as file:
        module = torch.export.load(file).module()

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {name: value.numpy() for name, value in module(torch.from_numpy(images)).items()}

    return run
