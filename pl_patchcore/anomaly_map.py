"""Distances of patches to the memory bank -> anomaly score and anomaly map.

Reads patch features, returns anomaly scores ``(B,)`` and anomaly maps ``(B, H, W)``; the end of the way.
Equations are those of Roth et al. 2022. The maps' Gaussian repeats the edge pixel outside the map
(``d c b a | a b c d``) and is cut at four standard deviations: the paper leaves this open, the authors' code has it
through SciPy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import torch
from kornia.filters import gaussian_blur2d
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from pl_patchcore.counted import Counted
from pl_patchcore.errors import UserError
from pl_patchcore.memory_bank import ForeignRows, MemoryBank
from pl_patchcore.patch_features import Band
from pl_patchcore.search.by_position import Places

LARGEST_SIGMA = 1024  # pixels; the filter has 8 times as many
BAND_PIXELS = 1 << 22  # of a map, that are made at once: 16 MB
SLACK = 1e-9  # so that a hundredth of 300 patches is 3
Distance = Literal["euclidean", "squared", "half_squared"]
ImageScore = Literal["max", "top_mean"]
TopShareOf = Literal["scored", "all"]


class AnomalyScorer(nn.Module):
    """Score images and their pixels by the distance of their patches to the memory bank.

    Args:
        num_neighbors: Neighbours whose distances are averaged for a patch (1 in the paper).
        distance: ``euclidean``; ``squared`` as the authors' code has it; or ``half_squared``, which is one minus the
            cosine of patch features of unit length.
        reweighting_neighbors: b of equation 7, of a smaller bank all rows; 1 means no re-weighting.
        sigma: Standard deviation of the maps' Gaussian, pixels; 0 for none.
        image_score: ``max``: the largest patch distance, weighted by equation 7. ``top_mean``: the mean of the highest
            ``top_share`` of the patch distances, at least of one.
        top_share: In (0, 1].
        top_share_of: ``scored``: of the patches that count; other pixels are NaN in the map. ``all``: of all patches,
            where those outside an object have the distance 0, in the map too.
    """

    def __init__(
        self,
        num_neighbors: int = 1,
        distance: Distance = "euclidean",
        reweighting_neighbors: int = 9,
        sigma: float = 4.0,
        image_score: ImageScore = "max",
        top_share: float = 0.01,
        top_share_of: TopShareOf = "scored",
    ) -> None:
        super().__init__()
        if num_neighbors < 1:
            raise UserError(f"num_neighbors must be at least 1, got {num_neighbors}.")
        if distance not in get_args(Distance):
            raise UserError(f"distance must be euclidean, squared or half_squared, got {distance!r}.")
        if reweighting_neighbors < 1:
            raise UserError(
                f"reweighting_neighbors must be at least 1, got {reweighting_neighbors}; 1 switches equation 7 off."
            )
        if not 0 <= sigma <= LARGEST_SIGMA:
            raise UserError(f"sigma must be from 0 to {LARGEST_SIGMA} pixels, got {sigma}.")
        if image_score not in ("max", "top_mean"):
            raise UserError(f"image_score must be max or top_mean, got {image_score!r}.")
        if not 0 < top_share <= 1:
            raise UserError(f"top_share must be in (0, 1], got {top_share}.")
        if top_share_of not in get_args(TopShareOf):
            raise UserError(f"top_share_of must be scored or all, got {top_share_of!r}.")
        self.num_neighbors, self.distance = num_neighbors, distance
        self.reweighting_neighbors, self.sigma = reweighting_neighbors, sigma
        self.image_score, self.top_share, self.top_share_of = image_score, top_share, top_share_of

    def in_units(self, nearest: Tensor) -> Tensor:
        """Euclidean distances as ``distance`` says."""
        if self.distance == "euclidean":
            return nearest
        return nearest.square() if self.distance == "squared" else nearest.square() / 2

    def forward(
        self,
        bands: Iterable[Band],
        bank: MemoryBank | ForeignRows,
        size: tuple[int, int],
        counted: Counted | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compare patch features of images with the memory bank.

        Args:
            bands: Patch features ``(B, h', w, D)``, from the top, as `PatchFeatures.bands` gives them.
            bank: The memory bank.
            size: Height and width of the maps, pixels.
            counted: Which places of the images count; None: all.

        Returns:
            Anomaly scores float32 ``(B,)`` and anomaly maps float32 ``(B, H, W)``, in units of feature distance
            (or its square), from 0 up without bound; NaN in maps where a pixel does not count.

        Raises:
            UserError: If no patch of an image counts.
        """
        parts: list[_Part] = []
        inside: Inside | None = None
        for band in bands:
            if counted is not None and inside is None:
                inside = self.inside(counted, band.rows, band.features.shape[2])
            parts.append(self._compared(band, bank, inside))
        distances = torch.cat([part.distances for part in parts], 1)  # (B, h, w)
        if self.image_score == "top_mean":
            scores = top_mean(distances if self.top_share_of == "scored" else distances.clamp(min=0), self.top_share)
        else:
            stars = torch.stack([part.star for part in parts])  # (bands, B)
            best = stars.max(0).indices[None]
            patches = torch.stack([part.patch for part in parts])  # (bands, B, D)
            patch = patches.gather(0, best[..., None].expand(-1, -1, patches.shape[2]))[0]
            row = torch.stack([part.row for part in parts]).gather(0, best)[0]
            scores = stars.gather(0, best)[0] * reweighting(patch, row, bank, self.reweighting_neighbors)
        if counted is None or inside is None:
            return scores, anomaly_map(distances, size, self.sigma)
        pixels = (counted.whole() if self.top_share_of == "all" else counted).at(*size)
        if self.top_share_of == "all" and pixels.all():
            return scores, anomaly_map(distances, size, self.sigma)
        return scores, anomaly_map(continued(distances, inside.valid), size, self.sigma, pixels)

    def inside(self, counted: Counted, h: int, w: int) -> Inside:
        """Which patches of a grid count."""
        if self.top_share_of == "scored":
            inside = counted.patches(h, w)
            return Inside(inside, inside)
        return Inside(counted.at(h, w), counted.whole().patches(h, w))

    def _compared(self, band: Band, bank: MemoryBank | ForeignRows, inside: Inside | None) -> _Part:
        """Compare a band of patches with the memory bank."""
        features, top, whole = band
        b, h, w, d = features.shape
        flat, chosen, places = features.reshape(-1, d), None, None
        if inside is not None:
            chosen = inside.compared[:, top : top + h].flatten().nonzero()[:, 0]
        if bank.position_radius is not None:
            places = Places.of_rows(b, top, h, (whole, w), flat.device)
            places = places if chosen is None else places._replace(at=places.at[chosen])
        nearest, found = bank(flat if chosen is None else flat[chosen], self.num_neighbors, places)
        distances, rows = self.in_units(nearest).mean(1), found[:, 0]
        if chosen is not None and inside is not None:  # one that does not count has the distance -inf
            valid = inside.valid[:, top : top + h].flatten()
            others = distances.new_zeros(b * h * w).masked_fill(~valid, -torch.inf)
            distances = others.index_put((chosen,), distances)
            rows = rows.new_zeros(b * h * w).index_put((chosen,), rows)
        star, patch = distances.view(b, h * w).max(1)  # equation 6
        position = torch.arange(b, device=features.device) * h * w + patch
        # no search has a gradient, and part of one would be wrong
        return _Part(distances.view(b, h, w), star, flat[position].detach(), rows[position])


