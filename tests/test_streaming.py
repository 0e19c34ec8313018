"""Streaming mode of the metrics: error within the bound, and a state that depends on the scores alone."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.multiprocessing as mp
from conftest import forkserver
from hypothesis import given, settings
from hypothesis import strategies as st
from shares import SHARES, WHOLE, figures_by_name, share
from test_metrics import MASKS, SHAPES, assert_same, feed, figures, images, references
from torch import Tensor

from pl_patchcore.distributed import Processes
from pl_patchcore.errors import UserError
from pl_patchcore.metrics import PRO, AnomalyEvaluation, AveragePrecision, BestF1, PixelAUROC, streaming
from pl_patchcore.metrics.streaming import BINS, Histogram, Pixels, add_pixels, merge, zeros
from pl_patchcore.numerics import one_thread


@pytest.fixture(autouse=True)
def one_thread_each() -> Any:
    """Many short operations: threads of a busy machine would wait for each other."""
    with one_thread():
        yield


def evaluate(columns: tuple[Tensor, ...], mode: str = "streaming", batch: int = 5) -> dict[str, Any]:
    kind, limit = WHOLE[mode]
    return feed(AnomalyEvaluation(mode=kind, pixel_limit=limit), *columns, batch=batch)


def with_categories(columns: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (*columns, torch.tensor([3, 3, 8, 8] * 3))


def empty(columns: int) -> Histogram:
    """Histogram without pixels, of cells of so many numbers."""
    return zeros(torch.empty(0, columns + 1, dtype=torch.int64))


def coarse(monkeypatch: pytest.MonkeyPatch, bins: int = 2**11) -> None:
    monkeypatch.setattr(streaming, "BINS", bins)
    monkeypatch.setattr(streaming, "APART", 1)


def assert_within_bounds(row: dict[str, Any], exact: dict[str, Any]) -> None:
    for name in [name for name in row if name.endswith("_bound")]:
        figure = name.removesuffix("_bound")
        if exact[figure].isnan():
            assert row[figure].isnan()
        else:
            assert abs(row[figure] - exact[figure]) <= row[name], figure


@pytest.mark.parametrize("bins", [2**4, 2**9, BINS])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference_within_its_bound(shape: str, bins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if bins != BINS:
        coarse(monkeypatch, bins)
    _, maps, _, masks, _ = columns = images(shape)
    row = evaluate(columns)
    for name, figure in references(shape).items():
        assert abs(row[name].item() - figure) <= row.get(f"{name}_bound", torch.tensor(1e-12)).item(), name
    nominal, anomalous = maps[masks == 0].numpy(), maps[masks == 1].numpy()
    threshold = row["oracle_pixel_f1_threshold"].item()
    assert reference.f1(nominal, anomalous, threshold) == pytest.approx(row["oracle_pixel_f1"].item(), abs=1e-12)
    if bins == BINS:
        assert all(value < 1e-9 for name, value in row.items() if name.endswith("_bound"))


@given(
    st.lists(
        st.tuples(
            st.sampled_from([-300.0, -1e-40, -0.0, 0.0, 1.0, 1.001, 2.5, 1e30]) | st.floats(width=32), st.booleans()
        ),
        min_size=1,
        max_size=60,
    ),
    st.sampled_from([1, 2**4, 2**9]),
)
@settings(max_examples=100)
def test_any_scores_are_within_the_bound(pairs: list[tuple[float, bool]], bins: int) -> None:
    scores = torch.tensor([score for score, _ in pairs])
    chosen = torch.isfinite(scores)
    truth = torch.tensor([int(positive) for _, positive in pairs])[chosen]
    scores = scores[chosen]
    nominal, anomalous = scores[truth == 0].numpy(), scores[truth == 1].numpy()
    if not len(nominal) or not len(anomalous):
        return
    with pytest.MonkeyPatch.context() as patch:
        coarse(patch, bins)
        precision, best = AveragePrecision(mode="streaming"), BestF1(mode="streaming")
        area = PixelAUROC(mode="streaming")
        found = [
            precision(scores, truth),
            best(scores, truth)["oracle_f1"],
            area(scores[None, None], truth[None, None]),
        ]
    expected = [
        reference.average_precision(nominal, anomalous),
        reference.best_f1(nominal, anomalous),
        reference.auroc(nominal, anomalous),
    ]
    for figure, metric, value in zip(found, (precision, best, area), expected, strict=True):
        assert abs(figure.item() - value) <= metric.error_bound


CONTINUOUS = {
    "factor of two": lambda g, n: 1 + torch.rand(n, generator=g),
    "300 +- 3": lambda g, n: 297 + 6 * torch.rand(n, generator=g),
    "normal": lambda g, n: torch.randn(n, generator=g),
    "sixty octaves": lambda g, n: 2 ** (60 * torch.rand(n, generator=g) - 30),
    "distances": lambda g, n: 40 + 10 * torch.randn(n, generator=g).exp(),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_bound_at_the_default_size(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    maps = CONTINUOUS[name](g, 40 * 65536).reshape(40, 256, 256)
    masks = torch.zeros(40, 256, 256, dtype=torch.uint8)
    masks[:25, 30:70, 60:120] = 1
    maps = torch.where(masks == 1, torch.maximum(maps, maps.flip(1)), maps)
    labels = (masks.flatten(1).amax(1) == 1).long()
    columns = maps.amax(dim=(1, 2)), maps, labels, masks, labels
    row = feed(AnomalyEvaluation(mode="streaming"), *columns)
    bounds = {figure: value.item() for figure, value in row.items() if figure.endswith("_bound")}
    assert len(bounds) == 7
    assert max(bounds.values()) <= 1e-4
    exact = feed(AnomalyEvaluation(mode="exact"), *columns)
    assert_within_bounds(row, exact)
    alone = PRO(mode="streaming")
    alone.update(maps, masks)
    assert abs(alone.compute() - exact["pro"]) <= alone.error_bound <= 1e-4


def test_bins_with_one_value_add_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse(monkeypatch, 16)
    scores = torch.tensor([0.0] * 50 + [1.0, 4.0, 16.0, 64.0] * 5)  # five buckets of one value each
    metric = PixelAUROC(mode="streaming")
    truth = (torch.arange(70) % 3 == 0).long()
    metric.update(scores[None, None], truth[None, None])
    assert metric.compute().item() == pytest.approx(
        reference.auroc(scores[truth == 0].numpy(), scores[truth == 1].numpy()), abs=1e-12
    )
    assert metric.error_bound < 1e-11
    metric.update(torch.full((1, 1, 2), 1.001), torch.tensor([[[0, 1]]]))  # beside 1.0, in its bin
    metric.compute()
    assert metric.error_bound > 1e-4


@given(st.randoms(use_true_random=False), st.sampled_from([2**7, 2**12]), st.sampled_from(sorted(SHAPES)))
@settings(max_examples=20)
def test_state_depends_on_the_scores_alone(random: Any, bins: int, shape: str) -> None:
    """Any order, any batches, any merging of parts: the same histogram, bit for bit."""
    _, maps, _, masks, _ = images(shape)
    pixels = [
        Pixels((index % 2, index % 3), scores, torch.full((len(scores) if positive else 0,), 1 + index % 7))
        for index, (image, mask) in enumerate(zip(maps, masks, strict=True))
        for positive in (False, True)
        if len(scores := image[mask == positive])
    ]
    with pytest.MonkeyPatch.context() as patch:
        coarse(patch, bins)
        whole = add_pixels(empty(2), pixels)
        shuffled = random.sample(pixels, len(pixels))
        cuts = sorted(random.choices(range(len(pixels) + 1), k=random.randint(0, 4)))
        parts = []
        for start, end in itertools.pairwise([0, *cuts, len(pixels)]):
            part = empty(2)
            for piece in shuffled[start:end]:
                part = (
                    add_pixels(part, [piece]) if random.random() < 0.5 else merge([part, add_pixels(empty(2), [piece])])
                )
            parts.append(part)
        random.shuffle(parts)
        merged = merge(parts)
    for actual, expected in zip(merged, whole, strict=True):
        assert torch.equal(actual, expected)
    assert len(whole.buckets) << whole.bits <= max(bins, len(whole.buckets))


def test_bins_stay_within_the_budget_as_scores_spread() -> None:
    histogram = empty(1)
    bits = []
    for scale in (1.0, 1e3, 1e9, 1e30):
        histogram = add_pixels(histogram, [Pixels((0,), torch.linspace(1, 2, 5000) ** 8 * scale)])
        bits.append(histogram.bits)
        assert len(histogram.buckets) << histogram.bits <= BINS == len(histogram.nominal)
    assert bits == sorted(bits, reverse=True)
    assert bits[0] > bits[-1]
    assert histogram.nominal.sum() == 20_000


@pytest.mark.parametrize("shape", ["random", "tied", "around 300"])
def test_modes_and_the_switch_between_them(shape: str, caplog: pytest.LogCaptureFixture) -> None:
    columns = with_categories(images(shape))
    exact, expected = evaluate(columns, "exact"), evaluate(columns, "streaming")
    with caplog.at_level(logging.INFO):
        assert_same(evaluate(columns, "switched"), expected)
    assert "more than 300 pixels: AnomalyEvaluation goes on in streaming mode" in caplog.text
    assert_same(evaluate(columns, "late"), exact if (columns[3] != 255).sum() <= 1079 else expected)
    assert not [name for name in exact if name.endswith("_bound")]
    for kind in ("by_group", "by_category"):
        assert sorted(expected[kind]) == sorted(exact[kind]) == {"by_group": [-2, 5], "by_category": [3, 8]}[kind]
        for name, row in expected[kind].items():
            assert_within_bounds(row, exact[kind][name])
    assert_within_bounds(expected, exact)


def test_limit_counts_pixels_of_all_updates() -> None:
    maps, masks = torch.rand(4, 5, 5), torch.zeros(4, 5, 5, dtype=torch.uint8)
    masks[:, 0, :2] = 1
    for limit, bound in ((100, True), (99, False)):
        metric = PRO(pixel_limit=limit)
        feed(metric, maps, masks, batch=1)
        assert (metric.error_bound == 0) is bound


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_streaming_is_bit_equal_for_any_batches_and_order(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    coarse(monkeypatch)
    monkeypatch.setattr("pl_patchcore.metrics.state.FLUSH", 100)
    columns = with_categories(images())
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    assert evaluate(tuple(column[order] for column in columns), batch=batch) == evaluate(columns)


@pytest.mark.parametrize("mode", sorted(WHOLE))
def test_life_of_a_metric(mode: str) -> None:
    """Forward, reset, clone, pickle, state_dict, `to` and merging keep what they should."""
    columns = images("tied")
    _, maps, _, masks, _ = columns
    kind, limit = WHOLE[mode]
    metric = PRO(mode=kind, pixel_limit=limit)
    whole = feed(PRO(mode=kind, pixel_limit=limit), maps, masks)
    half = metric(maps[:6], masks[:6])
    assert_same(half, feed(PRO(mode="exact"), maps[:6], masks[:6]))
    metric.persistent(True)
    for other in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.to("cpu")):
        other(maps[6:], masks[6:])
        assert_same(other.compute(), whole)
    assert_same(metric.compute(), whole)
    metric.reset()
    assert metric.error_bound is None
    assert_same(feed(metric, maps, masks, batch=12), whole)
    loaded = PRO(mode=kind, pixel_limit=limit)
    loaded.persistent(True)
    loaded.load_state_dict(metric.state_dict())
    loaded.update(maps[:0], masks[:0])  # torchmetrics does not save that there were updates
    assert_same(loaded.compute(), whole)
    first, second = PRO(mode=kind, pixel_limit=limit), PRO(mode=kind, pixel_limit=limit)
    first.update(maps[:5], masks[:5])
    second.update(maps[5:], masks[5:])
    first.merge_state(second)
    assert_same(first.compute(), whole)


def test_compute_between_updates() -> None:
    columns = images()
    metric = AnomalyEvaluation(mode="streaming")
    for start in range(0, 12, 4):
        metric.update(*(column[start : start + 4] for column in columns))
        assert metric.compute() == metric.compute()
    assert str(metric.compute()) == str(evaluate(columns))


def test_too_many_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "UNIT", 2**58)
    monkeypatch.setattr(streaming, "MOST", 2**61)
    masks = torch.zeros(1, 9, 9, dtype=torch.uint8)
    masks[0, ::2, ::2] = 1
    metric = PRO(mode="streaming")
    metric.update(torch.rand(1, 9, 9), masks)
    with pytest.raises(UserError, match=r"masks have more than 8 regions.*mode='exact'"):
        metric.compute()


def test_weights_of_a_whole_test_set_do_not_overflow() -> None:
    """Counts and weights as mSTC has them, 8,600 frames of 65,536 pixels in one bin."""
    histogram = add_pixels(empty(1), [Pixels((0,), torch.ones(1)), Pixels((0,), torch.ones(1), torch.ones(1))])
    buckets, nominal, anomalous, weights, single = histogram
    frame = Histogram(buckets, nominal * 65536, anomalous * 65536, weights * 400, single)
    hundred = merge([frame] * 100)
    merged = merge([hundred] * 86)
    assert merged.nominal.max() == merged.anomalous.max() == 8600 * 65536
    assert merged.weights.max() == 8600 * 400 * streaming.UNIT


@pytest.mark.slow
def test_several_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes, and the first two of them, each with a share of the images."""
    columns = with_categories(images())
    order = torch.argsort(columns[2], stable=True)  # the first process gets nominal images only
    torch.save(tuple(column[order] for column in columns), tmp_path / "columns.pt")
    torch.save(images("tied"), tmp_path / "tied.pt")
    forkserver()
    mp.start_processes(share, args=(tmp_path,), nprocs=3, start_method="forkserver")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    coarse(monkeypatch)
    whole = {mode: evaluate(columns, mode) for mode in WHOLE}
    for (mode, expected), name, world in itertools.product(whole.items(), SHARES, (2, 3)):
        for result in itertools.chain(*(found[rank][world, name, mode] for rank in range(world))):
            if "pro_bound" in expected:
                assert str(result) == str(expected)  # bit for bit: NaN equals NaN
                assert result["pro"] == expected["pro"]
            else:
                assert_same(result, expected)
    single = {name: value for name, value in figures(images("tied")).items() if name != "evaluation"}
    for rank, cut in itertools.product((0, 1), (9, 12)):
        assert found[rank]["single", cut]["aupimo"].pop("per_image").isnan().tolist()[:4] == [True, False, True, False]
        assert_same(found[rank]["single", cut], single)
    assert {str(results["named"]) for results in found} == {str(figures_by_name(columns, Processes()))}


