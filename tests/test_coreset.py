import itertools

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pl_patchcore import UserError
from pl_patchcore.coreset import coreset_rows, greedy_coreset, greedy_selection, random_projection, select_coreset
from pl_patchcore.coreset.farthest_first import SETTLED_ROWS, FarthestFirst

KINDS = {
    "random": lambda x: x,
    "ties": lambda x: x.round(),
    "duplicates": lambda x: x[np.random.default_rng(1).integers(len(x), size=len(x))],
    "offset": lambda x: x + np.float32(1e5),
    "tiny": lambda x: x * np.float32(1e-30),
    "huge": lambda x: x * np.float32(1e30),
    "constant": lambda x: np.repeat(x[:1], len(x), 0),
    "one outlier": lambda x: np.concatenate([x[:-1] * np.float32(1e-4), x[-1:] * np.float32(1e6)]),
    "background": lambda x: np.where(np.arange(len(x))[:, None] % 5 > 0, x[:1], x),
}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def _products(request, monkeypatch):
    """Whatever this machine would choose."""
    monkeypatch.setattr("pl_patchcore.coreset.farthest_first.product_type", lambda *_: request.param)


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "dimension", "size"), [(300, 8, 300), (1500, 16, 400), (700, 1, 90), (3, 5, 3)])
def test_matches_reference(kind, rows, dimension, size):
    features = KINDS[kind](np.random.default_rng(rows).normal(size=(rows, dimension)).astype(np.float32))
    assert greedy_coreset(torch.from_numpy(features), size).tolist() == reference.greedy(features, size)


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize(("dimension", "values"), [(11, 2), (3, 14), (12, 3)])
def test_more_rows_with_one_gap_than_candidates(dimension, values):
    features = np.random.default_rng(0).integers(values, size=(2500, dimension)).astype(np.float32)
    assert greedy_coreset(torch.from_numpy(features), 500).tolist() == reference.greedy(features, 500)


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize(("rows", "dimension", "values"), [(30000, 4, None), (30000, 16, 2)])
def test_more_candidates_than_a_round_settles(rows, dimension, values, monkeypatch):
    """With gaps that differ and with gaps of which thousands are equal."""
    rng = np.random.default_rng(0)
    shape = (rows, dimension)
    features = (rng.normal(size=shape) if values is None else rng.integers(values, size=shape)).astype(np.float32)
    settled, settle = [], FarthestFirst.settle
    monkeypatch.setattr(FarthestFirst, "settle", lambda self, alive: (settled.append(len(alive)), settle(self, alive)))
    assert greedy_coreset(torch.from_numpy(features), 100).tolist() == reference.greedy(features, 100)
    assert max(settled) == SETTLED_ROWS if values is None else max(settled) > SETTLED_ROWS


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("chunk_size", [1 << 12, 1 << 15], ids=["CPU", "GPU"])
@pytest.mark.slow
def test_matches_reference_on_many_rows(chunk_size, monkeypatch):
    monkeypatch.setattr("pl_patchcore.coreset.farthest_first.chunk_size", lambda _: chunk_size)
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(60, 32))[rng.integers(60, size=12000)] + 0.3 * rng.normal(size=(12000, 32))).astype(
        "f4"
    )
    assert greedy_coreset(torch.from_numpy(features), 600).tolist() == reference.greedy(features, 600)


