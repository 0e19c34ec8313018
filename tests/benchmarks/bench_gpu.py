"""Greedy selection and exact search on a GPU: the CPU's results, and how fast. Prints two tables; `make bench`.

Each result is compared with the CPU's, and the benchmark fails where one row differs. Contenders take turns; times are
medians. Yardsticks on the same GPU: for selection, one pick at a time, compiled, and the authors' loop, as in
`bench_coreset.py`, timed over 300 picks and extrapolated; for search, a float32 product with a minimum, in blocks.
"""

import os
import sys
from functools import partial

import measuring
import torch
from bench_coreset import compiled_loop, features_of, official_loop
from bench_search import FAR, bank_and_queries, product
from measuring import SHARED, Call, medians
from rich.console import Console
from rich.table import Table

from pl_patchcore.coreset import greedy_coreset
from pl_patchcore.memory_bank import ExactSearch
from pl_patchcore.numerics import full_precision

TURNS = 5
SCORES = 1 << 26  # of the yardstick's product held at once: as many as search holds on a GPU


def seconds(call: Call) -> float:
    def done() -> None:
        call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return measuring.seconds(done)


def select(table: Table, name: str, features: torch.Tensor, size: int) -> None:
    there = features.cuda()
    if not torch.equal(greedy_coreset(features, size), greedy_coreset(there, size).cpu()):
        sys.exit(f"selection of {size} of {name}: the GPU's picks are not the CPU's.")
    loops = {"compiled": compiled_loop(there) * size, "official": official_loop(there) * size}
    calls = {"CPU": partial(greedy_coreset, features, size), "GPU": partial(greedy_coreset, there, size)}
    taken = medians(calls, TURNS, seconds)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    greedy_coreset(there, size)
    memory = (torch.cuda.max_memory_allocated() - before) / (there.numel() * there.element_size())
    row = [f"{each:.3f}" for each in (taken["CPU"], taken["GPU"], *loops.values())]
    rate = f"{size / taken['GPU']:,.0f}"
    table.add_row(name, f"{size:,}", *row, f"{loops['compiled'] / taken['GPU']:.1f}", rate, f"{memory:.2f}")


def search(table: Table, name: str, bank: torch.Tensor, queries: torch.Tensor) -> None:
    bank_there, there = bank.cuda(), queries.cuda()
    here, on = ExactSearch(bank, "auto"), ExactSearch(bank_there, "auto")
    near = bank_there - bank_there.mean(0)
    norm = near.square().sum(1)
    (distance, found), expected = (each.cpu() for each in on(there, 1)), here(queries, 1)
    if not (torch.equal(found, expected[1]) and torch.allclose(distance, expected[0], rtol=1e-6, atol=0)):
        sys.exit(f"search in {name}: the GPU's neighbours are not the CPU's.")
    contenders: dict[str, Call] = {
        "CPU": partial(here, queries, 1),
        "product": partial(product, there, near, norm, SCORES),
        "GPU": partial(on, there, 1),
    }
    taken = medians(contenders, TURNS, seconds)
    cells = [f"{1e3 * each:,.1f}" for each in taken.values()]
    ratio, rate = f"{taken['product'] / taken['GPU']:.2f}", f"{len(queries) / taken['GPU']:,.0f}"
    table.add_row(name, f"{len(bank):,}", f"{len(queries):,}", *cells, ratio, rate)


def main() -> None:
    if not torch.cuda.is_available():
        print("No GPU that torch can use (CUDA): nothing to measure.")
        return
    seconds_of = (f"{contender}, s" for contender in ("CPU", "GPU", "compiled", "official"))
    selections = Table("rows x 128", "picks", *seconds_of, "compiled / GPU", "picks/s", "memory")
    milliseconds_of = (f"{contender}, ms" for contender in ("CPU", "product", "GPU"))
    searches = Table("features", "bank", "queries", *milliseconds_of, "product / GPU", "queries/s")
    names = ["mixture 20,000", "mixture 94,080", "mixture 600,000"]
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(25_000, 896, generator=g), torch.randn(16 * 784, 896, generator=g)
    sets = {"normal 896": (bank, queries), f"normal 896, {FAR} times as far": (bank, FAR * queries)}
    if SHARED.is_dir():
        names.append("MTD 94,080")
        sets["MTD 896"] = bank_and_queries(896)
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
    console.print("queries/s: of the GPU, whose rows are the CPU's, and distances equal to 1e-6.")


if __name__ == "__main__":
    main()
