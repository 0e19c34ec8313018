import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pl_patchcore import PatchCore, Preprocessing, UserError
from pl_patchcore.anomaly_map import to_original
from pl_patchcore.data import ImageDataset, Record
from pl_patchcore.preprocessing import IMAGENET_MEAN, read_mask
from pl_patchcore.regions import find_regions
from pl_patchcore.roi import checked, marked

SIZE = (40, 60)
BOX = [10, 5, 50, 30]
CORNERS = [[10, 5], [50, 5], [50, 30], [10, 30]]
INSIDE = np.zeros(SIZE, bool)
INSIDE[5:30, 10:50] = True
places = st.integers(-20, 140).map(lambda half: half / 2)


def drawn(*shapes, size=SIZE):
    return marked("roi", checked("roi", list(shapes)), size, None, None)


def even_odd(corners, size):
    """Pixels whose centres see an odd number of edges to their left; rows of centres belong to edges' upper ends."""
    found = np.zeros(size, bool)
    for y, x in np.ndindex(size):
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if (y0 <= y + 0.5) != (y1 <= y + 0.5):
                (xa, ya), (xb, yb) = sorted([(x0, y0), (x1, y1)], key=lambda p: p[1])
                found[y, x] ^= xa + (y + 0.5 - ya) * ((xb - xa) / (yb - ya)) <= x + 0.5
    return found


def test_boxes_and_polygons():
    assert np.array_equal(drawn(BOX), INSIDE)
    assert np.array_equal(drawn(CORNERS), INSIDE)
    assert np.array_equal(drawn(CORNERS[::-1]), INSIDE)
    two = drawn(BOX, [[0, 30], [20, 30], [20, 99], [0, 99]])
    assert np.array_equal(two, INSIDE | (np.arange(40)[:, None] >= 30) & (np.arange(60) < 20))
    assert np.array_equal(drawn(BOX, CORNERS), INSIDE)  # united
    assert drawn([9.5, 4.5, 10.5, 5.5]).nonzero() == (np.array([4]), np.array([9]))  # centres at its upper left edges
    assert np.array_equal(drawn([9.5, 4.5, 10.5, 5.5]), drawn([[9.5, 4.5], [10.5, 4.5], [10.5, 5.5], [9.5, 5.5]]))
    for alone in (BOX, tuple(BOX), np.array(BOX), CORNERS, [BOX], [np.array(CORNERS)], tuple(map(tuple, CORNERS))):
        assert np.array_equal(marked("roi", checked("roi", alone), SIZE, None, None), INSIDE)
    assert checked("roi", checked("roi", [BOX, CORNERS])) == checked("roi", [BOX, CORNERS])


@given(st.lists(st.tuples(places, places), min_size=3, max_size=7))
def test_polygons_match_the_rule(corners):
    expected = even_odd(corners, (20, 30))
    try:
        assert np.array_equal(drawn(corners, size=(20, 30)), expected)
    except UserError:
        assert not expected.any()


def test_polygons_of_many_crossings(monkeypatch):
    monkeypatch.setattr("pl_patchcore.roi.CROSSINGS", 7)
    corners = [[x, 40 * (x % 2) + 0.3 * x] for x in range(60)]
    assert np.array_equal(drawn(corners), even_odd(corners, SIZE))


def test_polygons_side_by_side_leave_nothing_out():
    upper, lower = drawn([[0, 0], [60, 0], [60, 33.3], [0, 7.1]]), drawn([[0, 40], [60, 40], [60, 33.3], [0, 7.1]])
    assert (upper ^ lower).all()


def test_outlines_give_regions_back():
    rng = np.random.default_rng(0)
    for _ in range(5):
        mask = rng.random(SIZE) < 0.6
        for region in find_regions(np.ones(SIZE), mask)[:3]:
            own = np.zeros(SIZE, bool)
            left, top, right, bottom = region.box
            own[top:bottom, left:right] = region.mask
            holes = {"ignore": region.holes} if region.holes else {}
            found = Preprocessing(None, None, roi=[region.outline], **holes).region(SIZE)
            assert np.array_equal(found, own)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r"roi must be a box \[left, top, right, bottom\], a polygon .* folder of masks, got 3\."),
        ([], r"roi must be a box .* got \[\]"),
        ([1, 2, 3], r"roi must be a box .* got \[1, 2, 3\]"),
        ([[1, 2], [3, 4]], "of at least 3 corners"),
        ([BOX, [1, 2, "3", 4]], "roi must be a box"),
        ([BOX, None], "roi must be a box"),
        ([10, 5, 10, 30], r"roi \[10, 5, 10, 30\]: a box is \[left, top, right, bottom\], right above left"),
        ([BOX, [0, 9, 5, 3]], r"roi \[0, 9, 5, 3\]: a box is"),
        ([0, 0, float("inf"), 3], "coordinates must be at most"),
        ([[0, 0], [float("nan"), 0], [0, 3]], "coordinates must be at most"),
        ([[i, i * i] for i in range(10_001)], "roi has more than 10000 numbers or corners; give a mask image"),
        ("nowhere.png", r"roi: .*nowhere\.png: no such file or folder; give a mask image, a folder of masks, or null"),
    ],
)
def test_bad_values(value, message):
    with pytest.raises(UserError, match=message):
        Preprocessing(roi=value)


