"""Reports of real Trainer runs."""

import csv
import json
import math
import re
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from pl_patchcore import PatchCore, Preprocessing, SyntheticDataModule, UserError
from pl_patchcore.anomaly_map import to_original
from pl_patchcore.files import check_output, whole_file
from pl_patchcore.inspection import GREY
from pl_patchcore.metrics import AnomalyEvaluation
from pl_patchcore.regions import find_regions
from pl_patchcore.report import PredictionWriter, TestReport, pictures, predictions, summary
from pl_patchcore.report.coco import run_lengths
from pl_patchcore.report.pictures import Gallery, Shown, colour_scale, overlay
from pl_patchcore.report.predictions import GAP


@pytest.fixture
def fitted(tiny, trainer):
    model = PatchCore(tiny, layers=["fine"], resize=64, crop=48, coreset_size=50)
    data = SyntheticDataModule(train_images=4, test_nominal=3, test_per_defect=2, num_workers=0, batch_size=4)
    trainer(enable_checkpointing=False).fit(model, data)
    return model, data


@pytest.mark.slow
def test_report(fitted, trainer, tmp_path, capsys, monkeypatch):
    model, data = fitted
    (tmp_path / "pictures").mkdir()
    mine = ("mine.png", "missed_by_hand.png")
    for name in mine:
        (tmp_path / "pictures" / name).write_bytes(b"the user's own")
    for name in ("missed_7.png", "false_alarm_1.png"):  # of an earlier run
        (tmp_path / "pictures" / name).touch()
    trainer(callbacks=[TestReport(pictures=2)]).test(model, data, verbose=False)
    monkeypatch.setattr(type(data), "headline", ("pro_0.05", "image_auroc"), raising=False)
    trainer(callbacks=[TestReport(pictures=1)]).test(model, data, verbose=False)
    for name in mine:
        assert (tmp_path / "pictures" / name).read_bytes() == b"the user's own"
        (tmp_path / "pictures" / name).unlink()
    printed = capsys.readouterr().out
    for key, name in (("image_auroc", "image AUROC"), ("pixel_auroc", "pixel AUROC"), ("pro", "PRO")):
        assert f"{name} {model.figures['all'][key]:.4f}" in printed.splitlines()
    for defect, row in model.figures.items():
        cells = [f"{row[key]:.4f}" for key in ("image_auroc", "pixel_auroc", "pro")]
        cells += [str(row["nominal"]), str(row["anomalous"])]
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
        assert [defect, *cells] in [line[:-1] for line in rows]
    assert f"pro_0.05 {model.figures['all']['pro_0.05']:.4f}" in printed.splitlines()  # by the data set's own wish
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["headline"] == ["pro_0.05", "image_auroc"]
    rows = {name: row | {"aupimo": None} for name, row in model.figures.items()}  # NaN: too few nominal pixels
    assert {key: metrics[key] for key in rows["all"]} == rows["all"]
    assert {"all": rows["all"], **metrics["defects"]} == rows
    assert (metrics["nominal"], metrics["anomalous"]) == (3, 8)
    assert metrics["memory_bank"] == [50, 8]
    assert 0 < metrics["seconds_per_image"] < 10
    pictures = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    groups = ("highest_nominal", "least_anomalous", "lowest_anomalous", "most_anomalous")
    assert pictures == [*(f"{group}_1.png" for group in groups), "scores.png"]
    for name in pictures:
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10


