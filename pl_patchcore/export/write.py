"""A fitted model -> a file that runs without this package, compared with the model; what is known of it as JSON."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import pl_patchcore
from pl_patchcore.counted import Counted
from pl_patchcore.errors import UserError
from pl_patchcore.export import onnx_file, openvino_file, parity
from pl_patchcore.export.checks import check_exportable
from pl_patchcore.export.runtime import Runtime
from pl_patchcore.files import whole_file
from pl_patchcore.inspection import Inspection, Settings, inspect

if TYPE_CHECKING:
    from pl_patchcore.patchcore import PatchCore

log = logging.getLogger(__name__)
FORMATS = {"onnx": (".onnx",), "openvino": (".xml", ".bin")}  # name of a format: endings of its files


def export(
    module: PatchCore,
    path: str | Path,
    format: str = "onnx",
    data: str | Path | Sequence[str | Path] | None = None,
    checkpoint: str | Path | None = None,
) -> dict[str, Any]:
    """Write a fitted model as a file that runs without this package, and compare the file with the model.

    Args:
        module: The fitted model, on the CPU.
        path: The file; beside it, ``.json`` added to its name, goes what is known of it.
        format: ``onnx``, or ``openvino``, whose weights go to a ``.bin`` beside the file.
        data: Folder of images, or image files, to compare with; None: noise alone.
        checkpoint: File that the model is from, whose hash is noted.

    Returns:
        What is known of the file, as it stands in it and beside it.

    Raises:
        UserError: If a package is missing, the model is not one that can be exported, or the file differs from it.
    """
    if format not in FORMATS:
        raise UserError(f"format must be {' or '.join(FORMATS)}, got {format!r}.")
    path = Path(path)
    if path.suffix != FORMATS[format][0]:
        raise UserError(f"{path}: the name of a file of {format} ends with {FORMATS[format][0]}.")
    kind = onnx_file if format == "onnx" else openvino_file
    versions = onnx_file.require(kind.PACKAGES, format)
    check_exportable(module.model, module.transform)
    files = parity.image_files(data)
    with ExitStack() as made:
        partial = [made.enter_context(whole_file(path.with_suffix(ending))) for ending in FORMATS[format]]
        try:
            runtime, found = _written(module, kind, partial, files, look_up=False)
        except parity.Differs as error:
            log.info("%s Once more, by a search that is slower and tells smaller distances.", error)
            runtime, found = _written(module, kind, partial, files, look_up=True)
        told = _told(module, runtime, checkpoint) | {"versions": _versions() | versions, "parity": found}
        kind.tell({name: _text(value) for name, value in told.items()}, *partial)
    with whole_file(path.with_name(f"{path.name}.json")) as beside:
        beside.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    size = sum(path.with_suffix(ending).stat().st_size for ending in FORMATS[format])
    log.info(
        "export: %s, %.1f MB; scores differ from the model's by at most %.1g of them, maps by %.1g, verdicts do not.",
        *(path, size / 1e6, found["score_difference"], found["map_difference"]),
    )
    return told


def _written(
    module: PatchCore, kind: ModuleType, partial: Sequence[Path], files: Sequence[Path], look_up: bool
) -> tuple[Runtime, dict[str, Any]]:
    """Write the graph, and compare the file with the model."""
    runtime = Runtime(module.model, module.transform, look_up).eval()
    log.info("export: recording the graph (half a minute for a large backbone).")
    kind.write(runtime, *partial)
    log.info("export: comparing the file with the model on noise and %d images.", len(files))
    return runtime, parity.compare(kind.session(*partial), _by_model(module, runtime), runtime, files)


def _by_model(module: PatchCore, runtime: Runtime) -> parity.Inspect:
    """Inspect what the file takes, by the model."""
    transform, settings = parity.remaining(runtime), Settings(module.image_threshold, module.pixel_threshold)

    def score(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return module.judge(batch["image"], Counted.of(batch, torch.device("cpu")))

    def by_model(images: list[np.ndarray]) -> list[Inspection]:
        found = inspect(images, transform, score, settings)
        assert isinstance(found, list)
        return found

    return by_model


def _told(module: PatchCore, runtime: Runtime, checkpoint: str | Path | None) -> dict[str, Any]:
    """What is known of a file, as plain values."""
    calibration, members = module.model.calibration, module.model.members
    known = {
        "input": _input(runtime),
        "outputs": _outputs(runtime),
        "image_threshold": module.image_threshold,
        "pixel_threshold": module.pixel_threshold,
        "false_alarm_rate": module.false_alarm_rate if len(calibration.scores) else None,
        "calibration_images": len(calibration.scores),
        "thresholds_by_hand": sorted(calibration.by_hand),
        "preprocessing": module.transform.as_dict(),
        "rows_looked_up": all(member.look_up for member in runtime.members),
        "resize_in_file": not runtime.frame.ready,
        "size": runtime.size,
        "model": module.model.identity,
        "scoring": [_scoring(member.scorer) for member in members],
        "bank": [member.bank_shape for member in members],
        "bank_sha256": [_sha256_of(member.memory_bank.features) for member in members],
        "checkpoint_sha256": None if checkpoint is None else _sha256_of_file(Path(checkpoint)),
    }
    plain: dict[str, Any] = json.loads(json.dumps(known))
    return plain


def _scoring(scorer: Any) -> dict[str, Any]:
    names = ("num_neighbors", "distance", "reweighting_neighbors", "sigma", "image_score", "top_share")
    return {name: getattr(scorer, name) for name in names}


def _input(runtime: Runtime) -> str:
    """The input expected, in one sentence."""
    transform, size = runtime.frame.transform, runtime.size
    shape = "height, width" if size is None else f"{size[0]}, {size[1]}"
    start = f"image: RGB levels, uint8 (batch, {shape}, 3), upright"
    if not runtime.frame.ready:
        least = transform.size if transform.resize is None and transform.crop is not None else None
        return f"{start}, as a camera gives them{f', of at least {least[0]}x{least[1]} pixels' if least else ''}."
    sides = transform.resize if isinstance(transform.resize, tuple) else (transform.resize, transform.resize)
    how = {
        "squash": f"to {sides[0]}x{sides[1]} pixels (height x width), whatever their shape",
        "shorter_side": f"so that the shorter side has {sides[0]} pixels, the other rounded down",
    }[transform.resize_mode]
    cut = "" if transform.crop is None else f", then the middle {_sides(transform.crop)} pixels cut out"
    multiple = transform.crop_multiple
    cut += f", right and bottom cut to multiples of {multiple}" if multiple else ""
    return f"{start}, resized by Pillow's Image.resize with Resampling.{transform.interpolation.upper()} {how}{cut}."


def _sides(size: int | tuple[int, int]) -> str:
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height}x{width}"


def _outputs(runtime: Runtime) -> dict[str, str]:
    told = {
        "score": "anomaly score, float32 (batch,)",
        "anomalous": "whether the score is above image_threshold, bool (batch,)",
        "p_value": "share of nominal images that score so high, float32 (batch,)",
        "anomaly_map": "float32 (batch, height, width), on the pixels of image, NaN where the crop has left them out; "
        "above pixel_threshold a pixel is anomalous",
    }
    return {name: told[name] for name in runtime.outputs}


def _versions() -> dict[str, str]:
    return {"pl_patchcore": pl_patchcore.__version__, "torch": torch.__version__}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _sha256_of(values: torch.Tensor) -> str:
    return hashlib.sha256(values.detach().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
