"""File, model, images -> how far the file's answers differ from the model's; more than stated is refused.

Each image is scored alone, and in a batch of three with its mirror images; so is noise of several sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pl_patchcore.calibration import p_values
from pl_patchcore.counted import Counted
from pl_patchcore.data.files import IMAGE_SUFFIXES, is_folder, list_images
from pl_patchcore.errors import UserError
from pl_patchcore.export.geometry import sides
from pl_patchcore.export.onnx_file import Run
from pl_patchcore.export.runtime import Runtime
from pl_patchcore.inspection import Settings, inspect
from pl_patchcore.preprocessing import Preprocessing, check_image

if TYPE_CHECKING:
    from pl_patchcore.patchcore import PatchCore

SCORE_TOLERANCE = 1e-4  # of a score, relative to it
MAP_TOLERANCE = 1e-3  # of a pixel, relative to the map's highest value
LEAST_SCORE = 0.01  # share of what noise scores; below it, differences count relative to that
LEAST_PEAK = 0.1  # the same of maps, whose small values float32 tells less well
TINY = float(np.finfo(np.float32).tiny)  # where all scores are 0
SIDES = ((64, 96), (161, 97), (40, 333), (512, 384))  # pixels of noise, where any size will do
EXAMPLES = 3  # image files in a parity file


class Expected(NamedTuple):
    """What a model says of an image."""

    score: float
    anomalous: bool | None
    anomaly_map: np.ndarray  # float32 (H, W)


ByModel = Callable[[list[np.ndarray]], list[Expected]]


class Differs(UserError):
    """A file's answers are not the model's."""


def noise(runtime: Runtime) -> Iterator[np.ndarray]:
    """Images uint8 ``(H, W, 3)`` of noise, of each size that is tried."""
    rng, sizes = np.random.default_rng(0), list(SIDES)
    if runtime.size is not None:
        sizes = [runtime.size] * 2
    elif runtime.frame.transform.resize is None:
        sizes = [runtime.size_beyond(size) for size in SIDES]
    for size in sizes:
        yield rng.integers(0, 256, (*size, 3), dtype=np.uint8)


def image_files(
    given: str | Path | Sequence[str | Path] | None,
    purpose: str,
    transform: Preprocessing,
    size: tuple[int, int] | None = None,
) -> list[Path]:
    """Image files that an export is given, those of a folder among them.

    Args:
        given: A folder or a file, or several; None: none.
        purpose: What they are for, such as ``compare``.
        transform: Preprocessing of the model.
        size: Height and width that they must have; None: any.

    Raises:
        UserError: If there is none, one is missing, no image, or of a size that cannot be.
    """
    if given is None:
        return []
    files, remedy = list[Path](), f"give images of any of {', '.join(IMAGE_SUFFIXES)} to {purpose} with"
    for path in map(Path, [given] if isinstance(given, str | Path) else given):
        files += list_images(path, remedy, recursive=True) if is_folder(path) else [path]
    if not files:
        raise UserError(f"there is no image to {purpose} with; give a folder of images, or image files.")
    for file in files:
        found = check_image(file, transform.bits, transform.max_pixels).size
        if size is not None and found != size:
            raise UserError(f"{file}: has {sides(found)} pixels, and image_size is {sides(size)}.")
        try:
            transform.geometry(*found)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
    return files


def levels_of(path: Path, runtime: Runtime) -> np.ndarray:
    """An image file as the exported file takes it, uint8 ``(H, W, 3)``.

    Raises:
        UserError: If it cannot be read, or has another size than the file takes.
    """
    transform = runtime.frame.transform
    image = transform.read(path)
    if runtime.frame.ready:
        return replace(transform, levels=True).apply(image)["image"].permute(1, 2, 0).contiguous().numpy()
    levels = np.array(image)
    if runtime.size is not None and levels.shape[:2] != runtime.size:
        raise UserError(f"{path}: has {sides(levels.shape)} pixels, and this model takes {sides(runtime.size)}.")
    return levels


def ran(run: Run, images: list[np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Outputs of a file for images of one size, by name.

    Raises:
        UserError: If the file does not run on them; it names what they are.
    """
    try:
        return run(np.stack(images))
    except Exception as error:  # of the runtime's many kinds
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the exported file does not run on {name} ({reason}); it is not kept.") from error


