"""Reports of real Trainer runs."""

import json
import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from pl_patchcore import PatchCore, SyntheticDataModule
from pl_patchcore.report import PredictionWriter, TestReport
from pl_patchcore.report.files import whole_file
from pl_patchcore.report.pictures import Gallery


@pytest.fixture
def fitted(tiny, trainer):
    model = PatchCore(tiny, layers=["fine"], resize=64, crop=48, coreset_size=50)
    data = SyntheticDataModule(train_images=4, test_nominal=3, test_per_defect=2, num_workers=0, batch_size=4)
    trainer(enable_checkpointing=False).fit(model, data)
    return model, data


def test_report(fitted, trainer, tmp_path, capsys):
    model, data = fitted
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "mine.png").write_bytes(b"the user's own")
    trainer(callbacks=[TestReport(pictures=3)]).test(model, data, verbose=False)
    trainer(callbacks=[TestReport(pictures=2)]).test(model, data, verbose=False)
    assert (tmp_path / "pictures" / "mine.png").read_bytes() == b"the user's own"
    (tmp_path / "pictures" / "mine.png").unlink()
    printed = capsys.readouterr().out
    for key, name in (("image_auroc", "image AUROC"), ("pixel_auroc", "pixel AUROC"), ("pro", "PRO")):
        assert f"{name} {model.figures['all'][key]:.4f}" in printed.splitlines()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["image_auroc"] == model.figures["all"]["image_auroc"]
    assert metrics["defects"]["stain"]["pro"] == model.figures["stain"]["pro"]
    assert (metrics["nominal"], metrics["anomalous"]) == (3, 8)
    assert metrics["memory_bank"] == [50, 8]
    assert 0 < metrics["seconds_per_image"] < 10
    pictures = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    groups = ("false_alarm", "least_anomalous", "missed", "most_anomalous")
    assert pictures == [f"{g}_{i}.png" for g in groups for i in (1, 2)] + ["scores.png"]
    for name in pictures:
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10


def test_loss_to_the_crop_is_reported(fitted, trainer, capsys):
    model, _ = fitted
    images = torch.rand(4, 3, 48, 48)
    masks = torch.zeros(4, 48, 48, dtype=torch.uint8)
    masks[3, 5:9, 5:9] = 1
    loader = DataLoader(TensorDataset(images, torch.tensor([0, 0, 1, 1]), masks), batch_size=3)
    trainer(callbacks=[TestReport(pictures=0)]).test(model, loader, verbose=False)
    assert "1 anomalous images have lost their whole defect" in capsys.readouterr().out


def test_foreign_data_without_masks(fitted, trainer, tmp_path, capsys):
    model, _ = fitted
    loader = DataLoader(TensorDataset(torch.rand(4, 3, 48, 48), torch.tensor([0, 0, 1, 1])), batch_size=3)
    trainer(callbacks=[TestReport()]).test(model, loader, verbose=False)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["pixel_auroc"] is None
    assert metrics["pro"] is None
    assert math.isnan(model.figures["all"]["pro"])
    assert "pixel AUROC nan" in capsys.readouterr().out
    assert (tmp_path / "pictures" / "most_anomalous_2.png").is_file()


def test_gallery_keeps_the_right_images():
    gallery = Gallery(2)
    scores = np.random.default_rng(0).permutation(20).tolist()
    for i, score in enumerate(scores):
        gallery.add(float(score), i % 2, str(i), torch.zeros(3, 4, 4), torch.full((4, 4), float(score)), None)
    kept = {name: sorted(item.score for item in group) for name, group in gallery.groups.items()}
    nominal, anomalous = sorted(scores[::2]), sorted(scores[1::2])
    assert kept == {
        "most_anomalous": anomalous[-2:],
        "missed": anomalous[:2],
        "least_anomalous": nominal[:2],
        "false_alarm": nominal[-2:],
    }


class Fail(Callback):
    def on_predict_batch_end(self, *args):
        raise RuntimeError("stop here")


def test_interrupted_prediction_leaves_no_whole_file(fitted, trainer, tmp_path):
    model, data = fitted
    with pytest.raises(RuntimeError, match="stop here"):
        trainer(callbacks=[PredictionWriter(), Fail()]).predict(model, data)
    assert not (tmp_path / "predictions.csv").exists()
    assert (tmp_path / "predictions.csv.partial").exists()
    trainer(callbacks=[PredictionWriter()]).predict(model, data)
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + 11
    assert not (tmp_path / "predictions.csv.partial").exists()


def test_whole_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError), whole_file(tmp_path / "a.txt"):
        (tmp_path / "b").write_text("fails")
    assert (tmp_path / "a.txt").read_text() == "old"
    with whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b"]
