import lightning as L
import pytest
import torch

from pl_patchcore import PatchCore, SyntheticDataModule, UserError
from pl_patchcore.calibration import draw_held_out

pytestmark = pytest.mark.filterwarnings("ignore::pl_patchcore.backbone.UntrainedBackboneWarning")
SHARED = {"backbone": "resnet18", "weights": None, "resize": 64, "crop": None, "coreset_size": 40}
MEMBERS = [{"layers": ["layer1"]}, {"layers": ["layer2", "layer3"], "distance": "squared", "num_neighbors": 2}]


HELD_OUT = sorted(draw_held_out(6, 0.4, 0))


def ensemble_of(members=MEMBERS, combine="nominal", **options):
    return PatchCore(ensemble={"members": members, "combine": combine}, **(SHARED | options))


def data_of():
    return SyntheticDataModule(image_size=96, train_images=6, test_nominal=3, test_per_defect=1, num_workers=0)


def fit(model, folder):
    trainer = L.Trainer(
        accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(model, data_of())
    return trainer


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    ensemble = ensemble_of(calibration_share=0.4, false_alarm_rate=0.5)
    alone = [PatchCore(**(SHARED | member), calibration_share=0.4) for member in MEMBERS]
    for i, model in enumerate(alone):
        fit(model, folder / str(i))
    return ensemble, fit(ensemble, folder / "all"), [model.eval() for model in alone]


@pytest.fixture(scope="module")
def images():
    model = PatchCore(**SHARED, layers=["layer1"])
    return torch.stack([model.transform(record.image()) for record in data_of().records[1]])


def test_members_are_what_they_are_alone(fitted, images):
    ensemble, _, alone = fitted
    for member, model in zip(ensemble.model.members, alone, strict=True):
        assert torch.equal(member.memory_bank.features, model.memory_bank.features)
    parts = [model(images) for model in alone]
    scores, maps = ensemble.eval()(images)
    expected = torch.stack([s / k for (s, _), k in zip(parts, ensemble.model.scale, strict=True)]).mean(0)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(
        maps[1], sum(m[1] / k for (_, m), k in zip(parts, ensemble.model.scale, strict=True)) / 2
    )
    _, maps = ensemble(images, map_size=(70, 90))
    parts = [model(images, map_size=(70, 90))[1] for model in alone]
    torch.testing.assert_close(maps, sum(m / k for m, k in zip(parts, ensemble.model.scale, strict=True)) / 2)


def test_scale_is_the_mean_distance_of_nominal_patches(fitted):
    ensemble, _, alone = fitted
    records = data_of().records[0]
    inputs = torch.stack([alone[0].transform(record.image()) for record in records])
    for scale, model in zip(ensemble.model.scale, alone, strict=True):
        bank = model.memory_bank.features.double()
        kept = [i for i in range(6) if i not in HELD_OUT]
        rows = model.patch_features(inputs[kept]).double().flatten(0, 2)
        near = torch.cdist(rows, bank).topk(2, largest=False).values
        distance = torch.where(near[:, 0] > 1e-6, near[:, 0], near[:, 1])
        if model.model.scorer.distance == "squared":
            distance = distance.square()
        assert scale.item() == pytest.approx(distance.mean().item(), rel=0.2)  # of a sample of at most 1000


def test_thresholds_are_those_of_the_combined_scores(fitted):
    ensemble, _, _ = fitted
    records = data_of().records[0]
    inputs = torch.stack([ensemble.transform(records[i].image()) for i in HELD_OUT])
    scores, maps = ensemble.eval()(inputs)
    torch.testing.assert_close(scores, ensemble.model.calibration.scores)
    torch.testing.assert_close(maps.amax((1, 2)), ensemble.model.calibration.peaks)


def test_checkpoint(fitted, images):
    ensemble, trainer, _ = fitted
    path = trainer.checkpoint_callback.best_model_path
    loaded = PatchCore.load_from_checkpoint(path)
    assert torch.equal(loaded.eval()(images)[0], ensemble.eval()(images)[0])
    assert loaded.image_threshold == ensemble.image_threshold
    with pytest.raises(UserError, match="of an ensemble of 2, this is a single model"):
        trainer.test(PatchCore(**SHARED, layers=["layer1"]), data_of(), ckpt_path=path)
    other = ensemble_of([{"layers": ["layer1"]}, {"layers": ["layer2"]}])
    with pytest.raises(UserError, match=r"other settings: .*layers \['layer2', 'layer3'\], here \['layer2'\]"):
        trainer.test(other, data_of(), ckpt_path=path)


def test_test_range_is_the_authors_combination(images, tmp_path):
    model = ensemble_of(combine="test_range")
    trainer = fit(model, tmp_path)
    with pytest.raises(UserError, match="scores whole sets, by test or predict"):
        model.eval()(images)
    batches = trainer.predict(model, data_of())
    scores, maps = torch.cat([b["score"] for b in batches]), torch.cat([b["anomaly_map"] for b in batches])
    expected_scores, expected_maps = [], []
    for member in model.model.members:
        s, m = member(images)
        expected_scores.append((s - s.min()) / (s.max() - s.min()))
        expected_maps.append((m - m.min()) / (m.max() - m.min()))
    torch.testing.assert_close(scores, torch.stack(expected_scores).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps, torch.stack(expected_maps).mean(0), rtol=1e-4, atol=1e-5)
    (logged,) = trainer.test(model, data_of(), verbose=False)
    assert 0 <= logged["test/image_auroc"] <= 1


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ([], {}, "members names no model"),
        ([{"layer": ["layer1"]}], {}, "a member of an ensemble has no argument 'layer'; did you mean 'layers'"),
        ([{"resize": 3}], {}, "a member of an ensemble has no argument 'resize'"),
        (MEMBERS, {"combine": "mean"}, "combine must be nominal or test_range, got 'mean'"),
        (MEMBERS, {"combine": "test_range", "calibration_share": 0.1}, "cannot be calibrated"),
    ],
)
def test_bad_members(members, options, message):
    with pytest.raises(UserError, match=message):
        ensemble_of(members, **options)
