"""The LightningModule in real Trainer runs: fitting, scoring, checkpoints."""

import functools
import logging

import fakes
import lightning as L
import numpy as np
import pytest
import reference
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision.datasets import ImageFolder

from pl_patchcore import MVTecDataModule, PatchCore, SyntheticDataModule, UserError
from pl_patchcore.anomaly_map import AnomalyScorer
from pl_patchcore.backbone import UntrainedBackboneWarning
from pl_patchcore.options import StoreOptions


def model_of(tiny, **options):
    defaults = {"layers": ["fine", "coarse"], "resize": 64, "crop": 48, "coreset_ratio": 0.1}
    return PatchCore(tiny, **(defaults | options))


def data_of(**options):
    defaults = {"train_images": 7, "test_nominal": 4, "test_per_defect": 2, "batch_size": 3, "num_workers": 0}
    defaults["image_size"] = 96
    return SyntheticDataModule(**(defaults | options))


@pytest.fixture
def fitted(tiny, trainer):
    model, runner = model_of(tiny), trainer()
    runner.fit(model, data_of())
    return model, runner


def images_of(model, split=0):
    records = data_of().records[split]
    return torch.stack([model.transform(record.image()) for record in records])


def test_fit_selects_the_greedy_coreset_in_data_set_order(fitted):
    model, runner = fitted
    features = model.patch_features(images_of(model)).flatten(0, 2)
    assert len(features) == 7 * 12 * 12
    picks = reference.greedy(features.numpy(), len(features) // 10)
    torch.testing.assert_close(model.memory_bank.features, features[picks], rtol=1e-5, atol=1e-6)
    assert runner.global_step == 3
    assert runner.current_epoch == 1


def test_scores_match_the_reference(fitted):
    model, runner = fitted
    images = images_of(model, 1)
    predictions = runner.predict(model, data_of())
    scores = torch.cat([p["score"] for p in predictions])
    maps = torch.cat([p["anomaly_map"] for p in predictions])
    patches, bank = model.patch_features(images).numpy(), model.memory_bank.features.numpy()
    for i in range(len(images)):
        score, heat = reference.score_and_map(patches[i], bank, (48, 48))
        assert scores[i].item() == pytest.approx(score, rel=1e-5)
        np.testing.assert_allclose(maps[i].numpy(), heat, rtol=1e-5)
    assert predictions[0]["path"] == [f"synthetic/brick/test/good/00{i}.png" for i in range(3)]


def test_figures_match_the_references(fitted):
    model, runner = fitted
    data = data_of(test_nominal=2, test_per_defect=1)
    (logged,) = runner.test(model, data, verbose=False)
    records = data.records[1]
    scores, maps = model(torch.stack([model.transform(record.image()) for record in records]))
    masks = [model.transform.apply(*record.read())["mask"].numpy() for record in records]
    labels = np.array([record.label for record in records])
    scores, maps = scores.numpy(), maps.double().numpy()
    assert logged["test/image_auroc"] == pytest.approx(reference.auroc(scores[labels == 0], scores[labels == 1]))
    flat, truth = maps.reshape(-1), np.stack(masks).reshape(-1)
    pixel = sum(np.searchsorted(np.sort(flat[truth == 0]), flat[truth == 1]) / (truth == 0).sum())
    assert logged["test/pixel_auroc"] == pytest.approx(pixel / (truth == 1).sum(), abs=1e-5)
    assert logged["test/pro"] == pytest.approx(reference.pro(list(maps), masks), abs=1e-4)
    assert model.figures["all"]["anomalous"] == 4
    assert set(model.figures) == {"all", "blur", "foreign", "scratch", "stain"}
    scratch = np.array([r.defect == "scratch" for r in records])
    assert model.figures["scratch"]["image_auroc"] == pytest.approx(
        reference.auroc(scores[labels == 0], scores[scratch])
    )


@pytest.mark.parametrize("batch_size", [1, 16])
def test_batch_size_does_not_matter(fitted, tiny, trainer, batch_size):
    model, runner = fitted
    expected = runner.test(model, data_of(), verbose=False)[0]
    other = model_of(tiny)
    trainer(enable_checkpointing=False).fit(other, data_of(batch_size=batch_size))
    torch.testing.assert_close(other.memory_bank.features, model.memory_bank.features, rtol=1e-5, atol=1e-6)
    found = runner.test(other, data_of(batch_size=batch_size), verbose=False)[0]
    assert found == pytest.approx(expected, abs=1e-6)


def test_same_seed_same_bank_whatever_ran_before(fitted, tiny, trainer):
    torch.manual_seed(1234)
    np.random.default_rng().random()
    again = model_of(tiny)
    trainer(enable_checkpointing=False).fit(again, data_of())
    assert torch.equal(again.memory_bank.features, fitted[0].memory_bank.features)


def test_shuffled_loader_gives_the_same_bank(fitted, tiny, trainer):
    data = data_of()
    data.transform = fitted[0].transform
    data.setup("fit")
    loader = DataLoader(data.train_set, batch_size=2, shuffle=True, collate_fn=data.train_dataloader().collate_fn)
    again = model_of(tiny)
    trainer(enable_checkpointing=False).fit(again, loader)
    torch.testing.assert_close(again.memory_bank.features, fitted[0].memory_bank.features, rtol=1e-5, atol=1e-6)


def test_own_loaders(fitted, tiny, trainer):
    expected, runner = fitted
    images = images_of(expected)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(images)

    for loader in (DataLoader(TensorDataset(images), batch_size=3), DataLoader(Stream(), batch_size=2)):
        model = model_of(tiny)
        trainer(enable_checkpointing=False).fit(model, loader)
        torch.testing.assert_close(model.memory_bank.features, expected.memory_bank.features, rtol=1e-5, atol=1e-6)
    test_images, labels = images_of(expected, 1), torch.tensor([r.label for r in data_of().records[1]])
    (logged,) = runner.test(model, DataLoader(TensorDataset(test_images, labels), batch_size=5), verbose=False)
    (full,) = runner.test(expected, data_of(), verbose=False)
    assert logged["test/image_auroc"] == pytest.approx(full["test/image_auroc"])
    assert np.isnan(logged["test/pixel_auroc"])


def test_numbers_name_defect_types_and_categories(fitted):
    model, runner = fitted
    records = data_of().records[1]
    samples = [{"image": image, "label": r.label} for image, r in zip(images_of(model, 1), records, strict=True)]
    numbers = [{"defect": 3 + i % 2, "category": i % 3} for i in range(len(samples))]
    named = [{key: f"{value}" for key, value in each.items()} for each in numbers]
    found = []
    for names in (named, numbers):
        both = [sample | own for sample, own in zip(samples, names, strict=True)]
        runner.test(model, DataLoader(both, batch_size=5), verbose=False)
        found.append((model.figures, model.figures_by_category))
    assert set(model.figures) == {"all", "3", "4"}
    assert set(model.figures_by_category) == {"0", "1", "2"}
    np.testing.assert_equal(*found)  # NaN equals NaN


def test_masks_of_numpy_are_masks(fitted):
    model, runner = fitted
    images, labels = images_of(model, 1)[:8], torch.tensor([0, 1] * 4)
    masks = torch.zeros(8, 48, 48, dtype=torch.uint8)
    masks[1::2, 5:20, 5:20] = 1
    figures = []
    for own in (masks, masks.numpy(), [*masks.numpy()]):
        runner.test(model, DataLoader([0], collate_fn=lambda _, own=own: (images, labels, own)), verbose=False)
        figures.append(model.figures)
    assert figures[0]["all"]["pixel_auroc"] > 0
    for other in figures[1:]:
        np.testing.assert_equal(other, figures[0])
    for own in ([None, *masks[1:]], [*masks[1:]], "masks"):
        loader = DataLoader([0], collate_fn=lambda _, own=own: {"image": images, "label": labels, "mask": own})
        with pytest.raises(
            UserError, match=r"'mask' of a batch must hold a mask \(H, W\) for each of the 8 images, got"
        ):
            runner.test(model, loader, verbose=False)


class Batches(L.Callback):
    """Counts the training batches that went well."""

    count = 0

    def on_train_batch_end(self, *args):
        self.count += 1


BROKEN = r"patch features of {} hold NaN or infinity; look for a broken image or an overflow in half precision\.$"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"calibration": "leave_one_out"},
        {"calibration_share": 0.9},
        {"reference_rotations": 4},
        {"foreground": "auto"},
        {"tile": 32, "store": StoreOptions(dtype="float16")},
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_training_image_is_named_at_its_batch(tiny, trainer, options, value):
    images = torch.rand(8, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    images[[4, 5], 1, 20, 30] = value
    paths = [f"parts/{i}.png" for i in range(8)]
    named = [{"image": image, "path": path} for image, path in zip(images, paths, strict=True)]
    for data, name in ((images, "image 4"), (named, r"parts/4\.png")):
        batches = Batches()
        with pytest.raises(UserError, match=BROKEN.format(name)):
            trainer(callbacks=[batches]).fit(model_of(tiny, **options), DataLoader(data, batch_size=3))
        assert batches.count == 1


def test_what_is_broken_where_nothing_counts_changes_nothing(tiny, trainer):
    images = torch.rand(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    broken = images.clone()
    broken[3, :, 40:, 40:] = torch.nan
    size, box, region = (
        torch.tensor([48, 48]),
        torch.tensor([0.0, 0.0, 48.0, 48.0]),
        torch.zeros(48, 48, dtype=torch.uint8),
    )
    region[:24] = 1
    banks = []
    for data in (images, broken):
        samples = [{"image": x, "original_size": size, "crop_box": box, "region": region} for x in data]
        model = model_of(tiny)
        trainer(enable_checkpointing=False).fit(model, DataLoader(samples, batch_size=3))
        banks.append(model.memory_bank.features)
    assert torch.equal(*banks)
    whole = [sample | {"region": torch.ones_like(region)} for sample in samples]
    with pytest.raises(UserError, match=BROKEN.format("image 3")):
        trainer().fit(model_of(tiny), DataLoader(whole, batch_size=3))


def test_existing_data_module_and_torchvision_data_set(tiny, trainer, tmp_path):
    root = fakes.mvtec(tmp_path, ["bottle"]) / "bottle"
    model, runner = model_of(tiny, resize=None, crop=None), trainer()

    class Existing(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(ImageFolder(root / "train", transform=model.transform), batch_size=3)

        def test_dataloader(self):
            images = ImageFolder(root / "test", transform=model.transform)
            images.target_transform = lambda index: int(images.classes[index] != "good")
            return DataLoader(images, batch_size=4)

        def predict_dataloader(self):
            names = sorted((root / "test" / "dirt").glob("*"))
            images = [model.transform(Image.open(name).convert("RGB")) for name in names]
            return DataLoader([{"image": image, "serial_number": 7} for image in images])

    data = Existing()
    runner.fit(model, data)
    (logged,) = runner.test(model, data, verbose=False)
    assert logged["test/image_auroc"] == 1.0
    assert [model.figures["all"][key] for key in ("nominal", "anomalous")] == [2, 4]
    ours = runner.test(model, MVTecDataModule(root.parent, "bottle", num_workers=0), verbose=False)
    assert ours[0]["test/image_auroc"] == 1.0
    scores = [batch["score"].item() for batch in runner.predict(model, data)]
    assert len(scores) == 2
    assert min(scores) > 0


def test_images_of_another_size_than_fitted_are_refused(fitted, tiny, tmp_path):
    (path,) = tmp_path.rglob("*.ckpt")
    for model in (fitted[0], PatchCore.load_from_checkpoint(path, backbone=tiny)):
        with pytest.raises(UserError, match=r"images of 56x48 pixels, but the memory bank is from images of 48x48"):
            model(torch.rand(1, 3, 56, 48))


def test_test_without_labels_is_refused(fitted):
    model, runner = fitted
    with pytest.raises(UserError, match="a test batch needs labels"):
        runner.test(model, DataLoader(images_of(model), batch_size=4), verbose=False)


def test_plain_trainer(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = model_of(tiny)
    L.Trainer(accelerator="cpu").fit(model, data_of())
    assert model.memory_bank.size == 7 * 144 // 10


def test_no_checkpointing_writes_nothing(tiny, trainer, tmp_path):
    trainer(enable_checkpointing=False).fit(model_of(tiny), data_of())
    assert not list(tmp_path.iterdir())


def test_backbone_is_left_out_of_checkpoints_unless_asked_for(tiny, trainer, tmp_path):
    for save in (False, True):
        runner = trainer(default_root_dir=tmp_path / str(save))
        runner.fit(model_of(tiny, save_backbone=save), data_of())
        saved = torch.load(runner.checkpoint_callback.best_model_path, weights_only=True)
        held = [k for k in saved["state_dict"] if k.startswith("model.patch_features.")]
        assert bool(held) == save
        assert saved["patchcore"]["identity"]["backbone"] == "TinyBackbone"


@pytest.mark.parametrize("sanity", [0, 2])
def test_validation_inside_fit_scores_nothing(tiny, trainer, caplog, sanity):
    model, runner = model_of(tiny), trainer(num_sanity_val_steps=sanity)
    with caplog.at_level(logging.INFO):
        runner.fit(model, data_of(validation="test"))
    assert not [name for name in runner.logged_metrics if name.startswith("val")]
    assert caplog.text.count("validation inside fit scores nothing") == 1
    found = runner.validate(model, data_of(validation="test"), verbose=False)[0]
    expected = runner.test(model, data_of(), verbose=False)[0]
    assert found["val/image_auroc"] == expected["test/image_auroc"]


def test_second_fit_starts_clean(fitted, tiny):
    model, runner = fitted
    bank = model.memory_bank.features.clone()
    for again in (runner, L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)):
        again.fit(model, data_of(seed=3))
        assert model.memory_bank.size == len(bank)
        assert not torch.equal(model.memory_bank.features, bank)
    again.fit(model, data_of())
    assert torch.equal(model.memory_bank.features, bank)


def test_resuming_is_refused(fitted, tiny, trainer):
    path = fitted[1].checkpoint_callback.best_model_path
    with pytest.raises(UserError, match="cannot resume from"):
        trainer().fit(model_of(tiny), data_of(), ckpt_path=path)


def test_empty_bank_is_an_error(tiny, trainer, tmp_path):
    model = model_of(tiny)
    for call in (trainer().test, trainer().predict):
        with pytest.raises(UserError, match="memory bank is empty"):
            call(model, data_of())
    with pytest.raises(UserError, match="memory bank is empty"):
        model(torch.rand(1, 3, 48, 48))
    runner = trainer()
    runner.strategy.connect(model)
    runner.save_checkpoint(tmp_path / "empty.ckpt")
    with pytest.raises(UserError, match="holds no memory bank"):
        PatchCore.load_from_checkpoint(tmp_path / "empty.ckpt", backbone=tiny)


def cut_in_half(path, tiny):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return {"backbone": tiny}, "is damaged or cut short"


def of_another_model(path, tiny):
    torch.save({"state_dict": {}, "hyper_parameters": {}}, path)
    return {"backbone": tiny}, "is no checkpoint of PatchCore"


def no_checkpoint(path, tiny):
    path.write_text("hello")
    return {"backbone": tiny}, "no checkpoint of PatchCore|is damaged"


def missing(path, tiny):
    path.unlink()
    return {"backbone": tiny}, "no such checkpoint"


def other_weights(path, tiny):
    return {"backbone": type(tiny)(seed=5)}, "other weights of TinyBackbone .*give the same weights"


def other_layers(path, tiny):
    return {
        "backbone": tiny,
        "layers": ["fine"],
    }, r"other settings: .*layers \['fine', 'coarse'\], here \['fine'\]"


def other_preprocessing(path, tiny):
    return {"backbone": tiny, "resize_mode": "shorter_side"}, "resize_mode squash, here shorter_side"


def no_backbone(path, tiny):
    return {}, "was fitted with backbone as an object that a file cannot hold"


@pytest.mark.parametrize(
    "case",
    [
        cut_in_half,
        of_another_model,
        no_checkpoint,
        missing,
        other_weights,
        other_layers,
        other_preprocessing,
        no_backbone,
    ],
)
def test_wrong_checkpoint_is_refused(fitted, tiny, trainer, tmp_path, case):
    (path,) = tmp_path.rglob("*.ckpt")
    options, message = case(path, tiny)
    with pytest.raises(UserError, match=message):
        PatchCore.load_from_checkpoint(path, **options)
    if options:
        model = model_of(**({"tiny": options.pop("backbone")} | options))
        with pytest.raises(UserError, match=message):
            trainer().test(model, data_of(), ckpt_path=path, verbose=False)


def test_scoring_options_may_change_at_load(fitted, tiny, tmp_path):
    (path,) = tmp_path.rglob("*.ckpt")
    options = {"reweighting_neighbors": 1, "search": "HNSW8", "images": {"max_pixels": 10**9}}
    model = PatchCore.load_from_checkpoint(path, backbone=tiny, **options)
    images = images_of(model, 1)
    assert (model(images)[0] >= fitted[0](images)[0]).all()


def undisclosed(hook):
    return lambda *args: hook(*args)


def test_subclass_that_loses_a_hook_is_refused():
    for name in ("setup", "training_step", "on_train_epoch_end", "on_save_checkpoint"):
        with pytest.raises(UserError, match=rf"Mine\.{name} takes the place .* call super\(\)\.{name}\(\)"):
            type("Mine", (PatchCore,), {name: lambda self, *args: None})

    class Parent(PatchCore):
        def on_train_end(self):
            super().on_train_end()

    class Child(Parent):
        @functools.wraps(Parent.on_train_end)
        def on_train_end(self):
            Parent.on_train_end(self)

        def on_fit_end(self):
            (lambda: super(Child, self).on_fit_end())()
            later()

        def setup(self, stage):
            getattr(super(), "setup")(stage)  # noqa: B009

        @undisclosed
        def on_train_start(self):
            super().on_train_start()

        def test_step(self, batch, batch_idx):  # not needed to fit
            return None

    def later(): ...

    class Lost:
        def on_fit_end(self): ...

    class Kept:
        def on_fit_end(self):
            super().on_fit_end()

    with pytest.raises(UserError, match=r"Lost\.on_fit_end takes the place"):
        type("Mixed", (Kept, Lost, Child), {})


class WithKeyOfItsOwn(PatchCore):
    note = ""

    def on_save_checkpoint(self, checkpoint):
        super().on_save_checkpoint(checkpoint)
        checkpoint["note"] = self.note

    def on_load_checkpoint(self, checkpoint):
        super().on_load_checkpoint(checkpoint)
        self.note = checkpoint["note"]


def test_subclass_keeps_values_in_its_checkpoints(tiny, trainer, tmp_path):
    model = WithKeyOfItsOwn(tiny, layers=["fine"], resize=64, crop=None, coreset_ratio=0.1)
    model.note = "line 4"
    trainer().fit(model, data_of())
    (path,) = tmp_path.rglob("*.ckpt")
    model.save(tmp_path / "saved.ckpt")
    for each in (path, tmp_path / "saved.ckpt"):
        assert WithKeyOfItsOwn.load_from_checkpoint(each, backbone=tiny).note == "line 4"


def test_scores_have_no_gradient(fitted):
    images = images_of(fitted[0], 1).requires_grad_()
    assert not any(each.requires_grad for each in fitted[0](images))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 48, 48)), "got ndarray; inspect takes others"),
        ([torch.zeros(3, 48, 48)], "got list"),
        (torch.zeros(1, 1, 48, 48), r"\(B, 3, H, W\), got \(1, 1, 48, 48\)"),
        (torch.zeros(3, 48, 48), r"images\[None\] makes a batch"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(fitted, images, message):
    with pytest.raises(UserError, match=message):
        fitted[0](images)


def test_map_location_is_a_device(fitted, tiny, tmp_path):
    (path,) = tmp_path.rglob("*.ckpt")
    for device in ("cpu", torch.device("cpu")):
        assert PatchCore.load_from_checkpoint(path, device, backbone=tiny).memory_bank.size
    for wrong in ({"cuda:0": "cpu"}, "gpu", "cuda:99", True):
        with pytest.raises(UserError, match="map_location must be a device"):
            PatchCore.load_from_checkpoint(path, wrong, backbone=tiny)


def test_loading_scores_an_image_of_the_size_to_come(fitted, tiny, tmp_path, monkeypatch):
    sizes, forward = [], AnomalyScorer.forward
    monkeypatch.setattr(AnomalyScorer, "forward", lambda *args: sizes.append(tuple(args[3])) or forward(*args))
    (path,) = tmp_path.rglob("*.ckpt")
    PatchCore.load_from_checkpoint(path, backbone=tiny)
    assert sizes == [(48, 48)]


@pytest.mark.filterwarnings("ignore::pl_patchcore.backbone.UntrainedBackboneWarning")
def test_named_backbone_round_trip(trainer, tmp_path):
    options = {
        "backbone": "resnet18",
        "layers": ["layer1"],
        "resize": 64,
        "crop": None,
        "coreset_ratio": 0.02,
    }
    hashed = PatchCore(**options, weights=None).patch_features.weights_sha256
    for place, save in (("out", False), ("in", True)):
        runner = trainer(default_root_dir=tmp_path / place)
        model = PatchCore(**options, weights=None, save_backbone=save)
        runner.fit(model, data_of())
        loaded = PatchCore.load_from_checkpoint(runner.checkpoint_callback.best_model_path)
        assert loaded.patch_features.weights_sha256 == hashed
        images = images_of(model, 1)
        assert torch.equal(loaded.eval()(images)[0], model.eval()(images)[0])


def test_weights_elsewhere_are_checked_by_their_hash(trainer, tmp_path):
    import torchvision

    network = torchvision.models.resnet18()
    first, moved, other = (tmp_path / name for name in ("first.pth", "moved.pth", "other.pth"))
    torch.save(network.state_dict(), first)
    torch.save(torchvision.models.resnet18().state_dict(), other)
    runner = trainer()
    options = {"backbone": "resnet18", "layers": ["layer1"], "resize": 64, "crop": None, "coreset_size": 20}
    runner.fit(PatchCore(**options, weights=first), data_of())
    first.rename(moved)
    path = runner.checkpoint_callback.best_model_path
    with pytest.raises(UserError, match=r"first\.pth: no such weights file"):
        PatchCore.load_from_checkpoint(path)
    with pytest.raises(UserError, match="other weights of resnet18"):
        PatchCore.load_from_checkpoint(path, weights=str(other))
    assert PatchCore.load_from_checkpoint(path, weights=str(moved)).memory_bank.size == 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32", "16-mixed", "bf16-mixed"])
def test_gpu_agrees_with_cpu(fitted, tiny, trainer, precision):
    model, runner = fitted
    expected = runner.test(model, data_of(), verbose=False)[0]
    other, gpu = (
        model_of(tiny),
        trainer(accelerator="gpu", devices=1, precision=precision, enable_checkpointing=False),
    )
    gpu.fit(other, data_of())
    assert other.memory_bank.features.shape == model.memory_bank.features.shape
    assert gpu.test(other, data_of(), verbose=False)[0] == pytest.approx(
        expected, abs=0.02 if precision == "32" else 0.1
    )


def test_hyper_parameters_are_plain(tmp_path):
    torch.save(nn.Identity().state_dict(), tmp_path / "x.pth")
    with pytest.warns(UntrainedBackboneWarning):
        model = PatchCore(
            "resnet18", ("layer1",), None, resize=(np.int64(64), 64), crop=None, coreset_ratio=np.float64(0.1)
        )
    assert model.hparams["resize"] == [64, 64]
    assert type(model.hparams["resize"][0]) is int
    assert type(model.hparams["coreset_ratio"]) is float
    assert model.hparams["layers"] == ["layer1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coreset_ratio": 1.5}, r"coreset_ratio must be in \(0, 1\], got 1.5; 0.1 keeps one patch in ten"),
        ({"coreset_size": 0}, "coreset_size must be at least 1"),
        ({"coreset_method": "best"}, "greedy, approximate, random or none"),
        ({"projection_dim": 0}, "projection_dim must be at least 1"),
        ({"calibration_share": 1}, r"calibration_share must be in \[0, 1\)"),
        ({"search": "annoy"}, "search must be auto, torch, int8 or an index of faiss"),
        ({"store": "disk"}, "store.kind"),
        ({"store_dir": "x"}, "store_dir is now store.folder"),
        ({"shard_bank": True}, "shard_bank is gone"),
        ({"coreset_ration": 0.1}, "did you mean 'coreset_ratio'"),
        ({"store": {"knd": "disk"}}, "did you mean 'kind'"),
        ({"backbone": None}, "backbone must be text, or a Module"),
        ({"false_alarm_rate": 1}, r"false_alarm_rate must be in \(0, 1\)"),
        ({"crop": 100}, "crop 100 is larger"),
    ],
)
def test_bad_options(tiny, options, message):
    with pytest.raises(UserError, match=message):
        model_of(**({"tiny": options.pop("backbone", tiny)} | options))
