"""Checkpoints: reading with clear errors, refusing another model's, and writing the finished bank.

A checkpoint is Lightning's, loaded with ``weights_only=True``. Beside Lightning's own keys it holds ``patchcore``,
what the memory bank depends on (`PatchCore.identity`), in plain values.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from pl_patchcore.errors import UserError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Open a checkpoint of a fitted PatchCore; tensors are mapped from the file, not read.

    Returns:
        The checkpoint.

    Raises:
        UserError: If the file is missing, cut short, of another model, or has an empty memory bank.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give the .ckpt file that fit has written.")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: is no checkpoint of PatchCore, or a damaged one; fit again.") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: is damaged or cut short; copy it again, or fit again.") from error
    _require_fitted(checkpoint, str(path))
    return checkpoint


def _require_fitted(checkpoint: Any, name: str) -> None:
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("patchcore"), dict):
        raise UserError(f"{name}: is no checkpoint of PatchCore; give the .ckpt file that its fit has written.")
    if not _is_fitted(checkpoint):
        raise UserError(f"{name}: holds an empty memory bank, as written before a fit has ended; fit again.")


def _is_fitted(checkpoint: dict[str, Any]) -> bool:
    banks = [bank for key, bank in checkpoint["state_dict"].items() if key.endswith("memory_bank.features")]
    return bool(banks) and all(len(bank) for bank in banks)


def holds_backbone(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint brings the backbone's weights (``save_backbone``)."""
    return any("patch_features.backbone." in key for key in checkpoint["state_dict"])


class _CheckpointIO(_WrappingCheckpointIO):
    """Reads checkpoints through `read_checkpoint` first, for its errors; holds back what a fit saves too early."""

    def __init__(self, checkpoint_io: CheckpointIO, trainer: Trainer) -> None:
        super().__init__(checkpoint_io)
        self.trainer = trainer
        self.written: dict[str, bool] = {}  # path: whether it holds weights only

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *args: Any, **kwargs: Any) -> None:
        self.written[str(path)] = "optimizer_states" not in checkpoint
        state = self.trainer.state
        if state.fn != TrainerFn.FITTING or state.status != TrainerStatus.RUNNING or _is_fitted(checkpoint):
            super().save_checkpoint(checkpoint, path, *args, **kwargs)
        elif "://" not in str(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)  # for links to it

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        self.written.pop(str(path), None)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if "://" not in str(path):
            read_checkpoint(path)
        loaded: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        return loaded


def watch_checkpoints(trainer: Trainer) -> None:
    """Answer a damaged ``ckpt_path`` by the errors of `read_checkpoint`, and remember the files a fit writes.

    Checkpoint callbacks run before the module's own ``on_train_end``, so that what they save has no memory bank. It is
    held back, that a fit which is killed while it selects leaves no such file, until `write_checkpoints`. Lightning has
    no hook between the choice of a checkpoint and its loading, hence the wrapper.
    """
    if isinstance(trainer.strategy.checkpoint_io, _CheckpointIO):
        trainer.strategy.checkpoint_io.written.clear()
    else:
        trainer.strategy.checkpoint_io = _CheckpointIO(trainer.strategy.checkpoint_io, trainer)


def write_checkpoints(trainer: Trainer) -> None:
    """Write the finished model to every path that was saved to since `watch_checkpoints`, and not removed since."""
    written = getattr(trainer.strategy.checkpoint_io, "written", {})
    for path, weights_only in list(trainer.strategy.broadcast(written).items()):
        trainer.save_checkpoint(path, weights_only)


def check_identity(checkpoint: dict[str, Any], own: dict[str, Any]) -> None:
    """Compare what a checkpoint's memory bank was made with to the model it is loaded into.

    Args:
        checkpoint: The checkpoint.
        own: `PatchCore.identity` of the model. Its weights do not matter where the checkpoint brings its own.

    Raises:
        UserError: Naming every difference.
    """
    _require_fitted(checkpoint, "the checkpoint")
    saved = checkpoint["patchcore"]
    if len(saved.get("members", ())) != len(own.get("members", ())):
        kinds = [f"an ensemble of {len(m)}" if (m := x.get("members")) else "a single model" for x in (saved, own)]
        raise UserError(f"the checkpoint is of {kinds[0]}, this is {kinds[1]}; give the model it was fitted with.")
    for theirs, ours in zip(saved.get("members", ()), own.get("members", ()), strict=True):
        _compare(theirs, ours, holds_backbone(checkpoint))
    if "members" not in own:
        _compare(saved, own, holds_backbone(checkpoint))


def _compare(saved: dict[str, Any], own: dict[str, Any], brings_weights: bool) -> None:
    ignored = {"backbone_sha256"} if brings_weights else set()
    pairs = [(key, saved.get(key), value) for key, value in own.items() if key != "preprocessing"]
    theirs = saved.get("preprocessing", {})
    pairs += [(key, theirs.get(key), value) for key, value in own["preprocessing"].items()]
    other = [pair for pair in pairs if pair[1] != pair[2] and pair[0] not in ignored]
    if not other:
        return
    if [key for key, _, _ in other] == ["backbone_sha256"]:
        raise UserError(
            f"the checkpoint was fitted with other weights of {saved['backbone']} "
            f"(sha256 {saved['backbone_sha256'][:12]}..., "
            f"here {own['backbone_sha256'][:12]}...); give the same weights, with weights=<path> if they lie elsewhere."
        )
    listed = "; ".join(f"{key} {_short(a)}, here {_short(b)}" for key, a, b in other)
    raise UserError(f"the checkpoint was fitted with other settings: {listed}; use those, or fit again.")


def _short(value: Any) -> str:
    return value[:12] + "..." if isinstance(value, str) and len(value) == 64 else str(value)


def plain(value: Any) -> Any:
    """Hyper-parameter as a plain value, so that a checkpoint loads with ``weights_only=True``."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value
