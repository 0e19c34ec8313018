import copy
import logging
import os
import platform
import subprocess
import sys

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pl_patchcore import MemoryBank, UserError, exact_search, numerics, search_filter
from pl_patchcore.approximate_search import check_factory
from pl_patchcore.exact_search import WAYS, ExactSearch
from pl_patchcore.numerics import product_slack


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


def searched(search, bank, query, k):
    """The bank, after a search that gave what brute force gives."""
    found = MemoryBank(search)
    found.fill(bank)
    distance, rows = found(query, k)
    expected, expected_rows = brute_force(bank, query, k)
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(rows.numpy(), expected_rows)
    return found


def lengths_of(monkeypatch, method, argument):
    """List that will hold the length of one argument of each call of a method of ExactSearch."""
    lengths, called = [], getattr(ExactSearch, method)

    def counting(self, *arguments):
        lengths.append(len(arguments[argument]))
        return called(self, *arguments)

    monkeypatch.setattr(ExactSearch, method, counting)
    return lengths


def deep(rows, queries, dimension=96, seed=0):
    """Features as networks give them: decaying variances, heavy tails, clusters; some queries from elsewhere."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0, -4, dimension).exp()
    turn = torch.linalg.qr(torch.randn(dimension, dimension, generator=g)).Q
    every = torch.randn(rows + queries, dimension, generator=g) ** 3 * scale
    every += 3 * scale * torch.randn(20, dimension, generator=g)[torch.randint(20, (len(every),), generator=g)]
    every[rows : rows + queries // 10] *= 5
    every = every @ turn + 2
    return every[:rows], every[rows:]


@pytest.mark.parametrize("search", ["auto", *WAYS])
@pytest.mark.parametrize("k", [1, 3, 50, 400])
def test_matches_brute_force(search, k, monkeypatch):
    monkeypatch.setattr(exact_search, "_BLOCK", 512 * 37)  # several blocks
    monkeypatch.setattr(exact_search, "_NUMBERS", 24 * 101)
    bank, query = made()
    found = MemoryBank(search)
    found.fill(bank)
    distance, rows = found(query, k)
    expected, expected_rows = brute_force(bank, query, k)
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal(rows.numpy(), expected_rows)
    assert (distance[:5, 0] == 0).all()


@pytest.mark.parametrize(
    ("most", "queries", "expected"),
    [(300, 700, [256, 256, 188]), (300, 540, [256, 284]), (300, 300, [300]), (100, 230, [100, 100, 30])],
)
def test_blocks_of_queries(most, queries, expected, monkeypatch):
    """As many as fit, in numbers that products are fastest with."""
    bank, query = made(queries=queries)
    monkeypatch.setattr(exact_search, "_BLOCK", 384 * most)  # rows of the bank that differ, filled up
    blocks = lengths_of(monkeypatch, "_by_filter", 0)
    found = MemoryBank("torch")
    found.fill(bank)
    np.testing.assert_array_equal(found(query)[1].numpy(), brute_force(bank, query, 1)[1])
    assert [size for size in blocks if size > 20] == expected  # a few queries lie on rows that are nearly equal


@pytest.mark.parametrize("search", WAYS)
@pytest.mark.parametrize("k", [1, 9])
def test_filters_thin_out_and_are_exact(search, k):
    bank, query = deep(3000, 300)
    found = searched(search, bank, query, k)
    assert found._exact.survivors < 100
    assert found._exact._unsure < 20


@pytest.mark.parametrize("search", ["bf16", "int8"])
def test_filters_thin_out_features_without_directions(search):
    """Principal components would leave out what tells rows apart: nearest rows lie little nearer than others."""
    g = torch.Generator().manual_seed(0)
    bank, query = torch.randn(4000, 896, generator=g), torch.randn(300, 896, generator=g)
    found = MemoryBank(search)
    found.fill(bank)
    every = torch.cdist(query.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(found(query)[1][:, 0], every.argmin(1))
    assert found._exact.survivors < 100
    assert found._exact._unsure < 100  # with components: nearly all


@pytest.mark.parametrize("search", ["torch", "faiss"])
def test_far_queries_are_thinned_out_too(search):
    """What rounding does to the query's own length, it does to all distances alike."""
    g = torch.Generator().manual_seed(0)
    bank, query = torch.randn(2000, 64, generator=g), 1e4 * torch.randn(300, 64, generator=g)
    found = MemoryBank(search)
    found.fill(bank)
    np.testing.assert_array_equal(found(query)[1].numpy(), brute_force(bank, query, 1)[1])
    assert found._exact.survivors < 1.5
    assert found._exact._unsure == 0


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("far", [slice(None), slice(40, 250), slice(None, None, 3)], ids=["all", "next", "scattered"])
def test_int8_takes_two_digits_of_far_queries(far, k):
    """Steps so coarse that one digit reaches them would hide which row is nearest."""
    bank, query = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)).split([3700, 300])
    query = query.clone()
    query[far] *= 100
    found = searched("int8", bank, query, k)
    assert found._exact.survivors < 40 + 2 * k
    assert found._exact._unsure == 0


