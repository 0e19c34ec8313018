"""Anomaly scores of nominal images kept out of the memory bank -> thresholds, without a look at any defect.

A threshold is set by the false-alarm rate that the user accepts: split conformal prediction (Papadopoulos et al.
2002; Vovk et al. 2005). With n held-out images, the threshold is their k-th smallest score,
``k = n + 1 - floor((n + 1) * rate)``; a new nominal image, drawn as they were, then exceeds it with probability
``floor((n + 1) * rate) / (n + 1)``, whatever the distribution of scores (less where scores tie). Below
``1 / rate - 1`` images no score is high enough; the highest one then serves, and promises ``1 / (n + 1)``.

For pixels the score of an image is the peak of its anomaly map: with the promised probability not one pixel of a
new nominal image lies above the threshold. Read by `anomaly_module.py`, which holds the scores in the checkpoint.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_SLACK = 1e-9  # so that 20 * 0.05 is 1
_STREAM = (
    1  # apart from the draws of others with the same seed: a split of the data set must not go along with this one
)


def draw_held_out(number: int, share: float, seed: int) -> frozenset[int]:
    """Draw the training images that are kept out of the memory bank.

    Args:
        number: Number of training images.
        share: Share of them, in [0, 1); at least one image, where it is not 0.
        seed: Seed of the draw.

    Returns:
        Their indices.

    Example:
        >>> sorted(draw_held_out(10, 0.2, seed=0))
        [1, 9]
    """
    wanted = max(1, round(share * number)) if share else 0
    return frozenset(np.random.default_rng([seed, _STREAM]).permutation(number)[:wanted].tolist())


def is_held_out(index: int, share: float, seed: int) -> bool:
    """Whether an image is kept out of the memory bank, where the number of images is not known beforehand.

    One image, drawn by the seed, in every ``1 / share`` in a row.

    Args:
        index: Position of the image.
        share: Share of the images, in [0, 1).
        seed: Seed of the draw.

    Example:
        >>> [i for i in range(12) if is_held_out(i, 0.25, seed=0)]
        [3, 6, 11]
    """
    if not share:
        return False
    block = int(index * share)
    first, last = math.ceil(block / share), math.ceil((block + 1) / share)
    return index == int(np.random.default_rng([seed, block]).integers(first, max(last, first + 1)))


def conformal_threshold(scores: Tensor, rate: float) -> tuple[float, float]:
    """Threshold that nominal scores exceed at a given rate.

    Args:
        scores: Scores of held-out nominal images, ``(n,)``, n at least 1.
        rate: False-alarm rate accepted, in (0, 1).

    Returns:
        The threshold (scores above it are alarms), and the false-alarm rate it promises: at most ``rate``, or
        ``1 / (n + 1)`` where that is more (see `images_needed`).

    Example:
        >>> conformal_threshold(torch.arange(1.0, 20.0), 0.1)  # 19 images: the 18th smallest
        (18.0, 0.1)
    """
    n = len(scores)
    above = max(1, math.floor((n + 1) * rate + _SLACK))  # of n + 1 exchangeable scores, so many exceed it
    return scores.sort().values[n - above].item(), above / (n + 1)


def images_needed(rate: float) -> int:
    """Number of held-out images below which a false-alarm rate cannot be promised.

    Example:
        >>> images_needed(0.01)
        99
    """
    return math.ceil(1 / rate - 1 - _SLACK)


def p_values(scores: Tensor, calibration: Tensor) -> Tensor:
    """Share of nominal images that score at least as high, the new image counted among them.

    Args:
        scores: Anomaly scores, ``(B,)``.
        calibration: Scores of held-out nominal images, ``(n,)``.

    Returns:
        float32 ``(B,)`` in [1 / (n + 1), 1]; of nominal images, at most a share p has a value of p or less.

    Example:
        >>> p_values(torch.tensor([0.5, 9.0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor([1.0000, 0.2500])
    """
    ordered = calibration.sort().values
    at_least = len(ordered) - torch.searchsorted(ordered, scores.contiguous())
    return (1 + at_least).float() / (1 + len(ordered))
