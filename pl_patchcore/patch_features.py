"""Images -> patch features: locally aware features of mid-level layers, on one grid.

Reads images ``(B, 3, H, W)`` as `preprocessing.py` makes them, returns ``(B, h, w, D)``. Next: `coreset/` in fitting,
`memory_bank.py` in scoring. Source: Roth et al. 2022, section 3.1; the authors' code for pooled dimensions. There,
patches are interpolated before they are pooled; both steps are linear and act on different axes, so the order does not
matter: here pooling is first, which takes a tenth of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_patchcore.backbone import PAPER_WEIGHTS, as_grid, cut_network, weights_sha256
from pl_patchcore.errors import UserError


class PatchFeatures(nn.Module):
    """Backbone layers, aggregated over neighbourhoods and brought to the grid of the first layer.

    Frozen, and always in eval mode, copies too. Can be called from several threads at once.

    Args:
        backbone: Name of a torchvision classification model, or a module (a copy of it is used).
        layers: Layers by dotted name, as ``named_modules()`` gives them; the first gives the grid.
        weights: Name of torchvision weights, path of a ``.pth``, ``.pt`` or ``.safetensors`` state dict, or None for
            random weights. A module keeps the weights it has unless a path is given.
        patch_size: Side p of the neighbourhood, odd, in cells of the layer's grid.
        patch_stride: Stride s of the neighbourhoods, in cells of the layer's grid.
        layer_dim: None: features are averaged over the neighbourhood (zeros outside the map, counted) and the
            layers concatenated, as in the paper. A number: the p x p x C numbers of a neighbourhood are
            adaptively pooled to so many, layer by layer, as in the authors' code.
        feature_dim: With ``layer_dim``: the pooled layers together are adaptively pooled to so many.
        seed: Seed of random weights.
        image_size: Height and width of the images to come, if known; tried where a network does not take any size.

    Raises:
        UserError: For a bad value, or as `cut_network`.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU())
        >>> PatchFeatures(network, ["1"], None)(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 16, 16, 8])
    """

    like: Tensor

    def __init__(
        self,
        backbone: str | nn.Module = "wide_resnet50_2",
        layers: Sequence[str] = ("layer2", "layer3"),
        weights: str | None = PAPER_WEIGHTS,
        patch_size: int = 3,
        patch_stride: int = 1,
        layer_dim: int | None = None,
        feature_dim: int | None = None,
        seed: int = 0,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if patch_size < 1 or patch_size % 2 == 0:
            raise UserError(f"patch_size must be odd and at least 1, got {patch_size}.")
        self.patch_size, self.patch_stride = patch_size, patch_stride
        self.layer_dim, self.feature_dim = layer_dim, feature_dim
        cut = cut_network(backbone, layers, weights, seed, image_size)
        self.network, self.backbone_name, self.layouts, self.channels, self.only_size = cut
        self.layers = list(layers)
        weight = next(self.network.parameters(), torch.empty(0, dtype=torch.float32))
        self.register_buffer("like", torch.empty(0, dtype=weight.dtype), persistent=False)  # of the network's type
        self.weights_sha256 = weights_sha256(self.network)
        self.train(False)

    @property
    def dimension(self) -> int:
        """Numbers in a patch feature, D."""
        return self.feature_dim or sum(self.channels)

    def forward(self, images: Tensor) -> Tensor:
        """Compute patch features float32 ``(B, h, w, D)`` of images ``(B, 3, H, W)``, of any floating type.

        Raises:
            UserError: If the images are whole numbers, or of a size that the network does not take.
        """
        if not images.is_floating_point():
            raise UserError(
                f"images are {images.dtype}; make them by model.transform, or float32: scaled to [0, 1] and normalised."
            )
        size = tuple(images.shape[-2:])
        try:
            outputs = self.network(images.to(self.like.dtype))
        except (RuntimeError, AssertionError, ValueError) as error:
            if self.only_size in (None, size):
                raise
            (height, width), (h, w) = self.only_size, size
            raise UserError(
                f"the backbone takes images of {height}x{width} pixels, and fails on {h}x{w}: set resize and crop."
            ) from error
        p, s = self.patch_size, self.patch_stride
        parts: list[Tensor] = []
        for name, layout in zip(self.layers, self.layouts, strict=True):
            layer = outputs[name]
            if layout[0] != "bchw" or not isinstance(layer, Tensor):
                layer = as_grid(layer, layout, size, name)
            layer = layer.float()  # (B, C, h, w)
            if self.layer_dim is None:
                layer = F.avg_pool2d(layer, p, s, p // 2)
            else:
                grid = [(side - 1) // s + 1 for side in layer.shape[-2:]]
                patches = F.unfold(layer, p, padding=p // 2, stride=s).transpose(1, 2)  # (B, h w, C p p)
                layer = F.adaptive_avg_pool1d(patches, self.layer_dim).transpose(1, 2).unflatten(2, grid)
            if parts and layer.shape[-2:] != parts[0].shape[-2:]:
                layer = F.interpolate(layer, size=parts[0].shape[-2:], mode="bilinear", align_corners=False)
            parts.append(layer)
        features = torch.cat(parts, dim=1).permute(0, 2, 3, 1)  # (B, h, w, sum of C)
        if self.feature_dim is not None:
            pooled = F.adaptive_avg_pool1d(features.flatten(1, 2), self.feature_dim)
            features = pooled.unflatten(1, features.shape[1:3])
        return features

    def train(self, mode: bool = True) -> PatchFeatures:
        """Stay in eval mode."""
        return super().train(False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.train(False)  # copies of traced networks come out in training mode

    def identify(self) -> None:
        """Take the hash of the weights again, unless they have been cast: it is that of the float32 weights."""
        if all(weight.dtype == torch.float32 for weight in self.network.parameters()):
            self.weights_sha256 = weights_sha256(self.network)

    @property
    def identity(self) -> dict[str, Any]:
        """What the features depend on, in plain values; two models with the same may share a memory bank."""
        names = ("patch_size", "patch_stride", "layer_dim", "feature_dim")
        own = {"backbone": self.backbone_name, "backbone_sha256": self.weights_sha256, "layers": list(self.layers)}
        return own | {name: getattr(self, name) for name in names}