def by_model(module: PatchCore, transform: Preprocessing, runtime: Runtime) -> ByModel:
    """Inspect what a file takes, by a model and its preprocessing of images as a camera gives them."""
    if runtime.frame.ready:
        transform = replace(transform, resize=None, crop=None, crop_multiple=None)
    settings = Settings(module.image_threshold, module.pixel_threshold)

    def judged(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return module.judge(batch["image"], Counted.of(batch))

    def on_image(images: list[np.ndarray]) -> list[Expected]:
        found = inspect(images, transform, judged, settings)
        assert isinstance(found, list)
        return [Expected(each.score, each.anomalous, each.anomaly_map) for each in found]

    def on_input(images: list[np.ndarray]) -> list[Expected]:
        samples = [transform.apply(Image.fromarray(image)) for image in images]
        with torch.inference_mode():
            outputs = judged({name: torch.stack([sample[name] for sample in samples]) for name in samples[0]})
        verdicts = outputs["anomalous"].tolist() if "anomalous" in outputs else [None] * len(images)
        return list(map(Expected, outputs["score"].tolist(), verdicts, outputs["anomaly_map"].numpy()))

    return on_image if runtime.map_at == "image" else on_input


def changes(run: Run, expected: ByModel, runtime: Runtime, files: Sequence[Path]) -> dict[str, Any]:
    """How far a file's answers for image files are from a model that it is not to equal exactly.

    Returns:
        Plain values: changes of scores as shares of the score, of maps as shares of their highest value; verdicts that
        differ, all by the file's threshold.
    """
    scores, maps, verdicts, threshold = list[float](), list[float](), 0, runtime.verdict.threshold
    for path in tqdm(files, "Comparing the file with the model's own way", delay=2, leave=False, unit=" images"):
        image = levels_of(path, runtime)
        (theirs,), found = expected([image]), {key: each[0] for key, each in ran(run, [image], str(path)).items()}
        scores.append(abs(float(found["score"]) - theirs.score) / max(abs(theirs.score), TINY))
        away = np.abs(found["anomaly_map"] - theirs.anomaly_map)
        maps.append(float(np.nanmax(away) / max(np.nanmax(theirs.anomaly_map), TINY)))
        verdicts += threshold is not None and bool(found["anomalous"]) != (theirs.score > threshold)
    return {
        "images": len(files),
        "score_change_median": float(np.median(scores)),
        "score_change_max": max(scores),
        "map_change_median": float(np.median(maps)),
        "map_change_max": max(maps),
        "changed_verdicts": verdicts,
    }


def examples(expected: ByModel, runtime: Runtime, files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Images, of noise and of the first files, and what the model says of them: arrays by name, numbered.

    Example of the names: ``image_0`` uint8 ``(H, W, 3)``, ``score_0``, ``anomaly_map_0``, ``anomalous_0``.
    """
    images, found = [*noise(runtime), *(levels_of(path, runtime) for path in files[:EXAMPLES])], dict[str, np.ndarray]()
    for i, image in enumerate(images):
        (theirs,) = expected([image])
        values = {"image": image} | theirs._asdict()
        found |= {f"{name}_{i}": np.asarray(value) for name, value in values.items() if value is not None}
    return found


def compare(run: Run, expected: ByModel, runtime: Runtime, files: Sequence[Path]) -> dict[str, Any]:
    """Run a file and the model on noise and on image files.

    Returns:
        How many images were compared, and the largest differences, as plain values.

    Raises:
        Differs: If they differ by more than the tolerances.
    """
    drawn, found = list(noise(runtime)), list[tuple[float, float]]()
    scale = max(each.score for image in drawn for each in expected([image]))
    images = chain(
        ((f"noise of {sides(image.shape)} pixels", image) for image in drawn),
        ((str(file), levels_of(file, runtime)) for file in files),
    )
    how: dict[str, Any] = {"total": len(drawn) + len(files), "delay": 2, "leave": False, "unit": " images"}
    for name, image in tqdm(images, "Comparing the file with the model", **how):
        found += _compared(run, expected, runtime, name, image, scale)
    return {
        "images": len(files),
        "noise": [sides(image.shape) for image in drawn],
        "batches": [1, 3],
        "score_difference": max(score for score, _ in found),
        "score_tolerance": SCORE_TOLERANCE,
        "map_difference": max(pixel for _, pixel in found),
        "map_tolerance": MAP_TOLERANCE,
        "changed_verdicts": 0,
    }


def _compared(
    run: Run, expected: ByModel, runtime: Runtime, name: str, image: np.ndarray, scale: float
) -> list[tuple[float, float]]:
    """Compare an image alone and in a batch: differences of scores and maps; refuse what differs too much."""
    batch = [image, np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(image[::-1])]
    theirs, found = expected(batch), list[tuple[float, float]]()
    for part in (batch[:1], batch):
        outputs = ran(run, part, name)
        for i in range(len(part)):
            of_one = {key: value[i] for key, value in outputs.items()}
            score, pixel, reason = _difference(of_one, theirs[i], runtime, scale)
            if reason:
                raise Differs(f"the exported file differs from the model on {name}: {reason}; it is not kept.")
            found.append((score, pixel))
    return found


def _difference(
    outputs: dict[str, np.ndarray], expected: Expected, runtime: Runtime, scale: float
) -> tuple[float, float, str]:
    """How far a file's outputs for an image are from the model's.

    Returns:
        Difference of the score, as a share of it; the map's largest, as a share of its highest value, both beside
        ``scale``, the score of noise; why that is too much, empty if it is not. NaN is.
    """
    if list(outputs) != runtime.outputs:
        return np.inf, np.inf, f"its outputs are {', '.join(outputs)}"
    score, heat, verdict = float(outputs["score"]), outputs["anomaly_map"], runtime.verdict
    away = abs(score - expected.score) / max(abs(expected.score), LEAST_SCORE * scale, TINY)
    theirs = expected.anomaly_map
    if heat.shape != theirs.shape or (np.isnan(heat) != np.isnan(theirs)).any():
        return away, np.inf, "its map counts other pixels"
    peak = max(float(np.nanmax(np.abs(theirs))), LEAST_PEAK * scale, TINY)
    pixel, reason = float(np.nanmax(np.abs(heat - theirs))) / peak, ""
    if verdict.threshold is not None:
        near = abs(expected.score - verdict.threshold) <= SCORE_TOLERANCE * verdict.threshold
        if bool(outputs["anomalous"]) != expected.anomalous and not near:
            reason = "its verdict is another"
    if not pixel <= MAP_TOLERANCE:
        reason = f"its map by {pixel:.2g} of the highest value, and {MAP_TOLERANCE:g} is allowed"
    if not away <= SCORE_TOLERANCE:
        reason = f"its score by {away:.2g} of it, and {SCORE_TOLERANCE:g} is allowed"
    if verdict.calibrated:
        own = float(p_values(torch.tensor([score], dtype=torch.float32), verdict.scores)[0])
        if not abs(float(outputs["p_value"]) - own) <= SCORE_TOLERANCE:
            reason = f"its p-value is {float(outputs['p_value']):.4g} for {own:.4g}"
    return away, pixel, reason
