"""Images of any kind, a model's scores and maps -> verdicts and regions on the original image.

`PatchCore.inspect` calls `inspect`, which reads images by `preprocessing.py` and returns an `Inspection` of each.
Score and verdict are there at once; map, mask and regions are computed when they are first asked for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from pl_patchcore.anomaly_map import filled, to_original
from pl_patchcore.errors import UserError
from pl_patchcore.preprocessing import Color, ImageLike, Preprocessing, check_file, shown
from pl_patchcore.regions import Region, find_regions

BATCH = 8 * 256 * 256  # pixels that are scored at once
COLOURS = {True: (255, 40, 40), False: (40, 200, 60), None: (160, 160, 160)}  # of the verdict, RGB
OUTLINE = (255, 230, 0)  # RGB; drawn on black, to be seen on any image
GREY = (128, 128, 128)  # RGB, of what does not count
GREYED = 0.7  # share of that grey where an image does not count


@dataclass(frozen=True)
class Settings:
    """What a model's verdict depends on, and which regions count.

    Args:
        threshold: Anomaly score above which an image is anomalous; None: not known.
        pixel_threshold: Value of the anomaly map above which a pixel is; None: not known.
        least_area: Pixels of the original image below which a region is left out.

    Raises:
        UserError: If ``least_area`` is not a whole number from 1 up.
    """

    threshold: float | None = None
    pixel_threshold: float | None = None
    least_area: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.least_area, int) or isinstance(self.least_area, bool) or self.least_area < 1:
            raise UserError(f"least_area must be a whole number of pixels from 1 up, got {self.least_area!r}.")


class Inspection:
    """Score, verdict, and where in the image, on the original image's pixels.

    Several threads may use it at once. It keeps the original image for `draw`, save where that came from a file, which
    is then read again; and nothing of the model. Of a large image it holds the input's map, and what was asked for.

    Args:
        score: Anomaly score.
        anomalous: Whether it is above the threshold; None where there is none.
        p_value: Share of nominal images that score so high, of a calibrated model; else None.
        heat: Anomaly map of the model's input, float32 ``(h, w)``; NaN where the input does not count.
        original_size: Height and width of the original image, upright.
        crop_box: Part of the original that ``heat`` covers, pixels: top, left, bottom, right; None: all of it.
        original: Gives the original image, RGB.
        settings: Thresholds and least area.
        region: Which pixels of the original count, 0 or 1, ``(H, W)``; None: all.

    Attributes:
        threshold: Anomaly score above which an image is anomalous; None where the model has no threshold.
        pixel_threshold: Value of the map above which a pixel is in ``mask``; likewise.

    Example:
        >>> heat = np.array([[1, 1, 5, 1], [1, 1, 1, 1]], np.float32)
        >>> settings = Settings(threshold=3.0, pixel_threshold=3.0)
        >>> found = Inspection(4.0, True, None, heat, (2, 4), None, lambda: Image.new("RGB", (4, 2)), settings)
        >>> found.verdict, found.regions[0].box, found.regions[0].peak
        ('defect', (2, 0, 3, 1), (2, 0))
    """

    def __init__(
        self,
        score: float,
        anomalous: bool | None,
        p_value: float | None,
        heat: np.ndarray,
        original_size: tuple[int, int],
        crop_box: tuple[float, ...] | None,
        original: Callable[[], Image.Image],
        settings: Settings,
        region: np.ndarray | None = None,
    ) -> None:
        self.score, self.anomalous, self.p_value = score, anomalous, p_value
        self.threshold, self.pixel_threshold = settings.threshold, settings.pixel_threshold
        self.size, self._original, self._least_area = original_size, original, settings.least_area
        self._box = tuple(crop_box or (0.0, 0.0, *original_size))
        as_it_is = heat.shape == tuple(original_size) and self._box == (0, 0, *original_size)
        self._heat = heat if as_it_is else filled(torch.from_numpy(heat)).numpy()
        self._region = None if region is None else np.packbits(region > 0, axis=1)  # rows of bits

    @classmethod
    def of(
        cls,
        outputs: Mapping[str, Any],
        i: int,
        place: tuple[tuple[int, int], tuple[float, ...]],
        original: Callable[[], Image.Image],
        settings: Settings,
        region: Tensor | None = None,
    ) -> Inspection:
        """What was found in image ``i`` of a batch: of ``outputs`` by `PatchCore.judge`, ``place`` by `geometry`."""
        heat = outputs["anomaly_map"][i].float().cpu()
        if heat.untyped_storage().nbytes() > heat.nbytes:
            heat = heat.clone()  # free of the batch
        return cls(
            score=float(outputs["score"][i]),
            anomalous=bool(outputs["anomalous"][i]) if "anomalous" in outputs else None,
            p_value=float(outputs["p_value"][i]) if "p_value" in outputs else None,
            heat=heat.numpy(),
            original_size=place[0],
            crop_box=place[1],
            original=original,
            settings=settings,
            region=None if region is None else region.cpu().numpy(),
        )

    def __repr__(self) -> str:
        return f"<Inspection: {self.sentence}; {self.size[0]}x{self.size[1]} pixels>"

    @property
    def verdict(self) -> str | None:
        """``ok`` or ``defect``, by the image's score alone; None without a threshold."""
        return None if self.anomalous is None else ("ok", "defect")[self.anomalous]

    @property
    def sentence(self) -> str:
        """Verdict and figures in one line."""
        parts = [f"score {self.score:.4g}"]
        if self.verdict is not None:
            parts = [self.verdict, *parts, f"threshold {self.threshold:.4g}"]
        if self.p_value is not None:
            parts.append(f"p {self.p_value:.2g}")
        return ", ".join(parts)

    @cached_property
    def anomaly_map(self) -> np.ndarray:
        """Anomaly map on the original image's pixels, float32 ``(H, W)``; NaN outside of the crop and of the region."""
        return self._part(slice(0, self.size[0]), slice(0, self.size[1]))

    def map_of_size(self, height: int, width: int) -> np.ndarray:
        """Anomaly map on the original image brought to another size, for small pictures: as ``anomaly_map``.

        In a picture smaller than the input, a pixel has the highest value of those that it stands for.
        """
        down, across = height / self.size[0], width / self.size[1]
        top, left, bottom, right = self._box
        (rows, columns), heat = self._heat.shape, self._heat
        tall, wide = (bottom - top) * down, (right - left) * across  # of the input, pixels of the picture
        if (factor := int(min(rows / tall, columns / wide))) > 1:
            heat = smaller_map(heat, factor)
            tall, wide = tall * heat.shape[0] * factor / rows, wide * heat.shape[1] * factor / columns
        box = (top * down, left * across, top * down + tall, left * across + wide)
        found: np.ndarray = to_original(torch.from_numpy(heat), (height, width), box).numpy()
        return found if self._region is None else np.where(self._counts(height, width), found, np.float32(np.nan))

    def _part(self, rows: slice, columns: slice) -> np.ndarray:
        """Anomaly map on some of the original's rows and columns."""
        size = rows.stop - rows.start, columns.stop - columns.start
        top, left, bottom, right = self._box
        box = (top - rows.start, left - columns.start, bottom - rows.start, right - columns.start)
        found: np.ndarray = to_original(torch.from_numpy(self._heat), size, box).numpy()
        if self._region is None:
            return found
        counts = np.unpackbits(self._region[rows], axis=1, count=self.size[1])[:, columns].view(bool)
        return np.where(counts, found, np.float32(np.nan))

    def _counts(self, height: int, width: int) -> np.ndarray:
        """Which pixels of a picture of the original have their centre in the region, bool ``(height, width)``."""
        assert self._region is not None
        rows = ((np.arange(height) + 0.5) * (self.size[0] / height)).astype(int)
        columns = ((np.arange(width) + 0.5) * (self.size[1] / width)).astype(int)
        return np.unpackbits(self._region[rows], axis=1, count=self.size[1])[:, columns].view(bool)

    def _windows(self) -> list[tuple[slice, slice]]:
        """Rows and columns of the original outside of which nothing is above the pixel threshold, from top to bottom.

        The original's map lies between the input's values. No region lies in two windows.
        """
        if (threshold := self.pixel_threshold) is None:
            return []
        top, left, bottom, right = self._box
        found = []
        for rows, (first, last) in _spans(np.fmax.reduce(self._heat, axis=1) > threshold, top, bottom, self.size[0]):
            above = np.fmax.reduce(self._heat[first : last + 1], axis=0) > threshold
            if spans := _spans(above, left, right, self.size[1]):
                found.append((rows, slice(spans[0][0].start, spans[-1][0].stop)))
        return found

    @cached_property
    def mask(self) -> np.ndarray | None:
        """Pixels whose map is above the pixel threshold, bool ``(H, W)``; None without a threshold."""
        if self.pixel_threshold is None:
            return None
        found = np.zeros(self.size, bool)
        for window in self._windows():
            found[window] = self._part(*window) > self.pixel_threshold
        return found

    @cached_property
    def regions(self) -> list[Region]:
        """Connected regions of the mask, the largest first; may be empty for an anomalous image."""
        found = []
        for rows, columns in self._windows():
            heat = self._part(rows, columns)
            above = heat > self.pixel_threshold
            found += find_regions(heat, above, self._least_area, (columns.start, rows.start))
        return sorted(found, key=lambda region: -region.area)

    @cached_property
    def peak(self) -> tuple[int, int]:
        """Pixel of the map's highest value, ``(x, y)``."""
        return _highest(self._part(slice(0, self.size[0]), slice(0, self.size[1])))

    @property
    def original(self) -> Image.Image:
        """The original image, RGB, upright.

        Raises:
            UserError: If it is in a file that has changed since, or is gone.
        """
        return self._original()

    def picture(self, longest_side: int | None = None) -> Image.Image:
        """The original image, as `original`, greyed outside of the region; a larger one of ``longest_side`` pixels."""
        image = smaller(self.original, longest_side)
        return image if self._region is None else greyed(image, self._counts(image.height, image.width))

    def draw(self, longest_side: int | None = None) -> Image.Image:
        """Draw `picture` with the outlines of the regions found, and the verdict in a strip below it.

        Without a region the peak of the map is marked, save on an image found nominal.

        Args:
            longest_side: Pixels that a larger image is brought to, without the strip; None: as it is.

        Raises:
            UserError: As `original`.
        """
        image = self.picture(longest_side)
        scale = max(image.size) / max(self.size)
        picture = with_strip(image, self.sentence, COLOURS[self.anomalous])
        polygons = [polygon for region in self.regions for polygon in region.polygons]
        lines = [[(x * scale, y * scale) for x, y in (*polygon, polygon[0])] for polygon in polygons]
        if not lines and self.anomalous is not False:  # the map of the picture's size, as that of a large image is slow
            lines = [_ring(_highest(self.map_of_size(image.height, image.width)), max(2.0, 0.03 * max(image.size)))]
        pen, width = ImageDraw.Draw(picture), max(1, round(max(image.size) / 400))
        for thickness, colour in ((width + 2, (0, 0, 0)), (width, OUTLINE)):
            for line in lines:
                # pixels' edges to PIL's places, which are pixels' centres; not into the strip
                points = [(x - 0.5, min(y - 0.5, image.height - 1)) for x, y in line]
                pen.line(points, colour, thickness, joint="curve")
        return picture

    def to_dict(self) -> dict[str, Any]:
        """All but the pixels, as plain values that `json.dumps` takes."""
        return {
            "score": self.score,
            "threshold": self.threshold,
            "anomalous": self.anomalous,
            "verdict": self.verdict,
            "p_value": self.p_value,
            "pixel_threshold": self.pixel_threshold,
            "height": self.size[0],
            "width": self.size[1],
            "regions": [region.to_dict() for region in self.regions],
        }