def test_loss_to_the_crop_is_reported(fitted, trainer, tmp_path, capsys):
    model, _ = fitted
    images = torch.rand(4, 3, 48, 48)
    masks = torch.zeros(4, 48, 48, dtype=torch.uint8)
    masks[3, 5:9, 5:9] = 1
    loader = DataLoader(TensorDataset(images, torch.tensor([0, 0, 1, 1]), masks), batch_size=3)
    trainer(callbacks=[TestReport(pictures=0)]).test(model, loader, verbose=False)
    said = "1 anomalous images have lost their whole defect"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_foreign_data_without_masks(fitted, trainer, tmp_path, capsys):
    model, _ = fitted
    loader = DataLoader(TensorDataset(torch.rand(4, 3, 48, 48), torch.tensor([0, 0, 1, 1])), batch_size=3)
    trainer(callbacks=[TestReport(1)]).test(model, loader, verbose=False)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["pixel_auroc"] is None
    assert metrics["pro"] is None
    assert metrics["headline"] == ["image_auroc", "pixel_auroc", "pro"]  # where the data set names none
    assert math.isnan(model.figures["all"]["pro"])
    assert "pixel AUROC nan" in capsys.readouterr().out
    assert (tmp_path / "pictures" / "most_anomalous_1.png").is_file()


def test_gallery_keeps_the_right_images():
    gallery = Gallery(2)
    scores = np.random.default_rng(0).permutation(20).tolist()
    for i, score in enumerate(scores):
        heat = torch.full((4, 4), float(score))
        gallery.add(Shown(float(score), i, str(i), torch.zeros(3, 4, 4), heat, None), i % 2)
    kept = {name: sorted(item.score for item in group) for name, group in gallery.groups.items()}
    nominal, anomalous = sorted(scores[::2]), sorted(scores[1::2])
    assert kept == {
        "most_anomalous": anomalous[-2:],
        "lowest_anomalous": anomalous[:2],
        "least_anomalous": nominal[:2],
        "highest_nominal": nominal[-2:],
    }


@pytest.mark.parametrize(
    ("threshold", "wrong"),
    [
        (None, {}),
        (5.5, {"missed": 1, "false_alarm": 2}),
        (0.5, {"false_alarm": 2}),
        (9.5, {"missed": 2}),
        (5.0, {"missed": 1, "false_alarm": 2}),  # a score on the threshold is none above it
    ],
)
def test_pictures_are_called_errors_only_where_they_are(threshold, wrong):
    gallery = Gallery(2)
    for i, (score, label) in enumerate([(1, 0), (2, 0), (7, 0), (8, 0), (5, 1), (6, 1), (9, 1)]):
        gallery.add(Shown(float(score), i, str(i), torch.zeros(3, 4, 4), torch.full((4, 4), score), None), label)
    names = [name for name, _, _ in gallery.named(threshold)]
    assert len(names) == 8
    assert len({(name, place) for name, place, _ in gallery.named(threshold)}) == 8
    assert {name: names.count(name) for name in ("missed", "false_alarm") if name in names} == wrong
    assert names.count("lowest_anomalous") == 2 - wrong.get("missed", 0)
    assert names.count("highest_nominal") == 2 - wrong.get("false_alarm", 0)


def test_a_colour_means_the_same_in_every_picture():
    low, high = colour_scale(3.0)
    image = Image.new("RGB", (3, 1), (100, 100, 100))
    first = np.asarray(overlay(image, np.array([[0.0, 3.0, np.nan]]), low, high))[0].tolist()
    second = np.asarray(overlay(image, np.array([[3.0, 50.0, 6.0]]), low, high))[0].tolist()
    assert first[0] == first[2] == [100, 100, 100]  # nothing there
    assert first[1] == second[0]
    assert second[1] == second[2] != second[0]


def greys(picture):
    """Share of a picture's pixels that are of the grey of what does not count."""
    return (np.asarray(picture.convert("RGB")) == GREY).all(2).mean()


