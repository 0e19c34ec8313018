"""Scores, maps and outlines -> ``report.html``, one file that a person opens in a browser, without a network.

``report.html`` beside this file is the template: its style and script are the page's own. Names of images and defects
are data of strangers: they go to the page as JSON, and its script sets them as text. A content security policy forbids
any other script, and any address outside.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

from pl_patchcore.files import whole_file
from pl_patchcore.inspection import GREY
from pl_patchcore.regions import Polygon
from pl_patchcore.report.pictures import COLOUR_MAP, colour_scale, remove_earlier

SMALL, LARGE = 320, 900  # pixels, the longer side of the pictures in the grid and in the large view
QUALITY = 80  # of JPEG
MOST_PICTURES = 500  # of anomalous images, and as many of the others
MOST_INLINE = 24 << 20  # bytes of pictures inside the page; more go into a folder beside it
TEMPLATE = Path(__file__).with_name("report.html")
COLOURS = (colormaps[COLOUR_MAP](np.arange(256))[:, :3] * 255).round().astype(np.uint8)  # (256, 3)


@dataclass(frozen=True)
class PageImage:
    """An image for the page.

    Args:
        name: Path or name; the last two parts of a path are shown.
        score: Anomaly score, finite.
        image: RGB, uint8 ``(H, W, 3)``.
        anomaly_map: float32 ``(H, W)``, NaN where the image does not count.
        outlines: Polygons, corners x and y in pixels; (0, 0) is the outer corner of the first pixel.
        mask: Ground truth, bool ``(H, W)``; None where it is not known.
        label: 0 nominal, 1 anomalous, None unknown.
        defect: Type of the defect.
        order: Its number in the data set; no two images share one.
    """

    name: str
    score: float
    image: np.ndarray
    anomaly_map: np.ndarray
    outlines: Sequence[Polygon | np.ndarray] = ()
    mask: np.ndarray | None = None
    label: int | None = None
    defect: str | None = None
    order: int = 0


@dataclass(eq=False)
class _Record:
    """What is kept of an image."""

    order: int
    shown: dict[str, Any]  # what the page's script reads
    low: float = 0.0  # range of the anomaly map
    high: float = 0.0
    pictures: dict[str, bytes] = field(default_factory=dict)  # small, large, mask: as they are shown; map: in levels


class Page:
    """Collects images and writes ``report.html``.

    Each image is encoded when it is added: to about 10 kB if it has 224 x 224 pixels, to about 150 kB if it is a photo.
    All images count in figures and histogram; pictures are kept of the 500 anomalous ones with the lowest scores, and
    of the 500 others with the highest.
    """

    def __init__(self) -> None:
        self.records: list[_Record] = []
        # images whose pictures are kept, not anomalous and anomalous ones: heaps, the first the farthest from an error
        self.kept: tuple[list[tuple[float, int, int, _Record]], ...] = ([], [])

    def add(self, item: PageImage) -> None:
        """Take an image; nothing of it but small pictures is kept."""
        shown = {
            "name": "/".join(Path(item.name).parts[-2:]),
            "score": float(item.score),
            "label": item.label,
            "defect": item.defect,
            "size": item.anomaly_map.shape[::-1],
            "outline": _path(item.outlines),
        }
        record = _Record(item.order, shown)
        if self._take(record):
            record.low, record.high, levels = _levels(item.anomaly_map)
            record.pictures = _pictures(item) | {"map": _encode(Image.fromarray(levels), "PNG")}

    def merge(self, other: Page) -> None:
        """Take the images of another page too, such as another process's."""
        for record in other.records:
            self._take(record)

    def _take(self, record: _Record) -> bool:
        """Take an image; whether its pictures are to be kept."""
        score, anomalous = record.shown["score"], record.shown["label"] == 1
        place = (-score if anomalous else score, -record.order, len(self.records), record)
        self.records.append(record)
        if len(heap := self.kept[anomalous]) < MOST_PICTURES:
            heapq.heappush(heap, place)
            return True
        farthest = heapq.heappushpop(heap, place)[-1]
        farthest.pictures = {}
        return farthest is not record

    def write(
        self,
        folder: Path,
        title: str,
        figures: Mapping[str, str],
        threshold: float | None,
        pixel_threshold: float | None,
        notes: Sequence[str] = (),
    ) -> Path:
        """Write ``report.html``, and ``report/`` beside it where the pictures are too many for one file.

        An earlier page goes first, so that a page that is there has its pictures. One colour scale serves all maps:
        that of `colour_scale`; without ``pixel_threshold`` over all values.

        Args:
            folder: Where to write.
            title: Heading.
            figures: Names and values, as they are shown.
            threshold: Of the image score; None: the page has a slider all the same, and says where it starts.
            pixel_threshold: Of the anomaly map; the outlines are taken to be those of it.
            notes: Sentences for the reader, shown above all.

        Returns:
            The page's path.
        """
        (folder / "report.html").unlink(missing_ok=True)
        remove_earlier(folder / "report", r"\d{6}-(small|large|mask|map)\.(jpg|png)")
        records = sorted(self.records, key=lambda record: record.order)
        low, high = colour_scale(pixel_threshold or 0.0)
        if not high > 0:
            low = min((record.low for record in records if record.pictures), default=0.0)
            high = max((record.high for record in records if record.pictures), default=1.0)
        pictures = [_finished(record, low, max(high, low + 1e-12)) for record in records]
        inline = sum(len(data) for each in pictures for data in each.values()) <= MOST_INLINE
        images = []
        for number, (record, each) in enumerate(zip(records, pictures, strict=True)):
            place = {kind: _place(folder, number, kind, data, inline) for kind, data in each.items()}
            images.append(record.shown | place)
        start, reason = _start(images, threshold)
        content = {
            "images": images,
            "figures": list(figures.items()),
            "notes": list(notes),
            "start": start,
            "reason": reason,
            "calibrated": threshold is not None,
            "outlined": pixel_threshold is not None,
            "scale": {"low": low, "high": high, "colours": COLOURS[:: 255 // 15].tolist()},
        }
        path = folder / "report.html"
        with whole_file(path) as partial:
            partial.write_bytes(_fill(title, content).encode("utf-8", "replace"))
        return path


def best_f1_threshold(nominal: np.ndarray, anomalous: np.ndarray) -> float:
    """Threshold, between two of the scores ``(n,)`` and ``(m,)``, m > 0, above which F1 is the best; the lowest such.

    Example:
        >>> best_f1_threshold(np.array([1.0, 2.0]), np.array([4.0, 5.0]))
        3.0
    """
    scores = np.unique(np.concatenate([nominal, anomalous]))  # ascending
    between = np.concatenate([[np.nextafter(scores[0], -np.inf)], (scores[1:] + scores[:-1]) / 2])
    caught = len(anomalous) - np.searchsorted(np.sort(anomalous), between, side="right")
    alarms = len(nominal) - np.searchsorted(np.sort(nominal), between, side="right")
    return float(between[np.argmax(2 * caught / (caught + alarms + len(anomalous)))])


def _start(images: Sequence[dict[str, Any]], threshold: float | None) -> tuple[float, str]:
    """Where the slider starts, and a sentence that says why."""
    if threshold is not None:
        return float(threshold), "The slider starts at the model's threshold."
    nominal, anomalous = ([image["score"] for image in images if image["label"] == label] for label in (0, 1))
    none = "The model has no threshold, so it gives no verdicts. The slider starts "
    if nominal and anomalous:
        start = best_f1_threshold(np.array(nominal), np.array(anomalous))
        return start, none + "where F1 on these images is best. It has seen their labels: no promise for other images."
    if nominal:
        return max(nominal), none + "at the highest score of a nominal image."
    return max((image["score"] for image in images), default=0.0), none + "at the highest score."


def _path(polygons: Sequence[Polygon | np.ndarray]) -> str:
    """Polygons as the path of an SVG."""
    return "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in polygon) + "Z" for polygon in polygons)


def _pictures(item: PageImage) -> dict[str, bytes]:
    photo = Image.fromarray(item.image)
    photo.thumbnail((LARGE, LARGE))
    pictures = {"large": _encode(photo, "JPEG")} if max(photo.size) > SMALL else {}
    photo.thumbnail((SMALL, SMALL))
    pictures["small"] = _encode(photo, "JPEG")
    if item.mask is not None:
        pictures["mask"] = _encode(Image.fromarray(_thinned(item.mask, LARGE)), "PNG")  # of one bit a pixel
    return pictures


def _thinned(values: np.ndarray, side: int) -> np.ndarray:
    """Rows and columns of ``(H, W)`` left out evenly, until neither side is longer than ``side``."""
    sides = [max(1, round(n * min(1, side / max(values.shape)))) for n in values.shape]
    rows, columns = (np.linspace(0, n - 1, m).round().astype(int) for n, m in zip(values.shape, sides, strict=True))
    thinned: np.ndarray = values[np.ix_(rows, columns)]
    return thinned


def _encode(image: Image.Image, kind: str) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, quality=QUALITY)
    return data.getvalue()


def _levels(anomaly_map: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Lowest and highest value; the map at most `SMALL` pixels large, uint8 from 1 to 255 between them, 0 for NaN."""
    small = _thinned(anomaly_map, SMALL).astype(np.float64)
    seen = np.isfinite(small)
    low, high = (float(small[seen].min()), float(small[seen].max())) if seen.any() else (0.0, 0.0)
    share = (np.where(seen, small, low) - low) / (high - low or 1.0)
    return low, high, np.where(seen, 1 + (254 * share).round(), 0).astype(np.uint8)


def _finished(record: _Record, low: float, high: float) -> dict[str, bytes]:
    """The pictures, with the map in the colours of a scale from ``low`` to ``high``."""
    if not record.pictures:
        return {}
    levels = np.asarray(Image.open(io.BytesIO(record.pictures["map"])))
    values = record.low + (np.arange(256) - 1) / 254 * (record.high - record.low)  # of each level
    table = COLOURS[np.clip(255 * (values - low) / (high - low), 0, 255).round().astype(int)]
    table[0] = GREY  # where the image does not count
    return record.pictures | {"map": _encode(Image.fromarray(table[levels]), "JPEG")}


def _place(folder: Path, number: int, kind: str, data: bytes, inline: bool) -> str:
    """Address of a picture: itself, or the name of a file that is written."""
    suffix, mime = ("png", "image/png") if kind == "mask" else ("jpg", "image/jpeg")
    if inline:
        return f"data:{mime};base64,{base64.b64encode(data).decode()}"
    name = f"report/{number:06d}-{kind}.{suffix}"
    with whole_file(folder / name) as partial:
        partial.write_bytes(data)
    return name


def _fill(title: str, content: Mapping[str, Any]) -> str:
    """The template with a title and its data, in one pass, so that neither can name a place of the other."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = template.rpartition("<script>")[2].partition("</script>")[0]
    data = json.dumps(content, allow_nan=False, separators=(",", ":"))  # ASCII
    values = {
        "TITLE": html.escape(title),
        "DATA": re.sub("[<>&]", lambda sign: f"\\u{ord(sign[0]):04x}", data),
        "SCRIPT_HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return re.sub("@(TITLE|DATA|SCRIPT_HASH)@", lambda place: values[place[1]], template)
