"""Maps and masks -> AUPIMO: how much of each anomalous image's defect is found at very few false alarms.

For each anomalous image the share of its anomalous pixels that are found is drawn against a false-positive rate that
all images share: the mean over the **nominal images** of their shares of pixels above the threshold. The area below it
from a rate of 1e-5 to one of 1e-4, on a logarithmic axis, divided by the axis' length, is the image's AUPIMO.

Source: Bertoldo et al. 2024, "AUPIMO: Redefining Visual Anomaly Detection Benchmarks with High Speed and Low
Tolerance", and its implementation (jpcbertoldo/aupimo; in anomalib 2 as `anomalib.metrics.AUPIMO`), which this equals
on the same maps. There are 300,000 thresholds in equal steps from the smallest to the largest score of the nominal
images, and a pixel counts from the threshold on. The integral runs between the thresholds whose rates are nearest to
the two bounds (of equally near ones the smallest threshold) by the trapezoidal rule, and is cut to [0, 1]. Departures:
an image is nominal by its label, not by an empty mask; pixels whose mask is 255 do not count; where the rates do not
reach the bounds, figures are NaN in place of an error; few thresholds between them are not refused.

Only the largest 0.01 % of the nominal scores matter, so that bounded memory holds them. Next: `named.py`.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from pl_patchcore.errors import UserError
from pl_patchcore.metrics.curve import ROUNDING, UNDEFINED, Chosen, Column, Figure
from pl_patchcore.metrics.evaluation import Row, rows
from pl_patchcore.metrics.state import LABELS, MASKS, PIXEL_LIMIT, Mode, RawMetric
from pl_patchcore.metrics.streaming import nonzero, select
from pl_patchcore.numerics import one_thread

log = logging.getLogger(__name__)

THRESHOLDS = 300_000  # the authors' number
CAPACITY = 2**20  # nominal scores kept of each category, 20 bytes each: enough for 10^10 pixels at a rate of 1e-4
SHARES = 2**12  # scores kept of an anomalous image in streaming mode, 16 KB: its rate is off by 1 / 8,192 at most


class SharedRates(NamedTuple):
    """Thresholds ``(R,)`` float32, descending, and natural logarithms ``(R,)`` of their false-positive rates."""

    thresholds: Column
    logs: Column


def shared_rates(
    scores: Column,
    pixels: Column,
    images: int,
    lowest: float,
    whole: bool,
    bounds: tuple[float, float],
    num_thresholds: int,
) -> SharedRates | None:
    """Mean false-positive rate of the nominal images at thresholds in equal steps, between two rates.

    Args:
        scores: Largest scores of these images, float32 ``(n,)``, n > 0.
        pixels: Number of pixels of each one's image, ``(n,)``, whose reciprocal is its weight.
        images: Number of images.
        lowest: Smallest of all their scores.
        whole: Whether ``scores`` are all of them; else rates are known above the smallest one.
        bounds: Rates between which thresholds are returned.
        num_thresholds: Number of thresholds from ``lowest`` to the largest score.

    Returns:
        None where the rates do not reach a bound, or both are nearest to one threshold.

    Example:
        >>> scores, pixels = np.arange(8, dtype=np.float32), np.full(8, 8)
        >>> rates = shared_rates(scores, pixels, 1, 0.0, True, (0.25, 0.5), num_thresholds=8)
        >>> rates.thresholds.tolist(), np.exp(rates.logs).round(3).tolist()
        ([6.0, 5.0, 4.0], [0.25, 0.375, 0.5])
    """
    order = np.lexsort((pixels, scores))
    scores, weights = scores[order], 1 / pixels[order].astype(np.float64)
    from_here = np.append(np.cumsum(weights[::-1])[::-1], 0.0) / images  # rate from each score on
    thresholds = torch.linspace(lowest, float(scores[-1]), num_thresholds, dtype=torch.float32).numpy()
    thresholds = thresholds if whole else thresholds[thresholds > scores[0]]
    rates = from_here[np.searchsorted(scores, thresholds)]  # descending
    reached = float(rates[0]) if len(rates) else 0.0
    if reached < bounds[1]:
        text = "AUPIMO keeps the %d largest nominal scores, which end at a rate of %.2g, below %g: it is not computed."
        log.warning(text, len(scores), reached, bounds[1])
        return None
    last, first = (int(np.abs(rates - bound).argmin()) for bound in bounds)
    if rates[-1] > bounds[0] * (1 + ROUNDING) or first >= last:
        return None
    return SharedRates(thresholds[first : last + 1][::-1], np.log(rates[first : last + 1][::-1]))


def overlap_area(scores: Column, pixels: int, rates: SharedRates, bounds: tuple[float, float]) -> Figure:
    """AUPIMO of an image with so many anomalous ``pixels``.

    Args:
        scores: Scores of these pixels, ascending, ``(n,)``, n > 0: all, or some of them (see `thin`).
        pixels: Their number.
        rates: Of `shared_rates`.
        bounds: Of the rates.
    """
    axis = math.log(bounds[1] / bounds[0])
    found = 1 - np.searchsorted(scores, rates.thresholds) / len(scores)
    area = float(np.trapezoid(found, rates.logs)) / axis
    off = float(rates.logs[-1] - rates.logs[0]) / axis / (2 * len(scores)) + ROUNDING if len(scores) < pixels else 0.0
    return Figure(min(max(area, 0.0), 1.0), off)


def thin(scores: Tensor, shares: int) -> Tensor:
    """At most ``shares`` of ascending scores ``(n,)``: the middle one of each of so many equal shares.

    The share of them from any threshold on is that of all to within ``1 / (2 shares)``.

    Example:
        >>> thin(torch.arange(9.0), 3).tolist()
        [1.0, 4.0, 7.0]
    """
    if len(scores) <= shares:
        return scores
    middles = (torch.arange(shares, device=scores.device) * 2 + 1) * len(scores) // (2 * shares)
    return scores[middles]


class AUPIMO(RawMetric):
    """Area under the per-image overlap, of each anomalous image and their mean; see the module.

    Nominal scores are kept in bounded memory without an error: the 2^20 largest of each category.

    Args:
        bounds: Shared false-positive rates between which the area is taken, 0 < lower < upper < 1.
        num_thresholds: Number of thresholds, 2 or more.
        mode: How anomalous scores are kept. ``exact`` keeps all; ``streaming`` keeps 4,096 of each image, which
            leaves an error of 1 / 8,192 at most, and ``compute`` gives its bound; ``auto`` is exact up to
            ``pixel_limit`` anomalous pixels, and streaming beyond.
        pixel_limit: Largest number of anomalous pixels, over all processes, that ``auto`` keeps exactly.

    Example:
        >>> maps = torch.linspace(0, 1, 2 * 400 * 500).reshape(2, 400, 500)
        >>> masks = torch.zeros(2, 400, 500, dtype=torch.uint8)
        >>> masks[1, :100] = 1  # all above the nominal image
        >>> metric = AUPIMO()
        >>> metric.update(maps, masks)
        >>> figures = metric.compute()
        >>> round(figures["aupimo"].item(), 2), figures["per_image"].isnan().tolist()
        (1.0, [True, False])
    """

    images: list[Tensor]
    lowest: list[Tensor]
    nominal: list[Tensor]
    nominal_images: list[Tensor]
    floors: list[Tensor]
    floor_categories: list[Tensor]
    anomalous: list[Tensor]

    def __init__(
        self,
        bounds: tuple[float, float] = (1e-5, 1e-4),
        num_thresholds: int = THRESHOLDS,
        mode: Mode = "auto",
        pixel_limit: int = PIXEL_LIMIT,
    ) -> None:
        super().__init__(mode, pixel_limit)
        if not 0 < bounds[0] < bounds[1] < 1:
            raise UserError(f"bounds must be 0 < lower < upper < 1, got {bounds}; published figures use (1e-5, 1e-4).")
        if num_thresholds < 2:
            raise UserError(f"num_thresholds must be 2 or more, got {num_thresholds}; published figures use 300000.")
        self.bounds, self.num_thresholds = bounds, num_thresholds
        self.add_list("images", torch.int64, 5)  # cell, number of pixels, number of scores in `anomalous`
        self.add_list("lowest")  # smallest score of each image's pixels
        self.add_list("nominal")  # largest scores of nominal images,
        self.add_list("nominal_images", torch.int64, 2)  # and number of pixels and category of each one's image
        self.add_list("floors")  # smallest of these, of categories that have as many as may stay;
        self.add_list("floor_categories", torch.int64)
        self.add_list("anomalous")  # scores of anomalous images, ascending, one image after the other

    @one_thread()
    def update(
        self,
        maps: Tensor,
        masks: Tensor,
        labels: Tensor | None = None,
        groups: Tensor | None = None,
        categories: Tensor | None = None,
    ) -> None:
        """Add images.

        Args:
            maps: Raw anomaly maps, ``(B, H, W)``.
            masks: 0 nominal, 1 anomalous or 255 unknown, ``(B, H, W)``.
            labels: 0 nominal or 1 anomalous, ``(B,)``; None: anomalous are those whose mask holds a 1.
            groups: Number of the defect type, ``(B,)``, int64; None: all of number 0.
            categories: Number of the category, in the same way.

        Raises:
            UserError: If a shape or a value is not as above, or a score is not finite.
        """
        maps = self.check_scores("maps", maps, "B H W")
        masks = self.check_truth("masks", masks, MASKS, maps)
        labels = (masks == 1).flatten(1).any(dim=1) if labels is None else labels
        labels = self.check_truth("labels", labels, LABELS, maps.new_empty(len(maps)))
        cells, thins = self.check_cells(labels, groups, categories), self._thins()
        full, floors = (dim_zero_cat(state).tolist() for state in (self.floor_categories, self.floors))
        floor_of = dict(zip(full, floors, strict=True))
        for cell, scores, mask in zip(cells, maps, masks, strict=True):
            own = select(scores, mask == cell[0])  # nominal pixels of a nominal image, anomalous ones of another
            pixels, kept = len(own), 0
            self.lowest.append(own.min()[None] if pixels else own.new_zeros(1))
            if cell[0] == 0:
                own = select(own, own >= floor_of.get(int(cell[2]), -math.inf))
                self.nominal.append(own)
                self.nominal_images.append(cell.new_tensor([pixels, cell[2]]).expand(len(own), 2))
            else:
                self.anomalous.append(thin(own.sort().values, SHARES if thins else pixels))
                kept = len(self.anomalous[-1])
            self.images.append(torch.cat([cell, cell.new_tensor([pixels, kept])])[None])
        self.images, self.lowest = [dim_zero_cat(self.images)], [dim_zero_cat(self.lowest)]
        self._bound_memory()
        if not thins and self._thins():
            self._thin()

    @one_thread()
    def compute(self) -> Row:
        """Figures of all updates.

        Returns:
            ``aupimo``, the mean of the anomalous images that have anomalous pixels, 0-d float64, and where scores were
            left out ``aupimo_bound``; ``per_image``, ``(N,)`` float64 in the order of the updates (of one process after
            the other), NaN for others; ``by_group`` and ``by_category`` as `AnomalyEvaluation`. NaN where the nominal
            images have fewer than 1 / lower bound pixels.
        """
        images, thins = dim_zero_cat(self.images).cpu(), self._thins()
        cells = [tuple(cell) for cell in images[:, :3].tolist()]
        pixels, kept = images[:, 3:].T.tolist()
        overlaps = dim_zero_cat(self.anomalous).cpu().split(kept)
        overlaps = [thin(part, SHARES) for part in overlaps] if thins else overlaps
        rates = cache(self._rates)

        def areas(chosen: Chosen) -> Column:
            """Figure of each image and its bound, ``(2, N)``, NaN where there is none."""
            members = [i for i, cell in enumerate(cells) if chosen(cell) and pixels[i]]
            shared = rates(frozenset(cells[i][2] for i in members if cells[i][0] == 0))
            found: Column = np.full((2, len(cells)), np.nan)
            for i in members:
                if shared is not None and cells[i][0] == 1:
                    found[:, i] = overlap_area(overlaps[i].numpy(), pixels[i], shared, self.bounds)
            return found

        def row(chosen: Chosen) -> Row:
            found = areas(chosen)
            defined = found[:, ~np.isnan(found[0])]
            mean = Figure(*defined.mean(axis=1).tolist()) if defined.size else UNDEFINED
            return self.figures({"aupimo": mean}, thins)

        return rows(images[:, :3], row) | {"per_image": self.figure(areas(lambda _: True)[0].tolist())}

    def _thins(self) -> bool:
        """Whether some scores of anomalous images are left out."""
        images = dim_zero_cat(self.images)
        pixels = int((images[:, 0] * images[:, 3]).sum())
        return self.mode == "streaming" or (self.mode == "auto" and pixels > self.pixel_limit)

    def _thin(self) -> None:
        """Leave out scores of all images so far."""
        kept = self.images[0][:, 4]
        parts = [thin(part, SHARES) for part in dim_zero_cat(self.anomalous).split(kept.tolist())]
        kept.copy_(torch.tensor([len(part) for part in parts]))
        self.anomalous = [torch.cat(parts)]

    def _bound_memory(self) -> None:
        """Leave out the smaller nominal scores, whenever there are as many new ones as may stay of a category."""
        categories = self.images[0][:, 2].unique().tolist()
        if sum(map(len, self.nominal)) > (len(categories) + 1) * CAPACITY:
            scores, images = dim_zero_cat(self.nominal), dim_zero_cat(self.nominal_images)
            parts = [nonzero(images[:, 1] == category) for category in categories]
            parts = [part[_largest(scores[part])] for part in parts]
            self.nominal = [torch.cat([scores[part] for part in parts])]
            self.nominal_images = [torch.cat([images[part] for part in parts])]
            full = [(c, scores[part].min()) for c, part in zip(categories, parts, strict=True) if len(part) == CAPACITY]
            self.floor_categories = [images.new_tensor([category for category, _ in full])]
            self.floors = [scores.new_tensor([floor for _, floor in full])]

    def _rates(self, categories: frozenset[int]) -> SharedRates | None:
        """False-positive rates shared by images of these categories."""
        of = torch.tensor(sorted(categories), dtype=torch.int64)
        images, lowest = dim_zero_cat(self.images).cpu(), dim_zero_cat(self.lowest).cpu()
        counted = torch.isin(images[:, 2], of) & (images[:, 0] == 0) & (images[:, 3] > 0)
        if not counted.any():
            return None
        scores, their = dim_zero_cat(self.nominal).cpu(), dim_zero_cat(self.nominal_images).cpu()
        own = nonzero(torch.isin(their[:, 1], of))
        own = own[_largest(scores[own])]
        return shared_rates(
            scores[own].numpy(),
            their[own, 0].numpy(),
            images=int(counted.sum()),
            lowest=float(lowest[counted].min()),
            whole=int(images[counted, 3].sum()) <= CAPACITY,
            bounds=self.bounds,
            num_thresholds=self.num_thresholds,
        )


def _largest(scores: Tensor) -> Tensor:
    """Indices of the `CAPACITY` largest ``scores``, in no order."""
    return scores.topk(min(len(scores), CAPACITY), sorted=False).indices
