import numpy as np
import pytest
import reference
import torch

from pl_patchcore import MemoryBank, UserError
from pl_patchcore import anomaly_map as of_maps
from pl_patchcore.anomaly_map import AnomalyScorer, anomaly_map, filled, reweighting, to_original
from pl_patchcore.patch_features import Band


def whole(patches):
    return [Band(patches, 0, patches.shape[1])]


def made(rows=200, b=3, h=7, w=9, d=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, d, generator=g)
    features[20:40] = features[0]
    bank = MemoryBank()
    bank.fill(features)
    return bank, torch.randn(b, h, w, d, generator=g)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"neighbours": 3, "squared": True, "b": 1},
        {"b": 2, "sigma": 0.0},
        {"b": 500, "sigma": 1.5},
        {"neighbours": 2, "b": 30},
    ],
)
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_matches_reference(options, rows):
    bank, patches = made(max(rows, 40))
    bank.fill(bank.features[:rows])
    names = {"neighbours": "num_neighbors", "b": "reweighting_neighbors", "sigma": "sigma"}
    given = {names[k]: v for k, v in options.items() if k in names}
    scorer = AnomalyScorer(**given, distance="squared" if options.get("squared") else "euclidean")
    scores, maps = scorer(whole(patches), bank, (56, 70))
    for i in range(len(patches)):
        score, heat = reference.score_and_map(patches[i].numpy(), bank.features.numpy(), (56, 70), **options)
        assert scores[i].item() == pytest.approx(score, rel=1e-5)
        np.testing.assert_allclose(maps[i].numpy(), heat, rtol=1e-5)


def test_equation_7_by_hand():
    bank = MemoryBank()
    bank.fill(torch.tensor([[0.0], [1.0], [10.0]]))
    weight = reweighting(torch.tensor([[-1.0]]), torch.tensor([0]), bank, 2)  # m* = 0, N_2 = {0, 1}
    assert weight.item() == pytest.approx(1 - np.e / (np.e + np.e**2), rel=1e-6)
    assert reweighting(torch.tensor([[-1.0]]), torch.tensor([0]), bank, 1).item() == 1


def test_equation_7_with_duplicates_of_the_nearest():
    bank = MemoryBank()
    bank.fill(torch.tensor([[0.0], [0.0], [0.0], [5.0]]))
    weights = [reweighting(torch.tensor([[1.0]]), torch.tensor([row]), bank, 2).item() for row in range(3)]
    assert weights == pytest.approx([0.5] * 3)


def test_large_distances_do_not_overflow():
    bank, patches = made()
    scores, _ = AnomalyScorer()(whole(patches * 1e4), bank, (28, 36))
    assert torch.isfinite(scores).all()
    assert (scores > 1000).all()


def test_score_does_not_depend_on_the_batch():
    bank, patches = made(b=6)
    scorer = AnomalyScorer()
    scores, maps = scorer(whole(patches), bank, (28, 36))
    for i in range(6):
        score, heat = scorer(whole(patches[i : i + 1]), bank, (28, 36))
        assert score[0] == scores[i]
        torch.testing.assert_close(heat[0], maps[i], rtol=1e-6, atol=0)


def test_maps_are_never_reweighted():
    bank, patches = made()
    assert torch.equal(
        AnomalyScorer(reweighting_neighbors=1)(whole(patches), bank, (28, 36))[1],
        AnomalyScorer(reweighting_neighbors=9)(whole(patches), bank, (28, 36))[1],
    )


def test_map_smaller_than_the_gaussian():
    assert anomaly_map(torch.ones(1, 2, 2), (5, 3)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (100, 50)])
