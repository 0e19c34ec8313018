"""Checkpoints: reading with clear errors, and refusing another model's.

A checkpoint is Lightning's, with the key ``patchcore``: the format's version, whether there is a memory bank, and what
that depends on (`PatchCoreModel.identity` and the preprocessing), in plain values.
"""

from __future__ import annotations

import dataclasses
import logging
import reprlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch

from pl_patchcore.backbone import UntrainedBackboneWarning
from pl_patchcore.calibration import Calibration
from pl_patchcore.distributed import on_first_process
from pl_patchcore.errors import UserError
from pl_patchcore.foreign import Source, check_archive, is_plain, is_whole
from pl_patchcore.model import PatchCoreModel
from pl_patchcore.options import GROUPS, MEMBER_ARGUMENTS, THRESHOLDS, known_arguments, refuse_rate_beside_threshold
from pl_patchcore.preprocessing import MOST_PIXELS
from pl_patchcore.weights_file import weights_path

log = logging.getLogger(__name__)
log.addFilter(on_first_process)

VARIABLE_SIZE = (  # buffers whose size a fit decides
    "memory_bank.features", "memory_bank.radii", "memory_bank.images", "memory_bank.places", "memory_bank.index",
    "calibration.scores", "calibration.peaks", "calibration.images",
)  # fmt: skip
LATER = (  # buffers that older files of this format do not have
    "memory_bank.images", "memory_bank.places", "memory_bank.grid", "calibration.images",
)  # fmt: skip
OF_TRAINER = ("callbacks", "loops", "optimizer_states", "lr_schedulers")  # what Lightning keeps to resume, unused here
FORMAT = 2  # of the key ``patchcore``; files of version 0.1 of the package have none
_OF_OLD = {"resize_by": "pillow"}  # preprocessing that older files of this format do not name
M = TypeVar("M", bound=L.LightningModule)


class Checked(dict[str, Any]):
    """A checkpoint that `read_checkpoint` has looked at, which takes a second for a large memory bank."""


def read_checkpoint(source: Source) -> Checked:
    """Open a checkpoint of a fitted PatchCore: data, of which nothing is executed; tensors are mapped, not read.

    Args:
        source: Path, or an open binary file such as ``io.BytesIO``.

    Returns:
        What this package uses of it: ``state_dict``, ``hyper_parameters`` and ``patchcore``, checked by
        `require_fitted`; plain values that a subclass has put in; and the keys that Lightning asks for.

    Raises:
        UserError: If the file is missing, damaged, cut short, of another model or version, or has no memory bank.
    """
    mapped = isinstance(source, str | PathLike)
    name = str(source) if mapped else "the checkpoint"
    if isinstance(source, str | PathLike) and not Path(source).is_file():
        raise UserError(f"{source}: no such checkpoint; give the .ckpt file that fit has written.")
    try:
        check_archive(source)
        if not isinstance(source, str | PathLike):
            source.seek(0)
        checkpoint = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file makes zipfile and torch raise errors of many kinds
        raise UserError(
            f"{name}: is no checkpoint of PatchCore, or is damaged or cut short; copy it again, or fit again."
        ) from error
    require_fitted(checkpoint, name)
    used = {key: checkpoint[key] for key in ("state_dict", "hyper_parameters", "patchcore")}
    own = {key: value for key, value in checkpoint.items() if key not in OF_TRAINER and is_plain(value)}
    return Checked(own | used | {"pytorch-lightning_version": L.__version__, "epoch": 0, "global_step": 0})


