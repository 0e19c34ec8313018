"""Selection among the rows of several processes: time, what is exchanged, memory. `make bench`.

    python tests/benchmarks/bench_processes.py [rows]

Each process holds an equal share of one random mixture, 128 dimensions, and computes with one thread; they speak by
gloo on one machine, so that more processes than cores wait for each other. The picks are compared with those of one
process. Bytes are what one process puts into the selection's collectives; Lightning's own, one a training batch, come
on top. Memory is the peak of one process above its shard, in multiples of the rows of all.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp
from bench_coreset import mixture
from rich.console import Console
from rich.table import Table
from torch import distributed as dist

from pl_patchcore.coreset import select_coreset
from pl_patchcore.coreset_shared import select_shared_coreset
from pl_patchcore.distributed import Processes

SHARES = (0.01, 0.1)


def kilobytes(name: str) -> int:
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0])


def work(rank: int, count: int, rows: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if count > 1:
        dist.init_process_group("gloo", f"file://{folder}/meeting{count}", rank=rank, world_size=count)
    numbers = torch.arange(rank, rows, count)
    own = mixture(rows)[numbers].clone()
    select_coreset(own[:20_000], 200)  # what libraries set aside once
    for share in SHARES:
        size, processes = int(share * rows), Processes()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, start = kilobytes("VmRSS"), time.perf_counter()
        alone = count == 1
        selection = select_coreset(own, size) if alone else select_shared_coreset(own, numbers, size, processes)
        seconds, peak = time.perf_counter() - start, kilobytes("VmHWM") - before
        if rank == 0:
            measured = [seconds, processes.collectives, processes.bytes, peak * 1024]
            torch.save([torch.tensor(measured, dtype=torch.float64), selection.rows], f"{folder}/{count} {share}.pt")


def main(rows: int) -> None:
    console = Console(width=120)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    console.print(f"{os.cpu_count()} cores, one thread a process, torch {torch.__version__}, load before {load}")
    table = Table("rows", "picks", "processes", "seconds", "times faster", "collectives", "MB sent", "memory", "picks")
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2, 4):
            mp.spawn(work, (count, rows, folder), nprocs=count)
        for share in SHARES:
            alone, expected = torch.load(f"{folder}/1 {share}.pt")
            for count in (1, 2, 4):
                measured, picks = torch.load(f"{folder}/{count} {share}.pt")
                seconds, collectives, sent, peak = measured.tolist()
                table.add_row(
                    f"{rows:,}",
                    f"{len(picks):,}",
                    str(count),
                    f"{seconds:.2f}",
                    f"{alone[0] / seconds:.2f}",
                    f"{collectives:.0f}",
                    f"{sent / 1e6:.1f}",
                    f"{peak / (rows * 512):.2f}",
                    "same" if torch.equal(picks, expected) else "DIFFERENT",
                )
    console.print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300_000)
