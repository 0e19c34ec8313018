"""Search among the rows of patches near a query's place, against a slow search of them all."""

import copy
import pickle

import numpy as np
import pytest
import torch
from networks import TinyBackbone
from torch.utils.data import DataLoader, TensorDataset

from pl_patchcore import MemoryBank, PatchCore, UserError
from pl_patchcore.ensemble import EnsembleModel
from pl_patchcore.leave_one_out import score_without_rows
from pl_patchcore.memory_bank import ForeignRows
from pl_patchcore.search.by_position import Places

GRID = (5, 7)


def made(rows=150, d=6, seed=0, radius=1, cells=None):
    g = torch.Generator().manual_seed(seed)
    features = torch.randint(-3, 4, (rows, d), generator=g).float()  # many ties
    cells = torch.randint(GRID[0] * GRID[1], (rows,), generator=g) if cells is None else cells
    places = torch.stack([cells // GRID[1], cells % GRID[1]], 1)
    bank = MemoryBank(position_radius=radius)
    bank.fill(features, images=torch.arange(rows) % 4, places=places, grid=GRID)
    queries = torch.randint(-3, 4, (2 * GRID[0] * GRID[1], d), generator=g).float()
    queries[::5] += torch.randn(len(queries[::5]), d, generator=g)
    return bank, queries


def nearest(bank, query, place, radius, k, left_out=()):
    """Distances and rows of one query; the reach grows until it holds k rows."""
    rows = [i for i in range(bank.size) if i not in left_out]
    far = {i: max(abs(int(a) - b) for a, b in zip(bank.places[i], place, strict=True)) for i in rows}
    reach = radius
    while sum(far[i] <= reach for i in rows) < k:
        reach += 1
    features = bank.features.double().numpy()
    found = sorted((float(np.sqrt(((features[i] - query) ** 2).sum())), i) for i in rows if far[i] <= reach)
    return tuple(zip(*found[:k], strict=True))


def all_nearest(bank, queries, radius, k, left_out=()):
    places = [(y, x) for _ in range(2) for y in range(GRID[0]) for x in range(GRID[1])]
    pairs = zip(queries.double().numpy(), places, strict=True)
    distances, rows = zip(*(nearest(bank, query, place, radius, k, left_out) for query, place in pairs), strict=True)
    return torch.tensor(distances, dtype=torch.float64), torch.tensor(rows)


@pytest.mark.parametrize("radius", [0, 1, 3, 100])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matches_brute_force(radius, k, dtype):
    bank, queries = made(radius=radius)
    bank = bank.to(dtype)
    queries = queries.to(dtype)
    distance, rows = bank(queries, k, Places.of_rows(2, 0, GRID[0], GRID, torch.device("cpu")))
    expected = all_nearest(bank, queries, radius, k)
    assert torch.equal(rows, expected[1])
    torch.testing.assert_close(distance.double(), expected[0], rtol=1e-6, atol=0)
    foreign = ForeignRows(bank, 2, bank)
    distance, rows = foreign(queries, k, Places.of_rows(2, 0, GRID[0], GRID, torch.device("cpu")))
    expected = all_nearest(bank, queries, radius, k, left_out=range(2, bank.size, 4))
    assert torch.equal(rows, expected[1])
    torch.testing.assert_close(distance.double(), expected[0], rtol=1e-6, atol=0)


def test_the_reach_grows_where_no_row_is_near():
    """To the nearest rows there are; nothing is infinite, and far rows do not win by their features."""
    bank, queries = made(rows=6, radius=0, cells=torch.tensor([0, 1, 34, 34, 33, 8]))
    distance, rows = bank(queries, 2, Places.of_rows(2, 0, GRID[0], GRID, torch.device("cpu")))
    assert distance.isfinite().all()
    assert torch.equal(rows, all_nearest(bank, queries, 0, 2)[1])
    assert bank(queries[:1], 9, Places(torch.tensor([[0, 0]]), GRID))[0].shape == (1, 6)


def test_far_and_huge_numbers():
    bank, queries = made()
    places = Places.of_rows(2, 0, GRID[0], GRID, torch.device("cpu"))
    before = bank(queries, 3, places)
    for scale in (1e-12, 1e15):
        bank.fill(bank.features.sign() * bank.features.abs() * scale, None, bank.images, bank.places, GRID)
        found = bank(queries * scale, 3, places)
        torch.testing.assert_close(found[0], before[0] * scale, rtol=1e-5, atol=0)
        bank.fill(bank.features / scale, None, bank.images, bank.places, GRID)


class Scored(torch.nn.Module):
    """A bank asked for queries of one image."""

    def __init__(self, bank):
        super().__init__()
        self.bank = bank

    def forward(self, queries):
        return self.bank(queries, 2, Places.of_rows(1, 0, GRID[0], GRID, queries.device))


def test_exported():
    bank, queries = made(rows=30, radius=1)
    queries = queries[: GRID[0] * GRID[1]] + torch.rand(GRID[0] * GRID[1], 6)  # no ties
    found = torch.export.export(Scored(bank).eval(), (queries,)).module()(queries)
    expected = Scored(bank)(queries)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)


def images(number, seed, size=(32, 48)):
    return torch.rand(number, 3, *size, generator=torch.Generator().manual_seed(seed))


def model_of(**options):
    settings = {"layers": ["fine"], "resize": [32, 48], "crop": None, "coreset_ratio": 0.2, "position_radius": 1}
    return PatchCore(TinyBackbone(), **(settings | options))


def fitted(trainer, *parts, **options):
    model = model_of(**options)
    trainer().fit(model, DataLoader(TensorDataset(torch.cat(parts)), batch_size=4))
    return model


def by_hand(model, new):
    """Scores without equation 7, each patch compared with the rows in reach."""
    bank, patches = model.memory_bank, model.patch_features(new)
    b, h, w, _ = patches.shape
    found = torch.tensor(
        [
            [nearest(bank, patches[i, y, x].double().numpy(), (y, x), 1, 1)[0][0] for y in range(h) for x in range(w)]
            for i in range(b)
        ],
        dtype=torch.float64,
    )
    return found.max(1).values


def places_by_hand(model, train):
    """Where the patches lie that are equal to the rows of the bank."""
    patches = model.patch_features(train)
    _, h, w, d = patches.shape
    place = torch.cdist(model.memory_bank.features.double(), patches.reshape(-1, d).double()).argmin(1) % (h * w)
    return torch.stack([place // w, place % w], 1).int()


def test_fit_score_save_load_and_update(trainer, tmp_path):
    train, more, new = images(6, 0), images(4, 1), images(3, 2)
    model = fitted(trainer, train, reweighting_neighbors=1)
    assert torch.equal(model.memory_bank.places, places_by_hand(model, train))
    assert model.memory_bank.grid.tolist() == [8, 12]
    scores = model(new)[0]
    torch.testing.assert_close(scores.double(), by_hand(model, new), rtol=1e-5, atol=0)
    assert (scores > fitted(trainer, train, reweighting_neighbors=1, position_radius=None)(new)[0]).any()
    model.save(tmp_path / "model.ckpt")
    loaded = PatchCore.load_from_checkpoint(tmp_path / "model.ckpt", backbone=TinyBackbone())
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(new)[0], scores)
    smaller = PatchCore.load_from_checkpoint(tmp_path / "model.ckpt", backbone=TinyBackbone(), coreset_size=50)
    assert torch.equal(smaller.memory_bank.places, model.memory_bank.places[:50])
    model.update(trainer(), DataLoader(TensorDataset(more), batch_size=4))
    assert torch.equal(model.memory_bank.places, places_by_hand(model, torch.cat([train, more])))
    torch.testing.assert_close(model(new)[0].double(), by_hand(model, new), rtol=1e-5, atol=0)


def test_leave_one_out_looks_near_too(trainer):
    train = images(5, 0)
    model = fitted(trainer, train, calibration="leave_one_out", coreset_method="none", reweighting_neighbors=1)
    for i, score in zip(model.model.calibration.images.tolist(), model.model.calibration.scores, strict=True):
        without = copy.deepcopy(model)
        bank, others = without.memory_bank, model.memory_bank.images != i
        bank.fill(bank.features[others], None, bank.images[others], bank.places[others], (8, 12))
        torch.testing.assert_close(without(train[i : i + 1])[0][0], score, rtol=1e-6, atol=0)
        torch.testing.assert_close(score_without_rows(model.model, train[i : i + 1], i)[0][0], score)


def test_ensembles_and_places_that_do_not_count(trainer):
    train, new = images(5, 0), images(2, 3)
    members = [{"layers": ["fine"], "position_radius": 2}, {"layers": ["coarse"]}]
    model = fitted(trainer, train, ensemble={"members": members}, position_radius=0)
    assert isinstance(model.model, EnsembleModel)
    assert [each.memory_bank.position_radius for each in model.model.members] == [2, 0]
    assert model(new)[0].isfinite().all()
    part = fitted(trainer, train, foreground="brightness")
    assert torch.equal(part.memory_bank.places, places_by_hand(part, train))
    tiled = fitted(trainer, train, tile=16, position_radius=3)
    assert torch.equal(tiled.memory_bank.places, places_by_hand(tiled, train))
    assert tiled(new)[0].isfinite().all()


def test_refused(trainer, tmp_path):
    with pytest.raises(UserError, match="position_radius goes with exact search only, got search 'HNSW32'"):
        model_of(search="HNSW32")
    with pytest.raises(UserError, match="position_radius must be a whole number from 0 up, or null"):
        model_of(position_radius=-1)
    with pytest.raises(UserError, match="position_radius needs images of one size"):
        model_of(resize=32, resize_mode="shorter_side")
    plain = fitted(trainer, images(3, 0), position_radius=None)
    plain.save(tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="position_radius: the checkpoint's memory bank does not know the places"):
        PatchCore.load_from_checkpoint(tmp_path / "model.ckpt", backbone=TinyBackbone(), position_radius=1)
    bank, queries = made()
    with pytest.raises(UserError, match="the memory bank is of 5x7 patches an image, this one has 5x6"):
        bank(queries[:30], 1, Places.of_rows(1, 0, 5, (5, 6), torch.device("cpu")))
    bank.fill(bank.features)
    with pytest.raises(UserError, match="does not know the places of its rows; fit again with position_radius"):
        bank(queries, 1, Places.of_rows(2, 0, 5, GRID, torch.device("cpu")))


def test_a_file_with_places_on_no_grid_is_refused(trainer, tmp_path):
    model = fitted(trainer, images(3, 0))
    model.memory_bank.places[3, 1] = 12
    model.save(tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=r"memory_bank\.places lie on no grid of patches"):
        PatchCore.load_from_checkpoint(tmp_path / "model.ckpt", backbone=TinyBackbone())
