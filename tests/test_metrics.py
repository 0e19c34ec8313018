from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib import pyplot
from shares import defects_of, figures_by_name, per_image
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from torch import Tensor

from pl_patchcore.distributed import Processes
from pl_patchcore.errors import UserError
from pl_patchcore.metrics import (
    PRO,
    SPRO,
    AnomalyEvaluation,
    AveragePrecision,
    BestF1,
    ClassF1,
    ImageAUROC,
    PixelAUROC,
    SegF1,
    TestFigures,
    pixel_areas,
    regions,
)

SHAPES = {
    "random": lambda noise: noise,
    "tied": lambda noise: (noise * 2).round(),
    "constant": lambda noise: torch.full_like(noise, 7.0),
    "huge": lambda noise: noise * 1e6,
    "tiny": lambda noise: noise * 1e-6,
    "denormal": lambda noise: (noise * 50).round() * 1e-43,
    "around 300": lambda noise: 300 + 3 * noise.tanh(),
    "hundreds": lambda noise: 500 + 100 * noise,
    "negative": lambda noise: -40 + noise,
}
LEVELS = hnp.arrays(np.int8, (3, 5, 4), elements=st.integers(-5, 5))
MASKS = hnp.arrays(np.uint8, (3, 5, 4), elements=st.sampled_from([0, 0, 1, 255]))


def images(shape: str = "random", size: tuple[int, int] = (9, 10), seed: int = 0) -> tuple[Tensor, ...]:
    """Twelve images: scores, maps, labels, masks and groups (-2 and 5 hold anomalous images)."""
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1])
    groups = torch.tensor([11, 5, -2, -2, 5, 5, -2, -2, 11, 5, 5, 5])
    masks = torch.zeros(12, *size, dtype=torch.uint8)
    for index in labels.nonzero().flatten().tolist():
        masks[index, 1:3, 1 : 2 + index % 5] = 1
        masks[index, 3, 2 + index % 5] = 1  # touches the first at a corner
        masks[index, 1:6, 8] = 1  # a bar beside it: the two alternate from row to row
        masks[index, 5, 0:6:3] = 1  # two single pixels
        masks[index, 7:] = 255
    masks[0, 0, :5] = 255
    masks[7], masks[9] = 255, 0  # wholly unknown; known, and its defect lost
    noise = torch.randn(12, *size, generator=torch.Generator().manual_seed(seed))
    maps = SHAPES[shape](noise + 0.8 * (masks == 1))
    return maps.amax(dim=(1, 2)), maps, labels, masks, groups


def feed(metric: Any, *columns: Tensor, batch: int = 5) -> Any:
    for start in range(0, len(columns[0]), batch):
        metric.update(*(column[start : start + batch] for column in columns))
    return metric.compute()


def means(row: dict[str, Any]) -> dict[str, Any]:
    """Figures of AUPIMO that do not depend on the order of images."""
    return {name: value for name, value in row.items() if name != "per_image"}


def figures(columns: tuple[Tensor, ...], batch: int = 5, limit: float = 0.3) -> dict[str, Any]:
    """What every metric says about the images."""
    scores, maps, labels, masks, groups = columns
    return {
        "image_auroc": feed(ImageAUROC(), scores, labels, batch=batch),
        "pixel_auroc": feed(PixelAUROC(), maps, masks, batch=batch),
        "pro": feed(PRO(limit), maps, masks, batch=batch),
        "aupimo": means(feed(per_image(), maps, masks, labels, groups, batch=batch)),
        "seg_f1": feed(SegF1(0.5), maps, masks, batch=batch),
        "spro": feed(SPRO(), maps, defects_of(masks), labels, groups, batch=batch),
        "evaluation": feed(AnomalyEvaluation(limit), *columns, batch=batch),
    }


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12, equal_nan=True, check_device=False)


