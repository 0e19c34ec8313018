"""Backbone by name or module -> a network that gives the layers asked for, and nothing behind them.

Builds the network, loads its weights, cuts it behind the last layer needed, freezes it, and finds out in which
order each layer gives its axes. Next: `patch_features.py`, which runs it.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import io
import logging
import pickle
import warnings
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision.models.feature_extraction import create_feature_extractor

from pl_patchcore.errors import UserError

log = logging.getLogger(__name__)

PAPER_WEIGHTS = "IMAGENET1K_V1"
_FILES = (".pth", ".pt", ".safetensors")
Layout = tuple[str, int, int]  # "bchw" or "bhwc"; "tokens" with the patch's side and the number of leading extra tokens


class UntrainedBackboneWarning(UserWarning):
    """A backbone with random weights: shapes and timings mean something, accuracy does not."""


class CutNetwork(NamedTuple):
    """A frozen network that ends with the last layer needed, and how to read its layers.

    Attributes:
        network: Gives a dict of the layers' outputs, by name.
        name: Name of the backbone: torchvision's, or the module's class.
        layouts: Order of the axes of each layer's output.
        channels: Numbers at a place of each layer.
        size: Height and width, in pixels, of the only images that it takes; None where it takes any.
    """

    network: nn.Module
    name: str
    layouts: list[Layout]
    channels: list[int]
    size: tuple[int, int] | None


def cut_network(
    backbone: str | nn.Module,
    layers: Sequence[str],
    weights: str | None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
) -> CutNetwork:
    """Build a network, load its weights, freeze it, and cut it behind the last of the layers.

    Args:
        backbone: Name of a torchvision classification model, or a module (a copy of it is used).
        layers: Dotted names of the layers, as ``named_modules()`` gives them.
        weights: Name of torchvision weights, path of a ``.pth``, ``.pt`` or ``.safetensors`` state dict, or None
            for random weights. A module keeps the weights it has unless a path is given.
        seed: Seed of random weights.
        size: Height and width of the images to come, in pixels, if known; tried where a network does not take any size.

    Raises:
        UserError: If a name is unknown, weights do not fit or cannot be had, or a layer's output cannot be
            understood as a grid of features.
    """
    if not layers or len(set(layers)) < len(layers):
        raise UserError(f"layers must be a list of different layer names, got {layers!r}.")
    name = backbone if isinstance(backbone, str) else type(backbone).__qualname__
    path = Path(weights).expanduser() if weights is not None and _is_file(weights) else None
    state = None if path is None else _read_weights(path)
    whole = _build(backbone, weights if path is None else None, path is not None, seed)
    _check_layers(whole, name, layers)
    for module in whole.modules():
        if getattr(module, "inplace", False):  # would overwrite a layer's output after it was collected
            module.inplace = False  # type: ignore[assignment]
    network = _cut(whole, layers)
    if state is not None and path is not None:
        _load(network, whole, state, path, name)
    network.eval().requires_grad_(False)
    for weight in network.parameters():
        if weight.ndim == 4:  # channels last: a quarter to two fifths less time
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return CutNetwork(network, name, *_probe(network, layers, size))


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


class _LayerHook:
    """Keeps a layer's output for the call under way; can be copied and pickled with the network."""

    def __init__(self, name: str, wanted: int) -> None:
        self.name, self.wanted = name, wanted

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        found = _layer_outputs.get()
        if found is not None:
            found[self.name] = output
            if len(found) == self.wanted:
                raise _LastLayerSeen