def test_pixels_whose_centre_is_on_the_edge_of_the_crop_count(resize, crop):
    first = (resize - crop) // 2
    for height in range(60, 1300, 4):
        top, bottom = (np.float32(edge * height / resize) for edge in (first, first + crop))
        counts = ~to_original(torch.ones(crop, 2), (height, 2), (top, 0.0, bottom, 2.0))[:, 0].isnan()
        pixel = torch.arange(height)  # in whole numbers, twice their centres times `resize`
        centre = (2 * pixel + 1) * resize
        assert torch.equal(counts, (centre >= 2 * first * height) & (centre <= 2 * (first + crop) * height))


def test_to_original():
    heat = torch.arange(16.0).view(4, 4)
    assert torch.equal(to_original(heat, (4, 4), (0.0, 0.0, 4.0, 4.0)), heat)
    full = to_original(heat, (8, 12), (0.0, 2.0, 8.0, 10.0))  # twice the pixels, 2 columns cropped on each side
    assert full.isnan().all(0).nonzero().flatten().tolist() == [0, 1, 10, 11]
    torch.testing.assert_close(full[:, 2:10], torch.from_numpy(reference.bilinear(heat.numpy(), (8, 8))).float())


BOXES = [(0.0, 0.0, 37.0, 53.0), (-6.5, 0.0, 43.5, 53.0), (3.25, 9.5, 30.0, 44.0), (-3.0, 7.0, 41.0, 50.0)]


@pytest.mark.parametrize("box", BOXES)
def test_to_original_in_bands_and_parts(box, monkeypatch):
    """Few rows at once, and a part of the original at once, give the same bits."""
    heat = torch.rand(23, 17, generator=torch.Generator().manual_seed(0))
    full = to_original(heat, (37, 53), box)
    part = to_original(heat, (20, 11), (box[0] - 9, box[1] - 31, box[2] - 9, box[3] - 31))
    torch.testing.assert_close(part, full[9:29, 31:42], rtol=0, atol=0, equal_nan=True)
    monkeypatch.setattr(of_maps, "BAND_PIXELS", 4 * 53)
    torch.testing.assert_close(to_original(heat, (37, 53), box), full, rtol=0, atol=0, equal_nan=True)


def test_to_original_keeps_a_map_of_its_size():
    heat = torch.rand(37, 53)
    heat[3, 4] = torch.nan
    assert to_original(heat, (37, 53), (0.0, 0.0, 37.0, 53.0)) is heat
    cropped = to_original(heat, (40, 60), (1.0, 2.0, 38.0, 55.0))  # a crop without a resize
    torch.testing.assert_close(cropped[1:38, 2:55], heat, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("box", BOXES)
def test_places_that_do_not_count_reach_no_pixel(box):
    """As if each had the value of the nearest one that counts, by a search of them all."""
    draw = torch.Generator().manual_seed(1)
    heat = torch.rand(23, 17, generator=draw)
    heat[torch.rand(23, 17, generator=draw) < 0.4] = torch.nan
    heat[:2], heat[:, -3:] = torch.nan, torch.nan
    heat[2, 0] = heat[22, 13] = 0.5  # the border of what counts
    whole = filled(heat)
    places = (~heat.isnan()).nonzero()
    for y, x in heat.isnan().nonzero().tolist():
        at = torch.tensor([max(y, 2), min(x, 13)])  # beyond the border, as on it
        far = (places - at).square().sum(1)
        assert whole[y, x] in heat[tuple(places[far == far.min()].T)]
    assert torch.equal(whole[~heat.isnan()], heat[~heat.isnan()])
    torch.testing.assert_close(
        to_original(heat, (37, 53), box), to_original(whole, (37, 53), box), rtol=0, atol=0, equal_nan=True
    )
    assert filled(whole) is whole
    assert filled(torch.full((2, 3), torch.nan)).isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_neighbors": 0}, "num_neighbors must be at least 1"),
        ({"distance": "cosine"}, "euclidean, squared or half_squared"),
        ({"top_share_of": "some"}, "top_share_of must be scored or all"),
        ({"reweighting_neighbors": 0}, "1 switches equation 7 off"),
        ({"sigma": -1}, "sigma must be from 0 to 1024"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        AnomalyScorer(**options)
