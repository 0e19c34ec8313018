"""Images -> patch features: locally aware features of mid-level layers, on one grid.

Reads images ``(B, 3, H, W)`` as `preprocessing.py` makes them, returns ``(B, h, w, D)``. Next: `coreset/` in fitting,
`memory_bank.py` in scoring. Source: Roth et al. 2022, section 3.1; the authors' code for pooled dimensions. There,
patches are interpolated before they are pooled; both steps are linear and act on different axes, so the order does not
matter: here pooling is first, which takes a tenth of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_patchcore.backbone import PAPER_WEIGHTS, as_grid, building, cut_network, weights_sha256
from pl_patchcore.errors import UserError
from pl_patchcore.numerics import bf16_is_fast
from pl_patchcore.preprocessing import IMAGENET_MEAN, IMAGENET_STD, normalised
from pl_patchcore.tiles import LayerGrid, TileOptions, Tiling, Window, measure_layers
from pl_patchcore.timm_networks import PositionRule

# Pixels that the network is given at once on the CPU: two images of 224 x 224. A batch of 32 makes its outputs so large
# that the C library maps fresh memory for each, which can take longer than the convolutions.
CPU_PIXELS = 1 << 17
Combine = Literal["concatenate", "mean"]
Inference = Literal["float32", "bf16", "auto"]


class Band(NamedTuple):
    """Patch features of a part of the rows of the patch grid."""

    features: Tensor  # (B, h', w, D), float32
    top: int  # the first row's number
    rows: int  # of the whole grid, h


class PatchFeatures(nn.Module):
    """Backbone layers, aggregated over neighbourhoods and brought to the grid of the first layer.

    Frozen, and always in eval mode, copies too. Can be called from several threads at once.

    Args:
        backbone: Name of a torchvision classification model, ``timm/NAME``, or a module (a copy of it is used).
        layers: Layers by dotted name, as ``named_modules()`` gives them; the first gives the grid. ``blocks.-1``
            counts from the end, ``last`` is the last layer that gives a grid, ``name[0]`` an entry of a tuple (or of a
            data class, by name). The last layer of a timm transformer is normalised by its final norm.
        weights: Name of torchvision weights, ``pretrained`` or the default for timm's own, path of a ``.pth``, ``.pt``
            or ``.safetensors`` state dict, or None for random weights. A module keeps the weights it has unless a path
            is given.
        patch_size: Side p of the neighbourhood, odd, in cells of the layer's grid.
        patch_stride: Stride s of the neighbourhoods, in cells of the layer's grid.
        layer_dim: None: features are averaged over the neighbourhood (zeros outside the map, counted) and the
            layers concatenated, as in the paper. A number: the p x p x C numbers of a neighbourhood are
            adaptively pooled to so many, layer by layer, as in the authors' code.
        feature_dim: With ``layer_dim``: the pooled layers together are adaptively pooled to so many.
        combine: ``concatenate`` the layers, or take their ``mean``, of layers with as many channels each.
        normalize: Whether `forward` and `bands` divide each patch feature by its length; one of zeros stays as it is.
        position_embedding: How a timm transformer's is resized to images: as ``timm`` does, or as ``dinov2``'s authors.
        seed: Seed of random weights.
        image_size: Height and width of the images to come, if known; tried where a network does not take any size.
        tiles: How larger images are cut into tiles; None: they are given to the network whole.
        mean: Subtracted from uint8 images per RGB channel, in units of [0, 1].
        std: Divided by per RGB channel, in units of [0, 1].

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
        tiles: TileOptions | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        combine: Combine = "concatenate",
        normalize: bool = False,
        position_embedding: PositionRule = "timm",
    ) -> None:
        super().__init__()
        if patch_size < 1 or patch_size % 2 == 0:
            raise UserError(f"patch_size must be odd and at least 1, got {patch_size}.")
        self.patch_size, self.patch_stride = patch_size, patch_stride
        self.layer_dim, self.feature_dim = layer_dim, feature_dim
        self.combine, self.normalize, self.position_embedding = combine, normalize, position_embedding
        size = image_size if tiles is None else tiles.size
        with building:
            cut = cut_network(backbone, layers, weights, seed, size, position_embedding)
        self.network, self.backbone_name, self.layers = cut.network, cut.name, cut.layers
        self.layouts, self.channels, self.strides = cut.layouts, cut.channels, cut.strides
        self.multiple, self.only_size = cut.multiple, cut.size
        if size is not None and self.only_size not in (None, size):
            height, width = self.only_size
            given = "resize and crop" if tiles is None else "tile"
            raise UserError(f"the backbone takes images of {height}x{width} pixels only: set {given} to that size.")
        self.mean, self.std = tuple(mean), tuple(std)
        if combine == "mean" and layer_dim is None and len(set(self.channels)) > 1:
            raise UserError(
                f"patches.combine mean needs layers with as many channels each, {', '.join(self.layers)} have "
                f"{', '.join(map(str, self.channels))}; choose others, or concatenate."
            )
        weight = next(self.network.parameters(), torch.empty(0, dtype=torch.float32))
        self.register_buffer("like", torch.empty(0, dtype=weight.dtype), persistent=False)  # of the network's type
        self.weights_sha256 = weights_sha256(self.network)
        self.tiling = None if tiles is None else self._tiling(tiles)
        self.train(False)

    def _tiling(self, options: TileOptions) -> Tiling:
        """Measure the layers, to know how tiles are to be laid."""
        tokens = any(kind == "tokens" for kind, _, _ in self.layouts)
        padded = self.only_size is not None or self.multiple > 1 or tokens
        if padded:
            grids = [LayerGrid(stride, 0, torch.inf) for stride in self.strides]
        else:
            with torch.inference_mode():
                grids = measure_layers(self.layers_of, self.strides, self.like)
        return Tiling(options, grids, self.patch_size, self.patch_stride, padded=padded)

    def layers_of(self, images: Tensor, inference: Inference = "float32") -> list[Tensor]:
        """Layers float32 ``(B, C, h, w)`` of images; arguments and errors as `bands`."""
        if images.dtype == torch.uint8:
            images = normalised(images, self.mean, self.std)
        elif not images.is_floating_point():
            raise UserError(
                f"images are {images.dtype}; make them by model.transform, or float32: scaled to [0, 1] and normalised."
            )
        size, device = (images.shape[2], images.shape[3]), images.device.type
        bf16 = inference == "bf16" or (inference == "auto" and bf16_is_fast(device))
        try:  # else as the caller's autocast says
            with torch.autocast(device, torch.bfloat16) if bf16 and self.like.dtype == torch.float32 else nullcontext():
                outputs = self.network(images.to(self.like.dtype))
        except (RuntimeError, AssertionError, ValueError) as error:
            self._explain(error, size)
            raise
        return [as_grid(outputs, *layer, size).float() for layer in zip(self.layers, self.layouts, strict=True)]

    def _explain(self, error: Exception, size: tuple[int, int]) -> None:
        """Raise a `UserError` if the network failed because it does not take images of a size."""
        (height, width), (h, w) = self.only_size or size, size
        if any(side % self.multiple for side in size):
            raise UserError(
                f"the backbone fails on images of {h}x{w} pixels: make both multiples of {self.multiple}."
            ) from error
        if self.only_size not in (None, size):
            raise UserError(
                f"the backbone takes images of {height}x{width} pixels, and fails on {h}x{w}: set resize and crop, or "
                "tile to that size."
            ) from error

    @property
    def pixels_per_patch(self) -> int:
        """Pixels of the input from patch to patch."""
        return self.strides[0] * self.patch_stride

    @property
    def dimension(self) -> int:
        """Numbers in a patch feature, D."""
        return self.feature_dim or (self.channels[0] if self.combine == "mean" else sum(self.channels))

    def forward(self, images: Tensor) -> Tensor:
        """Compute patch features float32 ``(B, h, w, D)`` of images ``(B, 3, H, W)``.

        Args:
            images: Of any floating type, normalised; or uint8, levels, which are normalised here.

        Raises:
            UserError: If the images are other whole numbers, or of a size that the network does not take.
        """
        return torch.cat([band.features for band in self.bands(images)], dim=1)

    def bands(self, images: Tensor, inference: Inference = "float32", raw: bool = False) -> Iterator[Band]:
        """The same in bands of patches, from the top; one band, where the images are no larger than a tile.

        Args:
            images: As `forward`.
            inference: What a float32 network computes in; ``auto``: bf16, where the device multiplies that much faster.
            raw: Whether features stay as long as they are, whatever ``normalize`` says.
        """
        tiling, (height, width) = self.tiling, images.shape[-2:]
        if tiling is None or tiling.holds(height, width):
            parts = [images]
            if images.device.type == "cpu" and not torch.compiler.is_compiling():
                parts = list(images.split(max(1, CPU_PIXELS // (height * width))))
            found = [features for part in parts for features in self._features(part, inference, raw)]
            features = found[0] if len(found) == 1 else torch.cat(found)
            yield Band(features, 0, features.shape[1])
            return
        spans = tiling.along(0, height), tiling.along(1, width)
        grids = [(tiling.grid(i, height), tiling.grid(i, width)) for i in range(len(self.layers))]
        for row in spans[0]:
            tiles: list[Tensor] = []
            for columns in tiling.batches(spans[1], images.device):
                cut = torch.cat([tiling.cut(images, row, column) for column in columns])
                tiles += self._features(cut, inference, raw, [Window(row, column, grids) for column in columns])
            yield Band(torch.cat(tiles, 2), row.first, grids[0][0])

    def _features(
        self, images: Tensor, inference: Inference, raw: bool, windows: Sequence[Window | None] = (None,)
    ) -> list[Tensor]:
        """Patch features of images, or of what is taken from tiles: of as many at each window, float32."""
        p, s = self.patch_size, self.patch_stride
        pooled: list[Tensor] = []
        for layer in self.layers_of(images, inference):  # (B, C, h, w)
            if self.layer_dim is None:
                layer = F.avg_pool2d(layer, p, s, p // 2)
            else:
                grid = [(side - 1) // s + 1 for side in layer.shape[-2:]]
                patches = F.unfold(layer, p, padding=p // 2, stride=s).transpose(1, 2)  # (B, h w, C p p)
                layer = F.adaptive_avg_pool1d(patches, self.layer_dim).transpose(1, 2).unflatten(2, grid)
            pooled.append(layer)
        found = []
        for number, window in enumerate(windows):
            parts = pooled
            if window is not None and self.tiling is not None:
                parts = self.tiling.parts([part.unflatten(0, (len(windows), -1))[number] for part in pooled], window)
            first = parts[0].shape[-2:]
            for i, part in enumerate(parts):
                if part.shape[-2:] != first:
                    parts[i] = F.interpolate(part, size=first, mode="bilinear", align_corners=False)
            joined = torch.cat(parts, dim=1) if self.combine == "concatenate" else torch.stack(parts).mean(0)
            features = joined.permute(0, 2, 3, 1)  # (B, h, w, sum of C, or C)
            if self.feature_dim is not None:
                flat = F.adaptive_avg_pool1d(features.flatten(1, 2), self.feature_dim)
                features = flat.unflatten(1, features.shape[1:3])
            found.append(F.normalize(features, dim=3) if self.normalize and not raw else features)
        return found

    def small(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` made as small as a tile, normalised."""
        assert self.tiling is not None
        size, (height, width) = self.tiling.size, images.shape[-2:]
        if not self.tiling.padded:
            scale = min(size[0] / height, size[1] / width)
            size = max(1, int(scale * height)), max(1, int(scale * width))
        small = F.interpolate(images.float(), size, mode="area")
        return small if images.is_floating_point() else normalised(small.to(images.dtype), self.mean, self.std)

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
        later = {  # as files from before these options have it, which name neither, where it is the default
            "combine": None if self.combine == "concatenate" else self.combine,
            "normalize_features": self.normalize or None,
            "position_embedding": None if self.position_embedding == "timm" else self.position_embedding,
        }
        return own | {name: getattr(self, name) for name in names} | later
