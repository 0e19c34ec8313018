"""What a score and its map take, frame by frame as a line calls it, and in batches. Prints a table; `make bench`.

The model itself in torch, and the files that `export` makes of it, in ONNX Runtime and OpenVINO, on frames uint8 of the
network's size. Networks have random weights, memory banks are patch features of noise and mixtures of these: times of
the files do not depend on them. With anomalib installed (``pip install 'anomalib[openvino]'``) its model, with the same
network and memory bank, stands beside it, in torch and as its own OpenVINO file, whose batch is fixed at two: one frame
then takes a call of two; batches are its calls on pairs. All ways take turns, with a pause and a call that is
not counted before each; medians.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import LAYERS, medians, parser_of, seconds, silence
from rich.console import Console
from rich.table import Table

from pl_patchcore import PatchCore
from pl_patchcore.export import onnx_file, openvino_file
from pl_patchcore.options import ImageOptions

Call = Callable[[np.ndarray], Any]  # frames uint8 (B, H, W, 3)
CONFIGS = {  # network, layers, pixels of a side, rows of the memory bank
    "MobileNetV2, 224, 5,966": ("mobilenet_v2", LAYERS, 224, 5_966),
    "ResNet-18, 256, 10,000": ("resnet18", ["layer2", "layer3"], 256, 10_000),
    "WideResNet-50, 224, 10,000": ("wide_resnet50_2", ["layer2", "layer3"], 224, 10_000),
    "WideResNet-50, 224, 50,000": ("wide_resnet50_2", ["layer2", "layer3"], 224, 50_000),
}
BATCH = 8
PAUSE = 0.1  # seconds, until the threads of the way before no longer spin
NOISE = 4  # images whose patch features the bank is made of


def frames(side: int, number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (number, side, side, 3), np.uint8)


def made(name: str, layers: list[str], side: int, rows: int) -> PatchCore:
    """A model with a memory bank."""
    images = ImageOptions(resize_by="tensors")
    model = PatchCore(name, layers, None, resize=side, crop=None, images=images)
    with torch.inference_mode():
        pixels = torch.stack([model.transform(each) for each in frames(side, NOISE)])
        features: torch.Tensor = model.model.members[0].patch_features(pixels).flatten(0, 2)
    pairs = torch.randint(len(features), (2, rows), generator=torch.Generator().manual_seed(0))
    model.memory_bank.fill(features[pairs].float().mean(0))
    model.eval()
    return model


def ours(model: PatchCore, folder: Path) -> dict[str, Call]:
    """The model, and its files."""

    def in_torch(images: np.ndarray) -> None:
        found = model.inspect(list(images))
        for each in found:
            each.anomaly_map  # noqa: B018  # which is made when it is first asked for

    calls: dict[str, Call] = {"torch": in_torch}
    if find_spec("onnxruntime") and find_spec("onnxscript"):
        model.export(folder / "m.onnx")
        calls["ONNX Runtime"] = onnx_file.session(folder / "m.onnx")
    if find_spec("openvino") and find_spec("onnxscript"):
        files = folder / "m.xml", folder / "m.bin"
        model.export(files[0], "openvino")
        calls["OpenVINO"] = openvino_file.session(*files)
        calls["OpenVINO bf16"] = openvino_file.session(*files, "bf16")
    return calls


def theirs(model: PatchCore, name: str, layers: list[str], side: int, folder: Path) -> dict[str, Call]:
    """anomalib's model and file; nothing where it is not installed, or has no such network."""
    if not find_spec("anomalib") or "resnet" not in name:
        return {}
    import openvino
    from anomalib.models import Patchcore

    with contextlib.redirect_stdout(sys.stderr):
        peer = Patchcore(backbone=name, layers=layers, pre_trained=False).eval()
    peer.model.memory_bank = model.memory_bank.features.clone()

    def floats(images: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / np.float32(255)

    @torch.inference_mode()
    def in_torch(images: np.ndarray) -> None:
        peer(torch.from_numpy(floats(images)))

    path = peer.to_openvino(folder, input_size=(side, side))
    calls: dict[str, Call] = {"anomalib, torch": in_torch}
    for precision in ("f32", "bf16"):
        compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": precision})
        fixed = compiled.inputs[0].partial_shape[0]
        step = fixed.get_length() if fixed.is_static else BATCH

        def in_openvino(images: np.ndarray, compiled: Any = compiled, step: int = step, fixed: Any = fixed) -> None:
            for start in range(0, len(images), step):
                part = floats(images[start : start + step])
                if fixed.is_static and len(part) < step:
                    part = np.concatenate([part] * step)[:step]
                compiled(part)

        calls[f"anomalib, OpenVINO {precision}"] = in_openvino
    return calls


def milliseconds(calls: dict[str, Call], images: np.ndarray, turns: int) -> dict[str, float]:
    """Medians, an image."""

    def clock(call: Callable[[], object]) -> float:
        time.sleep(PAUSE)
        call()
        return 1e3 * seconds(call) / len(images)

    return medians({name: partial(call, images) for name, call in calls.items()}, turns, clock)


def rows(chosen: list[str], turns: int) -> Iterator[tuple[str, dict[str, float], dict[str, float]]]:
    for config in chosen:
        name, layers, side, size = CONFIGS[config]
        model = made(name, layers, side, size)
        with tempfile.TemporaryDirectory() as folder:
            calls = ours(model, Path(folder)) | theirs(model, name, layers, side, Path(folder))
            alone, together = (milliseconds(calls, frames(side, number), turns) for number in (1, BATCH))
            yield config, alone, together


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="*", choices=CONFIGS, default=[*CONFIGS], help="rows to measure")
    parser.add_argument("--turns", type=int, default=9, help="calls of each way that count")
    given = parser.parse_args()
    silence()
    console = Console(width=150)
    console.print(f"{torch.get_num_threads()} threads; ms an image: one frame at a time / in batches of {BATCH}")
    table: Table | None = None
    for config, alone, together in rows(given.only, given.turns):
        if table is None:
            table = Table("network, pixels, memory bank", *alone)
        cells = [f"{alone[name]:.1f} / {together[name]:.1f}" for name in alone]
        table.add_row(config, *cells)
        console.print(f"{config}: {', '.join(f'{name} {cell}' for name, cell in zip(alone, cells, strict=True))}")
    if table is not None:
        console.print(table)


if __name__ == "__main__":
    main()
