"""Collecting and selecting, with the store in main memory and on disk."""

import logging
import re

import pytest
import torch

from pl_patchcore import UserError
from pl_patchcore.coreset import CoresetOptions, collection, greedy_selection, random_projection, store
from pl_patchcore.coreset.collection import Collection, ExpectedImages
from pl_patchcore.coreset.plan import StorePlan
from pl_patchcore.distributed import Processes
from pl_patchcore.options import StoreOptions

CPU = torch.device("cpu")
D = 48
EMPTY = torch.empty(0, 0)
FEATURES = torch.randn(10, 4, 4, D, generator=torch.Generator().manual_seed(0))  # of 10 images


def add(found, images, held=()):
    for image in images:
        patches = FEATURES[image].flatten(0, 1)
        found.add(patches, image, len(patches), held_out=image in held)


def collected(
    path=None, method="greedy", *, size=20, dim=16, order=range(10), batch=4, expected=10, held=(), **options
):
    """A collection of these images, in batches."""
    coreset = CoresetOptions(method, size=size, projection_dim=dim, seed=3)
    known = None if expected is None else ExpectedImages(expected, len(held), expected)
    options = StoreOptions(**({"folder": None if path is None else str(path)} | options))
    found = Collection(coreset, options, CPU, held_out=bool(held), expected=known)
    for index in torch.tensor(list(order)).split(batch):
        add(found, index.tolist(), held)
    return found


def bank(found, earlier=EMPTY, seen=0):
    rows, radii = found.select(earlier, seen, Processes())
    found.close()
    return rows, radii


