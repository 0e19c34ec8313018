"""What a fit takes, by arithmetic with the first batch: main memory, disk; and a refusal of what cannot fit.

Says where the features go. Next: `store.py`, which reserves the space.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pl_patchcore.coreset.bounded import least_chunk_size
from pl_patchcore.errors import UserError
from pl_patchcore.options import StoreOptions

GIB = 2**30  # bytes
_ROW_STATE = 96  # bytes a row that greedy selection keeps beside the row and its copies for products
_BLOCKS = 2**28  # bytes of products and the like, whatever the number of rows
_REMEDIES = (
    "store.kind: disk; store.dtype: float16 or bfloat16; store.selection_memory (greedy selection, within chunks); "
    "store.folder on a larger disk; a smaller coreset_size or coreset_ratio; a larger patches.stride; smaller images; "
    "fewer reference_rotations, where there are any"
)


@dataclass
class StorePlan:
    """Bytes of a fit; `chosen` decides where its features go, `__str__` tells."""

    rows: int  # patch features, N, or an upper bound
    held_out: int  # patch features held out for calibration, in float32
    dimension: int  # numbers in a patch feature, D
    projected: int  # numbers in its projection, d; D where features are not projected, 0 where selection reads none
    bank: int  # rows of the memory bank, M
    store: StoreOptions
    folder: str  # of the file
    available: float  # bytes of main memory, infinite where unknown
    disk: float  # bytes free in the folder
    in_memory: bool = False  # whether the folder itself lies in main memory (tmpfs)
    device: float | None = None  # bytes available on the accelerator that selects; None: the CPU selects

    def __post_init__(self) -> None:
        store, d = self.store, self.projected
        chunk = self.chunk_size = self.rows  # rows that selection works on at once
        if store.selection_memory is not None and d:
            chunk = self.chunk_size = min(chunk, rows_in(store.selection_memory, d))
        self.features = self.dimension * (self.rows * getattr(torch, store.dtype).itemsize + self.held_out * 4)
        self.projections = 4 * self.rows * d if d < self.dimension else 0  # else the selection reads the features
        projected_on_disk = self.projections if store.selection_memory is not None else 0
        self.on_disk = self.features + projected_on_disk if store.kind == "disk" else 0
        selection = 0  # what selection takes beside what is kept
        if d:
            copied = chunk < self.rows or not self.projections or self.device is not None
            row = 4 * d * (3 if copied else 2) + _ROW_STATE
            selection = chunk * row + min(self.bank, chunk) * (4 * d + 16) + _BLOCKS
        self.bank_bytes = 4 * self.bank * self.dimension
        self.working = max(selection, 2 * self.bank_bytes)  # the bank has a copy for search
        kept = self.features + self.projections - (0 if self.in_memory else self.on_disk)
        self.peak = kept + (self.working if self.device is None else max(self.bank_bytes, 4 * chunk * d))

    def lacking(self) -> str:
        """What there is too little of, in words; empty if nothing."""
        if self.peak > self.available:
            place = f"; {self.folder} lies in main memory" if self.in_memory and self.on_disk else ""
            return f"{_size(self.peak)} of main memory needed, {_size(self.available)} available{place}"
        if self.on_disk > self.disk and not self.in_memory:
            return f"{_size(self.on_disk)} of disk needed in {self.folder}, {_size(self.disk)} free"
        if self.device is not None and self.working > self.device:
            return f"{_size(self.working)} of accelerator memory needed, {_size(self.device)} available"
        if self.projected and self.chunk_size < (least := least_chunk_size(self.rows, self.bank)):
            memory, chunk = self.store.selection_memory, self.chunk_size
            return f"store.selection_memory {memory} GiB holds {chunk:,} projected features, two rounds need {least:,}"
        return ""

    def chosen(self) -> StorePlan:
        """This plan with ``auto`` decided: the disk where RAM would take more than half of what is available.

        A plan that does not fit is a `UserError`, with the settings that help.
        """
        plan = self
        if self.store.kind == "auto":
            ram, disk = (replace(self, store=replace(self.store, kind=kind)) for kind in ("ram", "disk"))
            plan = ram if ram.peak <= self.available / 2 or (disk.lacking() and not ram.lacking()) else disk
        if lacking := plan.lacking():
            raise UserError(f"this fit cannot run: {lacking} ({plan}). What helps: {_REMEDIES}. {plan.smaller()}")
        return plan

    def smaller(self) -> str:
        """What fewer patch features or a smaller memory bank would take, in a sentence."""
        fewer = replace(self, rows=self.rows // 4, held_out=self.held_out // 4, bank=self.bank // 4)
        bank = replace(self, bank=self.bank // 10)
        return (
            f"Twice the patches.stride, or half the resize, would take {_size(fewer.peak)} of RAM and "
            f"{_size(fewer.on_disk)} of disk; a tenth of the memory bank {_size(bank.peak)} and {_size(bank.on_disk)}."
        )

    def __str__(self) -> str:
        place = f"on disk in {self.folder}" if self.store.kind == "disk" else "in RAM"
        disk = "disk" if self.on_disk > self.features else "RAM"
        projections = f"their projections {_size(self.projections)} in {disk}, " if self.projections else ""
        return (
            f"{self.rows:,} patch features of {self.dimension} numbers ({self.store.dtype}), {_size(self.features)} "
            f"{place}, {projections}memory bank {self.bank:,} rows, {_size(self.bank_bytes)}, at most "
            f"{_size(self.peak)} of RAM"
        )


def rows_in(gib: float, numbers: int) -> int:
    """Rows of so many numbers that greedy selection can work on in so many GiB.

    Each is there up to four times: as read, centred for products (twice while their type changes), and once picked.
    """
    return int(gib * GIB) // (16 * numbers + _ROW_STATE)


def _size(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number < 100 * GIB else f"{number / GIB:,.0f} GiB"


def lies_in_memory(folder: str) -> bool:
    """Whether a folder's file system is one in main memory (Linux; False where that cannot be told)."""
    mounts = [line.split()[1:3] for line in _lines("/proc/mounts")]
    above = [mount for mount in mounts if Path(folder).resolve().is_relative_to(mount[0])]
    return bool(above) and sorted(above, key=lambda mount: len(mount[0]))[-1][1] in ("tmpfs", "ramfs")


def device_memory(device: torch.device) -> float | None:
    """Bytes available on a CUDA device, its cached blocks included; None for others."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def available_memory() -> float:
    """Bytes of main memory this process can still take, without swap; infinite where that cannot be told.

    The least of what the system has available and what is left to each control group that the process is in (versions 1
    and 2; cached files do not count as taken).
    """
    limits = [*_group_limits()]
    limits += [1024 * int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    if not limits and hasattr(os, "sysconf"):  # not Linux
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return float(max(0, min(limits, default=float("inf"))))


def _group_limits() -> Iterator[int]:
    """Bytes left to each control group, from the process's own up to the root."""
    for line in _lines("/proc/self/cgroup"):
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, most, used, cached = "/sys/fs/cgroup", "memory.max", "memory.current", ""
        if controllers:  # version 1
            root, most, used, cached = f"{root}/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        folder = Path(root + own)
        for place in [folder, *folder.parents]:
            limit, taken = ("".join(_lines(place / name)) for name in (most, used))
            if limit.isdigit() and taken.isdigit():
                stat = dict(line.split() for line in _lines(place / "memory.stat"))
                files = (int(stat.get(cached + name, 0)) for name in ("inactive_file", "active_file"))
                yield int(limit) - int(taken) + sum(files)


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
