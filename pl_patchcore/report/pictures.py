"""Anomaly maps as pictures: image, mask, map and overlay side by side.

Only the images a report shows are kept while the test runs, and of large ones what is shown. Of a model with thresholds
a colour means the same in every picture (`colour_scale`). Where a map is NaN the image does not count, and is greyed.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from pl_patchcore.files import whole_file
from pl_patchcore.inspection import GREY, greyed, smaller_map
from pl_patchcore.preprocessing import UNKNOWN, Preprocessing

GROUPS = {  # group: (label, sign of the score)
    "most_anomalous": (1, 1),
    "lowest_anomalous": (1, -1),
    "least_anomalous": (0, -1),
    "highest_nominal": (0, 1),
}
ERRORS = {"lowest_anomalous": "missed", "highest_nominal": "false_alarm"}  # names of those on the wrong side
COLOUR_MAP = "inferno"  # from black to yellow, as bright as the value is high
LONGEST_SIDE = 1600  # pixels of a picture's image; larger ones are brought to that, or a little less
BAND = 2**20  # pixels of an image that are made smaller at once
NAME_LENGTH = 48  # characters of an image's name in a file's, of at most 4 bytes each; file systems take 255 bytes


def file_name(number: str, path: str) -> str:
    """Name, without a suffix, of a file about an image."""
    return f"{number}-{Path(path).stem[:NAME_LENGTH]}"


def remove_earlier(folder: Path, pattern: str) -> None:
    """Remove files of an earlier run, whose names match a regular expression; others are the user's own."""
    for old in folder.glob("*"):
        if re.fullmatch(pattern, old.name, re.DOTALL):
            old.unlink(missing_ok=True)  # another machine may remove it, too


def side_by_side(left: Image.Image, right: Image.Image, gap: int = 0) -> Image.Image:
    """Two pictures of one size beside each other, with black between them."""
    both = Image.new("RGB", (2 * left.width + gap, left.height))
    both.paste(left)
    both.paste(right, (left.width + gap, 0))
    return both


def colour_scale(pixel_threshold: float) -> tuple[float, float]:
    """Values of the first and the last colour: the threshold is the middle one."""
    return 0.0, 2 * pixel_threshold


def overlay(image: Image.Image, heat: np.ndarray, low: float, high: float) -> Image.Image:
    """Lay the colours of an anomaly map ``(H, W)`` over an image of its size, the thicker the higher; none for NaN."""
    share = np.clip((np.nan_to_num(heat, nan=low) - low) / max(high - low, 1e-12), 0, 1)  # (H, W)
    colours = matplotlib.colormaps[COLOUR_MAP](share)[..., :3] * 255
    weight = 0.7 * share[..., None] ** 2
    return Image.fromarray((np.asarray(image) * (1 - weight) + colours * weight).round().astype(np.uint8))


