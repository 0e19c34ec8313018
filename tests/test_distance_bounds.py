import pytest
import torch

from pl_patchcore.coreset import distance_bounds, greedy_selection
from pl_patchcore.coreset.distance_bounds import DistanceBounds, product_type
from pl_patchcore.coreset.farthest_first import FarthestFirst
from pl_patchcore.numerics import product_speed

TYPES = [torch.float32, torch.bfloat16]
KINDS = {
    "normal": lambda x: x,
    "far from each other": lambda x: x * torch.logspace(-12, 0, len(x), dtype=torch.float64)[:, None],
    "close to each other": lambda x: 1 + 1e-4 * x,
    "tiny": lambda x: 1e-20 * x,
    "equal": lambda x: x[:1].expand_as(x),
    "zero": lambda x: 0 * x,
}


@pytest.fixture
def in_bf16(monkeypatch):
    monkeypatch.setattr("pl_patchcore.coreset.farthest_first.product_type", lambda *_: torch.bfloat16)


def sides(kind, count, others, dimension):
    rows = KINDS[kind](torch.randn(count + others, dimension, generator=torch.Generator().manual_seed(count)).double())
    rows = rows / rows.abs().max().clamp(min=1e-20)
    square = (rows[:count, None] - rows[None, count:]).square().sum(2)
    return rows[:count], rows[count:], square


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "others", "dimension"), [(1, 1, 1), (130, 67, 128), (64, 300, 7), (3, 128, 600)])
def test_bounds_hold(dtype, kind, count, others, dimension):
    a, b, square = sides(kind, count, others, dimension)
    bounds = DistanceBounds(dimension, dtype)
    (left, slack), right = bounds.left(a.clone()), bounds.right(b.clone())
    assert left.shape == (count, bounds.width)
    assert left.dtype == right.dtype == dtype
    least = bounds.least(left, slack, right)
    assert (least.double() >= square.amin(1)).all()
    for limit in (square.amin(1), square.median(1).values, square.amax(1)):
        limit = limit.float().nextafter(torch.tensor(torch.inf))
        kept = torch.zeros_like(square, dtype=torch.bool)
        kept[bounds.within(left, slack, right, limit)] = True
        assert kept[square <= limit[:, None]].all()


@pytest.mark.parametrize(("dtype", "loose"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_bounds_are_close(dtype, loose):
    a, b, square = sides("normal", 500, 400, 128)
    bounds = DistanceBounds(128, dtype)
    (left, slack), right = bounds.left(a.clone()), bounds.right(b.clone())
    least = square.amin(1)
    assert (bounds.least(left, slack, right) / least - 1).max() < loose
    row, pick = bounds.within(left, slack, right, least.float())
    assert (square[row, pick] < least[row] * (1 + 2 * loose)).all()
    assert len(row) == len(set(zip(row.tolist(), pick.tolist(), strict=True)))


@pytest.mark.parametrize(("speed", "expected"), [(4.0, torch.bfloat16), (1.02, torch.float32), (0.0, torch.float32)])
def test_bf16_only_where_it_is_faster(monkeypatch, speed, expected):
    """Measured for large work on the CPU only."""
    asked = []
    monkeypatch.setattr(distance_bounds, "product_speed", lambda dtype: asked.append(dtype) or speed)
    assert product_type(13, 20_000 * 200, torch.device("cpu")) is torch.float32
    assert product_type(13, 10**9, torch.device("cuda")) is torch.float32
    assert not asked
    assert product_type(13, 10**9, torch.device("cpu")) is expected
    assert asked == [torch.bfloat16]


@pytest.mark.parametrize("rounded", [False, True])
def test_bf16_that_is_summed_in_bf16_is_no_product(monkeypatch, rounded):
    multiply = torch.mm

    def summed(a, b):
        if a.dtype == torch.float32:
            return multiply(a, b)
        parts = [multiply(a[:, i : i + 16].float(), b[i : i + 16].float()) for i in range(0, 256, 16)]
        total = torch.zeros_like(parts[0])
        for part in parts:
            total = (total + part).bfloat16().float() if rounded else total + part
        return total.bfloat16()

    monkeypatch.setattr(torch, "mm", summed)
    assert (product_speed.__wrapped__(torch.bfloat16) == 0) == rounded


@pytest.mark.usefixtures("in_bf16")
@pytest.mark.parametrize("spread", [1.0, 0.02, 1e-3, 1e-6], ids=str)
def test_same_picks_in_both_types(spread, monkeypatch):
    """Clusters: the tighter they are, the less bf16 tells; where it tells too little, float32 takes over."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(3, 24, generator=g).repeat(700, 1) + spread * torch.randn(2100, 24, generator=g)
    used, write = [], FarthestFirst.write_centred
    monkeypatch.setattr(FarthestFirst, "write_centred", lambda self, dtype: (used.append(dtype), write(self, dtype)))
    found = greedy_selection(features, 500)
    assert used[0] is torch.bfloat16
    assert (used[-1] is torch.float32) == (spread < 0.1)
    monkeypatch.setattr("pl_patchcore.coreset.farthest_first.product_type", lambda *_: torch.float32)
    expected = greedy_selection(features, 500)
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.radii, expected.radii)
