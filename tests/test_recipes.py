"""Options that combine to recipes, each against a slow reference, and AnomalyDINO's recipe step by step in float64."""

import logging

import fakes
import numpy as np
import pytest
import reference
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from pl_patchcore import PatchCore, PatchCoreModel, Preprocessing, UserError
from pl_patchcore.anomaly_map import AnomalyScorer
from pl_patchcore.cli import main
from pl_patchcore.configs import recipe
from pl_patchcore.counted import Counted
from pl_patchcore.data.base import collate
from pl_patchcore.fitting import Fitting
from pl_patchcore.foreground import first_component, foreground, middle_object
from pl_patchcore.memory_bank import MemoryBank
from pl_patchcore.patch_features import PatchFeatures

SIDE, CHANNELS = 14, 12


class Tokens(nn.Module):
    """Patches and a class token, attention, a norm: what a vision transformer is, of 12 numbers a token."""

    def __init__(self, length=10.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.patches = nn.Conv2d(3, CHANNELS, SIDE, SIDE)
            self.first = nn.Parameter(torch.randn(1, 1, CHANNELS))
            self.attention = nn.MultiheadAttention(CHANNELS, 2, batch_first=True)
            self.early, self.norm = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
            nn.init.constant_(self.norm.weight, length)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).mT
        tokens = self.early(torch.cat([self.first.expand(len(x), -1, -1), tokens], 1))
        return self.norm(tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0])