@functools.cache
def references(shape: str) -> dict[str, float]:
    """What the references say about all figures of `images` of a shape."""
    scores, maps, labels, masks, _ = (column.numpy() for column in images(shape))
    nominal, anomalous, good, bad = maps[masks == 0], maps[masks == 1], scores[labels == 0], scores[labels == 1]
    shown = (labels == 1) & (masks == 1).any((1, 2))  # the crop may have taken a defect away
    defective, truth = maps[shown], masks[shown]
    return {
        "image_auroc": reference.auroc(good, bad),
        "image_average_precision": reference.average_precision(good, bad),
        "oracle_image_f1": reference.best_f1(good, bad),
        "pixel_auroc": reference.auroc(nominal, anomalous),
        "pixel_auroc_anomalous": reference.auroc(defective[truth == 0], defective[truth == 1]),
        "pixel_average_precision": reference.average_precision(nominal, anomalous),
        "oracle_pixel_f1": reference.best_f1(nominal, anomalous),
        "pro": reference.pro(list(maps), list(masks), 0.3),
        "pro_0.05": reference.pro(list(maps), list(masks), 0.05),
        "pro_0.01": reference.pro(list(maps), list(masks), 0.01),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: str) -> None:
    scores, maps, labels, masks, _ = images(shape)
    actual = figures(images(shape))
    row, wanted = actual["evaluation"], references(shape)
    for name, figure in wanted.items():
        assert row[name].item() == pytest.approx(figure, abs=1e-12), name
    for name in ("image_auroc", "pixel_auroc", "pro"):
        assert_same(row[name], actual[name])
    assert feed(PRO(0.05), maps, masks) == row["pro_0.05"] == feed(AnomalyEvaluation(0.05), *images(shape))["pro"]
    assert feed(AveragePrecision(), scores, labels) == row["image_average_precision"]
    known = masks != 255
    theirs = roc_auc_score(masks[known], maps[known].double())
    assert actual["pixel_auroc"].item() == pytest.approx(theirs, abs=1e-12)
    assert average_precision_score(labels, scores.double()) == pytest.approx(wanted["image_average_precision"])
    for threshold, figure, (values, truth) in (
        ("oracle_image_f1_threshold", "oracle_image_f1", (scores, labels)),
        ("oracle_pixel_f1_threshold", "oracle_pixel_f1", (maps, masks)),
    ):
        reached = reference.f1(values[truth == 0].numpy(), values[truth == 1].numpy(), row[threshold].item())
        assert reached == pytest.approx(wanted[figure])


@given(LEVELS, MASKS, st.floats(0.01, 1.0) | st.sampled_from([0.25, 0.5, 1.0]))
@settings(max_examples=60)
def test_matches_reference_on_ties_and_limits(levels: np.ndarray, masks: np.ndarray, limit: float) -> None:
    assume((masks == 0).any() and (masks == 1).any())
    maps, truth = torch.from_numpy(levels).float(), torch.from_numpy(masks)
    area = reference.auroc(levels[masks == 0], levels[masks == 1])
    assert feed(PixelAUROC(), maps, truth).item() == pytest.approx(area, abs=1e-12)
    overlap = reference.pro(list(levels), list(masks), limit)
    assert feed(PRO(limit), maps, truth).item() == pytest.approx(overlap, abs=1e-12)


@pytest.mark.parametrize("subset", ["all", -2, 5])
def test_evaluation_equals_the_single_metrics_on_subsets(subset: str | int) -> None:
    _, _, labels, _, groups = columns = images("tied")
    keep = torch.full((12,), True) if subset == "all" else (labels == 0) | (groups == subset)
    expected = figures(tuple(column[keep] for column in columns))
    result = figures(columns)["evaluation"]
    row = result if subset == "all" else result["by_group"][subset]
    for name in ("image_auroc", "pixel_auroc", "pro"):
        assert_same(row[name], expected[name])
    assert (row["nominal"], row["anomalous"]) == (4, {"all": 8, -2: 3, 5: 5}[subset])
    assert row["lost"] == {"all": 1, -2: 0, 5: 1}[subset]  # a wholly unknown mask is not lost
    assert sorted(result["by_group"]) == [-2, 5]  # 11 holds nominal images only


@pytest.mark.parametrize("shape", ["random", "tied"])
def test_neither_batches_nor_order_matter(shape: str) -> None:
    columns = images(shape)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    for batch in (1, 5, 12):
        assert_same(figures(columns, batch), figures(columns))
        assert_same(figures(tuple(column[order] for column in columns), batch), figures(columns))


