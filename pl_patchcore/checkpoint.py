"""Checkpoints: reading with clear errors, and refusing another model's.

A checkpoint is Lightning's, loaded with ``weights_only=True``. Beside Lightning's own keys it holds ``patchcore``: the
format's version, whether there is a memory bank, and what that depends on (`PatchCoreModel.identity` and the
preprocessing), in plain values.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import pickle
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import IO, Any, TypeVar

import lightning as L
import numpy as np
import torch

from pl_patchcore.backbone import UntrainedBackboneWarning
from pl_patchcore.distributed import on_first_process
from pl_patchcore.errors import UserError
from pl_patchcore.options import plain_settings

log = logging.getLogger(__name__)
log.addFilter(on_first_process)

FORMAT = 2  # of the key ``patchcore``; files of version 0.1 of the package have none
M = TypeVar("M", bound=L.LightningModule)
Source = str | PathLike[str] | IO[bytes]


def read_checkpoint(source: Source) -> dict[str, Any]:
    """Open a checkpoint of a fitted PatchCore; tensors of a file are mapped, not read.

    Args:
        source: Path, or an open binary file such as ``io.BytesIO``.

    Returns:
        The checkpoint.

    Raises:
        UserError: If the file is missing, cut short, of another model or version, or has no memory bank.
    """
    name = str(source) if isinstance(source, str | PathLike) else "the checkpoint"
    if isinstance(source, str | PathLike) and not Path(source).is_file():
        raise UserError(f"{source}: no such checkpoint; give the .ckpt file that fit has written.")
    try:
        mapped = isinstance(source, str | PathLike)
        checkpoint: dict[str, Any] = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(f"{name}: is no checkpoint of PatchCore, or a damaged one; fit again.") from error
    except Exception as error:  # a damaged file makes torch raise errors of many kinds
        raise UserError(f"{name}: is damaged or cut short; copy it again, or fit again.") from error
    require_fitted(checkpoint, name)
    return checkpoint


def require_fitted(checkpoint: Any, name: str = "the checkpoint") -> None:
    """Refuse what is no checkpoint of a fitted PatchCore of this version.

    Raises:
        UserError: With the reason.
    """
    mark = checkpoint.get("patchcore") if isinstance(checkpoint, dict) else None
    if not isinstance(mark, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{name}: is no checkpoint of PatchCore; give the .ckpt file that its fit has written.")
    if mark.get("format") != FORMAT:
        raise UserError(
            f"{name}: was written by another version of pl_patchcore, which this one cannot read; fit again."
        )
    if not mark.get("fitted"):
        raise UserError(f"{name}: holds no memory bank: it was written before its fit had ended; fit again.")


def holds_backbone(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint brings the backbone's weights (``save_backbone``)."""
    return any("patch_features." in key for key in checkpoint["state_dict"])


def made_of(kind: type[M], checkpoint: dict[str, Any], overrides: Mapping[str, Any], name: str) -> M:
    """Make the module of a checkpoint with its hyper-parameters, which are plain values, and those given.

    Args:
        kind: Class of the module.
        checkpoint: As `read_checkpoint` returns it.
        overrides: Arguments that take the place of those in the file.
        name: Name of the file, for errors.

    Raises:
        UserError: If an argument is unknown, or one is missing that a file cannot hold.
    """
    saved = checkpoint.get("hyper_parameters", {})
    arguments = plain_settings(saved, inspect.signature(kind.__init__).parameters, name)
    for argument in checkpoint["patchcore"]["left_out"]:
        if argument not in overrides:
            raise UserError(
                f"{name} was fitted with {argument} as an object that a file cannot hold; pass it: "
                f"load_from_checkpoint(path, {argument}=...)."
            )
    brings_weights = holds_backbone(checkpoint) and "weights" in arguments and "weights" not in overrides
    with warnings.catch_warnings():
        if brings_weights:
            warnings.simplefilter("ignore", UntrainedBackboneWarning)
        module = kind(**(arguments | ({"weights": None} if brings_weights else {}) | dict(overrides)))
    if brings_weights:
        module.hparams["weights"] = arguments["weights"]
    return module


def check_identity(checkpoint: dict[str, Any], own: dict[str, Any]) -> None:
    """Compare what a checkpoint's memory bank was made with to the model it is loaded into.

    Args:
        checkpoint: A checkpoint of a fitted model.
        own: The model's identity, with ``preprocessing``. Its weights do not matter where the file brings some.

    Raises:
        UserError: Naming every difference.
    """
    saved = checkpoint["patchcore"]["identity"]
    if len(saved.get("members", ())) != len(own.get("members", ())):
        kinds = [f"an ensemble of {len(m)}" if (m := x.get("members")) else "a single model" for x in (saved, own)]
        raise UserError(f"the checkpoint is of {kinds[0]}, this is {kinds[1]}; give the model it was fitted with.")
    shared = [{"preprocessing": x["preprocessing"]} for x in (saved, own)]
    pairs = list(zip(saved.get("members", [saved]), own.get("members", [own]), strict=True))
    for theirs, ours in pairs:
        _compare(theirs | shared[0], ours | shared[1], holds_backbone(checkpoint))


def _compare(saved: dict[str, Any], own: dict[str, Any], brings_weights: bool) -> None:
    theirs = saved.get("preprocessing", {})
    pairs = [(key, saved.get(key), value) for key, value in own.items() if key != "preprocessing"]
    pairs += [(key, theirs.get(key), value) for key, value in own["preprocessing"].items()]
    other = [pair for pair in pairs if pair[1] != pair[2] and not (brings_weights and pair[0] == "backbone_sha256")]
    if not other:
        return
    if [key for key, _, _ in other] == ["backbone_sha256"]:
        raise UserError(
            f"the checkpoint was fitted with other weights of {saved['backbone']} "
            f"(sha256 {_short(saved['backbone_sha256'])}, here {_short(own['backbone_sha256'])}); give the same "
            "weights, with weights=<path> if they lie elsewhere."
        )
    listed = "; ".join(f"{key} {_short(a)}, here {_short(b)}" for key, a, b in other)
    raise UserError(f"the checkpoint was fitted with other settings: {listed}; use those, or fit again.")


def _short(value: Any) -> str:
    return value[:12] + "..." if isinstance(value, str) and len(value) == 64 else str(value)


def plain(value: Any) -> Any:
    """An argument as a plain value: None, bool, int, float, str, lists and dicts of them.

    Raises:
        TypeError: If it has no such form (a module, say).

    Example:
        >>> plain({"layers": ("layer2",), "mean": np.array([0.5])})
        {'layers': ['layer2'], 'mean': [0.5]}
    """
    if isinstance(value, np.generic | np.ndarray):  # some are floats, too
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PathLike):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [plain(inner) for inner in value]
    raise TypeError(f"{type(value).__name__} is no plain value")


def write_checkpoint(module: L.LightningModule, path: str | Path) -> None:
    """Write a fitted PatchCore as Lightning would, without a Trainer."""
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": L.__version__,
        "loops": {},
        "state_dict": module.state_dict(),
        module.CHECKPOINT_HYPER_PARAMS_KEY: dict(module.hparams),
    }
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