@pytest.mark.parametrize("dim", [16, 1000])
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_bank_and_radii_are_those_of_the_selection_in_data_set_order(tmp_path, kind, dim):
    matrix = random_projection(D, dim, 3)
    flat = FEATURES.flatten(0, 2)
    projected = flat if matrix is None else torch.cat([image.flatten(0, 1) @ matrix for image in FEATURES])
    expected = greedy_selection(projected, 20)
    for options in ({}, {"order": reversed(range(10)), "batch": 3}, {"expected": None}, {"expected": 30}):
        found = collected(tmp_path, kind=kind, dim=dim, **options)
        rows, radii = found.select(EMPTY, 0, Processes())
        assert torch.equal(rows, flat[expected.rows])
        assert torch.equal(radii, expected.radii)
        selected_from, picks = found.selected
        assert torch.equal(selected_from, projected)
        assert torch.equal(picks, expected.rows)
        assert torch.equal(found.sources, expected.rows // 16)
        assert found.total == 160
        assert found.dimension == D
        found.close()
        assert found.selected is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_rounded_stores_pick_the_same_rows(kind, dtype):
    expected, _ = bank(collected())
    rows, _ = bank(collected(kind=kind, dtype=dtype))
    assert torch.equal(rows, expected.to(getattr(torch, dtype)).float())


@pytest.mark.parametrize("dim", [16, 1000])
def test_bounded_selection_depends_on_neither_place_nor_order(caplog, dim):
    caplog.set_level(logging.INFO)
    options = {"dim": dim, "selection_memory": 60 * (16 * min(dim, D) + 96) / 2**30, "size": 10}
    expected, radii = bank(collected(kind="ram", **options))
    assert radii is None
    assert re.search(r"selected 60 rows at once: no patch feature is farther than [1-9]", caplog.text)
    assert torch.equal(bank(collected(kind="disk", **options))[0], expected)
    assert torch.equal(bank(collected(kind="disk", order=reversed(range(10)), batch=3, **options))[0], expected)


@pytest.mark.parametrize("method", ["greedy", "approximate", "random", "none"])
@pytest.mark.parametrize("kind", ["auto", "disk"])
def test_unknown_number_of_images(monkeypatch, caplog, tmp_path, kind, method):
    monkeypatch.setattr(store, "GROWTH", 50)
    caplog.set_level(logging.INFO)
    options = {"method": method, "held": (2, 7)}
    expected, radii = bank(collected(**options))
    found = collected(tmp_path, kind=kind, expected=None, order=reversed(range(10)), **options)
    place = "in RAM" if kind == "auto" else f"on disk in {tmp_path}"
    assert f"collecting patch features of {D} numbers of an unknown number of images, {place}." in caplog.text
    held_out = {each.image: each.take(torch.arange(each.number)).view(4, 4, D) for each in found.held_out_images()}
    assert list(held_out) == [2, 7]
    assert all(torch.equal(patches, FEATURES[index]) for index, patches in held_out.items())
    rows, found_radii = bank(found)
    assert torch.equal(rows, expected)
    assert len(rows) == (128 if method == "none" else 20)
    assert (radii is None) == (found_radii is None) == (method != "greedy")


@pytest.mark.parametrize("options", [{}, {"method": "random"}, {"selection_memory": 60 * (16 * 16 + 96) / 2**30}])
def test_update_selects_among_the_earlier_bank_and_new_rows(options):
    earlier = FEATURES[:2].flatten(0, 2) + 1
    options = {"size": 10} | options
    rows, _ = bank(collected(order=range(2, 10), **options), earlier, 1000)
    every = torch.cat([earlier, FEATURES[2:].flatten(0, 2)])
    assert all((every == row).all(1).any() for row in rows)
    if not options.get("selection_memory") and "method" not in options:
        projected = every @ random_projection(D, 16, 3)
        assert torch.equal(rows, every[greedy_selection(projected, 10).rows])


def test_size_is_a_share_of_all_rows_ever_seen():
    found = Collection(CoresetOptions(ratio=0.05), StoreOptions(), CPU)
    add(found, range(10))
    assert len(found.select(torch.zeros(7, D), 1000, Processes())[0]) == 58  # of 1160


def test_sample_is_spread_over_the_images():
    found = collected(order=reversed(range(10)))
    found.select(EMPTY, 0, Processes())
    assert torch.equal(found.sample(), FEATURES.flatten(0, 2))


def test_check_is_told_dimension_and_rows_before_space_is_reserved():
    told = []

    def check(*shape):
        told.append(shape)
        raise UserError("no index of so few")

    for expected in (None, ExpectedImages(5, 1, 10)):
        found = Collection(CoresetOptions(ratio=0.1), StoreOptions(), CPU, expected=expected, check=check)
        with pytest.raises(UserError, match="no index"):
            add(found, range(10))
    assert told == [(D, None), (D, 16)]


@pytest.mark.parametrize("kind", ["ram", "disk", "auto"])
def test_plan_is_told(tmp_path, caplog, kind):
    caplog.set_level(logging.INFO)
    found = collected(tmp_path, kind=kind, held=(1,))
    place = f"on disk in {tmp_path}" if kind == "disk" else "in RAM"
    (line,) = [record.message for record in caplog.records if "collecting" in record.message]
    assert line.startswith(
        f"collecting 160 patch features of 48 numbers (float32), 0.00 GiB {place}, their projections"
    )
    assert line.endswith("memory bank 20 rows, 0.00 GiB, at most 0.25 GiB of RAM.")
    assert found.planned > 2**28
    found.close()


def test_what_is_beyond_memory_is_refused_and_auto_turns_to_the_disk(tmp_path, monkeypatch, caplog):
    ram = StorePlan(160, 0, D, 16, 20, StoreOptions("ram"), "/", 0, 1e9)
    disk = StorePlan(160, 0, D, 16, 20, StoreOptions("disk"), "/", 0, 1e9)
    monkeypatch.setattr(collection, "available_memory", lambda: (ram.peak + disk.peak) / 2)
    with pytest.raises(UserError, match=r"of main memory needed.*What helps: store\.kind: disk"):
        collected(kind="ram")
    with caplog.at_level(logging.INFO):
        collected(tmp_path).close()
    assert f"on disk in {tmp_path}" in caplog.text
    one = {"expected": ExpectedImages(1, 0, 1)}
    with pytest.raises(UserError, match="of main memory needed"):  # shared with another process, or promised to one
        add(Collection(CoresetOptions(), StoreOptions(), CPU, neighbours=2, **one), range(10))
    with pytest.raises(UserError, match="of main memory needed"):
        add(Collection(CoresetOptions(), StoreOptions(), CPU, promised=disk.peak, **one), range(10))


def test_nothing_to_select_from():
    held_out = collected(order=(4,), held=(4,))
    for found in (held_out, Collection(CoresetOptions(), StoreOptions(), CPU)):
        with pytest.raises(UserError, match="no training image is left for the memory bank; lower calibration_share"):
            found.select(EMPTY, 0, Processes())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cloud"}, r"store\.kind must be auto, ram or disk, got 'cloud'"),
        ({"dtype": "int8"}, r"store\.dtype must be float32, float16 or bfloat16, got 'int8'"),
        ({"selection_memory": 0}, r"store\.selection_memory must be GiB above 0, got 0"),
        ({"selection_memory": "16"}, r"store\.selection_memory must be a finite number, or null, got '16'"),
        ({"folder": 3}, r"store\.folder must be text, or null, got 3"),
        ({"selection_memory": 1, "method": "random"}, r"store\.selection_memory goes with coreset_method greedy"),
        ({"folder": "/none/such"}, r"store\.folder /none/such: no such folder; make it"),
    ],
)
def test_bad_store_options(options, message):
    with pytest.raises(UserError, match=message):
        collected(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, r"coreset_ratio must be in \(0, 1\], got 1.5; 0.1 keeps one patch in ten"),
        ({"size": 0}, "coreset_size must be at least 1, got 0"),
        ({"method": "best"}, "coreset_method must be greedy, approximate, random or none, got 'best'"),
        ({"projection_dim": 0}, "projection_dim must be at least 1, got 0"),
    ],
)
def test_bad_coreset_options(options, message):
    with pytest.raises(UserError, match=message):
        CoresetOptions(**options)
