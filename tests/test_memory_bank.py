import copy
import logging
import os
import pickle
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
import scipy.spatial
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pl_patchcore import MemoryBank, UserError, memory_bank, numerics

EXACT = ("torch", "int8", "auto")


@pytest.fixture(autouse=True)
def fast_int8(monkeypatch):
    """As on a processor whose int8 products are fast, whatever this one is: auto, too, takes the filter."""
    if numerics.product_speed(torch.int8):
        monkeypatch.setattr(memory_bank, "product_speed", lambda _: 4.0)
    monkeypatch.setattr(memory_bank, "_SMALL_BANK_NUMBERS", 0)


def brute_force(bank, query, k):
    distance = scipy.spatial.distance.cdist(query.double(), bank.double())  # by differences
    rows = np.argsort(distance, 1, kind="stable")[:, :k]
    return np.take_along_axis(distance, rows, 1), rows


def bank_of(features, search="auto", dtype="float32"):
    bank = MemoryBank(search, dtype)
    bank.fill(features)
    return bank


def check(bank, query, k=1):
    """Search gives what brute force gives."""
    distance, rows = bank(query, k)
    expected, expected_rows = brute_force(bank.features, query, k)
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal(rows.numpy(), expected_rows)


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


@pytest.fixture
def multiplied(monkeypatch):
    """How many queries the float32 product has met: those that the int8 filter leaves in doubt, or all."""
    met = []

    def counting(queries, rows, shift):
        met.append(len(queries))
        return numerics.shifted_product(queries, rows, shift)

    monkeypatch.setattr(memory_bank, "shifted_product", counting)
    return lambda: sum(met)


@pytest.mark.parametrize("search", EXACT)
@pytest.mark.parametrize("k", [1, 3, 50, 400])
def test_matches_brute_force(search, k, monkeypatch):
    monkeypatch.setattr(memory_bank, "_CPU_SCORES", 512 * 37)  # several blocks
    monkeypatch.setattr(memory_bank, "_CPU_GATHERED", 24 * 101)
    bank, query = made()
    check(bank_of(bank, search), query, k)


_kinds = st.sampled_from(["plain", "constant", "duplicates", "lattice", "one far row", "far queries", "own rows"])