@pytest.mark.parametrize("search", WAYS)
@pytest.mark.parametrize("k", [1, 3])
def test_masses_of_nearly_equal_rows_are_thinned_out_in_float64(search, k, monkeypatch):
    """A background that is constant but for rounding; in no way more at once than a block."""
    bank, query = deep(3000, 200)
    g = torch.Generator().manual_seed(0)
    bank[torch.randperm(3000, generator=g)[:1500]] = bank[7] * (1 + 1e-6 * torch.randn(1500, 96, generator=g))
    query[:150] = bank[7] * (1 + 1e-6 * torch.randn(150, 96, generator=g))
    monkeypatch.setattr(exact_search, "_BLOCK", 100 * 3000)
    decided, at_once = lengths_of(monkeypatch, "_distance", 1), lengths_of(monkeypatch, "_by_filter", 0)
    found = searched(search, bank, query, k)
    assert found._exact._unsure >= 150
    assert max(at_once) <= 100
    assert sum(decided) < 60 * len(query)  # 150 queries x 1500 rows would be 1125 for each


@pytest.mark.parametrize("search", WAYS)
@pytest.mark.parametrize("k", [1, 3, 700])
def test_masses_of_equal_rows_cost_no_more(search, k):
    """A constant background: copies are searched once, and counted as often as they are there."""
    bank, query = deep(3000, 200)
    g = torch.Generator().manual_seed(0)
    bank[torch.randperm(3000, generator=g)[:1000]] = bank[7].clone()
    bank[torch.randperm(3000, generator=g)[:300]] = 0.0
    bank[torch.randperm(3000, generator=g)[:300]] *= -0.0  # zeros of either sign are equal
    query[:80] = bank[7]
    query[80:100] = 0.0
    found = searched(search, bank, query, k)
    assert len(found._exact.features) < 2100
    coarse = search == "int8" and search_filter._largest(bank.device) < 127  # leaves 22 in doubt; with the copies, 200
    assert k == 700 or found._exact._unsure < (50 if coarse else 20)


@pytest.mark.parametrize("search", WAYS)
@pytest.mark.parametrize("dimension", [96, 300])
def test_few_rows_that_are_mostly_zero(search, dimension, monkeypatch):
    """LAPACK may find no principal components of them, or NaN."""
    monkeypatch.setattr(search_filter, "_TURN", 0)  # by principal components, if there are
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        bank = torch.randn(5, dimension, generator=g).relu() * (torch.rand(5, dimension, generator=g) < 0.1)
        query = torch.randn(40, dimension, generator=g)
        found = MemoryBank(search)
        found.fill(bank)
        np.testing.assert_array_equal(found(query, 3)[1].numpy(), brute_force(bank, query, 3)[1])