def test_what_leaves_nothing_is_refused(tmp_path):
    image, path = Image.new("RGB", (60, 40)), tmp_path / "a.png"
    Image.new("L", (60, 40)).save(tmp_path / "black.png")
    for options, message in (
        ({"roi": [100, 100, 120, 110]}, r"roi \[100, 100, 120, 110\] holds no pixel of an image of 40x60"),
        ({"ignore": [BOX, [[70, 0], [80, 0], [80, 9]]]}, r"ignore \[\[70, 0\], \[80, 0\], \[80, 9\]\] holds no pixel"),
        ({"roi": [0.6, 0, 1.4, 9]}, "holds no pixel"),
        ({"ignore": [0, 0, 60, 40]}, r"a\.png: no pixel of its 40x60 counts; change ignore"),
        ({"roi": BOX, "ignore": [0, 0, 60, 40]}, r"a\.png: no pixel of its 40x60 counts; change roi and ignore"),
        ({"roi": tmp_path / "black.png"}, r"a\.png: no pixel of its 40x60 counts; change roi"),
    ):
        with pytest.raises(UserError, match=message):
            Preprocessing(None, None, **options).apply(image, path=path)
    nothing = Preprocessing(None, None, ignore=tmp_path / "black.png").apply(image)
    assert nothing["region"].all()


def save(mask, path, dtype=np.uint8, level=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(dtype) * dtype(level)).save(path)


