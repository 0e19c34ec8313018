"""Training images turned and in other light, against views made by NumPy and Pillow, and slow loops."""

import copy
import io
import logging
import pickle

import numpy as np
import pytest
import torch
from networks import TinyBackbone
from PIL import Image
from reference import score_and_map
from torch.utils.data import DataLoader

from pl_patchcore import MemoryBankCallback, PatchCore, UserError
from pl_patchcore.checkpoint import write_checkpoint
from pl_patchcore.counted import Counted, Turn
from pl_patchcore.data.base import collate
from pl_patchcore.fitting import Fitting
from pl_patchcore.leave_one_out import score_without_rows
from pl_patchcore.references import ReferenceViews, turned

SIDE = 32
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def images(number, seed=0, size=(SIDE, SIDE)):
    """Normalised images of [0, 1], with large parts, so that edges matter."""
    levels = torch.rand(number, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean, std = (torch.from_numpy(each)[:, None, None] for each in (MEAN, STD))
    return ((levels - mean) / std).float()


def turned_by_pillow(image, degrees):
    """An image (3, H, W), continued by reflection far beyond its edges, turned, and cut to its size."""
    height, width = image.shape[1:]
    wide = 2 * max(height, width) + 1
    found = []
    for channel in image:
        whole = Image.fromarray(np.pad(channel, wide, mode="reflect").astype(np.float32))
        found.append(np.asarray(whole.rotate(degrees, Image.Resampling.BILINEAR))[wide:-wide, wide:-wide])
    return np.stack(found)


def views_by_hand(image, rotations, brightness):
    """All views of a normalised image (3, H, W), the image itself first, (V, 3, H, W)."""
    levels = image.double().numpy() * STD[:, None, None] + MEAN[:, None, None]
    found = []
    for k in range(rotations):
        view = turned_by_pillow(levels, 360 * k / rotations)
        found += [view, *(np.clip(factor * view, 0, 1) for factor in brightness or ())]
    return torch.from_numpy((np.stack(found) - MEAN[:, None, None]) / STD[:, None, None]).float()


@pytest.mark.parametrize("size", [(9, 9), (12, 7), (3, 20), (1, 5), (300, 8)])
@pytest.mark.parametrize("degrees", [30, 45, 90, 135, 180, 270, 331.5])
def test_turned_is_what_pillow_turns(size, degrees):
    levels = np.random.default_rng(0).random((3, *size))
    found = turned(torch.from_numpy(levels)[None], degrees)[0]
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), turned_by_pillow(levels, degrees), atol=2e-5)
    whole = torch.from_numpy((255 * levels).round()).to(torch.uint8)
    expected = turned(whole.float()[None], degrees).round()
    assert torch.equal(turned(whole[None], degrees), expected.to(torch.uint8))


def test_right_angles_move_pixels():
    for square in (images(2), images(2, size=(33, 33))):
        for k in range(4):
            assert torch.equal(turned(square, 90 * k), torch.rot90(square, k, (2, 3)))
    assert torch.equal(turned(images(2, size=(20, 33)), 180), images(2, size=(20, 33)).flip(2, 3))


@pytest.mark.parametrize(("rotations", "brightness"), [(8, None), (1, (0.5, 1.6)), (3, (0.8, 0.9)), (4, (1.0, 1.2))])
def test_views(rotations, brightness):
    views, image = ReferenceViews(rotations, brightness), images(1, size=(20, 26))
    found = list(views.of(image, None))
    factors = [factor for factor in brightness or () if factor != 1]
    expected = views_by_hand(image[0], rotations, factors)
    assert len(found) == len(views) == len(expected) == rotations * (1 + len(factors))
    assert found[0][0] is image
    torch.testing.assert_close(torch.cat([view for view, _ in found]), expected, rtol=0, atol=2e-4)
    levels = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8)
    for (view, _), factor in zip(ReferenceViews(1, (0.5, 1.7)).of(levels, None), (1, 0.5, 1.7), strict=True):
        assert torch.equal(view, (levels.double() * factor).round().clamp(0, 255).to(torch.uint8))


