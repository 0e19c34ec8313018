"""The page of a report: what is in the file. What it does in a browser is tried in extras/test_browser.py."""

import base64
import html
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pl_patchcore import PatchCore
from pl_patchcore.report import TestReport
from pl_patchcore.report import html as of_page
from pl_patchcore.report.html import Page, PageImage, best_f1_threshold

HOSTILE = "</script><img src=x onerror=alert(1)>'\"&\u2028\ud800.png"


def item(order, score, label=None, size=(30, 40), **options):
    generator = np.random.default_rng(order)
    image = generator.integers(0, 255, (*size, 3), dtype=np.uint8)
    heat = np.full(size, 1.0, np.float32)
    heat[:, :5] = np.nan
    heat[5:15, 10:20] = 3.0
    given = {"name": f"{order}.png", "anomaly_map": heat, "label": label, "order": order} | options
    return PageImage(score=score, image=image, **given)


def page_of(items):
    page = Page()
    for each in items:
        page.add(each)
    return page


def written(page, folder, threshold=2.0, pixel_threshold=2.0, title="t", **options):
    path = page.write(folder, title, {"image AUROC": "0.5"}, threshold, pixel_threshold, **options)
    text = path.read_text(encoding="utf-8")
    return text, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def decoded(address):
    kind, _, data = address.partition(";base64,")
    assert kind in ("data:image/jpeg", "data:image/png")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_one_file_without_addresses(tmp_path):
    text, content = written(page_of([item(0, 1.0, 0), item(1, 3.0, 1)]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "://" not in text
    assert not re.search(r"\b(src|href)=|url\(|@import|fetch\(|XMLHttp", text)
    assert "default-src 'none'" in text
    assert not re.search("@[A-Z_]+@", text)
    assert content["figures"] == [["image AUROC", "0.5"]]
    assert [image["score"] for image in content["images"]] == [1.0, 3.0]


def test_names_are_text(tmp_path):
    items = [item(0, 1.0, 1, name=HOSTILE, defect=HOSTILE), item(1, 2.0, 0, name="@TITLE@ @DATA@")]
    text, content = written(page_of(items), tmp_path, title=f"@DATA@{HOSTILE}", notes=[HOSTILE])
    plain, _ = written(page_of([item(0, 1.0)]), tmp_path)
    assert re.findall(r"<\w+|</\w+", text) == re.findall(r"<\w+|</\w+", plain)  # no element more, none less
    assert html.unescape(re.search("<h1>(.*?)</h1>", text)[1]) == f"@DATA@{HOSTILE}".replace("\ud800", "?")
    assert content["images"][0]["name"] == content["images"][0]["defect"] == content["notes"][0] == HOSTILE
    assert content["images"][1]["name"] == "@TITLE@ @DATA@"
    assert "innerHTML" not in text
    assert "insertAdjacentHTML" not in text


@pytest.mark.parametrize(("labels", "start", "reason"), [
    ([0, 0, 1, 1], 3.0, "F1"),
    ([0, 0, 0, None], 4.0, "nominal"),
    ([None] * 4, 5.0, "highest score"),
])  # fmt: skip
def test_start_without_threshold(labels, start, reason, tmp_path):
    items = [item(i, score, label) for i, (score, label) in enumerate(zip((1.0, 2.0, 4.0, 5.0), labels, strict=True))]
    _, content = written(page_of(items), tmp_path, threshold=None, pixel_threshold=None)
    assert (content["start"], content["calibrated"]) == (start, False)
    assert "no threshold" in content["reason"]
    assert reason in content["reason"]


def test_best_f1_threshold():
    generator = np.random.default_rng(0)
    for _ in range(20):
        nominal, anomalous = generator.integers(0, 9, 7).astype(float), generator.integers(3, 12, 5).astype(float)

        def f1(threshold, nominal=nominal, anomalous=anomalous):
            caught, alarms = (anomalous > threshold).sum(), (nominal > threshold).sum()
            return 2 * caught / (caught + alarms + len(anomalous))

        assert f1(best_f1_threshold(nominal, anomalous)) == max(f1(t) for t in np.arange(-1, 13) - 0.5)


def test_pictures(tmp_path):
    size = (1000, 500)
    mask = np.zeros(size, bool)
    mask[:500] = True
    _, content = written(page_of([item(0, 1.0, 1, size, mask=mask), item(1, 1.0, 0)]), tmp_path)
    large, small = content["images"]
    assert [decoded(large[kind]).size for kind in ("small", "large", "map", "mask")] == [
        *((160, 320), (450, 900), (160, 320), (450, 900))
    ]
    assert np.asarray(decoded(large["mask"])).mean() == 0.5
    assert small["size"] == [40, 30]
    assert "large" not in small
    assert "mask" not in small
    heat = np.asarray(decoded(small["map"]).convert("RGB")).astype(int)  # the scale ends at twice the threshold
    for place, colour in (
        ((20, 2), of_page.GREY),
        ((25, 32), of_page.COLOURS[64]),
        ((10, 15), of_page.COLOURS[191]),
    ):
        assert np.abs(heat[place] - colour).max() < 25, place


def test_many_pictures_lie_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(of_page, "MOST_INLINE", 10_000)
    mine = tmp_path / "report" / "mine.jpg"
    mine.parent.mkdir()
    mine.write_bytes(b"the user's own")
    _, content = written(page_of([item(i, float(i), i % 2) for i in range(20)]), tmp_path)
    named = [image[kind] for image in content["images"] for kind in ("small", "map")]
    assert sorted(named) == sorted(f"report/{p.name}" for p in (tmp_path / "report").iterdir() if p != mine)
    for name in named:
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (40, 30)
    _, content = written(page_of([item(0, 1.0)]), tmp_path)  # fits: the earlier pictures go
    assert content["images"][0]["small"].startswith("data:")
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["mine.jpg"]


def test_pictures_are_kept_of_those_nearest_to_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(of_page, "MOST_PICTURES", 2)
    scores = np.random.default_rng(0).permutation(12).tolist()
    items = [item(i, float(score), (0, 1, None)[i % 3]) for i, score in enumerate(scores)]
    whole, shares = page_of(items), [page_of(items[::2]), page_of(items[1::2])]
    shares[0].merge(shares[1])
    one, two = (written(page, tmp_path)[1]["images"] for page in (whole, shares[0]))
    assert one == two
    assert [image["score"] for image in one] == scores
    kept = {image["name"] for image in one if "small" in image}
    anomalous = sorted((item for item in items if item.label == 1), key=lambda item: item.score)
    others = sorted((item for item in items if item.label != 1), key=lambda item: -item.score)
    assert kept == {item.name for item in (*anomalous[:2], *others[:2])}


@pytest.mark.parametrize("images", [0, 1])
def test_few_images(images, tmp_path):
    empty = item(0, 1.0, anomaly_map=np.full((30, 40), np.nan, np.float32)) if images else None
    _, content = written(page_of([empty] * images), tmp_path, threshold=None, pixel_threshold=None)
    assert len(content["images"]) == images


def test_of_a_test(tiny, trainer, tmp_path, capsys):
    model = PatchCore(tiny, layers=["fine"], resize=None, crop=None, coreset_size=20, calibration_share=0.5)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 32, 40, generator=generator)
    trainer(enable_checkpointing=False).fit(model, DataLoader(images[:4], batch_size=2))
    samples = [
        {"image": image, "label": i % 2, "defect": ("nominal", "hole")[i % 2], "path": f"/a/b/{i}.png"}
        for i, image in enumerate(images)
    ]
    samples = [sample | {"mask": torch.full((32, 40), sample["label"], dtype=torch.uint8)} for sample in samples]
    trainer(callbacks=[TestReport(page=True, pictures=0)]).test(model, DataLoader(samples, batch_size=4), verbose=False)
    page = tmp_path / "report.html"
    assert f"browser: {page}" in " ".join(capsys.readouterr().out.split())
    content = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)[1])
    with torch.no_grad():
        scores, maps = model.eval()(images)
    assert [image["score"] for image in content["images"]] == pytest.approx(scores.tolist(), rel=1e-5)
    assert [image["name"] for image in content["images"]] == [f"b/{i}.png" for i in range(6)]
    assert [image["label"] for image in content["images"]] == [0, 1] * 3
    assert {image["defect"] for image in content["images"]} == {"nominal", "hole"}
    assert all(np.asarray(decoded(image["mask"])).mean() == image["label"] for image in content["images"])
    above = [bool((heat > model.pixel_threshold).any()) for heat in maps]
    assert [bool(image["outline"]) for image in content["images"]] == above
    corners = [np.array(re.findall(r"([\d.]+) ([\d.]+)", image["outline"]), float) for image in content["images"]]
    for found, heat in zip(corners, maps, strict=True):  # along the edges of the pixels above the threshold
        rows, columns = (heat > model.pixel_threshold).nonzero(as_tuple=True)
        if len(rows):
            edges = [(int(places.min()), int(places.max()) + 1) for places in (columns, rows)]
            assert [(low, high) for low, high in zip(found.min(0), found.max(0), strict=True)] == edges
    assert content["start"] == model.image_threshold
    page.unlink()
    trainer(callbacks=[TestReport(page=False)]).test(model, DataLoader(samples, batch_size=4), verbose=False)
    assert not page.exists()
