import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings

from pl_patchcore.regions import find_regions, outlines

MASKS = arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9))


def flooded(mask):
    """Slow and obvious: the pixels of each region, of 8 neighbours."""
    left, found = {(int(y), int(x)) for y, x in zip(*mask.nonzero(), strict=True)}, []
    while left:
        region, edge = set(), [min(left)]
        while edge:
            y, x = edge.pop()
            if (y, x) in left:
                left.remove((y, x))
                region.add((y, x))
                edge += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        found.append(region)
    return found


def inside(x, y, polygon):
    """Whether a point is in a polygon of upright and level edges: a ray to the left crosses an odd number of them."""
    crossed = 0
    for (ax, ay), (bx, by) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        assert (ax == bx) != (ay == by), "edges go along pixels, and have a length"
        crossed += ax == bx and ax < x and min(ay, by) < y < max(ay, by)
    return crossed % 2 == 1


def signed_area(polygon):
    turned = [*polygon[1:], polygon[0]]
    return sum(ax * by - bx * ay for (ax, ay), (bx, by) in zip(polygon, turned, strict=True)) / 2


@settings(max_examples=300)
@given(mask=MASKS)
def test_regions_match_reference(mask):
    heat = np.random.default_rng(0).random(mask.shape)
    found, expected = find_regions(heat, mask), flooded(mask)
    assert [region.area for region in found] == sorted(map(len, expected), reverse=True)
    for region in found:
        (left, top, right, bottom), (peak_x, peak_y) = region.box, region.peak
        pixels = {(y + top, x + left) for y, x in zip(*region.mask.nonzero(), strict=True)}
        assert pixels in expected
        ys, xs = np.array(sorted(pixels)).T
        assert region.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert region.mask.shape == (bottom - top, right - left)
        assert region.centroid == pytest.approx((xs.mean() + 0.5, ys.mean() + 0.5))
        assert region.score == heat[peak_y, peak_x] == heat[ys, xs].max()
        drawn = {
            (y, x)
            for y in range(mask.shape[0])
            for x in range(mask.shape[1])
            if inside(x + 0.5, y + 0.5, region.outline)
            and not any(inside(x + 0.5, y + 0.5, hole) for hole in region.holes)
        }
        assert drawn == pixels
        areas = [signed_area(polygon) for polygon in (region.outline, *region.holes)]
        assert areas[0] > 0  # clockwise, as y points down
        assert areas[0] - sum(map(abs, areas[1:])) == region.area


def test_small_regions_are_left_out():
    mask = np.zeros((6, 8), bool)
    mask[0, 0] = mask[2:4, 2:5] = mask[5, 6:8] = True
    assert [region.area for region in find_regions(mask * 1.0, mask, least_area=2)] == [6, 2]
    assert find_regions(mask * 1.0, mask, least_area=7) == []
    assert find_regions(mask * 1.0, np.zeros((6, 8), bool)) == []


def test_a_ring_has_a_hole():
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    assert outlines(ring) == [[(0, 0), (3, 0), (3, 3), (0, 3)], [(1, 1), (2, 1), (2, 2), (1, 2)]]


def test_a_part_of_an_image():
    heat = np.random.default_rng(0).random((40, 50))
    heat[:7], heat[:, :9] = 0, 0
    whole, part = find_regions(heat, heat > 0.6), find_regions(heat[7:, 9:], heat[7:, 9:] > 0.6, corner=(9, 7))
    assert [region.to_dict() for region in part] == [region.to_dict() for region in whole]
    assert all(heat[region.peak[::-1]] == region.score for region in part)
