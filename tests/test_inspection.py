"""From an image of any kind to a verdict on its own pixels."""

import copy
import json
import os
import pickle
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from networks import TinyBackbone
from PIL import Image

from pl_patchcore import FolderDataModule, Inspection, PatchCore, Preprocessing, UserError
from pl_patchcore.anomaly_map import to_original
from pl_patchcore.fitting import Fitting
from pl_patchcore.inspection import Settings
from pl_patchcore.regions import find_regions


def pixels_of(seed=0, height=60, width=80, defect=False):
    """A wavy pattern with noise, uint8 (H, W, 3)."""
    draw = np.random.default_rng(seed)
    wave = 110 + 30 * np.sin(np.arange(width) / 4 + draw.uniform(0, 6))[None, :, None]
    pixels = wave + draw.normal(0, 8, (height, width, 3))
    if defect:
        pixels[height // 3 : height // 2, width // 3 : width // 2] = 250, 20, 20
    return pixels.clip(0, 255).astype(np.uint8)


def fitted(calibrated=True, **options):
    model = PatchCore(TinyBackbone(), **({"layers": ["fine"], "resize": 64, "crop": 48, "search": "torch"} | options))
    fitting = Fitting(model.model)
    for seed in range(6):
        fitting.add(model.transform(pixels_of(seed))[None])
    fitting.select()
    if calibrated:
        with torch.no_grad():
            scores, maps = model(torch.stack([model.transform(pixels_of(seed)) for seed in range(10, 19)]))
        model.model.calibration.fill(scores, maps.amax((1, 2)))
        model.false_alarm_rate = 0.1
    return model


@pytest.fixture(scope="module")
def model():
    return fitted()


def files(folder):
    """Images of every kind that differs on the way to RGB."""
    rgb = Image.fromarray(pixels_of(50, defect=True))
    grey = rgb.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 200)
    turned = Image.Exif()
    turned[274] = 6
    see_through = rgb.copy()
    see_through.putalpha(grey)
    for name, image, options in (
        ("rgb.png", rgb, {}),
        ("rgb.jpg", rgb, {"quality": 80}),
        ("turned.jpg", rgb, {"exif": turned}),
        ("turned.tif", rgb, {"exif": turned}),
        ("cmyk.jpg", rgb.convert("CMYK"), {}),
        ("grey.png", grey, {}),
        ("bits.png", grey.convert("1"), {}),
        ("alpha.png", see_through, {}),
        ("alpha_grey.png", see_through.convert("LA"), {}),
        ("palette.png", rgb.quantize(30), {}),
        ("palette_alpha.png", rgb.quantize(30), {"transparency": 3}),
        ("deep.png", deep, {}),
        ("deep.tif", deep, {}),
    ):
        image.save(folder / name, **options)
    # by hand, as Pillow writes no colours of 16 bits
    colours = (pixels_of(51).astype(np.uint16) * 250).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in colours)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 80, 60, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    (folder / "colours.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return colours.astype(np.uint16)


def test_every_file_scores_as_in_a_data_module(model, tmp_path):
    colours = files(tmp_path)
    data = FolderDataModule(predict=str(tmp_path), batch_size=1, num_workers=0)
    data.transform = model.transform
    data.setup("predict")
    count = 0
    for batch in data.predict_dataloader():
        path = batch["path"][0]
        with torch.no_grad():
            scores, maps = model(batch["image"])
        kinds = {"path": path}
        with Image.open(path) as opened:
            opened.load()
            kinds["PIL"] = opened
            upright = opened.getexif().get(274, 1) == 1
            if opened.mode in ("L", "RGB", "RGBA", "I;16") and upright and not path.endswith("colours.png"):
                kinds["array"] = np.asarray(opened)
            for name, image in kinds.items():
                found = model.inspect(image)
                assert found.score == scores.item(), (path, name)
                assert found.anomalous == (found.score > model.image_threshold)
                size = tuple(batch["original_size"][0].tolist())
                expected = to_original(maps[0], size, tuple(batch["crop_box"][0].tolist())).numpy()
                np.testing.assert_array_equal(found.anomaly_map, expected)
                count += 1
            assert torch.equal(model.transform(opened), batch["image"][0])
        if path.endswith("colours.png"):
            assert model.inspect(colours).score == scores.item()
    assert count == 28 + 7
    with Image.open(tmp_path / "turned.tif") as lazy:
        assert model.inspect(lazy).size == (80, 60)


def test_arrays_and_tensors_of_one_image(model):
    pixels = pixels_of(50, defect=True)
    expected = model.inspect(Image.fromarray(pixels)).score
    channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
    kinds = [
        pixels, pixels[:, ::-1][:, ::-1], np.asfortranarray(pixels), pixels / 255, (pixels / 255).astype(np.float32),
        (pixels / 255).astype(np.float16), np.dstack([pixels, pixels[..., :1]]), pixels.astype(np.uint16) << 8,
        (pixels.astype(np.uint16) << 8).astype(">u2"), channels_first, channels_first / 255,
        (channels_first / 255).half(), (channels_first / 255).requires_grad_(),
    ]  # fmt: skip
    assert [found.score for found in model.inspect(kinds)] == pytest.approx([expected] * len(kinds), rel=1e-6)
    assert all(torch.equal(model.transform(kind), model.transform(pixels)) for kind in kinds)
    bgr = np.ascontiguousarray(pixels[..., ::-1])
    assert model.inspect(bgr, color="bgr").score == expected != model.inspect(bgr).score
    assert model.inspect(np.dstack([bgr, bgr[..., 0]]), color="bgr").score == expected
    assert model.inspect(channels_first.flip(0), color="bgr").score == expected
    grey = pixels[..., 0]
    assert model.inspect(grey).score == model.inspect(np.dstack([grey] * 3)).score == model.inspect(grey / 255).score
    assert model.inspect(grey.astype(np.uint16) * 257).score == model.inspect(grey).score


def test_bits_and_max_pixels_hold(tmp_path):
    deep = pixels_of(3)[..., 0].astype(np.uint16) * 16
    Image.fromarray(deep).save(tmp_path / "deep.png")
    transform = Preprocessing(64, 48, bits=12, max_pixels=60 * 80)
    expected = transform(tmp_path / "deep.png")
    assert torch.equal(transform(deep), expected)
    assert torch.equal(transform(Image.fromarray(deep)), expected)
    assert not torch.equal(Preprocessing(64, 48)(deep), expected)
    with pytest.raises(UserError, match=r"array of \(60, 80\) uint16: holds level 4096, outside of 0 to 4095"):
        transform(np.maximum(deep, 4096))
    with pytest.raises(UserError, match="is for grey images"):
        transform(np.dstack([deep] * 3))
    large = np.zeros((61, 80), np.uint8)
    for kind in (large, Image.fromarray(large), torch.zeros(3, 61, 80)):
        with pytest.raises(UserError, match=r"has 80x61 pixels; raise model\.images\.max_pixels"):
            transform(kind)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((9, 8, 3), 255.0), r"an array of \(9, 8, 3\) float64 in 255\.\.255: .*give uint8, or divide by 255"),
        (torch.full((3, 8, 8), 200.0), r"a tensor of \(3, 8, 8\) float32 in 200\.\.200: .*divide by 255"),
        (torch.linspace(-2, 2.6, 192).view(3, 8, 8), "before its normalisation, or call the model itself"),
        (torch.linspace(0.1, 2.6, 192).view(3, 8, 8), "before its normalisation"),
        (np.full((8, 8), 4000.0), "give uint16, or divide by the highest level"),
        (np.full((8, 8), np.nan), "look for NaN"),
        (np.zeros((3, 8, 8), np.uint8), r"must be \(H, W\), .*put the channels last"),
        (np.zeros((2, 8, 8, 3), np.uint8), "list.images. of a batch"),
        (torch.zeros(2, 3, 8, 8), r"must be \(3, H, W\); give list\(images\) of a batch"),
        (torch.zeros(8, 8), r"must be \(3, H, W\); repeat grey"),
        (np.zeros((8, 8), np.int64), "int64: an image must be uint8, uint16, or floating-point"),
        (np.zeros((0, 8), np.uint8), "holds no pixel"),
        (np.zeros((8, 8), complex), "must be uint8"),
        (Image.new("F", (8, 8)), "a PIL image of mode F: floating-point numbers of 32 bits have no defined range"),
        (b"bytes", "must be a path, a PIL image, .*, got a bytes"),
        (None, "got a NoneType"),
        ({"image": 1}, "got a dict"),
        ("missing.png", r"missing\.png: no such file"),
        ([np.zeros((8, 8), np.uint8), 3], r"images\[1\]: an image must be a path, .*got a int"),
    ],
)  # fmt: skip
def test_wrong_input_is_told_the_reason(model, image, message):
    with pytest.raises(UserError, match=message):
        model.inspect(image)


