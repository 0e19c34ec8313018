"""An image's patches, or its brightness -> the object in front of a plain background.

The first principal component of an image's patch features tells object and background apart (Damm et al. 2025,
"AnomalyDINO"); so does brightness, where the background is darker or lighter. Otsu's threshold divides the values in
two, and the side that most of the border lies on is the background; small spots on it are none of the object's. Where
the border does not agree, all of the image is taken: no defect is to be lost by a guess.

``anomalydino`` is the mask of that paper's authors, step by step as in their code: it takes the object to be in the
middle of the image, and may be empty. Next: `counted.py`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

ForegroundKind = Literal["none", "auto", "brightness", "anomalydino"]
PLAIN_BORDER = 0.8  # share of the border's patches that are background, where the background is plain
LEAST_OBJECT, MOST_OBJECT = 0.01, 0.95  # shares of the image between which an object is believed
LEAST_PART = 0.1  # of the largest connected part's area, below which a part is a spot on the background
NEAR = np.ones((3, 3), bool)  # patches beside one
LEAST_COMPONENT = 10.0  # of the first principal component, in an object by `anomalydino`
MIDDLE = 0.2, 0.8  # of each axis, between which the object is expected
LEAST_MIDDLE = 0.35  # share of the middle that the object fills, or else the component is turned around


def foreground(kind: ForegroundKind, images: Tensor, features: Tensor) -> Tensor:
    """Patches of the object in each image: bool ``(B, h, w)``.

    Args:
        kind: ``auto``: by patch features; ``brightness``: by the images; ``anomalydino``: see `middle_object`.
        images: ``(B, 3, H, W)``.
        features: Their patch features, ``(B, h, w, D)``.
    """
    if kind == "brightness":
        values = F.interpolate(images.float().mean(1, keepdim=True), features.shape[1:3], mode="area")[:, 0]
    else:
        values = first_component(features)
    find = middle_object if kind == "anomalydino" else object_in
    return torch.from_numpy(np.stack([find(each) for each in values.cpu().numpy()]))


def first_component(features: Tensor) -> Tensor:
    """First principal component of each image's patch features ``(B, h, w, D)``: ``(B, h, w)``.

    Its sign is such that the greatest number of the direction, by its absolute value, is positive, as scikit-learn has
    it.
    """
    flat = features.flatten(1, 2).double()
    centred = flat - flat.mean(1, keepdim=True)
    direction = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, :, -1:]  # (B, D, 1)
    greatest = direction.gather(1, direction.abs().argmax(1, keepdim=True))
    direction = torch.where(greatest < 0, -direction, direction)
    values: Tensor = (centred @ direction)[..., 0].view(features.shape[:3])
    return values


def middle_object(component: np.ndarray) -> np.ndarray:
    """Patches ``(h, w)`` of an object by the first principal component, as AnomalyDINO's authors find it.

    Those above `LEAST_COMPONENT`; or, where they fill too little of the middle, those as far on the other side. The
    mask is dilated and closed by 3. As in the authors' code that is done on the patches in one long line, row after
    row: to the left and right, and from the end of a row to the start of the next.

    Example:
        >>> component = np.full((5, 5), 11.0)
        >>> component[:, 3:] = -11.0
        >>> middle_object(component).astype(int)[0].tolist()
        [1, 1, 1, 1, 1]
    """
    found = component > LEAST_COMPONENT
    rows, columns = (slice(*(int(side * end) for end in MIDDLE)) for side in component.shape)
    middle = found[rows, columns]
    if middle.sum() <= LEAST_MIDDLE * middle.size:
        found = -component > LEAST_COMPONENT
    line = ndimage.binary_dilation(found.ravel(), np.ones(3, bool), iterations=2)  # dilated, and again to be closed
    closed: np.ndarray = ndimage.binary_erosion(line, np.ones(3, bool), border_value=1).reshape(component.shape)
    return closed


def object_in(values: np.ndarray) -> np.ndarray:
    """Places ``(h, w)`` of an object, by values that differ between it and a plain background; all, where none is seen.

    Example:
        >>> values = np.zeros((6, 6))
        >>> values[2:4, 2:4] = 1
        >>> int(object_in(values).sum())
        16
    """
    from skimage.filters import threshold_otsu  # takes a fifth of a second to import

    everywhere = np.ones(values.shape, bool)
    if values.min() == values.max():
        return everywhere
    high = values > threshold_otsu(values)
    border = np.concatenate([high[0], high[-1], high[1:-1, 0], high[1:-1, -1]])
    if 1 - PLAIN_BORDER < border.mean() < PLAIN_BORDER:
        return everywhere
    found = ~high if border.mean() > 0.5 else high
    labels, number = ndimage.label(found, NEAR)
    areas = np.bincount(labels.ravel(), minlength=number + 1)[1:]
    found = np.isin(labels, 1 + np.flatnonzero(areas >= LEAST_PART * areas.max(initial=0)))
    if not LEAST_OBJECT <= found.mean() <= MOST_OBJECT:
        return everywhere
    filled: np.ndarray = ndimage.binary_fill_holes(ndimage.binary_dilation(found, NEAR))
    return filled