class Inside(NamedTuple):
    """Which patches count, bool ``(B, h, w)`` each."""

    compared: Tensor  # with the memory bank
    valid: Tensor  # these, and those that have the distance 0


class _Part(NamedTuple):
    """What a band of patches comes to."""

    distances: Tensor  # of its patches, (B, h', w)
    star: Tensor  # the largest of each image, (B,)
    patch: Tensor  # the patch feature that has it, (B, D)
    row: Tensor  # number of its nearest row of the bank, int64 (B,)


def top_mean(distances: Tensor, share: float) -> Tensor:
    """Mean of the highest ``share`` of each image's distances ``(B, h, w)``, at least of one; -inf does not count.

    Example:
        >>> top_mean(torch.tensor([[[1.0, 2.0], [4.0, -torch.inf]]]), 0.7)
        tensor([3.])
    """
    highest = distances.flatten(1).sort(1, descending=True).values
    number = ((highest > -torch.inf).sum(1).double() * share + SLACK).floor().clamp(min=1)  # (B,)
    taken = torch.arange(highest.shape[1], device=highest.device) < number[:, None]
    return (torch.where(taken, highest, 0).double().sum(1) / number).float()


def continued(distances: Tensor, inside: Tensor) -> Tensor:
    """Give patches that do not count the distance of the nearest one that does: ``(B, h, w)`` each."""
    found = distances.clone()
    for image, places in zip(found, inside.cpu().numpy(), strict=True):
        y, x = ndimage.distance_transform_edt(~places, return_distances=False, return_indices=True)
        image[:] = image[torch.from_numpy(y).to(image.device).long(), torch.from_numpy(x).to(image.device).long()]
    return found


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