def smaller_rgb(transform: Preprocessing, image: Tensor, factor: int) -> Tensor:
    """Model input ``(3, H, W)`` as RGB in [0, 1], the mean of each block of ``factor`` x ``factor`` pixels or less."""
    bands = image.split(factor * max(1, BAND // (factor * image.shape[2])), dim=1)
    return torch.cat([avg_pool2d(transform.denormalise(band), factor, ceil_mode=True) for band in bands], dim=1)


@dataclass
class Shown:
    """An image that may be shown."""

    score: float
    order: int  # its number; of equal scores the first image is shown
    title: str
    image: Tensor  # (3, H, W) in [0, 1]
    anomaly_map: Tensor  # (H, W), float32; NaN where the image does not count
    mask: Tensor | None  # (H, W)

    @classmethod
    def of(cls, score: float, order: int, title: str, image: Tensor, heat: Tensor, mask: Tensor | None,
           transform: Preprocessing) -> Shown:  # fmt: skip
        """Take a model input ``(3, H, W)``, its map and mask ``(H, W)``; large ones are brought to `LONGEST_SIDE`."""
        heat = heat.float()
        if (factor := -(-max(heat.shape) // LONGEST_SIDE)) == 1:
            return cls(score, order, title, transform.denormalise(image), heat, mask)
        small = torch.from_numpy(smaller_map(heat.cpu().numpy(), factor))
        thinned = None if mask is None else mask[::factor, ::factor]
        return cls(score, order, title, smaller_rgb(transform, image, factor), small, thinned)

    @property
    def picture(self) -> np.ndarray:
        """RGB, uint8 ``(H, W, 3)``, greyed where the image does not count."""
        rgb = (self.image.permute(1, 2, 0) * 255).round().byte().cpu().numpy()
        outside = self.anomaly_map.isnan().cpu().numpy()
        return np.asarray(greyed(Image.fromarray(rgb), ~outside)) if outside.any() else rgb

    @property
    def truth(self) -> np.ndarray | None:
        """The mask, bool ``(H, W)``; None where nothing of it is known."""
        if self.mask is None or (self.mask == UNKNOWN).all():
            return None
        found: np.ndarray = self.mask.cpu().numpy() == 1
        return found


class Gallery:
    """The most and least anomalous images, ``size`` of each of `GROUPS`.

    Where a threshold says that such an image is an error, its picture is called ``missed`` or ``false_alarm``.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.groups: dict[str, list[Shown]] = {name: [] for name in GROUPS}  # the first is the utmost one
        self.seen: list[tuple[float, int]] = []  # score and label of every image

    def add(self, item: Shown, label: int) -> None:
        """Consider an image; its tensors are copied to main memory only if it is kept."""
        self.seen.append((item.score, label))
        for name, (wanted, _) in GROUPS.items():
            if wanted == label:
                self._consider(name, item)

    def _consider(self, name: str, item: Shown) -> None:
        sign, group = GROUPS[name][1], self.groups[name]
        place = bisect([(-sign * shown.score, shown.order) for shown in group], (-sign * item.score, item.order))
        if place < self.size:
            image, heat = item.image.cpu().clone(), item.anomaly_map.cpu().clone()
            mask = None if item.mask is None else item.mask.cpu().clone()
            group.insert(place, replace(item, image=image, anomaly_map=heat, mask=mask))
            del group[self.size :]

    def merge(self, other: Gallery) -> None:
        """Consider the images of another gallery too."""
        self.seen += other.seen
        for name, group in other.groups.items():
            for item in group:
                self._consider(name, item)

    def write(self, folder: Path, image_threshold: float | None = None, pixel_threshold: float | None = None) -> int:
        """Draw all groups into ``folder``, in place of an earlier run's pictures; returns the number of pictures.

        One colour scale serves all: that of `colour_scale`; without ``pixel_threshold`` from the lowest to the 99.5 %
        quantile of the values shown. The contour stands at ``pixel_threshold``, without one at the scale's middle.
        """
        shown = [item for group in self.groups.values() for item in group]
        if not shown:
            return 0
        if pixel_threshold is None:
            values = torch.cat([item.anomaly_map[~item.anomaly_map.isnan()] for item in shown]).numpy()
            low, high = float(values.min()), float(np.quantile(values, 0.995))
        else:
            low, high = colour_scale(pixel_threshold)
        remove_earlier(folder, rf"({'|'.join([*GROUPS, *ERRORS.values()])})_\d+\.png")
        for name, place, item in self.named(image_threshold):
            figure = _panels(item, name, low, max(high, low + 1e-12), pixel_threshold)
            with whole_file(folder / f"{name}_{place}.png") as partial:
                figure.savefig(partial, dpi=100)
        with whole_file(folder / "scores.png") as partial:
            self._histogram(image_threshold).savefig(partial, dpi=100)
        return len(shown) + 1

    def named(self, threshold: float | None) -> Iterator[tuple[str, int, Shown]]:
        """Each image with the name of its picture, and its number among those of that name."""
        numbers: Counter[str] = Counter()
        for group, items in self.groups.items():
            label, _ = GROUPS[group]
            for item in items:
                wrong = threshold is not None and (item.score > threshold) != label
                name = ERRORS.get(group, group) if wrong else group
                numbers[name] += 1
                yield name, numbers[name], item

    def _histogram(self, threshold: float | None) -> Figure:
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axis = figure.subplots()
        bins = np.histogram_bin_edges([score for score, _ in self.seen], bins=40).tolist()
        for label, name, colour in ((0, "nominal", "tab:green"), (1, "anomalous", "tab:red")):
            scores = [score for score, found in self.seen if found == label]
            axis.hist(scores, bins=bins, alpha=0.6, color=colour, label=f"{name} ({len(scores)})")
        if threshold is not None:
            axis.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3g}")
        axis.set_xlabel("anomaly score")
        axis.set_ylabel("test images")
        figure.legend(loc="outside upper center", ncols=3)
        return figure


def _panels(item: Shown, group: str, low: float, high: float, threshold: float | None) -> Figure:
    figure = Figure(figsize=(13, 3.7), layout="constrained")
    axes = figure.subplots(1, 4)
    image, heat = item.picture, item.anomaly_map.numpy()
    colour_map = matplotlib.colormaps[COLOUR_MAP].with_extremes(bad="#{:02x}{:02x}{:02x}".format(*GREY))
    level, meaning = (0.5 * (low + high), "mid-scale") if threshold is None else (threshold, "threshold")
    titles = ("image", "mask", "anomaly map", f"overlay, contour at {level:.3g} ({meaning})")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    axes[0].imshow(image)
    if (truth := item.truth) is None:
        axes[1].text(0.5, 0.5, "unknown", ha="center", va="center", transform=axes[1].transAxes)
    else:
        axes[1].imshow(np.where(np.isnan(heat), 0.5, truth), cmap="gray", vmin=0, vmax=1)
    figure.colorbar(axes[2].imshow(heat, cmap=colour_map, vmin=low, vmax=high), ax=axes[2], shrink=0.8)
    axes[3].imshow(overlay(Image.fromarray(image), heat, low, high))
    if np.nanmin(heat) < level < np.nanmax(heat):
        axes[3].contour(heat, levels=[level], colors="cyan", linewidths=1.2)
    title = f"{group.replace('_', ' ')}: {item.title}, anomaly score {item.score:.4g}"
    figure.suptitle(title, fontsize=11, parse_math=False)  # a file name may hold dollar signs
    return figure
