"""Selection among the rows of several processes: time, what is exchanged, memory. `make bench`.

    python tests/benchmarks/bench_processes.py [rows]

Each process holds an equal share of one random mixture, 128 dimensions, and computes with one thread; they speak by
gloo on one machine, so that more processes than cores wait for each other. Numbers of processes take turns, and the
fastest of theirs counts; in a turn before, a thread watches memory. The picks are compared with those of one process.
Bytes are what process 0, which puts in most, puts into the selection's collectives; Lightning's own, one a training
batch, come on top. The peak is the most memory that any process takes, its shard included, libraries not.
"""

import os
import sys
import tempfile
from functools import partial
from itertools import product
from math import inf
from typing import Any

import torch
from bench_coreset import mixture, peak_memory
from measuring import machine, seconds
from rich.console import Console
from rich.table import Table
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn

from pl_patchcore.coreset import Selection, select_coreset
from pl_patchcore.coreset.shared import select_shared_coreset
from pl_patchcore.distributed import Processes

TURNS, SHARES, COUNTS = 3, (0.01, 0.1), (1, 2, 4)


def bytes_sent(rank: int) -> list[int]:
    """A list that grows with each collective of tensors from now on, by the bytes that this process puts in."""
    sizes: list[int] = []

    def counted(call: Any, tensor: torch.Tensor, *rest: Any) -> None:
        sent = rank == 0 or call.__name__ != "broadcast"
        sizes.append(tensor.numel() * tensor.element_size() if sent else 0)
        call(tensor, *rest)

    for name in ("gather", "broadcast"):
        setattr(dist, name, partial(counted, getattr(dist, name)))
    return sizes


def work(rank: int, count: int, share: float, watched: bool, folder: str, meeting: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if count > 1:
        dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=count)
    shards = [torch.load(f"{folder}/{count} {part}.pt", mmap=True) for part in range(count)]
    rows, processes = sum(len(shard) for shard in shards), Processes()
    select_coreset(shards[0][:20_000].clone(), 200)  # what libraries set aside once
    own, numbers = shards[rank].clone(), torch.arange(rank, rows, count)
    processes.objects(None)  # none starts before all are here
    sizes = bytes_sent(rank)
    size, found = int(share * rows), list[Selection]()

    def select() -> None:
        shared = count > 1
        found.append(select_shared_coreset(own, numbers, size, processes) if shared else select_coreset(own, size))

    taken, extra = (inf, peak_memory(select)) if watched else (seconds(select), inf)
    exchanged = len(sizes), sum(sizes)
    (peak,) = processes.largest(extra + own.numel() * own.element_size())
    if rank == 0:
        torch.save([torch.tensor([taken, peak, *exchanged], dtype=torch.float64), found[0].rows], f"{folder}/found.pt")
    if count > 1:
        dist.barrier()
        dist.destroy_process_group()


def main(rows: int) -> None:
    console = Console(width=120)
    console.print(machine("one thread a process", load=True))
    columns = ("seconds", "times faster", "collectives", "MB sent", "peak, MB", "same picks")
    table = Table("rows", "picks", "processes", *columns)
    with tempfile.TemporaryDirectory() as folder:
        features = mixture(rows)
        for count in COUNTS:
            for rank in range(count):
                torch.save(features[rank::count].clone(), f"{folder}/{count} {rank}.pt")
        found: dict[tuple[float, int], tuple[torch.Tensor, torch.Tensor]] = {}
        for turn, share, count in product(range(TURNS + 1), SHARES, COUNTS):
            spawn(work, (count, share, turn == 0, folder, f"{folder}/meeting {turn} {share} {count}"), nprocs=count)
            measured, picks = torch.load(f"{folder}/found.pt")
            best, _ = found.setdefault((share, count), (measured, picks))
            found[share, count] = torch.minimum(measured, best), picks
    for (share, count), (measured, picks) in found.items():
        alone, expected = found[share, 1]
        taken, peak, collectives, sent = measured.tolist()
        times = f"{taken:.2f}", f"{alone[0] / taken:.2f}"
        cells = f"{collectives:.0f}", f"{sent / 1e6:.1f}", f"{peak / 1e6:.0f}"
        same = "yes" if torch.equal(picks, expected) else "NO"
        table.add_row(f"{rows:,}", f"{len(picks):,}", str(count), *times, *cells, same)
    console.print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300_000)
