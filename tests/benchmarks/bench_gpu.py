"""Greedy selection and exact search on a GPU: the CPU's results, and how fast. Prints two tables; `make bench`.

Each result is compared with the CPU's, and the benchmark fails where one row differs. Contenders take turns; times are
medians. Yardsticks on the same GPU: for selection, one pick at a time, compiled, and the authors' loop, as in
`bench_coreset.py`, timed over 300 picks and extrapolated; for search, a float32 product with a minimum, in blocks.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from bench_coreset import SHARED, compiled_loop, features_of, official_loop
from bench_search import FAR, product
from bench_search import tiles as tiles_and_tests
from pl_patchcore.exact_search import WAYS, ExactSearch
from rich.console import Console
from rich.table import Table

from pl_patchcore.coreset import greedy_coreset
from pl_patchcore.numerics import full_precision

TURNS = 5
SCORES = 1 << 26  # of the yardstick's product held at once: as many as search holds on a GPU
ON_GPU = tuple(way for way in WAYS if way != "faiss")


def seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each."""
    for call in contenders.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(TURNS):
        for name, call in contenders.items():
            taken[name].append(seconds(call))
    return {name: median(each) for name, each in taken.items()}


def select(table: Table, name: str, features: torch.Tensor, size: int) -> None:
    there = features.cuda()
    if not torch.equal(greedy_coreset(features, size), greedy_coreset(there, size).cpu()):
        sys.exit(f"selection of {size} of {name}: the GPU's picks are not the CPU's.")
    loops = {"compiled": compiled_loop(there) * size, "official": official_loop(there) * size}
    taken = in_turns({"CPU": partial(greedy_coreset, features, size), "GPU": partial(greedy_coreset, there, size)})
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    greedy_coreset(there, size)
    memory = (torch.cuda.max_memory_allocated() - before) / (there.numel() * there.element_size())
    row = [f"{each:.3f}" for each in (taken["CPU"], taken["GPU"], *loops.values())]
    rate = f"{size / taken['GPU']:,.0f}"
    table.add_row(name, f"{size:,}", *row, f"{loops['compiled'] / taken['GPU']:.1f}", rate, f"{memory:.2f}")


def search(table: Table, name: str, bank: torch.Tensor, queries: torch.Tensor) -> None:
    here, on = ExactSearch(bank), ExactSearch(bank.cuda())
    there = queries.cuda()
    near, norm = on.near[: len(bank)], on.norm[: len(bank)]
    expected = here(queries, 1, "auto")
    contenders: dict[str, Callable[[], object]] = {
        "CPU": partial(here, queries, 1, "auto"),
        "product": lambda: product(there, near, norm, SCORES),
        **{way: partial(on, there, 1, way) for way in ON_GPU},
    }
    for way in ON_GPU:
        distance, found = (each.cpu() for each in on(there, 1, way))
        if not (torch.equal(found, expected[1]) and torch.allclose(distance, expected[0], rtol=1e-6, atol=0)):
            sys.exit(f"search in {name} by {way}: the GPU's neighbours are not the CPU's.")
    taken = in_turns(contenders)
    cells = [f"{1e3 * each:,.1f}" for each in taken.values()]
    rate = f"{len(queries) / taken['torch']:,.0f}"
    ratio = f"{taken['product'] / taken['torch']:.2f}"
    table.add_row(name, f"{len(bank):,}", f"{len(queries):,}", *cells, ratio, rate)


def main() -> None:
    if not torch.cuda.is_available():
        print("No GPU that torch can use (CUDA): nothing to measure.")
        return
    columns = ("CPU, s", "GPU, s", "compiled, s", "official, s", "compiled / GPU", "picks/s", "memory")
    selections = Table("rows x 128", "picks", *columns)
    ways = (f"{contender}, ms" for contender in ("CPU", "product", *ON_GPU))
    searches = Table("features", "bank", "queries", *ways, "product / torch", "queries/s")
    names = ["mixture 20,000", "mixture 94,080", "mixture 600,000"]
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(25_000, 896, generator=g), torch.randn(16 * 784, 896, generator=g)
    sets = {"normal 896": (bank, queries), f"normal 896, {FAR} times as far": (bank, FAR * queries)}
    if SHARED.is_dir():
        names.append("MTD 94,080")
        sets["MTD 896"] = tiles_and_tests(896)
    with full_precision(torch.device("cuda")):
        for name in names:
            features = features_of(name)
            shares = {20_000: (0.01,), 600_000: (0.01,)}.get(len(features), (0.01, 0.1, 0.25))
            for share in shares:
                select(selections, name, features, int(share * len(features)))
        for name, (bank, queries) in sets.items():
            drawn = torch.randperm(len(bank), generator=g)[:25_000]
            for rows in (drawn[:10_000], drawn):
                search(searches, name, bank[rows], queries[:: len(queries) // 784])
                search(searches, name, bank[rows], queries)
    console = Console(width=180)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {os.cpu_count()} cores")
    console.print(selections)
    console.print("memory: peak extra on the GPU, in multiples of the rows.")
    console.print(searches)
    console.print("queries/s: by torch, which auto takes on a GPU. Rows of all are the CPU's, distances equal to 1e-6.")


if __name__ == "__main__":
    main()