def test_pictures_of_images_that_do_not_count_everywhere(tmp_path, monkeypatch):
    """They are greyed there, and no colour depends on it."""
    gallery, draw = Gallery(1), torch.Generator().manual_seed(0)
    heat = torch.rand(32, 48, generator=draw) + 1
    counts = torch.arange(48) < 24
    for name, label, outside in (("whole", 0, heat), ("half", 1, torch.nan)):
        mask = torch.zeros(32, 48, dtype=torch.uint8)
        gallery.add(Shown(1.0, label, name, torch.rand(3, 32, 48), torch.where(counts, heat, outside), mask), label)
    limits = []
    draw_panels = pictures._panels
    monkeypatch.setattr(pictures, "_panels", lambda *given: limits.append(given[2:4]) or draw_panels(*given))
    gallery.write(tmp_path)
    assert np.isfinite(limits).all()
    assert limits[0][0] == pytest.approx(heat.min())
    with Image.open(tmp_path / "least_anomalous_1.png") as whole, Image.open(tmp_path / "most_anomalous_1.png") as half:
        assert greys(whole) < 0.001
        assert greys(half) > 0.03  # half of the map's panel
    item = gallery.groups["most_anomalous"][0]
    assert np.ptp(item.picture[:, 24:], axis=2).max() == 0
    assert np.array_equal(item.picture[:, :24], (item.image.permute(1, 2, 0) * 255).round().byte().numpy()[:, :24])


def test_large_images_are_shown_small(monkeypatch):
    monkeypatch.setattr(pictures, "LONGEST_SIDE", 40)
    monkeypatch.setattr(pictures, "BAND", 500)
    transform = Preprocessing(None, None)
    levels = torch.randint(0, 256, (3, 50, 90), dtype=torch.uint8)
    heat, mask = torch.rand(50, 90), torch.randint(0, 2, (50, 90), dtype=torch.uint8)
    heat[:, :7] = torch.nan
    item = Shown.of(1.0, 0, "", levels, heat, mask, transform)
    assert item.image.shape == (3, 17, 30)
    assert item.anomaly_map.shape == item.mask.shape == (17, 30)
    assert item.anomaly_map[16, 29] == heat[48:, 87:].max()
    assert item.anomaly_map.isnan().sum() == 17 * 2
    torch.testing.assert_close(item.image[:, 3, 5], levels[:, 9:12, 15:18].float().mean((1, 2)) / 255)
    torch.testing.assert_close(item.image[:, 16, 29], levels[:, 48:, 87:].float().mean((1, 2)) / 255)
    normalised = transform(levels)
    torch.testing.assert_close(Shown.of(1.0, 0, "", normalised, heat, mask, transform).image, item.image)
    monkeypatch.setattr(pictures, "LONGEST_SIDE", 90)
    item = Shown.of(1.0, 0, "", normalised, heat, mask, transform)
    assert item.anomaly_map is heat
    assert item.mask is mask
    assert torch.equal(item.image, transform.denormalise(normalised))


class Lists(L.LightningModule):
    """Hands maps and regions on as lists, of different sizes, as for images of different sizes."""

    image_threshold, pixel_threshold = 0.5, 0.5
    transform = Preprocessing(None, None)

    def predict_step(self, batch, batch_idx):
        maps = [torch.full((20, 30), 0.2), torch.full((12, 16), 0.2)]
        maps[0][5:9, 5:12], maps[1][:, :8] = 0.9, torch.nan
        regions = [torch.ones(40, 60), torch.ones(24, 32)]
        regions[1][:, :16] = 0
        return {
            "score": torch.tensor([0.9, 0.2]),
            "anomaly_map": maps,
            "anomalous": torch.tensor([True, False]),
            "index": torch.tensor([0, 1]),
            "region": regions,
            "original_size": torch.tensor([[40, 60], [24, 32]]),
            "crop_box": torch.tensor([[0.0, 0.0, 40.0, 60.0], [0.0, 0.0, 24.0, 32.0]]),
        }


def test_predictions_of_images_of_different_sizes(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "as_batch", lambda batch: {"image": [torch.zeros(3, 20, 30), batch[1]]})
    loader = DataLoader([torch.zeros(3, 12, 16, dtype=torch.uint8)] * 2, batch_size=2)
    trainer(callbacks=[PredictionWriter(maps=True)]).predict(Lists(), loader)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["regions"] for row in rows] == ["1", "0"]
    first, second = (np.load(tmp_path / row["map"]) for row in rows)
    assert first.shape == (40, 60)
    assert np.isfinite(first).all()
    assert np.array_equal(np.isnan(second), np.arange(32) < np.full((24, 1), 16))
    with Image.open(tmp_path / rows[1]["picture"]) as picture:
        pixels = np.asarray(picture)[:24].astype(int)
    for left in (0, 32 + GAP):  # the image and beside it the map
        assert np.abs(pixels[:, left : left + 12] - 0.7 * 128).max() < 12  # black, greyed
    assert pixels[:, 20:30].max() < 12


