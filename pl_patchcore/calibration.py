"""Anomaly scores of nominal images kept out of the memory bank -> thresholds, without a look at any defect.

A threshold is set by the false-alarm rate that the user accepts: split conformal prediction (Papadopoulos et al.
2002; Vovk et al. 2005). With n held-out images, the threshold is their k-th smallest score,
``k = n + 1 - floor((n + 1) * rate)``; a new nominal image, drawn as they were, then exceeds it with probability
``floor((n + 1) * rate) / (n + 1)``, whatever the distribution of scores (less where scores tie). Below
``1 / rate - 1`` images no score is high enough; the highest one then serves, and promises ``1 / (n + 1)``.

For pixels the score of an image is the peak of its anomaly map: with the promised probability not one pixel of a
new nominal image lies above the threshold. `Calibration` holds the scores in the model; next: `metrics/`.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pl_patchcore.distributed import on_first_process
from pl_patchcore.errors import UserError

log = logging.getLogger(__name__)
log.addFilter(on_first_process)

SLACK = 1e-9  # so that 20 * 0.05 is 1
STREAM = 1  # of random numbers: a split of the data set by the same seed must not go along with this draw


def draw_held_out(number: int, share: float, seed: int) -> frozenset[int]:
    """Draw a ``share`` of all training images, in [0, 1), to be kept out of the memory bank: at least one, if not 0.

    Example:
        >>> sorted(draw_held_out(10, 0.2, seed=0))
        [1, 9]
    """
    wanted = max(1, round(share * number)) if share else 0
    return frozenset(np.random.default_rng([seed, STREAM]).permutation(number)[:wanted].tolist())


def is_held_out(index: int, share: float, seed: int) -> bool:
    """Whether an image is held out, where the number of images is not known: one in every ``1 / share`` in a row.

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
    above = max(1, math.floor((n + 1) * rate + SLACK))  # of n + 1 exchangeable scores, so many exceed it
    return scores.sort().values[n - above].item(), above / (n + 1)


def images_needed(rate: float) -> int:
    """Number of held-out images below which a false-alarm rate cannot be promised: 99 for 0.01."""
    return math.ceil(1 / rate - 1 - SLACK)


def p_values(scores: Tensor, held_out: Tensor) -> Tensor:
    """Share of the ``held_out`` images ``(n,)`` that score at least as high, the new image counted among them.

    Returns:
        float32 ``(B,)`` in [1 / (n + 1), 1]; of nominal images, at most a share p has a value of p or less.

    Example:
        >>> p_values(torch.tensor([0.5, 9.0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor([1.0000, 0.2500])
    """
    kind = torch.promote_types(scores.dtype, held_out.dtype)
    at_least = len(held_out) - torch.searchsorted(held_out.sort().values.to(kind), scores.to(kind).contiguous())
    return (1 + at_least).float() / (1 + len(held_out))


class Calibration(nn.Module):
    """Scores of the held-out images, saved with the model; empty until `fill`.

    Casting a model casts them: thresholds are then rounded as its scores are.

    Attributes:
        scores: Anomaly scores, ``(n,)``, float32; of any n by ``load_state_dict``.
        peaks: Highest value of each image's anomaly map, ``(n,)``, float32.

    Example:
        >>> calibration = Calibration()
        >>> calibration.image_threshold(0.5)
        >>> calibration.fill(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0]))
        >>> calibration.image_threshold(0.5), calibration.pixel_threshold(0.25)
        (2.0, 6.0)
    """

    scores: Tensor
    peaks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scores", torch.empty(0, dtype=torch.float32))
        self.register_buffer("peaks", torch.empty(0, dtype=torch.float32))
        self.register_load_state_dict_pre_hook(_take_sizes)  # type: ignore[no-untyped-call]

    def fill(self, scores: Tensor, peaks: Tensor) -> None:
        """Take in the scores and the peaks of the maps of all held-out images, ``(n,)`` each."""
        device = self.scores.device
        self.scores, self.peaks = (each.detach().to(device, torch.float32, copy=True) for each in (scores, peaks))

    def clear(self) -> None:
        """Forget them."""
        self.fill(self.scores[:0], self.peaks[:0])

    def image_threshold(self, rate: float) -> float | None:
        """Anomaly score that a nominal image exceeds with probability ``rate``; None while empty."""
        return conformal_threshold(self.scores, rate)[0] if len(self.scores) else None

    def pixel_threshold(self, rate: float) -> float | None:
        """Value that a nominal image's anomaly map exceeds somewhere with probability ``rate``; None while empty."""
        return conformal_threshold(self.peaks, rate)[0] if len(self.peaks) else None

    def p_values(self, scores: Tensor) -> Tensor:
        """Share of nominal images that score as high as each of ``scores`` ``(B,)`` (see `p_values`)."""
        return p_values(scores, self.scores)

    def tell(self, rate: float) -> None:
        """Log the thresholds, and what they promise; nothing while empty.

        Raises:
            UserError: If the threshold is 0, which no score can be compared to.
        """
        if not (n := len(self.scores)):
            return
        threshold, promised = conformal_threshold(self.scores, rate)
        if threshold <= 0:
            raise UserError(
                f"the threshold is {threshold:g}: held-out nominal images score 0, as copies of training images do; "
                "give images that differ, or set calibration_share to 0."
            )
        log.info(
            "thresholds from %d held-out nominal images: %.4g for anomaly scores, %.4g for anomaly maps; a nominal "
            "image exceeds each with probability %.3g.",
            *(n, threshold, self.pixel_threshold(rate), promised),
        )
        if n < images_needed(rate):
            log.warning(
                "false_alarm_rate %g needs at least %d held-out images, there are %d: the thresholds are the highest "
                "of them, and promise %.3g; raise calibration_share or take more nominal images.",
                *(rate, images_needed(rate), n, promised),
            )


def _take_sizes(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: give the buffers the sizes of those that were saved."""
    for name, buffer in module.named_buffers(recurse=False):
        if isinstance(saved := state_dict.get(prefix + name), Tensor):
            setattr(module, name, buffer.new_empty(saved.shape))
