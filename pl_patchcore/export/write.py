"""A fitted model -> a file that runs without this package, compared with the model; what is known of it as JSON."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

import pl_patchcore
from pl_patchcore.anomaly_map import peaks
from pl_patchcore.errors import UserError
from pl_patchcore.export import onnx_file, openvino_file, parity, torch_file
from pl_patchcore.export.geometry import Frame, both, sides
from pl_patchcore.export.options import FileOptions, check_exportable
from pl_patchcore.export.rows import FileDtype, Rows
from pl_patchcore.export.runtime import Runtime
from pl_patchcore.files import whole_file

if TYPE_CHECKING:
    from pl_patchcore.patchcore import PatchCore

log = logging.getLogger(__name__)
KINDS: dict[str, ModuleType] = {"onnx": onnx_file, "openvino": openvino_file, "torch": torch_file}
FORMATS = {"onnx": (".onnx",), "openvino": (".xml", ".bin"), "torch": (".pt2",)}  # name: endings of its files
SCORING = ("num_neighbors", "distance", "reweighting_neighbors", "sigma", "image_score", "top_share")


def export(
    module: PatchCore,
    path: str | Path,
    format: str = "onnx",
    data: str | Path | Sequence[str | Path] | None = None,
    checkpoint: str | Path | None = None,
    options: FileOptions | None = None,
    calibration: str | Path | Sequence[str | Path] | None = None,
) -> dict[str, Any]:
    """Write a fitted model as a file that runs without this package, and compare the file with the model.

    Args:
        module: The fitted model, on the CPU.
        path: The file; beside it, ``.json`` added to its name, goes what is known of it.
        format: ``onnx``; ``openvino``, whose weights go to a ``.bin`` beside the file; ``torch``, of ``torch.export``.
        data: Folder of images, or image files, to compare with; None: noise alone.
        checkpoint: File that the model is from, whose hash is noted.
        options: What the file is to be like; None: as the model.
        calibration: Folder of nominal images that are not in the memory bank, or image files: what the file itself
            scores them sets its thresholds, but for those set by hand; None: it has the model's.

    Returns:
        What is known of the file, as it stands in it and beside it.

    Raises:
        UserError: If a package is missing, the model is not one that can be exported, or the file differs from it.
    """
    options = FileOptions() if options is None else options
    if format not in FORMATS:
        raise UserError(f"format must be {', '.join(FORMATS)}, got {format!r}.")
    path = Path(path)
    if path.suffix != FORMATS[format][0]:
        raise UserError(f"{path}: the name of a file of {format} ends with {FORMATS[format][0]}.")
    if options.precision != "float32" and format != "openvino":
        raise UserError(f"format {format} runs in float32 on the CPU, not in {options.precision}; openvino does.")
    kind, taken = KINDS[format], (module.transform, options.image_size)
    files, nominal = parity.image_files(data, "compare", *taken), parity.image_files(calibration, "calibrate", *taken)
    if (changed := options.changes(module.transform)) and not files:
        raise UserError(
            f"{' and '.join(changed)} changes scores; give images of the real scene, --data, to measure it."
        )
    versions = onnx_file.require(kind.PACKAGES, format)
    job = _Job(module, kind, options, files, nominal, checkpoint)
    with ExitStack() as made:
        partial = [made.enter_context(whole_file(path.with_suffix(ending))) for ending in FORMATS[format]]
        told = job.written(partial)
        told["versions"] = {"pl_patchcore": pl_patchcore.__version__, "torch": torch.__version__} | versions
        kind.tell({name: v if isinstance(v, str) else json.dumps(v) for name, v in told.items()}, *partial)
        if options.parity_file:
            beside = made.enter_context(whole_file(path.with_name(f"{path.name}.npz")))
            with beside.open("wb") as file:
                examples = parity.examples(job.by_model(), job.runtime, files)
                np.savez_compressed(file, allow_pickle=False, **examples)
    with whole_file(path.with_name(f"{path.name}.json")) as beside:
        beside.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    size = sum(path.with_suffix(ending).stat().st_size for ending in FORMATS[format])
    log.info("export: %s, %.1f MB; %s", path, size / 1e6, _sentence(told))
    return told


@dataclass
class _Job:
    """One export: the model as it will be in the file, and as it is."""

    module: PatchCore
    kind: ModuleType
    options: FileOptions
    files: list[Path]
    nominal: list[Path]  # images by which the file is calibrated; none: it keeps the model's thresholds
    checkpoint: str | Path | None
    look_up: bool = False

    def __post_init__(self) -> None:
        self.transform, dtype = self.module.transform, self.options.bank_dtype
        if self.options.resize_in_file:
            self.transform = replace(self.transform, resize_by="tensors")
        check_exportable(self.module.model, self.transform, self.options)
        self.in_file = self.module if dtype == "float32" else _with_bank(self.module, dtype)
        self.runtime = self._runtime()

    def _runtime(self) -> Runtime:
        frame = Frame(self.transform, self.options.image_size)
        return Runtime(self.in_file.model, frame, self.options.bank_dtype, self.options.map_at, self.look_up).eval()

    def _run(self, partial: Sequence[Path]) -> onnx_file.Run:
        """Run the file as it is meant to be run."""
        if self.options.precision != "float32":
            return openvino_file.session(partial[0], partial[1], self.options.precision)
        run: onnx_file.Run = self.kind.session(*partial)
        return run

    def written(self, partial: Sequence[Path]) -> dict[str, Any]:
        """Write the graph, calibrate the file, and compare it with the model; what is known of it."""
        try:
            found = self._compared(partial)
        except parity.Differs as error:
            log.info("%s Once more, by a search that is slower and tells smaller distances.", error)
            self.look_up = True
            self.runtime = self._runtime()
            found = self._compared(partial)
        if self.nominal:
            self._calibrate(partial)
            found = self._compared(partial)
        told = self._told() | {"parity": found, "precision": self.options.precision}
        if not (changed := self.options.changes(self.module.transform)):
            return told
        own = parity.by_model(self.module, self.module.transform, self.runtime)
        change = parity.changes(self._run(partial), own, self.runtime, self.files)
        limit = self.options.max_score_change
        if limit is not None and not change["score_change_max"] <= limit:
            raise UserError(
                f"{' and '.join(changed)} changes a score by {change['score_change_max']:.2g} of it, and "
                f"max_score_change is {limit:g}; the file is not kept."
            )
        return told | {"changed_by": changed, "change": change}

    def _calibrate(self, partial: Sequence[Path]) -> None:
        """Set the thresholds by what the written file scores nominal images."""
        run, found = self._run(partial), list[tuple[float, float]]()
        for path in tqdm(self.nominal, "Calibrating the file", delay=2, leave=False, unit=" images"):
            outputs = parity.ran(run, [parity.levels_of(path, self.runtime)], str(path))
            found.append((float(outputs["score"][0]), float(peaks(torch.from_numpy(outputs["anomaly_map"])))))
        self.in_file = copy.deepcopy(self.in_file)
        self.in_file.model.calibration.fill(*torch.tensor(found, dtype=torch.float32).unbind(1))
        self.in_file.model.calibration.tell("images")
        self.runtime = self._runtime()

    def _compared(self, partial: Sequence[Path]) -> dict[str, Any]:
        log.info("export: recording the graph (half a minute for a large backbone).")
        self.kind.write(self.runtime, *partial)
        files = [*self.files, *self.nominal[: parity.EXAMPLES]]  # some, to see whether rows must be looked up
        log.info("export: comparing the file with the model on noise and %d images.", len(files))
        return parity.compare(self.kind.session(*partial), self.by_model(), self.runtime, files)

    def by_model(self) -> parity.ByModel:
        """What the model as it is in the file says."""
        return parity.by_model(self.in_file, self.transform, self.runtime)

    def _told(self) -> dict[str, Any]:
        """What is known of the file beside how far it is from its model, as plain values."""
        model, calibration, runtime = self.module.model, self.in_file.model.calibration, self.runtime
        known = {
            "input": _input(runtime),
            "outputs": _outputs(runtime),
            "image_threshold": calibration.image_threshold,
            "pixel_threshold": calibration.pixel_threshold,
            "false_alarm_rate": calibration.false_alarm_rate if len(calibration.scores) else None,
            "calibration_images": len(calibration.scores),
            "thresholds_by_hand": sorted(calibration.by_hand),
            "preprocessing": runtime.frame.transform.as_dict(),
            "rows_looked_up": all(member.look_up for member in runtime.members),
            "resize_in_file": not runtime.frame.ready,
            "size": runtime.size,
            "map_at": runtime.map_at,
            "bank_dtype": self.options.bank_dtype,
            "model": model.identity,
            "scoring": [{name: getattr(member.scorer, name) for name in SCORING} for member in model.members],
            "bank": [member.bank_shape for member in model.members],
            "bank_sha256": [_sha256_of(member.memory_bank.features) for member in model.members],
            "checkpoint_sha256": None if self.checkpoint is None else _sha256_of_file(Path(self.checkpoint)),
            "calibrated_by": "file" if self.nominal else "model",
        }
        plain: dict[str, Any] = json.loads(json.dumps(known))
        return plain


def _with_bank(module: PatchCore, dtype: FileDtype) -> PatchCore:
    """A copy of a model whose memory bank's rows are rounded."""
    copied = copy.deepcopy(module)
    for member in copied.model.members:
        bank = member.memory_bank
        rows, (height, width) = Rows(bank.features, dtype).rounded(), bank.grid.tolist()
        bank.features = rows[:0]  # whose type it keeps
        bank.fill(rows, bank.radii, bank.images, bank.places, (height, width))
    return copied


