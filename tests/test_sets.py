"""The published data sets, each through its data module, on made-up images in their true layout."""

import json
import logging
import shutil
from collections import Counter

import fakes
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pl_patchcore import (
    BTADDataModule,
    KolektorSDD2DataModule,
    MPDDDataModule,
    MVTecAD2DataModule,
    MVTecLOCODataModule,
    PatchCore,
    RealIADDataModule,
    UserError,
    VisADataModule,
)
from pl_patchcore.data import kolektor, mvtec_ad_2, visa
from pl_patchcore.data.loco import Saturation
from pl_patchcore.metrics import SPRO

# data module, fake, category, numbers of training images, nominal and anomalous test images
SETS = {
    "btad": (BTADDataModule, fakes.btad, "02", (4, 2, 3)),
    "mpdd": (MPDDDataModule, lambda root: fakes.mvtec(root, ["connector", "tubes"]), "tubes", (4, 2, 4)),
    "mvtec_ad_2": (MVTecAD2DataModule, fakes.mvtec_ad_2, "vial", (4, 2, 3)),
    "loco": (MVTecLOCODataModule, fakes.loco, "pushpins", (4, 2, 4)),
    "visa": (VisADataModule, fakes.visa, "pcb1", (4, 2, 3)),
    "kolektor": (KolektorSDD2DataModule, fakes.kolektor_sdd2, None, (5, 3, 2)),
    "real_iad": (RealIADDataModule, fakes.real_iad, "pcb", (4, 4, 2)),
}


def made(name, root, **options):
    kind, _, category, _ = SETS[name]
    options |= {} if category is None or "category" in options else {"category": category}
    return kind(root=root, num_workers=0, **options)


@pytest.mark.parametrize("name", SETS)
def test_counts_labels_splits_and_masks(name, tmp_path):
    _, fake, category, (train, nominal, anomalous) = SETS[name]
    data = made(name, fake(tmp_path / "set"))
    data.prepare_data()
    assert (len(data.records[0]), *(Counter(r.label for r in data.records[1])[y] for y in (0, 1))) == (
        *(train, nominal, anomalous),
    )
    assert {r.label for r in data.records[0]} == {0}
    assert not {r.path for r in data.records[0]} & {r.path for r in data.records[1]}
    if category is not None:
        assert {r.category for part in data.records for r in part} == {category}
        assert len(data.categories()) == 2
    for record in data.records[1]:
        image, mask = record.read()
        assert mask.shape == (image.height, image.width)
        if record.label == 0:
            assert not mask.any()
            continue
        bright = np.asarray(image).mean(axis=2) > 190  # where the fakes put their defects
        empty = name == "btad" and record.path.stem == "0002"
        if empty:
            assert (mask == 255).all()  # anomalous, and nothing is known of where
        elif name != "loco":  # whose second defect is drawn in the mask only
            assert (mask == bright).mean() > 0.99
        else:
            assert mask[bright].all()


def test_counts_are_those_of_the_publications():
    """Sums that the papers give, or the sets' own pages."""

    def total(counts):
        return np.array(list(counts.values())).sum(axis=0).tolist()

    assert total(visa.COUNTS) == [8659, 962, 1200]
    assert total(MPDDDataModule.layout.counts) == [888, 176, 282]
    assert sum(total(BTADDataModule.layout.counts)) == 2540
    assert total(MVTecAD2DataModule.layout.counts) == [2528, 379, 705, 302]
    assert sum(total(MVTecAD2DataModule.layout.counts)) + 2 * sum(mvtec_ad_2.PRIVATE_COUNTS.values()) == 8004
    assert total(MVTecLOCODataModule.layout.counts) == [1778, 575, 561 + 432, 305]
    assert kolektor.COUNTS == (2331 - 246, 1004 - 110, 110)