@given(
    dimension=st.sampled_from([1, 3, 64, 900]),
    far=st.sampled_from([1e-3, 1.0, 1e3, 1e6]),
    seed=st.integers(0, 1000),
)
def test_product_slack_bounds_what_is_not_common(dimension, far, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = far * torch.rand(20, dimension, generator=g), torch.rand(50, dimension, generator=g)  # of one sign: worst
    found = b.square().sum(1) - 2 * a @ b.T
    slack = product_slack(dimension, a.square().sum(1, keepdim=True), float(b.norm(dim=1).max()))
    exact = b.double().square().sum(1) - 2 * a.double() @ b.T.double()
    assert ((found - exact).abs() <= slack).all()
    assert (slack <= 1e-3 * (1 + far) * dimension).all()  # not with the square of far


_exotic = st.sampled_from(["plain", "constant", "duplicates", "lattice", "one far row", "far queries", "own rows"])


@pytest.mark.parametrize("search", WAYS)
@given(
    kind=_exotic,
    rows=st.sampled_from([1, 2, 7, 128, 129, 700]),
    queries=st.sampled_from([1, 5, 70]),
    dimension=st.sampled_from([1, 3, 64, 130]),
    k=st.sampled_from([1, 2, 10, 10_000]),
    scale=st.sampled_from([2.0**-100, 2.0**-20, 1.0, 2.0**60, 2.0**100]),  # powers of two keep ties
    offset=st.sampled_from([0.0, 1.0, 1e4]),
    turn=st.sampled_from([0, search_filter._TURN]),  # 0: by principal components always
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_exact_whatever_comes(search, kind, rows, queries, dimension, k, scale, offset, turn, seed):
    g = torch.Generator().manual_seed(seed)
    bank, query = torch.randn(rows, dimension, generator=g), torch.randn(queries, dimension, generator=g)
    if kind == "constant":
        bank = bank[:1].repeat(rows, 1)
    elif kind == "duplicates":
        bank = bank[torch.randint(1 + rows // 9, (rows,), generator=g)]
    elif kind == "lattice":
        bank, query = bank.round(), query.round()  # many ties
    elif kind == "one far row":
        bank[-1] *= 1e5
    elif kind == "far queries":
        query[::2] *= 1e6
    elif kind == "own rows":
        query = bank[torch.randint(rows, (queries,), generator=g)]
    bank, query = (bank + offset) * scale, (query + offset) * scale
    k = min(k, rows)
    found = MemoryBank(search)
    found.fill(bank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_filter, "_TURN", turn)
        distance, got = found(query, k)
    expected, expected_rows = brute_force(bank, query, k)
    np.testing.assert_allclose(distance.double().numpy(), expected, rtol=1e-5, atol=1e-44)
    at = np.linalg.norm(query.double().numpy()[:, None] - bank.double().numpy()[got.numpy()], axis=2)
    np.testing.assert_allclose(at, expected, rtol=1e-12)  # the same rows, but for ties in float64
    if kind in ("constant", "duplicates", "lattice"):
        np.testing.assert_array_equal(got.numpy(), expected_rows)
    assert all(len(set(row)) == k for row in got.tolist())


@pytest.mark.parametrize("search", WAYS)
def test_rounding_would_choose_another_row(search):
    """Rows nearer to each other than low precision resolves, so that only margins keep the right one."""
    g = torch.Generator().manual_seed(1)
    centre = torch.randn(1, 96, generator=g)
    bank = torch.cat([torch.randn(500, 96, generator=g), centre + 1e-3 * torch.randn(500, 96, generator=g)])
    query = centre + 1e-3 * torch.randn(100, 96, generator=g)
    found = MemoryBank(search)
    found.fill(bank)
    np.testing.assert_array_equal(found(query)[1].numpy(), brute_force(bank, query, 1)[1])


def measured(monkeypatch, bank, query, seconds):
    """A search whose clock says what each way takes."""
    search = ExactSearch(bank)
    monkeypatch.setattr(exact_search, "_SMALL", 0)
    monkeypatch.setattr(search, "_timed", lambda queries, k, way: seconds[way])
    return search


@pytest.mark.parametrize("fastest", WAYS)
def test_auto_takes_the_fastest_and_says_so(fastest, monkeypatch, caplog):
    bank, query = deep(2000, 300)
    search = measured(monkeypatch, bank, query, dict.fromkeys(WAYS, 1.0) | {fastest: 0.5})
    with caplog.at_level(logging.INFO, "pl_patchcore"):
        few = search(query[:3], 1, "auto")
        assert search.chosen is None  # too few to measure with
        distance, rows = search(query, 1, "auto")
    assert search.chosen == fastest
    assert f"{fastest} chosen for 2000 rows of 96 numbers" in caplog.text
    assert set(search._filters) <= {fastest}  # the others' memory is given back
    expected, expected_rows = brute_force(bank, query, 1)
    np.testing.assert_array_equal(rows.numpy(), expected_rows)
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-6)
    assert torch.equal(few[1], rows[:3])


def test_auto_takes_faiss_only_where_it_is_a_tenth_faster(monkeypatch):
    """Between torch's work its threads fall asleep, which a measurement does not see."""
    bank, query = deep(2000, 300)
    for seconds, expected in ((0.95, "torch"), (0.85, "faiss")):
        search = measured(monkeypatch, bank, query, dict.fromkeys(WAYS, 2.0) | {"torch": 1.0, "faiss": seconds})
        search(query, 1, "auto")
        assert search.chosen == expected


def test_auto_measures_again_where_a_filter_fails(monkeypatch):
    bank, query = deep(2000, 300)
    search = measured(monkeypatch, bank, query, dict.fromkeys(WAYS, 1.0) | {"int8": 0.5})
    search(query, 1, "auto")
    assert search.chosen == "int8"
    away = 1e3 * torch.randn(300, 96, generator=torch.Generator().manual_seed(0))
    for _ in range(5):  # an odd image now and then does not do
        search(away, 1, "auto")
        search(query, 1, "auto")
    for _ in range(3):
        assert search.chosen == "int8"
        rows = search(away, 1, "auto")[1]
        np.testing.assert_array_equal(rows.numpy(), brute_force(bank, away, 1)[1])
    assert search.chosen is None


def test_auto_leaves_out_principal_components_that_there_are_not(monkeypatch, caplog):
    g = torch.Generator().manual_seed(0)
    bank, query = torch.randn(2000, 96, generator=g), torch.randn(300, 96, generator=g)
    search = measured(monkeypatch, bank, query, dict.fromkeys(WAYS, 1.0) | {"pca": 0.5})
    with caplog.at_level(logging.INFO, "pl_patchcore"):
        search(query, 1, "auto")
    assert search.chosen != "pca"
    assert "pca" not in caplog.text


def test_small_banks_are_not_measured():
    found = MemoryBank()
    found.fill(made()[0])
    found(made()[1])
    assert found._exact.chosen is None
    assert not found._exact._filters


def test_int8_product_is_there():
    assert hasattr(torch, "_int_mm"), "torch has moved its int8 product: int8 is left out of auto"
    most = search_filter._largest(torch.device("cpu"))
    for rows, columns, dimension in ((1, 24, 8), (5, 128, 64), (200, 1000, 904)):
        b = torch.randint(-most, most + 1, (columns, dimension), dtype=torch.int8)
        for a in (torch.randint(-most, most + 1, (rows, dimension), dtype=torch.int8), b[:rows].sign() * most):
            for other in (b, b.sign() * most):
                assert torch.equal(torch._int_mm(a, other.T), a.int() @ other.T.int())


def test_int8_where_its_sums_saturate():
    """Coordinates as large as they come, on a processor without VNNI."""
    script = """
import torch
from pl_patchcore import search_filter
from pl_patchcore.memory_bank import MemoryBank
g = torch.Generator().manual_seed(0)
bank = torch.randn(700, 64, generator=g).sign() + 0.05 * torch.randn(700, 64, generator=g)
query = bank + 0.3 * torch.randn(700, 64, generator=g)
found = []
for search in ("torch", "int8"):
    memory_bank = MemoryBank(search)
    memory_bank.fill(bank)
    found.append(memory_bank(query, 3))
print(torch.equal(found[0][1], found[1][1]), torch.equal(found[0][0], found[1][0]))
print(search_filter._largest(bank.device))
"""
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}  # what oneDNN does on processors that have no more
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=240).stdout.split()
    assert output[:2] == ["True", "True"]
    if platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available():
        assert output[2:] == ["79"]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch comes without oneDNN here")
def test_product_of_onednn_is_there():
    assert numerics.has_onednn(), "torch has moved its product by oneDNN: torch.addmm is slower"


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 3, 200])
@pytest.mark.parametrize(("others", "dimension"), [(1, 1), (2100, 7), (128, 900)])
def test_shifted_product(rows, others, dimension, onednn, monkeypatch):
    monkeypatch.setattr(numerics, "has_onednn", lambda: onednn and torch.backends.mkldnn.is_available())
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, dimension, generator=g), torch.randn(others, dimension, generator=g)
    shift = torch.randn(others, generator=g)
    shift[-1] = -torch.inf
    found = numerics.shifted_product(a, b, shift)
    assert (found[:, -1] == -torch.inf).all()
    a, b, shift = (each.double() for each in (a, b[:-1], shift[:-1]))
    bound = 2.0**-21 * (a.norm(dim=1, keepdim=True) * b.norm(dim=1) + shift.abs())  # TF32 takes 90 times that
    assert ((found[:, :-1] - (a @ b.T + shift)).abs() <= bound).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("search", ["auto", *WAYS])
