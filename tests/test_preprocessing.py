import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from pl_patchcore import FolderDataModule, Preprocessing, UserError
from pl_patchcore.data import Record
from pl_patchcore.data.masks import settle_masks
from pl_patchcore.preprocessing import check_image, read_image

GRADIENT = np.linspace(0, 255, 48 * 32).reshape(48, 32).astype(np.uint8)


def test_squash_and_shorter_side():
    image = Image.new("RGB", (300, 100))
    assert Preprocessing(64, None)(image).shape == (3, 64, 64)
    assert Preprocessing(64, None, "shorter_side")(image).shape == (3, 64, 192)
    assert Preprocessing((40, 60), (20, 30))(image).shape == (3, 20, 30)
    assert Preprocessing(None, None)(image).shape == (3, 100, 300)


def test_values_are_normalised_and_back():
    transform = Preprocessing(None, None)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    tensor = transform(Image.fromarray(pixels))
    expected = (pixels / 255 - np.array(transform.mean)) / np.array(transform.std)
    np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(transform.denormalise(tensor).permute(1, 2, 0) * 255, pixels, atol=1e-3)


@pytest.mark.parametrize("mode", ["squash", "shorter_side"])
def test_crop_box_is_where_the_crop_is(mode):
    transform = Preprocessing(60, 40, mode)
    for size in ((90, 240), (240, 90), (91, 91)):
        image, mask = Image.new("RGB", size[::-1]), np.zeros(size, np.uint8)
        top, left, bottom, right = transform.apply(image)["crop_box"].tolist()
        mask[round(top) : round(bottom), round(left) : round(right)] = 1
        cropped = transform.apply(image, mask)["mask"]
        assert cropped.shape == (40, 40)
        assert cropped[1:-1, 1:-1].all()  # all of the crop is inside the box,
        inverse = transform.apply(image, 1 - mask)["mask"]
        assert inverse.float().mean() < 0.1  # and nothing outside is in the crop


