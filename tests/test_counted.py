"""Places that do not count: left out of the memory bank, scores, maps and thresholds; an object in front."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from pl_patchcore import PatchCoreModel, PatchFeatures, UserError
from pl_patchcore.anomaly_map import AnomalyScorer, anomaly_map
from pl_patchcore.coreset import CoresetOptions
from pl_patchcore.counted import Counted
from pl_patchcore.fitting import Fitting
from pl_patchcore.foreground import object_in
from pl_patchcore.leave_one_out import score_without_rows
from pl_patchcore.patch_features import Band
from pl_patchcore.tiles import TileOptions

REGION = np.zeros((100, 120), np.uint8)
REGION[20:61, 30:90] = 1


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())


def counted(number, box=(0.0, 0.0, 100.0, 120.0), region=REGION):
    batch = {
        "original_size": torch.tensor([[100, 120]] * number),
        "crop_box": torch.tensor([box] * number),
        "path": [f"{i}.png" for i in range(number)],
    }
    if region is not None:
        batch["region"] = torch.from_numpy(region).expand(number, -1, -1)
    return Counted.of(batch)


def fitted(images, inside, tiles=None, foreground="none", **options):
    features = PatchFeatures(network(), ["1", "3"], None, tiles=tiles)
    model = PatchCoreModel(features, coreset=CoresetOptions(method="none"), foreground=foreground)
    fitting = Fitting(model, images=len(images), leave_one_out=len(images), **options)
    fitting.add(images, counted=inside)
    fitting.select()
    fitting.close()
    return model


def by_hand(box, size, region):
    """The rule, place by place."""
    found = np.zeros(size, bool)
    for i in range(size[0]):
        for j in range(size[1]):
            y = box[0] + (i + 0.5) * (box[2] - box[0]) / size[0]
            x = box[1] + (j + 0.5) * (box[3] - box[1]) / size[1]
            inside = 0 <= y < 100 and 0 <= x < 120
            found[i, j] = inside and (region is None or bool(region[int(y), int(x)]))
    return found


@pytest.mark.parametrize("box", [(0.0, 0.0, 100.0, 120.0), (10.0, 5.0, 90.0, 100.0), (-10.0, 0.0, 110.0, 120.0)])
@pytest.mark.parametrize("size", [(7, 9), (25, 30), (100, 120), (224, 200)])
@pytest.mark.parametrize("region", [None, REGION])
def test_a_place_counts_if_its_middle_does(box, size, region):
    if region is None and box[0] >= 0:
        assert counted(2, box, region) is None
        return
    found = counted(2, box, region).at(*size)
    assert found.shape == (2, *size)
    assert (found.numpy() == by_hand(box, size, region)).all()


@pytest.mark.parametrize("tiles", [None, TileOptions(32, 28)])
def test_what_does_not_count_changes_nothing(tiles):
    """Not a digit of bank, score, map or leave-one-out score, whatever the features are there."""
    images, inside = torch.rand(3, 3, 50, 60), counted(3)
    model = fitted(images, inside, tiles)
    assert model.memory_bank.size == 3 * int(inside.at(25, 30)[0].sum())
    patches = model.patch_features(images)
    outside = ~inside.at(25, 30)
    scorer = AnomalyScorer()
    expected = scorer([Band(patches, 0, 25)], model.memory_bank, (50, 60), inside)
    for value in (0.0, 1e4):
        other = torch.where(outside[..., None], value, patches)
        found = scorer([Band(other, 0, 25)], model.memory_bank, (50, 60), inside)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1].isnan(), ~inside.at(50, 60))
        assert torch.equal(found[1].nan_to_num(), expected[1].nan_to_num())
    new = torch.rand(2, 3, 50, 60)
    scores, maps = model(new, inside[:2])
    assert torch.isfinite(scores).all()
    assert torch.equal(maps.isnan(), ~inside.at(50, 60)[:2])
    _, without = score_without_rows(model, images[:1], 0, inside[:1])
    assert float(without[~without.isnan()].max()) == pytest.approx(float(model.calibration.peaks[0]), rel=1e-5)


def test_a_region_of_all_pixels_is_none():
    everything = counted(2, region=np.ones((100, 120), np.uint8))
    images = torch.rand(2, 3, 50, 60)
    model, other = fitted(images, None), fitted(images, everything)
    assert torch.equal(model.memory_bank.features, other.memory_bank.features)
    new = torch.rand(2, 3, 50, 60)
    for found, expected in zip(other(new, everything), model(new), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_gaussian_weighs_the_pixels_that_count():
    """Against SciPy, pixel by pixel, of distances continued from the nearest patch that counts."""
    inside = counted(1)
    cells, pixels = inside.at(10, 12)[0].numpy(), inside.at(40, 48)
    distances = torch.rand(1, 10, 12, dtype=torch.float64)
    _, (y, x) = ndimage.distance_transform_edt(~cells, return_indices=True)
    continued = torch.from_numpy(distances[0].numpy()[y, x])[None]
    up = torch.nn.functional.interpolate(continued[:, None], (40, 48), mode="bilinear", align_corners=False)[0, 0]
    share = ndimage.gaussian_filter(pixels[0].numpy().astype(float), 2.0)
    expected = (
        ndimage.gaussian_filter(up.numpy() * pixels[0].numpy(), 2.0)[pixels[0].numpy()] / share[pixels[0].numpy()]
    )
    found = anomaly_map(continued, (40, 48), 2.0, pixels)[0]
    np.testing.assert_allclose(found[pixels[0]].numpy(), expected, rtol=1e-5)
    assert found[~pixels[0]].isnan().all()


def test_no_patch_that_counts_is_refused_by_name():
    region = np.zeros((100, 120), np.uint8)
    region[3:5, 3:5] = 1
    images = torch.rand(1, 3, 50, 60)
    with pytest.raises(UserError, match=r"^0\.png: the centre of no patch lies in its region of interest"):
        fitted(images, counted(1, (-30.0, 0.0, 130.0, 120.0), region))
    model = fitted(images, None)
    with pytest.raises(UserError, match=r"^0\.png: the centre of no patch"):
        model(images, counted(1, (-30.0, 0.0, 130.0, 120.0), region))


@pytest.mark.parametrize("kind", ["auto", "brightness"])
@pytest.mark.parametrize("tiles", [None, TileOptions(40)])
def test_object_in_front(kind, tiles):
    """What is in the background is in no bank and no score; a background that is not plain is taken."""
    torch.manual_seed(6)
    images = 0.05 * torch.rand(2, 3, 64, 96)
    images[:, :, 20:44, 30:70] += 1 + 0.1 * torch.rand(2, 3, 24, 40)
    model = fitted(images, None, tiles, kind)
    share = model.memory_bank.size / (2 * 32 * 48)
    assert 24 * 40 / (64 * 96) <= share < 0.42
    dirt = images.clone()
    dirt[:, :, 4:9, 80:85] = 0.4
    scores, maps = model(dirt)
    assert float(scores.max()) < 0.2 * float(fitted(images, None, tiles)(dirt)[0].min())
    assert maps[:, :10, 78:].isnan().all()
    assert not maps[:, 24:40, 34:66].isnan().any()
    assert object_in(np.random.default_rng(0).random((20, 20))).all()
    assert object_in(np.ones((5, 5))).all()


def test_top_mean():
    """Mean of the highest share of the patches that count, at least one."""
    images, inside = torch.rand(2, 3, 50, 60), counted(2)
    model = fitted(images, inside)
    new = torch.rand(2, 3, 50, 60)
    distances = model.memory_bank(model.patch_features(new).flatten(0, 2))[0].view(2, 25, 30)
    chosen = inside.at(25, 30)
    for share, number in ((1e-6, 1), (0.01, 1), (0.02, 3), (1.0, 150)):
        if number > 1:
            number = int(share * int(chosen[0].sum()))
        model.scorer = AnomalyScorer(image_score="top_mean", top_share=share)
        expected = [
            each[place].sort(descending=True).values[:number].mean()
            for each, place in zip(distances, chosen, strict=True)
        ]
        torch.testing.assert_close(model(new, inside)[0], torch.stack(expected), rtol=1e-6, atol=0)
    for options in ({"image_score": "mean"}, {"top_share": 0.0}, {"top_share": 1.5}):
        with pytest.raises(UserError, match=next(iter(options))):
            AnomalyScorer(**options)
