"""Published figures, to stand beside one's own: image AUROC, pixel AUROC and PRO, in percent.

Each set names the settings it was made with; `published_for` finds the one that a configuration repeats. Sources: Roth
et al., CVPR 2022 (the paper: class averages), and the authors' code, github.com/amazon-science/patchcore-inspection
(each category). Its PRO counts the nominal pixels of anomalous images only, where ours counts those of all test
images, so that the two cannot be compared to the last digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pl_patchcore.configs import recipe

Figures = tuple[float | None, float | None, float | None]  # image AUROC, pixel AUROC, PRO


@dataclass(frozen=True)
class Published:
    """Figures of one published run."""

    source: str  # where they are from
    data: str  # name of the data module's class
    settings: Mapping[str, Any]  # of the model, that they were made with
    average: Figures  # over all categories
    categories: Mapping[str, Figures] = field(default_factory=dict)  # of each, where known


def _table(text: str) -> dict[str, Figures]:
    rows = (row.split() for row in text.split(","))
    return {name: (float(a), float(b), float(c)) for name, a, b, c in rows}


def _settings(name: str, *compared: str) -> dict[str, Any]:
    return {argument: value for argument, value in recipe(name).items() if argument in compared}


_WRN50 = _table(
    "bottle 100.0 98.5 97.1, cable 99.7 98.4 93.8, capsule 97.9 99.0 97.1, carpet 98.6 99.1 96.9, grid 97.9 98.8 97.0, "
    "hazelnut 100.0 98.7 92.9, leather 100.0 99.3 99.2, metal_nut 99.9 98.3 92.8, pill 96.7 97.8 94.4, "
    "screw 98.8 99.5 98.5, tile 99.5 95.7 89.8, toothbrush 100.0 98.6 94.8, transistor 99.9 96.1 83.2, "
    "wood 99.1 95.1 90.2, zipper 99.5 98.9 97.8"
)
_ENSEMBLE = _table(
    "bottle 100.0 98.7 97.0, cable 99.8 98.1 93.2, capsule 98.7 99.2 96.8, carpet 99.6 99.1 98.2, grid 99.5 99.1 97.7, "
    "hazelnut 100.0 98.9 90.7, leather 100.0 99.4 99.3, metal_nut 100.0 98.8 95.7, pill 98.3 97.7 95.6, "
    "screw 99.2 99.6 98.8, tile 98.8 96.8 91.6, toothbrush 100.0 98.9 95.9, transistor 99.9 94.1 82.0, "
    "wood 99.7 96.0 93.0, zipper 99.7 99.2 98.5"
)

_MVTEC_DATA = "MVTecDataModule"
_PAPER = {
    "backbone": "wide_resnet50_2", "layers": ["layer2", "layer3"], "weights": "IMAGENET1K_V1", "patch_size": 3,
    "distance": "euclidean", "ensemble": {"members": None},
}  # fmt: skip
_MVTEC = _PAPER | {"resize": 256, "crop": 224}
_MTD = _PAPER | {"coreset_ratio": 0.1}
_MSTC = {"backbone": "wide_resnet50_2", "coreset_ratio": 0.1}
_WR50 = _MVTEC | {"coreset_ratio": 0.1} | _settings("official_wr50_224_10", "patches", "distance")
_THREE = _settings("official_ensemble_320_1", "resize", "crop", "coreset_ratio", "patches", "ensemble")

PUBLISHED = (
    Published("the paper, 25 %", _MVTEC_DATA, _MVTEC | {"coreset_ratio": 0.25}, (99.1, 98.1, 93.4)),
    Published("the paper, 10 %", _MVTEC_DATA, _MVTEC | {"coreset_ratio": 0.1}, (99.0, 98.1, 93.5)),
    Published("the paper, 1 %", _MVTEC_DATA, _MVTEC | {"coreset_ratio": 0.01}, (99.0, 98.0, 93.1)),
    Published("the authors' code, WideResNet-50, 224 pixels, 10 %", _MVTEC_DATA, _WR50, (99.2, 98.1, 94.4), _WRN50),
    Published("the authors' code, ensemble, 320 pixels, 1 %", _MVTEC_DATA, _THREE, (99.6, 98.2, 94.9), _ENSEMBLE),
    Published("the paper", "MTDDataModule", _MTD, (97.9, None, None)),
    Published("the paper", "MSTCDataModule", _MSTC, (None, 91.8, None)),
)


def published_for(data: str, settings: Mapping[str, Any]) -> Published | None:
    """Find the published run whose settings a configuration repeats.

    Args:
        data: Name of the data module's class.
        settings: Settings of the model, all of them.

    Example:
        >>> settings = {"backbone": "wide_resnet50_2", "coreset_method": "greedy", "coreset_ratio": 0.1}
        >>> published_for("MSTCDataModule", settings).average
        (None, 91.8, None)
    """
    if settings.get("coreset_method") not in ("greedy", "approximate"):
        return None
    return next((run for run in PUBLISHED if run.data == data and _holds(settings, run.settings)), None)


def _holds(settings: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        return isinstance(settings, Mapping) and all(_holds(settings.get(name), wanted[name]) for name in wanted)
    return bool(settings == wanted)