def test_wrong_options_and_a_model_without_a_bank(model):
    frame = pixels_of()
    with pytest.raises(UserError, match="color must be 'rgb' or 'bgr', got 'RGB'"):
        model.inspect(frame, color="RGB")
    for least in (0, 1.5, True):
        with pytest.raises(UserError, match="least_area must be a whole number of pixels from 1 up"):
            model.inspect(frame, least_area=least)
    with pytest.raises(UserError, match="the memory bank is empty; fit first"):
        PatchCore(TinyBackbone(), layers=["fine"]).inspect(frame)
    with pytest.raises(UserError, match=r"\(3, 48, 48\); images\[None\] makes a batch of one"):
        model(model.transform(frame))


def test_a_list_keeps_its_order_whatever_the_sizes():
    model = fitted(resize=48, crop=None, resize_mode="shorter_side")
    model.model.input_size.zero_()
    images = [pixels_of(seed, *size) for seed, size in enumerate([(60, 80), (60, 80), (50, 90), (60, 80), (96, 48)])]
    found = model.inspect(tuple(images))
    assert isinstance(found, list)
    assert [one.size for one in found] == [image.shape[:2] for image in images]
    alone = [model.inspect(image) for image in images]
    assert [one.score for one in found] == pytest.approx([one.score for one in alone], rel=1e-6)
    assert len({one.score for one in alone}) == 5
    assert model.inspect([]) == []


