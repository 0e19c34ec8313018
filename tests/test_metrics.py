from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate
from sklearn.metrics import roc_auc_score
from torch import Tensor

from pl_patchcore.errors import UserError
from pl_patchcore.metrics import PRO, AnomalyEvaluation, ImageAUROC, PixelAUROC, auroc, curve_area, pro
from pl_patchcore.metrics.auroc import count_above, sort_scores

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


def images(shape: str = "random", count: int = 6, size: tuple[int, int] = (13, 11), seed: int = 0):
    """Scores, maps, labels, masks and groups of a few images; some unknown, one wholly so, one defect lost."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(count, *size, generator=generator)
    masks = torch.zeros(count, *size, dtype=torch.uint8)
    labels = torch.arange(count) % 3 % 2  # 0 1 0, 0 1 0, ...
    labels[-1] = 1
    for index in labels.nonzero().flatten().tolist():
        masks[index, 1:4, 1 : 4 + index] = 1
        masks[index, 4, 4 + index] = 1  # touches the first at a corner
        masks[index, 7, 2::3] = 1  # three more
        masks[index, 9:] = 255
    masks[0, 0, :5] = 255
    maps += 0.8 * (masks == 1)
    if count > 6:
        masks[7], masks[8] = 255, 0
        labels[8] = 1
    maps = SHAPES[shape](maps)
    groups = torch.tensor([11, -2, 5])[torch.arange(count) % 3 if count > 6 else torch.arange(count) // 3]
    return maps.amax(dim=(1, 2)), maps, labels, masks, groups


def feed(metric, *columns: Tensor, batch: int = 4):
    for start in range(0, len(columns[0]), batch):
        metric.update(*(column[start : start + batch] for column in columns))
    return metric


def pixels(maps: Tensor, masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return maps[masks == 0].numpy(), maps[masks == 1].numpy()


def pairs(maps: Tensor, masks: Tensor) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return list(maps.double().numpy()), list(masks.numpy())


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: str) -> None:
    scores, maps, labels, masks, _ = images(shape)
    image = feed(ImageAUROC(), scores, labels).compute()
    pixel = feed(PixelAUROC(), maps, masks).compute()
    assert image.dtype == pixel.dtype == torch.float64
    assert image.item() == pytest.approx(
        reference.auroc(scores[labels == 0].numpy(), scores[labels == 1].numpy()), abs=1e-12
    )
    assert pixel.item() == pytest.approx(reference.auroc(*pixels(maps, masks)), abs=1e-12)
    for limit in (0.3, 0.05, 1.0):
        expected = reference.pro(*pairs(maps, masks), fpr_limit=limit)
        assert feed(PRO(limit), maps, masks).compute().item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "constant"])
def test_matches_sklearn(shape: str) -> None:
    _, maps, _, masks, _ = images(shape, seed=1)
    known = masks != 255
    expected = roc_auc_score(masks[known].numpy(), maps[known].double().numpy())
    assert feed(PixelAUROC(), maps, masks).compute().item() == pytest.approx(expected, abs=1e-12)


@given(
    hnp.arrays(np.float32, st.integers(1, 12), elements=st.integers(-3, 3)),
    hnp.arrays(np.float32, st.integers(1, 12), elements=st.integers(-3, 3)),
    st.floats(0.01, 1.0),
    st.integers(0, 9),
)
@settings(deadline=None)
def test_area_is_that_of_the_curve(
    negatives: np.ndarray, positives: np.ndarray, limit: float, seed: int
) -> None:
    weights = np.random.default_rng(seed).uniform(0.1, 1, len(positives))
    thresholds = np.unique(np.concatenate([negatives, positives]))[::-1]
    x = np.array([0.0, *[(negatives >= t).mean() for t in thresholds]])
    y = np.array([0.0, *[weights[positives >= t].sum() / weights.sum() for t in thresholds]])
    # np.interp takes the highest of several values at the limit, which is where the curve leaves it.
    end = np.append(x[x < limit], limit), np.append(y[x < limit], np.interp(limit, x, y))
    if (x == limit).any():
        end = x[x <= limit], y[x <= limit]
    counts = count_above(sort_scores([torch.from_numpy(negatives)]), torch.from_numpy(positives))
    area = curve_area(*counts, len(negatives), torch.from_numpy(weights), limit)
    assert area.item() == pytest.approx(integrate.trapezoid(end[1], end[0]) / limit, abs=1e-12)


@pytest.mark.parametrize("subset", ["all", -2, 5, 11])
def test_evaluation_equals_the_single_metrics_on_subsets(subset: str | int) -> None:
    scores, maps, labels, masks, groups = images("tied", count=12)
    result = feed(AnomalyEvaluation(), scores, maps, labels, masks, groups).compute()
    row = result if subset == "all" else result["by_group"][subset]
    keep = (
        torch.ones_like(labels, dtype=torch.bool) if subset == "all" else (labels == 0) | (groups == subset)
    )
    singles = {
        "image_auroc": feed(ImageAUROC(), scores[keep], labels[keep]),
        "pixel_auroc": feed(PixelAUROC(), maps[keep], masks[keep]),
        "pro": feed(PRO(), maps[keep], masks[keep]),
    }
    for name, metric in singles.items():
        torch.testing.assert_close(row[name], metric.compute(), rtol=0, atol=1e-12, equal_nan=True)
    assert row["nominal"] == int((labels == 0).sum())
    assert row["anomalous"] == int(labels[keep].sum())


def test_evaluation_groups_and_lost_images() -> None:
    scores, maps, labels, masks, groups = images(count=12)
    result = feed(AnomalyEvaluation(), scores, maps, labels, masks, groups).compute()
    assert sorted(result["by_group"]) == [-2, 5]  # 11 holds nominal images only
    assert (labels[7], labels[8]) == (1, 1)  # 7 is wholly unknown, which is not lost; 8 has an empty mask
    assert result["lost"] == 1
    assert {group: row["lost"] for group, row in result["by_group"].items()} == {-2: 0, 5: 1}
    assert not any(value.isnan() for value in result.values() if isinstance(value, Tensor))


def test_groups_of_nominal_images_are_ignored() -> None:
    scores, maps, labels, masks, groups = images(count=12)
    moved = torch.where(labels == 0, 5, groups)
    one, other = (
        feed(AnomalyEvaluation(), scores, maps, labels, masks, g).compute() for g in (groups, moved)
    )
    assert one == other


@pytest.mark.parametrize("shape", ["random", "tied"])
def test_batches_and_their_order_do_not_matter(shape: str) -> None:
    columns = images(shape, count=12)
    expected = feed(AnomalyEvaluation(), *columns, batch=12).compute()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    for batch in (1, 5):
        for taken in (columns, tuple(column[order] for column in columns)):
            assert_same(feed(AnomalyEvaluation(), *taken, batch=batch).compute(), expected)


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12, equal_nan=True)


@given(
    hnp.arrays(np.int8, (3, 5, 4), elements=st.integers(-5, 5)),
    hnp.arrays(np.uint8, (3, 5, 4), elements=st.sampled_from([0, 0, 1, 255])),
)
@settings(deadline=None)
def test_only_the_order_of_scores_matters(levels: np.ndarray, masks: np.ndarray) -> None:
    maps, truth = torch.from_numpy(levels).float(), torch.from_numpy(masks)
    for metric in (PixelAUROC(), PRO()):
        expected = feed(metric, maps, truth).compute()
        for transformed in (maps**3 * 1e3, (maps * 1.5).exp(), maps / 8192 + 300, maps * 1e-42):
            assert_same(
                feed(copy.deepcopy(metric).reset() or type(metric)(), transformed, truth).compute(), expected
            )


def test_maps_of_different_sizes() -> None:
    _, maps, _, masks, _ = images()
    _, wide, _, wide_masks, _ = images(size=(16, 21), seed=2)
    pixel, overlap = feed(PixelAUROC(), maps, masks), feed(PRO(), maps, masks)
    pixel.update(wide, wide_masks)
    overlap.update(wide, wide_masks)
    both = [*maps.double().numpy(), *wide.double().numpy()], [*masks.numpy(), *wide_masks.numpy()]
    assert overlap.compute().item() == pytest.approx(reference.pro(*both), abs=1e-12)
    split = [np.concatenate(part) for part in zip(pixels(maps, masks), pixels(wide, wide_masks), strict=True)]
    assert pixel.compute().item() == pytest.approx(reference.auroc(*split), abs=1e-12)


def test_low_precision_labels_of_any_type_and_gradients() -> None:
    scores, _, labels, _, _ = images("tied")
    expected = feed(ImageAUROC(), scores, labels).compute()
    for kind in (torch.bool, torch.uint8, torch.int8, torch.float32):
        assert feed(ImageAUROC(), scores.bfloat16(), labels.to(kind)).compute() == expected
    assert feed(ImageAUROC(), scores.clone().requires_grad_(), labels).compute() == expected


def test_reset_forgets() -> None:
    columns = images(count=12)
    metric = feed(AnomalyEvaluation(), *images("tied", seed=5))
    metric.compute()
    metric.reset()
    assert_same(feed(metric, *columns).compute(), feed(AnomalyEvaluation(), *columns).compute())


def test_later_changes_of_the_batch_do_not_reach_the_state() -> None:
    columns = images()
    metric = feed(AnomalyEvaluation(), *columns)
    expected = feed(AnomalyEvaluation(), *columns).compute()
    for column in columns:
        column.zero_()
    assert_same(metric.compute(), expected)


def test_missing_positives_or_negatives_give_nan() -> None:
    scores, maps, labels, masks, groups = images()
    for chosen in (0, 1):
        keep = labels == chosen
        assert feed(ImageAUROC(), scores[keep], labels[keep]).compute().isnan()
        alone = torch.where(masks == chosen, masks, 255)
        assert feed(PixelAUROC(), maps, alone).compute().isnan()
        assert feed(PRO(), maps, alone).compute().isnan()
    nominal = feed(AnomalyEvaluation(), *(c[labels == 0] for c in (scores, maps, labels, masks, groups)))
    result = nominal.compute()
    assert result["image_auroc"].isnan()
    assert result["pro"].isnan()
    assert (result["nominal"], result["anomalous"], result["by_group"]) == (3, 0, {})
    assert auroc(torch.empty(0), torch.empty(0)).isnan()
    assert pro(torch.ones(3), torch.empty(0), torch.empty(0, dtype=torch.int64)).isnan()


def test_constant_scores() -> None:
    scores, maps, labels, masks, groups = images("constant")
    result = feed(AnomalyEvaluation(), scores, maps, labels, masks, groups).compute()
    assert result["image_auroc"] == result["pixel_auroc"] == 0.5
    assert result["pro"].item() == pytest.approx(0.15, abs=1e-15)


def test_counts_beyond_float32() -> None:
    nominal = torch.zeros(2**24 + 3)
    nominal[0] = 2.0
    assert auroc(nominal, torch.ones(1)).item() == 1 - 1 / (2**24 + 3)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (ImageAUROC, {"scores": torch.ones(6, 1)}, r"scores must have dimensions B, got shape \(6, 1\)"),
        (
            ImageAUROC,
            {"scores": torch.tensor([1.0, torch.nan, 1, 1, 1, 1])},
            "scores must be finite.* got nan",
        ),
        (
            ImageAUROC,
            {"scores": torch.full((6,), 1e39, dtype=torch.float64)},
            "finite float32 numbers, got 1e",
        ),
        (
            ImageAUROC,
            {"labels": torch.tensor([0, 1, 2, 0, 1, 1])},
            r"labels must hold 0 \(nominal\), .* got 2",
        ),
        (ImageAUROC, {"labels": torch.ones(5)}, r"labels must have the shape .* got \(5,\) for \(6,\)"),
        (
            PixelAUROC,
            {"maps": torch.ones(6, 1, 13, 11)},
            r"maps must have dimensions B H W, got shape \(6, 1, ",
        ),
        (
            PixelAUROC,
            {"maps": torch.full((6, 13, 11), -torch.inf)},
            "maps must be finite.* got -inf among 858",
        ),
        (PixelAUROC, {"masks": torch.full((6, 13, 11), 254)}, r"masks must hold .*255 \(unknown\), got 254"),
        (PRO, {"masks": torch.zeros(6, 11, 13)}, r"masks must have the shape .* got \(6, 11, 13\)"),
        (PRO, {"masks": torch.full((6, 13, 11), 0.5)}, "masks must hold .* got 0.5; convert"),
        (
            AnomalyEvaluation,
            {"scores": torch.ones(5), "labels": torch.ones(5)},
            "one for each score, got 6 for 5",
        ),
        (AnomalyEvaluation, {"labels": torch.zeros(6)}, "masks of nominal images must hold no 1, got"),
        (AnomalyEvaluation, {"groups": torch.zeros(6)}, "groups must be integers .* got torch.float32"),
        (
            AnomalyEvaluation,
            {"groups": torch.zeros(6, 1, dtype=torch.int64)},
            r"groups must .* shape \(6, 1\)",
        ),
    ],
)
def test_bad_input(make, change: dict[str, Tensor], message: str) -> None:
    names = {ImageAUROC: ("scores", "labels"), PixelAUROC: ("maps", "masks"), PRO: ("maps", "masks")}
    every = ("scores", "maps", "labels", "masks", "groups")
    given = dict(zip(every, images(), strict=True)) | change
    metric = make()
    with pytest.raises(UserError, match=message):
        metric.update(*(given[name] for name in names.get(make, every)))


@pytest.mark.parametrize("limit", [0.0, -0.3, 1.01, float("nan")])
@pytest.mark.parametrize("make", [PRO, AnomalyEvaluation])
def test_bad_limit(make, limit: float) -> None:
    with pytest.raises(UserError, match=r"fpr_limit must be in \(0, 1\], got"):
        make(fpr_limit=limit)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu() -> None:
    columns = images("tied", count=12)
    there = feed(AnomalyEvaluation().cuda(), *(column.cuda() for column in columns)).compute()
    assert there["pro"].is_cuda
    torch.testing.assert_close(
        there, feed(AnomalyEvaluation(), *columns).compute(), rtol=0, atol=1e-12, check_device=False
    )


SHARDS = {"uneven": (9, 3), "one process without images": (12, 0)}


def _evaluate_shard(rank: int, folder: Path) -> None:
    """What each of the two processes runs: its images in, everybody's figures out."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name, (first, _) in SHARDS.items():
        mine = slice(0, first) if rank == 0 else slice(first, None)
        scores, maps, labels, masks, groups = (column[mine] for column in images("tied", count=12))
        results[name] = {
            "evaluation": feed(AnomalyEvaluation(), scores, maps, labels, masks, groups, batch=2).compute(),
            "image": feed(ImageAUROC(), scores, labels).compute(),
            "pixel": feed(PixelAUROC(), maps, masks).compute(),
            "pro": feed(PRO(), maps, masks).compute(),
        }
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_evaluate_shard, args=(tmp_path,), nprocs=2)
    scores, maps, labels, masks, groups = images("tied", count=12)
    expected = {
        "evaluation": feed(AnomalyEvaluation(), scores, maps, labels, masks, groups).compute(),
        "image": feed(ImageAUROC(), scores, labels).compute(),
        "pixel": feed(PixelAUROC(), maps, masks).compute(),
        "pro": feed(PRO(), maps, masks).compute(),
    }
    for rank in (0, 1):
        for results in torch.load(tmp_path / f"{rank}.pt").values():
            assert_same(results, expected)