def test_on_a_gpu(search, monkeypatch):
    monkeypatch.setattr(exact_search, "_SMALL", 0)  # auto measures
    monkeypatch.setattr(exact_search, "_BLOCK", 100 * 3000 // numerics._TIMES)  # several blocks
    bank, query = deep(3000, 300)
    bank[1000:1500] = bank[0].clone()
    query[200:] *= 50  # farther than rounded products can tell
    found = MemoryBank(search)
    found.fill(bank.cuda())
    np.testing.assert_array_equal(found(query.cuda(), 3)[1].cpu().numpy(), brute_force(bank, query, 3)[1])
    assert found(query[:1].cuda())[0].is_cuda


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("search", WAYS)
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


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="settings of torch 2.9 and newer")
@pytest.mark.parametrize("of", ["all", "mkldnn", "cuda"])
def test_low_precision_settings_of_libraries_do_not_matter(of):
    """Where they are set, torch refuses to tell the older setting."""
    place = torch.backends if of == "all" else getattr(torch.backends, of).matmul
    bank, query = made()
    found = MemoryBank()
    found.fill(bank)
    exact, before = found(query)[0], place.fp32_precision
    place.fp32_precision = "tf32"
    try:
        assert torch.equal(found(query)[0], exact)
        with numerics.full_precision(torch.device("cpu")):
            assert torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
            assert torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")
        assert place.fp32_precision == "tf32"
    finally:
        place.fp32_precision = before


