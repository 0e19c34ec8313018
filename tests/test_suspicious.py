"""Training images that stand out by their leave-one-out scores: named, listed, and left out on request."""

import csv
import logging

import lightning as L
import numpy as np
import pytest
import torch
from networks import TinyBackbone
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from pl_patchcore import FolderDataModule, MemoryBankCallback, PatchCore, UserError
from pl_patchcore.files import spreadsheet_cell
from pl_patchcore.leave_one_out import score_without_rows
from pl_patchcore.report import TrainingImagesReport
from pl_patchcore.suspicious import stands_out_above, worst_groups

BAD = {3: 4.0, 11: 6.0, 17: 5.0}  # image: how much stronger a corner is than in the others


def images(number=24, bad=BAD, seed=0):
    pictures = torch.rand(number, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    for image, strength in bad.items():
        pictures[image, :, :8, :8] *= strength
    return pictures


def model_of(**options):
    settings = {"layers": ["fine"], "resize": None, "crop": None, "coreset_ratio": 0.25, "calibration": "leave_one_out"}
    return PatchCore(TinyBackbone(), **(settings | options))


def fit(trainer, model, loader, **options):
    trainer(enable_checkpointing=False, **options).fit(model, loader)
    return model


def test_rule():
    draw = np.random.default_rng(0)
    scores = draw.gumbel(size=400) + 9
    middle = np.sort(scores)[199:201].mean()
    spread = np.sort(np.abs(scores - middle))[199:201].mean()
    assert stands_out_above(scores) == pytest.approx(middle + 3.5 * 1.4826 * spread)
    assert stands_out_above(scores * 1e-6) == pytest.approx(stands_out_above(scores) * 1e-6)
    far = np.concatenate([scores, np.full(100, 1e6)])  # a fifth of the images
    assert stands_out_above(far) < 20
    assert stands_out_above(scores[:9]) is None
    assert stands_out_above([*[1.0] * 11, *range(10)]) is None  # most are equal


def test_groups_are_left_out_whole_and_at_most_a_tenth():
    groups = {image: image // 3 for image in range(60)}
    assert worst_groups([8, 31, 2], groups) == {6, 7, 8, 30, 31, 32}
    assert worst_groups([8, 7, 6], groups) == {6, 7, 8}
    assert worst_groups([8], {image: image // 3 for image in range(29)}) == frozenset()
    assert worst_groups([], {}) == frozenset()


def test_those_that_stand_out_are_named_worst_first(trainer, caplog):
    model = fit(trainer, model_of(), DataLoader(images(), 4))
    found = model.training_images
    assert [each.image for each in found[:3]] == [11, 17, 3]
    assert [each.name for each in found[:3]] == ["11", "17", "3"]
    assert [each.stands_out for each in found] == [True] * 3 + [False] * 21
    assert not any(each.left_out for each in found)
    scores = model.model.calibration.scores
    assert [each.score for each in found] == scores.sort(descending=True).values.tolist()
    named = ", ".join(f"{image} ({scores[image]:.4g})" for image in (11, 17, 3))
    assert f"3 of 24 training images stand out from the others by their score: {named}. Look" in caplog.text
    assert len(model.memory_bank.images.unique()) == 24
    caplog.clear()
    fit(trainer, model, DataLoader(images(bad={}, seed=6), 4))
    assert "stand out" not in caplog.text
    caplog.set_level(logging.INFO)
    fit(trainer, model_of(drop_suspicious=True), DataLoader(images(bad={}, seed=6), 4))
    assert "drop_suspicious: none of 24 training images stands out; none is left out." in caplog.messages


def test_few_images(trainer, caplog):
    caplog.set_level(logging.INFO)
    for drop in (False, True):
        caplog.clear()
        model = fit(trainer, model_of(drop_suspicious=drop), DataLoader(images(9, {3: 6.0}), 4))
        assert "which training images stand out needs 10 scores that differ: none of 9 is named." in caplog.text
        assert not any(each.stands_out for each in model.training_images)
    fit(trainer, model_of(calibration="none"), DataLoader(images(), 4))
    assert model_of().training_images == []


class Stream(IterableDataset):
    def __init__(self, pictures):
        self.pictures = pictures

    def __iter__(self):
        return iter(self.pictures)


SETTINGS = {
    "greedy": {},
    "approximate": {"coreset_method": "approximate"},
    "random": {"coreset_method": "random", "seed": 3},
    "none": {"coreset_method": "none"},
    "projected": {"projection_dim": 4},
    "on disk": {"store": {"kind": "disk"}, "projection_dim": 4},
    "bounded": {"store": {"selection_memory": 600 * (16 * 8 + 96) / 2**30}, "coreset_ratio": 0.1},
    "on disk, random": {"store": {"kind": "disk"}, "coreset_method": "random"},
    "few scored": {"calibration_images": 20},
    "stream": {},
    "shuffled": {"projection_dim": 4},
}


def same(one, other):
    """All that a fit makes; the images of the calibration apart, which are numbered in their data set."""
    state, expected = one.model.state_dict(), other.model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert name == "calibration.images" or torch.equal(state[name], value), name


@pytest.mark.parametrize("name", SETTINGS)
def test_bank_equals_that_of_a_fit_without_them(trainer, name, caplog):
    caplog.set_level(logging.INFO)
    pictures = images()
    if name == "shuffled":  # the data set's order counts
        draw = torch.Generator().manual_seed(1)
        model = fit(trainer, model_of(drop_suspicious=True, **SETTINGS[name]), shuffled(pictures, draw))
    else:
        loader = DataLoader(Stream(pictures) if name == "stream" else pictures, 1)
        model = fit(trainer, model_of(drop_suspicious=True, **SETTINGS[name]), loader)
    left_out = [each.image for each in model.training_images if each.left_out]
    assert left_out == [11, 17] or name == "few scored"  # a tenth of 24, the worst
    kept = [place for place in range(24) if place not in left_out]
    same(model, fit(trainer, model_of(**SETTINGS[name]), DataLoader(pictures[kept], 1)))
    assert not {*left_out} & {*model.model.calibration.images.tolist()}
    scored = min(22, SETTINGS[name].get("calibration_images", 22))
    assert f"24 images: 22 in the memory bank, 0 held out, 2 left out as suspicious; thresholds from {scored}" in (
        caplog.text
    )
    assert "2 of 24 training images are left out, and the memory bank is selected again; the rate" in caplog.text
    assert {each.group for each in model.training_images if each.left_out} == {None}


def shuffled(pictures, draw):
    order = torch.randperm(len(pictures), generator=draw).tolist()
    return DataLoader([{"image": pictures[place], "index": place} for place in order], 1)


def test_members_of_an_ensemble_leave_the_same_images_out(trainer):
    members = [{"layers": ["fine"]}, {"layers": ["coarse"], "coreset_method": "random", "num_neighbors": 2}]
    pictures, kept = images(), [place for place in range(24) if place not in (11, 17)]
    model = fit(trainer, model_of(ensemble={"members": members}, drop_suspicious=True), DataLoader(pictures, 1))
    same(model, fit(trainer, model_of(ensemble={"members": members}), DataLoader(pictures[kept], 1)))


def test_groups(trainer):
    pictures, groups = images(), [place // 2 for place in range(24)]
    loader = DataLoader([{"image": image, "group": group} for image, group in zip(pictures, groups, strict=True)], 1)
    model = fit(trainer, model_of(drop_suspicious=True), loader)
    dropped = {each.image // 2 for each in model.training_images if each.left_out}
    assert len(dropped) == 1
    kept = [place for place in range(24) if place // 2 not in dropped]
    named = [{"image": pictures[place], "group": groups[place]} for place in kept]
    other = fit(trainer, model_of(), DataLoader(named, 1))
    assert torch.equal(model.memory_bank.features, other.memory_bank.features)
    assert torch.equal(model.memory_bank.images, other.memory_bank.images)


def test_update_leaves_out_new_images_only(trainer, caplog):
    old, new = images(), images(20, {5: 16.0, 6: 8.0, 7: 4.0}, seed=1)
    model, other = (fit(trainer, model_of(drop_suspicious=drop), DataLoader(old, 1)) for drop in (False, False))
    model.drop_suspicious = True
    caplog.clear()
    model.update(trainer(enable_checkpointing=False), DataLoader(new, 1))
    assert [each.image for each in model.training_images if each.left_out] == [5, 6]
    assert "drop_suspicious leaves out at most a tenth of the images: " in caplog.text
    kept = [place for place in range(20) if place not in (5, 6)]
    other.update(trainer(enable_checkpointing=False), DataLoader(new[kept], 1))
    same(model, other)
    few = images(4, {2: 64.0}, seed=2)  # which earlier scores are enough to judge by
    model.update(trainer(enable_checkpointing=False), DataLoader(few, 1))
    assert [each.image for each in model.training_images if each.stands_out] == [2]


class Trained(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = TinyBackbone()

    def training_step(self, batch, number):
        return self.encoder(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_of_an_encoder_of_ones_own(trainer):
    options = {"resize": None, "crop": None, "calibration": "leave_one_out", "drop_suspicious": True}
    callback = MemoryBankCallback("encoder", ["fine"], DataLoader(images(), 4), **options)
    trainer(max_epochs=1, callbacks=[callback]).fit(Trained(), DataLoader(images(8, {}), 4))
    assert [each.image for each in callback.patchcore.training_images if each.left_out] == [11, 17]
    assert len(callback.patchcore.memory_bank.images.unique()) == 22


@pytest.mark.parametrize("options", [{"calibration": None}, {"calibration": "images"}, {"calibration": "none"}])
def test_refused_without_leave_one_out(options):
    with pytest.raises(UserError, match="drop_suspicious goes by the scores of calibration leave_one_out, got"):
        model_of(drop_suspicious=True, **options)


def test_scores_without_the_rows_of_a_group(trainer):
    pictures = images()
    model = fit(trainer, model_of(), DataLoader(pictures, 1))
    for each in model.training_images[:5]:
        score, maps = score_without_rows(model.model, pictures[each.image : each.image + 1], each.group)
        assert score.item() == pytest.approx(each.score, rel=1e-5)
        assert maps.shape == (1, 32, 32)


BRIGHT = {4: (255, 255, 255), 13: (255, 120, 0)}


@pytest.fixture
def folder(tmp_path):
    """Photographs, two of which are unlike the others."""
    draw = np.random.default_rng(0)
    (where := tmp_path / "photos").mkdir()
    for place in range(20):
        pixels = draw.integers(80, 120, size=(32, 32, 3), dtype=np.uint8)
        if place in BRIGHT:  # which is farther from grey than the other is
            pixels[:8, :8] = BRIGHT[place]
        Image.fromarray(pixels).save(where / f"{place:02d}.png")
    return where


def test_report(trainer, folder, tmp_path, caplog, capsys):
    (pictures := tmp_path / "training_images").mkdir()
    (pictures / "003-old.jpg").touch()
    (pictures / "mine.jpg").touch()
    options = {"callbacks": [TrainingImagesReport(pictures=2)]}
    model = model_of(resize=32, drop_suspicious=True)
    fit(trainer, model, FolderDataModule(nominal=str(folder), test_share=0, num_workers=0), **options)
    header, *rows = csv.reader((tmp_path / "training_images.csv").read_text(encoding="utf-8").splitlines())
    assert header == ["path", "score", "stands_out", "left_out"]
    assert [row[0] for row in rows[:2]] == [str(folder / "04.png"), str(folder / "13.png")]
    assert f"{folder / '04.png'} (" in caplog.text
    assert [row[3] for row in rows] == ["1"] * 2 + ["0"] * 18
    assert [row[2] for row in rows] == [str(int(each.stands_out)) for each in model.training_images]
    scores = [float(row[1]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert scores == pytest.approx([each.score for each in model.training_images], rel=1e-5)
    names = [f"{place:03d}-{rows[place - 1][0][-6:-4]}.jpg" for place in (1, 2)]
    assert sorted(path.name for path in pictures.iterdir()) == [*names, "mine.jpg"]
    for name in names:
        with Image.open(pictures / name) as picture:
            assert picture.width == 64
            pixels = np.asarray(picture.convert("L"), dtype=float)
        assert pixels[:8, :8].mean() > 140
        assert pixels[12:32, :32].mean() == pytest.approx(100, abs=8)
    assert "training_images.csv and 2 pictures" in capsys.readouterr().out
    fit(trainer, model_of(calibration="none"), DataLoader(images(), 4), **options)
    assert not (tmp_path / "training_images.csv").exists()
    assert sorted(path.name for path in pictures.iterdir()) == ["mine.jpg"]


def test_report_of_other_loaders(trainer, tmp_path):
    for loader, number in ((DataLoader(images(), 4), 4), (DataLoader(Stream(images()), 4), 0)):
        fit(trainer, model_of(), loader, callbacks=[TrainingImagesReport()])
        rows = [*csv.reader((tmp_path / "training_images.csv").read_text(encoding="utf-8").splitlines())]
        assert [row[0] for row in rows[1:4]] == ["11", "17", "3"]
        assert len([*(tmp_path / "training_images").glob("*.jpg")]) == number
    with pytest.raises(UserError, match="pictures must be 0 or more, got -1"):
        TrainingImagesReport(-1)


@pytest.mark.parametrize("name", ["=1+1.png", "+a", "-a", "@a", "\ta"])
def test_no_formula_for_a_spreadsheet(name):
    assert spreadsheet_cell(name) == f"./{name}"
    assert spreadsheet_cell("photos/=1.png") == "photos/=1.png"


def test_defects_of_different_kinds_come_first(trainer):
    """8 images among 50, each with a square of a colour of its own."""
    pictures = 0.4 + 0.2 * images(50, bad={})
    bad, draw = range(3, 50, 6), torch.Generator().manual_seed(0)
    for kind, image in enumerate(bad):
        top, left = torch.randint(24, (2,), generator=draw).tolist()
        colour = torch.tensor([kind // 4 % 2, kind // 2 % 2, kind % 2])[:, None, None]
        pictures[image, :, top : top + 8, left : left + 8] = colour * 3.0 - 1
    model = fit(trainer, model_of(), DataLoader(pictures, 10))
    assert len({*bad} & {each.image for each in model.training_images[:10]}) >= 7