def test_map_mask_and_regions_are_on_the_original(model):
    found = model.inspect(Image.fromarray(pixels_of(50, 120, 200, defect=True)), least_area=5)
    assert found.anomalous
    assert found.verdict == "defect"
    assert found.threshold == model.image_threshold
    assert found.pixel_threshold == model.pixel_threshold
    assert found.p_value == pytest.approx(0.1)
    assert found.anomaly_map.shape == found.mask.shape == (120, 200)
    assert found.anomaly_map.dtype == np.float32
    outside = np.ones((120, 200), bool)
    outside[15:105, 25:175] = False  # of 64 pixels the crop leaves 8 on each side
    assert np.array_equal(np.isnan(found.anomaly_map), outside)
    assert np.array_equal(found.mask, np.nan_to_num(found.anomaly_map) > model.pixel_threshold)
    largest = found.regions[0]
    left, top, right, bottom = largest.box
    assert left < 80 < right  # the defect's middle
    assert top < 50 < bottom
    assert found.peak == largest.peak
    assert found.anomaly_map[found.peak[::-1]] == np.nanmax(found.anomaly_map) == np.float32(largest.score)
    assert (
        sum(region.area for region in model.inspect(pixels_of(50, 120, 200, defect=True)).regions) == found.mask.sum()
    )
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (plain["height"], plain["width"], plain["verdict"]) == (120, 200, "defect")
    assert plain["regions"][0]["box"] == list(largest.box)
    assert plain["regions"][0]["outline"] == [list(corner) for corner in largest.outline]


def test_without_thresholds(tmp_path):
    found = fitted(calibrated=False).inspect(pixels_of(50, defect=True))
    assert (found.threshold, found.anomalous, found.verdict, found.p_value) == (None,) * 4
    assert found.mask is None
    assert found.regions == []
    assert "peak" not in found.sentence
    assert changed_near(found, found.peak)


