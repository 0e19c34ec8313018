import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import fakes
import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset, default_collate

from pl_patchcore import FolderDataModule, MTDDataModule, Preprocessing, SyntheticDataModule, UserError
from pl_patchcore.data.advice import tell_geometry
from pl_patchcore.data.base import Record, collate, loader_error
from pl_patchcore.data.batch import as_batch
from pl_patchcore.lightning_parts import ReleaseOnException


@pytest.fixture
def mtd(tmp_path):
    return fakes.mtd(tmp_path / "mtd")


def ready(data, **transform):
    data.transform = Preprocessing(**({"resize": 32, "crop": None} | transform))
    data.prepare_data()
    data.setup("test")
    return data


def test_mtd_split(mtd):
    data = MTDDataModule(mtd, num_workers=0)
    train, test = data.records
    assert len(train) == 8
    assert [r.defect for r in test] == ["nominal"] * 2 + [
        d for d in ("blowhole", "break", "crack", "fray", "uneven") for _ in "ab"
    ]
    assert all(r.label == (r.defect != "nominal") for r in test)
    assert not {r.path for r in train} & {r.path for r in test}
    other = MTDDataModule(mtd, split_seed=5).records[0]
    assert [r.path for r in other] != [r.path for r in train]
    assert [r.path for r in MTDDataModule(mtd).records[0]] == [r.path for r in train]
    assert data.describe().startswith("8 nominal training images; 12 test images (2 nominal, 2 blowhole")


def test_mtd_split_from_file(mtd, tmp_path):
    listed = tmp_path / "names.txt"
    listed.write_text("exp3_num_1003.jpg\nexp1_num_1001.jpg\n")
    train, test = MTDDataModule(mtd, train_files=listed).records
    assert [r.path.name for r in train] == ["exp1_num_1001.jpg", "exp3_num_1003.jpg"]
    assert sum(r.label == 0 for r in test) == 8
    listed.write_text("exp3_num_1003.jpg\nother.jpg\n")
    with pytest.raises(UserError, match=r"1 names are not in .*such as other\.jpg"):
        _ = MTDDataModule(mtd, train_files=listed).records
    with pytest.raises(UserError, match="no such list"):
        _ = MTDDataModule(mtd, train_files=tmp_path / "none.txt").records


def test_mtd_download(mtd, tmp_path, caplog):
    (tmp_path / "packed").mkdir()
    mtd.rename(tmp_path / "packed" / "Magnetic-tile-defect-datasets.-cc4eb53")
    archive = shutil.make_archive(str(tmp_path / "cc4eb53"), "zip", tmp_path / "packed")
    data = MTDDataModule(tmp_path / "data" / "mtd", download=True, url=f"file://{archive}")
    data.prepare_data()
    assert len(data.records[0]) == 8
    assert "not the published numbers of images: 10 of 952 MT_Free, 2 of 115 MT_Blowhole" in caplog.text
    with pytest.raises(UserError, match=r"fetch https://github\.com/abin24/.*, put it at .*magnetic_tile_defects\.zip"):
        MTDDataModule(tmp_path / "other", download=True, url="file:///nowhere.zip").prepare_data()


def test_sample_and_batch(mtd):
    data = ready(MTDDataModule(mtd, batch_size=5, num_workers=0))
    batches = list(data.test_dataloader())
    assert [len(b["image"]) for b in batches] == [5, 5, 2]
    batch = batches[0]
    assert batch["image"].shape == (5, 3, 32, 32)
    assert batch["image"].dtype == torch.float32
    assert batch["mask"].shape == (5, 32, 32)
    assert batch["mask"].dtype == torch.uint8
    assert batch["label"].tolist() == [0, 0, 1, 1, 1]
    assert batch["index"].tolist() == [0, 1, 2, 3, 4]
    assert batch["mask"].flatten(1).any(1).tolist() == [False, False, True, True, True]
    record = data.records[1][2]
    height, width = np.asarray(record.image()).shape[:2]
    assert batch["original_size"][2].tolist() == [height, width]
    assert batch["crop_box"][2].tolist() == [0, 0, height, width]
    assert (batch["defect"][2], batch["category"][2], batch["path"][2]) == (
        "blowhole",
        "magnetic_tile",
        str(record.path),
    )


