"""A fixed bank of Gabor filters: a backbone that needs no weights.

Quadrature pairs of Gabor functions (Daugman 1985) at several orientations and wavelengths answer to stripes and
edges whatever their phase; their local energy has described textures since Jain and Farrokhnia (1991). Offered
for demonstrations and for textured surfaces where nothing can be downloaded; pretrained features are better.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_patchcore.preprocessing import IMAGENET_MEAN, IMAGENET_STD

_LUMA = (0.299, 0.587, 0.114)  # RGB to grey, ITU-R BT.601


class GaborScale(nn.Module):
    """Local energy at one wavelength, mean brightness and contrast, on a grid of its own.

    Args:
        wavelength: Period of the filters, pixels.
        orientations: Number of orientations, evenly over half a turn.
        stride: Cell of the grid, pixels.
    """

    kernels: Tensor

    def __init__(self, wavelength: float, orientations: int = 8, stride: int = 8) -> None:
        super().__init__()
        self.wavelength, self.orientations, self.stride = wavelength, orientations, stride
        self.register_buffer("kernels", gabor_kernels(wavelength, orientations), persistent=False)

    def forward(self, grey: Tensor) -> Tensor:
        """Filter grey images ``(B, 1, H, W)``, standard deviation about 1: ``(B, orientations + 2, h, w)``."""
        radius = self.kernels.shape[-1] // 2
        padded = F.pad(grey, (radius, radius, radius, radius), mode="replicate")
        even, odd = F.conv2d(padded, self.kernels).chunk(2, dim=1)  # (B, orientations, H, W) each
        energy = torch.sqrt(even.square() + odd.square() + 1e-6)
        side = self.stride
        mean = F.avg_pool2d(grey, side, ceil_mode=True)
        square = F.avg_pool2d(grey.square(), side, ceil_mode=True)
        contrast = torch.sqrt((square - mean.square()).clamp(min=0) + 1e-6)
        return torch.cat([F.avg_pool2d(energy, side, ceil_mode=True), mean, contrast], dim=1)


class GaborBank(nn.Module):
    """Gabor energies at several wavelengths, as layers ``scales.0`` (finest), ``scales.1``, ...

    Takes ImageNet-normalised RGB images. Every layer is on the same grid; collect any of them.

    Args:
        wavelengths: Period of each scale's filters, pixels.
        orientations: Orientations of each scale.
        stride: Cell of the grid, pixels.

    Example:
        >>> bank = GaborBank()
        >>> bank(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 40, 8, 12])
    """

    weight: Tensor

    def __init__(
        self, wavelengths: tuple[float, ...] = (3.0, 6.0, 12.0, 24.0), orientations: int = 8, stride: int = 8
    ) -> None:
        super().__init__()
        weight = torch.tensor(_LUMA) * torch.tensor(IMAGENET_STD)
        offset = torch.tensor(_LUMA) @ torch.tensor(IMAGENET_MEAN)
        self.register_buffer("weight", weight.view(1, 3, 1, 1), persistent=False)
        self.offset = float(offset)
        self.scales = nn.ModuleList(GaborScale(w, orientations, stride) for w in wavelengths)

    def forward(self, images: Tensor) -> Tensor:
        """Filter images ``(B, 3, H, W)``; all scales side by side."""
        grey = (images * self.weight).sum(dim=1, keepdim=True) + self.offset  # [0, 1]
        grey = (grey - 0.5) / 0.25
        return torch.cat([scale(grey) for scale in self.scales], dim=1)


def gabor_kernels(wavelength: float, orientations: int) -> Tensor:
    """Even and odd Gabor kernels with an envelope of half a wavelength.

    Args:
        wavelength: Period, pixels.
        orientations: Number of orientations; the first answers to vertical stripes.

    Returns:
        float32 ``(2 * orientations, 1, side, side)``, even ones first; without answer to constant images, and of
        gain 1 for a sine of their own frequency and orientation.
    """
    sigma = 0.5 * wavelength
    radius = math.ceil(2.5 * sigma)
    y, x = torch.meshgrid(*[torch.arange(-radius, radius + 1, dtype=torch.float64)] * 2, indexing="ij")
    envelope = torch.exp(-(x.square() + y.square()) / (2 * sigma**2))
    even, odd = [], []
    for step in range(orientations):
        angle = math.pi * step / orientations
        phase = 2 * math.pi / wavelength * (x * math.cos(angle) + y * math.sin(angle))
        cosine = envelope * torch.cos(phase)
        cosine = cosine - envelope * (cosine.sum() / envelope.sum())
        sine = envelope * torch.sin(phase)
        even.append(cosine / (cosine * torch.cos(phase)).sum())
        odd.append(sine / (sine * torch.sin(phase)).sum())
    return torch.stack(even + odd).float()[:, None]
