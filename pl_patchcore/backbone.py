"""Backbone by name or module -> the layers asked for, and nothing behind them.

Builds the network, loads its weights, cuts it after the last layer needed, freezes it, and finds out in which
order each layer gives its axes. Next: `patch_features.py`.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from pl_patchcore.errors import UserError

log = logging.getLogger(__name__)

PAPER_WEIGHTS = "IMAGENET1K_V1"
_FILES = (".pth", ".pt", ".safetensors")


class UntrainedBackboneWarning(UserWarning):
    """A backbone with random weights: shapes and timings mean something, accuracy does not."""


class Backbone(nn.Module):
    """Frozen network that returns the outputs of some of its layers, each as (B, C, h, w).

    Always in eval mode, batch norm included, and without gradients, whatever the Trainer does.

    Args:
        backbone: Name of a torchvision classification model, or a module (a copy of it is used).
        layers: Dotted names of the layers, as ``named_modules()`` gives them.
        weights: Name of torchvision weights, path of a ``.pth``, ``.pt`` or ``.safetensors`` state dict, or None
            for random weights. A module keeps the weights it has unless a path is given.
        seed: Seed of random weights.

    Raises:
        UserError: If a name is unknown, weights do not fit or cannot be had, or a layer's output cannot be
            understood as a grid of features.
    """

    def __init__(self, backbone: str | nn.Module, layers: Sequence[str], weights: str | None, seed: int = 0) -> None:
        super().__init__()
        if not layers or len(set(layers)) < len(layers) or isinstance(layers, str):
            raise UserError(f"layers must be a list of different layer names, got {layers!r}.")
        self.name = backbone if isinstance(backbone, str) else type(backbone).__qualname__
        self.layers = list(layers)
        path = Path(weights).expanduser() if weights is not None and _is_file(weights) else None
        state = None if path is None else _read_weights(path)
        network = _build(backbone, weights if path is None else None, path is not None, seed)
        _check_layers(network, self.name, self.layers)
        for module in network.modules():
            if getattr(module, "inplace", False):  # would overwrite a layer's output after it was collected
                module.inplace = False  # type: ignore[assignment]
        self.network = _cut(network, self.layers)
        if state is not None and path is not None:
            _load(self.network, network, state, path, self.name)
        self.network.eval().requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)  # a quarter to two fifths less time
        self.layouts, self.channels = _probe(self.network, self.layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Run images ``(B, 3, H, W)``; one ``(B, C, h, w)`` a layer, in the order of ``layers``."""
        outputs = self.network(images)
        return [
            _as_grid(outputs[name], layout, images.shape[-2:], name)
            for name, layout in zip(self.layers, self.layouts, strict=True)
        ]

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode."""
        return super().train(False)

    def sha256(self) -> str:
        """Hash of the weights in use, hexadecimal; those behind the last layer count only where hooks collect."""
        digest = hashlib.sha256()
        for name, value in sorted(self.network.state_dict().items()):
            if not name.endswith("num_batches_tracked"):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


class _Collector(nn.Module):
    """Layers of a network that cannot be traced, by forward hooks; stops after the last of them."""

    class _Done(Exception):
        pass

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self._found: dict[str, Any] = {}
        for name in layers:
            network.get_submodule(name).register_forward_hook(self._hook(name, len(layers)))

    def _hook(self, name: str, wanted: int) -> Any:
        def collect(module: nn.Module, inputs: Any, output: Any) -> None:
            self._found[name] = output
            if len(self._found) == wanted:
                raise self._Done

        return collect

    def forward(self, images: Tensor) -> dict[str, Any]:
        self._found = {}
        with contextlib.suppress(self._Done):
            self.network(images)
        found, self._found = self._found, {}
        return found


def _is_file(weights: str) -> bool:
    return weights.endswith(_FILES) or Path(weights).expanduser().exists()


def _build(backbone: str | nn.Module, weights: str | None, from_file: bool, seed: int) -> nn.Module:
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
        traced: nn.Module = create_feature_extractor(
            network.eval(), {name: name for name in layers}, suppress_diff_warning=True
        )
    except Exception as error:
        # what tracing raises depends on the module's own code; hooks need nothing of it
        log.info("backbone cannot be traced (%s); collecting its layers by hooks.", error)
        return _Collector(network, layers)
    return traced


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
    prefix = "network." if isinstance(cut, _Collector) else ""
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


_Layout = tuple[str, int, int]  # "bchw" or "bhwc"; "tokens" with patch side and number of leading extra tokens


def _probe(network: nn.Module, layers: Sequence[str]) -> tuple[list[_Layout], list[int]]:
    """Find the axes of each layer's output: those that change with the image's size are spatial."""
    sizes = [(96, 128), (128, 192)]
    try:
        outputs = [_run(network, size) for size in sizes]
    except Exception:
        # models of one input size (ViT, MaxViT) say so in ways of their own
        sizes = [(224, 224)]
        try:
            outputs = [_run(network, sizes[0])]
        except Exception as error:
            raise UserError(
                f"the backbone fails on images of 128x192 and of 224x224 pixels: {_first_line(error)}"
            ) from error
    layouts, channels = [], []
    for name in layers:
        found = [output.get(name) for output in outputs]
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in found]
        tensors = [v for v in found if isinstance(v, Tensor) and v.ndim in (3, 4) and len(v) == 2]
        layout = _layout([value.shape for value in tensors], sizes) if len(tensors) == len(sizes) else None
        if layout is None:
            raise UserError(
                f"layer {name!r} gives {shapes[0]}, which is no grid of features (B, C, h, w), (B, h, w, C) or tokens "
                "(B, h*w, C) that can be told apart; take another layer."
            )
        layouts.append(layout)
        channels.append(shapes[0][1] if layout[0] == "bchw" else shapes[0][-1])
    return layouts, channels  # type: ignore[return-value]


def _run(network: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    # a traced module prints its traceback before it raises
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        result: dict[str, Any] = network(torch.zeros(2, 3, *size))
    return result


def _layout(shapes: list[torch.Size], sizes: list[tuple[int, int]]) -> _Layout | None:
    if len(shapes[0]) == 3:
        matches = [
            ("tokens", side, extra)
            for extra in range(9)
            for side in range(1, 65)
            if all(s[1] - extra == (h // side) * (w // side) and h % side == w % side == 0
                   for s, (h, w) in zip(shapes, sizes, strict=True))
        ]  # fmt: skip
        return matches[0] if matches else None
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


def _as_grid(output: Tensor, layout: _Layout, size: Sequence[int], name: str) -> Tensor:
    kind, side, extra = layout
    if kind == "bchw":
        return output
    if kind == "bhwc":
        return output.permute(0, 3, 1, 2)
    h, w = size[0] // side, size[1] // side
    tokens = output[:, extra:]
    if tokens.shape[1] != h * w:
        raise UserError(
            f"layer {name!r} gives {tokens.shape[1]} tokens for an image of {size[0]}x{size[1]} pixels; "
            f"its patches are {side}x{side}: make the image a multiple of that."
        )
    grid: Tensor = tokens.transpose(1, 2).unflatten(2, (h, w))
    return grid


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0][:200]