@pytest.mark.parametrize("name", [name for name in SETS if name != "real_iad"])  # whose lists say what there must be
def test_an_incomplete_copy_is_told(name, tmp_path, caplog):
    data = made(name, SETS[name][1](tmp_path / "set"))
    with caplog.at_level(logging.WARNING):
        assert data.listed
    train, nominal, anomalous = SETS[name][3]
    assert f"{train} training, {nominal} nominal test, {anomalous} anomalous test" in caplog.text
    assert "where the published set has" in caplog.text
    if name != "kolektor":
        caplog.clear()
        data.categories()
        assert name == "visa" or "categories; missing: " in caplog.text


def test_what_can_be_had_by_hand_only_says_where(tmp_path):
    with pytest.raises(UserError, match=r"data\.download: MPDD can be had by hand only; fetch MPDD as https://github"):
        MPDDDataModule(download=True)
    for name in SETS:
        with pytest.raises(UserError, match=r"https://.*data\.root"):
            _ = made(name, tmp_path / "nowhere").listed
    with pytest.raises(UserError, match=r"nowhere: holds no category \(a folder with train/ok and test\); set data\."):
        BTADDataModule(tmp_path / "nowhere").categories()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("btad", "02/ground_truth/ko/0001.png"),
        ("mpdd", "tubes/ground_truth/dirt/001_mask.png"),
        ("mvtec_ad_2", "vial/test_public/ground_truth/bad/000_shift_1_mask.png"),
        ("loco", "pushpins/ground_truth/logical_anomalies/001"),
        ("loco", "pushpins/defects_config.json"),
        ("visa", "pcb1/Data/Masks/Anomaly/002.png"),
        ("visa", "pcb1/Data/Images/Normal/0001.JPG"),
        ("visa", "split_csv/1cls.csv"),
        ("kolektor", "test/20003_GT.png"),
        ("real_iad", "realiad_1024/pcb/NG/HS/S0001/pcb_0001_NG_HS_C1_20231018090000_mask.png"),
        ("real_iad", "realiad_1024/pcb/OK/S0002/pcb_0002_OK_C1_20231018090000.jpg"),
        ("real_iad", "realiad_jsons/pcb.json"),
    ],
)
def test_a_missing_file_is_one_clear_line(name, path, tmp_path):
    root = SETS[name][1](tmp_path / "set")
    gone = root / path
    (shutil.rmtree if gone.is_dir() else type(gone).unlink)(gone)
    named = (
        gone.stem.removesuffix("_mask") if name in ("btad", "mpdd", "mvtec_ad_2") or gone.suffix == "" else gone.name
    )
    with pytest.raises(UserError, match=rf"{named}.*(no such file|no such mask|has no mask)") as error:
        _ = made(name, root).listed
    assert "\n" not in str(error.value)


