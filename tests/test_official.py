"""The `official` recipe against outputs of the authors' own code, on real images with real weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pl_patchcore import PatchCore
from pl_patchcore.preprocessing import read_image

SHARED = Path(__file__).parents[1] / ".." / "shared"
pytestmark = pytest.mark.skipif(
    not (SHARED / "reference").is_dir(),
    reason="needs ../shared (MTD, MobileNetV2 weights, reference outputs)",
)

SETTINGS = {
    "224_k1": {"resize": 256, "crop": 224, "patch_size": 3, "num_neighbors": 1},
    "160_k3_p5": {"resize": 180, "crop": 160, "patch_size": 5, "num_neighbors": 3},
}


@pytest.fixture(scope="module", params=[pytest.param("224_k1", marks=pytest.mark.slow), "160_k3_p5"])
def case(request):
    reference = np.load(SHARED / "reference" / f"official_mobilenet_v2_mtd_{request.param}.npz")
    model = PatchCore.from_recipe(
        "official",
        backbone="mobilenet_v2",
        layers=["features.6", "features.13"],
        weights=str(SHARED / "weights" / "mobilenet_v2.pth"),
        coreset_method="none",
        **SETTINGS[request.param],
    )
    images = {
        name: torch.stack([model.transform(read_image(SHARED / "data" / "mtd" / file)) for file in reference[name]])
        for name in ("train", "test")
    }
    with torch.no_grad():
        model.memory_bank.fill(model.patch_features(images["train"]).flatten(0, 2))
        scores, maps = model(images["test"])
    return reference, model, images["test"], scores.numpy(), maps.numpy()


def close(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def test_preprocessing(case):
    reference, _, images, _, _ = case
    assert close(images[0, :, ::4, ::4].numpy(), reference["image0"]) < 1e-6


def test_patch_features(case):
    reference, model, images, _, _ = case
    with torch.no_grad():
        features = model.patch_features(images[:1]).flatten(0, 2).numpy()
    assert close(features[reference["patch_rows"]], reference["patch_features_image0"]) < 1e-4


def test_scores(case):
    reference, _, _, scores, _ = case
    np.testing.assert_allclose(scores, reference["scores"], rtol=1e-4)


def test_maps(case):
    reference, _, _, _, maps = case
    np.testing.assert_allclose(maps[:, ::2, ::2], reference["maps"], rtol=1e-4)
