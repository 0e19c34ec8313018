"""Nearest neighbours: each exact way against faiss and a plain float32 product. Prints a table; `make bench`.

    python tests/benchmarks/bench_search.py [part of the name of a set]

The yardstick is the faster of `faiss.IndexFlatL2` and a float32 product with a minimum, in blocks. Contenders take
turns, to and fro, so that other load on the machine meets all alike; times are medians, and so is the ratio of a turn,
with the least and the largest beside it. Features are those of MobileNetV2 on Magnetic Tile Defects (7 layers, 896
dimensions; all 18 blocks, 1536), a normal distribution without directions, and the same with queries far from all rows:
so far that one digit hides which is nearest, and so far that any rounding does, which leaves no filter anything to rule
out.
"""

import logging
import os
import re
import sys
from functools import partial
from pathlib import Path
from statistics import median

import faiss
import torch
from measuring import SHARED, Call, patch_features, seconds, tiles
from rich.console import Console
from rich.table import Table

from pl_patchcore.coreset import greedy_coreset, random_projection
from pl_patchcore.memory_bank import ExactSearch

WAYS = ("torch", "int8")
LAYERS = {896: (6, 8, 10, 13, 15, 16, 17), 1536: (6, *(i for i in range(18) if i != 6))}
IMAGES, TEST_IMAGES, TURNS, TURNS_OF_ALL = 36, 4, 5, 3  # in most turns, only what is compared
FAR, TOO_FAR = 30, 1000  # times as far from the mean as the rows of the bank


def bank_and_queries(dimension: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch features of training tiles, and of some test tiles of all kinds."""
    data, layers = tiles(), [f"features.{i}" for i in LAYERS[dimension]]
    train, test = (
        patch_features((part[int(i)] for i in torch.linspace(0, len(part) - 1, images)), layers)
        for part, images in ((data.train_set, IMAGES), (data.test_set, TEST_IMAGES))
    )
    return train, test


def product(queries: torch.Tensor, bank: torch.Tensor, norm: torch.Tensor, scores: int = 1 << 23) -> torch.Tensor:
    parts = queries.split(max(1, scores // len(bank)))
    return torch.cat([torch.addmm(norm, part, bank.T, alpha=-2).min(1).indices for part in parts])


def compare(table: Table, name: str, bank: torch.Tensor, queries: torch.Tensor) -> None:
    mean = bank.mean(0)
    near, centred = bank - mean, queries - mean
    norm = near.square().sum(1)
    contenders: dict[str, Call] = {
        "IndexFlatL2": lambda: faiss.knn(centred.numpy(), near.numpy(), 1),
        "product": lambda: product(centred, near, norm),
        **{way: partial(ExactSearch(bank, way), queries, 1) for way in WAYS},
    }
    auto = ExactSearch(bank, "auto")
    contenders["auto"] = partial(auto, queries, 1)
    for call in contenders.values():
        call()
    taken: dict[str, list[float]] = {contender: [] for contender in contenders}
    compared = ("IndexFlatL2", "auto", "product")
    for turn in range(TURNS):
        for contender in (*(WAYS if turn < TURNS_OF_ALL else ()), *compared[:: 1 if turn % 2 else -1]):
            taken[contender].append(seconds(contenders[contender]))
    typical = {contender: median(each) for contender, each in taken.items()}
    yardstick = min(("IndexFlatL2", "product"), key=lambda contender: typical[contender])
    ratios = [theirs / ours for theirs, ours in zip(taken[yardstick], taken["auto"], strict=True)]
    cells = [f"{1e3 * typical[contender]:,.0f}" for contender in contenders]
    chosen = "torch" if auto.filter is None else "int8"
    ratio = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    table.add_row(name, f"{len(bank):,}", f"{len(queries):,}", *cells, chosen, ratio)


def main(wanted: str = "") -> None:
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("pl_patchcore.memory_bank").setLevel(logging.INFO)
    faiss.omp_set_num_threads(torch.get_num_threads())
    columns = ("IndexFlatL2", "product", *WAYS, "auto")
    table = Table("features", "bank", "queries", *(f"{c}, ms" for c in columns), "chosen", "yardstick / auto")
    sets = {}
    if SHARED.is_dir():
        for dimension in LAYERS:
            if wanted and not any(wanted in f"MTD {dimension}, {rows}" for rows in ("greedy", "random")):
                continue
            train, test = bank_and_queries(dimension)
            matrix = random_projection(dimension, 128, 0)
            assert matrix is not None  # None is for features of 128 dimensions or fewer
            greedy = greedy_coreset(train @ matrix, 10_000)
            drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:25_000]
            sets[f"MTD {dimension}, greedy"] = train[greedy], test
            sets[f"MTD {dimension}, random"] = train[drawn], test
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(10_000, 896, generator=g), torch.randn(TEST_IMAGES * 784, 896, generator=g)
    sets |= {
        "normal 896": (bank, queries),
        f"normal 896, {FAR} times as far": (bank, FAR * queries),
        f"normal 896, {TOO_FAR} times as far": (bank, TOO_FAR * queries),
    }
    for name, (bank, queries) in sets.items():
        if wanted in name:
            compare(table, name, bank, queries[:: len(queries) // 784])
            compare(table, name, bank, queries)
    told = Path("/proc/cpuinfo").read_text()
    cpu = re.search("model name.*: (.*)", told)
    fast = [flag for flag in ("avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8") if flag in told]
    console = Console(width=220)
    console.print(f"{cpu and cpu[1]} ({', '.join(fast)}), {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    console.print(f"torch {torch.__version__}, faiss {faiss.__version__}")
    console.print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
