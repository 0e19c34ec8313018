"""Scores and ground truth -> checked states of the metrics, exact or streaming.

Raw scores are never passed through a sigmoid (as torchmetrics' own AUROC does with scores outside [0, 1], which turns
large ones into ties). Next: `single.py`, `evaluation.py`.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import starmap
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from pl_patchcore.errors import UserError
from pl_patchcore.metrics.curve import Chosen, Curve, Curves, Figure, area, exact_curve, sort_scores
from pl_patchcore.metrics.streaming import Histogram, Pixels, add_pixels, binned_curves, merge, select, zeros
from pl_patchcore.numerics import one_thread
from pl_patchcore.preprocessing import UNKNOWN

log = logging.getLogger(__name__)

Mode = Literal["auto", "exact", "streaming"]
PIXEL_LIMIT = 2**26  # 1,024 maps of 256x256: 268 MB kept, twice that while the figures are computed
FLUSH = 2**20  # pixels that streaming mode collects before it adds them to its bins: 4 MB
LABELS = {0: "nominal", 1: "anomalous"}
MASKS = {**LABELS, UNKNOWN: "unknown"}
PIXELS = ("segments", "nominal", "anomalous", "areas")  # states that hold pixels as they came
BINS = tuple(f"bin_{name}" for name in Histogram._fields)  # states of a histogram; the fields are public


def check_fpr_limit(fpr_limit: float) -> None:
    """A `UserError` for a false-positive rate at which no integral can end."""
    if not 0 < fpr_limit <= 1:
        raise UserError(f"fpr_limit must be in (0, 1], got {fpr_limit}; published PRO figures use 0.3.")


class RawMetric(Metric):
    """Base of the metrics: checks raw scores and ground truth, keeps them in lists (see `PixelMetric`).

    A list state starts with one empty tensor, so that a process that saw no image hands in tensors of the same kinds.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    error_bound: float | None = None  # of the last computed figure; 0 if exact, None before the first

    def __init__(self, mode: Mode = "exact", pixel_limit: int = PIXEL_LIMIT) -> None:
        super().__init__()
        if mode not in ("auto", "exact", "streaming"):
            raise UserError(f"mode must be auto, exact or streaming, got {mode!r}.")
        if pixel_limit < 0:
            raise UserError(f"pixel_limit must be 0 or more, got {pixel_limit}; it counts pixels of all maps.")
        self.mode, self.pixel_limit = mode, pixel_limit
        self._empty: dict[str, Tensor] = {}

    def add_list(self, name: str, dtype: torch.dtype = torch.float32, *columns: int, reduction: Any = "cat") -> None:
        """Declare a list state of vectors, or of matrices with ``columns``."""
        self.add_state(name, [], dist_reduce_fx=reduction)
        self._empty[name] = torch.empty(0, *columns, dtype=dtype)
        self.clear(name)

    def clear(self, *names: str) -> None:
        """Empty the list states ``names``."""
        for name in names:
            setattr(self, name, [self._empty[name].to(self.device)])

    def reset(self) -> None:
        """Forget all updates."""
        super().reset()
        self.error_bound = None
        self.clear(*self._empty)

    def check_scores(self, name: str, scores: Tensor, dims: str | None = None) -> Tensor:
        """Raw scores of shape ``dims`` (None: any), finite in float32, on the metric's device; else a `UserError`."""
        if dims is not None and scores.ndim != len(dims.split()):
            raise UserError(f"{name} must have dimensions {dims}, got shape {tuple(scores.shape)}; reshape them.")
        kept = scores.detach().float()
        if kept.numel() and not math.isfinite(sum(end.item() for end in kept.aminmax())):
            finite = torch.isfinite(kept)
            raise UserError(
                f"{name} must be finite float32 numbers, got {scores[~finite][0].item()} among "
                f"{int((~finite).sum())} such of {scores.numel()}; look for broken images or features."
            )
        return kept.to(self.device)

    def check_truth(self, name: str, truth: Tensor, allowed: dict[int, str], scores: Tensor) -> Tensor:
        """``truth``, an ``allowed`` value for each score, on the metric's device; else a `UserError`."""
        if truth.shape != scores.shape:
            raise UserError(
                f"{name} must have the shape of the scores or maps, got {tuple(truth.shape)} for "
                f"{tuple(scores.shape)}; pass one value for each."
            )
        ends = {int(end) for end in truth.aminmax()} if truth.numel() else set()
        binary = not truth.is_floating_point() and ends <= {0, 1}  # the usual case, for which the ends are enough
        if not binary and (wrong := torch.stack([truth != value for value in allowed]).all(dim=0)).any():
            meaning = ", ".join(f"{value} ({word})" for value, word in allowed.items())
            raise UserError(f"{name} must hold {meaning}, got {truth[wrong][0].item()}; convert them first.")
        return truth.to(self.device)

    def check_cells(self, labels: Tensor, groups: Tensor | None, categories: Tensor | None) -> Tensor:
        """Label, group (0 for nominal images) and category of images, ``(B, 3)``, int64; None: all of number 0.

        Raises:
            UserError: If groups or categories are not one integer for each of the ``labels`` ``(B,)``.
        """
        cells = [labels.long()]
        for name, numbers, what in (("groups", groups, "defect types"), ("categories", categories, "categories")):
            numbers = torch.zeros_like(cells[0]) if numbers is None else numbers
            if numbers.shape != labels.shape or numbers.is_floating_point():
                raise UserError(
                    f"{name} must be integers of shape {tuple(labels.shape)}, got {numbers.dtype} of shape "
                    f"{tuple(numbers.shape)}; number the {what}."
                )
            cells.append(numbers.to(cells[0]))
        cells[1] = cells[1] * cells[0]
        return torch.stack(cells, dim=1)

    def report(self, figure: Figure) -> Tensor:
        """Value of a figure; remembers its bound."""
        self.error_bound = figure.bound
        return self.figure(figure.value)

    def figures(self, named: Mapping[str, Figure], bounds: bool) -> dict[str, Any]:
        """Figures by their names as 0-d tensors; with ``bounds`` each one's bound, too."""
        values = {name: figure.value for name, figure in named.items()}
        if bounds:
            values |= {f"{name}_bound": figure.bound for name, figure in named.items()}
        return {name: self.figure(value) for name, value in values.items()}

    def figure(self, value: float | list[float]) -> Tensor:
        """A figure as 0-d tensor, or several ``(n,)``, on the metric's device: float64, float32 where there is none."""
        return torch.tensor(value, dtype=torch.float32 if self.device.type == "mps" else torch.float64).to(self.device)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot ``val`` (None: what ``compute`` returns) in the axes ``ax`` (see `torchmetrics.Metric.plot`)."""
        return self._plot(val, ax)  # torchmetrics' documented way


class PixelMetric(RawMetric):
    """Base of the metrics of a curve: keeps scores exactly or in bins, apart by cells of ``columns`` numbers.

    Args:
        mode: ``exact`` keeps every pixel. ``streaming`` keeps a histogram of bounded memory, and after ``compute``
            ``error_bound`` says how far the true value may be. ``auto`` is exact up to ``pixel_limit`` pixels, and
            streaming beyond.
        pixel_limit: Largest number of pixels, over all processes, that ``auto`` keeps exactly.
        fpr_limit: Share of nominal ones at which the area under the curve ends, in (0, 1].
    """

    segments: list[Tensor]
    columns = 1
    weighted = False  # whether the curve weighs anomalous pixels by 1 / area of their region

    def __init__(self, mode: Mode = "auto", pixel_limit: int = PIXEL_LIMIT, fpr_limit: float = 1.0) -> None:
        super().__init__(mode, pixel_limit)
        check_fpr_limit(fpr_limit)
        self.fpr_limit = fpr_limit
        # as they came: all pixels, or in streaming mode those that wait for the histogram
        self.add_list("segments", torch.int64, self.columns + 2)  # cell, numbers of nominal and anomalous pixels
        self.add_list("nominal")
        self.add_list("anomalous")
        self.add_list("areas", torch.int32)  # of each anomalous pixel's region
        for name, column in zip(BINS, zeros(torch.empty(0, self.columns + 1, dtype=torch.int64)), strict=True):
            self.add_list(name, column.dtype, *column.shape[1:], reduction=None)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes (see `torchmetrics.Metric.sync`), of each one histogram."""
        if self._binned():
            self._fold()
        else:
            self.clear(*BINS)
        super().sync(*args, **kwargs)

    def keep(self, segments: Tensor, nominal: Tensor, anomalous: Tensor, areas: Tensor) -> None:
        """Keep the scores of the nominal and the anomalous pixels of a batch, run after run, float32.

        A row of ``segments``, int64 ``(n, columns + 2)``, is the cell of a run, and its numbers of nominal and of
        anomalous pixels; ``areas``, int32, are those of the anomalous pixels' regions (1 where they do not matter).
        """
        for name, values in zip(PIXELS, (segments, nominal, anomalous, areas), strict=True):
            getattr(self, name).append(values.to(self.device))
        binned = self._binned()
        if self.mode == "exact" or self._waiting() <= (FLUSH if binned else self.pixel_limit):
            return
        if not binned:
            said = "more than %d pixels: %s goes on in streaming mode, with bounded memory and error."
            log.info(said, self.pixel_limit, type(self).__name__)
        self._fold()

    def keep_flat(self, scores: Tensor, truth: Tensor, areas: Tensor | None = None) -> None:
        """Keep scores of any shape, all of one cell (see `keep`)."""
        nominal, anomalous = select(scores, truth == 0), select(scores, truth == 1)
        areas = torch.ones(len(anomalous), dtype=torch.int32) if areas is None else areas
        self.keep(torch.tensor([[0, len(nominal), len(anomalous)]]), nominal, anomalous, areas)

    def curves(self) -> Curves:
        """Curves of all pixels kept."""
        streams = self._binned() or (self.mode == "auto" and self._waiting() > self.pixel_limit)
        return binned_curves(self._fold()) if streams else exact_curves(self._pixels())

    def of_curve(self, curve: Curve) -> Figure:
        """The metric's figure: the area under the curve, unless a subclass has another."""
        return area(curve, self.fpr_limit, weighted=self.weighted)

    @one_thread()
    def compute(self) -> Tensor:
        """Figure of all updates, 0-d float64."""
        return self.report(self.of_curve(self.curves()(lambda _: True)))

    def _binned(self) -> bool:
        return self.mode == "streaming" or any(map(len, getattr(self, BINS[0])))

    def _waiting(self) -> int:
        return int(dim_zero_cat(self.segments)[:, -2:].sum())

    def _pixels(self) -> list[Pixels]:
        segments, nominal, anomalous, areas = (dim_zero_cat(getattr(self, name)) for name in PIXELS)
        *cells, sizes, anomalous_sizes = segments.T.tolist()
        names = list(zip(*cells, strict=True))
        runs = zip(names, nominal.split(sizes), strict=True)
        regions = zip(names, anomalous.split(anomalous_sizes), areas.split(anomalous_sizes), strict=True)
        return [part for part in (*starmap(Pixels, runs), *starmap(Pixels, regions)) if len(part.scores)]

    def _fold(self) -> Histogram:
        """Put all pixels kept as they came into the histogram, and all histograms into one."""
        histograms = [Histogram(*columns) for columns in zip(*(getattr(self, name) for name in BINS), strict=True)]
        pixels = self._pixels()
        self.clear(*PIXELS)
        histogram = add_pixels(histograms[0] if len(histograms) == 1 else merge(histograms), pixels)
        for name, column in zip(BINS, histogram, strict=True):
            setattr(self, name, [column])
        return histogram


def exact_curves(parts: Sequence[Pixels]) -> Curves:
    """Curves without an error, by sorting each cell once."""
    nominal = defaultdict(list)
    for part in parts:
        if not len(part.areas):
            nominal[part.cell].append(part.scores)
    ascending = {cell: sort_scores(scores) for cell, scores in nominal.items()}
    nothing = Pixels((), torch.empty(0, dtype=torch.float32))

    def curve(chosen: Chosen) -> Curve:
        own = [nothing, *(part for part in parts if len(part.areas) and chosen(part.cell))]
        scores, areas = torch.cat([part.scores.cpu() for part in own]), torch.cat([part.areas.cpu() for part in own])
        return exact_curve([ranked for cell, ranked in ascending.items() if chosen(cell)], scores, areas)

    return curve
