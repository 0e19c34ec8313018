"""Images -> patch features: locally aware features of mid-level layers, on one grid.

Reads images ``(B, 3, H, W)`` as `preprocessing.py` makes them, returns ``(B, h, w, D)``. Next: `feature_store.py`
in fitting, `memory_bank.py` in scoring. Source: Roth et al. 2022, section 3.1; the authors' code for pooled
dimensions. There, patches are interpolated before they are pooled; both steps are linear and act on different
axes, so they are exchanged here: the same features from a tenth of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_patchcore.backbone import PAPER_WEIGHTS, Backbone
from pl_patchcore.errors import UserError


class PatchFeatures(nn.Module):
    """Backbone layers, aggregated over neighbourhoods and brought to the grid of the first layer.

    Args:
        backbone: See `Backbone`.
        layers: Layers by dotted name; the first gives the grid.
        weights: See `Backbone`.
        patch_size: Side p of the neighbourhood, odd.
        patch_stride: Stride s of the neighbourhoods.
        layer_dim: None: features are averaged over the neighbourhood (zeros outside the map, counted) and the
            layers concatenated, as in the paper. A number: the p x p x C numbers of a neighbourhood are
            adaptively pooled to so many, layer by layer, as in the authors' code.
        feature_dim: With ``layer_dim``: the pooled layers together are adaptively pooled to so many.
        seed: Seed of random weights.

    Raises:
        UserError: For a bad value, or as `Backbone`.
    """

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
    ) -> None:
        super().__init__()
        if patch_size < 1 or patch_size % 2 == 0:
            raise UserError(f"patch_size must be odd and at least 1, got {patch_size}.")
        if patch_stride < 1:
            raise UserError(f"patch_stride must be at least 1, got {patch_stride}.")
        if (layer_dim is None) != (feature_dim is None):
            raise UserError(f"layer_dim and feature_dim go together, got {layer_dim} and {feature_dim}.")
        if layer_dim is not None and feature_dim is not None and min(layer_dim, feature_dim) < 1:
            raise UserError(f"layer_dim and feature_dim must be at least 1, got {layer_dim} and {feature_dim}.")
        self.patch_size, self.patch_stride = patch_size, patch_stride
        self.layer_dim, self.feature_dim = layer_dim, feature_dim
        self.backbone = Backbone(backbone, layers, weights, seed)

    @property
    def dimension(self) -> int:
        """Numbers in a patch feature, D."""
        return self.feature_dim or sum(self.backbone.channels)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the patch features of ``images``, float ``(B, 3, H, W)``: float32 ``(B, h, w, D)``."""
        layers = [self._aggregate(layer.float()) for layer in self.backbone(images)]  # (B, C, h, w) each
        grid = layers[0].shape[-2:]
        layers = [
            layer if layer.shape[-2:] == grid else F.interpolate(layer, size=grid, mode="bilinear", align_corners=False)
            for layer in layers
        ]
        features = torch.cat(layers, dim=1).permute(0, 2, 3, 1)  # (B, h, w, sum of C)
        if self.feature_dim is None:
            return features
        pooled: Tensor = F.adaptive_avg_pool1d(features.flatten(1, 2), self.feature_dim).unflatten(1, grid)
        return pooled

    def identity(self) -> dict[str, Any]:
        """What the features depend on, in plain values; two models with the same may share a memory bank."""
        return {
            "backbone": self.backbone.name,
            "backbone_sha256": self.backbone.sha256(),
            "layers": list(self.backbone.layers),
            "patch_size": self.patch_size,
            "patch_stride": self.patch_stride,
            "layer_dim": self.layer_dim,
            "feature_dim": self.feature_dim,
        }

    def _aggregate(self, layer: Tensor) -> Tensor:
        p, s = self.patch_size, self.patch_stride
        if self.layer_dim is None:
            return F.avg_pool2d(layer, p, s, p // 2)
        grid = [(side - 1) // s + 1 for side in layer.shape[-2:]]
        patches = F.unfold(layer, p, padding=p // 2, stride=s)  # (B, C p p, h w)
        pooled = F.adaptive_avg_pool1d(patches.transpose(1, 2), self.layer_dim)  # (B, h w, layer_dim)
        aggregated: Tensor = pooled.transpose(1, 2).unflatten(2, grid)
        return aggregated