@given(LEVELS, MASKS)
@settings(max_examples=25)
def test_only_the_order_of_scores_matters(levels: np.ndarray, masks: np.ndarray) -> None:
    maps, truth = torch.from_numpy(levels).float(), torch.from_numpy(masks)
    for make in (PixelAUROC, PRO):
        expected = feed(make(), maps, truth)
        for same_order in (maps**3 * 1e3, (maps * 1.5).exp(), maps / 8192 + 300, maps * 1e-42):
            assert_same(feed(make(), same_order, truth), expected)


def test_maps_of_different_sizes() -> None:
    maps, masks = (column[:4] for column in images()[1:4:2])
    wide, wide_masks = (column[:3] for column in images(size=(16, 21), seed=2)[1:4:2])
    metric = PRO()
    metric.update(wide, wide_masks)
    expected = reference.pro([*wide.numpy(), *maps.numpy()], [*wide_masks.numpy(), *masks.numpy()])
    assert feed(metric, maps, masks).item() == pytest.approx(expected, abs=1e-12)


def test_any_dtype_and_gradients() -> None:
    scores, maps, labels, masks, groups = images("tied")
    expected = figures((scores, maps, labels, masks, groups))
    for kind in (torch.bool, torch.int8, torch.float32):
        low = scores.bfloat16(), maps.half(), labels.to(kind), masks.float(), groups.int()
        assert_same(figures(low), expected)
    tracked = scores.double().requires_grad_(), maps.clone().requires_grad_(), labels, masks, groups
    assert_same(figures(tracked), expected)


def test_state_is_a_copy_that_reset_forgets() -> None:
    columns = tuple(column.clone() for column in images())
    metric = AnomalyEvaluation()
    for batch in (columns, [column[:0] for column in columns]):
        metric.update(*batch)
    for column in columns:
        column.zero_()
    assert_same(metric.compute(), figures(images())["evaluation"])
    metric.reset()
    assert_same(feed(metric, *images("tied", seed=4)), figures(images("tied", seed=4))["evaluation"])


def test_without_positives_or_negatives_is_nan() -> None:
    _, maps, labels, masks, _ = columns = images()
    for chosen in (0, 1):
        result = figures(tuple(column[labels == chosen] for column in columns))
        assert result["image_auroc"].isnan()
        assert result["evaluation"]["image_auroc"].isnan()
        alone = torch.where(masks == chosen, masks, 255)
        assert feed(PixelAUROC(), maps, alone).isnan()
        assert feed(PRO(), maps, alone).isnan()
    nominal = figures(tuple(column[labels == 0] for column in columns))["evaluation"]
    assert all(nominal[name].isnan() for name in ("pixel_auroc", "pro"))
    assert (nominal["nominal"], nominal["anomalous"], nominal["by_group"]) == (4, 0, {})
    for scores in (torch.empty(0), torch.ones(3)):
        metric = ImageAUROC()
        metric.update(scores, torch.zeros(len(scores), dtype=torch.int64))
        assert metric.compute().isnan()


@pytest.mark.parametrize("mode", ["exact", "streaming"])
def test_degenerate_sets(mode: Any) -> None:
    """No anomalous image, no nominal image, empty masks of defective images: stated results."""
    scores, maps, labels, masks, groups = images()

    def row(keep: Tensor, masks: Tensor = masks) -> dict[str, Any]:
        metric = AnomalyEvaluation(mode=mode)
        metric.update(scores[keep], maps[keep], labels[keep], masks[keep], groups[keep])
        return metric.compute()

    figures_of_pixels = ("pixel_auroc", "pixel_average_precision", "oracle_pixel_f1", "pro", "pro_0.05", "pro_0.01")
    nominal = row(labels == 0)
    assert all(nominal[name].isnan() for name in (*figures_of_pixels, "image_auroc", "image_average_precision"))
    anomalous = row(labels == 1)
    assert all(anomalous[name].isnan() for name in ("image_auroc", "oracle_image_f1"))
    assert not any(anomalous[name].isnan() for name in figures_of_pixels)
    empty = row(labels >= 0, torch.where(masks == 1, 0, masks))
    assert all(empty[name].isnan() for name in figures_of_pixels)
    assert not empty["image_auroc"].isnan()
    assert empty["lost"] == 7  # the eighth is wholly unknown
    nothing = row(labels < 0)
    assert all(value.isnan() for value in nothing.values() if isinstance(value, Tensor))
    for make in (PixelAUROC, PRO, AveragePrecision):
        assert make(mode=mode)(maps[:0], masks[:0]).isnan()
        assert make(mode=mode)(maps, torch.full_like(masks, 255)).isnan()
    assert BestF1(mode=mode)(maps[:0], masks[:0])["oracle_threshold"].isnan()


