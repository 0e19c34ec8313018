"""What a fit takes, by arithmetic before it begins: main memory, disk; and a refusal of what cannot fit.

Reads the size of the data set and of a patch feature, known with the first batch, and what the machine has free.
Returns where the features go. Next: `store.py`, which reserves the space.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from pl_patchcore.coreset.bounded import least_chunk_size
from pl_patchcore.errors import UserError
from pl_patchcore.options import StoreOptions

GIB = 2**30  # bytes
_ROW_STATE = 96  # bytes a row that greedy selection keeps beside the row and its copies for products
_BLOCKS = 2**28  # bytes of products and the like, whatever the number of rows
_REMEDIES = (
    "store.kind: disk; store.dtype: float16 or bfloat16; store.selection_memory (greedy selection, within chunks); "
    "store.folder on a larger disk; a smaller coreset_size or coreset_ratio; a larger patches.stride; smaller images"
)


class Needs(NamedTuple):
    """Bytes of a fit: patch features, projections; on disk; of main memory at the worst; of the device that selects."""

    features: int
    projections: int
    disk: int
    memory: int
    working: int


@dataclass(frozen=True)
class StorePlan:
    """What a fit holds, and what there is; `chosen` decides, `__str__` tells.

    Args:
        rows: Patch features, N, or an upper bound.
        held_out: Patch features held out for calibration, in float32.
        dimension: Numbers in a patch feature, D.
        projected: Numbers in its projection, d; D where features are not projected, 0 where selection reads none.
        bank: Rows of the memory bank, M.
        store: Where the features go.
        folder: Folder of the file.
        available: Bytes of main memory available, infinite where unknown.
        disk: Bytes free in ``folder``.
        in_memory: Whether ``folder`` itself lies in main memory (tmpfs).
        device: Bytes available on the accelerator that selects; None: the CPU selects.
    """

    rows: int
    held_out: int
    dimension: int
    projected: int
    bank: int
    store: StoreOptions
    folder: str
    available: float
    disk: float
    in_memory: bool = False
    device: float | None = None

    @property
    def chunk_size(self) -> int:
        """Rows that selection works on at once."""
        if self.store.selection_memory is None or not self.projected:
            return self.rows
        return min(self.rows, rows_in(self.store.selection_memory, self.projected))

    def needs(self) -> Needs:
        """Bytes that the fit takes."""
        store, chunk, d = self.store, self.chunk_size, self.projected
        features = self.dimension * (self.rows * getattr(torch, store.dtype).itemsize + self.held_out * 4)
        projections = 4 * self.rows * d if d < self.dimension else 0  # else the selection reads the features
        disk = 0
        if store.kind == "disk":
            disk = features + (projections if store.selection_memory is not None else 0)
        selection = 0
        if d:
            copied = chunk < self.rows or not projections or self.device is not None
            row = 4 * d * (3 if copied else 2) + _ROW_STATE
            selection = chunk * row + min(self.bank, chunk) * (4 * d + 16) + _BLOCKS
        bank = 4 * self.bank * self.dimension
        working = max(selection, 2 * bank)  # the bank has a copy for search
        memory = features + projections - (0 if self.in_memory else disk)
        memory += working if self.device is None else max(bank, 4 * chunk * d)
        return Needs(features, projections, disk, memory, working)

    def lacking(self) -> str:
        """What there is too little of, in words; empty if nothing."""
        needs = self.needs()
        if needs.memory > self.available:
            return f"{_size(needs.memory)} of main memory needed, {_size(self.available)} available"
        if needs.disk > self.disk and not self.in_memory:
            return f"{_size(needs.disk)} of disk needed in {self.folder}, {_size(self.disk)} free"
        if self.device is not None and needs.working > self.device:
            return f"{_size(needs.working)} of accelerator memory needed, {_size(self.device)} available"
        if self.projected and self.chunk_size < (least := least_chunk_size(self.rows, self.bank)):
            return (
                f"store.selection_memory {self.store.selection_memory:g} GiB holds {self.chunk_size:,} projected "
                f"features at once, two rounds need {least:,}"
            )
        return ""

    def chosen(self) -> StorePlan:
        """This plan with ``auto`` decided: the disk where main memory would take more than half of what is available.

        Raises:
            UserError: If it does not fit, with the settings that help.
        """
        plan = self
        if self.store.kind == "auto":
            ram, disk = (replace(self, store=replace(self.store, kind=kind)) for kind in ("ram", "disk"))
            small = ram.needs().memory <= self.available / 2
            plan = ram if small or (disk.lacking() and not ram.lacking()) else disk
        if not (lacking := plan.lacking()):
            return plan
        if plan.in_memory and plan.store.kind == "disk":
            lacking += f", and {plan.folder} lies in main memory"
        raise UserError(f"this fit cannot run: {lacking} ({plan}). What helps: {_REMEDIES}.")

    def __str__(self) -> str:
        needs, on_disk = self.needs(), self.store.kind == "disk"
        text = f"{self.rows:,} patch features of {self.dimension} numbers ({self.store.dtype}), {_size(needs.features)} "
        text += f"on disk in {self.folder}, " if on_disk else "in RAM, "
        if needs.projections:
            place = "disk" if needs.disk > needs.features else "RAM"
            text += f"their projections {_size(needs.projections)} in {place}, "
        bank = 4 * self.bank * self.dimension
        return f"{text}memory bank {self.bank:,} rows, {_size(bank)}, at most {_size(needs.memory)} of RAM"


def rows_in(gib: float, numbers: int) -> int:
    """Rows of so many numbers that greedy selection can work on in so many GiB.

    Each is there up to four times: as read, centred for products (twice while their type changes), and once picked.
    """
    return int(gib * GIB) // (16 * numbers + _ROW_STATE)


def _size(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number < 100 * GIB else f"{number / GIB:,.0f} GiB"


def store_folder(folder: str | None) -> str:
    """Folder of the store's file: ``folder``, or the system's for temporary files.

    Raises:
        UserError: If there is no such folder.
    """
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"store.folder {folder}: no such folder; make it, or leave store.folder out.")
    return folder or tempfile.gettempdir()


def lies_in_memory(folder: str) -> bool:
    """Whether a folder's file system is one in main memory (Linux; False where that cannot be told)."""
    best, kind = "", ""
    for line in _lines("/proc/mounts"):
        _, place, name, *_ = line.split()
        if Path(folder).resolve().is_relative_to(place) and len(place) >= len(best):
            best, kind = place, name
    return kind in ("tmpfs", "ramfs")


