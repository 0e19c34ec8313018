"""Greedy selection: blocks against one pick at a time. Prints a table; `make bench`.

Yardsticks, each timed over 300 picks (their cost a pick does not change) and extrapolated:

- compiled: the best such a loop can do. `torch.compile` fuses the differences, their squares and sum, and the minimum
  into one pass over the rows, without a temporary, for rows of this very shape. It waits for memory, blocks wait for
  products, and a busy machine slows these by different shares: so both are timed in turns, and medians compared.
- official: the authors' loop, re-created from its description: product, square root, two columns, minimum.
- anomalib: `KCenterGreedy` as installed (skipped where it is not), on the same projected rows. Much of its time is page
  faults of an N x d temporary a pick; "tuned" is the same with an allocator that keeps its memory, which with 600,000
  rows takes more than 20 GB and is left out there.

Rows: real patch features of Magnetic Tile Defects, and a random mixture.
"""

import json
import sys
import tempfile
import threading
import time
from statistics import median

import torch
from measuring import SHARED, Call, apart, machine, memory, patch_features, seconds, tiles
from rich.console import Console
from rich.table import Table

from pl_patchcore.coreset import greedy_coreset
from pl_patchcore.coreset.distance_bounds import product_type

PICKS = 300
TURNS = 5
MANY = 200_000  # rows, above which only 1 % is picked, and "tuned" is left out
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_TOP_PAD_": str(1 << 28)}


def mixture(rows: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(200, 128, generator=g)
    scale = torch.linspace(1, 0.05, 128) * torch.rand(rows, 1, generator=g)
    return centres[torch.randint(200, (rows,), generator=g)] + torch.randn(rows, 128, generator=g) * scale


@torch.compile(dynamic=False)
def _fused(features: torch.Tensor, centre: torch.Tensor, gap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gap = torch.minimum(gap, (features - centre).square().sum(1))
    return gap, gap.argmax()


def compiled_loop(features: torch.Tensor) -> float:
    """Seconds a pick."""
    gap, pick = features.new_full((len(features),), torch.inf), torch.tensor(0, device=features.device)
    gap, pick = _fused(features, features[pick], gap)  # compiles
    int(pick)  # on a GPU, when it is done
    start = time.perf_counter()
    for _ in range(PICKS):
        gap, pick = _fused(features, features[pick], gap)
    int(pick)
    return (time.perf_counter() - start) / PICKS


def official_loop(features: torch.Tensor) -> float:
    """Seconds a pick."""
    norm, gap, pick = features.square().sum(1, keepdim=True), features.new_full((len(features), 1), torch.inf), 0
    start = time.perf_counter()
    for _ in range(PICKS):
        centre = features[pick : pick + 1]
        distance = (-2 * features @ centre.T + norm + norm[pick]).clamp(0).sqrt()
        gap = torch.cat([gap, distance], dim=1).min(1, keepdim=True).values
        pick = int(gap.argmax())
    return (time.perf_counter() - start) / PICKS


def anomalib_loop(features: torch.Tensor) -> float | None:
    """Seconds a pick."""
    try:
        from anomalib.models.components.sampling.k_center_greedy import KCenterGreedy
    except ImportError as error:
        if error.name != "anomalib":  # installed, but something that it needs is not
            raise
        return None
    sampler = KCenterGreedy(features[:, None], (PICKS + 1.5) / len(features))  # three dimensions: not projected
    start = time.perf_counter()
    sampler.select_coreset_idxs()
    return (time.perf_counter() - start) / PICKS


def extra_memory(features: torch.Tensor) -> float:
    """Peak memory of a selection of 1 % above what was there, as a multiple of the features' bytes."""
    greedy_coreset(features[:20_000].clone(), 200)
    product_type(features.shape[1], 1 << 40, features.device)  # what libraries set aside once, bf16 products too
    size = len(features) // 100
    return peak_memory(lambda: greedy_coreset(features, size)) / (features.numel() * features.element_size())


def peak_memory(call: Call) -> int:
    """Most bytes that this process takes during a call above those before it.

    Pages of libraries' files, which come and go as the system likes, are not counted.
    """
    before, most, done = memory("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, memory("RssAnon") - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return max(most, memory("RssAnon") - before)


def features_of(name: str) -> torch.Tensor:
    kind, rows = name.split()
    number = int(rows.replace(",", ""))
    if kind != "MTD":
        return mixture(number)
    data = tiles()
    return patch_features(data.train_set[i] for i in range(-(-number // 784)))[:number]


def in_turns(features: torch.Tensor, size: int) -> tuple[list[float], list[float]]:
    """Seconds of blocks, and of the compiled loop, in each turn."""
    blocks, compiled = [], []
    for _ in range(TURNS):
        compiled.append(compiled_loop(features) * size)
        blocks.append(seconds(lambda: greedy_coreset(features, size)))
    return blocks, compiled


def main() -> None:
    names = ["mixture 20,000", "mixture 94,080", "mixture 600,000"]
    if SHARED.is_dir():
        names += ["MTD 94,080", "MTD 596,624"]
    yardsticks = ("compiled", "official", "anomalib", "tuned")
    table = Table("rows x 128", "share", "picks", "blocks, s", *(f"{name}, s (times)" for name in yardsticks), "memory")
    for name in names:
        features = features_of(name)
        others = [official_loop(features), anomalib_loop(features)]
        with tempfile.TemporaryDirectory() as folder:
            torch.save(features, f"{folder}/rows.pt")
            small = len(features) <= MANY
            rows = f"{folder}/rows.pt"
            others.append(json.loads(apart(__file__, "anomalib", rows, **KEEP)[-1]) if small else None)
            extra = json.loads(apart(__file__, "memory", rows)[-1])
        for share in (0.01, 0.1, 0.25) if small else (0.01,):
            size = int(share * len(features))
            turns, compiled = in_turns(features, size)
            blocks, ratios = median(turns), [c / b for b, c in zip(turns, compiled, strict=True)]
            loop = median(compiled)
            times = [f"{loop:.1f} ({loop / blocks:.1f}; {min(ratios):.1f} to {max(ratios):.1f})"]
            times += ["–" if a is None else f"{a * size:.1f} ({a * size / blocks:.0f})" for a in others]
            table.add_row(name, f"{share:.0%}", f"{size:,}", f"{blocks:.2f}", *times, f"{extra:.2f}")
    console = Console(width=160)
    console.print(machine())
    console.print(table)
    console.print(f"Loops are timed over {PICKS} picks and extrapolated; blocks and the compiled loop: {TURNS} turns,")
    console.print("of which medians, and the least and largest ratio. memory: peak extra, in multiples of the rows.")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["anomalib", path]:
            print(json.dumps(anomalib_loop(torch.load(path))))
        case ["memory", path]:
            print(json.dumps(extra_memory(torch.load(path))))
        case _:
            main()
