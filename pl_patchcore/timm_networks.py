"""Name of a timm model -> the network, with weights, and its layers as ``(B, C, h, w)``; `backbone.py` uses it.

timm is imported only where a backbone is named ``timm/...``. Its own code fits weights to the network: it renames
those of a model's authors, and resizes position embeddings to the images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pl_patchcore.errors import UserError
from pl_patchcore.options import nearest
from pl_patchcore.weights_file import first_line

PREFIX = "timm/"


def build(name: str, state: Mapping[str, Tensor] | None, pretrained: bool, size: tuple[int, int] | None) -> nn.Module:
    """Build a network of timm's for images of a size.

    Args:
        name: timm's name, ``resnet18`` or, with a tag of its weights, ``resnet18.a1_in1k``.
        state: Weights to load; None: random ones, or timm's.
        pretrained: Whether to load timm's.
        size: Height and width, pixels; None: any, or those that timm makes the model for.

    Raises:
        UserError: If timm is missing, the name is unknown, or weights cannot be had or do not fit.
    """
    timm = _timm()
    known = {*timm.list_models(), *timm.list_pretrained()}
    if name not in known:
        raise UserError(f"backbone 'timm/{name}' is unknown; did you mean 'timm/{nearest(name, known)}'?")
    network, options = _random(name, size)
    if state is None and not pretrained:
        return network
    if state is None:
        return _pretrained(name, options)
    classifiers: Any = network.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    stems = tuple(f"{each}." for each in ([classifiers] if isinstance(classifiers, str) else classifiers))
    heads = {key: torch.zeros_like(value) for key, value in network.state_dict().items() if key.startswith(stems)}
    fitting = {key: value for key, value in state.items() if key not in heads or value.shape == heads[key].shape}
    try:  # a head may be missing, or of other classes: nothing reads it
        network = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"state_dict": heads | fitting}, **options
        )
    except Exception as error:  # each family has code of its own to rename and resize
        told = " ".join(str(error).partition(":\n\t")[2].split()) or first_line(error)
        raise UserError(f"weights do not fit timm/{name}: {told[:300]}; give those of this backbone.") from error
    network.pretrained_cfg.pop("state_dict", None)  # a second copy of them
    return network  # type: ignore[no-any-return]


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError("backbones timm/... need timm: pip install 'pl-patchcore[timm]'.") from error
    return timm


def _random(name: str, size: tuple[int, int] | None) -> tuple[nn.Module, dict[str, Any]]:
    """The network with random weights, and the first options that it takes: not every family takes each."""
    sized = {} if size is None else {"img_size": size}
    for options in (
        sized | {"dynamic_img_size": True},
        sized | {"strict_img_size": False},
        sized,
        {},
    ):
        try:
            return _timm().create_model(name, pretrained=False, **options), options
        except TypeError as error:
            failure: Exception = error
        except (AssertionError, ValueError, RuntimeError) as error:
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
    try:
        return timm.create_model(name, pretrained=True, **options)  # type: ignore[no-any-return]
    except Exception as error:  # of the hub's client, or the network's, in many kinds
        raise UserError(
            f"weights of timm/{name} cannot be had ({first_line(error)}); fetch {place} on a machine with a network "
            "and give its path as weights."
        ) from error


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
        of_tokens = isinstance(norm, nn.LayerNorm | timm.layers.RmsNorm) and not isinstance(
            norm, timm.layers.LayerNorm2d
        )
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