def geometry(sample: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[float, ...]]:
    """Size of the original image of a sample, and the part of it that the input covers, as plain numbers."""
    height, width = sample["original_size"].tolist()
    return (height, width), tuple(sample["crop_box"].tolist())


def inspect(
    images: ImageLike | Sequence[ImageLike],
    transform: Preprocessing,
    score: Callable[[dict[str, Any]], dict[str, Tensor]],
    settings: Settings,
    color: Color = "rgb",
) -> Inspection | list[Inspection]:
    """Inspect images of any kind and size; neighbours of one size are scored together.

    Args:
        images: One, or a sequence of them; see `preprocessing.read_image`.
        transform: Preprocessing of the model.
        score: A batch of images of one size, on the CPU, as `Preprocessing.apply` makes samples, to ``score (B,)``,
            ``anomaly_map (B, H, W)`` and, as far as they are known, ``anomalous (B,)`` and ``p_value (B,)``.
        settings: Thresholds and least area.
        color: Order of the channels of arrays and tensors.

    Returns:
        An inspection, or a list of them for a sequence.

    Raises:
        UserError: If an image is of no kind that is read, naming its place in the sequence.
    """
    several = isinstance(images, Sequence) and not isinstance(images, str | bytes)
    listed: Sequence[Any] = images if several else [images]  # type: ignore[assignment]
    found: list[Inspection] = []
    waiting: list[tuple[dict[str, Tensor], Callable[[], Image.Image]]] = []
    for number, image in enumerate(tqdm(listed, "Inspecting", delay=2, leave=False, unit=" images")):
        try:
            sample, original = _prepare(image, transform, color)
        except UserError as error:
            raise UserError(f"images[{number}]: {error}") if several else error from None
        shape = sample["image"].shape
        if waiting and (waiting[0][0]["image"].shape != shape or (len(waiting) + 1) * shape[1] * shape[2] > BATCH):
            found += _score(waiting, score, settings)
            waiting = []
        waiting.append((sample, original))
    if waiting:
        found += _score(waiting, score, settings)
    return found if several else found[0]