@pytest.mark.parametrize("degrees", [0.0, 45.0, 90.0, 200.0])
@pytest.mark.parametrize("size", [(6, 6), (9, 5)])
def test_what_counts_is_turned_with_the_image(degrees, size):
    """Place by place: the pixel of the original that is seen at its middle."""
    region, box = np.zeros((40, 60), np.uint8), (-4.0, 6.0, 44.0, 50.0)
    region[3:20, 10:33] = region[20:30, 25:50] = 1
    given = {"original_size": torch.tensor([[40, 60]]), "crop_box": torch.tensor([box]), "region": region[None]}
    height, width = 24, 22  # of the input
    found = Counted.of(given).turned(Turn(degrees, (height, width))).at(*size)[0]
    angle = np.radians(degrees)
    for i in range(size[0]):
        for j in range(size[1]):
            down, across = (i + 0.5) * height / size[0] - height / 2, (j + 0.5) * width / size[1] - width / 2
            y = height / 2 + np.cos(angle) * down + np.sin(angle) * across - 0.5
            x = width / 2 + np.cos(angle) * across - np.sin(angle) * down - 0.5
            while not (0 <= y <= height - 1 and 0 <= x <= width - 1):
                y, x = abs(y), abs(x)
                y = 2 * (height - 1) - y if y > height - 1 else y
                x = 2 * (width - 1) - x if x > width - 1 else x
            row = int(np.floor(box[0] + (y + 0.5) * (box[2] - box[0]) / height + 1e-9))
            column = int(np.floor(box[1] + (x + 0.5) * (box[3] - box[1]) / width + 1e-9))
            assert found[i, j] == (0 <= row < 40 and 0 <= column < 60 and bool(region[row, column])), (i, j)


def model_of(**options):
    settings = {"layers": ["fine"], "resize": None, "crop": None, "coreset_method": "none"}
    return PatchCore(TinyBackbone(), **(settings | options))


def fit(trainer, model, pictures, **loading):
    trainer(enable_checkpointing=False).fit(model, DataLoader(pictures, **({"batch_size": 3} | loading)))
    return model


BOTH = {"reference_rotations": 8, "reference_brightness": (0.8, 1.2)}


def patches_by_hand(member, pictures, rotations=8, brightness=(0.8, 1.2)):
    """Patch features (n, V h w, D) of all views of each picture."""
    views = [views_by_hand(picture, rotations, brightness) for picture in pictures]
    return torch.stack([member.patch_features(each).flatten(0, 2) for each in views])


@pytest.mark.parametrize("size", [(SIDE, SIDE), (24, 40)])
def test_the_memory_bank_holds_all_views(trainer, caplog, size):
    pictures = images(5, size=size)
    with caplog.at_level(logging.INFO):
        model = fit(trainer, model_of(**BOTH), pictures)
    expected = patches_by_hand(model.model, pictures)
    bank, patches = model.memory_bank, size[0] // 4 * (size[1] // 4)
    torch.testing.assert_close(bank.features, expected.flatten(0, 1), rtol=1e-3, atol=1e-3)
    assert bank.images.tolist() == [image for image in range(5) for _ in range(24 * patches)]
    assert bank.seen.item() == 5 * 24 * patches
    assert f"collecting {5 * 24 * patches:,} patch features" in caplog.text
    assert "5 images: 5 in the memory bank" in caplog.text
    other = fit(trainer, model_of(**BOTH), pictures, batch_size=1)
    torch.testing.assert_close(other.memory_bank.features, bank.features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["none", "greedy"])