def test_masks_are_aligned_with_images(mtd):
    data = ready(MTDDataModule(mtd, num_workers=0), resize=48, crop=32)
    for sample in (data.test_set[i] for i in range(2, 12)):
        bright = sample["image"].mean(0) > 1.2  # the drawn defect is brighter than all else
        overlap = (bright & (sample["mask"] == 1)).sum() / (bright | (sample["mask"] == 1)).sum()
        assert overlap > 0.6


def test_empty_mask_is_unknown(mtd):
    path = mtd / "MT_Crack" / "Imgs" / "exp0_num_1000.png"
    Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    data = ready(MTDDataModule(mtd, num_workers=0))
    masks = {s["path"]: s["mask"] for s in (data.test_set[i] for i in range(len(data.test_set)))}
    assert (masks[str(path.with_suffix(".jpg"))] == 255).all()


def broken_image(mtd):
    path = mtd / "MT_Free" / "Imgs" / "exp2_num_1002.jpg"
    path.write_bytes(path.read_bytes()[:400])
    return r"exp2_num_1002\.jpg: cannot be read"


def mask_of_another_size(mtd):
    Image.new("L", (5, 5), 255).save(mtd / "MT_Fray" / "Imgs" / "exp0_num_1000.png")
    return r"exp0_num_1000\.png: mask of 5x5 pixels for an image of"


def missing_category(mtd):
    shutil.rmtree(mtd / "MT_Uneven")
    return "MT_Uneven.*no such folder; .*fetch"


def empty_folder(mtd):
    shutil.rmtree(mtd / "MT_Free")
    (mtd / "MT_Free" / "Imgs").mkdir(parents=True)
    return r"Imgs: holds no image"


def missing_mask(mtd):
    (mtd / "MT_Break" / "Imgs" / "exp1_num_1001.png").unlink()
    return r"exp1_num_1001\.jpg: has no mask exp1_num_1001\.png"


def folder_for_a_file(mtd):
    path = mtd / "MT_Free" / "Imgs" / "exp2_num_1002.jpg"
    path.unlink()
    path.mkdir()
    return "is a folder where an image file should be"


@pytest.mark.parametrize(
    "break_it",
    [broken_image, mask_of_another_size, missing_category, empty_folder, missing_mask, folder_for_a_file],
)
def test_broken_data_is_refused_before_fitting(mtd, break_it):
    message = break_it(mtd)
    with pytest.raises(UserError, match=message):
        MTDDataModule(mtd).prepare_data()


def test_missing_root(tmp_path):
    with pytest.raises(UserError, match=r"MT_Free.*no such folder; .*fetch https://github\.com"):
        MTDDataModule(tmp_path / "nowhere").prepare_data()


def test_images_of_different_shapes_are_kept_apart(mtd):
    data = ready(MTDDataModule(mtd, num_workers=0, batch_size=5), resize=None, roi=[0, 0, 30, 30])
    batch = next(iter(data.test_dataloader()))
    for i, path in enumerate(batch["path"]):
        sample = data.test_set[i]
        assert (sample["path"], list(sample["image"].shape[1:])) == (path, sample["original_size"].tolist())
        for name in ("image", "mask", "region"):
            assert torch.equal(batch[name][i], sample[name])
    assert isinstance(batch["image"], list)
    assert batch["crop_box"].shape == (5, 4)
    assert batch["label"].tolist() == [0, 0, 1, 1, 1]
    squashed = next(iter(ready(data, roi=[0, 0, 30, 30]).test_dataloader()))
    assert squashed["image"].shape == (5, 3, 32, 32)
    assert [region.shape for region in squashed["region"]] == [region.shape for region in batch["region"]]


