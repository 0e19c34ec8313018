"""Images in tiles: features as of the whole image, one grid, bounded work."""

import math
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from pl_patchcore import FolderDataModule, PatchCore, PatchFeatures, UserError
from pl_patchcore.tiles import LayerGrid, TileOptions, Tiling, measure_layers

SHARED = Path(__file__).parents[1] / ".." / "shared"
WEIGHTS = SHARED / "weights" / "mobilenet_v2.pth"


def features_of(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are meant
        return PatchFeatures(*args, **options)


class Rows(nn.Module):
    """A network of one layer that takes one size only, and whose cells depend on all of the image."""

    def __init__(self, side=32):
        super().__init__()
        self.side = side

    def forward(self, images):
        assert images.shape[2:] == (self.side, self.side)
        cells = F.avg_pool2d(images, 8)
        return cells + images.mean((2, 3), keepdim=True)


def layered(stride=2):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 5, stride, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1)
    )


BACKBONES = {
    "mobilenet_v2": (["features.6", "features.13"], (473, 621), (448, 448), 368),
    "resnet18": (["layer2", "layer3"], (413, 527), (384, 384), 304),
    "wide_resnet50_2": (["layer2", "layer3"], (449, 271), (440, 432), 368),
}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", BACKBONES)
def test_stitched_features_are_those_of_the_whole_image(name, stride):
    """Odd sizes, up to the image's border."""
    layers, size, tile, overlap = BACKBONES[name]
    weights = str(WEIGHTS) if name == "mobilenet_v2" else None
    if weights is not None and not WEIGHTS.exists():
        pytest.skip("needs ../shared")
    options = {"patch_stride": stride}
    whole = features_of(name, layers, weights, **options)
    tiled = [features_of(name, layers, weights, **options, tiles=TileOptions(tile, overlap, batch)) for batch in (1, 8)]
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = whole(images)
        one, eight = (each(images) for each in tiled)
    assert torch.equal(one, eight)
    assert one.shape == expected.shape
    assert float((one - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert tiled[0].tiling.enough <= overlap


@pytest.mark.parametrize("options", [{}, {"layer_dim": 24, "feature_dim": 20}, {"patch_size": 5, "patch_stride": 3}])
@pytest.mark.parametrize("size", [(64, 64), (65, 200), (301, 47), (40, 131), (250, 250)])
@pytest.mark.parametrize("tile", [112, (128, 160)])
def test_any_size(size, tile, options):
    """Tiles that do not divide the image, images smaller than a tile, all by the measured overlap."""
    layers = ["1", "3"]
    whole = PatchFeatures(layered(), layers, None, **options)
    tiled = PatchFeatures(layered(), layers, None, **options, tiles=TileOptions(tile, None, 3))
    images = torch.randn(2, 3, *size)
    expected = whole(images)
    assert tiled.tiling.overlap == [int(tiled.tiling.enough)] * 2
    torch.testing.assert_close(tiled(images), expected, rtol=1e-5, atol=1e-6)
    bands = list(tiled.bands(images))
    assert [band.top for band in bands] == np.cumsum([0, *(band.features.shape[1] for band in bands[:-1])]).tolist()
    assert {band.rows for band in bands} == {expected.shape[1]}


def test_reach_is_measured():
    """Of a convolution, by hand; of a network that looks at the whole image, none is found."""
    padded, valid = nn.Conv2d(3, 4, 9, 4, 4), nn.Conv2d(3, 4, 9, 4)
    grids = measure_layers(lambda x: [padded(x)], [4], torch.empty(0))
    assert grids == [LayerGrid(4, 3, 4)]  # 4 pixels to each side
    assert measure_layers(lambda x: [valid(x)], [4], torch.empty(0))[0].offset == -5
    squeezed = measure_layers(lambda x: [F.avg_pool2d(x, 4) * x.mean()], [4], torch.empty(0))
    assert squeezed[0].reach == math.inf


def test_each_patch_is_from_the_tile_in_which_it_is_most_central():
    tiling = Tiling(TileOptions(64, 24), [LayerGrid(8, 7, 4.0)], 1, 1, padded=False)
    for pixels in (10, 64, 65, 100, 104, 105, 1000, 1001):
        spans = tiling.along(1, pixels)
        assert (spans[0].start, spans[-1].end) == (0, pixels)
        assert all(span.start % 8 == 0 for span in spans)
        assert [span.first for span in spans[1:]] == [span.last for span in spans[:-1]]
        assert spans[-1].last == -(-pixels // 8)
        for patch in range(spans[-1].last):
            middle = 8 * patch + 4
            nearest = [  # pixels to the tile's next edge that is none of the image's; below 0 outside of the tile
                min(middle - s.start if s.start else math.inf, s.end - middle if s.end < pixels else math.inf)
                for s in spans
            ]
            own = next(distance for s, distance in zip(spans, nearest, strict=True) if s.first <= patch < s.last)
            assert own >= max(nearest) - 8  # half a patch to each side of the seam


def test_network_of_one_size_runs_on_large_images_by_tiles():
    """As the same tiles by hand; a smaller image is continued by its edge."""
    network = nn.Sequential(Rows(), nn.Identity())
    tiled = PatchFeatures(network, ["1"], None, patch_size=1, tiles=TileOptions(32, 8, 3))
    images = torch.rand(1, 3, 56, 80)
    found = tiled(images)
    assert found.shape == (1, 7, 10, 3)
    for top, (first, last) in zip((0, 24), ((0, 4), (4, 7)), strict=True):
        by_hand = Rows()(images[:, :, top : top + 32, 48:80]).permute(0, 2, 3, 1)
        part = by_hand[:, first - top // 8 : last - top // 8, -3:]
        torch.testing.assert_close(found[:, first:last, -3:], part)
    small = torch.rand(1, 3, 20, 32)
    by_hand = Rows()(F.pad(small, (0, 0, 0, 12), mode="replicate")).permute(0, 2, 3, 1)[:, :3]
    torch.testing.assert_close(tiled(small), by_hand)
    with pytest.raises(UserError, match=r"fails on images of .* 64x64 .*; set resize and crop, or tile, to the"):
        PatchFeatures(network, ["1"], None, tiles=TileOptions(64))
    usual = nn.Sequential(Rows(224), nn.Identity())
    with pytest.raises(UserError, match="takes images of 224x224 pixels only: set tile to that size"):
        PatchFeatures(usual, ["1"], None, tiles=TileOptions(64))


def test_levels_are_normalised_as_the_images_are():
    levels = torch.randint(0, 256, (1, 3, 90, 70), dtype=torch.uint8)
    tiled = PatchFeatures(layered(), ["1", "3"], None, tiles=TileOptions(64))
    mean, std = (torch.tensor(each)[:, None, None] for each in (tiled.mean, tiled.std))
    assert torch.equal(tiled(levels), tiled((levels.float() / 255 - mean) / std))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0,), "tile must be at least 1 pixel"),
        ((4,), r"tile 4x4 is too small: the layers' stride is 4 pixels; set at least 8"),
        ((64, 62), "tile_overlap 62 must be at most 60"),
        ((64, None, 0), "tile_batch must be at least 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        PatchFeatures(layered(), ["1", "3"], None, tiles=TileOptions(*options))


def test_images_of_different_sizes_are_planned_by_their_pixels(tmp_path, caplog):
    """The space for patch features is reserved by the headers, not by the first image."""
    for number, side in enumerate((32, 64, 96, 128)):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (side, 2 * side, 3), np.uint8)).save(
            tmp_path / f"{number}.png"
        )
    model = PatchCore(layered(), ["1", "3"], resize=None, crop=None, tile=112, coreset_size=5)
    data = FolderDataModule(str(tmp_path), test_share=0.0, batch_size=3, num_workers=0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with caplog.at_level("INFO"):
        L.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet).fit(model, data)
    patches = sum(side // 2 * side for side in (32, 64, 96, 128))
    assert f"collecting {patches:,} patch features" in caplog.text
    assert f"memory bank: 5 of {patches} patch features" in caplog.text
    assert "tiles of 112x112" in caplog.text