def pictures(number, seed=0, size=(61, 90)):
    """A bright thing in the middle of a dark image."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        pixels = rng.integers(0, 60, (*size, 3))
        pixels[size[0] // 5 : -size[0] // 5, size[1] // 6 : -size[1] // 6] += rng.integers(90, 190, 3)
        found.append(Image.fromarray(pixels.astype(np.uint8)))
    return found


def recipe_of(**changes):
    """The recipe at a size of tests, with a network of tests."""
    settings = recipe("anomalydino_448") | {"resize": 100}
    assert settings.pop("reference_rotations") == 8  # which the turned images test
    assert settings.pop("patches") == {"position_embedding": "dinov2"}  # which the backbones' tests test
    return settings | {"backbone": Tokens(), "layers": ["norm"], "weights": None} | changes


def tokens_of(image, side):
    """Float64 tokens ``(h, w, D)``: the shorter side resized, what is left of patches cut off, normalised."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    size = (side, side * long // short) if width == short else (side * long // short, side)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC)).astype(np.float64) / 255
    h, w = (length // SIDE for length in pixels.shape[:2])
    pixels = (pixels[: h * SIDE, : w * SIDE] - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return Tokens().double()(batch)[0, 1:].detach().numpy().reshape(h, w, CHANNELS)


def mask_of(tokens):
    """The authors' mask: threshold, a look at the middle, dilation and closing on one long line of patches."""
    h, w, _ = tokens.shape
    flat = tokens.reshape(h * w, -1)
    _, _, directions = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    direction = directions[0] * np.sign(directions[0][np.abs(directions[0]).argmax()])
    component = (flat - flat.mean(0)) @ direction
    mask = component > 10
    middle = mask.reshape(h, w)[int(h * 0.2) : int(h * 0.8), int(w * 0.2) : int(w * 0.8)]
    if middle.sum() <= middle.size * 0.35:
        mask = -component > 10
    for least in (1, 1, 3):  # dilated, dilated, eroded
        mask = [sum(part := mask[max(0, i - 1) : i + 2]) >= (1 if least == 1 else len(part)) for i in range(len(mask))]
    return np.array(mask).reshape(h, w)


def score_of(tokens, mask, bank, top=0.01):
    """Half of the least squared distance of unit vectors, masked patches 0; the mean of the top, and all of them."""
    unit = tokens / np.linalg.norm(tokens, axis=2, keepdims=True)
    distances = np.zeros(mask.shape)
    for y, x in np.argwhere(mask):
        distances[y, x] = ((bank - unit[y, x]) ** 2).sum(1).min() / 2
    number = max(1, int(distances.size * top))
    return np.sort(distances.ravel())[::-1][:number].mean(), distances


@pytest.mark.parametrize(("masked", "references"), [(True, False), (True, True), (False, False)])
def test_anomalydino_step_by_step(trainer, masked, references):
    import scipy.ndimage

    changes = {"mask_references": references, "foreground": "anomalydino" if masked else "none"}
    model = PatchCore(**recipe_of(**changes))
    train, test = pictures(3), pictures(3, 1) + pictures(1, 2, (90, 61))
    samples = [model.transform.apply(image) for image in train]
    trainer().fit(model, DataLoader(samples, batch_size=2, collate_fn=collate))
    tokens = [tokens_of(image, 100) for image in train]
    rows = [each[mask_of(each)] if masked and references else each.reshape(-1, CHANNELS) for each in tokens]
    bank = np.concatenate([each / np.linalg.norm(each, axis=1, keepdims=True) for each in rows])
    np.testing.assert_allclose(model.memory_bank.features.numpy(), bank, atol=1e-5)
    for image in test:
        sample = model.transform.apply(image)
        assert all(side % SIDE == 0 for side in sample["image"].shape[1:])
        score, maps = model(sample["image"][None])
        own = tokens_of(image, 100)
        np.testing.assert_allclose(
            model.patch_features(sample["image"][None])[0].numpy(),
            own / np.linalg.norm(own, axis=2, keepdims=True),
            atol=1e-5,
        )
        mask = mask_of(own) if masked else np.ones(own.shape[:2], bool)
        assert not masked or 0.1 < mask.mean() < 0.9  # or nothing is tested
        expected, distances = score_of(own, mask, bank)
        np.testing.assert_allclose(score.numpy(), [expected], rtol=1e-4)
        original = image.size[::-1]
        for size, found in ((maps.shape[1:], maps), (original, model(sample["image"][None], map_size=original)[1])):
            heat = scipy.ndimage.gaussian_filter(reference.bilinear(distances, size), 4.0)
            np.testing.assert_allclose(found[0].numpy(), heat, rtol=1e-4, atol=1e-6)


def test_the_middle_tells_which_side_is_the_object():
    rng = np.random.default_rng(0)
    for _ in range(50):
        component = rng.normal(rng.uniform(-9, 9), 8, (rng.integers(3, 9), rng.integers(3, 9)))
        flat = component.ravel()
        found = flat > 10
        h, w = component.shape
        middle = found.reshape(h, w)[int(0.2 * h) : int(0.8 * h), int(0.2 * w) : int(0.8 * w)]
        if middle.sum() <= 0.35 * middle.size:
            found = flat < -10
        near = [range(max(0, i - 1), min(len(flat), i + 2)) for i in range(len(flat))]
        wide = [any(found[j] for j in each) for each in near]
        wide = [any(wide[j] for j in each) for each in near]
        expected = [all(wide[j] for j in each) for each in near]
        assert middle_object(component).ravel().tolist() == expected


def test_the_components_sign_is_that_of_the_greatest_number_of_its_direction():
    features = torch.randn(3, 6, 7, 5, generator=torch.Generator().manual_seed(0))
    values = first_component(features)
    for one, turned in zip(values, first_component(features.flip(1)), strict=True):
        torch.testing.assert_close(one, turned.flip(0))
    flat = (features - features.mean((1, 2), keepdim=True)).flatten(1, 2).double()
    direction = (flat.mT @ values.flatten(1)[..., None])[..., 0]
    assert (direction.gather(1, direction.abs().argmax(1, keepdim=True)) > 0).all()


def fitted(images, scorer=None, **options):
    features = PatchFeatures(Tokens(options.pop("length", 10.0)), ["norm"], None, 1, normalize=True)
    model = PatchCoreModel(features, scorer=scorer, **options)
    fitting = Fitting(model, images=len(images))
    fitting.add(images)
    fitting.select()
    fitting.close()
    return model


def test_an_empty_mask(caplog):
    """Of the share of all patches, 0, and a warning; of those scored, all of the image; of training images, all."""
    images = torch.rand(2, 3, 42, 56)
    options = {"foreground": "anomalydino", "length": 0.1}
    zero = fitted(images, AnomalyScorer(image_score="top_mean", top_share_of="all"), **options)
    assert len(foreground("anomalydino", images, zero.patch_features(images)).nonzero()) == 0
    with caplog.at_level(logging.WARNING):
        scores, maps = zero(1 - images)
    assert "no object is found in 2 of 2 images, which score 0" in caplog.text
    assert not scores.any()
    assert not maps.any()
    whole = fitted(images, AnomalyScorer(), **options)
    plain = fitted(images, AnomalyScorer(), length=0.1)
    for model in (zero, whole):
        assert torch.equal(model.memory_bank.features, plain.memory_bank.features)
    assert torch.equal(whole(1 - images)[0], plain(1 - images)[0])


def test_unmasked_training_images_are_calibrated_with_the_mask(trainer):
    """Their scores are those of test images against a bank without them."""
    changes = {"calibration": "leave_one_out", "crop": [84, 98]}
    model = PatchCore(**recipe_of(**changes))
    samples = [model.transform.apply(image) for image in pictures(4)]
    trainer().fit(model, DataLoader(samples, batch_size=3, collate_fn=collate))
    assert model.memory_bank.size == 4 * 6 * 7
    images = torch.stack([sample["image"] for sample in samples])
    scores = []
    for i in range(4):
        bank = MemoryBank()
        bank.fill(model.memory_bank.features[model.memory_bank.images != i])
        scores.append(model.model(images[i : i + 1], bank=bank)[0])
    torch.testing.assert_close(model.model.calibration.scores, torch.cat(scores), rtol=1e-5, atol=0)


def test_distances_and_shares():
    g = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.ReLU())
    features = PatchFeatures(network, ["1"], None)
    bank = MemoryBank()
    bank.fill(torch.rand(30, 6, generator=g))
    images = torch.rand(2, 3, 40, 48, generator=g)
    region = np.zeros((40, 48), np.uint8)
    region[8:36, 4:40] = 1
    batch = {
        "original_size": torch.tensor([[40, 48]] * 2),
        "crop_box": torch.tensor([[0.0, 0.0, 40.0, 48.0]] * 2),
        "region": torch.from_numpy(region).expand(2, -1, -1),
    }
    inside = Counted.of(batch)
    cells = inside.at(10, 12)
    object_cells = torch.rand(2, 10, 12, generator=g) < 0.5
    both = Counted.of_objects(images, inside, object_cells)
    rows = features(images).double()
    distance = torch.cdist(rows.flatten(0, 2), bank.features.double()).min(1).values.view(2, 10, 12)
    options = {"image_score": "top_mean", "top_share": 0.1, "sigma": 0.0, "reweighting_neighbors": 1}
    for of, expected in (("scored", distance[cells & object_cells]), ("all", None)):
        scorer = AnomalyScorer(distance="half_squared", top_share_of=of, **options)
        scores, maps = scorer(features.bands(images), bank, (40, 48), both)
        for i in range(2):
            chosen = cells[i] & object_cells[i]
            values = distance[i][chosen].square() / 2
            if of == "all":
                values = torch.cat([values, torch.zeros(120 - len(values), dtype=torch.float64)])
            number = max(1, int(len(values) * 0.1))
            expected = values.sort(descending=True).values[:number].mean()
            torch.testing.assert_close(scores[i].double(), expected, rtol=1e-5, atol=0)
        missing = ~torch.from_numpy(region).bool() if of == "all" else None
        if missing is not None:  # what lies outside the object is 0, what lies outside the region is not known
            assert torch.equal(maps.isnan(), missing.expand(2, -1, -1))
            alone = cells & ~object_cells
            ring = torch.nn.functional.max_pool2d((cells & object_cells).float(), 3, 1, 1) > 0
            deep = (alone & ~ring).repeat_interleave(4, 1).repeat_interleave(4, 2) & ~maps.isnan()
            assert not maps[deep].any()


def test_unit_length_and_the_mean_of_layers(tiny, trainer):
    images = torch.rand(3, 3, 32, 48)
    plain = PatchFeatures(tiny, ["fine", "coarse"], None)(images)
    unit = PatchFeatures(tiny, ["fine", "coarse"], None, normalize=True)
    torch.testing.assert_close(unit(images), plain / plain.double().norm(dim=3, keepdim=True).float())
    assert torch.equal(unit(torch.zeros(1, 3, 32, 48)).norm(dim=3) <= 1 + 1e-6, torch.ones(1, 8, 12).bool())
    layers = PatchFeatures(Tokens(), ["early", "norm"], None, 1)
    mean = PatchFeatures(Tokens(), ["early", "norm"], None, 1, combine="mean")
    pictures = torch.rand(2, 3, 42, 56)
    torch.testing.assert_close(mean(pictures), layers(pictures).unflatten(3, (2, CHANNELS)).mean(3))
    assert (mean.dimension, layers.dimension) == (CHANNELS, 2 * CHANNELS)
    pooled = PatchFeatures(tiny, ["fine", "coarse"], None, layer_dim=16, feature_dim=10, combine="mean")
    assert pooled(images).shape[3] == pooled.dimension == 10
    with pytest.raises(UserError, match=r"patches\.combine mean needs layers with as many channels each, fine, coarse"):
        PatchCore(tiny, ["fine", "coarse"], None, patches={"combine": "mean"})


def test_checkpoints_know_what_their_features_were(trainer, tmp_path):
    """One from before these options has their defaults; another setting is refused."""
    options = {"backbone": Tokens(), "layers": ["early", "norm"], "weights": None, "resize": 56, "crop": None}
    model = PatchCore(**options, normalize_features=True, patches={"combine": "mean"})
    trainer().fit(model, DataLoader(torch.rand(3, 3, 56, 56), batch_size=2))
    model.save(tmp_path / "model.ckpt")
    loaded = PatchCore.load_from_checkpoint(tmp_path / "model.ckpt", backbone=Tokens())
    images = torch.rand(2, 3, 56, 56)
    assert torch.equal(loaded(images)[0], model(images)[0])
    with pytest.raises(UserError, match="normalize_features True, here None"):
        PatchCore.load_from_checkpoint(tmp_path / "model.ckpt", backbone=Tokens(), normalize_features=False)
    plain = PatchCore(**options)
    trainer().fit(plain, DataLoader(torch.rand(3, 3, 56, 56), batch_size=2))
    plain.save(tmp_path / "plain.ckpt")
    file = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    for name in ("combine", "normalize_features"):
        del file["patchcore"]["identity"][name]
    del file["patchcore"]["identity"]["preprocessing"]["crop_multiple"]
    for name in ("top_share_of", "normalize_features", "position_radius", "mask_references"):
        del file["hyper_parameters"][name]
    for name in ("places", "grid"):
        del file["state_dict"][f"model.memory_bank.{name}"]
    torch.save(file, tmp_path / "older.ckpt")
    older = PatchCore.load_from_checkpoint(tmp_path / "older.ckpt", backbone=Tokens())
    assert torch.equal(older(images)[0], plain(images)[0])
    with pytest.raises(UserError, match="normalize_features None, here True"):
        PatchCore.load_from_checkpoint(tmp_path / "older.ckpt", backbone=Tokens(), normalize_features=True)


@pytest.mark.parametrize("size", [(61, 90), (90, 61), (112, 112), (40, 200)])
@pytest.mark.parametrize("mode", ["shorter_side", "squash", "longer_side"])
def test_crop_to_multiples(size, mode):
    """The right and the bottom are left out, and the geometry says so."""
    transform = Preprocessing(100, None, mode, crop_multiple=14)
    whole = Preprocessing(100, None, mode)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8))
    mask = np.random.default_rng(1).integers(0, 2, size, np.uint8)
    found, expected = transform.apply(image, mask), whole.apply(image, mask)
    h, w = (side - side % 14 for side in expected["image"].shape[1:])
    assert torch.equal(found["image"], expected["image"][:, :h, :w])
    assert torch.equal(found["mask"], expected["mask"][:h, :w])
    down, across = whole.scale(*size)
    box = expected["crop_box"]
    np.testing.assert_allclose(found["crop_box"], [box[0], box[1], box[0] + h * down, box[1] + w * across], rtol=1e-6)
    assert transform.size == (None if mode == "shorter_side" else (98, 98))
    assert transform.geometry(*size).size == (h, w)