def anomaly_map(distances: Tensor, size: tuple[int, int], sigma: float = 4.0, inside: Tensor | None = None) -> Tensor:
    """Upsample patch distances ``(B, h, w)`` bilinearly to maps ``(B, *size)``, smoothed by ``sigma`` pixels (0: not).

    Args:
        distances: Of patches.
        size: Height and width of the maps.
        sigma: Standard deviation of the Gaussian, pixels.
        inside: Which pixels count, bool ``(B, *size)``: the Gaussian weighs these alone, the others are NaN; None: all.

    Example:
        >>> anomaly_map(torch.ones(1, 4, 4), (16, 16)).shape
        torch.Size([1, 16, 16])
    """
    maps = F.interpolate(distances[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    if inside is None:
        return smoothed(maps, sigma)
    counts = inside.to(maps.dtype)
    share = smoothed(counts, sigma)
    maps = smoothed(maps.mul_(counts), sigma).div_(share)
    return maps.masked_fill_(~inside, torch.nan)


def peaks(maps: Tensor) -> Tensor:
    """Highest value of each map ``(B, H, W)`` among the pixels that count: ``(B,)``."""
    highest: Tensor = maps.flatten(1).amax(1)
    if highest.isnan().any():  # else no copy is made of a large map
        highest = maps.nan_to_num(nan=-torch.inf, posinf=torch.inf).flatten(1).amax(1)
    return highest


def smoothed(maps: Tensor, sigma: float) -> Tensor:
    """Smooth maps ``(B, H, W)`` by a Gaussian of ``sigma`` pixels, in bands of rows, so that little more is held."""
    height, width = maps.shape[1:]
    if sigma == 0:
        return maps
    radius = int(4 * sigma + 0.5)
    # places along each axis, continued by ``radius`` on both sides, the edge repeated, however short it is
    turns = [torch.arange(-radius, n + radius, device=maps.device).remainder(2 * n) for n in (height, width)]
    y, x = (torch.minimum(place, 2 * n - 1 - place) for place, n in zip(turns, (height, width), strict=True))
    whole = torch.compiler.is_compiling() or height * width <= BAND_PIXELS  # a recorded graph has no loop over sizes
    rows = height if whole else max(1, BAND_PIXELS // width)
    bands = [y] if whole else [y[top : top + rows + 2 * radius] for top in range(0, height, rows)]
    kernel = 2 * (2 * radius + 1,), 2 * (sigma,), "constant"
    inner = slice(radius, -radius or None)
    found = [gaussian_blur2d(maps[:, None, band[:, None], x], *kernel)[:, 0, inner, inner] for band in bands]
    return found[0] if whole else torch.cat(found, 1)


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
    centre = torch.arange(pixels, device=device, dtype=torch.float64) + 0.5
    at = (centre - low) * (cells / (high - low))
    place = (at - 0.5).clamp(0, cells - 1)  # the map's edge is continued to the crop's
    first = place.floor().long()
    weight = (place - first).float()
    second = torch.where(weight > 0, (first + 1).clamp(max=cells - 1), first)
    start, end = torch.tensor([low, high], dtype=torch.float32).tolist()  # an edge on a centre is on it exactly
    return _Places(first, second, weight, (centre < start) | (centre > end))