def changed_near(found, place, reach=8):
    """Whether the picture differs from the image around a pixel, and keeps it elsewhere."""
    picture, image = np.asarray(found.draw()), np.asarray(found.original)
    assert picture.shape[0] > image.shape[0]  # the strip
    assert picture.shape[1] == image.shape[1]
    ys, xs = np.nonzero((picture[: image.shape[0]] != image).any(2))
    return len(ys) > 0 and np.hypot(xs - place[0], ys - place[1]).max() < reach


def test_draw(model):
    nominal, defect = model.inspect([pixels_of(12), pixels_of(50, defect=True)])
    assert np.array_equal(np.asarray(nominal.draw())[:60], np.asarray(nominal.original)) == (not nominal.regions)
    picture = np.asarray(defect.draw())
    for x, y in defect.regions[0].outline:
        around = picture[max(0, y - 2) : y + 2, max(0, x - 2) : x + 2].reshape(-1, 3)
        assert (around == (255, 230, 0)).all(1).any(), (x, y)
    assert np.asarray(defect.original).tolist() == pixels_of(50, defect=True).tolist()
    assert max(defect.draw(40).size) <= 40 + 15
    heat = np.ones((6, 8), np.float32)
    heat[1, 6] = 2
    settings = Settings(threshold=1.0, pixel_threshold=3.0)
    image = Image.new("RGB", (80, 60), (90, 90, 90))
    unseen = Inspection(1.5, True, None, heat, (60, 80), None, image.copy, settings)
    assert not unseen.mask.any()
    assert unseen.regions == []
    assert changed_near(unseen, (65, 15))
    fine = Inspection(0.5, False, None, heat, (60, 80), None, image.copy, settings)
    assert np.array_equal(np.asarray(fine.draw())[:60], np.asarray(image))


def counted(region, shape, box):
    """Which places of the input have their centre on a pixel of the original that counts."""
    (height, width), (top, left, bottom, right) = region.shape, box
    y = np.floor(top + (np.arange(shape[0]) + 0.5) * (bottom - top) / shape[0]).astype(int)
    x = np.floor(left + (np.arange(shape[1]) + 0.5) * (right - left) / shape[1]).astype(int)
    inside = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))
    return inside & region[np.ix_(y.clip(0, height - 1), x.clip(0, width - 1))]


def inspected(region, box, shape=(24, 32), seed=0, pixel_threshold=0.9, painted=0.0):
    """An inspection of a random map; and of what lies outside of the region, where the map is NaN."""
    heat = np.random.default_rng(seed).random(shape).astype(np.float32)
    heat[~counted(region, shape, box)] = np.nan
    image = pixels_of(3, *region.shape)
    image[~region] = painted
    settings = Settings(threshold=0.5, pixel_threshold=pixel_threshold)
    original = Image.fromarray(image).copy
    return Inspection(1.0, True, None, heat, region.shape, box, original, settings, region)


@pytest.mark.parametrize("box", [(0.0, 0.0, 60.0, 80.0), (-10.0, 0.0, 70.0, 80.0), (6.0, 8.0, 52.0, 68.0)])
def test_what_lies_outside_of_the_region_does_not_count(box):
    y, x = np.mgrid[:60, :80]
    region = np.hypot(y - 30, x - 35) < 25
    region[:, 33:36] = False
    found = inspected(region, box)
    within = (y >= box[0]) & (y < box[2]) & (x >= box[1]) & (x < box[3])
    assert np.array_equal(np.isnan(found.anomaly_map), ~(region & within))
    assert found.anomaly_map.dtype == np.float32
    assert found.mask.any()
    assert not found.mask[~region].any()
    assert np.array_equal(found.mask, np.nan_to_num(found.anomaly_map) > 0.9)
    expected = [one.to_dict() for one in find_regions(found.anomaly_map, found.mask)]
    assert [one.to_dict() for one in found.regions] == expected
    assert len(expected) > 5
    assert found.anomaly_map[found.peak[::-1]] == np.nanmax(found.anomaly_map)
    small = found.map_of_size(30, 40)
    assert np.array_equal(np.isnan(small), ~(region & within)[1::2, 1::2])
    picture, image = np.asarray(found.picture()).astype(int), np.asarray(found.original).astype(int)
    assert np.array_equal(picture[region], image[region])
    assert (np.ptp(picture[~region], axis=1) == 0).all()  # grey
    assert (picture[~region] != image[~region]).any()
    assert pickle.loads(pickle.dumps(found)).to_dict() == found.to_dict()


