"""Slow, obvious float64 oracles that the tests compare the package with. They share no code with it."""

from __future__ import annotations

import numpy as np


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
    area = 0.0
    for left, right, low, high in zip(fpr, fpr[1:], overlap, overlap[1:], strict=False):
        if right <= fpr_limit:
            area += (right - left) * (low + high) / 2
        elif left < fpr_limit:  # the end point lies on this segment
            end = low + (high - low) * (fpr_limit - left) / (right - left)
            area += (fpr_limit - left) * (low + end) / 2
    return area / fpr_limit
