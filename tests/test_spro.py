"""sPRO: defects that are found once a part of them is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shares import defects_of, names
from test_metrics import LEVELS, MASKS, SHAPES, assert_same, feed, images
from torch import Tensor

from pl_patchcore.distributed import Processes
from pl_patchcore.errors import UserError
from pl_patchcore.metrics import PRO, SPRO, TestFigures, streaming


def expected(maps: Tensor, defects: Any, limit: float) -> float:
    own = [[(np.asarray(mask), saturation) for mask, saturation in image if mask.any()] for image in defects]
    return reference.spro(list(maps.numpy()), own, limit)


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, maps, _, masks, _ = images(shape)
    defects = defects_of(masks)
    exact = feed(SPRO(), maps, defects)
    monkeypatch.setattr(streaming, "BINS", 2**5)
    monkeypatch.setattr(streaming, "APART", 1)
    streamed = feed(SPRO(mode="streaming"), maps, defects)
    for limit in (0.05, 0.3):
        name, figure = f"spro_{limit}", expected(maps, defects, limit)
        assert exact[name].item() == pytest.approx(figure, abs=1e-9)
        assert abs(streamed[name] - figure) <= streamed[f"{name}_bound"]
    assert "spro_0.05_bound" not in exact


@given(LEVELS, MASKS, st.integers(1, 8), st.floats(0.01, 1.0))
@settings(max_examples=60)
def test_matches_reference_on_ties(levels: np.ndarray, masks: np.ndarray, saturation: int, limit: float) -> None:
    maps = torch.from_numpy(levels).float()
    flags = torch.from_numpy(masks)
    defects = [[(flags[i] == 1, saturation), (flags[i] == 255, 2)] for i in range(3)]
    assume((masks == 0).any() and (masks > 0).any())
    found = feed(SPRO((limit,)), maps, defects)
    assert found[f"spro_{limit:g}"].item() == pytest.approx(expected(maps, defects, limit), abs=1e-9)


def test_is_pro_where_each_region_saturates_with_its_area() -> None:
    _, maps, _, masks, _ = images("tied")
    masks = torch.where(masks == 255, 0, masks)
    defects = []
    for mask in masks.numpy():
        own = []
        for region in reference.regions(mask):
            flag = np.zeros(mask.shape, bool)
            flag[tuple(zip(*region, strict=True))] = True
            own.append((flag, 10**6))
        defects.append(own)
    found = feed(SPRO(), maps, defects)
    assert_same([found["spro_0.05"], found["spro_0.3"]], [feed(PRO(limit), maps, masks) for limit in (0.05, 0.3)])


def test_groups_categories_and_their_mean() -> None:
    _, maps, labels, masks, groups = images("tied")
    defects, categories = defects_of(masks), torch.tensor([3, 3, 8, 8] * 3)
    defects[7] = []  # an anomalous image, whose defects are not known, does not count
    row = feed(SPRO(), maps, defects, labels, groups, categories)
    chosen = {("by_group", group): (labels == 0) | (groups == group) for group in (-2, 5)}
    chosen |= {("by_category", category): categories == category for category in (3, 8)}
    for (kind, name), keep in chosen.items():
        own = [defects[i] for i in keep.nonzero().flatten()]
        alone = feed(SPRO(), maps[keep], own, labels[keep])
        for figure in ("spro_0.05", "spro_0.3"):
            assert row[kind][name][figure].item() == pytest.approx(alone[figure].item(), abs=1e-12)
    mean = (row["by_group"][-2]["spro_0.05"] + row["by_group"][5]["spro_0.05"]) / 2
    assert row["mean_spro_0.05"].item() == pytest.approx(mean.item(), abs=1e-12)


def test_sizes_differ_and_some_pixels_do_not_count() -> None:
    first = torch.tensor([[1.0, torch.nan, 3.0], [torch.nan, 7.0, 2.0]])
    second = torch.tensor([[9.0, 8.0, 0.5, 4.0]])
    defect = torch.tensor([[True, True, False, False]])
    hidden = torch.tensor([[False, True, False], [True, False, False]])  # no pixel of it counts
    metric = SPRO((1.0,))
    metric.update([first, second], [[(hidden, 1)], [(defect, 5)]])
    assert metric.compute()["spro_1"] == 1.0
    metric.update([second], [[(~defect, 1)]])  # found from 4.0 on
    first_one = (1 - 1 / 16 + 1 - 3 / 16) / 2  # 9.0 and 8.0 tie with a nominal pixel each
    assert metric.compute()["spro_1"].item() == pytest.approx((first_one + 1 - 7 / 16) / 2, abs=1e-12)


def test_without_a_figure_is_nan() -> None:
    _, maps, labels, _, _ = images()
    for mode in ("exact", "streaming"):
        for keep in (labels == 0, labels < 0):
            metric = SPRO(mode=mode)
            metric.update(maps[keep], [[] for _ in maps[keep]])
            found = metric.compute()
            assert found["spro_0.05"].isnan()
            assert found["mean_spro_0.05"].isnan()
        everything = [[(torch.ones(9, 10, dtype=torch.bool), 4)]]
        metric = SPRO(mode=mode)
        metric.update(maps[:1], everything)
        assert metric.compute()["spro_0.3"].isnan()  # no pixel is of no defect


def test_rows_of_a_test_hold_it_where_batches_hold_defects() -> None:
    scores, maps, labels, masks, groups = images("tied")
    batch = {"label": labels, "mask": masks, "defect": names(groups)}
    without = TestFigures()
    without.add(batch, scores, maps)
    assert not [name for name in without.compute(Processes())[0]["all"] if "spro" in name]
    figures = TestFigures()
    figures.add(batch | {"defect_regions": defects_of(masks)}, scores, maps)
    rows, _ = figures.compute(Processes())
    whole = feed(SPRO(), maps, defects_of(masks), labels, groups)
    assert rows["all"]["spro_0.05"] == whole["spro_0.05"]
    assert rows["all"]["mean_spro_0.05"] == whole["mean_spro_0.05"]
    assert rows["hole"]["spro_0.3"] == whole["by_group"][5]["spro_0.3"]
    assert rows["hole"]["pro"] > 0


FLAG = torch.ones(9, 10, dtype=torch.bool)
BAD: list[tuple[Any, str]] = [
    ([[(FLAG.int(), 4)]], r"a defect must be a bool mask .*; got torch.int32 of \(9, 10\), 4 and label 1"),
    ([[(FLAG[:5], 4)]], r"a defect must be a bool mask of its map's size \(9, 10\) .*; got torch.bool of \(5, 10\)"),
    ([[(FLAG, 0)]], "a saturation area of 1 pixel or more"),
    ([[], []], "defects must be a list for each map, got 1 maps, 2 lists and 2 labels"),
]


@pytest.mark.parametrize(("defects", "message"), BAD)
def test_bad_input(defects: Any, message: str) -> None:
    _, maps, _, _, _ = images()
    with pytest.raises(UserError, match=message):
        SPRO().update(maps[:1], defects)
    with pytest.raises(UserError, match="maps must be finite"):
        SPRO().update(maps[:1] * torch.inf, [[]])
    with pytest.raises(UserError, match=r"in an image of label 1; .* and label 0"):
        SPRO().update(maps[:1], [[(FLAG, 3)]], labels=torch.tensor([0]))
    with pytest.raises(UserError, match="fpr_limit must be in"):
        SPRO((0.0,))