@pytest.mark.parametrize("search", ["torch", "int8"])
@given(
    kind=_kinds,
    rows=st.sampled_from([1, 2, 7, 128, 129, 700]),
    queries=st.sampled_from([1, 5, 70]),
    dimension=st.sampled_from([1, 3, 64, 300]),
    k=st.sampled_from([1, 2, 10, 10_000]),
    scale=st.sampled_from([2.0**-100, 2.0**-20, 1.0, 2.0**60, 2.0**100]),  # powers of two keep ties
    offset=st.sampled_from([0.0, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80)
def test_exact_whatever_comes(search, kind, rows, queries, dimension, k, scale, offset, dtype, seed):
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
    bank, query = (bank + offset) * scale, ((query + offset) * scale).to(dtype)
    k = min(k, rows)
    distance, got = bank_of(bank, search).to(dtype)(query, k)
    expected, expected_rows = brute_force(bank, query, k)
    np.testing.assert_allclose(distance.double().numpy(), expected, rtol=1e-5, atol=1e-44)
    at = np.linalg.norm(query.double().numpy()[:, None] - bank.double().numpy()[got.numpy()], axis=2)
    np.testing.assert_allclose(at, expected, rtol=1e-12)  # the same rows, but for ties in float64
    if kind in ("constant", "duplicates", "lattice"):
        np.testing.assert_array_equal(got.numpy(), expected_rows)
    assert all(len(set(row)) == k for row in got.tolist())


@pytest.mark.parametrize("search", ["torch", "int8"])
def test_rounding_would_choose_another_row(search):
    """Rows nearer to each other than low precision resolves, so that only margins keep the right one."""
    g = torch.Generator().manual_seed(1)
    centre = torch.randn(1, 96, generator=g)
    bank = torch.cat([torch.randn(500, 96, generator=g), centre + 1e-3 * torch.randn(500, 96, generator=g)])
    check(bank_of(bank, search), centre + 1e-3 * torch.randn(100, 96, generator=g))


@pytest.mark.parametrize("k", [1, 9])
def test_filter_rules_out_and_is_exact(k, multiplied):
    bank, query = deep(3000, 300, 300)
    check(bank_of(bank, "int8"), query, k)
    assert multiplied() < 15


@pytest.mark.parametrize("search", ["torch", "int8"])
@pytest.mark.parametrize("k", [1, 3, 700])
def test_masses_of_equal_rows_cost_no_more(search, k, multiplied):
    """A constant background."""
    bank, query = deep(3000, 200)
    g = torch.Generator().manual_seed(0)
    bank[torch.randperm(3000, generator=g)[:1000]] = bank[7].clone()
    bank[torch.randperm(3000, generator=g)[:300]] = 0.0
    bank[torch.randperm(3000, generator=g)[:300]] *= -0.0  # zeros of either sign are equal
    query[:80] = bank[7]
    query[80:100] = 0.0
    check(bank_of(bank, search), query, k)
    assert k == 700 or search == "torch" or multiplied() < 20


@pytest.mark.parametrize("search", ["torch", "int8"])
@pytest.mark.parametrize("k", [1, 3])
def test_masses_of_nearly_equal_rows(search, k):
    """A background that is constant but for rounding: only float64 tells its rows apart."""
    bank, query = deep(3000, 200)
    g = torch.Generator().manual_seed(0)
    bank[torch.randperm(3000, generator=g)[:1500]] = bank[7] * (1 + 1e-6 * torch.randn(1500, 96, generator=g))
    query[:150] = bank[7] * (1 + 1e-6 * torch.randn(150, 96, generator=g))
    check(bank_of(bank, search), query, k)


@pytest.mark.parametrize("far", [2, 30, 1e3, 1e5])
def test_far_queries(far, multiplied):
    """Where the filter rules out little, the float32 product decides."""
    bank, query = deep(3000, 600)
    bank -= 2
    query = (query - 2) * far
    check(bank_of(bank, "int8"), query)
    if far >= 1e3:
        assert multiplied() == 600
    elif far == 2:
        assert multiplied() < 200


def test_one_query_is_answered_as_in_a_batch():
    bank, query = deep(3000, 600)
    bank[100:200] = bank[7].clone()
    found = bank_of(bank)
    distance, rows = found(query, 3)
    for i in range(0, 600, 7):
        one = found(query[i : i + 1], 3)
        assert torch.equal(one[0][0], distance[i])
        assert torch.equal(one[1][0], rows[i])


@pytest.mark.parametrize(
    ("faster", "small", "directions", "message"),
    [
        (4.0, 0, True, r"int8 filter \(int8 products are 4.0 times as fast here, 255 components leave out"),
        (1.5, 0, True, r"float32 product \(int8 products are 1.5 times as fast here\)"),
        (0.0, 0, True, r"float32 product \(int8 products are 0.0 times as fast here\)"),
        (4.0, 1 << 30, True, r"float32 product \(a small bank\)"),
        (4.0, 0, False, "float32 product .* 255 components leave out"),
    ],
    ids=["fast", "slow", "inexact", "small", "without directions"],
)
def test_auto_is_decided_when_the_bank_is_filled(faster, small, directions, message, monkeypatch, caplog, multiplied):
    monkeypatch.setattr(memory_bank, "product_speed", lambda _: faster)
    monkeypatch.setattr(memory_bank, "_SMALL_BANK_NUMBERS", small)
    bank, query = deep(3000, 300, 400) if directions else torch.randn(2, 3000, 400).unbind()
    with caplog.at_level(logging.INFO, "pl_patchcore"):
        found = bank_of(bank)
        assert caplog.text.count("nearest neighbours among 3000 rows of 400 numbers") == 1
        found(query[:300])
    (record,) = caplog.records  # nothing is decided later
    assert record.levelname == "INFO"
    assert __import__("re").search(message, record.getMessage())
    assert (multiplied() == 300) == ("float32" in record.getMessage())


def test_int8_product_is_there():
    assert hasattr(torch, "_int_mm"), "torch has moved its int8 product: the filter of exact search is left out"
    if not numerics.product_speed(torch.int8):
        pytest.skip("int8 sums saturate on this processor")
    for rows, columns, dimension in ((1, 24, 8), (5, 128, 64), (200, 1000, 904)):
        b = torch.randint(-127, 128, (columns, dimension), dtype=torch.int8)
        for a in (torch.randint(-127, 128, (rows, dimension), dtype=torch.int8), b[:rows].sign() * 127):
            for other in (b, b.sign() * 127):
                assert torch.equal(torch._int_mm(a, other.T), a.int() @ other.T.int())


@pytest.mark.slow
def test_int8_where_its_sums_saturate():
    """On a processor without VNNI the filter is left out, whoever asks for it."""
    script = """
import torch
from pl_patchcore.memory_bank import MemoryBank
from pl_patchcore.numerics import product_speed
g = torch.Generator().manual_seed(0)
bank = torch.randn(700, 64, generator=g).sign() + 0.05 * torch.randn(700, 64, generator=g)
query = bank + 0.3 * torch.randn(700, 64, generator=g)
found = []
for search in ("torch", "int8"):
    memory_bank = MemoryBank(search)
    memory_bank.fill(bank)
    found.append(memory_bank(query, 3))
print(torch.equal(found[0][1], found[1][1]), torch.equal(found[0][0], found[1][0]), product_speed(torch.int8))
"""
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}  # what oneDNN does on processors that have no more
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=240).stdout.split()
    assert output[:2] == ["True", "True"]
    if platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available():
        assert output[2:] == ["0.0"]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch comes without oneDNN here")