def test_collate_is_torchs_where_shapes_agree():
    samples = [{"image": torch.rand(3, 4, 4), "label": i, "score": 0.5 * i, "path": f"{i}.png"} for i in range(3)]
    found, expected = collate(samples), default_collate(samples)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value


PATCH = (8.0, 8.0)


def told(caplog, tmp_path, size, transform, patch=PATCH, defects=()):
    """What is said of a data set of six images of that size, or of a list of sizes, and its masks."""
    sizes = size if isinstance(size, list) else [size] * 6
    records, tests = [], []
    for i, (height, width) in enumerate(sizes):
        Image.new("L", (width, height)).save(tmp_path / f"{i}.png")
        records.append(Record(tmp_path / f"{i}.png", 0, "nominal", "x"))
    for i, (height, width) in enumerate(defects):
        mask = np.zeros(sizes[0], np.uint8)
        mask[5 : 5 + height, 5 : 5 + width] = 255
        mask[-1, -1] = 255  # a speck
        Image.fromarray(mask).save(tmp_path / f"mask{i}.png")
        tests.append(Record(tmp_path / "0.png", 1, "dirt", "x", tmp_path / f"mask{i}.png"))
    caplog.clear()
    caplog.set_level("INFO")
    tell_geometry(records, tests, transform, patch)
    return [record.getMessage() for record in caplog.records]


def test_what_the_sizes_of_images_say(caplog, tmp_path):
    squashed, patches = told(caplog, tmp_path, (2000, 3000), Preprocessing())
    assert squashed == (
        "the images are about 3:2 and squashed to 1:1: set model.resize to [208, 320] and model.crop to null, which has"
        " their aspect ratio and about as many pixels, or model.resize_mode to longer_side."
    )
    assert patches == (
        "a patch covers 94 x 62 pixels (width x height) of these images; defects under about 190 x 125 are hard to see:"
        " raise model.resize, with model.tile where that takes too much memory."
    )
    assert not told(caplog, tmp_path, (1024, 1024), Preprocessing())
    assert not told(caplog, tmp_path, (1000, 850), Preprocessing())
    assert not told(caplog, tmp_path, (2000, 3000), Preprocessing((640, 960), None))
    assert not told(caplog, tmp_path, (2000, 3000), Preprocessing(None, None))
    assert len(told(caplog, tmp_path, (2000, 3000), Preprocessing(256, None, "longer_side"))) == 1
    assert len(told(caplog, tmp_path, (2000, 3000), Preprocessing(), patch=None)) == 1
    (tall,) = told(caplog, tmp_path, (100, 30), Preprocessing((64, 64), None))
    assert "about 3:10 and squashed to 1:1: set model.resize to [112, 32]," in tall
    (mixed,) = told(caplog, tmp_path, [(100, 30), (60, 50), (100, 25)], Preprocessing(64, None))
    assert "squashed to 1:1: set model.resize_mode to longer_side, which keeps each one's." in mixed


def test_small_labelled_defects_are_told_of(caplog, tmp_path):
    size, transform = (600, 600), Preprocessing(200, None)  # a patch of 24 pixels
    assert not told(caplog, tmp_path, size, transform, defects=[(10, 50), (60, 60)])
    (line,) = told(caplog, tmp_path, size, transform, defects=[(10, 50), (20, 40), (60, 60)])
    assert "a patch covers 24 x 24 pixels (width x height) of these images; the smallest labelled defect of 3" in line
    assert "masks is 40 x 20: raise model.resize" in line
    assert not told(caplog, tmp_path, size, Preprocessing(None, None), defects=[(3, 3)])


def test_a_fit_tells_of_sizes(tmp_path, caplog):
    for i in range(3):
        Image.new("L", (200, 100)).save(tmp_path / f"{i}.png")
    data = FolderDataModule(tmp_path, test_share=0, num_workers=0)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(pixels_per_patch=60))
    data.transform = Preprocessing(64, None)
    caplog.set_level("INFO")
    data.setup("fit")
    assert "the images are about 2:1 and squashed to 1:1: set model.resize to [48, 96], which" in caplog.text
    assert "a patch covers 188 x 94 pixels" in caplog.text


