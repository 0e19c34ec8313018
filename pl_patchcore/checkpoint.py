"""Checkpoints: reading with clear errors, refusing another model's, and writing the finished bank.

A checkpoint is Lightning's, loaded with ``weights_only=True``. Beside Lightning's own keys it holds ``patchcore``,
what the memory bank depends on (`PatchCore.identity`), in plain values.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Checkpoint

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
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: is no checkpoint of PatchCore, or a damaged one; fit again.") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: is damaged or cut short; copy it again, or fit again.") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("patchcore"), dict):
        raise UserError(f"{path}: is no checkpoint of PatchCore; give the .ckpt file that its fit has written.")
    if not len(checkpoint["state_dict"].get("memory_bank.features", ())):
        raise UserError(f"{path}: holds an empty memory bank, as written before a fit has ended; fit again.")
    return checkpoint


def check_identity(checkpoint: dict[str, Any], own: dict[str, Any], holds_backbone: bool) -> None:
    """Compare what a checkpoint's memory bank was made with to the model it is loaded into.

    Args:
        checkpoint: The checkpoint.
        own: `PatchCore.identity` of the model.
        holds_backbone: The checkpoint brings its own weights, so that the model's do not matter.

    Raises:
        UserError: Naming every difference.
    """
    saved = checkpoint.get("patchcore")
    if not isinstance(saved, dict):
        raise UserError("the checkpoint is not of PatchCore; give the .ckpt file that its fit has written.")
    if not len(checkpoint["state_dict"].get("memory_bank.features", ())):
        raise UserError("the checkpoint holds an empty memory bank, as written before a fit has ended; fit again.")
    pairs = [(key, saved.get(key), value) for key, value in own.items() if key != "preprocessing"]
    theirs = saved.get("preprocessing", {})
    pairs += [(key, theirs.get(key), value) for key, value in own["preprocessing"].items()]
    other = [pair for pair in pairs if pair[1] != pair[2] and not (holds_backbone and pair[0] == "backbone_sha256")]
    if not other:
        return
    if [key for key, _, _ in other] == ["backbone_sha256"]:
        raise UserError(
            f"the checkpoint was fitted with other weights of {saved['backbone']} (sha256 {saved['backbone_sha256'][:12]}..., "
            f"here {own['backbone_sha256'][:12]}...); give the same weights, with weights=<path> if they lie elsewhere."
        )
    listed = "; ".join(f"{key} {_short(a)}, here {_short(b)}" for key, a, b in other)
    raise UserError(f"the checkpoint was fitted with other settings: {listed}; use those, or fit again.")


def rewrite_checkpoints(trainer: Trainer) -> None:
    """Write the model as it is now over every file that checkpoint callbacks have left.

    They run before the module's own ``on_train_end``, so that what they saved has no memory bank yet.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, Checkpoint):
            continue
        paths = {getattr(callback, name, "") for name in ("best_model_path", "last_model_path")}
        paths |= set(getattr(callback, "best_k_models", {}))
        for path in sorted(filter(None, paths)):
            trainer.save_checkpoint(path, getattr(callback, "save_weights_only", False))


def _short(value: Any) -> str:
    return value[:12] + "..." if isinstance(value, str) and len(value) == 64 else str(value)