def test_leave_one_out_leaves_out_all_views(trainer, method):
    pictures = images(6)
    options = {"calibration": "leave_one_out", "coreset_method": method, "coreset_ratio": 0.25}
    model = fit(trainer, model_of(**BOTH, **options), pictures)
    member, views = model.model, patches_by_hand(model.model, pictures)
    bank, patches = member.memory_bank.features, member.patch_features(pictures).double().numpy()
    near = torch.stack([torch.cdist(bank, each).amin(1) for each in views], 1)  # (M, n): of the row to each image
    assert torch.equal(near.argmin(1).int(), member.memory_bank.images)
    scores, peaks = [], []
    for image in range(6):
        foreign = bank[near.argmin(1) != image].double().numpy()
        score, heat = score_and_map(patches[image], foreign, (SIDE, SIDE), 1, False, 9, 4.0)
        scores.append(score)
        peaks.append(heat.max())
    np.testing.assert_allclose(member.calibration.scores, scores, rtol=2e-5)
    np.testing.assert_allclose(member.calibration.peaks, peaks, rtol=2e-5)
    assert member.calibration.images.tolist() == list(range(6))
    assert sorted(each.image for each in model.training_images) == list(range(6))


def test_held_out_images_are_scored_as_they_are(trainer):
    pictures = images(8)
    model = fit(trainer, model_of(calibration_share=0.3, **BOTH), pictures)
    calibration = model.model.calibration
    inside = [image for image in range(8) if image not in calibration.images.tolist()]
    assert len(inside) == 6
    expected = patches_by_hand(model.model, pictures[inside]).flatten(0, 1)
    torch.testing.assert_close(model.memory_bank.features, expected, rtol=1e-3, atol=1e-3)
    scores, _ = model.model(pictures[calibration.images.long()])
    torch.testing.assert_close(calibration.scores, scores, rtol=1e-5, atol=1e-6)
    fitting = Fitting(model.model, images=8, calibration_share=0.3, references=model.references)
    fitting.add(pictures)
    assert [each.number for each in fitting.collections[0].held_out_images()] == [64, 64]
    fitting.close()


@pytest.mark.parametrize("options", [{"calibration": "leave_one_out"}, {"calibration_share": 0.2}])
def test_one_image_has_no_threshold(trainer, caplog, options):
    model = fit(trainer, model_of(**BOTH, **options), images(1))
    assert model.memory_bank.size == 24 * 64
    assert model.image_threshold is model.pixel_threshold is None
    assert len([message for message in caplog.messages if "threshold" in message]) == 1


