"""What does a fresh process cost until its first score, beside the imports of PyTorch and Lightning? `make bench`.

    python tests/benchmarks/bench_start.py [turns]

Every row is a process of its own; the rows take turns, and the least of each is shown. CPU seconds are those of the
process and its children, on one thread, which another program on the machine moves less than the wall time. The last
but one row is what `predict` cannot do without: the imports, and a model loaded and asked for one score in plain
Python. With onnxruntime, onnx and onnxscript the model is also scored as a file, by the program in docs/deploy.md.
Last, the first image that a loaded model inspects beside the tenth, on all threads.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from pl_patchcore import PatchCore

ROOT = Path(__file__).parents[2]
ROWS = 5000  # of the memory bank, random
SIDE = 224  # of the image, pixels
BARE = "import torch, lightning.pytorch"
MODULE = [sys.executable, "-m", "pl_patchcore"]
WORK = f"""{BARE}
from pl_patchcore import PatchCore
PatchCore.load_from_checkpoint("model.ckpt").inspect("images/image.png").score
"""

TEN = """
import time
from pl_patchcore import PatchCore
model = PatchCore.load_from_checkpoint("model.ckpt")
for _ in range(10):
    began = time.perf_counter()
    model.inspect("images/image.png")
    print(1000 * (time.perf_counter() - began))
"""


def files(folder: Path) -> None:
    """Write a fitted MobileNetV2 with random weights and bank, and an image; the times do not depend on them."""
    layers = ["features.6", "features.13"]
    model = PatchCore("mobilenet_v2", layers, weights=None, resize=SIDE, crop=None, save_backbone=True)
    model.memory_bank.fill(torch.randn(ROWS, model.patch_features.dimension))
    model.model.input_size = torch.tensor([SIDE, SIDE])
    model.model.calibration.fill(torch.rand(20), torch.rand(20))
    model.save(folder / "model.ckpt")
    (folder / "images").mkdir()
    levels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(levels).save(folder / "images" / "image.png")


def commands(folder: Path) -> dict[str, list[str]]:
    """What is started, by its name in the table."""
    python = [sys.executable, "-c"]
    ours = {
        "import torch": [*python, "import torch"],
        "import torch and Lightning": [*python, BARE],
        "import pl_patchcore": [*python, "import pl_patchcore"],
        "from pl_patchcore import PatchCore": [*python, "from pl_patchcore import PatchCore"],
        "pl-patchcore --help": [*MODULE, "--help"],
        "pl-patchcore predict --help": [*MODULE, "predict", "--help"],
        "imports, load, one score": [*python, WORK],
        "pl-patchcore predict": [*MODULE, "predict", "--ckpt_path=model.ckpt", "--data.predict=images"],
    }
    if all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        PatchCore.load_from_checkpoint(folder / "model.ckpt").export(folder / "model.onnx")
        program = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)[0]
        ours["the exported file, onnxruntime"] = [*python, program, "model.onnx", "images/image.png"]
    return ours


def cost(command: list[str], folder: Path) -> tuple[float, float]:
    """CPU and wall seconds of a process."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main(turns: int = 5) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files(folder)
        started = commands(folder)
        python = [sys.executable, "-c", TEN]
        ten = [subprocess.run(python, cwd=folder, capture_output=True, check=True).stdout for _ in range(turns)]
        spent: dict[str, list[tuple[float, float]]] = {row: [] for row in started}
        for _ in range(turns):
            for row, command in started.items():
                spent[row].append(cost(command, folder))
    least = {row: np.min(times, axis=0) for row, times in spent.items()}
    predict, work = least["pl-patchcore predict"], least["imports, load, one score"]
    table = Table("process", "CPU, s", "wall, s", "of predict's CPU", "of its wall time")
    for row, found in least.items():
        table.add_row(row, *(f"{value:.2f}" for value in found), *(f"{ratio:.2f}" for ratio in found / predict))
    console = Console(width=120)
    console.print(table)
    ratios = predict / work
    console.print(f"predict: {ratios[0]:.2f} times imports, load and one score (CPU), {ratios[1]:.2f} (wall)")
    first, tenth = np.array([lines.split() for lines in ten], float).T[[0, 9]]
    told = f"{np.median(first):.1f} ms, the tenth {np.median(tenth):.1f}, {np.median(first / tenth):.2f} times"
    console.print(f"inspect in a fresh process, medians: the first image {told}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
