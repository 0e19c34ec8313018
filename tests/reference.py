"""Slow, obvious float64 oracles that the tests compare the package with. They share no code with it."""

from __future__ import annotations

import numpy as np
import scipy.ndimage


def auroc(nominal: np.ndarray, anomalous: np.ndarray) -> float:
    """Share of (nominal, anomalous) pairs in the right order, ties counted as half."""
    nominal, anomalous = nominal.astype(np.float64), anomalous.astype(np.float64)
    won = sum(float((score > nominal).sum()) + float((score == nominal).sum()) / 2 for score in anomalous)
    return won / (len(nominal) * len(anomalous))


def regions(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Connected components of ``mask == 1``, 8 neighbours, each a list of pixels, by flood fill."""
    left = {(int(row), int(column)) for row, column in np.argwhere(mask == 1)}
    found = []
    while left:
        region, front = [], [left.pop()]
        while front:
            row, column = front.pop()
            region.append((row, column))
            for near in [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
                if near in left:
                    left.remove(near)
                    front.append(near)
        found.append(region)
    return found


def area_up_to(fpr: list[float], overlap: list[float], fpr_limit: float) -> float:
    """Area under the curve by the trapezoidal rule, its end point interpolated, divided by the limit."""
    area = 0.0
    for left, right, low, high in zip(fpr, fpr[1:], overlap, overlap[1:], strict=False):
        if right <= fpr_limit:
            area += (right - left) * (low + high) / 2
        elif left < fpr_limit:  # the end point lies on this segment
            end = low + (high - low) * (fpr_limit - left) / (right - left)
            area += (fpr_limit - left) * (low + end) / 2
    return area / fpr_limit


def pro(maps: list[np.ndarray], masks: list[np.ndarray], fpr_limit: float = 0.3) -> float:
    """Mean overlap of the regions against the false-positive rate, swept over every distinct threshold."""
    nominal = np.concatenate([scores[mask == 0] for scores, mask in zip(maps, masks, strict=True)])
    found = [
        np.array([scores[pixel] for pixel in region])
        for scores, mask in zip(maps, masks, strict=True)
        for region in regions(mask)
    ]
    thresholds = np.unique(np.concatenate([nominal, *found]))[::-1]
    fpr = [0.0] + [float((nominal >= threshold).mean()) for threshold in thresholds]
    overlap = [0.0] + [float(np.mean([(s >= threshold).mean() for s in found])) for threshold in thresholds]
    return area_up_to(fpr, overlap, fpr_limit)


def resized(levels: np.ndarray, new: int, kind: str) -> np.ndarray:
    """Pillow's antialiased resize of the first axis, unrounded."""
    old = len(levels)
    wide = max(old / new, 1.0)  # the filter is widened where there are fewer positions afterwards
    found = []
    for position in range(new):
        centre = (position + 0.5) * old / new
        weights = []
        for source in range(old):
            x = abs(source + 0.5 - centre) / wide
            if kind == "bilinear":
                weights.append(max(0.0, 1 - x))
            else:  # Keys' cubic, a = -1/2
                near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
                weights.append(near if x < 1 else far if x < 2 else 0.0)
        found.append(np.tensordot(weights, levels.astype(np.float64), 1) / sum(weights))
    return np.stack(found)


def aupimo(
    maps: list[np.ndarray], masks: list[np.ndarray], labels: list[int], bounds: tuple[float, float], steps: int
) -> list[float]:
    """AUPIMO of each image, as its authors compute it, NaN of nominal ones; one threshold at a time."""
    nominal = [scores[mask == 0] for scores, mask, label in zip(maps, masks, labels, strict=True) if not label]
    ends = min(own.min() for own in nominal), max(own.max() for own in nominal)
    thresholds = np.linspace(*(float(end) for end in ends), steps).astype(np.float32)
    rates = np.array([np.mean([(own >= threshold).mean() for own in nominal]) for threshold in thresholds])
    first, last = (int(np.argmin(abs(rates - bound))) for bound in reversed(bounds))
    reached = rates[-1] <= bounds[0] * (1 + 1e-12) and first < last  # else the authors' code ends in an error
    found = []
    for scores, mask, label in zip(maps, masks, labels, strict=True):
        own, area = scores[mask == 1], 0.0
        for k in range(first, last) if label and len(own) else ():
            height = (float((own >= thresholds[k]).mean()) + float((own >= thresholds[k + 1]).mean())) / 2
            area += height * (np.log10(rates[k]) - np.log10(rates[k + 1]))
        found.append(min(1.0, area / np.log10(bounds[1] / bounds[0])) if reached and label and len(own) else np.nan)
    return found


def spro(maps: list[np.ndarray], defects: list[list[tuple[np.ndarray, int]]], fpr_limit: float) -> float:
    """Mean saturated overlap of the defects against the false-positive rate, swept over every distinct threshold."""
    free = [
        scores[~np.any([mask for mask, _ in own], axis=0)] if own else scores.ravel()
        for scores, own in zip(maps, defects, strict=True)
    ]
    nominal = np.concatenate(free)
    thresholds = np.unique(np.concatenate([scores.ravel() for scores in maps]))[::-1]
    fpr, overlap = [0.0], [0.0]
    for threshold in thresholds:
        fpr.append(float((nominal >= threshold).mean()))
        each = [
            min(1.0, (scores[mask] >= threshold).sum() / min(saturation, mask.sum()))
            for scores, own in zip(maps, defects, strict=True)
            for mask, saturation in own
        ]
        overlap.append(float(np.mean(each)))
    return area_up_to(fpr, overlap, fpr_limit)


def average_precision(nominal: np.ndarray, anomalous: np.ndarray) -> float:
    """Mean over the anomalous scores of the precision at the threshold that just covers each."""
    precisions = []
    for threshold in anomalous:
        true, false = int((anomalous >= threshold).sum()), int((nominal >= threshold).sum())
        precisions.append(true / (true + false))
    return float(np.mean(precisions))


def f1(nominal: np.ndarray, anomalous: np.ndarray, threshold: float) -> float:
    """F1 of calling every score from the threshold on anomalous."""
    true, false = int((anomalous >= threshold).sum()), int((nominal >= threshold).sum())
    return 2 * true / (len(anomalous) + true + false)


def best_f1(nominal: np.ndarray, anomalous: np.ndarray) -> float:
    """Largest F1 over every score as threshold."""
    return max(f1(nominal, anomalous, threshold) for threshold in np.unique(np.concatenate([nominal, anomalous])))


def greedy(features: np.ndarray, size: int, start: int | None = 0, gaps: np.ndarray | None = None) -> list[int]:
    """Farthest-first traversal: float64 differences, rounded to float32, ties to the lowest row, none twice."""
    exponent = np.frexp(np.abs(features).max())[1]
    rows = np.ldexp(features.astype(np.float64), -exponent)
    gap = np.full(len(rows), np.inf, np.float32)
    if gaps is not None:
        gap = (gaps.astype(np.float64) * np.ldexp(1.0, -exponent) ** 2).astype(np.float32)
    picks: list[int] = []
    while len(picks) < size:
        candidates = np.where(np.isin(np.arange(len(rows)), picks), -1, gap)
        pick = int(candidates.argmax()) if picks or gaps is not None else int(start or 0)
        picks.append(pick)
        gap = np.minimum(gap, ((rows - rows[pick]) ** 2).sum(1).astype(np.float32))
    return picks


def mean_neighbourhood(layer: np.ndarray, size: int, stride: int) -> np.ndarray:
    """Mean over size x size cells around every stride-th cell of (C, h, w); outside the map are zeros."""
    channels, h, w = layer.shape
    reach = size // 2
    out = np.zeros((channels, (h - 1) // stride + 1, (w - 1) // stride + 1))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            for y in range(i * stride - reach, i * stride + reach + 1):
                for x in range(j * stride - reach, j * stride + reach + 1):
                    if 0 <= y < h and 0 <= x < w:
                        out[:, i, j] += layer[:, y, x]
    return out / size**2


def bilinear(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resize of (..., h, w), pixel centres at half numbers, edges held."""
    for axis, length in ((-2, size[0]), (-1, size[1])):
        old = grid.shape[axis]
        place = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, None)
        low = np.minimum(place.astype(int), old - 1)
        high = np.minimum(low + 1, old - 1)
        part = (place - low).reshape((-1, 1) if axis == -2 else (-1,))
        grid = (1 - part) * np.take(grid, low, axis) + part * np.take(grid, high, axis)
    return grid


def score_and_map(
    patches: np.ndarray,
    bank: np.ndarray,
    size: tuple[int, int],
    neighbours: int = 1,
    squared: bool = False,
    b: int = 9,
    sigma: float = 4.0,
) -> tuple[float, np.ndarray]:
    """Equations 6 and 7 and the anomaly map of one image, from its patch features (h, w, D)."""
    h, w, dimension = patches.shape
    queries = patches.reshape(-1, dimension).astype(np.float64)
    bank = bank.astype(np.float64)
    distances = np.stack([np.sqrt(((bank - query) ** 2).sum(1)) for query in queries])  # (P, M)
    nearest = np.sort(distances, 1)[:, :neighbours]
    values = (nearest**2 if squared else nearest).mean(1)
    star = int(values.argmax())
    m_star = int(distances[star].argmin())
    weight = 1.0
    b = min(b, len(bank))
    if b > 1:
        to_star = np.sqrt(((bank - bank[m_star]) ** 2).sum(1))
        to_star[m_star] = -1  # itself, first
        company = np.argsort(to_star, kind="stable")[:b]
        exponent = distances[star][company] - distances[star][m_star]
        weight = 1 - 1 / np.exp(exponent).sum()
    upsampled = bilinear(values.reshape(h, w), size)
    smooth = scipy.ndimage.gaussian_filter(upsampled, sigma, mode="reflect", truncate=4.0) if sigma else upsampled
    return weight * values[star], smooth
