import logging
import os
import unicodedata
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
from networks import TinyBackbone
from PIL import Image

from pl_patchcore import FolderDataModule, MVTecDataModule, PatchCore, UserError


@pytest.fixture
def root(tmp_path):
    return fakes.stranger(tmp_path / "mein Ordner")


def model(**options):
    settings = {"layers": ["fine", "coarse"], "resize": 48, "crop": None, "coreset_ratio": 0.2}
    return PatchCore(TinyBackbone(), **(settings | options))


def masks_for(root, names, suffix="_mask.png"):
    for name in names:
        with Image.open(root / "bad" / name) as image:
            mask = np.zeros((image.height, image.width), np.uint8)
        mask[20:30, 20:30] = 255
        path = (root / "masks" / name).with_suffix("")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path.with_name(path.name + suffix))


NAMES = ("Kratzer/1.JPG", "Kratzer/2.jpg", "Fleck ü/1.png")


def test_a_strangers_folder(root, trainer, caplog):
    masks_for(root, NAMES)
    with caplog.at_level(logging.INFO):
        data = FolderDataModule(root / "ok", anomalous=root / "bad", masks=root / "masks", num_workers=0)
        train, test = data.records
    assert len(train) == 8
    assert [r.defect for r in test] == ["nominal"] * 2 + ["Fleck ü", "Kratzer", "Kratzer"]
    assert "2 files that are no images are passed over, such as Notizen.txt" in caplog.text
    found = model()
    runner = trainer()
    runner.fit(found, data)
    (logged,) = runner.test(found, data, verbose=False)
    assert logged["test/image_auroc"] == 1.0  # a bright square on noise
    assert logged["test/pro"] > 0.8
    assert set(found.figures) == {"all", "Fleck ü", "Kratzer"}


def grouped(data):
    data.transform = model().transform
    data.setup("fit")
    return [data.train_set[place]["group"] for place in range(len(data.train_set))]


def test_groups_by_name(root):
    data = FolderDataModule(root / "ok", test_share=0, group_by="(?i)(teil|[a-z])", num_workers=0)
    stems = [r.path.relative_to(root / "ok").as_posix() for r in data.records[0]]
    assert {record.group for record in data.records[0]} >= {"Teil", "S", "a"}
    groups = dict(zip(stems, grouped(data), strict=True))
    assert groups["Teil 1.JPG"] == groups["Teil 2.jpeg"] == stems.index("Teil 1.JPG")
    assert groups["a.TIFF"] == stems.index("a.TIFF")
    whole = FolderDataModule(root / "ok", test_share=0, group_by=r"^[^/]+(?=/)|\w+", num_workers=0)
    assert "Schicht 2" in {record.group for record in whole.records[0]}
    assert grouped(FolderDataModule(root / "ok", test_share=0, num_workers=0)) == list(range(10))
    with pytest.raises(UserError, match=r"data\.group_by 'Teil' finds nothing in .*; give a regular expression"):
        _ = FolderDataModule(root / "ok", group_by="Teil").records
    with pytest.raises(UserError, match=r"data\.group_by '\(' is no regular expression: "):
        FolderDataModule(root / "ok", group_by="(")
    with pytest.raises(UserError, match=r"a manifest has the column group"):
        FolderDataModule(manifest="list.csv", group_by="x")


def test_groups_and_calibration_images_of_a_manifest(root):
    manifest = root / "list.csv"
    lines = ["ok/e.png,nominal,train,p", "ok/f.jpg,nominal,train,", "ok/b.webp,nominal,train,p"]
    lines += ["ok/a.TIFF,nominal,calibration,q", "ok/Teil 1.JPG,nominal,test,"]
    manifest.write_text("\n".join(["path,label,split,group", *lines]))
    data = FolderDataModule(manifest=manifest, num_workers=0)
    assert grouped(data) == [0, 1, 0]
    assert [record.path.name for record in data.calibration_records] == ["a.TIFF"]
    manifest.write_text("path,label,split\nbad/Kratzer/1.JPG,anomalous,calibration")
    with pytest.raises(UserError, match="an anomalous image cannot train or calibrate"):
        _ = FolderDataModule(manifest=manifest).records


