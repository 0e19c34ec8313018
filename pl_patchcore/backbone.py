"""Backbone by name or module -> a network that gives the layers asked for, and nothing behind them.

Builds the network, cuts it behind the last layer needed, loads its weights, freezes it, and finds out in which
order each layer gives its axes. Next: `patch_features.py`, which runs it.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Tracer

from pl_patchcore import timm_networks
from pl_patchcore.errors import UserError
from pl_patchcore.options import nearest
from pl_patchcore.timm_networks import PositionRule
from pl_patchcore.weights_file import first_line, load_weights, read_weights, weights_path

log = logging.getLogger(__name__)

PAPER_WEIGHTS = "IMAGENET1K_V1"
PRETRAINED = "pretrained"  # weights that timm gives by a model's name; with PAPER_WEIGHTS, the default, the same
_PROBED_PIXELS = (((96, 128), (128, 192)), ((112, 168), (168, 224)))  # the second pair for patches of 14
_ODD_PIXELS = (97, 131)  # taken by networks that take any size
_USUAL_SIDES = (224, 256, 384, 448, 512, 518)  # pixels, of models that take one size only
building = threading.RLock()  # tracing changes torch.nn.Module meanwhile, and random weights take torch's generator
Layout = tuple[str, int, int]  # "bchw" or "bhwc"; "tokens" with the patch's side and the number of leading extra tokens


class UntrainedBackboneWarning(UserWarning):
    """A backbone with random weights: shapes and timings mean something, accuracy does not."""


class CutNetwork(NamedTuple):
    """A frozen network that ends with the last layer needed, and how to read its layers."""

    network: nn.Module  # gives a dict of the layers' outputs, by name
    name: str  # torchvision's, timm's with its prefix, or the module's class
    layers: list[str]  # their names, as the network gives them
    layouts: list[Layout]  # order of the axes of each layer's output
    channels: list[int]  # numbers at a place of each layer
    strides: list[int]  # pixels from cell to cell of each layer
    multiple: int  # pixels; sides of images are to be multiples of it
    size: tuple[int, int] | None  # height and width, pixels, of the only images that it takes; None: any


def cut_network(
    backbone: str | nn.Module,
    layers: Sequence[str],
    weights: str | None,
    seed: int,
    size: tuple[int, int] | None,
    position_embedding: PositionRule = "timm",
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
    state = None if path is None else read_weights(path)
    of_timm = isinstance(backbone, str) and name.startswith(timm_networks.PREFIX)
    if position_embedding != "timm" and not of_timm:
        raise UserError(f"patches.position_embedding is for backbones timm/..., got {name}; set it to timm.")
    if isinstance(backbone, str):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if of_timm:
                whole, state = _of_timm(name, weights, state, size, position_embedding), None
            else:
                whole = _of_torchvision(name, weights if path is None else None)
        if weights is None:
            warnings.warn(
                f"backbone {name} has random weights (weights: null): good for shapes and timings, "
                "but its scores say little about real images.",
                UntrainedBackboneWarning,
                stacklevel=2,
            )
    elif not isinstance(backbone, nn.Module):
        raise UserError(f"backbone must be a name or a module (an instance, not a class), got {backbone!r}.")
    elif path is None and weights not in (None, PAPER_WEIGHTS):
        raise UserError(f"weights {weights!r} name torchvision's own; for a module give a path or null.")
    else:
        whole = copy.deepcopy(backbone)
    own = timm_networks.feature_layers(whole) if of_timm else []
    found = _resolved(whole.eval(), layers, own, name, size)
    for module in whole.modules():
        if getattr(module, "inplace", False):  # would overwrite a layer's output after it was collected
            module.inplace = False  # type: ignore[assignment]
    by_itself = bool(own) and ({*found} <= {*own} or timm_networks.reorders(whole))
    network = timm_networks.TimmLayers(whole, found) if by_itself else _cut(whole, found)
    if state is not None:
        load_weights(network.network if isinstance(network, _HookedNetwork) else network, whole, state, f"{path}", name)
    network.eval().requires_grad_(False)
    for weight in network.parameters():
        if weight.ndim == 4:  # channels last: a quarter to two fifths less time
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return CutNetwork(network, name, found, *_probe(network, found, size))


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
        found.setdefault(name, output)
        if len(found) == wanted and not torch.compiler.is_compiling():  # a graph is recorded of calls that return
            raise _LastLayerSeen


class _HookedNetwork(nn.Module):
    """Layers of a network that cannot be traced, by forward hooks. Can be copied, pickled, and called from threads."""

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        names = dict.fromkeys(_module_of(layer) for layer in layers)
        for name in names:
            network.get_submodule(name).register_forward_hook(partial(_keep_output, name, len(names)))

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


def _of_timm(
    name: str,
    weights: str | None,
    state: Mapping[str, Tensor] | None,
    size: tuple[int, int] | None,
    position_embedding: PositionRule,
) -> nn.Module:
    """A network of timm's, with its weights."""
    if state is None and weights not in (None, PAPER_WEIGHTS, PRETRAINED):
        raise UserError(f"weights {weights!r} are unknown for {name}; give {PRETRAINED}, a path or null.")
    own_name = name.removeprefix(timm_networks.PREFIX)
    return timm_networks.build(own_name, state, weights is not None, size, position_embedding)


