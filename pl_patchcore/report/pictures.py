"""Anomaly maps as pictures: image, mask, map and overlay side by side.

Only the images a report shows are kept while the test runs, in four short lists.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from pl_patchcore.preprocessing import UNKNOWN
from pl_patchcore.report.files import whole_file

GROUPS = {  # group: (label, sign of the score)
    "most_anomalous": (1, 1),
    "missed": (1, -1),
    "least_anomalous": (0, -1),
    "false_alarm": (0, 1),
}


@dataclass(order=True)
class Shown:
    """An image that may be shown; compared by rank alone."""

    rank: float
    order: int
    score: float = field(compare=False)
    title: str = field(compare=False)
    image: Tensor = field(compare=False)  # (3, H, W) in [0, 1]
    anomaly_map: Tensor = field(compare=False)  # (H, W)
    mask: Tensor | None = field(compare=False)  # (H, W)


class Gallery:
    """The most and least anomalous images and the errors, a few of each.

    ``most_anomalous`` and ``missed`` are the anomalous images with the highest and lowest scores,
    ``false_alarm`` and ``least_anomalous`` the nominal ones.

    Args:
        size: Images per group.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.groups: dict[str, list[Shown]] = {name: [] for name in GROUPS}  # by ascending rank
        self.seen: list[tuple[float, int]] = []  # score and label of every image

    def add(
        self,
        score: float,
        label: int,
        title: str,
        image: Tensor,
        anomaly_map: Tensor,
        mask: Tensor | None,
        order: int | None = None,
    ) -> None:
        """Consider an image, the ``order``-th; tensors are copied to main memory only if it is kept."""
        self.seen.append((score, label))
        place = len(self.seen) if order is None else order
        for name, (wanted, sign) in GROUPS.items():
            rank, group = (sign * score, -place), self.groups[name]  # of equals, the first
            if wanted == label and (len(group) < self.size or (group and rank > (group[0].rank, group[0].order))):
                kept = image.cpu().clone(), anomaly_map.float().cpu().clone()
                self._keep(name, Shown(*rank, score, title, *kept, None if mask is None else mask.cpu().clone()))

    def _keep(self, name: str, item: Shown) -> None:
        insort(self.groups[name], item)
        del self.groups[name][: -self.size]

    def merge(self, other: Gallery) -> None:
        """Consider the images of another gallery too."""
        self.seen += other.seen
        for name, group in other.groups.items():
            for item in group:
                self._keep(name, item)

    def write(self, folder: Path, image_threshold: float | None = None, pixel_threshold: float | None = None) -> int:
        """Draw all groups into ``folder``, in place of an earlier run's pictures; returns the number of pictures.

        One colour scale serves all: from the lowest value shown to the 99.5 % quantile of the values shown. The
        contour stands at the calibrated ``pixel_threshold``, without one at the scale's middle. Neither knows of
        labels. ``image_threshold`` is marked among the scores.
        """
        shown = [item for group in self.groups.values() for item in group]
        if not shown:
            return 0
        values = np.concatenate([item.anomaly_map.numpy().ravel() for item in shown])
        low, high = float(values.min()), float(np.quantile(values, 0.995))
        for name in GROUPS:
            for old in folder.glob(f"{name}_*.png"):
                if old.stem.removeprefix(f"{name}_").isdigit():  # others are the user's own
                    old.unlink()
        for name, group in self.groups.items():
            for place, item in enumerate(reversed(group), 1):
                with whole_file(folder / f"{name}_{place}.png") as partial:
                    _draw(item, name, (low, max(high, low + 1e-12)), pixel_threshold, partial)
        with whole_file(folder / "scores.png") as partial:
            _draw_scores(self.seen, image_threshold, partial)
        return len(shown) + 1


def _draw(item: Shown, group: str, scale: tuple[float, float], threshold: float | None, path: Path) -> None:
    figure = Figure(figsize=(13, 3.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 4)
    image = item.image.permute(1, 2, 0).numpy()
    level = 0.5 * (scale[0] + scale[1]) if threshold is None else threshold
    meaning = "mid-scale" if threshold is None else "threshold"
    panels: Sequence[tuple[str, np.ndarray | None]] = (
        ("image", image),
        ("mask", None if item.mask is None or (item.mask == UNKNOWN).all() else item.mask.numpy() == 1),
        ("anomaly map", item.anomaly_map.numpy()),
        (f"overlay, contour at {level:.3g} ({meaning})", image),
    )
    for axis, (title, pixels) in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
        if pixels is None:
            axis.text(0.5, 0.5, "unknown", ha="center", va="center", transform=axis.transAxes)
        elif title == "anomaly map":
            drawn = axis.imshow(pixels, cmap="inferno", vmin=scale[0], vmax=scale[1])
            figure.colorbar(drawn, ax=axis, shrink=0.8)
        else:
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    heat = item.anomaly_map.numpy()
    strength = np.clip((heat - scale[0]) / (scale[1] - scale[0]), 0, 1)
    axes[3].imshow(heat, cmap="inferno", vmin=scale[0], vmax=scale[1], alpha=0.55 * strength)
    if heat.min() < level < heat.max():
        axes[3].contour(heat, levels=[level], colors="cyan", linewidths=1.2)
    title = f"{group.replace('_', ' ')}: {item.title}, anomaly score {item.score:.4g}"
    figure.suptitle(title, fontsize=11, parse_math=False)  # a file name may hold dollar signs
    figure.savefig(path, dpi=100)


def _draw_scores(seen: Sequence[tuple[float, int]], threshold: float | None, path: Path) -> None:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    bins = np.histogram_bin_edges([score for score, _ in seen], bins=40).tolist()
    for label, name, colour in ((0, "nominal", "tab:green"), (1, "anomalous", "tab:red")):
        scores = [score for score, found in seen if found == label]
        axis.hist(scores, bins=bins, alpha=0.6, color=colour, label=f"{name} ({len(scores)})")
    if threshold is not None:
        axis.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3g}")
    axis.set_xlabel("anomaly score")
    axis.set_ylabel("test images")
    axis.legend()
    figure.savefig(path, dpi=100)
