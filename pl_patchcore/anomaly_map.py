"""Distances of patches to the memory bank -> anomaly score and anomaly map.

Reads distances ``(B, h, w)``, returns anomaly scores ``(B,)`` and anomaly maps ``(B, H, W)``; the end of the way.
Equations are those of Roth et al. 2022. The maps' Gaussian repeats the edge pixel outside the map
(``d c b a | a b c d``) and is cut at four standard deviations: the paper leaves this open, the authors' code has it
through SciPy.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from kornia.filters import gaussian_blur2d
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from pl_patchcore.errors import UserError
from pl_patchcore.memory_bank import ForeignRows, MemoryBank

LARGEST_SIGMA = 1024  # pixels; the filter has 8 times as many
BAND_PIXELS = 1 << 22  # of a map, that are made at once: 16 MB
Distance = Literal["euclidean", "squared"]


class AnomalyScorer(nn.Module):
    """Score images and their pixels by the distance of their patches to the memory bank.

    Args:
        num_neighbors: Neighbours whose distances are averaged for a patch (1 in the paper).
        distance: ``euclidean``, or ``squared`` as the authors' code has it.
        reweighting_neighbors: b of equation 7, of a smaller bank all rows; 1 means no re-weighting.
        sigma: Standard deviation of the maps' Gaussian, pixels; 0 for none.
    """

    def __init__(
        self,
        num_neighbors: int = 1,
        distance: Distance = "euclidean",
        reweighting_neighbors: int = 9,
        sigma: float = 4.0,
    ) -> None:
        super().__init__()
        if num_neighbors < 1:
            raise UserError(f"num_neighbors must be at least 1, got {num_neighbors}.")
        if distance not in ("euclidean", "squared"):
            raise UserError(f"distance must be euclidean or squared, got {distance!r}.")
        if reweighting_neighbors < 1:
            raise UserError(
                f"reweighting_neighbors must be at least 1, got {reweighting_neighbors}; 1 switches equation 7 off."
            )
        if not 0 <= sigma <= LARGEST_SIGMA:
            raise UserError(f"sigma must be from 0 to {LARGEST_SIGMA} pixels, got {sigma}.")
        self.num_neighbors, self.distance = num_neighbors, distance
        self.reweighting_neighbors, self.sigma = reweighting_neighbors, sigma

    def forward(self, patches: Tensor, bank: MemoryBank | ForeignRows, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Compare patch features ``(B, h, w, D)`` of images of ``size`` (height, width) with the memory bank.

        Returns:
            Anomaly scores float32 ``(B,)`` and anomaly maps float32 ``(B, H, W)``, in units of feature distance
            (or its square), from 0 up without bound.
        """
        b, h, w, d = patches.shape
        nearest, rows = bank(patches.reshape(-1, d), self.num_neighbors)
        distances = nearest.square() if self.distance == "squared" else nearest
        distances = distances.mean(1).view(b, h * w)
        star, patch = distances.max(1)  # equation 6
        position = torch.arange(b, device=patches.device) * h * w + patch
        weight = reweighting(patches.reshape(-1, d)[position], rows[position, 0], bank, self.reweighting_neighbors)
        return star * weight, anomaly_map(distances.view(b, h, w), size, self.sigma)


def reweighting(patch: Tensor, nearest: Tensor, bank: MemoryBank | ForeignRows, b: int) -> Tensor:
    """Weight w of equation 7: small where the nearest bank feature has close company in the bank.

    ``w = 1 - exp(|x - m*|) / sum over m in N_b(m*) of exp(|x - m|)``, with N_b(m*) the b bank features nearest to
    m*, itself among them, once. On Euclidean distances whatever the score's; written as a softmax, so that
    large distances do not overflow.

    Args:
        patch: Most anomalous patch feature x of each image, ``(B, D)``.
        nearest: Number of its nearest row m* of the bank, int64 ``(B,)``.
        bank: The memory bank.
        b: Neighbours; of a smaller bank all rows.

    Returns:
        float32 ``(B,)`` in [0, 1]; all 1 for b = 1 or a bank of one row.
    """
    star = bank.features[nearest].float()  # (B, D)
    _, rows = bank(star, b)
    if rows.shape[1] == 1:
        return patch.new_ones(patch.shape[0], dtype=torch.float32)
    # Duplicates of m* may stand before it, even crowd it out; being equal, any of them stands for it.
    company = bank.features[rows].double()  # (B, b, D)
    distance = torch.linalg.vector_norm(patch.double()[:, None] - company, dim=2)
    own = torch.linalg.vector_norm(patch.double() - star.double(), dim=1)
    return (1 - torch.exp(own - torch.logsumexp(distance, 1))).clamp(0, 1).float()


