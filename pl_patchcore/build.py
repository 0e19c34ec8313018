"""Arguments of `PatchCore` -> its parts: preprocessing, views, store, and the model, once or for each member."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pl_patchcore.anomaly_map import AnomalyScorer
from pl_patchcore.calibration import DEFAULT_RATE, Calibration, CalibrationKind, calibration_kind
from pl_patchcore.coreset import CoresetOptions
from pl_patchcore.ensemble import EnsembleModel, refuse_test_range
from pl_patchcore.errors import UserError
from pl_patchcore.memory_bank import MemoryBank
from pl_patchcore.model import PatchCoreModel
from pl_patchcore.options import (
    EnsembleOptions,
    ImageOptions,
    PatchOptions,
    StoreOptions,
    check_arguments,
    options_of,
    refuse_rate_beside_threshold,
)
from pl_patchcore.patch_features import PatchFeatures
from pl_patchcore.preprocessing import Preprocessing
from pl_patchcore.references import ReferenceViews
from pl_patchcore.tiles import TileOptions

OF_SCORER = (
    "num_neighbors", "distance", "reweighting_neighbors", "sigma", "image_score", "top_share", "top_share_of"
)  # fmt: skip


class Parts(NamedTuple):
    """What a `PatchCore` is made of."""

    calibration: CalibrationKind
    transform: Preprocessing
    references: ReferenceViews
    store: StoreOptions
    model: PatchCoreModel | EnsembleModel


def build(of: Callable[..., None], arguments: Mapping[str, Any]) -> Parts:
    """Build the parts of a `PatchCore`.

    Args:
        of: Its constructor, whose annotations say what its arguments may be.
        arguments: Its arguments, all of them.

    Raises:
        UserError: For a value out of range, an unknown name, arguments that contradict each other, or weights that
            cannot be had or do not fit.
    """
    a = arguments
    check_arguments(of, a)
    store, ensemble = options_of(StoreOptions, a["store"]), options_of(EnsembleOptions, a["ensemble"])
    for own in ensemble.members or ():
        check_arguments(of, own, "ensemble.members: ")
    kind = calibration_kind(a["calibration"], a["calibration_share"], a["calibration_images"], a["drop_suspicious"])
    calibration = Calibration(a["false_alarm_rate"], a["image_threshold"], a["pixel_threshold"])
    if a["false_alarm_rate"] != DEFAULT_RATE:
        refuse_rate_beside_threshold(["false_alarm_rate", *calibration.by_hand])
    if a["position_radius"] is not None and a["reference_rotations"] > 1:
        raise UserError(
            "position_radius is for parts that lie alike in all images, reference_rotations for parts that do not; "
            "leave one of them out."
        )
    tiles = None if a["tile"] is None else TileOptions(a["tile"], a["tile_overlap"], a["tile_batch"])
    images = vars(options_of(ImageOptions, a["images"])) | {"roi": a["roi"], "ignore": a["ignore"]}
    transform = Preprocessing(a["resize"], a["crop"], a["resize_mode"], **images, levels=tiles is not None)
    light = None if a["reference_brightness"] is None else tuple(a["reference_brightness"])
    references = ReferenceViews(a["reference_rotations"], light, transform.mean, transform.std)
    model: PatchCoreModel | EnsembleModel
    if ensemble.members is None:
        model = _single(a, transform, tiles)
    elif a["foreground"] != "none":
        raise UserError("foreground goes with one model, not with ensemble.members; leave one of them out.")
    else:
        model = EnsembleModel([_single({**a, **own}, transform, tiles) for own in ensemble.members], ensemble.combine)
    model.calibration = calibration
    if kind != "none":
        refuse_test_range(model)
    for member in model.members:
        store.check_method(member.coreset.method)
    return Parts(kind, transform, references, store, model)


def _single(a: Mapping[str, Any], transform: Preprocessing, tiles: TileOptions | None) -> PatchCoreModel:
    patches = options_of(PatchOptions, a["patches"])
    features = PatchFeatures(
        a["backbone"],
        a["layers"],
        None if a["weights"] is None else str(a["weights"]),
        a["patch_size"],
        patches.stride,
        patches.layer_dim,
        patches.feature_dim,
        a["seed"],
        transform.size,
        tiles,
        transform.mean,
        transform.std,
        patches.combine,
        a["normalize_features"],
        patches.position_embedding,
    )
    if a["position_radius"] is not None and transform.size is None:
        raise UserError(
            "position_radius needs images of one size, to compare places on one grid of patches; set crop or resize "
            "that give one, or leave it out."
        )
    bank = MemoryBank(a["search"], a["bank_dtype"], a["position_radius"])
    scorer = AnomalyScorer(**{name: a[name] for name in OF_SCORER})
    coreset = CoresetOptions(a["coreset_method"], a["coreset_ratio"], a["coreset_size"], a["projection_dim"], a["seed"])
    return PatchCoreModel(features, bank, scorer, coreset, a["foreground"], a["mask_references"], a["inference"])