def _sentence(told: dict[str, Any]) -> str:
    """How far a file is from its model, for the log."""
    parity, change = told["parity"], told.get("change")
    if change is None:
        return (
            f"scores differ from the model's by at most {parity['score_difference']:.1g} of them, maps by "
            f"{parity['map_difference']:.1g}, verdicts by the file's threshold do not."
        )
    return (
        f"{' and '.join(told['changed_by'])} changes scores by {change['score_change_median']:.2g} of them in the "
        f"median, by {change['score_change_max']:.2g} at most, and {change['changed_verdicts']} of {change['images']} "
        "verdicts by the file's threshold."
    )


def _input(runtime: Runtime) -> str:
    """The input expected, in one sentence."""
    transform, size = runtime.frame.transform, runtime.size
    shape = "height, width" if size is None else f"{size[0]}, {size[1]}"
    start, crop = f"image: RGB levels, uint8 (batch, {shape}, 3), upright", transform.crop
    if transform.resize is None or not runtime.frame.ready:
        least = transform.size if transform.resize is None and crop is not None else None
        return f"{start}, as a camera gives them{f', of at least {sides(least)} pixels' if least else ''}."
    resize = both(transform.resize)
    how = {
        "squash": f"to {sides(resize)} pixels (height x width), whatever their shape",
        "shorter_side": f"so that the shorter side has {resize[0]} pixels, the other rounded down",
    }[transform.resize_mode]
    cut = "" if crop is None else f", then the middle {sides(both(crop))} pixels cut out"
    cut += f", right and bottom cut to multiples of {transform.crop_multiple}" if transform.crop_multiple else ""
    return f"{start}, resized by Pillow's Image.resize with Resampling.{transform.interpolation.upper()} {how}{cut}."


def _outputs(runtime: Runtime) -> dict[str, str]:
    where = "image" if runtime.map_at == "image" else "the network's input"
    told = {
        "score": "anomaly score, float32 (batch,)",
        "anomalous": "whether the score is above image_threshold, bool (batch,)",
        "p_value": "share of nominal images that score so high, float32 (batch,)",
        "anomaly_map": f"float32 (batch, height, width), on the pixels of {where}, NaN where they do not count; above "
        "pixel_threshold a pixel is anomalous",
    }
    return {name: told[name] for name in runtime.outputs}


def _sha256_of(values: torch.Tensor) -> str:
    return hashlib.sha256(values.detach().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
