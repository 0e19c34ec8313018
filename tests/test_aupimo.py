"""AUPIMO: the published figure on the same maps, in bounded memory."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from shares import per_image
from test_metrics import LEVELS, MASKS, SHAPES, assert_same, feed, images, means
from torch import Tensor

from pl_patchcore.errors import UserError
from pl_patchcore.metrics import AUPIMO, aupimo

BOUNDS, STEPS = (0.01, 0.3), 500


def expected(maps: Tensor, masks: Tensor, labels: Tensor) -> list[float]:
    return reference.aupimo(list(maps.numpy()), list(masks.numpy()), labels.tolist(), BOUNDS, STEPS)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "constant"])
def test_matches_reference(shape: str) -> None:
    _, maps, labels, masks, _ = images(shape)
    row = feed(per_image(), maps, masks, labels)
    wanted = torch.tensor(expected(maps, masks, labels), dtype=torch.float64)
    torch.testing.assert_close(row["per_image"], wanted, rtol=0, atol=1e-9, equal_nan=True)
    assert row["aupimo"].item() == pytest.approx(wanted.nanmean().item(), abs=1e-9)
    assert (labels.numpy() == 0).sum() + 2 == row["per_image"].isnan().sum()  # one is unknown, one has lost its defect


@given(LEVELS, MASKS)
@settings(max_examples=60)
def test_matches_reference_on_ties(levels: np.ndarray, masks: np.ndarray) -> None:
    levels = np.concatenate([levels, levels[::-1]])
    masks = np.concatenate([masks, np.where(masks[::-1] == 1, 0, masks[::-1])])
    labels = (masks == 1).any(axis=(1, 2)).astype(int)
    counted = [mask for mask, label in zip(masks, labels, strict=True) if not label and (mask == 0).any()]
    assume(labels.any() and len(counted) == 6 - labels.sum())
    maps, truth = torch.from_numpy(levels).float(), torch.from_numpy(masks)
    found = feed(AUPIMO(BOUNDS, STEPS), maps, truth)["per_image"].numpy()
    np.testing.assert_allclose(found, expected(maps, truth, torch.from_numpy(labels)), rtol=0, atol=1e-9)


def test_equals_the_published_implementation() -> None:
    """Figures of ``anomalib.metrics.pimo.functional.aupimo_scores`` of anomalib 2.7.0 on the same maps."""
    count = np.arange(24 * 100 * 120, dtype=np.uint64)
    level = (count * np.uint64(2654435761) % np.uint64(2**32)).astype(np.float64) / 2**32
    masks = np.zeros((24, 100, 120), np.uint8)
    for i in range(12):
        masks[i, 10 : 30 + i, 20:50] = 1
    maps = (1 / (level.reshape(masks.shape) + 0.01) + masks * np.arange(24)[:, None, None] * 10).astype(np.float32)
    row = feed(AUPIMO(), torch.from_numpy(maps), torch.from_numpy(masks))
    assert row["per_image"][:12].tolist() == pytest.approx(PUBLISHED, abs=1e-9)
    assert row["aupimo"].item() == pytest.approx(np.mean(PUBLISHED), abs=1e-9)
    assert row["per_image"][12:].isnan().all()


PUBLISHED = [
    0.0,
    0.0,
    0.005209672889446536,
    0.0016610551241713594,
    0.009551066963985317,
    0.015370969528550658,
    0.01640935117781991,
    0.02875374999859179,
    0.045026458544502206,
    0.10685131176638178,
    1.0,
    1.0,
]


def test_rows_are_those_of_the_images_alone() -> None:
    _, maps, labels, masks, groups = images("tied")
    categories = torch.tensor([3, 3, 8, 8] * 3)
    row = feed(per_image(), maps, masks, labels, groups, categories)
    for kind, name in (("by_group", -2), ("by_group", 5), ("by_category", 3), ("by_category", 8)):
        keep = (labels == 0) | (groups == name) if kind == "by_group" else categories == name
        alone = feed(per_image(), maps[keep], masks[keep], labels[keep])
        assert_same(row[kind][name], {"aupimo": alone["aupimo"]})
    assert sorted(row["by_group"]) == [-2, 5]


@pytest.mark.parametrize("shape", ["random", "tied", "around 300"])
def test_streaming_is_within_its_bound(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aupimo, "SHARES", 5)
    _, maps, labels, masks, groups = images(shape)
    exact = feed(per_image(), maps, masks, labels, groups)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    rows = []
    for metric in (AUPIMO(BOUNDS, STEPS, "streaming"), AUPIMO(BOUNDS, STEPS, pixel_limit=40)):
        columns = tuple(column[order] for column in (maps, masks, labels, groups))
        rows.append(means(feed(metric, *columns, batch=2)))
        assert_same(rows[-1], means(feed(metric.clone(), *columns, batch=12)) if rows[1:] else rows[-1])
    assert_same(*rows)
    streamed = feed(AUPIMO(BOUNDS, STEPS, "streaming"), maps, masks, labels, groups)
    assert_same(means(streamed), rows[0])
    known = ~exact["per_image"].isnan()
    off = (streamed["per_image"] - exact["per_image"])[known].abs()
    assert 0 < off.max() <= 0.1 * 1.2  # 1 / (2 * 5) of an axis, whose ends are the nearest rates
    for found, whole in [(streamed, exact)] + [(streamed["by_group"][g], exact["by_group"][g]) for g in (-2, 5)]:
        assert abs(found["aupimo"] - whole["aupimo"]) <= found["aupimo_bound"] <= 0.12
    assert "aupimo_bound" not in exact


def test_small_nominal_scores_are_left_out_without_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, maps, labels, masks, groups = images()
    categories = torch.tensor([3, 3, 8, 8] * 3)
    columns = maps, masks, labels, groups, categories
    whole = feed(per_image(), *columns)
    monkeypatch.setattr(aupimo, "CAPACITY", 110)  # of 355 nominal pixels of nominal images
    metric = per_image()
    assert_same(feed(metric, *columns, batch=1), whole)
    assert sum(map(len, metric.nominal)) <= 3 * 110
    monkeypatch.setattr(aupimo, "CAPACITY", 20)
    with caplog.at_level(logging.WARNING):
        assert feed(per_image(), *columns)["aupimo"].isnan()
    assert "AUPIMO keeps the 20 largest nominal scores, which end at a rate of 0.0" in caplog.text


def test_without_a_figure_is_nan() -> None:
    _, maps, labels, masks, _ = images()
    for keep in (labels == 0, labels == 1, labels < 0):
        row = feed(per_image(), maps[keep], masks[keep], labels[keep], batch=12) if keep.any() else None
        empty = per_image()
        empty.update(maps[keep], masks[keep], labels[keep])
        row = row or empty.compute()
        assert row["aupimo"].isnan()
        assert row["per_image"].isnan().all()
    assert feed(AUPIMO(), maps, masks, labels)["aupimo"].isnan()  # fewer than 100,000 nominal pixels
    assert feed(per_image(), torch.full_like(maps, 7.0), masks, labels)["aupimo"].isnan()
    unknown = torch.where(labels[:, None, None] == 0, 255, masks)
    assert feed(per_image(), maps, unknown, labels)["aupimo"].isnan()


def test_life_of_the_metric() -> None:
    _, maps, labels, masks, _ = columns = images("tied")
    columns = maps, masks, labels
    whole = feed(per_image(), *columns)
    metric = per_image()
    half = metric(*(column[:6] for column in columns))
    assert_same(half, feed(per_image(), *(column[:6] for column in columns)))
    metric(*(column[6:] for column in columns))
    assert_same(metric.compute(), whole)
    first, second = per_image(), per_image()
    first.update(*(column[:5] for column in columns))
    second.update(*(column[5:] for column in columns))
    first.merge_state(second)
    assert_same(means(first.compute()), means(whole))
    metric.reset()
    assert_same(feed(metric, *columns, batch=12), whole)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"bounds": (0.1, 0.1)}, r"bounds must be 0 < lower < upper < 1, got \(0.1, 0.1\)"),
    ({"bounds": (0.0, 0.1)}, "bounds must be"),
    ({"num_thresholds": 1}, "num_thresholds must be 2 or more, got 1"),
    ({"mode": "fast"}, "mode must be auto, exact or streaming, got 'fast'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AUPIMO(**options)


def test_bad_input() -> None:
    _, maps, labels, masks, groups = images()
    with pytest.raises(UserError, match="maps must be finite"):
        AUPIMO().update(maps * torch.nan, masks)
    with pytest.raises(UserError, match="labels must hold 0"):
        AUPIMO().update(maps, masks, labels * 2)
    with pytest.raises(UserError, match="categories must be integers"):
        AUPIMO().update(maps, masks, labels, groups, labels / 2)