def test_crop_to_multiples_of_a_crop_and_refused():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    found = Preprocessing(64, 60, crop_multiple=14)(image)
    assert torch.equal(found, Preprocessing(64, 60)(image)[:, :56, :56])
    with pytest.raises(UserError, match=r"images\.crop_multiple must be from 1 to the input's sides, got 70"):
        PatchCore(Tokens(), ["norm"], None, images={"crop_multiple": 70}, resize=64, crop=60)
    with pytest.raises(UserError, match=r"images\.crop_multiple 14 leaves nothing of 10x70 pixels"):
        Preprocessing(None, None, crop_multiple=14).geometry(10, 70)


@pytest.mark.slow
def test_by_command(tmp_path, monkeypatch, capsys):
    """A configuration file and options, from images to scores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.formatwarning", None)
    root = fakes.mvtec(tmp_path / "data", ["bottle"])
    own = {"foreground": "brightness", "distance": "half_squared", "normalize_features": True}
    model = {
        "backbone": "resnet18", "layers": ["layer1"], "weights": None, "resize": 64, "crop": None,
        "image_score": "top_mean", "top_share_of": "all", "images": {"crop_multiple": 24},
    }  # fmt: skip
    data = {"class_path": "MVTecDataModule", "init_args": {"root": str(root), "num_workers": 0}}
    trainer = {"default_root_dir": "out", "accelerator": "cpu"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model": model | own, "data": data, "trainer": trainer}))
    words = ["--data.category", "bottle", "--data.shots", "2", "--data.shots_order", "sorted"]
    words += ["--model.position_radius", "2", "--model.mask_references", "false", "--model.patches.combine", "mean"]
    main(["run", "--config", "own.yaml", *words])
    (path,) = (tmp_path / "out").rglob("*.ckpt")
    module = PatchCore.load_from_checkpoint(path)
    assert module.memory_bank.position_radius == 2
    assert module.memory_bank.grid.tolist() == [12, 12]
    assert module.memory_bank.size == int(0.1 * 2 * 144)
    assert (module.model.scorer.top_share_of, module.model.mask_references) == ("all", False)
    figures = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("image", "pixel", "PRO"))]
    main(["test", "--ckpt_path", str(path), "--config", "own.yaml", *words[:2]])
    printed = capsys.readouterr().out
    assert len(figures) == 3
    assert all(line in printed for line in figures)