def test_thresholds_from_images_given_apart(root, trainer):
    apart = root / "apart"
    apart.mkdir()
    for name in ("e.png", "f.jpg", "a.TIFF", "b.webp"):
        (root / "ok" / name).rename(apart / name)
    data = FolderDataModule(root / "ok", calibration=apart, test_share=0, num_workers=0)
    found = model(calibration="images")
    trainer(enable_checkpointing=False).fit(found, data)
    scores = found(torch.stack([found.transform(record.image()) for record in data.calibration_records]))[0]
    torch.testing.assert_close(found.model.calibration.scores, scores.detach())
    assert found.memory_bank.seen.item() == 6 * 144
    found.update(trainer(enable_checkpointing=False), FolderDataModule(apart, test_share=0, num_workers=0))
    assert found.model.calibration.images.tolist() == [-1] * 4
    with pytest.raises(UserError, match="must lie apart"):
        _ = FolderDataModule(root / "ok", calibration=root / "ok" / "Schicht 2").records


def test_split_is_seeded_and_leaves_nothing_out(root):
    parts = [FolderDataModule(root / "ok", split_seed=seed).records for seed in (0, 0, 1)]
    names = [[r.path.name for r in test] for _, test in parts]
    assert names[0] == names[1] != names[2]
    for train, test in parts:
        assert len({r.path for r in train} | {r.path for r in test}) == 10 == len(train) + len(test)


def test_test_nominal_takes_the_place_of_the_share(root):
    data = FolderDataModule(root / "ok", test_nominal=root / "bad" / "Kratzer")
    assert [len(part) for part in data.records] == [10, 2]
    with pytest.raises(UserError, match=r"Kratzer.*: is named twice"):
        _ = FolderDataModule(root / "bad", test_nominal=root / "bad" / "Kratzer").records


def test_a_broken_file_is_named_before_any_work(root):
    broken = root / "ok" / "kaputt.jpg"
    broken.write_bytes((root / "ok" / "f.jpg").read_bytes()[:300])
    with pytest.raises(UserError, match=r"kaputt\.jpg: cannot be read"):
        FolderDataModule(root / "ok", num_workers=0).prepare_data()