def test_validation_set_is_asked_for_explicitly(mtd):
    data = ready(MTDDataModule(mtd, num_workers=0))
    assert data.val_dataloader() == []
    with pytest.raises(UserError, match=r"data\.validation=test"):
        data.setup("validate")
    data = ready(MTDDataModule(mtd, num_workers=0, validation="test"))
    data.setup("validate")
    assert len(data.val_dataloader().dataset) == 12


def test_workers_give_the_same_samples():
    options = {"image_size": 64, "train_images": 2, "test_nominal": 3, "test_per_defect": 1}
    one, two = (ready(SyntheticDataModule(**options, num_workers=workers)) for workers in (0, 1))
    for a, b in zip(one.test_dataloader(), two.test_dataloader(), strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["mask"], b["mask"])


def test_a_loader_process_that_is_killed_is_explained():
    for error in (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
    ):
        assert isinstance(loader_error(error), UserError)
        assert "lower data.num_workers or data.batch_size" in str(loader_error(error))
        module = L.LightningModule()
        ReleaseOnException(module, list).on_exception(L.Trainer(logger=False), module, error)
        assert error.__notes__ == [str(loader_error(error))]
    for message in ("CUDA out of memory", "Caught RuntimeError in DataLoader worker process 0."):
        error = RuntimeError(message)
        assert loader_error(error) is error


def test_synthetic_images_depend_on_seed_and_number_alone():
    first = SyntheticDataModule(image_size=64, train_images=3, test_nominal=2, test_per_defect=2)
    np.random.default_rng(1).random()
    again = SyntheticDataModule(image_size=64, train_images=5, test_nominal=1, test_per_defect=3, texture="brick")
    by_path = {r.path: r for part in again.records for r in part}
    shared = [r for part in first.records for r in part if r.path in by_path]
    assert len(shared) == 3 + 1 + 8
    for record in reversed(shared):
        assert np.array_equal(np.asarray(record.image()), np.asarray(by_path[record.path].image()))
    other = SyntheticDataModule(image_size=64, seed=1).records[0][0]
    assert not np.array_equal(np.asarray(other.image()), np.asarray(shared[0].image()))


@pytest.mark.parametrize("texture", ["brick", "gravel", "grass"])
def test_synthetic_defects_are_where_the_mask_is(texture):
    records = SyntheticDataModule(texture, train_images=1, test_nominal=1, test_per_defect=3).records[1][1:]
    assert {r.defect for r in records} == {"scratch", "stain", "foreign", "blur"}
    for record in records:
        damaged, mask = record.read()
        whole, nothing = dataclasses.replace(record, label=0).read()  # the same crop, with another exposure
        assert mask.any()
        assert not mask.all()
        assert not nothing.any()
        before, after = (np.asarray(image)[..., 0].astype(float) for image in (whole, damaged))
        gain, offset = np.polyfit(before[mask == 0], after[mask == 0], 1)
        change = np.abs(after - gain * before - offset)
        assert change[mask == 1].mean() > 2 * change[mask == 0].mean()  # outside: noise, and soft edges


def test_synthetic_training_and_test_crops_share_no_pixel(monkeypatch):
    from pl_patchcore.data import synthetic

    halves = np.zeros((512, 512))
    halves[:, 256:] = 1
    monkeypatch.setattr(synthetic, "_photograph", lambda name: halves)
    train, test = SyntheticDataModule(train_images=10, test_nominal=10, test_per_defect=0).records
    assert all(np.asarray(r.image()).max() < 30 for r in train)
    assert all(np.asarray(r.image()).min() > 225 for r in test)