@pytest.mark.parametrize("size", ["input", "original"])
def test_figures_of_the_originals(fitted, size, trainer, tmp_path):
    """A test compares what `to_original` gives with the masks as they are in the files."""
    model, data = fitted
    model.metrics_size = size
    trainer(callbacks=[TestReport(1)]).test(model, data, verbose=False)
    metric = AnomalyEvaluation()
    with torch.no_grad():
        for record in data.records[1]:
            image, mask = record.read()
            sample = model.transform.apply(image, mask)
            scores, maps = model(sample["image"][None])
            truth = sample["mask"]
            if size == "original":
                full = to_original(maps[0], mask.shape, tuple(sample["crop_box"].tolist()))
                truth = torch.where(full.isnan(), 255, torch.from_numpy(mask))
                maps = full.nan_to_num(0)[None]
            metric.update(scores, maps, torch.tensor([record.label]), truth[None], torch.tensor([1]))
    expected, metrics = metric.compute(), json.loads((tmp_path / "metrics.json").read_text())
    for name in ("image_auroc", "pixel_auroc", "pro", "pixel_average_precision"):
        assert metrics[name] == pytest.approx(expected[name].item(), abs=1e-6), name
    assert metrics["metrics_size"] == size
    assert (tmp_path / "pictures" / "most_anomalous_1.png").is_file()


def test_metrics_size_is_one_of_two():
    with pytest.raises(UserError, match="metrics_size"):
        PatchCore(metrics_size="both")


def test_masks_of_originals_are_shown_on_the_input():
    transform = Preprocessing(40, (24, 32))
    for size in ((40, 40), (80, 120), (30, 20)):
        mask = np.random.default_rng(0).integers(0, 2, size, dtype=np.uint8)
        sample = transform.apply(Image.new("RGB", size[::-1]), mask)
        shown = summary._at_input(torch.from_numpy(mask), sample["crop_box"].tolist(), (24, 32))
        assert torch.equal(shown, sample["mask"])
    beyond = summary._at_input(torch.ones(4, 4, dtype=torch.uint8), [-2.0, 0.0, 6.0, 4.0], (4, 2))
    assert beyond.tolist() == [[255] * 2, [1] * 2, [1] * 2, [255] * 2]


