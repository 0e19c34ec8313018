"""The resize in tensors against a slow float64 one, Pillow, and itself in a graph."""

import copy

import numpy as np
import pytest
import reference
import torch
from PIL import Image

from pl_patchcore import PatchCore, Preprocessing, UserError
from pl_patchcore.checkpoint import check_identity
from pl_patchcore.resize import resize_matrix, resized

LAST_BITS = 1e-3  # of a level: sums of float32 in another order
SIZES = [  # before, after
    ((1, 1), (5, 7)), ((1, 9), (4, 1)), ((40, 30), (40, 21)), ((3, 400), (20, 20)), ((400, 3), (17, 40)),
    ((60, 50), (224, 70)), ((97, 101), (33, 50)), ((256, 20), (224, 224)), ((500, 333), (24, 32)),
]  # fmt: skip
KINDS = ("bilinear", "bicubic")


def noise(*shape, low=0, high=256):
    return torch.from_numpy(np.random.default_rng(0).integers(low, high, shape, dtype=np.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("old", "new"), SIZES)
def test_matches_reference(old, new, kind):
    images = noise(2, *old, 3)
    rows = reference.resized(images.transpose(0, 1).numpy(), new[0], kind)  # (h, B, W, 3)
    expected = reference.resized(rows.transpose(2, 1, 3, 0), new[1], kind).transpose(1, 2, 3, 0)  # (B, 3, h, w)
    expected = expected.clip(0, 255)
    found = resized(images, new, (0, 0), new, kind)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    np.testing.assert_allclose(found, expected, rtol=0, atol=LAST_BITS)
    assert torch.equal(resized(images.float(), new, (0, 0), new, kind), found)
    # a window, and beyond the ends
    for first, count in (((new[0] // 3, new[1] // 4), (new[0] // 2 + 1, 1)), ((-3, 2), (new[0] + 9, new[1] + 5))):
        place = [np.clip(np.arange(count[axis]) + first[axis], 0, new[axis] - 1) for axis in (0, 1)]
        window = resized(images, new, first, count, kind)
        np.testing.assert_allclose(window, expected[:, :, place[0]][..., place[1]], rtol=0, atol=LAST_BITS)
        # sizes as tensors, which takes the whole matrices
        dense = resized(images, torch.tensor(new).unbind(), torch.tensor(first).unbind(), count, kind)
        torch.testing.assert_close(dense, window, rtol=0, atol=LAST_BITS)


@pytest.mark.parametrize("kind", KINDS)
def test_matrix(kind):
    for old, new in ((1, 5), (7, 7), (90, 31), (31, 90), (3_000, 3)):
        expected = reference.resized(np.eye(old)[:, ::97] if old > 999 else np.eye(old), new, kind)
        found = resize_matrix(old, new, -1, new + 2, kind)
        assert torch.equal(found[[0, -1]], found[[1, -2]])
        np.testing.assert_allclose(found[1:-1, ::97] if old > 999 else found[1:-1], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(resize_matrix(7, 7, 0, 7, kind), torch.eye(7))


@pytest.mark.parametrize("kind", KINDS)
def test_pillow_is_within_one_level(kind):
    """Where no level of a cubic lies beyond 0 and 255: Pillow clips after each of its passes."""
    rng = np.random.default_rng(1)
    drawn = [tuple((2 ** rng.uniform(0, 9, 2)).astype(int).tolist() for _ in range(2)) for _ in range(30)]
    for old, new in [*SIZES, *drawn]:
        pixels = noise(*old, 3, **({"low": 60, "high": 196} if kind == "bicubic" else {}))
        expected = np.asarray(Image.fromarray(pixels.numpy()).resize(new[::-1], Image.Resampling[kind.upper()]))
        found = resized(pixels[None], new, (0, 0), new, kind)[0].permute(1, 2, 0).round()
        assert (found - torch.tensor(expected)).abs().max() <= 1, (old, new)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixed", [True, False])
def test_a_graph_of_open_sizes_equals_it(kind, fixed):
    class Graph(torch.nn.Module):
        def forward(self, images):
            if fixed:
                return resized(images, (40, 36), (4, -2), (33, 40), kind)
            height, width = (torch.full((), n, dtype=torch.int64) for n in images.shape[1:3])
            short = torch.minimum(height, width)  # the shorter side to 40, and its centre
            size = 40 * height // short, 40 * width // short
            return resized(images, size, ((size[0] - 32) // 2, (size[1] - 32) // 2), (32, 32), kind)

    open_sizes = (dict.fromkeys(range(3), torch.export.Dim.DYNAMIC),)
    graph = torch.export.export(Graph(), (noise(2, 50, 71, 3),), dynamic_shapes=open_sizes).module()
    for shape in ((2, 90, 33, 3), (3, 2, 300, 3), (2, 40, 36, 3)):
        torch.testing.assert_close(graph(noise(*shape)), Graph()(noise(*shape)), rtol=0, atol=LAST_BITS)


@pytest.mark.parametrize("options", [(64, 48), (40, (30, 25), "shorter_side"), (64, None, "longer_side"), (300, None)])
@pytest.mark.parametrize("size", [(90, 200), (200, 90)])
def test_preprocessing(options, size):
    """As with Pillow, but for the rounding of the levels."""
    image, mask = Image.fromarray(noise(*size, 3).numpy()), noise(*size).numpy()
    given = {"mean": (0, 0, 0), "std": (1, 1, 1), "roi": [5, 5, 80, 70]}
    expected = Preprocessing(*options, **given).apply(image, mask)
    found = Preprocessing(*options, **given, resize_by="tensors").apply(image, mask)
    for name in ("mask", "crop_box", "original_size", "region"):
        assert torch.equal(found[name], expected[name])
    gap = 255 * (found["image"] - expected["image"]).abs()
    assert 0.01 < gap.max() < 1.01  # levels


def test_levels_are_rounded():
    image = Image.fromarray(noise(90, 70, 3).numpy())
    plain = Preprocessing(300, 280, mean=(0, 0, 0), std=(1, 1, 1), resize_by="tensors")
    levels = Preprocessing(300, 280, mean=(0, 0, 0), std=(1, 1, 1), resize_by="tensors", levels=True)
    found = levels.apply(image)["image"]
    assert found.dtype == torch.uint8
    assert torch.equal(found, (255 * plain(image)).round().to(torch.uint8))
    assert torch.equal(levels(image), found / 255)


def test_without_a_resize_nothing_changes():
    image = Image.fromarray(noise(50, 60, 3).numpy())
    for options in ((None, 40), ((50, 60), None)):
        assert torch.equal(Preprocessing(*options, resize_by="tensors")(image), Preprocessing(*options)(image))


def test_checkpoints_know_it(tiny):
    """Those that do not name it were fitted with Pillow's."""
    pillow, tensors = (
        PatchCore(tiny, ["fine"], resize=64, crop=None, images={"resize_by": by}).identity()
        for by in ("pillow", "tensors")
    )
    old = copy.deepcopy(pillow)
    del old["preprocessing"]["resize_by"]

    def compare(saved, own):
        check_identity({"patchcore": {"identity": saved}, "state_dict": {}}, own)

    compare(old, pillow)
    for saved, own, message in (
        (old, tensors, "resize_by pillow, here tensors"),
        (tensors, pillow, "resize_by tensors, here pillow"),
    ):
        with pytest.raises(UserError, match=message):
            compare(saved, own)