def test_synthetic_export(tmp_path):
    data = SyntheticDataModule("gravel", image_size=64, train_images=2, test_nominal=1, test_per_defect=1)
    folder = data.export(tmp_path)
    assert folder == tmp_path / "gravel"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png")) == sorted(
        ["train/good/000.png", "train/good/001.png", "test/good/000.png"]
        + [f"test/{d}/000.png" for d in ("scratch", "stain", "foreign", "blur")]
        + [f"ground_truth/{d}/000_mask.png" for d in ("scratch", "stain", "foreign", "blur")]
    )
    record = data.records[1][1]
    image, mask = record.read()
    assert np.array_equal(np.asarray(Image.open(folder / "test" / "scratch" / "000.png")), np.asarray(image))
    assert np.array_equal(np.asarray(Image.open(folder / "ground_truth" / "scratch" / "000_mask.png")) > 0, mask == 1)
    assert [p.name for p in tmp_path.iterdir()] == ["gravel"]
    with pytest.raises(UserError, match="exists already"):
        data.export(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texture": "wood"}, "texture must be brick, gravel or grass"),
        ({"image_size": 300}, "from 64 to 256"),
        ({"train_images": 0}, "train_images must be at least 1"),
        ({"test_per_defect": -1}, "test_per_defect must be a whole number from 0 up"),
        ({"train_images": 99_999_999_999}, "train_images must be at least 1 and at most 100000"),
        ({"test_per_defect": 99_999_999_999}, "test_per_defect must be at least 0 and at most 100000"),
        ({"seed": -1}, "seed must be a whole number from 0 up"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must be a whole number from 0 up"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        SyntheticDataModule(**options)


IMAGE, LABEL, MASK = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), torch.zeros(2, 8, 8)


def test_as_batch():
    assert list(as_batch(IMAGE)) == ["image"]
    assert list(as_batch((IMAGE,))) == ["image"]
    assert list(as_batch((IMAGE, LABEL))) == ["image", "label"]
    assert list(as_batch([IMAGE, [0, 1], MASK])) == ["image", "label", "mask"]
    sample = {"image": IMAGE, "label": np.array([0, 1]), "category": ["a", "b"]}
    assert as_batch(sample) == sample
    for dtype in (torch.float16, torch.bfloat16, torch.float64):  # the model casts
        assert as_batch(IMAGE.to(dtype))["image"].dtype == dtype


@pytest.mark.parametrize("key", ["path", "defect", "category"])
@pytest.mark.parametrize(
    "values", [torch.tensor([3, 7]), np.array([3, 7]), [torch.tensor(3), torch.tensor(7)], (3, 7), ("3", Path("7"))]
)
def test_numbers_name_images_as_texts_do(key, values):
    assert as_batch({"image": IMAGE, key: values})[key] == ["3", "7"]


def test_one_text_names_all_images_and_a_column_numbers_them():
    assert as_batch({"image": IMAGE, "path": "folder"})["path"] == ["folder", "folder"]
    assert as_batch({"image": IMAGE, "index": torch.tensor([[3], [4]])})["index"].tolist() == [3, 4]
    assert as_batch({"image": IMAGE[:1], "index": 5})["index"].tolist() == [5]
    mask = as_batch({"image": IMAGE, "mask": np.ones((2, 4, 4), ">u2")})["mask"]
    assert torch.equal(mask, torch.ones(2, 4, 4, dtype=torch.uint16))


@pytest.mark.parametrize("key", ["index", "group"])
@pytest.mark.parametrize("values", [torch.tensor([3, 7]).int(), np.array([3, 7]), [torch.tensor(3), 7], (3, 7)])
def test_numbers_of_images_and_groups(key, values):
    found = as_batch({"image": IMAGE, key: values})[key]
    assert found.dtype == torch.int64
    assert found.tolist() == [3, 7]


def test_masks_of_numpy():
    array = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8)
    array.flags.writeable = False  # as np.asarray gives of a PIL image
    mirrored = np.ascontiguousarray(array[:, :, ::-1])
    for masks, expected in ((array, array), (array[:, :, ::-1], mirrored), ([*array], array), (tuple(array), array)):
        found = as_batch({"image": IMAGE, "mask": masks})["mask"]
        assert all(torch.equal(mask, torch.tensor(other)) for mask, other in zip(found, expected, strict=True))
    assert list(as_batch((IMAGE, LABEL, None))) == ["image", "label"]