@pytest.mark.parametrize("size", [(80, 50), (50, 80)])
@pytest.mark.parametrize("mode", ["squash", "shorter_side"])
def test_apply_is_what_torchvision_does(mode, size):
    """Image and mask at once, whatever the default type."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    transform = Preprocessing(40, [25, 30], mode, "bicubic")
    sides, crop = (40, 40) if mode == "squash" else 40, tv.CenterCrop((25, 30))
    normalise = [tv.ToTensor(), tv.Normalize(transform.mean, transform.std)]
    same = tv.Compose([tv.Resize(sides, tv.InterpolationMode.BICUBIC), crop, *normalise])
    mask = crop(tv.Resize(sides, tv.InterpolationMode.NEAREST)(Image.fromarray(pixels[..., 0])))
    expected = same(Image.fromarray(pixels))
    torch.set_default_dtype(torch.float64)
    try:
        found = transform.apply(Image.fromarray(pixels), pixels[..., 0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found["image"], expected)
    assert found["image"].is_contiguous()
    assert np.array_equal(found["mask"].numpy(), np.asarray(mask))
    assert found["original_size"].tolist() == list(size)
    longer = (40 * 80 // 50, 40) if size[0] > size[1] else (40, 40 * 80 // 50)
    height, width = (40, 40) if mode == "squash" else longer
    top, left = round((height - 25) / 2), round((width - 30) / 2)
    box = np.array([top, left, top + 25, left + 30]) / [height, width, height, width] * [*size, *size]
    assert found["crop_box"].tolist() == pytest.approx(box)
    assert found["crop_box"].dtype == torch.float32


def test_masks_keep_their_values():
    mask = np.zeros((50, 70), np.uint8)
    mask[10:30, 20:50] = 1
    mask[40:, :] = 255
    found = Preprocessing(33, None).apply(Image.new("RGB", (70, 50)), mask)["mask"]
    assert set(found.unique().tolist()) == {0, 1, 255}


def test_grey_rgba_16_bit_palette(tmp_path):
    grey = Image.fromarray(GRADIENT)
    grey.save(tmp_path / "grey.png")
    Image.fromarray(GRADIENT.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(GRADIENT.astype(np.uint16) * 257).save(tmp_path / "deep.tiff")
    rgba = grey.convert("RGBA")
    rgba.putalpha(7)
    rgba.save(tmp_path / "alpha.png")
    grey.save(tmp_path / "grey.bmp")
    grey.quantize(256).save(tmp_path / "palette.png")
    for name in ("grey.png", "deep.png", "deep.tiff", "alpha.png", "grey.bmp", "palette.png"):
        image = read_image(tmp_path / name)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), np.repeat(GRADIENT[:, :, None], 3, 2), err_msg=name)
        assert check_image(tmp_path / name).size == (48, 32)


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    Image.fromarray(GRADIENT).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.png"))[:, :, 0], np.rot90(GRADIENT, -1))
    assert check_image(tmp_path / "turned.png").size == (32, 48)


def test_a_large_file_is_not_copied(tmp_path, monkeypatch):
    """Each copy of an image of 100 megapixels is 400 MB."""
    pixels = np.random.default_rng(0).integers(0, 256, (600, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    given = Image.fromarray(pixels)
    read = read_image(given)
    given.paste((0, 0, 0), (0, 0, 40, 600))
    assert np.array_equal(np.asarray(read), pixels)  # the caller's image is

    def copy(self):
        raise AssertionError

    monkeypatch.setattr(Image.Image, "copy", copy)
    transform = Preprocessing(None, None, levels=True)
    assert np.array_equal(transform.apply(transform.read(tmp_path / "a.png"))["image"].permute(1, 2, 0), pixels)


def test_mask_threshold(tmp_path):
    Image.fromarray(np.array([[0, 100, 127, 128, 255]], np.uint8)).save(tmp_path / "mask.png")
    Image.fromarray(np.array([[0, 100, 127, 128, 255]], np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(np.array([[0, 0, 0, 255, 255]], np.uint8)).convert("1").save(tmp_path / "bits.png")
    Image.new("RGB", (5, 1)).save(tmp_path / "image.png")
    for name in ("mask.png", "deep.png", "bits.png"):
        mask = Record(tmp_path / "image.png", 1, "dirt", "tile", tmp_path / name).read()[1]
        assert mask.tolist() == [[0, 0, 0, 1, 1]]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_file(tmp_path, suffix):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (60, 60), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, {"jpg": "JPEG", "png": "PNG"}[suffix])
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    for read in (read_image, check_image):
        with pytest.raises(UserError, match=rf"cut\.{suffix}: cannot be read .*replace the file"):
            read(path)


def test_no_image(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(GRADIENT.astype(np.float32)).save(tmp_path / "float.tiff")
    for name, message in (
        ("text.png", "not an image"),
        ("folder.png", "is a folder where an image file should be"),
        ("missing.png", "no such file"),
        ("float.tiff", "8 or 16 bits"),
    ):
        with pytest.raises(UserError, match=message):
            read_image(tmp_path / name)
    for name in ("text.png", "folder.png", "missing.png"):
        with pytest.raises(UserError, match=name):
            check_image(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 100, "crop": 120}, "crop 120 is larger"),
        ({"resize": 0}, "resize must be at least 1"),
        ({"crop": (3, 4, 5)}, r"one number or \(height, width\), got \(3, 4, 5\)"),
        ({"resize": 99_999_999_999, "crop": None}, "resize must be at most 16384 pixels"),
        ({"bits": 64}, r"images\.bits must be from 1 to 31, got 64"),
        ({"max_pixels": 0}, r"images\.max_pixels must be at least 1"),
        ({"resize_mode": "pad"}, "squash', 'shorter_side' or 'longer_side'"),
        ({"resize": (20, 30), "crop": None, "resize_mode": "shorter_side"}, "takes one number"),
        ({"std": (1, 0, 1)}, "std positive"),
        ({"interpolation": "lanczos"}, "bilinear' or 'bicubic"),
        ({"resize_by": "opencv"}, "pillow' or 'tensors', got 'opencv'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        Preprocessing(**options)


@pytest.mark.parametrize("options", [{}, {"resize_mode": "shorter_side"}, {"resize": None, "crop": (64, 70)}])
def test_share_left_out_by_the_crop(options):
    transform = Preprocessing(**options)
    top, left, bottom, right = transform.apply(Image.new("RGB", (300, 200)))["crop_box"].tolist()
    kept = (bottom - top) * (right - left) / (200 * 300)
    assert transform.left_out((200, 300)) == pytest.approx(1 - kept, abs=0.01)
    assert Preprocessing(crop=None).left_out((200, 300)) == 0


def test_crop_of_a_small_image():
    with pytest.raises(UserError, match="larger than an image of 10x12"):
        Preprocessing(None, 20)(Image.new("RGB", (12, 10)))


def test_plain_values():
    arrays = Preprocessing(np.array([20, 30]), None, mean=np.array([0.5] * 3), std=[0.25] * 3)
    assert arrays == Preprocessing((20, 30), None, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert arrays.as_dict()["mean"] == [0.5] * 3
    assert torch.equal(torch.tensor(Preprocessing().as_dict()["mean"]), torch.tensor([0.485, 0.456, 0.406]))
    assert Preprocessing((20, 30), None).as_dict()["resize"] == [20, 30]


def levels_of(mask, path, name="mask.png"):
    """The mask that a data set of this one mask has."""
    Image.fromarray(mask).save(path / name)
    Image.new("RGB", mask.shape[1::-1]).save(path / "image.png")
    record = Record(path / "image.png", 1, "dirt", "tile", path / name)
    return settle_masks([record], 1, Preprocessing())[0].read()[1]


WHERE = np.zeros((4, 6), bool)
WHERE[1:3, 2:5] = True
INK = np.full((4, 6, 3), 60, np.uint8)


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (WHERE * np.uint8(255), "8.png"),
        (WHERE, "1.png"),
        (WHERE * np.uint8(1), "one.png"),
        (WHERE * np.uint8(3), "three.png"),
        (np.dstack([WHERE * np.uint8(2)] * 3), "colours.png"),
        (WHERE * np.uint16(65535), "16.png"),
        (WHERE * np.uint16(255), "16_of_8.png"),
        (WHERE * np.uint16(1), "16_of_1.png"),
        (WHERE * np.int32(255), "32.tif"),
        (WHERE * np.float32(1), "float.tif"),
        (np.dstack([INK, WHERE * np.uint8(255)]), "alpha.png"),
        (np.dstack([WHERE * np.uint8(255), WHERE * np.uint8(255)]), "grey_alpha.png"),
    ],
)
def test_masks_of_every_kind(mask, name, tmp_path):
    assert np.array_equal(levels_of(mask, tmp_path, name), WHERE)


@pytest.mark.parametrize(
    ("mask", "name", "message"),
    [
        (WHERE * np.uint16(4095), "12.png", "highest level of a mask is 4095, of no known range"),
        (WHERE * np.int32(-1), "negative.tif", "whole levels from 0 up"),
        (WHERE * np.float32(0.5), "half.tif", "whole levels from 0 up"),
        (np.arange(48, dtype=np.uint8).reshape(8, 6), "many.png", "1 of 1 masks hold no level above"),
        (np.dstack([INK + WHERE[..., None], ~WHERE * np.uint8(255)]), "hidden.png", "colours and alpha mark different"),
    ],
)
def test_masks_without_a_certain_meaning(mask, name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        levels_of(mask, tmp_path, name)


def test_masks_are_told_of(tmp_path, caplog):
    levels_of(WHERE * np.uint8(3), tmp_path)
    assert "1 of 1 masks hold no level above 127; the highest is 3: they are read as class numbers" in caplog.text
    levels_of(np.full((4, 6), 255, np.uint8), tmp_path)
    assert "1 of 1 masks mark their whole image" in caplog.text
    levels_of(np.zeros((4, 6), np.uint8), tmp_path)
    assert "all 1 masks are empty" in caplog.text
    caplog.clear()
    levels_of(WHERE * np.uint8(255), tmp_path)
    assert not caplog.text


def test_class_numbers_only_where_no_mask_is_bright(tmp_path, caplog):
    Image.new("RGB", (6, 4)).save(tmp_path / "image.png")
    for name, level in (("bright", 255), ("dim", 1)):
        Image.fromarray(WHERE * np.uint8(level)).save(tmp_path / f"{name}.png")
    records = [Record(tmp_path / "image.png", 1, "dirt", "tile", tmp_path / f"{n}.png") for n in ("bright", "dim")]
    bright, dim = (record.read()[1] for record in settle_masks(records, 1, Preprocessing()))
    assert np.array_equal(bright, WHERE)
    assert (dim == 255).all()  # unknown
    assert "1 of 2 masks hold no level above mid-grey" in caplog.text


def test_several_masks_of_an_image_are_united(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "image.png")
    (tmp_path / "masks").mkdir()
    for i, rows in enumerate((slice(0, 2), slice(2, 4))):
        part = WHERE * np.uint8(255)
        part[rows] = 0
        Image.fromarray(part).save(tmp_path / "masks" / f"{i}.png")
    record = Record(tmp_path / "image.png", 1, "dirt", "tile", tmp_path / "masks")
    record.check()
    assert np.array_equal(settle_masks([record], 1, Preprocessing())[0].read()[1], WHERE)


def signed_tiff(pixels):
    """A grey TIFF of signed 16-bit numbers."""
    height, width = pixels.shape
    tags = [(256, 3, width), (257, 3, height), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
            (278, 3, height), (279, 4, pixels.size * 2), (339, 3, 2)]  # fmt: skip
    data = pixels.astype("<i2").tobytes()
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_pixels_without_a_range_are_refused_before_the_work(tmp_path):
    Image.fromarray(GRADIENT.astype(np.int32)).save(tmp_path / "int32.tif")
    Image.fromarray(GRADIENT.astype(np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "signed.tif").write_bytes(signed_tiff(GRADIENT.astype(np.int16) - 100))
    for name in ("int32", "float", "signed"):
        for read in (read_image, check_image):
            with pytest.raises(UserError, match=rf"{name}\.tif: .* have no defined range; save it with 8 or 16 bits"):
                read(tmp_path / f"{name}.tif")
    same = read_image(tmp_path / "int32.tif", bits=8)
    assert np.array_equal(np.asarray(same)[..., 0], GRADIENT)
    with pytest.raises(UserError, match=r"signed\.tif: holds level -100, outside of 0 to 255"):
        read_image(tmp_path / "signed.tif", bits=8)


def test_bits_scale_grey_images_of_more_than_8(tmp_path, caplog):
    levels = GRADIENT.astype(np.uint16) * 16 + 15
    Image.fromarray(levels).save(tmp_path / "deep.png")
    Image.fromarray(GRADIENT).save(tmp_path / "plain.png")
    expected = np.round(levels / 4095 * 255)
    assert np.array_equal(np.asarray(read_image(tmp_path / "deep.png", bits=12))[..., 0], expected)
    assert np.array_equal(np.asarray(read_image(tmp_path / "plain.png", bits=12))[..., 0], GRADIENT)
    with pytest.raises(UserError, match=r"deep\.png: holds level 4095, outside of 0 to 1023"):
        read_image(tmp_path / "deep.png", bits=10)
    (tmp_path / "set").mkdir()
    (tmp_path / "deep.png").rename(tmp_path / "set" / "deep.png")
    data = FolderDataModule(tmp_path / "set", test_share=0, num_workers=0)
    data.prepare_data()
    assert "deep.png: nearly black" in caplog.text
    assert "set model.images.bits=12" in caplog.text
    caplog.clear()
    data = FolderDataModule(tmp_path / "set", test_share=0, num_workers=0)
    data.transform = Preprocessing(None, None, bits=12, mean=(0, 0, 0), std=(1, 1, 1))
    data.prepare_data()
    data.setup("fit")
    assert not caplog.text
    assert np.array_equal(np.round(data.train_set[0]["image"][0].numpy() * 255), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_orientation_of_tiff(tmp_path, orientation, compression):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(GRADIENT).save(tmp_path / "turned.png", exif=exif)
    expected = np.asarray(read_image(tmp_path / "turned.png"))
    for pixels in (GRADIENT, np.dstack([GRADIENT] * 3)):
        Image.fromarray(pixels).save(tmp_path / "turned.tif", exif=exif, compression=compression)
        assert np.array_equal(np.asarray(read_image(tmp_path / "turned.tif")), expected)
        assert check_image(tmp_path / "turned.tif").size == expected.shape[:2]


def test_limit_of_pixels(tmp_path, monkeypatch):
    Image.fromarray(GRADIENT).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: has 32x48 pixels; raise model\.images\.max_pixels"):
        read_image(tmp_path / "a.png", max_pixels=1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # an image above twice as many is an error of Pillow's
    with pytest.raises(UserError, match=r"a\.png: .*; raise model\.images\.max_pixels"):
        check_image(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", max_pixels=2000))[..., 0], GRADIENT)
    assert Image.MAX_IMAGE_PIXELS == 500


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    foreign = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    Image.fromarray(GRADIENT).save(tmp_path / "a.png")
    foreign.write_bytes((tmp_path / "a.png").read_bytes())
    for read in (read_image, check_image):
        with pytest.raises(UserError, match=r"pipe\.png: is a pipe, a socket or a device"):
            read(tmp_path / "pipe.png")
        with pytest.raises(UserError, match=r"caf\\xe9\.png: its name is not UTF-8"):
            read(foreign)
        with pytest.raises(UserError, match=r"eps\.png: .*not an image"):
            read(tmp_path / "eps.png")


def test_pages_are_told_of(tmp_path, caplog):
    first, second = Image.fromarray(GRADIENT), Image.fromarray(255 - GRADIENT)
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[second])
    FolderDataModule(tmp_path, test_share=0, num_workers=0).prepare_data()
    assert "1 files hold several pages" in caplog.text
    assert np.array_equal(np.asarray(read_image(tmp_path / "pages.tif"))[..., 0], GRADIENT)