@pytest.mark.parametrize("name", ["[/old]", r"[old]a:warning:b$\foo$" + "c" * 40])
def test_names_are_printed_as_they_are(name, fitted, trainer, tmp_path, capsys):
    model, _ = fitted
    sample = {"image": torch.rand(3, 48, 48), "mask": torch.zeros(48, 48, dtype=torch.uint8)}
    samples = [
        sample | {"label": 0, "defect": "nominal", "path": "a.png"},
        sample | {"label": 1, "defect": name, "path": f"{name}.png"},
    ]
    folder = tmp_path / f"run{name}"
    runner = trainer(callbacks=[TestReport(1)], default_root_dir=folder)
    runner.test(model, DataLoader(samples, batch_size=2), verbose=False)
    printed = capsys.readouterr().out
    assert f"Written to {folder}: metrics.json" in printed
    cells = "".join(line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│"))
    assert cells == f"all{name}"
    assert (folder / "pictures" / "most_anomalous_1.png").is_file()


def test_every_process_asks_for_the_folder(fitted):
    class SecondProcess:
        is_global_zero = False
        default_root_dir = "unused"
        asked = 0

        @property
        def log_dir(self):  # a broadcast, which stalls unless every process takes part
            self.asked += 1

    process = SecondProcess()
    fitted[0]._trainer, before = None, fitted[0]._trainer
    report = TestReport()
    report.on_test_start(process, fitted[0])
    report.on_test_end(process, fitted[0])
    fitted[0]._trainer = before
    assert process.asked == 2  # at the start and at the end, as the first process does


def test_predictions(fitted, trainer, tmp_path, capsys):
    model, _ = fitted
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 48, 48, generator=generator)
    size, box = torch.tensor([30, 40]), torch.tensor([3.0, 4.0, 27.0, 36.0])
    paths = ["left/1.png", "right/1.png", "2,3.png"]
    samples = [
        {"image": image, "path": path, "original_size": size, "crop_box": box}
        for image, path in zip(images, paths, strict=True)
    ]
    trainer(callbacks=[PredictionWriter(maps=True)]).predict(model, DataLoader(samples, batch_size=2))
    with torch.no_grad():
        scores, maps = model.eval()(images)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == paths
    assert [float(row["score"]) for row in rows] == pytest.approx(scores.tolist(), rel=1e-5)
    assert all(repr(float(row["score"])) == row["score"] for row in rows)
    assert len({row["map"] for row in rows}) == 3
    for row, expected in zip(rows, maps, strict=True):
        written = np.load(tmp_path / row["map"])
        assert written.dtype == np.float32
        assert written.shape == (30, 40)
        assert np.isfinite(written).sum() == 24 * 32
        assert np.nanmean(written) == pytest.approx(expected.mean().item(), rel=0.05)
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == sorted(Path(row["map"]).name for row in rows)
    assert f"3 anomaly scores written to {tmp_path / 'predictions.csv'}" in capsys.readouterr().out


def test_predictions_without_paths(fitted, trainer, tmp_path):
    trainer(callbacks=[PredictionWriter()]).predict(fitted[0], DataLoader(torch.rand(3, 3, 48, 48), batch_size=2))
    with (tmp_path / "predictions.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["0", "1", "2"]


@pytest.fixture
def calibrated(fitted):
    model, data = fitted
    model.model.calibration.fill(torch.linspace(0.05, 0.15, 9), torch.linspace(0.05, 0.13, 9))
    model.false_alarm_rate = 0.2
    return model, data


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # pycocotools' own
def test_predictions_show(calibrated, trainer, tmp_path, capsys):
    """Table, pictures, defects.json and summary agree with what `inspect` finds in the same images."""
    from pycocotools.coco import COCO

    model, data = calibrated
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "000099-old.jpg").touch()
    (tmp_path / "pictures" / "mine.jpg").touch()
    trainer(callbacks=[PredictionWriter(least_area=20)]).predict(model, data)
    found = model.inspect([record.image() for record in data.predict_records], least_area=20)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, one in zip(rows, found, strict=True):
        assert float(row["score"]) == pytest.approx(one.score, rel=1e-5)
        assert (row["verdict"], row["regions"]) == (one.verdict, str(len(one.regions)))
        largest = [str(number) for region in one.regions[:1] for number in (*region.box, region.area)]
        assert [row[name] for name in ("left", "top", "right", "bottom", "area")] == (largest or [""] * 5)
        assert all(len(row[name].replace(".", "").lstrip("0")) <= 6 for name in ("score", "threshold", "normalized"))
        with Image.open(tmp_path / row["picture"]) as picture:
            assert picture.size[0] == 2 * one.size[1] + GAP
            assert picture.size[1] > one.size[0]
    names = {Path(row["picture"]).name for row in rows}
    assert len(names) == len(rows)
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == names | {"mine.jpg"}
    defects = sum(one.anomalous for one in found)
    assert 0 < defects < len(found)
    said = capsys.readouterr().out
    assert f"{defects} of {len(found)} defect (threshold {model.image_threshold:.4g})" in said
    coco = COCO(str(tmp_path / "defects.json"))
    assert [coco.imgs[number]["file_name"] for number in coco.getImgIds()] == [row["path"] for row in rows]
    shown = json.loads(re.search('id="data">(.*?)</script>', (tmp_path / "report.html").read_text(), re.DOTALL)[1])
    assert [image["score"] for image in shown["images"]] == pytest.approx([one.score for one in found], rel=1e-5)
    assert [bool(image["outline"]) for image in shown["images"]] == [bool(one.regions) for one in found]
    assert shown["start"] == pytest.approx(model.image_threshold)
    assert any(one.regions for one in found)
    for number, one in enumerate(found):
        entries = coco.loadAnns(coco.getAnnIds(imgIds=[number]))
        assert len(entries) == len(one.regions)
        for entry, region in zip(entries, one.regions, strict=True):
            left, top, right, bottom = region.box
            mask = np.zeros(one.size, bool)
            mask[top:bottom, left:right] = region.mask
            assert np.array_equal(coco.annToMask(entry), mask)
            assert entry["bbox"] == [left, top, right - left, bottom - top]
            assert entry["area"] == region.area
            assert entry["score"] == pytest.approx(region.score, rel=1e-5)
    model.model.calibration.clear()
    trainer(callbacks=[PredictionWriter(pictures=False)]).predict(model, data)
    assert not (tmp_path / "defects.json").exists()  # without a threshold nobody knows of defects
    assert (tmp_path / "predictions.csv").read_text().splitlines()[0] == "path,score"
    assert "defect" not in capsys.readouterr().out