def test_regions_of_parts_are_those_of_the_whole():
    """What is above the threshold is looked for in parts of the original; few and many, with and without a crop."""
    for seed, box in enumerate([None, (0.0, 0.0, 60.0, 80.0), (4.5, -20.0, 55.5, 100.0)] * 4):
        draw = np.random.default_rng(seed)
        heat = draw.random((30, 20)).astype(np.float32) * (draw.random((30, 20)) < 0.02 * (1 + seed))
        found = Inspection(1.0, True, None, heat, (60, 80), box, lambda: None, Settings(0.5, 0.4))
        assert np.array_equal(found.mask, np.nan_to_num(found.anomaly_map) > 0.4)
        expected = [one.to_dict() for one in find_regions(found.anomaly_map, found.mask)]
        assert [one.to_dict() for one in found.regions] == expected
        x, y = found.peak
        assert found.anomaly_map[y, x] == np.nanmax(found.anomaly_map)


def test_a_small_picture_keeps_a_small_peak():
    heat = np.zeros((600, 800), np.float32)
    heat[201, 703] = 5
    found = Inspection(1.0, True, None, heat, (600, 800), None, lambda: None, Settings(0.5, 9.0))
    small = found.map_of_size(37, 50)
    assert small.max() > 0.9
    y, x = np.unravel_index(int(small.argmax()), small.shape)
    assert abs(y - 201 / 16) <= 1
    assert abs(x - 703 / 16) <= 1


def test_a_camera_may_use_its_buffer_again(model):
    frame = pixels_of(50, defect=True)
    found = model.inspect(frame)
    frame[:] = 0
    assert np.array_equal(np.asarray(found.original), pixels_of(50, defect=True))


def test_a_file_that_has_changed_is_not_drawn(model, tmp_path):
    Image.fromarray(pixels_of(50, defect=True)).save(path := tmp_path / "latest.png")
    found = model.inspect(str(path))
    assert np.array_equal(np.asarray(found.original), pixels_of(50, defect=True))
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=r"latest\.png: has changed since it was inspected"):
        found.draw()
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        found.draw()
    assert found.regions


def test_threads_get_what_one_gets(model):
    images = [pixels_of(seed, defect=seed % 2 == 0) for seed in range(40, 56)]
    expected = [model.inspect(image).to_dict() for image in images]
    got = [None] * len(images)

    def work(first):
        for place in range(first, len(images), 4):
            got[place] = model.inspect(images[place]).to_dict()

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected
    shared, maps = model.inspect(images[0]), []
    threads = [threading.Thread(target=lambda: maps.append(shared.regions[0].outline)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert maps == [maps[0]] * 4


def test_it_can_be_sent_to_another_process(model):
    found = model.inspect(pixels_of(50, defect=True))
    again = pickle.loads(pickle.dumps(found))
    assert again.to_dict() == found.to_dict()
    assert np.array_equal(np.asarray(again.draw()), np.asarray(found.draw()))
    assert len(pickle.dumps(found)) < 60 * 80 * 20  # no model in it


def test_ensembles_copies_and_half_precision(model):
    frame = pixels_of(50, defect=True)
    assert copy.deepcopy(model).inspect(frame).score == model.inspect(frame).score
    assert fitted().to(torch.bfloat16).inspect(frame).score == pytest.approx(model.inspect(frame).score, rel=0.05)
    both = fitted(layers=["fine"], ensemble={"members": [{}, {"layers": ["coarse"]}]})
    with torch.no_grad():
        assert both.inspect(frame).score == both(both.transform(frame)[None])[0].item()
    assert both.inspect(frame).anomalous


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(model):
    frame = pixels_of(50, defect=True)
    there = torch.nn.ModuleDict({"part": copy.deepcopy(model)}).cuda()["part"]
    assert there.inspect(frame).score == pytest.approx(model.inspect(frame).score, rel=1e-3)
    assert there.inspect(torch.from_numpy(frame).permute(2, 0, 1).cuda()).regions