def _of_torchvision(name: str, weights: str | None) -> nn.Module:
    """A network of torchvision's, with its weights of that name, or random ones."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(
            f"backbone {name!r} is unknown; did you mean {nearest(name, known)!r}? Take a torchvision classification "
            f"model ({', '.join(known[:3])}, ...), one of timm's (timm/NAME), or a module of your own."
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchvision's own, on how two models are initialised
        try:
            network: nn.Module = torchvision.models.get_model(name, weights=entry)
        except OSError as error:
            raise UserError(
                f"weights {weights} of {name} cannot be downloaded ({error}); fetch {entry.url} "
                "on a machine with a network and give its path as weights."
            ) from error
    return network


def _module_of(layer: str) -> str:
    """The dotted name of a layer's module: ``encoder`` of ``encoder[0]``."""
    return layer.partition("[")[0]


def _resolved(
    network: nn.Module, layers: Sequence[str], own: Sequence[str], name: str, size: tuple[int, int] | None
) -> list[str]:
    """Layers by the names of their modules, which hold no negative numbers and are not ``last``."""
    known = [module for module, _ in network.named_modules() if module]
    found = []
    for layer in layers:
        if layer == "last" and layer not in known:
            found.append(own[-1] if own else _last_layer(network, size))
            continue
        inside, written = network, _module_of(layer).split(".")
        for k, part in enumerate(written):
            children = dict(inside.named_children())
            if re.fullmatch(r"-\d+", part) and int(part) >= -len(children):
                written[k] = list(children)[int(part)]
            inside = children.get(written[k], nn.Identity())
        if (module := ".".join(written)) not in known:
            outer = [each for each in known if each.count(".") <= 1]
            raise UserError(
                f"layer {layer!r} is not in {name}; did you mean {nearest(module, known)!r}? "
                f"Candidates: {', '.join(outer[:60])}{', ...' if len(outer) > 60 else ''} (and those inside them)."
            )
        found.append(module + layer[len(_module_of(layer)) :])
    if len(set(found)) < len(found):
        raise UserError(f"layers must be a list of different layers, got {list(layers)}, which are {found}.")
    return found


def _last_layer(network: nn.Module, size: tuple[int, int] | None) -> str:
    """The last of the outermost modules that gives a grid of features."""
    hooked = _HookedNetwork(copy.deepcopy(network), [name for name, _ in network.named_children()])
    for sizes, outputs in _runs(hooked, size, []):
        for name in reversed(outputs[0]):
            if _layout([_shape(output, name) for output in outputs], sizes):
                return name
    raise UserError("no layer of the backbone gives a grid of features: name the layer in place of 'last'.")


