"""File of weights -> tensors, checked, and loaded into a network; `backbone.py` and `timm_networks.py` use it."""

from __future__ import annotations

import os
import pickle
import reprlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pl_patchcore.errors import UserError
from pl_patchcore.foreign import check_archive, is_whole

_WEIGHT_FILES = (".pth", ".pt", ".safetensors")


def weights_path(weights: str | None) -> Path | None:
    """The path, absolute, that weights are, such as ``~/net.pth``; None if they are a name or there are none."""
    path = None if weights is None else Path(weights).expanduser()
    if path is None or (path.suffix not in _WEIGHT_FILES and not os.path.exists(path)):  # noqa: PTH110 - pathlib's raises where a name is too long
        return None
    return path.absolute()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict, which runs nothing.

    Raises:
        UserError: If there is no such file, or it is damaged or holds anything but finite tensors.
    """
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
        message = f"{path}: holds more than tensors, not loaded; save model.state_dict() instead ({first_line(error)})."
        raise UserError(message) from error
    except Exception as error:  # a damaged file makes zipfile and torch raise errors of many kinds
        raise UserError(f"{path}: not a whole weights file ({first_line(error)}); fetch it again.") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(k, str) and is_whole(value) for k, value in state.items()):
        raise UserError(f"{path}: is not a state dict of whole tensors; save model.state_dict().")
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path}: {reprlib.repr(name)} holds NaN or infinity; fetch or train the weights again.")
    return state


def load_weights(cut: nn.Module, whole: nn.Module, state: Mapping[str, Tensor], path: str, name: str) -> None:
    """Load what a network needs, cut from a whole one; heads behind it may be missing, or of other shapes.

    ``path``, of the file, and ``name``, of the network, are for errors.

    Raises:
        UserError: Naming weights that are missing, unknown, or of another shape.
    """
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
    told = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in faults.items()
        if keys
    ]
    if told:
        raise UserError(f"{path}: weights do not fit {name}: {'; '.join(told)}; give those of this backbone.")
    cut.load_state_dict({key: state[key] for key in needed}, strict=False)


def first_line(error: Exception) -> str:
    """What an error says, in one short line."""
    return str(error).strip().split("\n")[0].split(". ")[0][:200]
