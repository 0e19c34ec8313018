"""Backbone by name or module -> a network that gives the layers asked for, and nothing behind them.

Builds the network, cuts it behind the last layer needed, loads its weights, freezes it, and finds out in which
order each layer gives its axes. Next: `patch_features.py`, which runs it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import logging
import os
import pickle
import reprlib
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision.models.feature_extraction import create_feature_extractor

from pl_patchcore.errors import UserError
from pl_patchcore.foreign import check_archive, is_whole
from pl_patchcore.options import nearest

log = logging.getLogger(__name__)

PAPER_WEIGHTS = "IMAGENET1K_V1"
_WEIGHT_FILES = (".pth", ".pt", ".safetensors")
_PROBED_PIXELS = (((96, 128), (128, 192)), ((112, 168), (168, 224)))  # the second pair for patches of 14
_USUAL_PIXELS = (224, 224)  # of models that take one size only
Layout = tuple[str, int, int]  # "bchw" or "bhwc"; "tokens" with the patch's side and the number of leading extra tokens


class UntrainedBackboneWarning(UserWarning):
    """A backbone with random weights: shapes and timings mean something, accuracy does not."""


class CutNetwork(NamedTuple):
    """A frozen network that ends with the last layer needed, and how to read its layers."""

    network: nn.Module  # gives a dict of the layers' outputs, by name
    name: str  # torchvision's, or the module's class
    layouts: list[Layout]  # order of the axes of each layer's output
    channels: list[int]  # numbers at a place of each layer
    strides: list[int]  # pixels from cell to cell of each layer
    size: tuple[int, int] | None  # height and width, pixels, of the only images that it takes; None: any


def cut_network(
    backbone: str | nn.Module, layers: Sequence[str], weights: str | None, seed: int, size: tuple[int, int] | None
) -> CutNetwork:
    """Build a network, load its weights, freeze it, and cut it behind the last of the layers; see `PatchFeatures`.

    Raises:
        UserError: If a name is unknown, weights do not fit or cannot be had, or a layer's output cannot be
            understood as a grid of features.
    """
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers or len(set(layers)) < len(layers):
        raise UserError(f"layers must be a list of different layer names, got {layers!r}.")
    name = backbone if isinstance(backbone, str) else type(backbone).__qualname__
    path = weights_path(weights)
    state = None if path is None else _read_weights(path)
    if isinstance(backbone, str):
        whole = _built(backbone, weights if path is None else None, path is not None, seed)
    elif not isinstance(backbone, nn.Module):
        raise UserError(f"backbone must be a name or a module (an instance, not a class), got {backbone!r}.")
    elif path is None and weights not in (None, PAPER_WEIGHTS):
        raise UserError(f"weights {weights!r} name torchvision's own; for a module give a path or null.")
    else:
        whole = copy.deepcopy(backbone)
    known = [module for module, _ in whole.named_modules() if module]
    for layer in layers:
        if layer not in known:
            outer = [module for module in known if module.count(".") <= 1]
            raise UserError(
                f"layer {layer!r} is not in {name}; did you mean {nearest(layer, known)!r}? "
                f"Candidates: {', '.join(outer[:60])}{', ...' if len(outer) > 60 else ''} (and those inside them)."
            )
    for module in whole.modules():
        if getattr(module, "inplace", False):  # would overwrite a layer's output after it was collected
            module.inplace = False  # type: ignore[assignment]
    network = _cut(whole, layers)
    if state is not None:
        _load(network.network if isinstance(network, _HookedNetwork) else network, whole, state, f"{path}", name)
    network.eval().requires_grad_(False)
    for weight in network.parameters():
        if weight.ndim == 4:  # channels last: a quarter to two fifths less time
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return CutNetwork(network, name, *_probe(network, layers, size))


def weights_path(weights: str | None) -> Path | None:
    """The path, absolute, that weights are, such as ``~/net.pth``; None if they are a name or there are none."""
    path = None if weights is None else Path(weights).expanduser()
    if path is None or (path.suffix not in _WEIGHT_FILES and not os.path.exists(path)):  # noqa: PTH110 - pathlib's raises where a name is too long
        return None
    return path.absolute()


def weights_sha256(network: nn.Module) -> str:
    """Hash of a network's weights, hexadecimal; those behind the last layer count only where hooks collect."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


_layer_outputs: ContextVar[dict[str, Any] | None] = ContextVar("layer_outputs", default=None)  # of the call under way


