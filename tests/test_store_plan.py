"""The plan of a fit, told or refused before it begins, and what the machine has."""

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from pl_patchcore import UserError
from pl_patchcore.coreset.bounded import least_chunk_size
from pl_patchcore.coreset.plan import GIB, StorePlan, available_memory, lies_in_memory, rows_in
from pl_patchcore.options import StoreOptions

ROWS = 55_000 * 1024
MSTC = StorePlan(ROWS, 0, 1536, 128, 563_200, StoreOptions(), "/data", available=200 * GIB, disk=1000 * GIB)


def changed(plan, **changes):
    store = {name: changes.pop(name) for name in ("kind", "dtype", "selection_memory") if name in changes}
    return dataclasses.replace(plan, store=dataclasses.replace(plan.store, **store), **changes)


def test_plan_of_the_full_shanghai_set():
    plan = MSTC.chosen()
    assert plan.store.kind == "disk"
    assert plan.features == plan.on_disk == ROWS * 1536 * 4  # 322 GiB
    assert plan.projections == ROWS * 128 * 4  # 27 GiB
    # projections, their centred copy, its square, bookkeeping; and what the picks take
    assert plan.peak == 3 * plan.projections + 96 * ROWS + 563_200 * (128 * 4 + 16) + 2**28
    assert str(plan) == (
        "56,320,000 patch features of 1536 numbers (float32), 322 GiB on disk in /data, their projections 26.86 GiB "
        "in RAM, memory bank 563,200 rows, 3.22 GiB, at most 86.13 GiB of RAM"
    )
    bounded = changed(MSTC, selection_memory=16.0).chosen()
    assert bounded.store.kind == "disk"
    assert bounded.on_disk == plan.features + plan.projections
    assert bounded.peak < 20 * GIB
    assert "projections 26.86 GiB in disk" in str(bounded)


def test_auto_takes_the_disk_beyond_half_of_memory():
    need = changed(MSTC, kind="ram").peak
    for available, expected in ((2.01 * need, "ram"), (1.99 * need, "disk")):
        assert changed(MSTC, available=available).chosen().store.kind == expected
    full = changed(MSTC, available=1.2 * need, disk=0)
    assert full.chosen().store.kind == "ram"
    with pytest.raises(UserError, match="of disk needed"):
        changed(full, available=0.9 * need).chosen()


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({"kind": "ram"}, "of main memory needed, 200 GiB available"),
        ({"kind": "disk", "disk": 200 * GIB}, "322 GiB of disk needed in /data, 200 GiB free"),
        ({"kind": "disk", "in_memory": True}, "of main memory needed, 200 GiB available; /data lies in main memory"),
        ({"available": 50 * GIB}, "86.13 GiB of main memory needed, 50.00 GiB available"),
        ({"selection_memory": 1.0}, "store.selection_memory 1.0 GiB holds 500,812 projected features, two rounds need"),
        ({"kind": "disk", "device": 40 * GIB}, "of accelerator memory needed, 40.00 GiB available"),
    ],
)
def test_refusal_says_what_is_lacking_and_names_the_settings_that_help(changes, lacking):
    with pytest.raises(UserError, match="this fit cannot run: ") as error:
        changed(MSTC, **changes).chosen()
    message = str(error.value)
    assert lacking in message
    assert "\n" not in message
    settings = ["store.kind: disk", "store.dtype: float16 or bfloat16", "store.selection_memory", "coreset_size"]
    for setting in (*settings, "coreset_ratio", "patches.stride", "smaller images"):
        assert setting in message.split("What helps: ")[1]


def test_selection_memory_suffices_from_the_fewest_rows_of_two_rounds():
    gib = 1.0
    while rows_in(gib, 128) < least_chunk_size(ROWS, MSTC.bank):
        gib *= 1.01
    assert changed(MSTC, selection_memory=gib).chosen().chunk_size == rows_in(gib, 128)
    with pytest.raises(UserError, match=r"store\.selection_memory"):
        changed(MSTC, selection_memory=gib / 1.02).chosen()


def files(monkeypatch, **content):
    named = {name.replace("__", "/"): text for name, text in content.items()}

    def read_text(path):
        if str(path) not in named:
            raise FileNotFoundError(path)
        return named[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    return named


def test_available_memory_is_the_least_of_all_limits(monkeypatch):
    named = files(monkeypatch, __proc__meminfo="MemTotal: 100 kB\nMemAvailable:   9000 kB\n")
    assert available_memory() == 9000 * 1024
    group = "/sys/fs/cgroup/memory"  # version 1, the limit on the parent; cached files can be given back
    named["/proc/self/cgroup"] = "5:cpu:/\n4:memory:/job/own\n0::/\n"
    named[group + "/job/own/memory.limit_in_bytes"] = "9223372036854771712"
    named[group + "/job/own/memory.usage_in_bytes"] = "5"
    named[group + "/job/memory.limit_in_bytes"] = "8000000\n"
    named[group + "/job/memory.usage_in_bytes"] = "3000000\n"
    named[group + "/job/memory.stat"] = "inactive_file 1\ntotal_inactive_file 500000\ntotal_active_file 100000\n"
    assert available_memory() == 8000000 - 3000000 + 600000
    named["/proc/self/cgroup"] = "0::/job/own\n"  # version 2
    named["/sys/fs/cgroup/job/own/memory.max"] = "max"
    named["/sys/fs/cgroup/job/own/memory.current"] = "7"
    named["/sys/fs/cgroup/job/memory.max"] = "4000000"
    named["/sys/fs/cgroup/job/memory.current"] = "1000000"
    named["/sys/fs/cgroup/job/memory.stat"] = "anon 1\ninactive_file 500\nactive_file 5\n"
    assert available_memory() == 3000505
    named["/sys/fs/cgroup/job/memory.current"] = "9000000"
    assert available_memory() == 0
    named.clear()
    assert available_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_available_memory_of_this_machine():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**26 < available_memory() < total


def test_folder_in_memory(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        assert lies_in_memory(str(tmp_path))
        assert not lies_in_memory("/proc")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
