"""The feature store: rates measured here, and the bytes of a fit at full size. Prints tables; `make bench`.

Full size is the Shanghai videos' training set at 55,000 frames: 1,024 patches of layers 2 and 3 of a wide ResNet-50
(frames of 256 pixels), or 256 of layers 3 and 4. Such a fit was not run: its rows are arithmetic (`StorePlan`).
"""

import sys
import tempfile
import time
from functools import partial
from itertools import product
from timeit import timeit

import torch
from measuring import machine, memory, seconds
from rich.console import Console
from rich.table import Table

from pl_patchcore.coreset import greedy_coreset, random_projection
from pl_patchcore.coreset.bounded import bounded_coreset, least_chunk_size
from pl_patchcore.coreset.plan import GIB, StorePlan
from pl_patchcore.coreset.store import FeatureStore
from pl_patchcore.options import StoreDtype, StoreOptions

IMAGES, PATCHES, D = 400, 1024, 1536  # 2.3 GiB in float32
SETS = {"layers 2+3": (1024, 1536), "layers 3+4": (256, 3072)}


def rates(console: Console, folder: str) -> None:
    """Bytes a second written and read, rows a second projected."""
    batch = torch.rand(4, 32, 32, D)
    table = Table("store", "dtype", "write, GiB/s", "read 1 % of the rows, s", "resident memory taken, MiB")
    for place in (None, folder):
        for dtype in (torch.float32, torch.bfloat16):
            before = memory()
            store = FeatureStore(D, IMAGES * PATCHES, folder=place, dtype=dtype)
            size, began = IMAGES * PATCHES * D * dtype.itemsize, time.perf_counter()
            for first in range(0, IMAGES, 4):
                for number, patches in enumerate(batch.flatten(1, 2), first):
                    store.add(patches, number)
            rate = size / (time.perf_counter() - began) / GIB
            taken = (memory() - before) / 2**20
            read = seconds(partial(store.take, torch.randperm(len(store))[: len(store) // 100]))
            names = "RAM" if place is None else "disk", str(dtype).removeprefix("torch.")
            table.add_row(*names, f"{rate:.2f}", f"{read:.2f}", f"{taken:.0f}")
            store.close()
    console.print(table)
    matrix, image = random_projection(D, 128, 0), batch[0].flatten(0, 1)
    assert matrix is not None  # None is for features of 128 dimensions or fewer
    rate = 30 * PATCHES / timeit(lambda: image @ matrix, number=30)
    console.print(f"projection to 128: {rate:,.0f} rows of {D} a second")


def selection(console: Console, rows: int = 40_000, size: int = 400) -> None:
    """Exact selection against the bounded one with as few rows at once as it takes."""
    g = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(200, 128, generator=g)
    points = centres[torch.randint(200, (rows,), generator=g)] + torch.randn(rows, 128, generator=g) * 0.3
    start = time.perf_counter()
    exact = greedy_coreset(points, size)
    middle = time.perf_counter()
    chunk_size = least_chunk_size(rows, size)
    picks, bound = bounded_coreset(lambda part: points[part], rows, size, chunk_size)
    end = time.perf_counter()
    radii = [max(float(torch.cdist(p, points[k]).amin(1).max()) for p in points.split(4096)) for k in (exact, picks)]
    console.print(
        f"{size} of {rows:,} rows x 128: exact {middle - start:.1f} s, "
        f"{chunk_size:,} rows at once {end - middle:.1f} s; "
        f"radius {radii[1] / radii[0]:.3f} of exact, promised {bound / radii[0]:.2f}"
    )


def paper(console: Console) -> None:
    """What a full fit would take, by arithmetic."""
    table = Table("55,000 frames, by arithmetic", "dtype", "bank", "selection", "disk, GiB", "RAM at most, GiB")
    dtypes: tuple[StoreDtype, ...] = ("float32", "float16")
    for (name, (patches, numbers)), share, dtype, bounded in product(SETS.items(), (0.01, 0.1), dtypes, (False, True)):
        rows = 55_000 * patches
        bank = int(share * rows)
        gib = least_chunk_size(rows, bank) * 1.01 * (16 * 128 + 96) / GIB if bounded else None
        plan = StorePlan(rows, 0, numbers, 128, bank, StoreOptions("disk", None, dtype, gib), "", 1e15, 1e15)
        selection = "exact" if gib is None else f"bounded, {gib:.1f} GiB"
        table.add_row(name, dtype, f"{bank:,}", selection, f"{plan.on_disk / GIB:,.0f}", f"{plan.peak / GIB:.0f}")
    console.print(table)


def main(folder: str = tempfile.gettempdir()) -> None:
    console = Console(width=170)
    console.print(machine())
    rates(console, folder)
    selection(console)
    paper(console)


if __name__ == "__main__":
    main(*sys.argv[1:])