def test_pictures_of_any_loader(calibrated, trainer, tmp_path):
    """What a foreign loader gives is drawn from the model's input, where the input lies in the original."""
    model, _ = calibrated
    model.model.calibration.clear()
    image = {"image": torch.zeros(3, 48, 48), "path": "a/b.png"}
    place = {"original_size": torch.tensor([60, 80]), "crop_box": torch.tensor([15.0, 20.0, 45.0, 60.0])}
    trainer(callbacks=[PredictionWriter()]).predict(model, DataLoader([image | place]))
    with Image.open(tmp_path / "pictures" / "000000-b.jpg") as picture:
        pixels = np.asarray(picture)[:60].astype(int)
    assert pixels.shape == (60, 80, 3)
    colour = [round(255 * mean) for mean in model.transform.mean]
    assert np.abs(np.median(pixels[15:45, 20:60], (0, 1)) - colour).max() < 4
    assert np.abs(np.median(pixels[:12, :15], (0, 1)) - 127).max() < 4
    with pytest.raises(UserError, match="least_area must be"):
        PredictionWriter(least_area=0)


def test_runs_of_a_region_in_a_column(tmp_path):
    region = find_regions(np.ones((4, 3)), np.array([[0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]], bool))[0]
    assert run_lengths(region, (4, 3)) == [8, 2, 2]


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
    with pytest.raises(RuntimeError, match="stop here"):
        trainer(callbacks=[PredictionWriter(maps=True), Fail()]).predict(model, data)
    assert not (tmp_path / "predictions.csv").exists()  # its maps may be gone


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
    full_disk = r"a\.txt: cannot be written: the disk is full \(.* free\); make room"
    with pytest.raises(UserError, match=full_disk), whole_file(tmp_path / "a.txt"), Path("/dev/full").open("w") as full:
        full.write("x")
    with pytest.raises(UserError, match=r"check: cannot be written: not a directory; make .*a\.txt a folder"):
        check_output(tmp_path / "a.txt" / "x")
    for place, reason in {
        tmp_path / "b": "is a directory or a device; give the name of a file",
        Path("/dev/null"): "is a directory or a device; give the name of a file",
        Path("/proc/x"): "no such file or directory; make /proc a folder that takes it, or choose another one",
    }.items():
        with pytest.raises(UserError, match=f"^{place}: cannot be written: {reason}.$"), whole_file(place):
            pytest.fail("the work began")
    with whole_file(tmp_path / "d") as partial:
        torch.save({}, partial)
    (tmp_path / "d").unlink()
    check_output(tmp_path / "c")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.txt", "b", "c"]