def _prepare(
    image: ImageLike, transform: Preprocessing, color: Color
) -> tuple[dict[str, Tensor], Callable[[], Image.Image]]:
    """An image as a sample, and what gives the original again."""
    if isinstance(image, str | os.PathLike):
        path = Path(image).absolute()
        check_file(path)
        original = partial(_read_again, path, transform, _state(path))
        return transform.apply(transform.read(path), path=path), original
    read = transform.read(image, color)
    return transform.apply(read), read.copy


def _score(
    waiting: list[tuple[dict[str, Tensor], Callable[[], Image.Image]]],
    score: Callable[[dict[str, Any]], dict[str, Tensor]],
    settings: Settings,
) -> Iterator[Inspection]:
    batch: dict[str, Any] = {name: [sample[name] for sample, _ in waiting] for name in waiting[0][0]}
    with torch.inference_mode():
        for name in batch.keys() - {"region"}:  # alone, a large image is not copied
            batch[name] = torch.stack(batch[name]) if len(waiting) > 1 else batch[name][0][None]
        outputs = {name: value.cpu() for name, value in score(batch).items()}
    for i, (sample, original) in enumerate(waiting):
        yield Inspection.of(outputs, i, geometry(sample), original, settings, sample.get("region"))


def _read_again(path: Path, transform: Preprocessing, state: tuple[int, int]) -> Image.Image:
    """The image of a file, if that is as it was."""
    check_file(path)
    if _state(path) != state:
        raise UserError(f"{shown(path)}: has changed since it was inspected; inspect it again.")
    return transform.read(path)


