"""The submission to the evaluation server of MVTec AD 2, from made-up images in the data set's layout."""

import logging
import shutil
import tarfile

import fakes
import numpy as np
import pytest
import tifffile
from networks import TinyBackbone
from PIL import Image

from pl_patchcore import MVTecAD2DataModule, PatchCore, SyntheticDataModule, UserError
from pl_patchcore.cli import main
from pl_patchcore.data import mvtec_ad_2
from pl_patchcore.report import SubmissionWriter, check_submission

pytestmark = pytest.mark.filterwarnings("ignore::pl_patchcore.backbone.UntrainedBackboneWarning")


@pytest.fixture(autouse=True)
def two_categories(monkeypatch):
    """The server's numbers of images, as small as the fake's."""
    monkeypatch.setattr(mvtec_ad_2, "PRIVATE_COUNTS", {"can": 2, "vial": 2})


def fitted(trainer, root, category, **settings):
    settings = {"resize": 32, "crop": None, "calibration": "images", "false_alarm_rate": 0.3} | settings
    model = PatchCore(TinyBackbone(), layers=["fine"], coreset_size=20, projection_dim=8, **settings)
    data = MVTecAD2DataModule(root, category, num_workers=0)
    trainer().fit(model, datamodule=data)
    return model, data


@pytest.fixture
def submission(trainer, tmp_path, capsys):
    root = fakes.mvtec_ad_2(tmp_path / "set")
    for category in ("can", "vial"):
        model, data = fitted(trainer, root, category)
        trainer(callbacks=[SubmissionWriter(str(tmp_path / "mine"))]).predict(model, datamodule=data)
        told = capsys.readouterr().out
        if category == "can":
            assert "can is complete; to come: vial" in told
            with pytest.raises(UserError, match=r"mine/anomaly_images/vial: is missing in the submission, one of 1"):
                check_submission(tmp_path / "mine")
    assert "Submission complete, to be uploaded to https://benchmark.mvtec.com" in told
    return tmp_path / "mine", model


def test_a_submission_is_complete(submission):
    folder, model = submission
    check_submission(folder)
    with tarfile.open(folder.with_name("mine.tar.gz")) as packed:
        names = packed.getnames()
    assert len(names) == 2 * 2 * 2 * 2  # kinds, categories, parts, images
    assert "mine/anomaly_images/can/test_private/000_regular.tiff" in names
    assert "mine/anomaly_images_thresholded/vial/test_private_mixed/001_mixed.png" in names
    maps = folder / "anomaly_images" / "vial" / "test_private"
    nominal, anomalous = (tifffile.imread(maps / f"00{i}_regular.tiff") for i in range(2))
    assert (nominal.dtype, nominal.shape) == (np.float16, (40, 50))
    assert anomalous.max() > 1.5 * nominal.max()  # the fake has a defect in every second one
    image = Image.open(folder.parent / "set" / "vial" / "test_private" / "001_regular.png")
    assert anomalous == pytest.approx(model.inspect(image).anomaly_map.astype(np.float16), rel=2e-3)
    marked = np.asarray(Image.open(folder / "anomaly_images_thresholded/vial/test_private/001_regular.png"))
    assert set(np.unique(marked)) == {0, 255}
    sure = np.abs(anomalous - model.pixel_threshold) > 0.01 * model.pixel_threshold  # float16 rounds
    assert ((marked == 255) == (anomalous > model.pixel_threshold))[sure].all()


def missing(folder):
    (folder / "anomaly_images/can/test_private/001_regular.tiff").unlink()


def misnamed(folder):
    path = folder / "anomaly_images_thresholded/can/test_private_mixed/000_mixed.png"
    path.rename(path.with_name("000_regular.png"))


def too_many(folder):
    (folder / "notes.txt").touch()


def whole_category_gone(folder):
    shutil.rmtree(folder / "anomaly_images_thresholded/vial")


def of_float32(folder):
    path = folder / "anomaly_images/vial/test_private/000_regular.tiff"
    tifffile.imwrite(path, tifffile.imread(path).astype(np.float32))


def of_three_channels(folder):
    path = folder / "anomaly_images/vial/test_private/000_regular.tiff"
    tifffile.imwrite(path, np.zeros((40, 50, 3), np.float16), photometric="rgb")