def test_masks_and_shapes_agree(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    path = tmp_path / "set" / "good" / "01.jpg"
    save(INSIDE, tmp_path / "roi.png")
    save(INSIDE, tmp_path / "dim.png", level=1)
    save(INSIDE, tmp_path / "deep.png", np.uint16, 65535)
    save(INSIDE, tmp_path / "masks" / "01_mask.png")
    save(INSIDE, tmp_path / "within" / "good" / "01.png")
    save(~INSIDE, tmp_path / "within" / "01.png")  # the longer name is nearer
    save(~INSIDE, tmp_path / "outside.png")
    names = ("roi.png", "dim.png", "deep.png", "masks", "within")
    options = [{"roi": value} for value in (BOX, CORNERS, *(tmp_path / name for name in names))]
    options += [{"ignore": tmp_path / "outside.png"}, {"roi": [0, 0, 60, 40], "ignore": tmp_path / "outside.png"}]
    samples = [Preprocessing(32, 28, **o).apply(image, INSIDE.astype(np.uint8), path) for o in options]
    for sample in samples:
        assert np.array_equal(sample["region"], INSIDE)
        assert sample["region"].dtype == torch.uint8
        assert all(torch.equal(value, samples[0][name]) for name, value in sample.items())


def test_masks_of_all_images_are_decoded_once(tmp_path, monkeypatch):
    save(INSIDE, tmp_path / "roi.png")
    save(~INSIDE, tmp_path / "ignore.png")
    decoded = []
    monkeypatch.setattr("pl_patchcore.roi.read_mask", lambda path, most: decoded.append(path.name) or read_mask(path))
    transform = Preprocessing(32, 28, roi=tmp_path / "roi.png", ignore=tmp_path / "ignore.png")
    for _ in range(3):
        transform.apply(Image.new("RGB", (60, 40)))
    assert sorted(decoded) == ["ignore.png", "roi.png"]


def test_colours_outside_change_nothing():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    transform, mask = Preprocessing(32, 28, "longer_side", roi=BOX), rng.integers(0, 2, SIZE, dtype=np.uint8)
    source = Image.fromarray(pixels)
    expected = transform.apply(source, mask)
    assert np.array_equal(np.asarray(source), pixels)  # the caller's stays as it is
    pixels[~INSIDE] = rng.integers(0, 256, ((~INSIDE).sum(), 3))
    mask[~INSIDE] ^= 1
    found = transform.apply(Image.fromarray(pixels), mask)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    pixels[25, 40] ^= 255
    assert not torch.equal(transform.apply(Image.fromarray(pixels))["image"], expected["image"])


def test_what_does_not_count_is_painted_before_the_resize():
    transform = Preprocessing(None, None, ignore=[0, 0, 60, 20], levels=True)
    sample = transform.apply(Image.new("RGB", (60, 40), (9, 8, 7)), np.ones(SIZE, np.uint8))
    assert (sample["image"][:, :20].permute(1, 2, 0) == torch.tensor([round(255 * m) for m in IMAGENET_MEAN])).all()
    assert (sample["image"][:, 20:].permute(1, 2, 0) == torch.tensor([9, 8, 7])).all()
    assert (sample["mask"][:20] == 255).all()
    assert (sample["mask"][20:] == 1).all()
    assert sample["region"].tolist() == [[0] * 60] * 20 + [[1] * 60] * 20


def test_folder_of_masks(tmp_path):
    for name in ("a/01.png", "b/01.png", "b/02.png"):
        Image.new("RGB", (60, 40)).save(_made(tmp_path / "set" / name))
    save(INSIDE, tmp_path / "masks" / "a" / "01_mask.png")
    save(~INSIDE, tmp_path / "masks" / "01.png")
    records = [Record(tmp_path / "set" / name, 0, "nominal", "x") for name in ("a/01.png", "b/01.png", "b/02.png")]
    transform = Preprocessing(None, None, roi=tmp_path / "masks")
    data = ImageDataset(records, transform)
    assert np.array_equal(data[0]["region"], INSIDE)
    assert np.array_equal(data[1]["region"], ~INSIDE)
    for look in (lambda: data[2], lambda: records[2].check(transform)):
        with pytest.raises(
            UserError, match=r"b/02\.png: has no mask 02\.png or 02_mask\.png in the folder of roi, .*mas"
        ):
            look()
    with pytest.raises(UserError, match=r"roi is a folder of masks .* this image has none; give the path of its file"):
        transform(Image.new("RGB", (60, 40)))
    with pytest.raises(UserError, match="holds the images themselves"):
        Preprocessing(roi=tmp_path / "set" / "a")(records[0].path)
    save(INSIDE, tmp_path / "masks" / "02.png")
    assert np.array_equal(data[2]["region"], INSIDE)  # the folder is looked at again
    assert transform(records[2].path).shape == (3, 40, 60)
    save(INSIDE[:-1], tmp_path / "masks" / "02.png")
    for look in (lambda: data[2], lambda: records[2].check(transform)):
        with pytest.raises(UserError, match=r"02\.png: mask of 39x60 pixels for an image of 40x60 \(.*b/02\.png\)"):
            look()


def _made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_a_mask_of_another_size_shows_before_the_work(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    save(INSIDE[:, :-1], tmp_path / "roi.png")
    record, transform = Record(tmp_path / "a.png", 0, "nominal", "x"), Preprocessing(ignore=tmp_path / "roi.png")
    with pytest.raises(UserError, match=r"ignore: .*roi\.png: mask of 40x59 pixels for an image of 40x60 \(.*a\.png\)"):
        record.check(transform)
    with pytest.raises(UserError, match=r"roi \[61, 0, 70, 9\] holds no pixel"):
        record.check(Preprocessing(roi=[61, 0, 70, 9]))
    save(INSIDE, tmp_path / "roi.png")
    record.check(transform)  # the changed file is read again


def test_settings_are_plain_and_no_part_of_the_identity(tmp_path, monkeypatch):
    assert Preprocessing(roi=BOX, ignore=[CORNERS], levels=True).as_dict() == Preprocessing().as_dict()
    save(INSIDE, tmp_path / "roi.png")
    monkeypatch.chdir(tmp_path)
    transform = Preprocessing(None, None, roi="roi.png", ignore=[0, 0, 5, 5])
    monkeypatch.chdir(tmp_path.parent)
    for same in (transform, copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        assert same == transform
        assert hash(same) == hash(transform)
        assert np.array_equal(same.region(SIZE), INSIDE)


def test_hyper_parameters_hold_them_as_plain_values(tmp_path, monkeypatch, tiny):
    save(INSIDE, tmp_path / "roi.png")
    monkeypatch.chdir(tmp_path)
    given = {"roi": Path("roi.png"), "ignore": (BOX, np.array(CORNERS))}
    model = PatchCore(tiny, ["fine"], resize=64, crop=None, **given)
    saved = {name: model.hparams[name] for name in given}
    assert saved == {"roi": str(tmp_path / "roi.png"), "ignore": [BOX, CORNERS]}
    again = PatchCore(tiny, ["fine"], resize=64, crop=None, **json.loads(json.dumps(saved)))
    assert again.transform == model.transform
    assert again.identity() == PatchCore(tiny, ["fine"], resize=64, crop=None).identity()


def test_regions_are_kept_for_a_size():
    transform = Preprocessing(roi=BOX)
    assert np.shares_memory(transform.region(SIZE), transform.region(SIZE))
    with pytest.raises(ValueError, match="read-only"):
        transform.region(SIZE)[0] = 1
    assert transform.region((99, 99)).shape == (99, 99)


@pytest.mark.parametrize("size", [(30, 90), (90, 30), (64, 61), (1, 200), (300, 7)])
@pytest.mark.parametrize("options", [{"crop": None}, {"crop": 40}, {"resize": (32, 80), "crop": (32, 70)}])
def test_longer_side_comes_back_onto_the_original(size, options):
    transform = Preprocessing(**({"resize": 64, "resize_mode": "longer_side"} | options))
    sample = transform.apply(Image.new("RGB", size[::-1]), np.zeros(size, np.uint8))
    top, left, bottom, right = sample["crop_box"].tolist()
    shape = tuple(sample["image"].shape[1:])
    assert shape == transform.size
    # the box's pixels that lie in the original are those of a known mask
    y, x = ((torch.arange(n) + 0.5) / n for n in shape)
    inside = [(low + at * (high - low) - n / 2).abs() < n / 2 for at, low, high, n in
              ((y, top, bottom, size[0]), (x, left, right, size[1]))]  # fmt: skip
    assert torch.equal(sample["mask"] == 0, inside[0][:, None] & inside[1])
    # a dot of the input, in the original, where it came from
    for place in (sample["mask"] == 0).nonzero()[:: max(1, shape[0] * shape[1] // 7)].tolist():
        heat = torch.zeros(shape)
        heat[*place] = 1
        back = to_original(heat, size, (top, left, bottom, right)).nan_to_num(0)
        centre = [(low + (at + 0.5) / n * (high - low)) for at, n, low, high in
                  zip(place, shape, (top, left), (bottom, right), strict=True)]  # fmt: skip
        peaks = (back == back.max()).nonzero().double().mean(0) + 0.5
        step = [max(1.0, (high - low) / n) for n, low, high in zip(shape, (top, left), (bottom, right), strict=True)]
        assert all(abs(p - c) <= 0.5 * s + 1e-4 for p, c, s in zip(peaks.tolist(), centre, step, strict=True))


@pytest.mark.parametrize("size", [(200, 600), (600, 200), (333, 500)])
def test_a_bright_dot_through_longer_side(size):
    """A dot drawn on the original, brought to the input, and its peak there brought back: within half a pixel."""
    transform = Preprocessing(256, None, "longer_side", mean=(0, 0, 0), std=(1, 1, 1))
    scale = max(size) / 256
    for y, x in ((20, 30), (size[0] // 2, size[1] // 2), (size[0] - 25, size[1] - 40)):
        rows, columns = np.ogrid[: size[0], : size[1]]
        dot = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * (3 * scale) ** 2))
        sample = transform.apply(Image.fromarray(np.dstack([(255 * dot).round().astype(np.uint8)] * 3)))
        back = to_original(sample["image"][0], size, tuple(sample["crop_box"].tolist())).nan_to_num(0).double()
        assert back.shape == size
        weight = back * (back > 0.3)  # centre of mass, as the peak of a smooth dot is flat
        found = [(weight.sum(1 - axis) * torch.arange(size[axis])).sum() / weight.sum() for axis in (0, 1)]
        assert abs(found[0] - y) < 0.5
        assert abs(found[1] - x) < 0.5


def test_longer_side_repeats_the_edges():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    sample = Preprocessing(64, None, "longer_side", levels=True).apply(
        Image.fromarray(pixels), np.ones((32, 64), np.uint8)
    )
    expected = np.pad(pixels, ((16, 16), (0, 0), (0, 0)), mode="edge")
    assert np.array_equal(sample["image"].permute(1, 2, 0), expected)
    assert sample["mask"][:, 0].tolist() == [255] * 16 + [1] * 32 + [255] * 16
    assert sample["crop_box"].tolist() == [-16, 0, 48, 64]


def test_levels():
    pixels = np.random.default_rng(0).integers(0, 256, (600, 70, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for options in ((None, None), (64, 40), (64, None, "longer_side")):
        transform, levels = Preprocessing(*options), Preprocessing(*options, levels=True)
        found = levels.apply(image)["image"]
        assert found.dtype == torch.uint8
        assert torch.equal(levels(image), transform(image))
        mean, std = torch.tensor([transform.mean, transform.std])[..., None, None]
        torch.testing.assert_close((found / 255 - mean) / std, transform(image))
        assert torch.equal(levels.denormalise(found), found / 255)
    assert np.array_equal(Preprocessing(None, None, levels=True).apply(image)["image"].permute(1, 2, 0), pixels)