def anomaly_map(distances: Tensor, size: tuple[int, int], sigma: float = 4.0) -> Tensor:
    """Upsample patch distances ``(B, h, w)`` bilinearly to maps ``(B, *size)``, smoothed by ``sigma`` pixels (0: not).

    Example:
        >>> anomaly_map(torch.ones(1, 4, 4), (16, 16)).shape
        torch.Size([1, 16, 16])
    """
    maps = F.interpolate(distances[:, None], size, mode="bilinear", align_corners=False)
    if sigma > 0:
        radius = int(4 * sigma + 0.5)
        # places along each axis, continued by ``radius`` on both sides, the edge repeated, however short it is
        turns = [torch.arange(-radius, n + radius, device=maps.device).remainder(2 * n) for n in size]
        y, x = (torch.minimum(place, 2 * n - 1 - place) for place, n in zip(turns, size, strict=True))
        maps = maps[:, :, y[:, None], x]
        maps = gaussian_blur2d(maps, (2 * radius + 1,) * 2, (sigma, sigma), border_type="constant")
        maps = maps[:, :, radius : radius + size[0], radius : radius + size[1]]
    return maps[:, 0]


def to_original(anomaly_map: Tensor, original_size: tuple[int, int], crop_box: tuple[float, ...]) -> Tensor:
    """Map an anomaly map ``(H, W)`` of the input back to the original image's pixels: float32 ``original_size``.

    Where the map is NaN it is continued from the nearest place that is not. A map that has the original's pixels
    already is returned as it is. The memory needed beside the result is that of a few million pixels.

    Args:
        anomaly_map: The input's map, of any floating type.
        original_size: Height and width of the original, pixels.
        crop_box: The part of the original that the map covers: top, left, bottom, right in its pixels; it may reach
            beyond. Pixels that the crop has left out have no score: NaN.

    Example:
        >>> to_original(torch.ones(2, 2), (4, 8), (0.0, 2.0, 4.0, 6.0)).isnan().float().mean()
        tensor(0.5000)
    """
    top, left, bottom, right = crop_box
    heat, (height, width) = anomaly_map.float(), original_size
    if tuple(heat.shape) == (height, width) and tuple(crop_box) == (0, 0, height, width):
        return heat
    rows = _places(height, heat.shape[0], top, bottom, heat.device)
    columns = _places(width, heat.shape[1], left, right, heat.device)
    if rows.weight.any() or columns.weight.any():
        heat = filled(heat)
    full = heat.new_empty(height, width)
    for band in torch.arange(height, device=heat.device).split(max(1, BAND_PIXELS // width)):
        first, second = rows.first[band], rows.second[band]
        lowest = int(first[0])
        near = heat[lowest : int(second.max()) + 1]
        wide = torch.lerp(near[:, columns.first], near[:, columns.second], columns.weight)  # (h, W0)
        full[band] = torch.lerp(wide[first - lowest], wide[second - lowest], rows.weight[band, None])
    full[rows.outside] = torch.nan
    full[:, columns.outside] = torch.nan
    return full


def filled(anomaly_map: Tensor) -> Tensor:
    """Give each NaN of a map ``(H, W)`` the value of the nearest place that has one.

    Rows and columns at the border that are NaN all along repeat what lies next to them, which costs nothing. Elsewhere
    it takes 16 bytes of memory a place. A map without NaN, or of nothing else, is returned as it is.

    Example:
        >>> filled(torch.tensor([[torch.nan, 1.0, torch.nan, torch.nan, 2.0]])).tolist()
        [[1.0, 1.0, 1.0, 2.0, 2.0]]
    """
    if not anomaly_map.max().isnan():  # which needs no copy
        return anomaly_map
    counts = ~anomaly_map.isnan()
    ends = [(int(found[0]), int(found[-1])) for axis in (1, 0) if len(found := counts.any(axis).nonzero().flatten())]
    if len(ends) < 2:
        return anomaly_map
    (top, bottom), (left, right) = ends
    inner, missing = (each[top : bottom + 1, left : right + 1] for each in (anomaly_map, ~counts))
    if missing.any():
        absent = missing.cpu().numpy()
        nearest = ndimage.distance_transform_edt(absent, return_distances=False, return_indices=True)
        y, x = (torch.from_numpy(places[absent]).long().to(inner.device) for places in nearest)
        inner = inner.clone()
        inner[missing] = inner[y, x]
    rows, columns = (torch.arange(n, device=inner.device) for n in anomaly_map.shape)
    return inner[rows.clamp(top, bottom) - top][:, columns.clamp(left, right) - left]


class _Places(NamedTuple):
    """Where the pixels of the original lie between those of the map, along one axis, ``(n,)`` each."""

    first: Tensor
    second: Tensor  # the first itself where its weight is 0
    weight: Tensor  # of the second
    outside: Tensor  # of the crop


def _places(pixels: int, cells: int, low: float, high: float, device: torch.device) -> _Places:
    at = (torch.arange(pixels, device=device, dtype=torch.float64) + 0.5 - low) * (cells / (high - low))
    place = (at - 0.5).clamp(0, cells - 1)  # the map's edge is continued to the crop's
    first = place.floor().long()
    weight = (place - first).float()
    second = torch.where(weight > 0, (first + 1).clamp(max=cells - 1), first)
    return _Places(first, second, weight, (at < 0) | (at > cells))
