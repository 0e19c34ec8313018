import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from pl_patchcore import Preprocessing, UserError
from pl_patchcore.data import Record
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
        ({"resize_mode": "pad"}, "squash' or 'shorter_side"),
        ({"resize": (20, 30), "crop": None, "resize_mode": "shorter_side"}, "takes one number"),
        ({"std": (1, 0, 1)}, "std positive"),
        ({"interpolation": "lanczos"}, "bilinear' or 'bicubic"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        Preprocessing(**options)


def test_crop_of_a_small_image():
    with pytest.raises(UserError, match="larger than an image of 10x12"):
        Preprocessing(None, 20)(Image.new("RGB", (12, 10)))


def test_plain_values():
    arrays = Preprocessing(np.array([20, 30]), None, mean=np.array([0.5] * 3), std=[0.25] * 3)
    assert arrays == Preprocessing((20, 30), None, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert arrays.as_dict()["mean"] == [0.5] * 3
    assert torch.equal(torch.tensor(Preprocessing().as_dict()["mean"]), torch.tensor([0.485, 0.456, 0.406]))
    assert Preprocessing((20, 30), None).as_dict()["resize"] == [20, 30]