def device_memory(device: torch.device) -> float | None:
    """Bytes available on a CUDA device, its cached blocks included; None for others."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def available_memory() -> float:
    """Bytes of main memory this process can still take, without swap; infinite where that cannot be told.

    The least of: what the system has available, what is left to each control group the process is in (versions 1 and
    2; cached files do not count as taken), and to the process's own limits of data and address space.
    """
    limits = [*_group_limits(), *_process_limits()]
    if "MemAvailable" in (meminfo := _kilobytes("/proc/meminfo")):
        limits.append(1024 * meminfo["MemAvailable"])
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        name = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        limits.append(os.sysconf(name) * os.sysconf("SC_PAGE_SIZE"))
    return float(max(0, min(limits, default=float("inf"))))


def _group_limits() -> Iterator[int]:
    """Bytes left to each control group, from the process's own up to the root."""
    for line in _lines("/proc/self/cgroup"):
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, most, used, cached = Path("/sys/fs/cgroup"), "memory.max", "memory.current", ""
        if controllers:  # version 1
            root, most, used, cached = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        folder = root / own.lstrip("/")
        for place in [folder, *folder.parents]:
            limit, taken = ("".join(_lines(place / name)) for name in (most, used))
            if place.is_relative_to(root) and limit.isdigit() and taken.isdigit():
                stat = dict(line.split() for line in _lines(place / "memory.stat"))
                files = sum(int(stat.get(cached + name, 0)) for name in ("inactive_file", "active_file"))
                yield int(limit) - int(taken) + files


def _process_limits() -> Iterator[int]:
    """Bytes left of ``ulimit -d`` and ``ulimit -v``."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    status = _kilobytes("/proc/self/status")
    for limit, name in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and name in status:
            yield soft - 1024 * status[name]


def _kilobytes(path: str) -> dict[str, int]:
    """Lines such as ``VmData: 1000 kB``."""
    lines = (line.split() for line in _lines(path))
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1] == "kB"}


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