@pytest.mark.parametrize("mode", ["exact", "streaming"])
def test_false_alarms_per_group_and_category(mode: Any) -> None:
    scores, maps, labels, masks, groups = images("tied")
    categories = torch.tensor([3, 3, 8, 8] * 3)
    metric = AnomalyEvaluation(mode=mode, image_threshold=1.0 + 1e-12, pixel_threshold=0.0)  # 1.0 itself is no alarm
    for start in range(0, 12, 5):
        part = slice(start, start + 5)
        metric.update(scores[part], maps[part], labels[part], masks[part], groups[part], categories[part])
    result = metric.compute()
    chosen = {("all", None): labels >= 0}
    chosen |= {("by_group", group): (labels == 0) | (groups == group) for group in (-2, 5)}
    chosen |= {("by_category", category): categories == category for category in (3, 8)}
    for (kind, name), keep in chosen.items():
        row = result if kind == "all" else result[kind][name]
        nominal = maps[keep][masks[keep] == 0]
        assert row["pixel_false_alarm_rate"] == (nominal > 0).double().mean()
        good = scores[keep & (labels == 0)]
        assert row["image_false_alarm_rate"] == (good > 1).double().mean()
        assert row["image_detection_rate"] == (scores[keep & (labels == 1)] > 1).double().mean()
        assert (row["nominal"], row["anomalous"]) == (len(good), int((labels[keep] == 1).sum()))
        known = masks[keep] != 255
        assert row["class_f1"].item() == pytest.approx(f1_score(labels[keep], scores[keep] > 1), abs=1e-12)
        assert row["seg_f1"].item() == pytest.approx(f1_score(masks[keep][known], maps[keep][known] > 0), abs=1e-12)
        if kind == "by_category":
            single = AnomalyEvaluation(mode=mode)
            single.update(*(column[keep] for column in (scores, maps, labels, masks, groups)))
            for figure in ("image_auroc", "pixel_auroc", "pro", "pixel_auroc_anomalous", "oracle_pixel_f1"):
                assert row[figure].item() == pytest.approx(single.compute()[figure].item(), abs=1e-9)
    assert not [name for name in figures(images())["evaluation"] if "false_alarm" in name]  # without thresholds
    nothing = AnomalyEvaluation(mode=mode, image_threshold=0.5, pixel_threshold=0.5)
    nothing.update(
        scores[labels == 1], maps[labels == 1], labels[labels == 1], masks[labels == 1] * 0 + 255, groups[labels == 1]
    )
    assert nothing.compute()["image_false_alarm_rate"].isnan()
    assert nothing.compute()["seg_f1"].isnan()  # every pixel is unknown
    assert nothing.compute()["pixel_false_alarm_rate"].isnan()


@pytest.mark.parametrize("shape", ["tied", "hundreds"])
def test_f1_at_a_threshold(shape: str) -> None:
    scores, maps, labels, masks, _ = columns = images(shape)
    above, known = float(maps.median()), masks != 255
    pixels, whole = feed(SegF1(above), maps, masks), feed(ClassF1(float(scores.median())), scores, labels)
    assert pixels.item() == pytest.approx(f1_score(masks[known], maps[known] > above), abs=1e-12)
    assert whole.item() == pytest.approx(f1_score(labels, scores > scores.median()), abs=1e-12)
    row = feed(AnomalyEvaluation(image_threshold=float(scores.median()), pixel_threshold=above), *columns)
    assert_same([row["seg_f1"], row["class_f1"]], [pixels, whole])
    assert feed(SegF1(1e6), maps, masks) == 0  # none is found
    assert feed(SegF1(above), maps[labels == 0], masks[labels == 0]).isnan()
    empty = ClassF1(0.0)
    empty.update(scores[:0], labels[:0])
    assert empty.compute().isnan()
    with pytest.raises(UserError, match="threshold must be a finite number, got nan"):
        SegF1(math.nan)