class _HookedNetwork(nn.Module):
    """Layers of a network that cannot be traced, by forward hooks; stops after the last of them.

    Calls from several threads do not meet: what hooks find belongs to the context of the call.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        for name in layers:
            network.get_submodule(name).register_forward_hook(_LayerHook(name, len(layers)))

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


def _is_file(weights: str) -> bool:
    return weights.endswith(_FILES) or Path(weights).expanduser().exists()


def _build(backbone: str | nn.Module, weights: str | None, from_file: bool, seed: int) -> nn.Module:
    if not isinstance(backbone, str | nn.Module):
        raise UserError(f"backbone must be a name or a module (an instance, not a class), got {backbone!r}.")
    if isinstance(backbone, nn.Module):
        if weights not in (None, PAPER_WEIGHTS):
            raise UserError(f"weights {weights!r} name torchvision's own; for a module give a path or null.")
        return copy.deepcopy(backbone)
    known = torchvision.models.list_models(module=torchvision.models)
    if backbone not in known:
        nearest = difflib.get_close_matches(backbone, known, 1, 0)[0]
        raise UserError(
            f"backbone {backbone!r} is unknown; did you mean {nearest!r}? Take a torchvision classification model "
            f"({', '.join(known[:3])}, ...) or a module of your own."
        )
    if weights is None and not from_file:
        warnings.warn(
            f"backbone {backbone} has random weights (weights: null): good for shapes and timings, "
            "but its scores say little about real images.",
            UntrainedBackboneWarning,
            stacklevel=2,
        )
    entry = None
    if weights is not None:
        choices = torchvision.models.get_model_weights(backbone)
        if weights not in (*choices.__members__, "DEFAULT"):
            raise UserError(
                f"weights {weights!r} are unknown for {backbone}; torchvision has {', '.join(choices.__members__)}. "
                "A file's name ends with .pth, .pt or .safetensors."
            )
        entry = choices.DEFAULT if weights == "DEFAULT" else choices[weights]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchvision's own, on how two models are initialised
        torch.manual_seed(seed)
        try:
            network: nn.Module = torchvision.models.get_model(backbone, weights=entry)
        except OSError as error:
            raise UserError(
                f"weights {weights} of {backbone} cannot be downloaded ({error}); fetch {entry.url if entry else ''} "
                "on a machine with a network and give its path as weights."
            ) from error
    return network


def _check_layers(network: nn.Module, name: str, layers: Sequence[str]) -> None:
    known = [module for module, _ in network.named_modules() if module]
    for layer in layers:
        if layer not in known:
            nearest = difflib.get_close_matches(layer, known, 1, 0)
            outer = [module for module in known if module.count(".") <= 1]
            raise UserError(
                f"layer {layer!r} is not in {name}; did you mean {nearest[0] if nearest else None!r}? "
                f"Candidates: {', '.join(outer[:60])}{', ...' if len(outer) > 60 else ''} (and those inside them)."
            )


def _cut(network: nn.Module, layers: Sequence[str]) -> nn.Module:
    try:
        traced: Any = create_feature_extractor(
            network.eval(), {name: name for name in layers}, suppress_diff_warning=True
        )
    except Exception as error:
        # what tracing raises depends on the module's own code; hooks need nothing of it
        log.info("backbone cannot be traced (%s); its layers are read by hooks.", _first_line(error))
        return _HookedNetwork(network, layers)
    return GraphModule(traced, traced.eval_graph)  # without the graph for training, which a copy would come out with


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; correct the path, or set weights to null for random ones.")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole weights file ({_first_line(error)}); fetch it again.") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than tensors, not loaded; save model.state_dict() instead ({_first_line(error)})."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: is not a state dict; save model.state_dict().")
    return state


def _load(cut: nn.Module, network: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    """Load what the cut network needs; heads behind it may be missing, or of other shapes."""
    needed = {key: value for key, value in cut.state_dict().items() if not key.endswith("num_batches_tracked")}
    prefix = "network." if isinstance(cut, _HookedNetwork) else ""
    given = {prefix + key: value for key, value in state.items()}
    stems = {key.split(".")[: prefix.count(".") + 1][-1] for key in needed}
    missing = sorted(needed.keys() - given.keys())
    unknown = sorted(
        key for key in given.keys() - {prefix + k for k in network.state_dict()}
        if key.split(".")[prefix.count(".")] in stems
    )  # fmt: skip
    shapes = [
        f"{key} {tuple(given[key].shape)} for {tuple(value.shape)}"
        for key, value in needed.items()
        if key in given and given[key].shape != value.shape
    ]
    faults = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if keys
    ]
    if faults:
        raise UserError(f"{path}: weights do not fit {name}: {'; '.join(faults)}; give those of this backbone.")
    cut.load_state_dict({key: given[key] for key in needed}, strict=False)


PROBES = (((96, 128), (128, 192)), ((112, 168), (168, 224)))  # pixels; the second pair for patches of 14
USUAL_SIZE = (224, 224)  # pixels, of models that take one size only


def _probe(
    network: nn.Module, layers: Sequence[str], size: tuple[int, int] | None
) -> tuple[list[Layout], list[int], tuple[int, int] | None]:
    """Find the axes of each layer's output: those that change with the image's size are spatial."""
    unread = ""
    for sizes in (*PROBES, *((each,) for each in dict.fromkeys((size or USUAL_SIZE, USUAL_SIZE)))):
        try:
            outputs = [_run(network, each) for each in sizes]
        except Exception as error:
            # models of one size (ViT, MaxViT) say so in ways of their own
            failure = _first_line(error)
            continue
        shapes = {name: [tuple(output[name].shape) for output in outputs if name in output] for name in layers}
        layouts = {name: _layout(found, sizes) if len(found) == len(sizes) else None for name, found in shapes.items()}
        unknown = [name for name, layout in layouts.items() if layout is None]
        if not unknown:
            read = [layout for layout in layouts.values() if layout is not None]
            channels = [shapes[n][0][1 if layout[0] == "bchw" else -1] for n, layout in zip(layers, read, strict=True)]
            return read, channels, sizes[0] if len(sizes) == 1 else None
        seen: Any = shapes[unknown[0]] or ["no tensor"]
        unread = unread or f"layer {unknown[0]!r} gives {seen[0]}"
    if unread:
        raise UserError(
            f"{unread}, which is no grid of features (B, C, h, w), (B, h, w, C) or tokens (B, h*w, C) that can be "
            "told apart; take another layer."
        )
    h, w = size or USUAL_SIZE
    raise UserError(
        f"the backbone fails on images of 128x192, 168x224, {h}x{w} and 224x224 pixels: {failure}; set resize and crop "
        "to the size that it takes."
    )


def _run(network: nn.Module, size: tuple[int, int]) -> dict[str, Tensor]:
    like = next(network.parameters(), torch.empty(0, dtype=torch.float32))
    # a traced module prints its traceback before it raises
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        outputs = network(torch.zeros(2, 3, *size, dtype=like.dtype, device=like.device))
    tensors = {name: first_tensor(output) for name, output in outputs.items()}
    return {name: value for name, value in tensors.items() if value is not None and len(value) == 2}


def first_tensor(output: Any) -> Tensor | None:
    """The output itself, or the first entry of a tuple or dict of outputs, as transformers give them."""
    while isinstance(output, tuple | list | Mapping) and len(output):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output if isinstance(output, Tensor) else None


def _layout(shapes: Sequence[tuple[int, ...]], sizes: Sequence[tuple[int, int]]) -> Layout | None:
    if len(shapes[0]) == 3:
        matches = [
            ("tokens", side, extra)
            for extra in range(9)
            for side in range(1, 65)
            if all(s[1] - extra == (h // side) * (w // side) and h % side == w % side == 0
                   for s, (h, w) in zip(shapes, sizes, strict=True))
        ]  # fmt: skip
        return matches[0] if matches else None
    if len(shapes[0]) != 4:
        return None
    if len(shapes) == 2:
        changed = [shapes[0][axis] != shapes[1][axis] for axis in (1, 2, 3)]
        wide = {"bchw": (2, 3), "bhwc": (1, 2)}
        for layout, expected in (("bchw", [False, True, True]), ("bhwc", [True, True, False])):
            h, w = wide[layout]
            if changed == expected and all(s[h] < s[w] for s in shapes):
                return layout, 0, 0
        return None
    _, a, b, c = shapes[0]
    if (b == c) == (a == b):
        return None
    return ("bchw" if b == c else "bhwc"), 0, 0


def as_grid(output: Any, layout: Layout, size: Sequence[int], name: str) -> Tensor:
    """A layer's output as ``(B, C, h, w)``, of images of ``size`` (height, width)."""
    kind, side, extra = layout
    values = first_tensor(output)
    if values is None or kind == "bchw":
        return values  # type: ignore[return-value]  # the probe has seen a tensor
    if kind == "bhwc":
        return values.permute(0, 3, 1, 2)
    h, w = size[0] // side, size[1] // side
    tokens = values[:, extra:]
    if tokens.shape[1] != h * w:
        raise UserError(
            f"layer {name!r} gives {tokens.shape[1]} tokens for an image of {size[0]}x{size[1]} pixels; "
            f"its patches are {side}x{side}: make the image a multiple of that."
        )
    grid: Tensor = tokens.transpose(1, 2).unflatten(2, (h, w))
    return grid


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0][:200]