@pytest.mark.parametrize("allowed", [False, True])
def test_full_precision_sums_bf16_products_in_float32(allowed):
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = allowed
    try:
        with numerics.full_precision(torch.device("cpu")):
            assert not products.allow_bf16_reduced_precision_reduction
        assert products.allow_bf16_reduced_precision_reduction is allowed
    finally:
        products.allow_bf16_reduced_precision_reduction = True


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
    with pytest.raises(UserError, match="none of auto, torch, pca, bf16, int8, faiss, nor an index"):
        MemoryBank("annoy")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("search", ["torch", "int8", "HNSW16"])
def test_bank_in_half(dtype, search):
    bank, query = deep(1500, 100)
    full = MemoryBank(search, dtype)
    full.fill(bank)
    assert full.features.dtype == getattr(torch, dtype)
    rounded = bank.to(full.features.dtype).float()
    expected, _ = brute_force(rounded, query, 1)
    assert np.mean(np.isclose(full(query)[0].numpy(), expected, rtol=1e-6)) > (0.9 if search == "HNSW16" else 0.999)
    again = MemoryBank(search, dtype)
    again.load_state_dict(full.state_dict())
    assert again.features.dtype == full.features.dtype
    assert torch.equal(again(query)[0], full(query)[0])


def test_half_overflow_and_unknown_type():
    found = MemoryBank("torch", "float16")
    with pytest.raises(UserError, match=r"reach 1e\+05, too far for torch.float16; use bfloat16"):
        found.fill(torch.full((3, 2), 1e5))
    with pytest.raises(UserError, match="bank_dtype must be float32"):
        MemoryBank("torch", "int8")