class _LastLayerSeen(Exception):
    pass


def _keep_output(name: str, wanted: int, module: nn.Module, inputs: Any, output: Any) -> None:
    """Forward hook of a layer; stops the call after the last of the layers ``wanted``."""
    if (found := _layer_outputs.get()) is not None:
        found[name] = output
        if len(found) == wanted:
            raise _LastLayerSeen


class _HookedNetwork(nn.Module):
    """Layers of a network that cannot be traced, by forward hooks. Can be copied, pickled, and called from threads."""

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        for name in layers:
            network.get_submodule(name).register_forward_hook(partial(_keep_output, name, len(layers)))

    def forward(self, images: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {}
        token = _layer_outputs.set(found)
        try:
            self.network(images)
        except _LastLayerSeen:
            pass
        finally:
            _layer_outputs.reset(token)
        return found


def _built(name: str, weights: str | None, from_file: bool, seed: int) -> nn.Module:
    """A network of torchvision's."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(
            f"backbone {name!r} is unknown; did you mean {nearest(name, known)!r}? Take a torchvision classification "
            f"model ({', '.join(known[:3])}, ...) or a module of your own."
        )
    entry: Any = None
    if weights is not None:
        choices = torchvision.models.get_model_weights(name)
        if weights not in choices.__members__:
            raise UserError(
                f"weights {weights!r} are unknown for {name}; torchvision has {', '.join(choices.__members__)}. "
                "A file's name ends with .pth, .pt or .safetensors."
            )
        entry = choices[weights]
    elif not from_file:
        warnings.warn(
            f"backbone {name} has random weights (weights: null): good for shapes and timings, "
            "but its scores say little about real images.",
            UntrainedBackboneWarning,
            stacklevel=2,
        )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchvision's own, on how two models are initialised
        torch.manual_seed(seed)
        try:
            network: nn.Module = torchvision.models.get_model(name, weights=entry)
        except OSError as error:
            raise UserError(
                f"weights {weights} of {name} cannot be downloaded ({error}); fetch {entry.url} "
                "on a machine with a network and give its path as weights."
            ) from error
    return network


def _cut(network: nn.Module, layers: Sequence[str]) -> nn.Module:
    try:
        traced: Any = create_feature_extractor(network.eval(), list(layers), suppress_diff_warning=True)
    except Exception as error:
        # what tracing raises depends on the module's own code; hooks need nothing of it
        log.info("backbone cannot be traced (%s); its layers are read by hooks.", _first_line(error))
        return _HookedNetwork(network, layers)
    return GraphModule(traced, traced.eval_graph)  # without the graph for training, which a copy would come out with


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not os.path.isfile(path):  # noqa: PTH113 - pathlib's raises where a name is too long
        raise UserError(
            f"{path}: no such weights file; give its path as --model.weights (weights= in Python), or fit with "
            "save_backbone, which puts the weights into the checkpoint. Null takes random ones."
        )
    try:
        if path.suffix == ".safetensors":
            state: Any = dict(load_file(path))
        else:
            if zipfile.is_zipfile(path):  # what torch before 1.6 wrote is none
                check_archive(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than tensors, not loaded; save model.state_dict() instead ({_first_line(error)})."
        ) from error
    except Exception as error:  # a damaged file makes zipfile and torch raise errors of many kinds
        raise UserError(f"{path}: not a whole weights file ({_first_line(error)}); fetch it again.") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(k, str) and is_whole(value) for k, value in state.items()):
        raise UserError(f"{path}: is not a state dict of whole tensors; save model.state_dict().")
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path}: {reprlib.repr(name)} holds NaN or infinity; fetch or train the weights again.")
    return state


def _load(cut: nn.Module, whole: nn.Module, state: Mapping[str, Tensor], path: str, name: str) -> None:
    """Load what the cut network needs; heads behind it may be missing, or of other shapes."""
    needed = {key: value for key, value in cut.state_dict().items() if not key.endswith("num_batches_tracked")}
    stems = {key.partition(".")[0] for key in needed}
    unknown = state.keys() - whole.state_dict().keys()
    faults = {
        "missing": sorted(needed.keys() - state.keys()),
        "unknown": sorted(key for key in unknown if key.partition(".")[0] in stems),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} for {tuple(value.shape)}"
            for key, value in needed.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    told = "; ".join(
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in faults.items()
        if keys
    )
    if told:
        raise UserError(f"{path}: weights do not fit {name}: {told}; give those of this backbone.")
    cut.load_state_dict({key: state[key] for key in needed}, strict=False)


def _probe(
    network: nn.Module, layers: Sequence[str], size: tuple[int, int] | None
) -> tuple[list[Layout], list[int], list[int], tuple[int, int] | None]:
    """Find the axes of each layer's output: those that change with the image's size are spatial."""
    unread, (h, w) = "", size or _USUAL_PIXELS
    for sizes in (*_PROBED_PIXELS, *((each,) for each in dict.fromkeys(((h, w), _USUAL_PIXELS)))):
        try:
            outputs = [_shapes(network, each) for each in sizes]
        except Exception as error:
            # models of one size (ViT, MaxViT) say so in ways of their own
            failure = _first_line(error)
            continue
        layouts, channels, strides = [], [], []
        for name in layers:
            shapes = [output.get(name, ()) for output in outputs]
            if (layout := _layout(shapes, sizes)) is None:
                unread = unread or f"layer {name!r} gives {shapes[0] or 'no tensor'}"
                break
            layouts.append(layout)
            channels.append(shapes[0][1 if layout[0] == "bchw" else -1])
            strides.append(layout[1] or _stride([shape[3 if layout[0] == "bchw" else 2] for shape in shapes], sizes))
        else:
            return layouts, channels, strides, sizes[0] if len(sizes) == 1 else None
    if unread:
        raise UserError(
            f"{unread}, which is no grid of features (B, C, h, w), (B, h, w, C) or tokens (B, h*w, C) that can be "
            "told apart; take another layer."
        )
    raise UserError(
        f"the backbone fails on images of 128x192, 168x224, {h}x{w} and 224x224 pixels: {failure}; set resize and "
        "crop, or tile, to the size that it takes."
    )


def _shapes(network: nn.Module, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the layers' outputs, of two images of a size; without what is no batch of two."""
    like = next(network.parameters(), torch.empty(0, dtype=torch.float32))
    # a traced module prints its traceback before it raises
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        outputs = network(torch.zeros(2, 3, *size, dtype=like.dtype, device=like.device))
    tensors = {name: _first_tensor(output) for name, output in outputs.items()}
    return {name: tuple(value.shape) for name, value in tensors.items() if value is not None and len(value) == 2}


def _first_tensor(output: Any) -> Tensor | None:
    """The output itself, or the first entry of a tuple or dict of outputs, as transformers give them."""
    while isinstance(output, tuple | list | Mapping) and len(output):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output if isinstance(output, Tensor) else None


def _layout(shapes: Sequence[tuple[int, ...]], sizes: Sequence[tuple[int, int]]) -> Layout | None:
    first, last = shapes[0], shapes[-1]
    if len(first) == len(last) == 3:
        for extra in range(9):
            for side in range(1, 65):
                grids = [(h // side) * (w // side) if h % side == w % side == 0 else None for h, w in sizes]
                if [shape[1] - extra for shape in shapes] == grids:
                    return "tokens", side, extra
    if len(first) == len(last) == 4:
        for kind, h, w, c in (("bchw", 2, 3, 1), ("bhwc", 1, 2, 3)):
            if len(shapes) == 1 and first[h] == first[w] != first[c]:
                return kind, 0, 0
            if first[c] == last[c] and first[h] < last[h] and first[w] < last[w]:
                return kind, 0, 0
    return None


def _stride(cells: Sequence[int], sizes: Sequence[tuple[int, int]]) -> int:
    """Pixels from cell to cell, by the numbers of cells across images of one size or two."""
    if len(sizes) == 1:
        return sizes[0][1] // cells[0]
    return (sizes[1][1] - sizes[0][1]) // (cells[1] - cells[0])


def as_grid(output: Any, layout: Layout, size: Sequence[int], name: str) -> Tensor:
    """A layer's output as ``(B, C, h, w)``, of images of ``size`` (height, width)."""
    kind, side, extra = layout
    values: Any = _first_tensor(output)  # there is one: the probe has seen it
    if kind == "tokens":
        h, w = size[0] // side, size[1] // side
        values = values[:, extra:]
        if values.shape[1] != h * w:
            raise UserError(
                f"layer {name!r} gives {values.shape[1]} tokens for an image of {size[0]}x{size[1]} pixels; "
                f"its patches are {side}x{side}: make the image a multiple of that."
            )
        values = values.unflatten(1, (h, w))
    grid: Tensor = values if kind == "bchw" else values.permute(0, 3, 1, 2)
    return grid


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0][:200]