def test_figures_by_name() -> None:
    columns = (*images("tied"), torch.tensor([3, 3, 8, 8] * 3))
    evaluation = AnomalyEvaluation(image_threshold=1.0, pixel_threshold=0.5)
    expected = feed(evaluation, *columns)
    by_defect, by_category = figures_by_name(columns, Processes())
    assert list(by_defect) == ["all", "hole", "scratch"]
    assert list(by_category) == ["grid", "screw"]
    rows = {"all": expected, "hole": expected["by_group"][5], "scratch": expected["by_group"][-2]}
    for name, row in (rows | {"grid": expected["by_category"][8], "screw": expected["by_category"][3]}).items():
        found = (by_defect | by_category)[name]
        assert math.isnan(found.pop("aupimo"))  # fewer than 100,000 nominal pixels
        assert found == {key: row[key] for key in row if not key.startswith("by_")}
        assert "image_false_alarm_rate" in found
        assert {type(value) for value in found.values()} == {float, int}


def test_figures_of_batches_without_names_and_masks() -> None:
    scores, maps, labels, _, _ = images("tied")
    named = TestFigures(mode="streaming")
    named.add({"label": labels.tolist()}, scores, maps)
    named.add({"label": []}, scores[:0], maps[:0])
    by_defect, by_category = named.compute(Processes())
    assert list(by_defect) == ["all", "anomalous"]
    assert by_category == {}
    assert math.isnan(by_defect["all"]["pro"])  # every pixel is unknown
    assert by_defect["all"]["image_auroc"] == feed(ImageAUROC(), scores, labels)
    with pytest.raises(UserError, match="a test batch needs labels"):
        named.add({"mask": maps}, scores, maps)


def named_figures(batch: dict[str, Any], scores: Tensor, maps: Any, size: Any = "input") -> Any:
    figures = TestFigures(1.0, 0.5, size=size)
    figures.add(batch, scores, maps)
    return figures.compute(Processes())[0]


def test_pixels_without_a_value_are_unknown() -> None:
    """Whatever their mask; with masks, without them, and where images come as lists."""
    scores, maps, labels, masks, _ = images()
    absent = torch.zeros_like(masks, dtype=torch.bool)
    absent[:, 2:4], absent[3:5, :, 6:] = True, True
    batch = {"label": labels, "mask": torch.where(absent, 255, masks)}
    expected = named_figures(batch, scores, torch.where(absent, 100.0, maps))
    without = maps.masked_fill(absent, torch.nan)
    assert 0 < expected["all"]["pro"] < 1
    np.testing.assert_equal(named_figures(batch | {"mask": masks}, scores, without), expected)  # NaN equals NaN
    np.testing.assert_equal(named_figures(batch | {"mask": list(masks)}, scores, list(without)), expected)
    unknown = named_figures({"label": labels}, scores, without)["all"]
    assert unknown["image_auroc"] == expected["all"]["image_auroc"]
    assert math.isnan(unknown["pixel_auroc"])


ORIGINALS = [  # size of the original, part of it that the input covers
    ((14, 9), (0.0, 0.0, 14.0, 9.0)),
    ((30, 22), (3.5, 2.0, 26.5, 20.0)),  # cropped
    ((12, 20), (-4.0, 0.0, 16.0, 20.0)),  # padded
    ((8, 8), (0.0, 0.0, 8.0, 8.0)),  # as it is
]


def by_pixel(heat: np.ndarray, size: tuple[int, int], box: tuple[float, ...]) -> np.ndarray:
    """Slow and obvious: a map on the original's pixels, NaN beside the crop."""
    found = np.full(size, np.nan)
    (h, w), (top, left, bottom, right) = heat.shape, box
    for i, j in np.ndindex(size):
        y, x = (i + 0.5 - top) * h / (bottom - top), (j + 0.5 - left) * w / (right - left)
        if 0 <= y <= h and 0 <= x <= w:
            y, x = np.clip(y - 0.5, 0, h - 1), np.clip(x - 0.5, 0, w - 1)
            a, b = min(int(y), h - 2), min(int(x), w - 2)
            rows = heat[a] * (a + 1 - y) + heat[a + 1] * (y - a)
            found[i, j] = rows[b] * (b + 1 - x) + rows[b + 1] * (x - b)
    return found


