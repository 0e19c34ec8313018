"""A training image -> the views of it that go into the memory bank: turned, and in other light.

Patch features change where a part is turned or lit otherwise, and a few images show it in one way only. Views are made
of the backbone's inputs, on their device, so that images come from any loader. The views of an image are one image for
calibration, and for all that is told of training images; only the image itself is scored.
Source: Damm et al. 2025, "AnomalyDINO", who turn by steps of 45 degrees. They turn the original image before it is
resized, half a pixel off the centre; here the input is turned around its centre, so that a square image turned by 90
degrees has the same pixels. Next: `patch_features.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pl_patchcore.counted import Counted, Turn
from pl_patchcore.errors import UserError
from pl_patchcore.preprocessing import BAND, IMAGENET_MEAN, IMAGENET_STD

MOST_ROTATIONS = 360
TOLERANCE = 0.05  # in units of [0, 1], by which images of low precision may lie outside


@dataclass(frozen=True)
class ReferenceViews:
    """Which views of a training image go into the memory bank: each rotation at each brightness.

    Args:
        rotations: Angles, spread evenly around the centre; 1: the image as it is.
        brightness: Lowest and highest factor of the image's levels, above 0; each image is there at 1 and at these
            two. None: only as it is.
        mean: Subtracted from images per RGB channel, in units of [0, 1].
        std: Divided by per RGB channel, in units of [0, 1].

    Raises:
        UserError: If a value is out of range.

    Example:
        >>> views = ReferenceViews(rotations=4, brightness=(0.8, 1.2))
        >>> len(views), views.angles, views.factors
        (12, [0.0, 90.0, 180.0, 270.0], [1.0, 0.8, 1.2])
    """

    rotations: int = 1
    brightness: tuple[float, float] | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not 1 <= self.rotations <= MOST_ROTATIONS:
            raise UserError(
                f"reference_rotations must be from 1 (none) to {MOST_ROTATIONS}, got {self.rotations}; 8 turns by "
                "steps of 45 degrees."
            )
        if self.brightness is not None and not 0 < self.brightness[0] <= self.brightness[1]:
            raise UserError(
                "reference_brightness must be two factors above 0, the lower one first, such as [0.8, 1.2], got "
                f"{list(self.brightness)}."
            )

    @property
    def angles(self) -> list[float]:
        """Degrees, counter-clockwise, 0 first."""
        return [360 * k / self.rotations for k in range(self.rotations)]

    @property
    def factors(self) -> list[float]:
        """Factors of the levels, each once, 1 first."""
        return list(dict.fromkeys([1.0, *map(float, self.brightness or ())]))

    def __len__(self) -> int:
        return len(self.angles) * len(self.factors)

    def check(self, images: Tensor) -> None:
        """Refuse images ``(B, 3, H, W)`` whose brightness cannot be changed: normalised otherwise, not uint8.

        Raises:
            UserError: If they do not lie in [0, 1] before the normalisation.
        """
        if len(self.factors) == 1 or not images.is_floating_point():
            return
        mean, std = self._normalisation(images)
        low, high = (float(each) for each in (images.float() * std + mean).aminmax())
        if low < -TOLERANCE or high > 1 + TOLERANCE:
            raise UserError(
                f"reference_brightness needs images of [0, 1], normalised by images.mean and images.std: without them "
                f"these reach from {low:.3g} to {high:.3g}; set both to what the loader does (model.transform does it)."
            )

    def of(self, image: Tensor, counted: Counted | None) -> Iterator[tuple[Tensor, Counted | None]]:
        """All views of an image ``(1, 3, H, W)``, itself first, each with what counts of it."""
        for angle in self.angles:
            view, turn = turned(image, angle), Turn(angle, (image.shape[2], image.shape[3]))
            inside = counted.turned(turn) if angle and counted is not None else counted
            for factor in self.factors:
                yield (view if factor == 1 else self._brightened(view, factor)), inside

    def _brightened(self, images: Tensor, factor: float) -> Tensor:
        """Images whose levels are multiplied by a factor, clipped to their range; normalised ones as they were."""
        if not images.is_floating_point():
            return (images.float() * factor).round_().clamp_(0, 255).to(images.dtype)
        mean, std = self._normalisation(images)
        levels = (images.float() * std + mean).mul_(factor).clamp_(0, 1)
        return levels.sub_(mean).div_(std).to(images.dtype)

    def _normalisation(self, images: Tensor) -> list[Tensor]:
        return [images.new_tensor(each, dtype=torch.float32)[:, None, None] for each in (self.mean, self.std)]


def turned(images: Tensor, degrees: float) -> Tensor:
    """Images turned counter-clockwise around their centre, at the same size; beyond their edges they are reflected.

    Interpolated bilinearly, levels rounded. A square image turned by a multiple of 90 degrees has the same pixels.

    Args:
        images: ``(B, 3, H, W)``, of any floating type, or uint8.
        degrees: The angle.

    Example:
        >>> turned(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), 90)[0, 0].tolist()
        [[2.0, 4.0], [1.0, 3.0]]
    """
    if degrees % 360 == 0:
        return images
    height, width = images.shape[2:]
    turn, flat, found = Turn(degrees, (height, width)), images.flatten(2), torch.empty_like(images)
    for first in range(0, height, BAND):
        rows = np.arange(first, min(first + BAND, height))
        y, x = turn.sources(rows[:, None], np.arange(width)[None])  # (h', W)
        top, left = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
        band = torch.zeros(*images.shape[:2], y.size, dtype=torch.float32, device=images.device)
        for down in (0, 1):
            for right in (0, 1):
                place = np.minimum(top + down, height - 1) * width + np.minimum(left + right, width - 1)
                weight = np.abs(1 - down - (y - top)) * np.abs(1 - right - (x - left))
                values = flat.index_select(2, torch.from_numpy(place.ravel()).to(images.device))
                band.addcmul_(values.float(), torch.from_numpy(weight.ravel().astype(np.float32)).to(images.device))
        if not images.is_floating_point():
            band.round_()
        found[:, :, first : first + len(rows)] = band.unflatten(2, y.shape).to(images.dtype)
    return found
