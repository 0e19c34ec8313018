"""Greedy selection with a bound on memory: its guarantee, and what it costs against exact selection."""

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from pl_patchcore import UserError
from pl_patchcore.coreset import greedy_coreset
from pl_patchcore.coreset.bounded import bounded_coreset, least_chunk_size


def radius(points, picks):
    return (
        torch.cdist(points.double(), points[picks].double(), compute_mode="donot_use_mm_for_euclid_dist").amin(1).max()
    )


def select(points, size, chunk_size):
    most = []

    def read(rows):
        assert (rows.diff() > 0).all()
        most.append(len(rows))
        return points[rows]

    done = []
    picks, bound = bounded_coreset(read, len(points), size, chunk_size, done.append)
    assert max(most) <= chunk_size
    assert len(set(picks.tolist())) == size
    assert sum(done) <= size * (1 if chunk_size == len(points) else 1 - -len(points) // chunk_size)
    return picks, bound, len(most)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60)
def test_radius_is_within_the_bound_and_four_times_the_optimum(data):
    n, size = data.draw(st.integers(6, 12)), data.draw(st.integers(1, 3))
    seed, d = data.draw(st.integers(0, 2**20)), data.draw(st.integers(1, 3))
    g = torch.Generator().manual_seed(seed)
    points = torch.randint(12, (n, d), generator=g).float()  # duplicates and ties
    chunk_size = data.draw(st.integers(least_chunk_size(n, size), n))
    picks, bound, _ = select(points, size, chunk_size)
    optimum = min(radius(points, torch.tensor(c)) for c in itertools.combinations(range(n), size))
    assert radius(points, picks) <= bound + 1e-6
    assert bound <= 4 * optimum + 1e-6


def sets():
    g = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(40, 32, generator=g)
    clusters = centres[torch.randint(40, (6000,), generator=g)] + torch.randn(6000, 32, generator=g) * 0.3
    heavy = torch.randn(6000, 32, generator=g) / torch.rand(6000, 1, generator=g)
    line = torch.linspace(0, 1, 6000)[:, None] ** 3
    return {
        "normal": torch.randn(6000, 32, generator=g),
        "clusters": clusters,
        "clusters in order": clusters[clusters[:, 0].argsort()],
        "heavy tails": heavy,
        "a line": line,
        "offset": clusters + 1000,
    }


@pytest.mark.parametrize("name", sets())
@pytest.mark.parametrize("size", [30, 200])
def test_radius_against_exact_selection(name, size):
    points = sets()[name]
    exact = radius(points, greedy_coreset(points, size))
    picks, bound, reads = select(points, size, least_chunk_size(len(points), size))
    found = radius(points, picks)
    assert reads > 3
    assert found <= bound * (1 + 1e-6)
    assert bound <= 4 * exact * (1 + 1e-6)
    print(f"{name}, {size}: radius {found / exact:.3f} of exact, bound {bound / exact:.2f}")
    assert found <= 1.6 * exact


def test_what_fits_chunk_size_is_selected_exactly():
    points = sets()["normal"][:500]
    picks, bound, reads = select(points, 20, 500)
    assert reads == 1
    assert torch.equal(picks, greedy_coreset(points, 20))
    assert bound == pytest.approx(radius(points, picks).item(), rel=1e-6)


def test_picks_are_a_nested_sequence_from_the_first_row():
    points = sets()["clusters"]
    picks, _, _ = select(points, 50, 2500)
    assert picks[0] == 0
    gaps = [radius(points[picks], torch.arange(k)) for k in range(1, 50)]
    assert all(a >= b for a, b in itertools.pairwise(gaps))


def test_equal_rows():
    points = torch.ones(40, 3)
    picks, bound, _ = select(points, 5, least_chunk_size(40, 5))
    assert bound == 0
    assert picks.tolist() == [0, 1, 2, 3, 4]


@hypothesis.given(st.integers(1, 3000), st.integers(1, 3000))
def test_least_chunk_size(rows, size):
    size = min(size, rows)
    least = least_chunk_size(rows, size)

    def enough(chunk_size):
        return chunk_size >= rows or -(-rows // chunk_size) * min(size, chunk_size) <= chunk_size

    assert enough(least)
    assert least in (size, rows) or not enough(least - 1)


def test_too_few_chunk_size_is_refused():
    points = torch.rand(1000, 2)
    with pytest.raises(
        UserError, match=r"selecting 10 of 1000 rows needs at least 100 of them in memory at once, got 99"
    ):
        bounded_coreset(lambda rows: points[rows], 1000, 10, 99)
