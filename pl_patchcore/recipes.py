"""Named recipes: every choice that figures depend on, pinned.

``paper`` is what the specification says, with a choice for what it leaves open (it starts after the aggregation);
these are `PatchCore`'s defaults. ``official`` is the authors' published code, to compare with its figures. ``mstc``
is ``paper`` for Mini ShanghaiTech Campus, so far as its settings there are known. The same stand as YAML in
``configs/recipes/``, with the reason behind each.
"""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "backbone": "wide_resnet50_2",
        "layers": ["layer2", "layer3"],
        "weights": "IMAGENET1K_V1",
        "patch_size": 3,
        "patch_stride": 1,
        "layer_dim": None,
        "feature_dim": None,
        "resize": 256,
        "crop": 224,
        "resize_mode": "squash",
        "interpolation": "bilinear",
        "coreset_method": "greedy",
        "projection_dim": 128,
        "num_neighbors": 1,
        "distance": "euclidean",
        "reweighting_neighbors": 9,
        "sigma": 4.0,
    },
}
RECIPES["official"] = RECIPES["paper"] | {
    "layer_dim": 1024,
    "feature_dim": 1024,
    "resize_mode": "shorter_side",
    "coreset_method": "approximate",
    "distance": "squared",
    "reweighting_neighbors": 1,
}
RECIPES["mstc"] = RECIPES["paper"] | {"layers": ["layer3", "layer4"], "crop": None, "coreset_ratio": 0.1}
