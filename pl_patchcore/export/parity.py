"""File, model, images -> how far the file's answers differ from the model's; more than stated is refused.

Each image is scored alone, and in a batch of three with its mirror images; so is noise of several sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
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
from pl_patchcore.export.onnx_file import Run
from pl_patchcore.export.runtime import MapAt, Runtime
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


class Difference(NamedTuple):
    """How far one answer of a file is from the model's."""

    score: float  # share of the score
    pixel: float  # largest of the map, share of the map's highest value
    verdict: bool  # whether it is another one, of a score farther from the threshold than the tolerance
    wrong: str  # what else is wrong; empty: nothing


def noise(runtime: Runtime) -> Iterator[np.ndarray]:
    """Images uint8 ``(H, W, 3)`` of noise, of each size that is tried."""
    rng = np.random.default_rng(0)
    given, transform = runtime.size, runtime.frame.transform
    sizes: Iterable[Any] = SIDES
    if given is not None:
        sizes = [given] * 2
    elif transform.resize is None:  # no smaller than the crop, and what the network takes
        step = runtime.multiple
        least = transform.size or (0, 0)
        sizes = [[-(-(side + low) // step) * step for side, low in zip(each, least, strict=True)] for each in SIDES]
    for size in sizes:
        yield rng.integers(0, 256, (*size, 3), dtype=np.uint8)


def image_files(
    given: str | Path | Sequence[str | Path] | None,
    purpose: str,
    transform: Preprocessing,
    size: tuple[int, int] | None = None,
) -> list[Path]:
    """Image files that an export is given, those of a folder.

    Args:
        given: A folder, a file, or files; None: none.
        purpose: What they are for, such as ``compare``.
        transform: Preprocessing of the model.
        size: Height and width that they must have; None: any.

    Raises:
        UserError: If there is none, one is missing, no image, or of a size that cannot be.
    """
    if given is None:
        return []
    if isinstance(given, str | Path) and is_folder(Path(given)):
        files = list_images(Path(given), f"give images of any of {', '.join(IMAGE_SUFFIXES)} to {purpose} with", True)
    else:
        files = [Path(each) for each in ([given] if isinstance(given, str | Path) else given)]
    if not files:
        raise UserError(f"there is no image to {purpose} with; give a folder of images, or image files.")
    for file in files:
        found = check_image(file, transform.bits, transform.max_pixels).size
        if size is not None and found != size:
            raise UserError(f"{file}: has {_sides(found)} pixels, and image_size is {_sides(size)}.")
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
        raise UserError(f"{path}: has {_sides(levels.shape)} pixels, and this model takes {_sides(runtime.size)}.")
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
    """Inspect what a file takes, by a model.

    Args:
        module: The model.
        transform: Preprocessing of images as a camera gives them.
        runtime: What the file is of.
    """
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

    ways: dict[MapAt, ByModel] = {"image": on_image, "input": on_input}
    return ways[runtime.map_at]


def changes(run: Run, expected: ByModel, runtime: Runtime, files: Sequence[Path]) -> dict[str, Any]:
    """How far a file's answers for image files are from a model that it is not to equal exactly.

    Args:
        run: Runs the file.
        expected: Inspects images by that model.
        runtime: What the file is of.
        files: Image files.

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

    Args:
        run: Runs the file.
        expected: Inspects images by the model.
        runtime: What the file is of.
        files: Image files.

    Returns:
        How many images were compared, and the largest differences, as plain values.

    Raises:
        Differs: If they differ by more than the tolerances.
    """
    drawn, found = list(noise(runtime)), list[Difference]()
    scale = max(each.score for image in drawn for each in expected([image]))
    every: list[np.ndarray | Path] = [*drawn, *files]
    for image in tqdm(every, "Comparing the file with the model", delay=2, leave=False, unit=" images"):
        if isinstance(image, Path):
            found += _compared(run, expected, runtime, str(image), levels_of(image, runtime), scale)
        else:
            found += _compared(run, expected, runtime, f"noise of {_sides(image.shape)} pixels", image, scale)
    return {
        "images": len(files),
        "noise": [_sides(image.shape) for image in drawn],
        "batches": [1, 3],
        "score_difference": max(each.score for each in found),
        "score_tolerance": SCORE_TOLERANCE,
        "map_difference": max(each.pixel for each in found),
        "map_tolerance": MAP_TOLERANCE,
        "changed_verdicts": 0,
    }


def _sides(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _compared(
    run: Run, expected: ByModel, runtime: Runtime, name: str, image: np.ndarray, scale: float
) -> list[Difference]:
    """Compare an image alone and in a batch; refuse what differs too much."""
    batch = [image, np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(image[::-1])]
    theirs, found = expected(batch), list[Difference]()
    for part in (batch[:1], batch):
        outputs = ran(run, part, name)
        for i in range(len(part)):
            of_one = {key: value[i] for key, value in outputs.items()}
            found.append(difference(of_one, theirs[i], runtime, scale))
            reason = _too_far(found[-1])
            if reason:
                raise Differs(f"the exported file differs from the model on {name}: {reason}; it is not kept.")
    return found


def difference(outputs: dict[str, np.ndarray], expected: Expected, runtime: Runtime, scale: float) -> Difference:
    """Compare the outputs for one image with the model's.

    Args:
        outputs: By name, without the batch.
        expected: What the model says.
        runtime: What the file is of.
        scale: Score of noise.
    """
    if list(outputs) != runtime.outputs:
        return Difference(np.inf, np.inf, False, f"its outputs are {', '.join(outputs)}")
    score, heat, verdict = float(outputs["score"]), outputs["anomaly_map"], runtime.verdict
    away = abs(score - expected.score) / max(abs(expected.score), LEAST_SCORE * scale, TINY)
    theirs = expected.anomaly_map
    if heat.shape != theirs.shape or (np.isnan(heat) != np.isnan(theirs)).any():
        return Difference(away, np.inf, False, "its map counts other pixels")
    peak = max(float(np.nanmax(np.abs(theirs))), LEAST_PEAK * scale, TINY)
    pixel = float(np.nanmax(np.abs(heat - theirs))) / peak
    changed, wrong = False, ""
    if verdict.threshold is not None:
        near = abs(expected.score - verdict.threshold) <= SCORE_TOLERANCE * verdict.threshold
        changed = bool(outputs["anomalous"]) != expected.anomalous and not near
    if verdict.calibrated:
        own = float(p_values(torch.tensor([score], dtype=torch.float32), verdict.scores)[0])
        if not abs(float(outputs["p_value"]) - own) <= SCORE_TOLERANCE:
            wrong = f"its p-value is {float(outputs['p_value']):.4g} for {own:.4g}"
    return Difference(away, pixel, changed, wrong)


def _too_far(found: Difference) -> str:
    """Why a difference is too large; empty if it is not. NaN is."""
    if found.wrong:
        return found.wrong
    if not found.score <= SCORE_TOLERANCE:
        return f"its score by {found.score:.2g} of it, and {SCORE_TOLERANCE:g} is allowed"
    if not found.pixel <= MAP_TOLERANCE:
        return f"its map by {found.pixel:.2g} of the highest value, and {MAP_TOLERANCE:g} is allowed"
    return "its verdict is another" if found.verdict else ""