@given(st.data())
@settings(max_examples=10)
def test_figures_do_not_depend_on_cells(data: Any) -> None:
    """The overall row is the same however images are grouped (as long as no bins are shared out)."""
    masks = torch.from_numpy(data.draw(MASKS))
    maps = torch.rand(masks.shape, generator=torch.Generator().manual_seed(1))
    labels = (masks == 1).flatten(1).any(1).long()
    groups = torch.tensor(data.draw(st.lists(st.integers(-3, 3), min_size=3, max_size=3)))
    rows = []
    for names in (groups, groups * 0):
        metric = AnomalyEvaluation(mode="streaming")
        metric.update(maps.amax((1, 2)), maps, labels, masks, names, names)
        rows.append({name: value for name, value in metric.compute().items() if isinstance(value, Tensor)})
    assert_same(*rows)


def test_bad_mode() -> None:
    with pytest.raises(UserError, match="mode must be auto, exact or streaming, got 'fast'"):
        PRO(mode="fast")
    with pytest.raises(UserError, match="pixel_limit must be 0 or more, got -1; it counts pixels"):
        AnomalyEvaluation(pixel_limit=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu_bit_for_bit() -> None:
    columns = with_categories(images())
    result = feed(AnomalyEvaluation(mode="streaming").cuda(), *(column.cuda() for column in columns))
    assert result["pro"].is_cuda
    assert str(result).replace(", device='cuda:0'", "") == str(evaluate(columns))


def test_scores_keep_their_order_as_keys() -> None:
    scores = np.array([-np.float32(3e38), -1.0, -1e-45, 0.0, 1e-45, 1.0, 1.0000001, 3e38], np.float32)
    keys = streaming.score_keys(torch.from_numpy(scores))
    assert (keys.diff() > 0).all()
    assert np.array_equal(streaming.key_scores(keys.numpy()), scores)