def require_fitted(checkpoint: Any, name: str = "the checkpoint") -> None:
    """Refuse what is no checkpoint of a fitted PatchCore of this version, by a `UserError` with the reason."""
    mark = checkpoint.get("patchcore") if isinstance(checkpoint, dict) else None
    if not isinstance(mark, dict) or not is_plain(mark) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{name}: is no checkpoint of PatchCore; give the .ckpt file that its fit has written.")
    if mark.get("format") != FORMAT:
        raise UserError(
            f"{name}: was written by another version of pl_patchcore, which this one cannot read; fit again."
        )
    if mark.get("fitted") is not True:
        raise UserError(f"{name}: holds no memory bank: it was written before its fit had ended; fit again.")
    settings, identity, left_out = checkpoint.get("hyper_parameters"), mark.get("identity"), mark.get("left_out")
    if not isinstance(settings, dict) or not is_plain(settings):
        raise UserError(f"{name}: its settings are not plain values by name; fit again.")
    members = identity.get("members", []) if isinstance(identity, dict) else None
    described = isinstance(members, list) and all(isinstance(member, dict) for member in members)
    described = described and isinstance(identity, dict) and isinstance(identity.get("preprocessing"), dict)
    named = isinstance(left_out, list) and all(isinstance(n, str) and n.isidentifier() for n in left_out)
    if not described or not named:
        raise UserError(f"{name}: does not tell what its memory bank was made with; fit again.")
    for key, value in checkpoint["state_dict"].items():
        if not isinstance(key, str) or not is_whole(value):
            raise UserError(f"{name}: {reprlib.repr(key)} is no tensor, or not all there; fit again.")
        numbers = value[1:] if key.endswith(".radii") else value  # no row reaches all features: infinity
        if value.is_floating_point() and not numbers.isfinite().all():
            raise UserError(f"{name}: {reprlib.repr(key)} holds NaN or infinity; fit again.")


def check_state(module: L.LightningModule, saved: Mapping[str, Any], *, strict: bool = True) -> None:
    """Compare a checkpoint's ``state_dict``, with the backbone's weights, to the `PatchCore` that it is loaded into.

    A `UserError` names the first tensor that is of another type or shape, or (``strict``) missing or unknown, or the
    memory bank that no patch features of this model can make up.
    """
    own = {key: value for key, value in module.state_dict().items() if key in saved or not key.endswith(LATER)}
    for key in sorted({*own, *saved} if strict else {*own} & {*saved}):
        if key not in saved or key not in own:
            raise UserError(
                f"the checkpoint {'lacks' if key in own else 'holds an unknown'} tensor {key!r}; fit again."
            )
        theirs, ours = saved[key], own[key]
        sized = key.endswith(VARIABLE_SIZE)
        alike = theirs.ndim == ours.ndim if sized else theirs.shape == ours.shape
        if not alike or theirs.is_floating_point() != ours.is_floating_point():
            kind = f"{str(theirs.dtype).removeprefix('torch.')} {tuple(theirs.shape)}"
            raise UserError(f"the checkpoint's {key!r} is {kind}, which this model cannot hold; fit again.")
    for name, part in module.named_modules():
        if isinstance(part, PatchCoreModel) and (rows := saved.get(f"{name}.memory_bank.features")) is not None:
            radii = len(saved.get(f"{name}.memory_bank.radii", ()))
            images = saved.get(f"{name}.memory_bank.images", torch.empty(0, dtype=torch.int32))
            known = images.dtype == torch.int32 and len(images) in (0, len(rows)) and bool((images >= -1).all())
            reach = rows.float().square().sum(1)  # squared distances are of this size
            sized = rows.shape[1] == part.patch_features.dimension and radii in (0, len(rows) + 1)
            if not sized or not known or reach.isinf().any():
                raise UserError(f"the checkpoint's {name}.memory_bank is no bank of this model's features; fit again.")
            _check_places(saved, f"{name}.memory_bank", len(rows), part.memory_bank.position_radius is not None)
        if isinstance(part, Calibration):
            names = [f"{name}.{of}" for of in ("scores", "peaks", "images")]
            if len({len(saved[key]) for key in names if key in saved}) > 1:
                raise UserError(f"the checkpoint's {name} has not as many scores as peaks and images; fit again.")