def test_broken_files_can_be_skipped(root, caplog):
    good = (root / "ok" / "f.jpg").read_bytes()
    (root / "ok" / "kaputt.jpg").write_bytes(good[:300])
    png = bytearray((root / "ok" / "e.png").read_bytes())
    png[len(png) // 2] ^= 0xFF  # head and end are as they should be
    (root / "ok" / "inside.png").write_bytes(bytes(png))
    data = FolderDataModule(root / "ok", on_broken="skip", num_workers=0)
    train, test = data.records
    assert len(train) + len(test) == 10
    assert len(data.skipped) == 2
    assert "2 files are left out" in caplog.text
    assert "kaputt.jpg: cannot be read" in caplog.text
    assert "inside.png: cannot be read" in caplog.text
    assert data.describe().endswith("; 2 unreadable files left out")
    data.prepare_data()


def test_masks_must_match(root):
    def records():
        return FolderDataModule(root / "ok", anomalous=root / "bad", masks=root / "masks").records

    with pytest.raises(UserError, match=r"masks: no such folder"):
        records()
    masks_for(root, NAMES[:2], ".png")
    with pytest.raises(
        UserError, match=r"Fleck ü/1\.png: has no mask .*masks/Fleck ü/1\.png; add it, or use data\.man"
    ):
        records()
    masks_for(root, NAMES[2:])
    assert [r.mask_path.name for r in records()[1][2:]] == ["1_mask.png", "1.png", "2.png"]
    masks_for(root, NAMES[2:], ".png")
    with pytest.raises(UserError, match=r"1_mask\.png: has the same name as .*1\.png; rename one"):
        records()
    (root / "masks" / "Fleck ü" / "1.png").rename(root / "masks" / "Fleck ü" / "9.png")
    with pytest.raises(UserError, match=r"9\.png: belongs to no image"):
        records()


def test_accents_match_however_they_are_written(root):
    masks_for(root, NAMES)
    folder = root / "masks" / "Fleck ü"
    folder.rename(folder.with_name(unicodedata.normalize("NFD", folder.name)))
    test = FolderDataModule(root / "ok", anomalous=root / "bad", masks=root / "masks").records[1]
    assert all(r.mask_path is not None for r in test if r.label == 1)


def test_links_are_followed_and_not_in_circles(root, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a").symlink_to(root / "ok")
    (tmp_path / "linked" / "a2").symlink_to(tmp_path / "linked")
    train, test = FolderDataModule(tmp_path / "linked").records
    assert len(train) + len(test) == 10


def test_manifest(root):
    masks_for(root, NAMES[:1])
    text = [
        "path;label;split;defect;mask;category",
        *(f"ok/{name};nominal;train;;;lid" for name in ("Teil 1.JPG", "größe.PNG", "日本.bmp")),
        "ok/e.png;0;test;;;lid",
        "bad/Kratzer/1.JPG;anomalous;;scratch;masks/Kratzer/1_mask.png;lid",
        "bad/Kratzer/2.jpg;1;test;;;",
    ]
    manifest = root / "list.csv"
    manifest.write_text("\n".join(text), encoding="utf-8-sig")  # as spreadsheets write it
    data = FolderDataModule(manifest=manifest, num_workers=0)
    data.prepare_data()
    train, test = data.records
    assert [r.path.name for r in train] == ["Teil 1.JPG", "größe.PNG", "日本.bmp"]
    assert [(r.label, r.defect, r.category) for r in test] == [
        (0, "nominal", "lid"), (1, "scratch", "lid"), (1, "anomalous", "images"),
    ]  # fmt: skip
    assert [r.mask_path is None for r in test] == [True, False, True]
    manifest.write_text("path,label\n" + "\n".join(f"ok/{n},nominal" for n in ("e.png", "f.jpg", "b.webp", "c&d.png")))
    assert [len(part) for part in FolderDataModule(manifest=manifest, test_share=0.25).records] == [3, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ok/e.png,fine,train", r"line 3: label must be nominal or anomalous, got 'fine'"),
        ("ok/e.png,nominal,training", r"line 3: split must be train, test or calibration, got 'training'"),
        ("ok/e.png,anomalous,train", r"line 3: an anomalous image cannot train"),
        ("ok/e.png,nominal", r"line 3: has more or fewer fields"),
        (",nominal,train", r"line 3: names no path"),
        ("ok/\0.png,nominal,train", "holds null characters"),
        ('"' + "x" * 200_000, "is no CSV .*field larger"),
        ("ok/none.png,nominal,train", r"none\.png: no such file"),
    ],
)
def test_bad_manifest(root, line, message):
    manifest = root / "list.csv"
    manifest.write_text(f"path,label,split\nok/f.jpg,nominal,test\n{line}\n")
    with pytest.raises(UserError, match=message):
        FolderDataModule(manifest=manifest).prepare_data()


def test_bad_manifest_header(root):
    manifest = root / "list.csv"
    manifest.write_text("path,klass\nx,y\n")
    with pytest.raises(UserError, match=r"list\.csv: has a column 'klass'; its first line must name"):
        _ = FolderDataModule(manifest=manifest).records
    manifest.write_text("")
    with pytest.raises(UserError, match=r"lacks the columns path and label"):
        _ = FolderDataModule(manifest=manifest).records
    manifest.write_bytes("path,label\nü,nominal".encode("latin-1"))
    with pytest.raises(UserError, match=r"is not UTF-8 text"):
        _ = FolderDataModule(manifest=manifest).records


def test_nominal_images_alone_and_others_to_predict(root, trainer):
    data = FolderDataModule(root / "ok", num_workers=0, test_share=0.3)
    assert len(data.records[0]) == 7
    found, runner = model(calibration_share=0.4, false_alarm_rate=0.3), trainer()
    runner.fit(found, data)
    (logged,) = runner.test(found, data, verbose=False)
    assert np.isnan(logged["test/image_auroc"])
    assert found.figures["all"]["nominal"] == 3
    data = FolderDataModule(predict=root / "bad", num_workers=0)
    batches = runner.predict(found, data)
    paths = [path for batch in batches for path in batch["path"]]
    assert [path.rsplit("bad/")[-1] for path in paths] == ["Fleck ü/1.png", "Kratzer/1.JPG", "Kratzer/2.jpg"]
    assert torch.cat([batch["anomalous"] for batch in batches]).all()


def test_the_crop_is_told(root, trainer, caplog):
    cropping, runner = model(crop=36), trainer()
    with caplog.at_level(logging.INFO):
        runner.fit(cropping, FolderDataModule(root / "ok", num_workers=0))
        runner.predict(cropping, FolderDataModule(predict=root / "bad", num_workers=0))
        runner.fit(model(), FolderDataModule(root / "ok", num_workers=0))
    told = [message for message in caplog.messages if "the crop" in message]
    assert (
        told
        == ["the crop leaves 44 % of each image out: nothing is found there; --model.crop null inspects all of it."] * 2
    )


def test_prediction_looks_at_no_other_images(root, trainer):
    """A fit's settings serve on another machine, too."""
    data = FolderDataModule(nominal=root / "elsewhere", predict=root / "bad", num_workers=0)
    data.look("predict")
    with pytest.raises(UserError, match="elsewhere: no such folder"):
        data.look("fit")
    found = model()
    trainer().fit(found, FolderDataModule(root / "ok", num_workers=0))
    assert len(trainer().predict(found, data)) == 1


def test_predict_needs_nothing_but_images(root):
    one = FolderDataModule(predict=root / "bad" / "Kratzer" / "2.jpg", num_workers=0)
    one.setup("predict")
    (batch,) = one.predict_dataloader()
    assert (batch["label"].tolist(), batch["defect"]) == ([-1], ["unknown"])
    assert (batch["mask"] == 255).all()
    for data, stage, message in (
        (FolderDataModule(), "fit", "no images are named"),
        (one, "fit", "training set is empty"),
        (FolderDataModule(predict=root / "none"), "predict", "no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            data.setup(stage)


@pytest.mark.parametrize(
    "lines",
    [
        ["ok/e.png,nominal,train", "ok/e.png,nominal,test"],
        ["ok/e.png,nominal,train", "ok/../ok/e.png,anomalous,test"],
        ["ok/e.png,nominal,test", "ok/e.png,anomalous,test"],
        ["ok/link.png,nominal,train", "ok/e.png,nominal,train"],
        ["ok/hard.png,nominal,train", "ok/e.png,nominal,test"],
        ["ok/e.png,nominal,", "ok/e.png,nominal,"],
    ],
)
def test_manifest_names_an_image_twice(root, lines):
    (root / "ok" / "link.png").symlink_to("e.png")
    (root / "ok" / "hard.png").hardlink_to(root / "ok" / "e.png")
    manifest = root / "list.csv"
    manifest.write_text("\n".join(["path,label,split", *lines]))
    with pytest.raises(UserError, match=r"e\.png: is named twice.*; list it once in .*list\.csv"):
        _ = FolderDataModule(manifest=manifest).records


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_links_to_one_file_in_one_folder_count_once(root, link):
    link(root / "ok" / "link.png", root / "ok" / "e.png")
    train, test = FolderDataModule(root / "ok").records
    assert len({*train, *test}) == 10 == len(train) + len(test)


def test_folders_of_systems_are_passed_over(root):
    def paths():
        data = FolderDataModule(root / "ok", anomalous=root / "bad", masks=root / "masks")
        return [record.path for part in data.records for record in part]

    masks_for(root, NAMES)
    before = paths()
    for place in ("ok", "bad", "bad/Kratzer", "masks", "masks/Kratzer"):
        for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
            (root / place / name / "1.png").mkdir(parents=True)
            Image.new("L", (9, 9)).save(root / place / name / "thumb.png")
    assert paths() == before


def test_a_folder_that_cannot_be_listed_is_named(root, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("Kratzer"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"Kratzer: the folder cannot be listed \(Permission denied\)"):
        _ = FolderDataModule(root / "ok", anomalous=root / "bad").records


@pytest.mark.parametrize("option", ["nominal", "anomalous", "predict", "manifest"])
def test_paths_that_cannot_be(root, option):
    options = {"nominal": root / "ok"} if option in ("anomalous", "predict") else {}
    data = FolderDataModule(**options, **{option: "n" * 5000})
    with pytest.raises(UserError, match="nnn"):
        _ = data.records, data.predict_records


def test_pipes_are_refused(root):
    os.mkfifo(root / "ok" / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png: is a pipe"):
        FolderDataModule(root / "ok", num_workers=0).prepare_data()
    data = FolderDataModule(root / "ok", num_workers=0, on_broken="skip")
    assert sum(map(len, data.records)) == 10
    os.mkfifo(root / "list.csv")
    with pytest.raises(UserError, match=r"list\.csv: is a pipe"):
        _ = FolderDataModule(manifest=root / "list.csv").records


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("good bad masks", "4 of its 6 images are no nominal ones"),
        ("train/good test/dent ground_truth/dent", "4 of its 6 images are no nominal ones"),
        ("ok Kratzer Fleck", "4 of its 6 images are no nominal ones"),  # of whatever name, beside one that says nominal
        ("a b", None),
        ("a/defects b", "2 of its 4 images are no nominal ones"),  # told of: it may be meant
    ],
)
def test_nominal_folder_that_holds_more(tmp_path, caplog, names, found):
    for name in names.split():
        (tmp_path / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (9, 9)).save(tmp_path / name / f"{i}.png")
    if "defects" in names or found is None:
        assert len(FolderDataModule(tmp_path, test_share=0).records[0]) == 2 * len(names.split())
        assert (found or "") in caplog.text
        assert bool(found) == ("MVTecDataModule" in caplog.text)
    else:
        with pytest.raises(UserError, match=rf"{found} by name, .* set data\.nominal .* or use MVTecDataModule"):
            _ = FolderDataModule(tmp_path).records


def test_masks_beside_nominal_images(root):
    Image.new("L", (9, 9)).save(root / "ok" / "e_mask.png")
    with pytest.raises(UserError, match=r"1 of its 11 images are masks by name, such as .*e_mask\.png"):
        _ = FolderDataModule(root / "ok").records


@pytest.mark.parametrize("name", ["good", "Good", "ok", "ground_truth"])
def test_anomalous_folder_that_holds_nominal_images(root, name):
    (root / "bad" / name).mkdir()
    Image.new("L", (9, 9)).save(root / "bad" / name / "0.png")
    masks_for(root, NAMES)
    for masks in (None, root / "masks"):
        with pytest.raises(UserError, match=rf"bad: holds a folder {name}, .* or use MVTecDataModule"):
            _ = FolderDataModule(root / "ok", anomalous=root / "bad", masks=masks).records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nominal": "x", "split_seed": -1}, "split_seed must be a whole number from 0 up"),
        ({"nominal": "x", "split_seed": 2**70}, "split_seed must be a whole number from 0 up"),
        ({"nominal": "x", "shots_seed": -1}, "shots_seed must be a whole number from 0 up"),
        ({"nominal": "x", "test_share": float("nan")}, "test_share must be a finite number"),
        ({"nominal": "x", "batch_size": 99_999_999_999}, "batch_size must be at most 65536"),
        ({"nominal": "x", "batch_size": True}, "batch_size must be a whole number"),
        ({"nominal": "x", "num_workers": 99_999_999}, "num_workers must be at most .* cores, got 99999999"),
        ({"nominal": 3}, "nominal must be text"),
        ({"nominal": "x", "manifest": "y"}, r"data\.manifest takes the place of data\.nominal"),
        ({"nominal": "x", "masks": "y"}, r"data\.masks needs data\.anomalous"),
        ({"nominal": "x", "test_share": 1.0}, r"test_share must be in \[0, 1\), got 1\.0"),
        ({"nominal": "x", "shots": 0}, r"shots must be at least 1, got 0"),
        ({"nominal": "x", "on_broken": "ignore"}, r"on_broken must be error or skip, got 'ignore'"),
    ],
)
def test_contradictions(options, message):
    with pytest.raises(UserError, match=message):
        FolderDataModule(**options)


def test_a_misspelt_argument_is_refused():
    with pytest.raises(TypeError, match="batch_sise"):
        FolderDataModule("x", batch_sise=3)


def test_shots_are_nested_and_seeded(tmp_path):
    root = fakes.mvtec(tmp_path, ["bottle"])

    def drawn(shots, seed=0):
        return [r.path.stem for r in MVTecDataModule(root, "bottle", shots=shots, shots_seed=seed).records[0]]

    for seed in range(5):
        draws = [set(drawn(k, seed)) for k in (1, 2, 3, 4)]
        assert [len(draw) for draw in draws] == [1, 2, 3, 4]
        assert draws[0] < draws[1] < draws[2] < draws[3]
    assert len({drawn(1, seed)[0] for seed in range(20)}) > 1
    assert drawn(3) == sorted(drawn(3)) == drawn(3)
    with pytest.raises(UserError, match="shots is 5, but there are only 4 nominal training images"):
        drawn(5)


def test_shots_in_sorted_order(tmp_path):
    """As few-shot results are published: names k s to k (s + 1) of the sorted list, whatever order the records have."""
    root = fakes.mvtec(tmp_path, ["bottle"])
    names = sorted(path.name for path in (root / "bottle" / "train" / "good").iterdir())

    class Backwards(MVTecDataModule):
        def load_records(self):
            train, test = super().load_records()
            return train[::-1], test

    for kind, shots, seed in ((MVTecDataModule, 1, 0), (MVTecDataModule, 2, 1), (Backwards, 1, 3), (Backwards, 2, 0)):
        data = kind(root, "bottle", shots=shots, shots_seed=seed, shots_order="sorted")
        assert sorted(r.path.name for r in data.records[0]) == names[seed * shots : (seed + 1) * shots]
    with pytest.raises(UserError, match=r"shots_seed 2 takes images 5 to 6 of those in sorted order, but .* only 4"):
        _ = MVTecDataModule(root, "bottle", shots=2, shots_seed=2, shots_order="sorted").records
    with pytest.raises(UserError, match="shots is 5, but there are only 4 nominal training images"):
        _ = MVTecDataModule(root, "bottle", shots=5, shots_order="sorted").records


def test_a_test_needs_no_training_images(root):
    data = FolderDataModule(test_nominal=root / "ok", anomalous=root / "bad", num_workers=0)
    data.prepare_data()
    data.setup("test")
    assert [len(part) for part in data.records] == [0, 13]
    with pytest.raises(UserError, match="the training set is empty"):
        data.setup("fit")
