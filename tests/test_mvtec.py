import logging
import shutil
from dataclasses import replace

import fakes
import numpy as np
import pytest
from PIL import Image

from pl_patchcore import MVTecDataModule, UserError
from pl_patchcore.data.mvtec import COUNTS


@pytest.fixture
def root(tmp_path):
    return fakes.mvtec(tmp_path / "mvtec", ["bottle", "cable"])


def test_published_counts_are_those_of_the_paper():
    assert len(COUNTS) == 15
    train, nominal, anomalous = np.array(list(COUNTS.values())).sum(axis=0)
    assert train + nominal + anomalous == 5354
    assert nominal + anomalous == 1725


def test_layout(root):
    train, test = MVTecDataModule(root, "bottle").records
    assert [r.path.relative_to(root).as_posix() for r in train] == [f"bottle/train/good/00{i}.png" for i in range(4)]
    assert [(r.label, r.defect) for r in test] == [(0, "nominal")] * 2 + [(1, "broken")] * 2 + [(1, "dirt")] * 2
    assert {r.category for r in train + test} == {"bottle"}
    for record in test[2:]:
        mask = record.read()[1]
        assert mask.sum() == fakes.DEFECT**2
        top = 3 * int(record.path.stem)  # where the fake puts its defect
        assert mask[top : top + fakes.DEFECT, top : top + fakes.DEFECT].all()


def test_masks_are_paired_by_name_not_by_order(root):
    truth = root / "bottle" / "ground_truth" / "dirt"
    (truth / "001_mask.png").rename(truth / "001.png")  # sorts before 000_mask.png's neighbour, and lacks _mask
    masks = {r.path.stem: r.mask_path.name for r in MVTecDataModule(root, "bottle").records[1] if r.defect == "dirt"}
    assert masks == {"000": "000_mask.png", "001": "001.png"}


def test_counts_are_reported(root, caplog):
    with caplog.at_level(logging.WARNING):
        _ = MVTecDataModule(root, "bottle").records
    assert "4 training, 2 nominal test, 4 anomalous test images, where the published set has 209, 20, 63" in caplog.text
    caplog.clear()
    (root / "bottle").rename(root / "phone")
    with caplog.at_level(logging.WARNING):
        assert len(MVTecDataModule(root, "phone").records[0]) == 4  # another data set in this layout
    assert not caplog.text


def test_categories(root, caplog):
    (root / "stray.txt").write_text("x")
    (root / "notes").mkdir()
    assert MVTecDataModule(root).categories() == ["bottle", "cable"]
    assert "2 of MVTec AD's 15 categories; missing: capsule" in caplog.text
    with pytest.raises(UserError, match=r"data\.category is not set; choose one of bottle, cable"):
        _ = MVTecDataModule(root).records


def test_wrong_layout(root, tmp_path):
    def expect(message, category="bottle"):
        with pytest.raises(UserError, match=message):
            MVTecDataModule(root, category).prepare_data()

    expect(r"botle: no such folder; choose one of bottle, cable", "botle")
    with pytest.raises(UserError, match=r"nowhere: holds no category .*fetch MVTec AD"):
        MVTecDataModule(tmp_path / "nowhere").prepare_data()
    mask = root / "bottle" / "ground_truth" / "dirt" / "001_mask.png"
    mask.rename(mask.with_name("007_mask.png"))
    expect(r"test/dirt/001\.png: has no mask .*001_mask\.png")
    shutil.copy(mask.with_name("007_mask.png"), mask)
    expect(r"007_mask\.png: belongs to no image")
    mask.with_name("007_mask.png").unlink()
    Image.new("L", (9, 9)).save(mask)
    expect(r"001_mask\.png: mask of 9x9 pixels for an image of 40x50")
    mask.write_bytes(b"no image")
    expect(r"001_mask\.png: cannot be read")
    shutil.rmtree(root / "bottle" / "test" / "good")
    expect(r"test/good: no such folder")