@pytest.mark.parametrize("tile", [None, 24])
@pytest.mark.parametrize("foreground", ["none", "brightness"])
def test_regions_tiles_and_sizes(trainer, tile, foreground):
    """Images of two sizes: each view's patches that count, of the whole or in tiles."""

    class Mixed(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            size = (40, 56) if i == 2 else (32, 32)
            region = torch.zeros(size, dtype=torch.uint8)
            region[: size[0] // 2 + 8 * (i == 1), : size[1] // 3] = 1
            image = images(1, i, size)[0]
            image[:, 8:24, 4:20] += 0.2 * (foreground != "none")
            if tile is not None:
                image = torch.from_numpy(np.round(255 * (image.numpy().T * STD + MEAN).T.clip(0, 1))).to(torch.uint8)
            box = torch.tensor([0.0, 0.0, *map(float, size)])
            return {"image": image, "region": region, "original_size": torch.tensor(size), "crop_box": box}

    options = {"reference_rotations": 3, "reference_brightness": (0.9, 1.0), "tile": tile, "foreground": foreground}
    model = model_of(calibration="leave_one_out", **options)
    fit(trainer, model, Mixed(), collate_fn=collate, batch_size=2)
    expected = []
    for i in range(3):
        batch = collate([Mixed()[i]])
        for view, inside in model.references.of(batch["image"], Counted.of(batch)):
            bands = model.patch_features.bands(view, raw=foreground != "none")
            if foreground != "none":
                bands, inside = model.model.in_front(bands, view, inside)
            patches = torch.cat([band.features for band in bands], 1)[0]
            expected.append(patches[inside.at(*patches.shape[:2])[0]])
    assert len(expected) == 3 * 6
    torch.testing.assert_close(model.memory_bank.features, torch.cat(expected), rtol=1e-5, atol=1e-6)
    for i, score in enumerate(model.model.calibration.scores):
        batch = collate([Mixed()[i]])
        found, _ = score_without_rows(model.model, batch["image"], i, Counted.of(batch))
        torch.testing.assert_close(score, found[0], rtol=1e-5, atol=1e-6)


def test_a_view_of_which_nothing_counts_is_passed_over():
    """The part at the left edge of a wide image is not seen when it is turned by a right angle."""
    model, size = model_of().model, (16, 80)
    region = np.zeros((1, *size), np.uint8)
    region[0, :, :8] = 1
    batch = {"original_size": torch.tensor([size]), "crop_box": torch.tensor([[0.0, 0.0, 16.0, 80.0]])}
    inside = Counted.of(batch | {"region": region})
    fitting = Fitting(model, images=1, references=ReferenceViews(4))
    fitting.add(images(1, size=size), counted=inside)
    fitting.select()
    assert model.memory_bank.size == 2 * 4 * 2
    fitting.close()


def test_update_copies_and_files(trainer):
    model = fit(trainer, model_of(calibration="leave_one_out", **BOTH), images(3))
    file = io.BytesIO()
    write_checkpoint(model, file)
    file.seek(0)
    again = PatchCore.load_from_checkpoint(file, backbone=TinyBackbone())
    others = again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    new = images(2, seed=1)
    for each in others:
        assert each.references == model.references == ReferenceViews(8, (0.8, 1.2))
        each.update(trainer(enable_checkpointing=False), DataLoader(new, 2))
        assert each.memory_bank.images.tolist() == [image for image in range(5) for _ in range(24 * 64)]
        assert each.model.calibration.images.tolist() == [-1, -1, -1, 0, 1]
        expected = patches_by_hand(each.model, torch.cat([images(3), new])).flatten(0, 1)
        torch.testing.assert_close(each.memory_bank.features, expected, rtol=1e-3, atol=1e-3)


def test_ensembles_and_callback(trainer):
    import lightning as L

    members = [{"layers": ["fine"]}, {"layers": ["coarse"]}]
    pictures = images(4)
    model = fit(trainer, model_of(ensemble={"members": members}, calibration="leave_one_out", **BOTH), pictures)
    for member in model.model.members:
        expected = patches_by_hand(member, pictures).flatten(0, 1)
        torch.testing.assert_close(member.memory_bank.features, expected, rtol=1e-3, atol=1e-3)

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder = TinyBackbone()

        def training_step(self, batch, number):
            return self.encoder(batch).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    options = {"resize": SIDE, "crop": None, "coreset_method": "none", "reference_rotations": 4}
    callback = MemoryBankCallback("encoder", ["fine"], **options)
    trainer(callbacks=[callback], enable_checkpointing=False).fit(Module(), DataLoader(pictures, 2))
    assert callback.patchcore.memory_bank.size == 4 * 4 * 64


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_near_copies_are_noticed(trainer, caplog, share):
    pictures = images(8)
    options = {"calibration": "leave_one_out", "coreset_method": "greedy", "coreset_ratio": share, **BOTH}
    for others, seen in ((pictures + 0.003 * images(8, seed=1), True), (images(8, seed=2), False)):
        caplog.clear()
        fit(trainer, model_of(**options), torch.cat([pictures, others.clamp(pictures.min(), pictures.max())]))
        assert ("have a near-copy among the training images" in caplog.text) == seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_rotations": 0}, "reference_rotations must be from 1"),
        ({"reference_rotations": 361}, "reference_rotations must be from 1"),
        ({"reference_rotations": 2.5}, "reference_rotations must be a whole number"),
        ({"reference_brightness": (1.2, 0.8)}, r"the lower one first, such as \[0.8, 1.2\], got \[1.2, 0.8\]"),
        ({"reference_brightness": (0, 1)}, "two factors above 0"),
        ({"reference_brightness": 0.8}, "reference_brightness must be a list of 2"),
        ({"reference_brightness": (0.8, 1, 1.2)}, "reference_brightness must be a list of 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        model_of(**options)


def test_images_normalised_otherwise_are_refused(trainer):
    with pytest.raises(UserError, match=r"reference_brightness needs images of \[0, 1\].* reach from .*; set both to"):
        fit(trainer, model_of(**BOTH), 2 * images(2))
    fit(trainer, model_of(reference_rotations=2), 2 * images(2))