def _check_places(saved: Mapping[str, Any], name: str, rows: int, needed: bool) -> None:
    """Refuse places of a memory bank's rows that lie on no grid, or none where they are needed."""
    places = saved.get(f"{name}.places", torch.empty(0, 2, dtype=torch.int32))
    grid = saved.get(f"{name}.grid", torch.zeros(2, dtype=torch.int64))
    alike = places.dtype == torch.int32 and places.shape[1:] == (2,) and len(places) in (0, rows)
    on_grid = alike and bool(((places >= 0) & (places < grid)).all()) and bool((grid <= MOST_PIXELS).all())
    if not on_grid:
        raise UserError(f"the checkpoint's {name}.places lie on no grid of patches; fit again.")
    if needed and len(places) < rows:
        raise UserError(
            "position_radius: the checkpoint's memory bank does not know the places of its rows; leave it out, or fit "
            "again with it."
        )


def is_frozen(key: str) -> bool:
    """Whether a tensor of that name is the backbone's, which no fit changes."""
    return "patch_features." in key


def mark_of(module: Any, began: bool) -> dict[str, Any]:
    """What a checkpoint of a `PatchCore` says of itself, in plain values: its key ``patchcore``.

    ``began`` tells whether a fit has taken in images.
    """
    return {
        "format": FORMAT,
        "fitted": module.model.fitted,
        "began": module.model.fitted or began,
        "identity": module.identity(),
        "left_out": list(module.left_out),
    }


def check_against(module: Any, checkpoint: dict[str, Any], path: str | PathLike[str] | None = None) -> None:
    """Refuse a checkpoint whose memory bank was not made with a module's features, or whose file is damaged.

    Args:
        module: The `PatchCore` that it is loaded into; its weights are identified.
        checkpoint: The checkpoint, its ``state_dict`` with or without the backbone's weights.
        path: File that it was read from.

    Raises:
        UserError: As `require_fitted`, `check_identity` and `check_state`.
    """
    if not isinstance(checkpoint, Checked):
        require_fitted(checkpoint)
        if path is not None and "://" not in str(path):
            read_checkpoint(path)  # Lightning looks at no checksum
    module.model.identify()
    check_identity(checkpoint, module.identity())
    frozen = {key: value for key, value in module.state_dict().items() if is_frozen(key)}
    check_state(module, frozen | checkpoint["state_dict"], strict=module.strict_loading)