def _state(path: Path) -> tuple[int, int]:
    """Time of a file's last change, nanoseconds, and its size, bytes."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def smaller(image: Image.Image, longest_side: int | None) -> Image.Image:
    """An image with at most so many pixels on its longest side; None: as it is.

    Example:
        >>> smaller(Image.new("RGB", (300, 100)), 30).size
        (30, 10)
    """
    if longest_side is None or max(image.size) <= longest_side:
        return image
    scale = longest_side / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def smaller_map(heat: np.ndarray, factor: int) -> np.ndarray:
    """Highest value, NaN left out, of each block of ``factor`` x ``factor`` places; the last blocks may be smaller.

    Example:
        >>> smaller_map(np.array([[1, 5, np.nan], [2, 3, np.nan]]), 2)
        array([[ 5., nan]])
    """
    starts = [np.arange(0, n, factor) for n in heat.shape]
    found: np.ndarray = np.fmax.reduceat(np.fmax.reduceat(heat, starts[0], axis=0), starts[1], axis=1)
    return found


def greyed(image: Image.Image, counts: np.ndarray) -> Image.Image:
    """An image RGB, grey and pale where it does not count; ``counts`` is bool ``(H, W)``."""
    pale = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, GREY), GREYED)
    return Image.composite(image, pale, Image.fromarray(counts))


def with_strip(image: Image.Image, text: str, colour: tuple[int, int, int] = COLOURS[None]) -> Image.Image:
    """An image with a line of text in a strip below it, as large as fits; images of one size get equal strips."""
    size = max(10, round(max(image.size) / 30))
    strip, font = round(1.5 * size), ImageFont.load_default(size)
    if (length := font.getlength(f" {text} ")) > image.width:
        font = ImageFont.load_default(max(6.0, size * image.width / length))
    picture = Image.new("RGB", (image.width, image.height + strip))
    picture.paste(image)
    ImageDraw.Draw(picture).text((3, image.height + strip / 2), text, colour, font, anchor="lm")
    return picture


def _highest(heat: np.ndarray) -> tuple[int, int]:
    """Pixel of the highest value, ``(x, y)``, NaN left out; the first of several."""
    y = int(np.nanargmax(np.fmax.reduce(heat, axis=1)))
    return int(np.nanargmax(heat[y])), y


def _spans(above: np.ndarray, low: float, high: float, pixels: int) -> list[tuple[slice, tuple[int, int]]]:
    """Runs of the original's rows, or columns, that places of the input ``above (n,)`` reach; each apart from the next.

    The input lies from ``low`` to ``high`` of ``pixels``. With each run come the first and last of its places.
    """
    step, found = (high - low) / len(above), list[tuple[slice, tuple[int, int]]]()
    for place in np.flatnonzero(above).tolist():  # between the centres of the neighbours, a pixel added at each end
        start = max(0, math.floor(low + (place - 0.5) * step) - 1)
        stop = min(pixels, math.ceil(low + (place + 1.5) * step) + 1)
        if found and start <= found[-1][0].stop:
            before, (first, _) = found.pop()
            found.append((slice(before.start, max(before.stop, stop)), (first, place)))
        elif start < stop:
            found.append((slice(start, stop), (place, place)))
    return found


def _ring(centre: tuple[int, int], radius: float) -> list[tuple[float, float]]:
    """A circle around a pixel."""
    angles = np.linspace(0, 2 * np.pi, 25)
    x, y = centre[0] + 0.5 + radius * np.cos(angles), centre[1] + 0.5 + radius * np.sin(angles)
    return list(zip(x.tolist(), y.tolist(), strict=True))