def test_product_of_onednn_is_there():
    assert numerics.has_onednn, "torch has moved its product by oneDNN: torch.addmm is slower"


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 3, 200])
@pytest.mark.parametrize(("others", "dimension"), [(1, 1), (2100, 7), (128, 900)])
def test_shifted_product(rows, others, dimension, onednn, monkeypatch):
    monkeypatch.setattr(numerics, "has_onednn", onednn and numerics.has_onednn)
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, dimension, generator=g), torch.randn(others, dimension, generator=g)
    shift = torch.randn(others, generator=g)
    shift[-1] = -torch.inf
    found = numerics.shifted_product(a, b, shift)
    assert (found[:, -1] == -torch.inf).all()
    a, b, shift = (each.double() for each in (a, b[:-1], shift[:-1]))
    bound = 2.0**-21 * (a.norm(dim=1, keepdim=True) * b.norm(dim=1) + shift.abs())  # TF32 takes 90 times that
    assert ((found[:, :-1] - (a @ b.T + shift)).abs() <= bound).all()


@given(
    dimension=st.sampled_from([1, 3, 64, 900]),
    far=st.sampled_from([1e-3, 1.0, 1e3, 1e6]),
    seed=st.integers(0, 1000),
)
def test_product_margin_bounds_what_is_not_common(dimension, far, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = far * torch.rand(20, dimension, generator=g), torch.rand(50, dimension, generator=g)  # of one sign: worst
    found = b.square().sum(1) - 2 * a @ b.T
    longest = float(b.norm(dim=1).max())
    slack = numerics.product_margin(dimension) * longest * (a.norm(dim=1, keepdim=True) + longest)
    expected = b.double().square().sum(1) - 2 * a.double() @ b.T.double()
    assert ((found - expected).abs() <= slack).all()
    assert (slack <= 1e-3 * (1 + far) * dimension).all()  # not with the square of far


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("search", EXACT)
def test_on_a_gpu(search):
    bank, query = deep(3000, 300)
    bank[1000:1500] = bank[0].clone()
    query[200:] *= 50
    found = bank_of(bank.cuda(), search)
    np.testing.assert_array_equal(found(query.cuda(), 3)[1].cpu().numpy(), brute_force(bank, query, 3)[1])
    assert found(query[:1].cuda())[0].is_cuda
    check(found.cpu(), query, 3)


@pytest.mark.parametrize("setting", ["precision", "all", "mkldnn", "cuda"])
def test_low_precision_settings_do_not_matter(setting):
    bank, query = deep(1000, 200)
    found = bank_of(bank, "torch")
    exactly = found(query)[0]
    if setting == "precision":
        torch.set_float32_matmul_precision("medium")
        place, before = None, "highest"
    else:
        if not hasattr(torch.backends, "fp32_precision"):
            pytest.skip("settings of torch 2.9 and newer")
        place = torch.backends if setting == "all" else getattr(torch.backends, setting).matmul
        before, place.fp32_precision = place.fp32_precision, "tf32"
    try:
        with torch.autocast("cpu", torch.bfloat16), ThreadPoolExecutor(4) as threads:
            for answer in threads.map(found, [query] * 16):
                assert torch.equal(answer[0], exactly)
        with numerics.full_precision(torch.device("cpu")):
            assert place is None or torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
            assert place is None or torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")
        assert (torch.get_float32_matmul_precision() if place is None else place.fp32_precision) != before
    finally:
        if place is None:
            torch.set_float32_matmul_precision(before)
        else:
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


@pytest.mark.parametrize("search", ["int8", "HNSW16"])
def test_many_threads(search):
    bank, query = deep(1500, 400)
    found = bank_of(bank, search)
    expected = found(query, 2)
    found.features.mul_(1.0)  # written to: all threads find that the search must be prepared anew
    with ThreadPoolExecutor(8) as threads:
        for distance, rows in threads.map(lambda _: found(query, 2), range(24)):
            assert torch.equal(distance, expected[0])
            assert torch.equal(rows, expected[1])


class Nested(torch.nn.Module):
    def __init__(self, bank, k=1):
        super().__init__()
        self.bank, self.k = bank, k

    def forward(self, query):
        return self.bank(query, self.k)


def test_exported_with_any_number_of_queries():
    bank, query = made()
    found = bank_of(bank[120:])  # without near-duplicates
    dynamic = ({0: torch.export.Dim("queries")},)
    exported = torch.export.export(Nested(found, 3), (query[:20],), dynamic_shapes=dynamic).module()
    for some in (query[8:9], query[8:10], query[8:]):
        distance, rows = exported(some)
        torch.testing.assert_close(distance, found(some, 3)[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(rows, found(some, 3)[1])


@pytest.mark.parametrize("search", ["int8", "IVF8,Flat"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies(search, way, tmp_path):
    """They answer alike, are as light as their buffers, and load what they are given, not what it is loaded into."""
    bank, query = deep(1500, 100)
    found = Nested(bank_of(bank, search))
    if way == "save":
        torch.save(found, tmp_path / "bank.pt")
        assert (tmp_path / "bank.pt").stat().st_size < 2.5 * bank.nbytes
        again = torch.load(tmp_path / "bank.pt", weights_only=False)
    else:
        again = copy.deepcopy(found) if way == "deepcopy" else pickle.loads(pickle.dumps(found))
    expected = found(query)
    assert torch.equal(again(query)[0], expected[0])
    again.load_state_dict(bank_of_state := Nested(bank_of(bank[700:], search)).state_dict())
    assert len(bank_of_state["bank.features"]) == again.bank.size == 800
    assert torch.equal(found(query)[0], expected[0])
    assert found.bank.size == 1500


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("before", [0, 30, 200])
def test_loads_whatever_its_size(assign, before):
    bank, query = deep(200, 50)
    full = Nested(MemoryBank())
    full.bank.fill(bank, torch.arange(201.0))
    full.bank.seen.fill_(7)
    other = Nested(bank_of(torch.ones(before, 5)))
    other.load_state_dict(full.state_dict(), assign=assign)
    check(other.bank, query, 2)
    assert torch.equal(other.bank.radii, torch.arange(201.0))
    assert other.bank.seen == 7
    emptied = other.load_state_dict(Nested(MemoryBank()).state_dict(), assign=assign)
    assert not emptied.missing_keys
    assert other.bank.size == 0


def test_state_is_the_same_set_of_buffers_always():
    names = {"features", "radii", "seen", "images", "places", "grid", "index"}
    bank = deep(300, 1)[0]
    for search in ("auto", "HNSW16"):
        assert set(MemoryBank(search).state_dict()) == set(bank_of(bank, search).state_dict()) == names


@pytest.mark.parametrize("search", ["int8", "IVF8,Flat"])
def test_answers_for_the_rows_as_they_are_now(search):
    """Written to in place, replaced, filled again, in inference mode: a search prepared before gives nothing stale."""
    bank, query = deep(800, 100)
    found = bank_of(bank, search)
    found(query)

    def answers():
        distance, rows = found(query)
        at = torch.linalg.vector_norm(query.double() - found.features.double()[rows[:, 0]], dim=1)
        torch.testing.assert_close(distance[:, 0], at.float(), rtol=1e-6, atol=0)
        if search == "int8":
            check(found, query)

    found.features[:400] += 3
    answers()
    found.features = found.features.flip(0)
    answers()
    with torch.inference_mode():
        found.features = found.features + 1
        answers()
        found.features[:100] -= 5
        answers()
        found.fill(bank[:500])
        answers()
    found.features[0] += 1
    answers()
    found.load_state_dict(bank_of(bank + 1, search).state_dict())
    answers()
    averaged = torch.optim.swa_utils.AveragedModel(Nested(found), use_buffers=True)
    found.features.mul_(0.5)
    averaged.update_parameters(Nested(found))
    check(averaged.module.bank, query) if search == "int8" else averaged(query)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("search", ["torch", "int8", "IVF8,Flat"])
def test_cast(dtype, search):
    bank, query = deep(800, 100)
    found = bank_of(bank, search).to(dtype)
    assert found.features.dtype == dtype
    distance, rows = found(query.to(dtype))
    assert distance.dtype == torch.float32
    at = torch.linalg.vector_norm(query.to(dtype).double() - found.features.double()[rows[:, 0]], dim=1)
    torch.testing.assert_close(distance[:, 0].double(), at, rtol=1e-6, atol=0)
    if search != "IVF8,Flat":
        np.testing.assert_allclose(at, brute_force(found.features, query.to(dtype), 1)[0][:, 0], rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("search", ["torch", "int8", "HNSW16"])
def test_bank_in_half(dtype, search):
    bank, query = deep(1500, 100)
    full = bank_of(bank, search, dtype)
    assert full.features.dtype == getattr(torch, dtype)
    expected, _ = brute_force(full.features, query, 1)
    assert np.mean(np.isclose(full(query)[0].numpy(), expected, rtol=1e-6)) > (0.9 if search == "HNSW16" else 0.999)
    again = MemoryBank(search, dtype)
    again.load_state_dict(full.state_dict())
    assert again.features.dtype == full.features.dtype
    assert torch.equal(again(query)[0], full(query)[0])


def test_default_type_does_not_matter():
    bank, query = deep(800, 100)
    torch.set_default_dtype(torch.float64)
    try:
        found = bank_of(bank, "int8")
        distance, rows = found(query, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.features.dtype == distance.dtype == torch.float32
    assert torch.equal(rows, bank_of(bank, "torch")(query, 2)[1])


def test_no_query_and_emptying():
    bank, _ = deep(300, 20)
    found = MemoryBank()
    found.fill(bank, torch.arange(301.0))
    assert found(torch.empty(0, 96), 2)[0].shape == (0, 2)
    found.fill(torch.empty(0, 0))
    assert found.size == len(found.radii) == 0


def test_bad_input():
    bank, query = made()
    found = MemoryBank()
    with pytest.raises(UserError, match="empty"):
        found(query)
    found.fill(bank)
    with pytest.raises(UserError, match="k must be at least 1, got 0"):
        found(query, 0)
    for few, all_rows in zip(found(query, 401), found(query, 400), strict=True):
        assert torch.equal(few, all_rows)
    with pytest.raises(UserError, match=r"must be \(Q, 24\)"):
        found(query[:, :5])
    with pytest.raises(UserError, match="NaN"):
        found(query * torch.nan)
    with pytest.raises(UserError, match="NaN"):
        found.fill(bank * torch.nan)
    with pytest.raises(UserError, match=r"search must be auto, torch, int8 or an index of faiss .* got 'annoy'"):
        MemoryBank("annoy")
    with pytest.raises(UserError, match=r"reach 1e\+05, too far for torch.float16; use bfloat16"):
        bank_of(torch.full((3, 2), 1e5), "torch", "float16")
    with pytest.raises(UserError, match="bank_dtype must be float32"):
        MemoryBank("torch", "int8")


@pytest.mark.parametrize("search", ["HNSW16", "IVF8,Flat", "IVF8,PQ8x4", "PCA32,SQ8", "Flat"])
def test_approximate(search, caplog):
    bank, query = deep(1500, 200)
    threads = faiss.omp_get_max_threads()
    found = bank_of(bank, search)
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
    assert faiss.omp_get_max_threads() == threads


def test_recall_counts_misses(monkeypatch):
    bank, query = deep(1500, 200)
    monkeypatch.setattr("pl_patchcore.search.approximate._PROBED_LISTS", 1)
    recall = bank_of(bank, "IVF100,Flat").recall(torch.cat([query, bank[:500]]))  # rows of the bank do not count
    assert 0.2 < recall < 0.95
    assert bank_of(bank, "torch").recall(query) == 1


def test_index_travels_with_the_checkpoint(tmp_path, monkeypatch):
    bank, query = deep(1500, 200)
    full = bank_of(bank, "IVF8,PQ8x4")
    torch.save(full.state_dict(), tmp_path / "bank.pt")
    saved = torch.load(tmp_path / "bank.pt", weights_only=True)
    built = []
    monkeypatch.setattr("pl_patchcore.memory_bank.build_index", lambda *a: built.append(a) or full.index)
    same = MemoryBank("IVF8,PQ8x4")
    same.load_state_dict(dict(saved))
    assert torch.equal(same(query, 3)[1], full(query, 3)[1])
    assert not built
    other = MemoryBank("HNSW16")  # another index, none, or one of another size: built anew
    other.load_state_dict(dict(saved))
    same.load_state_dict({name: each for name, each in saved.items() if name != "index"})
    same.load_state_dict(saved | {"features": saved["features"][:900]})
    assert [a[0] for a in built] == ["HNSW16", "IVF8,PQ8x4", "IVF8,PQ8x4"]
    exactly = MemoryBank("torch")
    exactly.load_state_dict(dict(saved))
    check(exactly, query)
    assert not len(exactly.index)


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
        MemoryBank(search).check(dimension, rows)
    MemoryBank("IVF16,PQ8").check(64, 300)