@settings(max_examples=60)
@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 40), st.integers(1, 4)),
        elements=st.one_of(st.sampled_from([0.0, -0.0, 1.0, 2.0]), st.floats(-(2.0**60), 2.0**60, width=32)),
    ),
    st.data(),
)
def test_matches_reference_on_anything(features, data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    size = data.draw(st.integers(1, len(features)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pl_patchcore.coreset.farthest_first.product_type", lambda *_: dtype)
        picks = greedy_coreset(torch.from_numpy(features), size)
    assert picks.tolist() == reference.greedy(features, size)


def test_float64_features():
    features = np.random.default_rng(3).normal(size=(400, 6)) + 1e7
    given = torch.tensor(features)
    assert greedy_coreset(given, 200).tolist() == reference.greedy(features, 200)
    assert np.array_equal(given.numpy(), features)  # float32 ones are copied on the way, these need not be


def test_approximate_start_matches_reference():
    features = torch.randn(500, 12, generator=torch.Generator().manual_seed(0))
    anchors = torch.randperm(500, generator=torch.Generator().manual_seed(7))[:10]
    gaps = torch.cdist(features.double(), features[anchors].double()).mean(1).square()
    picks = select_coreset(features, 100, "approximate", seed=7).rows
    assert picks.tolist() == reference.greedy(features.numpy(), 100, gaps=gaps.numpy())


@pytest.mark.parametrize("method", ["greedy", "approximate", "random", "none"])
def test_depends_on_its_own_seed_alone(method):
    features = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    first = select_coreset(features, 20, method, seed=3).rows
    torch.manual_seed(99)
    torch.rand(10)
    assert torch.equal(first, select_coreset(features, 20, method, seed=3).rows)
    assert len(set(first.tolist())) == len(first) == (200 if method == "none" else 20)


def test_seed_matters():
    features = torch.randn(200, 5)
    first, second = (select_coreset(features, 20, "random", seed=seed).rows for seed in (0, 1))
    assert not torch.equal(first, second)


def test_smaller_coreset_is_the_beginning_of_a_larger():
    features = torch.randn(600, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(greedy_coreset(features, 50), greedy_coreset(features, 200)[:50])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "size"), [(200, 200), (200, 60), (200, 199), (1, 1), (40, 39)])
def test_radii_are_the_largest_distances_to_the_rows_so_far(kind, rows, size):
    features = KINDS[kind](np.random.default_rng(rows).normal(size=(rows, 5)).astype(np.float32))
    picks, radii = greedy_selection(torch.from_numpy(features), size)
    assert radii.shape == (size + 1,)
    assert radii[0] == torch.inf
    wide = features.astype(np.float64)
    for m in range(1, size + 1):
        gaps = np.sqrt(((wide[:, None] - wide[picks[:m].numpy()]) ** 2).sum(-1)).min(1)
        assert radii[m].item() == pytest.approx(gaps.max(), rel=1e-6)
    assert (radii.diff() <= 0)[1:].all()


def test_radius_is_at_most_twice_the_best():
    for seed in range(20):
        features = np.random.default_rng(seed).normal(size=(9, 2)).astype(np.float32)
        distance = np.linalg.norm(features[:, None] - features, axis=-1)
        for size in (1, 2, 3, 4):
            best = min(distance[:, list(rows)].min(1).max() for rows in itertools.combinations(range(9), size))
            assert greedy_selection(torch.from_numpy(features), size).radii[size] <= 2 * best + 1e-6


def test_progress_counts_every_pick():
    counts = []
    greedy_coreset(torch.randn(500, 4), 77, progress=counts.append)
    assert sum(counts) == 77


@pytest.mark.parametrize(
    ("rows", "ratio", "size", "expected"),
    [(784, 0.01, None, 7), (5, 0.1, None, 1), (9, 1, None, 9), (9, 0.1, 4, 4), (9, 0.1, 40, 9)],
)
def test_coreset_rows(rows, ratio, size, expected):
    assert coreset_rows(rows, ratio, size) == expected


def test_random_projection():
    assert random_projection(128, 128, 0) is None
    matrix = random_projection(512, 128, 0)
    assert matrix.shape == (512, 128)
    assert torch.equal(matrix, random_projection(512, 128, 0))
    assert not torch.equal(matrix, random_projection(512, 128, 1))
    features = torch.randn(50, 512, generator=torch.Generator().manual_seed(1))
    ratio = torch.pdist(features @ matrix) / torch.pdist(features)
    assert ratio.mean() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    ("features", "size", "message"),
    [
        (torch.zeros(3), 1, r"must be \(N, d\)"),
        (torch.zeros(0, 3), 1, r"must be \(N, d\)"),
        (torch.zeros(4, 2), 5, "from 1 to the number of rows, 4, got 5"),
        (torch.zeros(4, 2), 0, "got 0"),
        (torch.tensor([[0.0], [torch.nan]]), 1, "NaN or infinity"),
        (torch.tensor([[0.0], [torch.inf]]), 1, "NaN or infinity"),
    ],
)
def test_bad_input(features, size, message):
    with pytest.raises(UserError, match=message):
        greedy_coreset(features, size)


def test_unknown_method():
    with pytest.raises(UserError, match="greedy, approximate, random or none"):
        select_coreset(torch.zeros(4, 2), 1, "best")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu():
    features = torch.randn(20000, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(greedy_coreset(features, 500), greedy_coreset(features.cuda(), 500).cpu())