def test_layouts_made_by_hand(root, caplog):
    with pytest.raises(
        UserError, match=r"bottle: is a category itself; set data\.root to .*mvtec and data\.category to b"
    ):
        _ = MVTecDataModule(root / "bottle", "bottle").records
    with pytest.raises(UserError, match="is a category itself"):
        _ = MVTecDataModule(root / "bottle").records
    before = MVTecDataModule(root, "bottle").records
    for split in ("train", "test"):
        (root / "bottle" / split / "good").rename(root / "bottle" / split / "Good")
    after = MVTecDataModule(root, "bottle").records
    assert [[r.label for r in part] for part in after] == [[r.label for r in part] for part in before]
    (root / "bottle" / "train" / "Good").rename(root / "bottle" / "train" / "ok")
    with pytest.raises(UserError, match=r"train/good: no such folder; a category holds .*bottle/train holds ok\.$"):
        _ = MVTecDataModule(root, "bottle").records
    shutil.rmtree(root / "cable" / "ground_truth" / "dirt")
    with pytest.raises(UserError, match=r"ground_truth/dirt: no such folder; give .* a folder dirt"):
        _ = MVTecDataModule(root, "cable").records
    shutil.rmtree(root / "cable" / "ground_truth")
    caplog.clear()
    assert [r.mask_path for r in MVTecDataModule(root, "cable").records[1]] == [None] * 6
    assert "ground_truth: there is no such folder of masks" in caplog.text


def test_several_masks_of_an_image(root):
    truth = root / "bottle" / "ground_truth" / "dirt"
    data = MVTecDataModule(root, "bottle")
    expected = [record.read()[1] for record in data.records[1]]
    for i in range(2):
        (truth / f"00{i}").mkdir()
        with Image.open(truth / f"00{i}_mask.png") as whole:
            mask = np.asarray(whole)
        left = mask.copy()
        left[:, :10] = 0
        Image.fromarray(left).save(truth / f"00{i}" / "000.png")
        Image.fromarray(mask - left).save(truth / f"00{i}" / "001.png")
    with pytest.raises(UserError, match=r"000_mask\.png: has the same name as .*000; remove one"):
        _ = MVTecDataModule(root, "bottle").records
    for i in range(2):
        (truth / f"00{i}_mask.png").unlink()
    data = MVTecDataModule(root, "bottle", num_workers=0)
    data.prepare_data()
    assert all(np.array_equal(a, r.read()[1]) for a, r in zip(expected, data.records[1], strict=True))


def test_download(root, tmp_path, caplog):
    archive = tmp_path / "mvtec_anomaly_detection.tar.xz"
    shutil.make_archive(str(tmp_path / "mvtec_anomaly_detection"), "xztar", root)
    target = tmp_path / "data" / "mvtec_ad"
    data = MVTecDataModule(target, "bottle", download=True, url=archive.as_uri())
    data.prepare_data()
    assert len(data.records[0]) == 4
    assert (target / "cable" / "test" / "dirt" / "000.png").is_file()
    MVTecDataModule(target, "bottle", download=True, url="file:///nowhere.tar.xz").prepare_data()  # is there already
    with pytest.raises(UserError, match=r"fetch MVTec AD from https://www\.mvtec\.com/.*put it at .*and run again"):
        MVTecDataModule(tmp_path / "other" / "x", "bottle", download=True, url="file:///nowhere.tar.xz").prepare_data()


def test_a_download_that_is_not_mvtec_is_refused_by_its_checksum(root, tmp_path, monkeypatch):
    shutil.make_archive(str(tmp_path / "mvtec_anomaly_detection"), "xztar", root)
    archive = tmp_path / "mvtec_anomaly_detection.tar.xz"
    monkeypatch.setattr(MVTecDataModule, "layout", replace(MVTecDataModule.layout, url=archive.as_uri()))
    with pytest.raises(UserError, match="cf4313b13603bec6"):
        MVTecDataModule(tmp_path / "data" / "x", "bottle", download=True).prepare_data()
    assert not (tmp_path / "data" / "x").exists()