def test_figures_of_the_originals_pixels() -> None:
    """As the references say of maps and masks at the sizes of the files, of the pixels that count."""
    draw = np.random.default_rng(0)
    maps = draw.random((4, 8, 8)).astype(np.float32)
    masks, regions_, truth, heats = [], [], [], []
    for (size, box), heat in zip(ORIGINALS, maps, strict=True):
        masks.append((draw.random(size) < 0.2).astype(np.uint8))
        region = draw.random(size) < 0.9
        heats.append(by_pixel(heat, size, box))
        truth.append(np.where(region & ~np.isnan(heats[-1]), masks[-1], 255))
        regions_.append(torch.from_numpy(region.astype(np.uint8)))
    masks[0][:], truth[0] = 0, np.where(truth[0] == 1, 0, truth[0])
    batch = {
        "label": torch.tensor([0, 1, 1, 1]),
        "mask": [torch.from_numpy(mask) for mask in masks],
        "region": regions_,
        "original_size": torch.tensor([size for size, _ in ORIGINALS]),
        "crop_box": torch.tensor([box for _, box in ORIGINALS]),
    }
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = named_figures(batch, scores, torch.from_numpy(maps), "original")["all"]
    nominal = np.concatenate([heat[mask == 0] for heat, mask in zip(heats, truth, strict=True)])
    anomalous = np.concatenate([heat[mask == 1] for heat, mask in zip(heats, truth, strict=True)])
    assert found["pixel_auroc"] == pytest.approx(reference.auroc(nominal, anomalous), abs=1e-6)
    assert found["pixel_average_precision"] == pytest.approx(reference.average_precision(nominal, anomalous), abs=1e-6)
    assert found["pro"] == pytest.approx(reference.pro(heats, truth, 0.3), abs=1e-6)
    assert found["pixel_false_alarm_rate"] == pytest.approx((nominal > 0.5).mean(), abs=1e-6)
    painted = [torch.where(region > 0, mask, 1 - mask) for region, mask in zip(regions_, batch["mask"], strict=True)]
    painted[0] = batch["mask"][0]  # a nominal image has no 1
    again = named_figures(batch | {"mask": painted}, scores, list(torch.from_numpy(maps)), "original")["all"]
    np.testing.assert_equal(again, found)  # NaN equals NaN
    del batch["mask"]
    assert math.isnan(named_figures(batch, scores, torch.from_numpy(maps), "original")["all"]["pro"])


def test_originals_must_be_known() -> None:
    scores, maps, labels, masks, _ = images()
    batch = {"label": labels, "mask": masks}
    with pytest.raises(UserError, match="batches hold no 'original_size' and 'crop_box'; use one of our data modules"):
        named_figures(batch, scores, maps, "original")
    batch |= {"original_size": torch.tensor([[18, 10]] * 12), "crop_box": torch.tensor([[0.0, 0.0, 18.0, 10.0]] * 12)}
    with pytest.raises(UserError, match="a mask has 9x10 pixels where the original has 18x10; give masks as they are"):
        named_figures(batch, scores, maps, "original")


def test_plot() -> None:
    _, maps, _, masks, _ = images("tied")
    metric = PRO()
    feed(metric, maps, masks)
    figure, axes = metric.plot()
    assert axes.get_ylim()[1] >= 1.0
    pyplot.close(figure)
    assert PRO.higher_is_better


def test_regions_are_labelled_once_for_each_mask() -> None:
    _, _, _, masks, _ = images()
    regions.mask_areas.cache_clear()
    first = pixel_areas(masks)
    labelled = regions.mask_areas.cache_info().misses
    second = pixel_areas(masks.clone())
    assert torch.equal(first, second)
    assert regions.mask_areas.cache_info().misses == labelled <= 8
    for mask in masks:
        found = {pixel: len(region) for region in reference.regions(mask.numpy()) for pixel in region}
        places = [tuple(place) for place in (mask == 1).nonzero().tolist()]
        assert pixel_areas(mask[None]).tolist() == [found[place] for place in places]


def test_answers_for_large_masks_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = images()[3]
    expected = pixel_areas(masks)
    monkeypatch.setattr(regions, "SMALL", 89)  # pixels
    regions.mask_areas.cache_clear()
    assert torch.equal(pixel_areas(masks), expected)
    assert regions.mask_areas.cache_info().misses == 0


def test_constant_scores() -> None:
    result = figures(images("constant"))["evaluation"]
    assert result["image_auroc"] == result["pixel_auroc"] == 0.5
    assert result["pro"].item() == pytest.approx(0.15, abs=1e-15)