def holds_backbone(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint brings the backbone's weights (``save_backbone``)."""
    return any(map(is_frozen, checkpoint["state_dict"]))


def made_of(kind: type[M], checkpoint: dict[str, Any], overrides: Mapping[str, Any], name: str) -> M:
    """Make the module of a checkpoint with its hyper-parameters, which are plain values.

    Args:
        kind: Class of the module.
        checkpoint: As `read_checkpoint` returns it.
        overrides: Arguments that take the place of those in the file.
        name: Name of the file, for errors.

    Raises:
        UserError: If an argument is unknown or missing, or those given contradict each other.
    """
    refuse_rate_beside_threshold([name for name, value in overrides.items() if value is not None])
    saved = checkpoint.get("hyper_parameters", {})
    arguments = plain_settings(saved, known_arguments(kind), name)
    for argument in checkpoint["patchcore"]["left_out"]:
        if argument not in overrides:
            raise UserError(
                f"{name} was fitted with {argument} as an object that a file cannot hold; pass it: "
                f"load_from_checkpoint(path, {argument}=...)."
            )
    brings_weights = holds_backbone(checkpoint) and "weights" in arguments and "weights" not in overrides
    settings = (without_weights(arguments) if brings_weights else arguments) | dict(overrides)
    module = with_settings(kind, settings, quiet=brings_weights)
    if brings_weights:
        kept = arguments.keys() & {"weights", "ensemble"} - overrides.keys()
        module.hparams.update({name: arguments[name] for name in kept})
    return module


def without_weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with random weights, of an ensemble's members too: those of a checkpoint are loaded over them."""
    found, ensemble = {**settings, "weights": None}, settings.get("ensemble") or {}
    if members := ensemble.get("members"):
        found["ensemble"] = {**ensemble, "members": [{**member, "weights": None} for member in members]}
    return found


def with_settings(kind: type[M], settings: Mapping[str, Any], *, quiet: bool = False) -> M:
    """Make a module with settings out of several places: a threshold may stand in one of them, a rate in another.

    ``quiet``: random weights are meant, so there is no warning.
    """
    by_hand = {name: settings[name] for name in THRESHOLDS if name in settings}
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore", UntrainedBackboneWarning)
        module = kind(**{name: value for name, value in settings.items() if name not in by_hand})
    for name, value in by_hand.items():
        setattr(module, name, value)
    return module


def plain_settings(saved: Mapping[str, Any], known: Collection[str], path: str) -> dict[str, Any]:
    """A checkpoint's hyper-parameters, checked: a `UserError` names one that is no argument or no plain value."""
    for name, value in saved.items():
        if name not in known:
            raise UserError(f"{path}: PatchCore has no argument {name!r}, as the file does; fit again.")
        if not is_plain(value) or (isinstance(value, dict) and name in {*MEMBER_ARGUMENTS} - {*GROUPS}):
            raise UserError(f"{path}: {name!r} is no plain value; fit again.")
    return dict(saved)


def check_identity(checkpoint: dict[str, Any], own: dict[str, Any]) -> None:
    """Compare what a fitted model's checkpoint was made with to the model's own identity, with ``preprocessing``.

    A `UserError` names every difference. Weights of the model do not matter where the file brings the backbone's.
    """
    saved, brings_weights = checkpoint["patchcore"]["identity"], holds_backbone(checkpoint)
    members = [identity.get("members", []) for identity in (saved, own)]
    if len(members[0]) != len(members[1]):
        kinds = [f"an ensemble of {len(found)}" if found else "a single model" for found in members]
        raise UserError(f"the checkpoint is of {kinds[0]}, this is {kinds[1]}; give the model it was fitted with.")
    of_images = _OF_OLD | saved["preprocessing"], own["preprocessing"]
    for theirs, ours in zip(members[0] or [saved], members[1] or [own], strict=True):
        _compare(theirs | of_images[0], ours | of_images[1], brings_weights)


def _compare(saved: dict[str, Any], own: dict[str, Any], brings_weights: bool) -> None:
    left_out = {"preprocessing", *["backbone_sha256"] * brings_weights}
    other = {key: value for key, value in own.items() if key not in left_out and saved.get(key) != value}
    if not other:
        return
    if [*other] == ["backbone_sha256"]:
        raise UserError(
            f"the checkpoint was fitted with other weights of {saved.get('backbone')} "
            f"(sha256 {_short(saved.get('backbone_sha256'))}, here {_short(own['backbone_sha256'])}); give the same "
            "weights, with weights=<path> if they lie elsewhere."
        )
    listed = "; ".join(f"{key} {_short(saved.get(key))}, here {_short(value)}" for key, value in other.items())
    raise UserError(f"the checkpoint was fitted with other settings: {listed}; use those, or fit again.")


def _short(value: Any) -> str:
    return value[:12] + "..." if isinstance(value, str) and len(value) == 64 else str(value)


def plain_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Those of a `PatchCore`'s arguments that have a plain form, in it, and the names of the others."""
    found: dict[str, Any] = {}
    left_out = []
    for name, value in arguments.items():
        try:
            found[name] = plain(value)
        except TypeError:
            left_out.append(name)
    make_paths_absolute(found)
    return found, left_out


def make_paths_absolute(settings: Any) -> None:
    """Make the paths of weights and masks in a model's settings absolute, to hold in any folder."""
    for each in (settings, *((settings.get("ensemble") or {}).get("members") or ())):
        if isinstance(name := each.get("weights"), str):
            each["weights"] = str(weights_path(name) or name)
    for name in ("roi", "ignore"):
        if isinstance(path := settings.get(name), str):
            settings[name] = str(Path(path).absolute())


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
