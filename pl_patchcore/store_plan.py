"""What a fit will take, told before it begins: main memory, disk, time; and a refusal of what cannot fit.

Reads the size of the data set and of a patch feature, known with the first batch, and what the machine has free.
Returns where the features go. Next: `feature_store.py`, which reserves the space.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from pl_patchcore.coreset_bounded import least_at_once
from pl_patchcore.distance_bounds import DistanceBounds, product_type
from pl_patchcore.errors import UserError
from pl_patchcore.numerics import full_precision

StoreKind = Literal["auto", "ram", "disk"]
StoreDtype = Literal["float32", "float16", "bfloat16"]

GIB = 2**30
SHARE = 0.5  # of the memory available: what "auto" lets a fit take before it turns to the disk
_ROW_STATE = 96  # bytes a row that greedy selection keeps beside the row and its copies for products
_WORK = 2**28  # bytes of blocks, whatever the size
_EVALUATED = 0.75  # of N M distances, those that greedy selection evaluates
_EXTRA = 3000  # picks whose distances take as long as what is done once for each row
_PICK = 5e-5  # seconds a pick, beside its distances


def at_once_in(gib: float, numbers: int) -> int:
    """Rows of ``numbers`` that greedy selection can work on in so many GiB."""
    return int(gib * GIB) // _row_bytes(numbers)


def _row_bytes(numbers: int) -> int:
    return (
        16 * numbers + _ROW_STATE
    )  # the row, its copy for products, a second one if their type changes, one once picked


@dataclasses.dataclass(frozen=True)
class StorePlan:
    """Bytes and seconds of a fit, by arithmetic; `chosen` decides, `__str__` tells.

    Args:
        rows: Patch features, N, or an upper bound.
        held_out: Patch features kept apart for calibration, in float32.
        dimension: Numbers in a patch feature, D.
        projected: Numbers in its projection, d; D where features are not projected, 0 where selection reads none.
        bank: Rows of the memory bank, M.
        store: Where the features go.
        folder: Folder of the file.
        dtype: What features are rounded to.
        selection_memory: GiB that selection may take; None: what exact selection takes.
        available: Bytes of main memory available, infinite where unknown.
        disk: Bytes free in ``folder``.
        in_memory: Whether ``folder`` itself lies in main memory (tmpfs).
        device: Bytes available on the accelerator that selects; None: the CPU selects.
        bounds: Whether the selection has a variant of bounded memory: the greedy one.
    """

    rows: int
    held_out: int
    dimension: int
    projected: int
    bank: int
    store: StoreKind
    folder: str
    dtype: torch.dtype
    selection_memory: float | None
    available: float
    disk: float
    in_memory: bool
    device: float | None = None
    bounds: bool = True

    @property
    def features(self) -> int:
        """Bytes of all patch features."""
        return self.dimension * (self.rows * self.dtype.itemsize + self.held_out * 4)

    @property
    def projections(self) -> int:
        """Bytes of the projections; none where the selection reads the features themselves."""
        return self.rows * self.projected * 4 if self.projected < self.dimension else 0

    @property
    def on_disk(self) -> int:
        """Bytes on disk."""
        if self.store != "disk":
            return 0
        return self.features + (self.projections if self.selection_memory is not None else 0)

    @property
    def at_once(self) -> int:
        """Rows that selection works on at once."""
        if self.selection_memory is None or not self.projected:
            return self.rows
        return min(self.rows, at_once_in(self.selection_memory, self.projected))

    @property
    def kept(self) -> int:
        """Bytes of features and projections in main memory."""
        everywhere = self.features + self.projections
        return everywhere if self.in_memory else everywhere - self.on_disk

    @property
    def bank_bytes(self) -> int:
        """Bytes of the memory bank."""
        return self.bank * self.dimension * 4

    @property
    def selection(self) -> int:
        """Bytes that selection takes beside what is kept."""
        if not self.projected:
            return 0
        copy = self.at_once < self.rows or self.projections == 0 or self.device is not None
        row = 4 * self.projected * (3 if copy else 2) + _ROW_STATE
        return self.at_once * row + min(self.bank, self.at_once) * (4 * self.projected + 16) + _WORK

    @property
    def peak(self) -> int:
        """Bytes of main memory at the worst: while selecting, or with the bank and its centred copy for search."""
        if self.device is not None:
            return self.kept + max(self.bank_bytes, self.at_once * self.projected * 4)
        return self.kept + max(self.selection, 2 * self.bank_bytes)

    @property
    def fits(self) -> bool:
        """Whether memory, disk and accelerator have room, and the selection's memory is enough."""
        return not self.lacking

    @property
    def lacking(self) -> str:
        """What there is too little of, in words; empty if nothing."""
        if self.peak > self.available:
            return f"{_size(self.peak)} of main memory needed, {_size(self.available)} available"
        if self.on_disk > self.disk and not self.in_memory:
            return f"{_size(self.on_disk)} of disk needed in {self.folder}, {_size(self.disk)} free"
        if self.device is not None and (need := max(self.selection, 2 * self.bank_bytes)) > self.device:
            return f"{_size(need)} of accelerator memory needed, {_size(self.device)} available"
        if self.projected and self.at_once < least_at_once(self.rows, self.bank):
            return (
                f"selection_memory {self.selection_memory:g} GiB holds {self.at_once:,} projected features at once, "
                f"two rounds need {least_at_once(self.rows, self.bank):,}"
            )
        return ""

    def chosen(self) -> StorePlan:
        """This plan with ``auto`` decided: the disk where main memory would take more than half of what is available.

        Raises:
            UserError: If it does not fit, with those options that would.
        """
        plan = self
        if self.store == "auto":
            ram = dataclasses.replace(self, store="ram")
            disk = dataclasses.replace(self, store="disk")
            plan = ram if ram.peak <= SHARE * self.available or (not disk.fits and ram.fits) else disk
        if plan.fits:
            return plan
        ways = list(plan._ways())
        if plan.in_memory and plan.store == "disk":
            ways.append(f"a store_dir on a disk ({plan.folder} lies in memory)")
        elif plan.on_disk > plan.disk:
            ways.append("a store_dir on a larger disk")
        ways.append("smaller images, fewer layers, or fewer images")
        raise UserError(f"this fit cannot run: {plan.lacking} ({plan}). What would: {'; '.join(ways)}.")

    def _ways(self) -> Iterator[str]:
        """Changes of settings that would fit, each with the mildest change of place that goes with it."""
        replace = dataclasses.replace
        stride = replace(self, rows=-(-self.rows // 4), held_out=-(-self.held_out // 4), bank=-(-self.bank // 4))
        sizes = (10**k for k in range(7, 2, -1))
        small = [(f"coreset_size: {size}", replace(self, bank=size)) for size in sizes if size < self.bank]
        done = set()
        for text, plan in (
            ("", self),
            ("store_dtype: bfloat16", replace(self, dtype=torch.bfloat16)),
            *small,
            ("twice the patch_stride", stride),
        ):
            disk = replace(plan, store="disk")
            gib = math.ceil(101 * least_at_once(plan.rows, plan.bank) * _row_bytes(max(plan.projected, 1)) / GIB) / 100
            bounded = replace(disk, selection_memory=max(gib, 0.01))
            places = [("", plan), ("store: disk", disk)]
            if self.projected and self.bounds:
                places.append((f"store: disk with selection_memory: {bounded.selection_memory:g}", bounded))
            for place, other in places:
                if other.fits and other != self and (kind := text.split(":")[0]) not in done:
                    done.add(kind)
                    yield " and ".join(filter(None, (text, place)))

    def seconds(self, flops: float) -> float:
        """Estimate of how long selection takes, from `product_rate`."""
        if not self.projected:
            return 0.0
        chunks = -(-self.rows // self.at_once)
        first = chunks * selection_seconds(self.rows // chunks, self.bank, self.projected, flops)
        union = chunks * self.bank
        return first + (selection_seconds(union, self.bank, self.projected, flops) if chunks > 1 else 0)

    def __str__(self) -> str:
        place = f"on disk in {self.folder}" if self.store == "disk" else "in RAM"
        parts = [
            f"{self.rows:,} patch features of {self.dimension} numbers ({self.dtype}".replace("torch.", "")
            + f"), {_size(self.features)} {place}"
        ]
        if self.projections:
            where = "disk" if self.store == "disk" and self.selection_memory is not None else "RAM"
            parts.append(f"their projections {_size(self.projections)} in {where}")
        parts.append(f"memory bank {self.bank:,} rows, {_size(self.bank_bytes)}")
        parts.append(f"at most {_size(self.peak)} of RAM")
        return ", ".join(parts)


def selection_seconds(rows: int, bank: int, numbers: int, flops: float) -> float:
    """Estimate of how long greedy selection takes.

    Args:
        rows: Rows selected from, N.
        bank: Rows selected, M.
        numbers: Numbers in a row, d.
        flops: See `product_rate`.

    Example:
        >>> selection_seconds(94_080, 9_408, 128, 213e9)
        1.5...
    """
    return _EVALUATED * 2 * rows * (bank + _EXTRA) * numbers / flops + _PICK * bank


def product_rate(numbers: int, device: torch.device) -> float:
    """Floating-point operations a second of selection's products, measured for some milliseconds."""
    bounds = DistanceBounds(numbers, product_type(numbers, 2**40, device))
    rows = torch.randn(1024, numbers, device=device).double()
    (left, slack), right = bounds.left(rows.clone()), bounds.right(rows)
    best = float("inf")
    with full_precision(device):
        for _ in range(8):
            start = time.perf_counter()
            bounds.least(left, slack, right).sum().item()
            best = min(best, time.perf_counter() - start)
    return 2 * 1024**2 * numbers / best


def duration(seconds: float) -> str:
    """A duration in words.

    Example:
        >>> duration(0.2), duration(400), duration(9000), duration(200_000)
        ('1 s', '6.7 min', '2.5 h', '2.3 days')
    """
    for limit, unit, name in ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h")):
        if seconds < limit:
            return f"{max(1.0, seconds / unit):.2g} {name}"
    days = seconds / 86400
    return f"{days:.2g} days" if days < 10 else f"{days:.0f} days"


def _size(bytes_: float) -> str:
    return f"{bytes_ / GIB:.2f} GiB" if bytes_ < 100 * GIB else f"{bytes_ / GIB:,.0f} GiB"


def store_folder(folder: str | None) -> str:
    """Folder of the store's file: ``folder``, or the system's for temporary files.

    Raises:
        UserError: If there is no such folder.
    """
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"store_dir {folder}: no such folder; make it, or leave store_dir out.")
    return folder or tempfile.gettempdir()


def free_on_disk(folder: str) -> int:
    """Bytes free in a folder's file system."""
    return shutil.disk_usage(folder).free


def lies_in_memory(folder: str) -> bool:
    """Whether a folder's file system is one in main memory (Linux; False where that cannot be told)."""
    path, best, kind = str(Path(folder).resolve()), "", ""
    for line in _lines(Path("/proc/mounts")):
        _, place, name, *_ = line.split()
        if Path(path).is_relative_to(place) and len(place) >= len(best):
            best, kind = place, name
    return kind in ("tmpfs", "ramfs")


def available_memory() -> float:
    """Bytes of main memory this process can still take, without swap; infinite where that cannot be told.

    The least of: what the system has available, what is left to each control group the process is in (versions 1 and
    2; cached files do not count as taken), and to the process's own limits of data and address space.
    """
    meminfo = {line.split(":")[0]: line.split(":")[1] for line in _lines(Path("/proc/meminfo"))}
    limits = [*_group_limits(), *_process_limits()]
    if "MemAvailable" in meminfo:
        limits.append(float(meminfo["MemAvailable"].split()[0]) * 1024)
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        name = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        limits.append(float(os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")))
    return max(0.0, min(limits, default=float("inf")))


_GROUPS = Path("/sys/fs/cgroup")


def _group_limits() -> Iterator[float]:
    """Bytes left to each control group, from the process's own up to the root."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        if controllers:
            root, most, used, cached = _GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            root, most, used, cached = _GROUPS, "memory.max", "memory.current", ""
        folder = root / own.lstrip("/")
        for place in [folder, *folder.parents]:
            if not place.is_relative_to(root):
                break
            limit, taken = "".join(_lines(place / most)), "".join(_lines(place / used))
            if limit.isdigit() and taken.isdigit():
                stat = dict(line.split() for line in _lines(place / "memory.stat"))
                files = sum(int(stat.get(cached + name, 0)) for name in ("inactive_file", "active_file"))
                yield float(limit) - float(taken) + files


def _process_limits() -> Iterator[float]:
    """Bytes left of ``ulimit -d`` and ``ulimit -v``."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    status = {line.split(":")[0]: line.split(":")[1] for line in _lines(Path("/proc/self/status"))}
    for limit, name in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and name in status:
            yield float(soft) - float(status[name].split()[0]) * 1024


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def device_memory(device: torch.device) -> float | None:
    """Bytes available on a CUDA device, its cached blocks included; None for others."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
