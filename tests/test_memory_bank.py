import copy

import faiss
import numpy as np
import pytest
import torch

from pl_patchcore import MemoryBank, UserError, memory_bank


def made(rows=400, queries=150, dimension=24, seed=0):
    """Bank with duplicates, near-duplicates and an offset; queries that include bank rows."""
    g = torch.Generator().manual_seed(seed)
    bank = torch.randn(rows, dimension, generator=g) + 30
    bank[50:90] = bank[0]
    bank[100:120] = bank[1] + 1e-5 * torch.randn(20, dimension, generator=g)
    query = torch.randn(queries, dimension, generator=g) + 30
    query[:5] = bank[:5]
    query[5:8] = bank[110:113]
    return bank, query


def brute_force(bank, query, k):
    distance = np.sqrt(((query.double().numpy()[:, None] - bank.double().numpy()[None]) ** 2).sum(2))
    rows = np.argsort(distance, 1, kind="stable")[:, :k]
    return np.take_along_axis(distance, rows, 1), rows


@pytest.mark.parametrize("search", ["auto", "torch", "faiss"])
@pytest.mark.parametrize("k", [1, 3, 50, 400])
def test_matches_brute_force(search, k, monkeypatch):
    monkeypatch.setattr(memory_bank, "_BLOCK", 400 * 37)  # several blocks
    monkeypatch.setattr(memory_bank, "_PAIRS", 24 * 101)
    bank, query = made()
    found = MemoryBank(search)
    found.fill(bank)
    distance, rows = found(query, k)
    expected, expected_rows = brute_force(bank, query, k)
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal(rows.numpy(), expected_rows)
    assert (distance[:5, 0] == 0).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("search", ["torch", "faiss"])
def test_any_scale(search, scale):
    bank, query = made()
    found = MemoryBank(search)
    found.fill(bank * scale)
    expected, rows = brute_force(bank * scale, query * scale, 2)
    distance, got = found(query * scale, 2)
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-6, atol=1e-20)
    np.testing.assert_array_equal(got.numpy(), rows)


def test_low_precision_settings_do_not_matter():
    bank, query = made()
    found = MemoryBank()
    found.fill(bank)
    exact = found(query)[0]
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(found(query)[0], exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_traced_equals_search():
    bank, query = made()
    bank = bank[120:]  # without near-duplicates
    found = MemoryBank()
    found.fill(bank)

    class Search(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bank = found

        def forward(self, query):
            return self.bank(query, 3)

    exported = torch.export.export(Search(), (query,)).module()
    distance, rows = exported(query)
    expected, expected_rows = found(query, 3)
    torch.testing.assert_close(distance, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows[8:], expected_rows[8:])


def test_refilled_bank_answers_anew():
    bank, query = made()
    found = MemoryBank()
    found.fill(bank)
    found(query)
    found.fill(bank[200:] + 5)
    np.testing.assert_allclose(found(query)[0].numpy(), brute_force(bank[200:] + 5, query, 1)[0], rtol=1e-6)


def test_loads_whatever_its_size():
    bank, query = made()
    full, empty = MemoryBank(), MemoryBank()
    full.fill(bank)
    empty.load_state_dict(copy.deepcopy(full.state_dict()))
    assert torch.equal(empty.features, bank)
    assert torch.equal(empty(query)[0], full(query)[0])


def test_faiss_threads_are_restored():
    bank, query = made()
    before = faiss.omp_get_max_threads()
    found = MemoryBank("faiss")
    found.fill(bank)
    found(query)
    assert faiss.omp_get_max_threads() == before


def test_no_queries():
    found = MemoryBank()
    found.fill(made()[0])
    assert found(torch.empty(0, 24))[0].shape == (0, 1)


def test_bad_input():
    bank, query = made()
    found = MemoryBank()
    with pytest.raises(UserError, match="empty"):
        found(query)
    found.fill(bank)
    with pytest.raises(UserError, match="400, got 401"):
        found(query, 401)
    with pytest.raises(UserError, match=r"must be \(Q, 24\)"):
        found(query[:, :5])
    with pytest.raises(UserError, match="NaN"):
        found(query * torch.nan)
    with pytest.raises(UserError, match="NaN"):
        found.fill(bank * torch.nan)
    with pytest.raises(UserError, match="auto, torch, "):
        MemoryBank("annoy")