class _LayerTracer(Tracer):
    """Records the calls of a network, and what its layers give.

    While it does, torch sends the calls of all modules of the process here; those of other threads pass through. Torch
    makes one without arguments to load what was pickled.
    """

    layers: Sequence[str] = ()

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math, torchvision.ops))  # type: ignore[arg-type]
        self.thread, self.found = threading.get_ident(), dict[str, Any]()

    def trace(self, *args: Any, **kwargs: Any) -> Graph:
        """Record a network, one at a time."""
        with building:
            return super().trace(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is recorded as one call."""
        return super().is_leaf_module(m, module_qualified_name) or m.__module__.startswith("torchvision.ops")

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call."""
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        output = super().call_module(m, forward, args, kwargs)
        if (name := self.path_of_module(m)) in self.layers:
            self.found.setdefault(name, output)
        return output


def _cut(network: nn.Module, layers: Sequence[str]) -> nn.Module:
    tracer = _LayerTracer()
    tracer.layers = layers
    try:
        graph = tracer.trace(network)
        outputs = {layer: tracer.found[layer].node for layer in layers}  # no tuples, nor their entries
    except Exception as error:
        # what tracing raises depends on the module's own code; hooks need nothing of it
        log.info("backbone cannot be traced (%s); its layers are read by hooks.", first_line(error))
        return _HookedNetwork(network, layers)
    graph.erase_node(next(iter(reversed(graph.nodes))))  # the network's own output
    graph.output(outputs)
    cut = GraphModule(network, graph)
    cut.graph.eliminate_dead_code()
    return GraphModule(cut, cut.graph)  # with nothing but what is called


def _runs(
    network: nn.Module, size: tuple[int, int] | None, failures: list[Exception]
) -> Iterator[tuple[Sequence[tuple[int, int]], list[dict[str, Any]]]]:
    """Outputs for images of two sizes, or of one, of those that the network takes; appends what it raises."""
    singles = dict.fromkeys(([size] if size else []) + [(side, side) for side in _USUAL_SIDES])
    for sizes in (*_PROBED_PIXELS, *((each,) for each in singles)):
        try:
            yield sizes, [_outputs(network, each) for each in sizes]
        except Exception as error:
            # models of one size (ViT, MaxViT) say so in ways of their own
            failures.append(error)


def _probe(
    network: nn.Module, layers: Sequence[str], size: tuple[int, int] | None
) -> tuple[list[Layout], list[int], list[int], int, tuple[int, int] | None]:
    """Find the axes of each layer's output: those that change with the image's size are spatial."""
    unread, failures = "", list[Exception]()
    for sizes, outputs in _runs(network, size, failures):
        layouts, channels, strides = [], [], []
        for name in layers:
            shapes = [_shape(output, name) for output in outputs]
            if (layout := _layout(shapes, sizes)) is None:
                unread = unread or f"layer {name!r} gives {shapes[0] or 'no tensor'}"
                break
            layouts.append(layout)
            channels.append(shapes[0][1 if layout[0] == "bchw" else -1])
            strides.append(layout[1] or _stride([shape[3 if layout[0] == "bchw" else 2] for shape in shapes], sizes))
        else:
            if len(sizes) == 1:
                return layouts, channels, strides, 1, sizes[0]
            return layouts, channels, strides, _multiple(network, max(strides), size), None
    if unread:
        raise UserError(
            f"{unread}, which is no grid of features (B, C, h, w), (B, h, w, C) or tokens (B, h*w, C) that can be "
            "told apart; take another layer."
        )
    h, w = size or (224, 224)
    raise UserError(
        f"the backbone fails on images of 128x192, 168x224, {h}x{w} and 224x224 pixels: {first_line(failures[-1])}; "
        "set resize and crop, or tile, to the size that it takes."
    )


def _multiple(network: nn.Module, stride: int, size: tuple[int, int] | None) -> int:
    """1, if the network takes images of any size; else the stride, of which their sides are multiples."""
    failure = _failure(network, _ODD_PIXELS)
    if failure is None:
        return 1
    if size is not None and (failure := _failure(network, size)) is not None:
        low, high = ([step * stride for step in (side // stride, side // stride + 1)] for side in size)
        raise UserError(
            f"the backbone fails on images of {size[0]}x{size[1]} pixels ({first_line(failure)}): set resize and crop, "
            f"or tile, to multiples of {stride}, such as {low[0]}x{high[0]} or {low[1]}x{high[1]}."
        )
    return stride


def _failure(network: nn.Module, size: tuple[int, int]) -> Exception | None:
    """What the network raises for images of a size."""
    try:
        _outputs(network, size)
    except Exception as error:  # by its own code
        return error
    return None


def _outputs(network: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """The layers' outputs, of two images of a size."""
    like = next(network.parameters(), torch.empty(0, dtype=torch.float32))
    with torch.no_grad():  # called itself, a traced module prints its traceback before it raises
        outputs: dict[str, Any] = network.forward(torch.zeros(2, 3, *size, dtype=like.dtype, device=like.device))
    return outputs


def _shape(outputs: Mapping[str, Any], layer: str) -> tuple[int, ...]:
    """Shape of a layer's output; empty, where it is no batch of two."""
    value = layer_output(outputs, layer)
    return tuple(value.shape) if isinstance(value, Tensor) and len(value) == 2 else ()


def layer_output(outputs: Mapping[str, Any], layer: str) -> Any:
    """The tensor that a layer gives, of the outputs of a `CutNetwork`'s network.

    Of a tuple, dict or data class it is the first entry, as transformers give them, or the one asked for: ``name[1]``.
    """
    module, _, entry = layer.removesuffix("]").partition("[")
    output = outputs.get(module)
    while not isinstance(output, Tensor):
        if dataclasses.is_dataclass(output):
            output = {name: value for name, value in vars(output).items() if value is not None}
        named = output if isinstance(output, Mapping) else {}
        values = list(named.values()) if named else list(output) if isinstance(output, tuple | list) else []
        by_number = {str(number): value for number, value in enumerate(values)}
        output, entry = {**by_number, **named}.get(entry or "0"), ""
        if output is None:
            return None
    return None if entry else output


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
            if len(shapes) == 1:
                # pixels a cell, the same if these are axes
                down, across = sizes[0][0] // first[h], sizes[0][1] // first[w]
                if 0 < down == across and first[c] not in (first[h], first[w]):
                    return kind, 0, 0
                continue
            if first[c] == last[c] and first[h] < last[h] and first[w] < last[w]:
                return kind, 0, 0
    return None


def _stride(cells: Sequence[int], sizes: Sequence[tuple[int, int]]) -> int:
    """Pixels from cell to cell, by the numbers of cells across images of one size or two."""
    if len(sizes) == 1:
        return sizes[0][1] // cells[0]
    return (sizes[1][1] - sizes[0][1]) // (cells[1] - cells[0])


def as_grid(outputs: Mapping[str, Any], name: str, layout: Layout, size: Sequence[int]) -> Tensor:
    """A layer's output as ``(B, C, h, w)``, of images of ``size`` (height, width), among those of the network."""
    kind, side, extra = layout
    values: Tensor = layer_output(outputs, name)
    if kind == "tokens":
        h, w = size[0] // side, size[1] // side
        values = values[:, extra:]
        if values.shape[1] != h * w:
            raise UserError(
                f"layer {name!r} gives {values.shape[1]} tokens for an image of {size[0]}x{size[1]} pixels; "
                f"its patches are {side}x{side}: make the image a multiple of that."
            )
        values = values.unflatten(1, (h, w))
    return values if kind == "bchw" else values.permute(0, 3, 1, 2)