def test_two_class_splits_of_visa(tmp_path, caplog):
    root = fakes.visa(tmp_path / "visa")
    for split, train, test in (("2cls_highshot", 3, 5), ("2cls_fewshot", 2, 6)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            listed = made("visa", root, split=split).listed
        assert [len(part) for part in listed] == [train, test]
        assert "1 anomalous images of the training part are left out" in caplog.text
        assert "published" not in caplog.text  # whose numbers are those of 1cls
    with pytest.raises(UserError, match=r"data\.split must be .*1cls"):
        made("visa", root, split="3cls")
    with pytest.raises(UserError, match=r"data\.category is 'pcb9', which is none .*choose one of candle, pcb1"):
        _ = made("visa", root, category="pcb9").listed
    with pytest.raises(UserError, match=r"data\.category is not set; choose one of candle, pcb1"):
        _ = VisADataModule(root).listed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("object,split,label,image", "its first line must be object,split,label,image,mask"),
        ("pcb1,train,normal,a.JPG", "line 2: has not 5 fields"),
        ("pcb1,val,normal,a.JPG,", "line 2: split must be train or test, got 'val'"),
        ("pcb1,test,bad,a.JPG,", "line 2: label must be normal or anomaly, got 'bad'"),
        ("pcb1,test,anomaly,a.JPG,", "line 2: an anomalous image has a mask"),
        ("pcb1,test,normal,../a.JPG,", r"line 2: names the file '\.\./a\.JPG', which is not in"),
        ("pcb1,test,normal,/etc/passwd,", "line 2: names the file '/etc/passwd', which is not in"),
        ("pcb1,test,normal,C:\\a.JPG,", "line 2: names the file 'C:.*', which is not in"),
        (b"\xff\xfe", "is no UTF-8 text"),
    ],
)
def test_a_wrong_list_of_visa(line, message, tmp_path):
    root = fakes.visa(tmp_path / "visa")
    path = root / "split_csv" / "1cls.csv"
    header = b"" if message.startswith("its first") else b"object,split,label,image,mask\n"
    path.write_bytes(header + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(UserError, match=message):
        _ = made("visa", root).listed


def test_calibration_and_private_images_of_mvtec_ad_2(tmp_path, caplog):
    data = made("mvtec_ad_2", fakes.mvtec_ad_2(tmp_path / "set"))
    assert [r.path.name for r in data.calibration_records] == [f"00{i}_regular.png" for i in range(3)]
    with caplog.at_level(logging.WARNING):
        records = data.predict_records
    assert [(r.path.parent.name, r.path.name, r.label) for r in records] == [
        ("test_private", "000_regular.png", -1),
        ("test_private", "001_regular.png", -1),
        ("test_private_mixed", "000_mixed.png", -1),
        ("test_private_mixed", "001_mixed.png", -1),
    ]
    assert "2 test_private_mixed images, where the published set has 276" in caplog.text
    shutil.rmtree(tmp_path / "set" / "vial" / "test_private")
    with pytest.raises(UserError, match=r"vial/test_private: no such folder; set data\.download, or fetch MVTec AD 2"):
        made("mvtec_ad_2", tmp_path / "set").look("predict")
    shutil.rmtree(tmp_path / "set" / "vial" / "validation")
    with pytest.raises(
        UserError, match=r"validation/good: no such folder; a category holds train/good, validation/good"
    ):
        _ = made("mvtec_ad_2", tmp_path / "set").listed


def test_defects_of_loco_and_their_saturation_areas(tmp_path):
    data = made("loco", fakes.loco(tmp_path / "set"))
    two, one, broken, _ = data.records[1][2:]
    assert len(data.calibration_records) == 3
    assert [(mask.sum(), mask.shape, area) for mask, area in two.defect_regions()] == [
        (36, (40, 50), 18),  # half of it
        (36, (40, 50), 20),
    ]
    union = two.read()[1] == 1
    assert (union == (two.defect_regions()[0][0] | two.defect_regions()[1][0])).all()
    assert union.sum() == 72
    assert [area for _, area in one.defect_regions()] == [18]
    assert [area for _, area in broken.defect_regions()] == [36]
    assert Saturation(1, 6300, False).area(100) == 100  # never more than the defect
    assert Saturation(1, 0.1, True).area(5) == 1  # never none


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_value": 0}, "entry 0 must have a pixel_value from 1 to 255, got 0"),
        ({"pixel_value": True}, "entry 0 must have a pixel_value from 1 to 255, got True"),
        ({"pixel_value": 254}, "entry 1 has the pixel_value 254 of another"),
        ({"saturation_threshold": 1.5}, r"relative saturation_threshold in \(0, 1\], got 1\.5"),
        ({"saturation_threshold": float("nan")}, r"relative saturation_threshold in \(0, 1\], got nan"),
        ({"relative_saturation": False}, r"saturation_threshold of whole pixels, got 0\.5"),
        ({"relative_saturation": 1}, "relative_saturation of true or false, got 1"),
        ({"more": 1}, "entry 0 must hold exactly defect_name, pixel_value, relative_saturation, saturation_threshold"),
    ],
)
def test_a_wrong_defects_config(change, message, tmp_path):
    root = fakes.loco(tmp_path / "set")
    path = root / "pushpins" / "defects_config.json"
    path.write_text(json.dumps([fakes.LOCO_CONFIG[0] | change, *fakes.LOCO_CONFIG[1:]]))
    with pytest.raises(UserError, match=rf"defects_config\.json: .*{message}"):
        _ = made("loco", root).listed