def of_grey_levels(folder):
    Image.new("L", (50, 40), 7).save(folder / "anomaly_images_thresholded/can/test_private/000_regular.png")


def cut_short(folder):
    path = folder / "anomaly_images/can/test_private/000_regular.tiff"
    path.write_bytes(path.read_bytes()[:5])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            missing,
            r"test_private/001_regular\.tiff: is missing in the submission, one of 1; predict this category again",
        ),
        (misnamed, r"test_private_mixed/000_mixed\.png: is missing"),
        (too_many, r"notes\.txt: belongs to no submission, one of 1; remove it"),
        (whole_category_gone, r"anomaly_images_thresholded/vial: is missing"),
        (of_float32, r"000_regular\.tiff: must have one channel of float16, has float32 of shape \(40, 50\)"),
        (of_three_channels, r"000_regular\.tiff: must have one channel of float16, has float16 of shape \(40, 50, 3\)"),
        (of_grey_levels, r"000_regular\.png: must have one channel of 8 bits with the levels 0 and 255"),
        (cut_short, r"000_regular\.tiff: cannot be read"),
    ],
)
def test_what_the_server_would_not_take_is_told(broken, message, tmp_path):
    folder = tmp_path / "mine"
    for category in ("can", "vial"):
        for part, ending in mvtec_ad_2.PRIVATE.items():
            for i in range(2):
                (folder / "anomaly_images" / category / part).mkdir(parents=True, exist_ok=True)
                path = folder / "anomaly_images" / category / part / f"00{i}_{ending}.tiff"
                tifffile.imwrite(path, np.zeros((40, 50), np.float16))
                path = folder / "anomaly_images_thresholded" / category / part / f"00{i}_{ending}.png"
                fakes.save(np.full((40, 50), 255 * i, np.uint8), path)
    check_submission(folder)
    broken(folder)
    with pytest.raises(UserError, match=message):
        check_submission(folder)


def test_what_makes_no_submission_is_refused_before_the_work(trainer, tmp_path):
    root, writer = fakes.mvtec_ad_2(tmp_path / "set"), SubmissionWriter(str(tmp_path / "mine"))
    model, data = fitted(trainer, root, "can")
    with pytest.raises(UserError, match="a submission is of MVTecAD2DataModule, got SyntheticDataModule"):
        trainer(callbacks=[writer]).predict(model, datamodule=SyntheticDataModule(num_workers=0))
    (root / "can" / "test_private" / "000_regular.png").unlink()
    with pytest.raises(UserError, match=r"000_regular\.tiff: is missing .*one of 1"):  # told at the end
        trainer(callbacks=[writer]).predict(model, datamodule=MVTecAD2DataModule(root, "can", num_workers=0))
    for settings, message in (
        ({"calibration": "none", "false_alarm_rate": 0.01}, "needs a threshold of pixels, and the model has none"),
        (
            {"crop": 24},
            "needs a score of every pixel, and the model crops images to .*24.*; fit it with model.crop null",
        ),
    ):
        model, data = fitted(trainer, root, "can", **settings)
        with pytest.raises(UserError, match=message):
            trainer(callbacks=[writer]).predict(model, datamodule=data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_category_by_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    monkeypatch.chdir(tmp_path)
    fakes.mvtec_ad_2(tmp_path / "data" / "mvtec_ad_2")
    model = [
        "backbone=resnet18",
        "weights=null",
        "layers=[layer1]",
        "resize=32",
        "coreset_size=20",
        "save_backbone=true",
    ]
    common = ["--config=data/mvtec_ad_2", "--trainer.accelerator=cpu", "--data.num_workers=0", "--data.category=vial"]
    main(["fit", *common, *(f"--model.{option}" for option in model), "--trainer.default_root_dir=fit"])
    (checkpoint,) = (tmp_path / "fit").rglob("*.ckpt")
    main(["predict", *common, f"--ckpt_path={checkpoint}", "--trainer.callbacks=SubmissionWriter",
          "--trainer.callbacks.folder=mine", "--predictions.pictures=false", "--predictions.page=false"])  # fmt: skip
    assert "Submission mine: vial is complete; to come: can" in capsys.readouterr().out
    check_submission(tmp_path / "mine", ["vial"])
