"""Name of a timm model -> the network, with weights, and its layers as ``(B, C, h, w)``; `backbone.py` uses it.

timm is imported only where a backbone is named ``timm/...``. Its own code fits weights to the network: it renames
those of a model's authors, and resizes position embeddings to the images. The authors of DINOv2 resize theirs in
another way (`PositionEmbedding`): without antialiasing, a little too far apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_patchcore.errors import UserError
from pl_patchcore.options import nearest
from pl_patchcore.weights_file import first_line

PositionRule = Literal["timm", "dinov2"]
PREFIX = "timm/"
HUB_OFFSET = 0.1  # cells by which DINOv2's code says that the grid of patches is larger than it is


def build(
    name: str,
    state: Mapping[str, Tensor] | None,
    pretrained: bool,
    size: tuple[int, int] | None,
    position_embedding: PositionRule = "timm",
) -> nn.Module:
    """Build a network of timm's for images of a size.

    Args:
        name: timm's name, ``resnet18`` or, with a tag of its weights, ``resnet18.a1_in1k``.
        state: Weights to load; None: random ones, or timm's.
        pretrained: Whether to load timm's.
        size: Height and width, pixels; None: any, or those that timm makes the model for.
        position_embedding: How it is resized to images: as ``timm`` does, or as the authors of ``dinov2`` do.

    Raises:
        UserError: If timm is missing, the name is unknown, or weights cannot be had or do not fit; if position
            embeddings cannot be resized so.
    """
    if position_embedding == "dinov2":  # at the size that they are made for, or timm would resize them
        network = build(name, state, pretrained, None)
        resize_as_authors(network, name)
        return network
    timm = _timm()
    known = {*timm.list_models(), *timm.list_pretrained()}
    if name not in known:
        raise UserError(f"backbone 'timm/{name}' is unknown; did you mean 'timm/{nearest(name, known)}'?")
    network, options = _random(name, size)
    if state is None:
        return _pretrained(name, options) if pretrained else network
    classifiers: Any = network.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    stems = tuple(f"{each}." for each in ([classifiers] if isinstance(classifiers, str) else classifiers))
    heads = {key: torch.zeros_like(value) for key, value in network.state_dict().items() if key.startswith(stems)}
    fitting = {key: value for key, value in state.items() if key not in heads or value.shape == heads[key].shape}
    overlay = {"state_dict": heads | fitting}  # a head may be missing, or of other classes: nothing reads it
    try:
        network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # each family has code of its own to rename and resize
        raise UserError(f"weights do not fit timm/{name}: {_told(error)}; give those of this backbone.") from error
    network.pretrained_cfg.pop("state_dict", None)  # a second copy of them
    return network  # type: ignore[no-any-return]


class PositionEmbedding(nn.Module):
    """Adds position embeddings to patches, resized as DINOv2's code on torch.hub does for models without registers.

    Bicubic without antialiasing; the step from place to place is that of a grid which is `HUB_OFFSET` cells larger.

    Args:
        embedding: Of a square grid of patches, ``(1, M * M, C)``.
    """

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        side = math.isqrt(embedding.shape[1])
        self.weight = nn.Parameter(embedding.detach().unflatten(1, (side, side)).permute(0, 3, 1, 2).contiguous())

    def forward(self, patches: Tensor) -> Tensor:
        """Patches ``(B, h, w, C)`` with the embeddings of their places."""
        grid, side = patches.shape[1:3], self.weight.shape[2]
        embedding: Tensor = self.weight
        if grid != (side, side):
            factors = [(cells + HUB_OFFSET) / side for cells in grid]
            embedding = F.interpolate(embedding.float(), scale_factor=factors, mode="bicubic").to(patches.dtype)
        return patches + embedding.permute(0, 2, 3, 1)


def resize_as_authors(network: nn.Module, name: str) -> None:
    """Have a DINOv2 of timm's resize its position embeddings as the code of its authors does.

    With registers, the authors resize as timm does, and nothing changes.

    Raises:
        UserError: If the network is no transformer for images of any size, with position embeddings of a square grid.
    """
    vit: Any = network
    kind = type(network) is _timm().models.VisionTransformer
    if not (kind and vit.pos_embed is not None and vit.dynamic_img_size and len({*vit.patch_embed.grid_size}) == 1):
        raise UserError(
            f"patches.position_embedding dinov2 is for DINOv2 of timm, such as timm/vit_small_patch14_dinov2, got "
            f"{PREFIX}{name}; set it to timm."
        )
    if vit.num_reg_tokens:
        return
    extra = 0 if vit.no_embed_class else vit.num_prefix_tokens
    vit.patch_embed.norm = nn.Sequential(vit.patch_embed.norm, PositionEmbedding(vit.pos_embed[:, extra:]))
    if extra:
        vit.cls_token.data += vit.pos_embed.data[:, :1]
    vit.pos_embed = None


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError("backbones timm/... need timm: pip install 'pl-patchcore[timm]'.") from error
    return timm


def _random(name: str, size: tuple[int, int] | None) -> tuple[nn.Module, dict[str, Any]]:
    """The network with random weights, and the first options that it takes: not every family takes each."""
    sized = {} if size is None else {"img_size": size}
    for options in (sized | {"dynamic_img_size": True}, sized | {"strict_img_size": False}, sized, {}):
        try:
            return _timm().create_model(name, pretrained=False, **options), options
        except (TypeError, AssertionError, ValueError, RuntimeError) as error:
            failure = error
    raise UserError(f"timm cannot build {name} for images of {size}: {first_line(failure)}.")


def _pretrained(name: str, options: Mapping[str, Any]) -> nn.Module:
    timm = _timm()
    config = timm.get_pretrained_cfg(name)
    if not config.has_weights:
        others = ", ".join(timm.list_pretrained(name.partition(".")[0] + ".*")[:5]) or "none"
        raise UserError(
            f"timm has no weights of {name}; give a path as weights, null for random ones, or a name with weights: "
            f"{others}."
        )
    place = config.url or config.file
    if config.hf_hub_id:
        place = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors"
    remedy = f"fetch {place} on a machine with a network and give its path as weights."
    try:
        network: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # of the hub's client, or the network's, in many kinds
        fault = "do not fit it" if "loading state_dict" in str(error) else "cannot be had"
        raise UserError(f"weights of timm/{name} {fault} ({_told(error)}); {remedy}") from error
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise UserError(f"weights of timm/{name} hold NaN or infinity; {remedy}")
    return network


def _told(error: Exception) -> str:
    """What an error says, in one line; of weights that do not fit, which."""
    return (" ".join(str(error).partition(":\n\t")[2].split()) or first_line(error))[:300]


def feature_layers(network: nn.Module) -> list[str]:
    """Layers by dotted name that timm itself gives as ``(B, C, h, w)``, from the first to the last; maybe none."""
    if not hasattr(network, "forward_intermediates"):
        return []
    return [str(each["module"]) for each in network.feature_info]  # type: ignore[union-attr]


def reorders(network: nn.Module) -> bool:
    """Whether a network holds the places of an image in an order of its own (Hiera), which hooks would not see."""
    return hasattr(network, "reroll")


class TimmLayers(nn.Module):
    """Layers of a timm network, as it gives them itself: without class and register tokens, in the image's order.

    A transformer's last layer is normalised by the network's final norm.

    Args:
        network: Network of timm's; what lies behind the last layer is cut off.
        layers: Some of its `feature_layers`.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        timm, known = _timm(), feature_layers(network)
        for name in layers:
            if name not in known:
                raise UserError(
                    f"layer {name!r} is not one that timm gives in the image's order; take {', '.join(known)}."
                )
        self.network: Any = network
        self.places = {name: known.index(name) for name in layers}
        self.indices = sorted(self.places.values())
        norm = getattr(network, "norm", None)
        of_tokens = isinstance(norm, nn.LayerNorm | timm.layers.RmsNorm)
        of_tokens = of_tokens and not isinstance(norm, timm.layers.LayerNorm2d)
        self.normed = known[-1] in layers and of_tokens
        if hasattr(network, "prune_intermediate_layers"):
            network.prune_intermediate_layers(self.indices, prune_norm=not self.normed, prune_head=True)  # type: ignore[operator]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Layers ``(B, C, h, w)`` by name of images ``(B, 3, H, W)``."""
        found = self.network.forward_intermediates(
            images, indices=self.indices, output_fmt="NCHW", intermediates_only=True
        )
        if self.normed:
            found[-1] = self.network.norm(found[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return {name: found[self.indices.index(place)] for name, place in self.places.items()}
