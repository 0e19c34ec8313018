"""Training images scored without their own rows of the memory bank, against a slow loop in float64."""

import io
import logging

import numpy as np
import pytest
import torch
from networks import TinyBackbone
from reference import score_and_map
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pl_patchcore import PatchCore, UserError
from pl_patchcore.calibration import Calibration, draw_one_of_each, promised_rates
from pl_patchcore.memory_bank import ForeignRows, MemoryBank

SIDE = 32


def images(number, seed=0):
    return torch.rand(number, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def model_of(**options):
    settings = {"layers": ["fine"], "resize": None, "crop": None, "coreset_ratio": 0.25, "calibration": "leave_one_out"}
    return PatchCore(TinyBackbone(), **(settings | options))


def samples(pictures, groups=None):
    """A loader of dicts, as a data module gives them."""
    named = [{"image": image} for image in pictures]
    for sample, group in zip(named, groups or [], strict=groups is not None):
        sample["group"] = group
    return DataLoader(named, batch_size=4)


def fit(trainer, model, loader):
    trainer(enable_checkpointing=False).fit(model, loader)
    return model


def own_rows(member, pictures):
    """For each row of the memory bank the images that hold it, bool (M, n): by their values, to which it is equal."""
    patches = member.patch_features(pictures).flatten(1, 2).double()
    return torch.stack([(torch.cdist(member.memory_bank.features.double(), each) < 1e-5).any(1) for each in patches], 1)


def expected(member, pictures, left_out):
    """Scores and peaks (n,) of the pictures, each against the bank without the rows of those ``left_out`` with it."""
    patches, own = member.patch_features(pictures).double().numpy(), own_rows(member, pictures)
    scorer, found = member.scorer, []
    for place, others in enumerate(left_out):
        bank = member.memory_bank.features[~own[:, others].any(1)].double().numpy()
        score, heat = score_and_map(
            patches[place], bank, pictures.shape[2:], min(scorer.num_neighbors, len(bank)),
            scorer.distance == "squared", scorer.reweighting_neighbors, scorer.sigma,
        )  # fmt: skip
        found.append((score, heat.max()))
    return np.array(found).T


SETTINGS = {
    "greedy": {},
    "approximate": {"coreset_method": "approximate"},
    "random": {"coreset_method": "random"},
    "none": {"coreset_method": "none"},
    "three neighbours": {"num_neighbors": 3, "sigma": 0.0},
    "squared": {"distance": "squared", "reweighting_neighbors": 1},
    "on disk": {"store": {"kind": "disk"}, "projection_dim": 4},
    "bounded": {"store": {"selection_memory": 300 * (16 * 8 + 96) / 2**30}, "coreset_ratio": 0.1},
    "int8": {"search": "int8"},
    "index of faiss": {"search": "HNSW8"},
    "few rows": {"coreset_size": 5, "reweighting_neighbors": 30, "num_neighbors": 30},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_are_those_of_a_bank_without_own_rows(trainer, name):
    model, pictures = model_of(**SETTINGS[name]), images(8)
    fit(trainer, model, DataLoader(pictures, 3))
    own = own_rows(model.model, pictures)
    assert own[torch.arange(len(own)), model.memory_bank.images.long()].all()
    scores, peaks = expected(model.model, pictures, [[place] for place in range(8)])
    calibration = model.model.calibration
    np.testing.assert_allclose(calibration.scores, scores, rtol=2e-5)
    np.testing.assert_allclose(calibration.peaks, peaks, rtol=2e-5)
    assert calibration.images.tolist() == list(range(8))
    assert calibration.images.dtype == model.memory_bank.images.dtype == torch.int32


def test_streams_and_few_images_drawn(trainer, caplog):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(images(8))

    whole = fit(trainer, model_of(), DataLoader(images(8), 8)).model.calibration
    with caplog.at_level(logging.INFO):
        found = fit(trainer, model_of(calibration_images=5), DataLoader(Stream(), 3)).model.calibration
    assert len(found.scores) == 5
    torch.testing.assert_close(found.scores, whole.scores[found.images.long()])
    assert "scoring 5 of 8 training images without their own rows, about " in caplog.text
    assert "thresholds from 5 training images, each scored without its own rows" in caplog.text


def test_groups_are_left_out_whole_and_count_as_one(trainer):
    pictures, groups = images(8), [7, 7, 3, 7, 3, 900, 901, 3]
    model = fit(trainer, model_of(), samples(pictures, groups))
    numbers = [0, 0, 1, 0, 1, 2, 3, 1]  # in order of the first image
    own = own_rows(model.model, pictures)
    assert all(
        numbers[own[row].int().argmax()] == number for row, number in enumerate(model.memory_bank.images.tolist())
    )
    calibration, alike = model.model.calibration, [[i for i in range(8) if groups[i] == group] for group in groups]
    assert sorted(groups[image] for image in calibration.images) == [3, 7, 900, 901]
    scores, _ = expected(model.model, pictures, alike)
    np.testing.assert_allclose(calibration.scores, scores[calibration.images.numpy()], rtol=2e-5)


def test_held_out_groups_are_whole(trainer):
    groups = [place // 4 * 4 for place in range(40)]
    model = model_of(calibration=None, calibration_share=0.3, coreset_method="none")
    fit(trainer, model, samples(images(40), groups))
    inside = set(model.memory_bank.images.tolist())
    assert 0 < len(inside) < 10
    assert len(model.model.calibration.scores) == 10 - len(inside)
    assert not inside & {image // 4 for image in model.model.calibration.images.tolist()}


def test_members_of_an_ensemble_leave_the_same_image_out(trainer):
    members = [{"layers": ["fine"]}, {"layers": ["coarse"], "coreset_method": "random", "num_neighbors": 2}]
    model, pictures = model_of(ensemble={"members": members}), images(8)
    fit(trainer, model, DataLoader(pictures, 4))
    each = [expected(member, pictures, [[i] for i in range(8)]) for member in model.model.members]
    scores = np.mean([found[0] / scale for found, scale in zip(each, model.model.scale.tolist(), strict=True)], 0)
    np.testing.assert_allclose(model.model.calibration.scores, scores, rtol=2e-5)
    with pytest.raises(UserError, match="test_range looks at the test set and cannot be calibrated"):
        model_of(ensemble={"members": members, "combine": "test_range"})


def test_update_keeps_scores_and_adds_those_of_new_images(trainer):
    old, new = images(6), images(5, seed=1)
    model = fit(trainer, model_of(), DataLoader(old, 4))
    before = model.model.calibration.scores.clone()
    model.update(trainer(enable_checkpointing=False), DataLoader(new, 4))
    calibration, bank = model.model.calibration, model.memory_bank
    assert calibration.images.tolist() == [-1] * 6 + list(range(5))
    assert torch.equal(calibration.scores[:6], before)
    every = torch.cat([old, new])
    scores, _ = expected(model.model, every, [[place] for place in range(11)])
    np.testing.assert_allclose(calibration.scores[6:], scores[6:], rtol=2e-5)
    assert own_rows(model.model, every)[torch.arange(bank.size), bank.images.long()].all()
    bank.images = bank.images[:0]  # as in an older file
    model.update(trainer(enable_checkpointing=False), DataLoader(images(2, seed=2), 4))
    assert calibration.images.tolist() == [-1] * 11 + [0, 1]
    assert set(bank.images.tolist()) == {-1, 0, 1}


def test_update_of_a_model_calibrated_otherwise(trainer):
    model = fit(trainer, model_of(calibration="none"), DataLoader(images(6), 4))
    model.calibrate(DataLoader(images(9, seed=1), 4))
    before = model.image_threshold
    model.update(trainer(enable_checkpointing=False), DataLoader(images(2, seed=2), 4))
    assert model.model.calibration.images.tolist() == [-1] * 9
    assert model.image_threshold == before


def test_nothing_to_compare_with(trainer, caplog):
    for pictures, options in ((images(1), {}), (images(4), {"coreset_size": 1})):
        caplog.clear()
        model = fit(trainer, model_of(**options), DataLoader(pictures, 4))
        assert model.image_threshold is model.pixel_threshold is None
        assert [r for r in caplog.messages if "thresholds" in r] == [
            "leave_one_out needs rows of two images (or groups of images) in the memory bank, and all are of one; "
            "there are no thresholds from these images."
        ]


def test_near_copies_are_noticed(trainer, caplog):
    pictures = images(8)
    pairs = torch.cat([pictures, pictures + 0.003 * images(8, seed=1)])
    for ratio in (0.25, 1.0):
        for loader, seen in (
            (DataLoader(pairs, 4), True),
            (samples(pairs, [*range(8), *range(8)]), False),
            (DataLoader(torch.cat([pictures, images(8, seed=2)]), 4), False),
        ):
            caplog.clear()
            fit(trainer, model_of(coreset_ratio=ratio), loader)
            assert ("have a near-copy among the training images" in caplog.text) == seen
    caplog.clear()
    model = fit(trainer, model_of(coreset_method="none"), DataLoader(torch.cat([pictures, pictures]), 4))
    assert model.image_threshold is None
    assert "no thresholds: the threshold is 0" in caplog.text


def test_foreign_rows_equal_a_bank_without_them():
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(3, (300, 4), generator=draw).float()  # many copies and ties
    bank, queries = MemoryBank(), torch.randint(3, (40, 4), generator=draw) + 0.25
    bank.fill(rows, images=torch.randint(4, (300,), generator=draw))
    for image in range(5):
        kept = (bank.images != image).nonzero()[:, 0]
        other, foreign = MemoryBank(), ForeignRows(bank, image, bank.exact())
        other.fill(rows[kept])
        assert foreign.size == len(kept)
        for k in (1, 5, len(kept)):
            distance, found = other(queries, k)
            assert torch.equal(foreign(queries, k)[0], distance)
            assert torch.equal(foreign(queries, k)[1], kept[found])


def test_one_image_of_each_group():
    groups = {image: image % 5 for image in range(100, 140)}
    drawn = draw_one_of_each(groups, seed=0)
    assert sorted(groups[image] for image in drawn) == [0, 1, 2, 3, 4]
    assert draw_one_of_each(groups, seed=1) != drawn == draw_one_of_each(groups, seed=0)
    assert len(draw_one_of_each(groups, 0, 3)) == 3
    large = {image: max(0, image - 90) for image in range(100)}  # one group of 91 images, 9 of one
    assert sum(0 in {large[i] for i in draw_one_of_each(large, seed, 2)} for seed in range(200)) == pytest.approx(
        40, abs=18
    )


@pytest.mark.parametrize(("n", "rate"), [(5, 0.05), (20, 0.1), (99, 0.01), (400, 0.2)])
def test_promised_rates(n, rate):
    """Of n uniform scores, the chance to exceed the threshold is known: draw many."""
    scores = torch.rand(4000, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(1).values
    above = max(1, int((n + 1) * rate + 1e-9))
    chance = 1 - scores[:, n - above]
    expected_rate, at_most = promised_rates(n, rate)
    assert chance.mean().item() == pytest.approx(expected_rate, rel=0.05)
    assert (chance > at_most).double().mean().item() == pytest.approx(0.05, abs=0.012)


def saved(model):
    file = io.BytesIO()
    from pl_patchcore.checkpoint import write_checkpoint

    write_checkpoint(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def loaded(checkpoint, **options):
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return PatchCore.load_from_checkpoint(file, backbone=TinyBackbone(), **options)


def test_checkpoints(trainer, caplog):
    model = fit(trainer, model_of(), DataLoader(images(6), 4))
    checkpoint = saved(model)
    again = loaded(checkpoint)
    assert torch.equal(again.memory_bank.images, model.memory_bank.images)
    assert torch.equal(again.model.calibration.images, model.model.calibration.images)
    cut = loaded(checkpoint, coreset_size=10)
    assert torch.equal(cut.memory_bank.images, model.memory_bank.images[:10])
    assert cut.image_threshold is None
    assert "pl-patchcore calibrate" in caplog.text
    older = checkpoint | {"state_dict": {k: v for k, v in checkpoint["state_dict"].items() if "images" not in k}}
    again = loaded(older)
    assert again.image_threshold == model.image_threshold
    assert len(again.memory_bank.images) == 0
    assert again.model.calibration.images.tolist() == [-1] * 6
    for name in ("model.memory_bank.images", "model.calibration.images"):
        for value in (torch.zeros(3, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32), torch.zeros(6)):
            with pytest.raises(UserError, match="fit again"):
                loaded(checkpoint | {"state_dict": checkpoint["state_dict"] | {name: value}})
    low = torch.full_like(model.memory_bank.images, -2)
    with pytest.raises(UserError, match="is no bank of this model"):
        loaded(checkpoint | {"state_dict": checkpoint["state_dict"] | {"model.memory_bank.images": low}})


def test_thresholds_set_by_hand(trainer, caplog):
    caplog.set_level(logging.INFO)
    model = fit(trainer, model_of(false_alarm_rate=0.3), DataLoader(images(6), 4))
    calibrated = model.image_threshold, model.pixel_threshold
    model.image_threshold, model.pixel_threshold = 5, 0.1
    again = loaded(saved(model))
    assert (again.image_threshold, again.pixel_threshold) == (5.0, 0.1)
    caplog.clear()
    found = trainer().predict(again, DataLoader(images(2), 2))[0]
    assert not found["anomalous"].any()
    assert "image_threshold is set by hand: 5." in caplog.messages
    other = loaded(saved(model), image_threshold=None, false_alarm_rate=0.2)
    assert (other.image_threshold, other.pixel_threshold) == (other.model.calibration.scores.max().item(), 0.1)
    again.image_threshold = again.pixel_threshold = None
    assert (again.image_threshold, again.pixel_threshold) == calibrated
    assert loaded(saved(again)).image_threshold == calibrated[0]
    by_hand = fit(trainer, model_of(calibration="none", image_threshold=4.5), DataLoader(images(6), 4))
    assert (by_hand.image_threshold, by_hand.pixel_threshold) == (4.5, None)
    assert "p_value" not in trainer().predict(by_hand, DataLoader(images(2), 2))[0]
    assert loaded(saved(model), image_threshold=3.0).image_threshold == 3.0  # beside a rate in the file
    with pytest.raises(UserError, match="image_threshold is set by hand; give one of them"):
        loaded(saved(model), image_threshold=3.0, false_alarm_rate=0.01)
    with pytest.raises(UserError, match="pixel_threshold is set by hand; give one of them"):
        model_of(pixel_threshold=3.0, false_alarm_rate=0.2)
    for value in (0, -1.0, float("nan"), "5", True):
        with pytest.raises(UserError, match="image_threshold must be"):
            model.image_threshold = value
    assert model.image_threshold == 5.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration_share": 0.2}, "goes with calibration split, got 0.2 with leave_one_out"),
        ({"calibration": "none", "calibration_share": 0.2}, "goes with calibration split"),
        ({"calibration": "split"}, "above 0 for split"),
        ({"calibration": "loo"}, "calibration must be"),
        ({"calibration_images": 0}, "calibration_images must be at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        model_of(**options)


def test_null_means_split_where_there_is_a_share():
    assert model_of(calibration=None).calibration == "none"
    assert model_of(calibration=None, calibration_share=0.1).calibration == "split"


def test_calibrate(trainer, caplog):
    caplog.set_level(logging.INFO)
    model, other = model_of(calibration="none"), images(9, seed=1)
    with pytest.raises(UserError, match="the memory bank is empty"):
        model.calibrate(DataLoader(other, 4))
    fit(trainer, model, DataLoader(images(6), 4))
    model.calibrate(DataLoader(other, 4))
    with torch.no_grad():
        scores, maps = model(other)
    torch.testing.assert_close(model.model.calibration.scores, scores)
    torch.testing.assert_close(model.model.calibration.peaks, maps.amax((1, 2)))
    assert "thresholds from 9 nominal images that are not in the memory bank" in caplog.text
    model.calibrate(samples(other, [0, 0, 0, 3, 3, 3, 6, 6, 8]))
    assert len(model.model.calibration.scores) == 4
    with pytest.raises(UserError, match="one is labelled anomalous"):
        model.calibrate(DataLoader(TensorDataset(other, torch.ones(9)), 4))
    with pytest.raises(UserError, match="no image to calibrate with"):
        model.calibrate([])


def test_groups_must_be_numbers(trainer):
    with pytest.raises(UserError, match="'group' of a batch must hold a whole number for each image"):
        fit(trainer, model_of(), samples(images(4), [0.5, 1.0, 1.5, 2.0]))


def test_numbers_name_training_images(trainer):
    named = [{"image": image, "path": 10 + i} for i, image in enumerate(images(4))]
    model = fit(trainer, model_of(), DataLoader(named, batch_size=2))
    assert sorted(each.name for each in model.training_images) == ["10", "11", "12", "13"]


def test_images_given_apart_are_missing(trainer):
    with pytest.raises(UserError, match=r"set data\.calibration to a folder of nominal images"):
        fit(trainer, model_of(calibration="images"), DataLoader(images(4), 4))


def test_older_calibrations_load():
    calibration = Calibration()
    calibration.load_state_dict({"scores": torch.ones(3), "peaks": torch.ones(3)})
    assert calibration.images.tolist() == [-1, -1, -1]


def test_a_changed_model_is_saved_without_a_trainer(trainer, tmp_path):
    model = fit(trainer, model_of(false_alarm_rate=0.3), DataLoader(images(6), 4))
    model.image_threshold = 5.0
    model.save(tmp_path / "changed.ckpt")
    again = PatchCore.load_from_checkpoint(tmp_path / "changed.ckpt", backbone=TinyBackbone())
    assert again.image_threshold == 5.0
    with pytest.raises(UserError, match="the memory bank is empty"):
        model_of().save(tmp_path / "empty.ckpt")
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["changed.ckpt"]