def test_masks_of_loco_that_the_config_does_not_know(tmp_path):
    root = fakes.loco(tmp_path / "set")
    (root / "pushpins" / "defects_config.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON file"):
        _ = made("loco", root).listed
    (root / "pushpins" / "defects_config.json").write_text(json.dumps(fakes.LOCO_CONFIG))
    mask = root / "pushpins" / "ground_truth" / "structural_anomalies" / "001" / "000.png"
    levels = np.array(Image.open(mask))
    for wrong in (levels // 2, np.maximum(levels, 7), levels * 0):
        Image.fromarray(wrong).save(mask)
        with pytest.raises(UserError, match=r"000\.png: its highest level is \d+; a mask holds exactly one beside 0"):
            made("loco", root).prepare_data()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("meta"), "must hold meta with prefix and normal_class"),
        (lambda c: c["meta"].update(prefix="../"), r"names the file '\.\./', which is not in"),
        (lambda c: c.update(test={}), "pcb.json, test: must be a list"),
        (
            lambda c: c["test"][1].pop("mask_path"),
            "test, entry 1: must hold exactly anomaly_class, category, image_path",
        ),
        (lambda c: c["test"][1].update(mask_path=3), "test, entry 1: must hold names, and a name or null"),
        (
            lambda c: c["train"][0].update(image_path="/a.jpg"),
            "train, entry 0: names the file '/a.jpg', which is not in",
        ),
    ],
)
def test_a_wrong_list_of_real_iad(change, message, tmp_path):
    root = fakes.real_iad(tmp_path / "set")
    path = root / "realiad_jsons" / "pcb.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        _ = made("real_iad", root).listed


def test_lists_of_real_iad(tmp_path, caplog):
    root = fakes.real_iad(tmp_path / "set")
    with caplog.at_level(logging.WARNING):
        assert RealIADDataModule(root).categories() == ["audiojack", "pcb"]
    assert "2 of Real-IAD's 30 categories; missing: bottle_cap" in caplog.text
    assert Counter(r.defect for r in made("real_iad", root).listed[1]) == {"nominal": 4, "AK": 1, "HS": 1}
    (root / "realiad_jsons").rename(root / "realiad_jsons_sv")
    assert len(made("real_iad", root, lists="realiad_jsons_sv").listed[0]) == 4
    with pytest.raises(UserError, match=r"realiad_jsons: no such folder, or no list <category>\.json in it; ask for"):
        RealIADDataModule(root).categories()


def test_spro_of_a_test_on_loco(tmp_path, trainer):
    """The figure of a run is that of its maps on the originals' pixels."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU())
    model = PatchCore(network, ["1"], resize=32, crop=None, sigma=1.0)
    data = made("loco", fakes.loco(tmp_path / "set"), batch_size=3)
    runner = trainer(enable_checkpointing=False)
    runner.fit(model, data)
    runner.test(model, data, verbose=False)
    metric = SPRO()
    for number, record in enumerate(data.records[1]):
        found = model.inspect(record.path)
        defects = record.defect_regions()
        metric.update(
            [torch.from_numpy(found.anomaly_map)], [defects], torch.tensor([record.label]), torch.tensor([number > 3])
        )
    expected = metric.compute()
    assert model.figures["all"]["spro_0.05"] == pytest.approx(float(expected["spro_0.05"]), abs=1e-6)
    assert 0 <= model.figures["all"]["mean_spro_0.05"] <= 1