def test_counts_beyond_float32() -> None:
    scores = torch.zeros(2**24 + 4)
    scores[0], scores[-1] = 2.0, 1.0
    labels = torch.zeros(len(scores), dtype=torch.int64)
    labels[-1] = 1
    assert feed(ImageAUROC(), scores, labels, batch=len(scores)) == 1 - 1 / (2**24 + 3)
    assert scores[0] == 2.0  # sorted in a copy


ONES = torch.ones(12, 9, 10)
BAD_INPUT = [
    (ImageAUROC, "scores", ONES[:, :1, 0], r"scores must have dimensions B, got shape \(12, 1\); reshape"),
    (ImageAUROC, "scores", ONES[:, 0, 0] * torch.nan, "scores must be finite .* got nan among 12 such"),
    (ImageAUROC, "scores", ONES[:, 0, 0].double() * 1e39, r"finite float32 numbers, got 1e\+39 among"),
    (ImageAUROC, "labels", ONES[:, 0, 0] * 2, r"labels must hold 0 \(nominal\), 1 .* got 2.0; convert"),
    (ImageAUROC, "labels", ONES[:5, 0, 0], r"labels must have the shape .* got \(5,\) for \(12,\); pass"),
    (PixelAUROC, "maps", ONES[:, None], r"maps must have dimensions B H W, got shape \(12, 1, 9, 10\)"),
    (PixelAUROC, "maps", ONES * -torch.inf, "maps must be finite .* got -inf among 1080 such of 1080"),
    (PixelAUROC, "masks", ONES.int() * 254, r"masks must hold .*255 \(unknown\), got 254; convert"),
    (PRO, "masks", ONES.mT, r"masks must have the shape .* got \(12, 10, 9\) for \(12, 9, 10\)"),
    (PRO, "masks", ONES / 2, "masks must hold .* got 0.5; convert"),
    (AveragePrecision, "scores", ONES * torch.nan, "scores must be finite .* got nan among 1080"),
    (AveragePrecision, "truth", ONES * 3, r"truth must hold .* got 3.0; convert"),
    (AnomalyEvaluation, "maps", ONES[:5], "maps must be one for each score, got 5 for 12 scores; pass"),
    (AnomalyEvaluation, "labels", ONES[:, 0, 0] * 0, "masks of nominal images must hold no 1, got .* label"),
    (AnomalyEvaluation, "groups", ONES[:, 0, 0], "groups must be integers .* got torch.float32 of shape"),
    (AnomalyEvaluation, "groups", ONES[:5, 0, 0].int(), r"groups must .* shape \(12,\), got .*\(5,\); num"),
]


@pytest.mark.parametrize(("make", "name", "value", "message"), BAD_INPUT)
def test_bad_input(make: Any, name: str, value: Tensor, message: str) -> None:
    every = ("scores", "maps", "labels", "masks", "groups")
    values = dict(zip(every, images(), strict=True)) | {name: value}
    taken = {ImageAUROC: ("scores", "labels"), AnomalyEvaluation: every}.get(make, ("maps", "masks"))
    if make is AveragePrecision:
        taken = ("scores", "truth")
        values = {"scores": values["maps"], "truth": values["masks"], name: value}
    metric = make()
    with pytest.raises(UserError, match=message):
        metric.update(*(values[argument] for argument in taken))


@pytest.mark.parametrize("limit", [0.0, -0.3, 1.01, float("nan")])
@pytest.mark.parametrize("make", [PRO, AnomalyEvaluation])
def test_bad_limit(make: Any, limit: float) -> None:
    with pytest.raises(UserError, match=r"fpr_limit must be in \(0, 1\], got .*; published"):
        make(fpr_limit=limit)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu() -> None:
    result = feed(AnomalyEvaluation().cuda(), *(column.cuda() for column in images("tied")))
    assert result["pro"].is_cuda
    expected = figures(images("tied"))
    assert_same(result, expected["evaluation"])
    _, maps, labels, masks, groups = (column.cuda() for column in images("tied"))
    assert_same(means(feed(per_image().cuda(), maps, masks, labels, groups)), expected["aupimo"])
    assert_same(feed(SPRO().cuda(), maps, defects_of(masks.cpu()), labels, groups), expected["spro"])
    assert_same(feed(SegF1(0.5).cuda(), maps, masks), expected["seg_f1"])