@pytest.mark.parametrize("search", ["HNSW16", "IVF8,Flat", "IVF8,PQ8", "PCA32,SQ8", "Flat"])
def test_approximate(search, caplog):
    bank, query = deep(1500, 200)
    found = MemoryBank(search)
    found.fill(bank)
    distance, rows = found(query, 3)
    at = np.linalg.norm(query.double().numpy()[:, None] - bank.double().numpy()[rows.numpy()], axis=2)
    np.testing.assert_allclose(distance.numpy(), at, rtol=1e-6)  # exact for the rows found
    assert (distance.diff(dim=1) >= 0).all()
    expected = brute_force(bank, query, 1)[0][:, 0]
    share = np.mean(distance[:, 0].numpy() <= expected * (1 + 1e-6))
    with caplog.at_level(logging.INFO, "pl_patchcore"):
        assert found.recall(query) == pytest.approx(share)
    assert f"search {search} finds the nearest row of {100 * share:.1f} % of 200" in caplog.text
    assert share > 0.85
    every, order = found(query[:5], 1500)  # more than an index of lists finds
    np.testing.assert_array_equal(order.sort(1).values.numpy(), np.tile(np.arange(1500), (5, 1)))
    assert every.isfinite().all()


def test_recall_counts_misses(monkeypatch):
    bank, query = deep(1500, 200)
    found = MemoryBank("IVF100,Flat")
    found.fill(bank)
    monkeypatch.setattr("pl_patchcore.approximate_search._PROBED", 1)
    monkeypatch.setattr(found, "_approximate", None)
    recall = found.recall(torch.cat([query, bank[:500]]))  # rows of the bank do not count
    assert 0.2 < recall < 0.95
    assert MemoryBank("torch").recall(query) == 1


def test_index_travels_with_the_checkpoint(tmp_path, monkeypatch):
    bank, query = deep(1500, 200)
    full = MemoryBank("IVF8,PQ8")
    full.fill(bank)
    torch.save(full.state_dict(), tmp_path / "bank.pt")
    saved = torch.load(tmp_path / "bank.pt", weights_only=True)
    assert saved["index"].dtype == torch.uint8
    built = []
    monkeypatch.setattr("pl_patchcore.memory_bank.build_index", lambda *a: built.append(a) or full.index)
    same = MemoryBank("IVF8,PQ8")
    same.load_state_dict(dict(saved))
    assert torch.equal(same(query, 3)[1], full(query, 3)[1])
    assert not built
    other = MemoryBank("HNSW16")  # another index, none, or one of another size: built anew
    other.load_state_dict(dict(saved))
    same.load_state_dict({"features": saved["features"]})
    same.load_state_dict({"features": saved["features"][:900], "index": saved["index"]})
    assert [a[0] for a in built] == ["HNSW16", "IVF8,PQ8", "IVF8,PQ8"]
    exact = MemoryBank("torch")
    exact.load_state_dict(dict(saved))
    assert torch.equal(exact.features, bank)
    assert "index" not in exact.state_dict()


@pytest.mark.parametrize(
    ("search", "dimension", "rows", "message"),
    [
        ("annoy", None, None, "could not parse"),
        ("PQ7", 64, None, "for 64 dimensions .*multiple of the number of subquantizers"),
        ("IVF1024,PQ8", 64, 500, "at least 1024 rows, the memory bank has 500"),
        ("PQ8", 64, 100, "at least 256 rows"),
        ("PCA100,Flat", 64, None, "more dimensions than the 64"),
        ("IVF0,Flat", None, None, "0 lists"),
    ],
)
def test_impossible_indexes(search, dimension, rows, message):
    with pytest.raises(UserError, match=message):
        check_factory(search, dimension, rows)
    check_factory("IVF16,PQ8", 64, 300)
