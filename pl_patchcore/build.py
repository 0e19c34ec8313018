"""Arguments of `PatchCore` -> its model: the parts joined, once, or for each member of an ensemble."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pl_patchcore.anomaly_map import AnomalyScorer
from pl_patchcore.coreset import CoresetOptions
from pl_patchcore.ensemble import EnsembleModel
from pl_patchcore.errors import UserError
from pl_patchcore.foreground import ForegroundKind
from pl_patchcore.memory_bank import MemoryBank
from pl_patchcore.model import PatchCoreModel
from pl_patchcore.options import EnsembleOptions, PatchOptions, options_of
from pl_patchcore.patch_features import PatchFeatures
from pl_patchcore.preprocessing import Preprocessing
from pl_patchcore.tiles import TileOptions


def build_model(
    settings: Mapping[str, Any],
    ensemble: EnsembleOptions,
    seed: int,
    transform: Preprocessing,
    tiles: TileOptions | None = None,
    foreground: ForegroundKind = "none",
    mask_references: bool = True,
) -> PatchCoreModel | EnsembleModel:
    """Build the model of a `PatchCore`.

    Args:
        settings: Its arguments that a member of an ensemble may have of its own (`options.MEMBER_ARGUMENTS`).
        ensemble: The ensemble's options.
        seed: Seed of random weights, projection and selection.
        transform: Preprocessing of the images to come.
        tiles: How larger images are cut into tiles; None: not.
        foreground: Whether only an object in front of a plain background counts, and by what it is found.
        mask_references: Whether that holds of training images, too.

    Raises:
        UserError: For a value out of range, an unknown name, or weights that cannot be had or do not fit.
    """
    if ensemble.members is None:
        return _single(settings, seed, transform, tiles, foreground, mask_references)
    if foreground != "none":
        raise UserError("foreground goes with one model, not with ensemble.members; leave one of them out.")
    members = [_single({**settings, **member}, seed, transform, tiles) for member in ensemble.members]
    return EnsembleModel(members, ensemble.combine)


def _single(
    s: Mapping[str, Any],
    seed: int,
    transform: Preprocessing,
    tiles: TileOptions | None,
    foreground: ForegroundKind = "none",
    mask_references: bool = True,
) -> PatchCoreModel:
    patches = options_of(PatchOptions, s["patches"])
    features = PatchFeatures(
        s["backbone"],
        s["layers"],
        None if s["weights"] is None else str(s["weights"]),
        s["patch_size"],
        patches.stride,
        patches.layer_dim,
        patches.feature_dim,
        seed,
        transform.size,
        tiles,
        transform.mean,
        transform.std,
        patches.combine,
        s["normalize_features"],
        patches.position_embedding,
    )
    if s["position_radius"] is not None and transform.size is None:
        raise UserError(
            "position_radius needs images of one size, to compare places on one grid of patches; set crop or resize "
            "that give one, or leave it out."
        )
    bank = MemoryBank(s["search"], s["bank_dtype"], s["position_radius"])
    of_scorer = (
        "num_neighbors", "distance", "reweighting_neighbors", "sigma", "image_score", "top_share", "top_share_of"
    )  # fmt: skip
    scorer = AnomalyScorer(**{name: s[name] for name in of_scorer})
    coreset = CoresetOptions(s["coreset_method"], s["coreset_ratio"], s["coreset_size"], s["projection_dim"], seed)
    return PatchCoreModel(features, bank, scorer, coreset, foreground, mask_references, s["inference"])