@pytest.mark.parametrize(
    "batch",
    [
        [IMAGE, IMAGE],
        (IMAGE, IMAGE.half(), IMAGE, IMAGE),
        [{"image": IMAGE}, {"image": IMAGE}],
        [{"image": IMAGE}],
        [[IMAGE, LABEL], [IMAGE, LABEL]],
        [IMAGE, [IMAGE, LABEL]],
        [{"image": IMAGE}, None],  # as CombinedLoader gives when one has ended
        {"left": {"image": IMAGE}, "right": {"image": IMAGE}},
        {"left": IMAGE, "right": IMAGE},
    ],
)
def test_batches_of_several_loaders(batch):
    with pytest.raises(UserError, match=r"several loaders.*give one loader, e\.g\. over torch\.utils\.data\.Concat"):
        as_batch(batch)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"picture": IMAGE}, "a batch must be a dict with 'image'"),
        ((IMAGE, LABEL, MASK, MASK), "a batch must be"),
        ((IMAGE, MASK[:, None], LABEL), "a batch must be"),
        ([], "a batch must be"),
        ("image", "a batch must be"),
        (MASK, r"must be \(B, 3, H, W\), got \(2, 8, 8\)"),
        (IMAGE[:, :1], r"must be \(B, 3, H, W\), got \(2, 1, 8, 8\)"),
        (
            IMAGE.int(),
            r"got torch\.int32; make them with model\.transform, or as float32 in \[0, 1\], th",
        ),
        ({"image": IMAGE.long()}, r"got torch\.int64; make them with model\.transform"),
        ({"image": IMAGE, "label": ["good", "bad"]}, r"labels must be numbers, 0 nominal or 1 anomalous, got 'good'"),
        ((IMAGE, ("good", "bad")), "labels must be numbers, 0 nominal or 1 anomalous"),
        ((IMAGE, LABEL[:1]), r"labels must be one for each of the 2 images, got \(1,\)"),
        ((IMAGE, torch.tensor(1)), r"one for each of the 2 images, got \(\)"),
        (
            {"image": IMAGE, "group": ["lot A", "b"]},
            r"'group' .* whole number for .*, got \['lot A', 'b'\]; number the gr",
        ),
        ({"image": IMAGE, "index": np.array(["a", "b"])}, r"'index' .* got <U1 of shape \(2,\); number the images of"),
        ({"image": IMAGE, "index": LABEL / 2}, r"'index' .* whole number .* got torch\.float32 of shape \(2,\)"),
        ({"image": IMAGE, "group": LABEL[:1]}, r"'group' .* got torch\.int64 of shape \(1,\)"),
        ({"image": IMAGE, "group": [None, 1]}, r"'group' .* got \[None, 1\]"),
        (
            {"image": IMAGE, "path": ["a", None]},
            r"'path' of a batch must hold a text, or a text or number for each of the 2 images, got \['a', None\]",
        ),
        ({"image": IMAGE, "index": torch.arange(3)}, r"'index' .* got torch\.int64 of shape \(3,\)"),
        ({"image": IMAGE, "category": LABEL[:1]}, r"'category' .* got torch\.int64 of shape \(1,\); change the data"),
    ],
)
def test_batches_that_are_refused(batch, message):
    with pytest.raises(UserError, match=message):
        as_batch(batch)


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size"])
def test_several_loaders_as_lightning_combines_them(mode):
    for data in (IMAGE, TensorDataset(IMAGE, LABEL), [{"image": x} for x in IMAGE]):
        loader = DataLoader(data, batch_size=2)
        for loaders in ([loader, loader], {"a": loader, "b": loader}):
            batch, _, _ = next(iter(CombinedLoader(loaders, mode)))
            with pytest.raises(UserError, match="several loaders"):
                as_batch(batch)
