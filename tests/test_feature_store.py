"""The feature store in RAM and on disk, what a fit leaves behind, and the plan told before it.

Run as a script this file is the process that is limited or killed.
"""

import dataclasses
import errno
import logging
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from pl_patchcore.feature_store import FeatureStore
from pl_patchcore.store_plan import GIB, StorePlan, available_memory, least_at_once
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import pl_patchcore
from pl_patchcore import PatchCore, PatchCoreEnsemble, UserError, collection, feature_store, store_plan
from pl_patchcore.coreset import random_projection

LINUX = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks into /proc")


class Wide(nn.Module):
    """Each block of 8 x 8 pixels, several times: (B, 3, H, W) -> (B, 192 copies, H / 8, W / 8)."""

    def __init__(self, copies):
        super().__init__()
        self.copies = copies

    def forward(self, x):
        x = nn.functional.pixel_unshuffle(x, 8)
        return x.repeat(1, self.copies, 1, 1)


class Blocks(nn.Module):
    def __init__(self, copies=1):
        super().__init__()
        self.wide = Wide(copies)

    def forward(self, x):
        return self.wide(x)


class Noise(Dataset):
    """Images drawn from their index; ``at`` is called with each index before."""

    def __init__(self, images, side=32, at=None):
        self.images, self.side, self.at = images, side, at

    def __len__(self):
        return self.images

    def __getitem__(self, index):
        if self.at is not None:
            self.at(index)
        g = torch.Generator().manual_seed(index)
        return {"image": torch.rand(3, self.side, self.side, generator=g), "index": index}


def model_of(copies=1, **options):
    defaults = {"layers": ["wide"], "patch_size": 1, "resize": None, "crop": None, "projection_dim": 16}
    return PatchCore(Blocks(copies), **(defaults | {"coreset_size": 20} | options))


def fit(model, data=None, batch_size=4, shuffle=False):
    runner = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    data = Noise(10) if data is None else data
    shuffled = {} if isinstance(data, IterableDataset) else {"shuffle": shuffle}
    runner.fit(model, DataLoader(data, batch_size=batch_size, **shuffled))
    return model.bank_shape and next(iter(model.state_dict()[name] for name in model.state_dict() if "bank" in name))


def open_files(folder, pid="self"):
    """Sizes of the files below ``folder`` that a process holds open, named or not."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(link.readlink()).startswith(str(folder)):
                found.append(link.stat().st_size)
        except FileNotFoundError:
            continue
    return found


# The store alone


@pytest.mark.parametrize("rows", [None, 30, 84])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", ["ram", "disk", "all on disk"])
def test_rows_come_back_in_data_set_order(tmp_path, monkeypatch, place, dtype, rows):
    monkeypatch.setattr(feature_store, "_GROW", 5)
    features = torch.randn(14, 2, 3, 24, generator=torch.Generator().manual_seed(0))
    matrix = random_projection(24, 4, 0)
    folder = None if place == "ram" else str(tmp_path)
    store = FeatureStore(
        24, rows, projection=matrix, folder=folder, projected_on_disk=place == "all on disk", dtype=dtype
    )
    images = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    for batch in images.split(4):
        store.add(features[batch], batch + 100)
    flat = features.flatten(0, 2)
    assert len(store) == 84
    picks = torch.randint(84, (50,), generator=torch.Generator().manual_seed(2))
    assert torch.equal(store.take(picks), flat[picks].to(dtype).float())
    expected = torch.cat([image.flatten(0, 1) @ matrix for image in features])
    assert torch.equal(store.projected(), expected)
    assert torch.equal(store.projected(picks), expected[picks])
    assert bool(open_files(tmp_path)) == (place != "ram")
    assert not list(tmp_path.iterdir())
    store.close()
    assert not open_files(tmp_path)


@pytest.mark.parametrize("folder", [False, True])
def test_without_projection_the_features_are_read(tmp_path, folder):
    features = torch.randn(6, 1, 2, 3)
    store = FeatureStore(3, 12, folder=str(tmp_path) if folder else None)
    store.add(features, torch.arange(6).flip(0))
    assert torch.equal(store.projected(), features.flip(0).flatten(0, 2))
    store.close()


def test_number_beyond_float16_is_refused(tmp_path):
    for folder in (None, str(tmp_path)):
        store = FeatureStore(2, 1, folder=folder, dtype=torch.float16)
        with pytest.raises(UserError, match=r"holds -?70000, beyond float16's 65504; set store_dtype: bfloat16"):
            store.add(torch.tensor([[[[1.0, -70000.0]]]]), torch.tensor([0]))
        store.close()


# The store in a fit


@pytest.mark.parametrize("projection_dim", [16, 1000])
@pytest.mark.parametrize("options", [{}, {"calibration_share": 0.3}, {"selection_memory": 1.5e-5}])
def test_ram_and_disk_give_the_same_bank_bit_for_bit(tmp_path, caplog, projection_dim, options):
    options = options | {"projection_dim": projection_dim}
    if "selection_memory" in options:
        options |= {"selection_memory": 2.2e-4 if projection_dim == 1000 else 2.5e-5}
    banks, thresholds, seen = [], [], []
    caplog.set_level(logging.INFO)
    for store in ("ram", "disk"):
        data = Noise(10, at=lambda index: seen.append(max(open_files(tmp_path), default=0)))
        model = model_of(store=store, store_dir=str(tmp_path), **options)
        banks.append(fit(model, data))
        thresholds.append(model.calibration_scores)
        assert max(seen) == (0 if store == "ram" else (7 if "calibration_share" in options else 10) * 16 * 192 * 4)
        assert not open_files(tmp_path)
        assert not list(tmp_path.iterdir())
    assert banks[0].shape == (20, 192)
    assert torch.equal(*banks)
    assert torch.equal(*thresholds)
    if "selection_memory" not in options:
        shuffled = fit(model_of(store="disk", **options), Noise(10), batch_size=3, shuffle=True)
        assert torch.equal(shuffled, banks[0])
    else:
        assert re.search(r"selected \d\d rows at once: no patch feature is farther than [1-9]", caplog.text)


def test_bounded_selection_does_not_depend_on_the_order_of_images(tmp_path):
    options = {"store": "disk", "selection_memory": 2.5e-5}
    expected = fit(model_of(**options))
    assert torch.equal(fit(model_of(**options), shuffle=True, batch_size=3), expected)


@pytest.mark.parametrize("store", ["ram", "disk"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounded_stores_pick_the_same_rows(store, dtype):
    expected = fit(model_of())
    assert torch.equal(fit(model_of(store=store, store_dtype=dtype)), expected.to(getattr(torch, dtype)).float())


@pytest.mark.parametrize("store", ["auto", "disk"])
@pytest.mark.parametrize("method", ["greedy", "approximate", "random", "none"])
def test_unknown_length(tmp_path, monkeypatch, caplog, store, method):
    monkeypatch.setattr(feature_store, "_GROW", 50)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([Noise(10)[i] for i in range(10)])

    options = {"store_dir": str(tmp_path), "coreset_method": method, "calibration_share": 0.2}
    with caplog.at_level(logging.INFO):
        found = fit(model_of(store=store, **options), Stream())
    assert "of an unknown number of images, " + ("in RAM" if store == "auto" else "on disk") in caplog.text
    known = model_of(store="ram", **options)
    known._is_aside = lambda index: type(known)._is_aside(known, index)
    known.on_train_start = lambda: None  # as for a stream: each image decides alone whether it is held out
    assert torch.equal(found, fit(known))


@LINUX
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_fit_that_fails_leaves_nothing(tmp_path, error):
    during = []

    def fail(index):
        if index == 9:
            during.extend(open_files(tmp_path))
            raise error("the loader breaks")

    model = model_of(store="disk", store_dir=str(tmp_path))
    with pytest.raises((error, SystemExit)):
        fit(model, Noise(12, at=fail))
    assert during == [12 * 16 * 192 * 4]
    assert not open_files(tmp_path)
    assert not list(tmp_path.iterdir())


def process(*arguments):
    """This file as a script, on this package."""
    root = Path(pl_patchcore.__file__).parents[1]
    return [sys.executable, __file__, *map(str, arguments)], os.environ | {"PYTHONPATH": str(root)}


@LINUX
@pytest.mark.slow
def test_killed_fit_leaves_nothing(tmp_path):
    command, env = process("hang", tmp_path)
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        try:
            assert "half way" in [line.strip() for line in iter(run.stdout.readline, "half way\n")] + ["half way"]
            assert open_files(tmp_path, run.pid) == [12 * 16 * 192 * 4]
            assert run.poll() is None
        finally:
            run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


# Frames of 256 patches of 3,072 numbers, as layers 3 and 4 give: 1.5 GiB. With FRAMES=1500 in the environment the
# features are three times the whole limit, imports included.
FRAMES = int(os.environ.get("FRAMES", "500"))
ROOM = 450 * 2**20  # bytes of data segment beyond what the imports take


def limited_options(**options):
    return {"copies": 16, "projection_dim": 16, "coreset_size": 50} | options


@LINUX
@pytest.mark.slow
def test_hard_memory_limit(tmp_path):
    """On disk a fit under ``ulimit -d`` gives the bank of an unlimited one; in RAM it is refused.

    There is room for less than a third of the features.
    """
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 12 * GIB or store_plan.free_on_disk(tmp_path) < 8e9:
        pytest.skip("needs 12 GiB of memory and 8 GB of disk")
    command, env = process("limited", tmp_path)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    limit = int(done.stdout.split("limit ")[1].split()[0])
    assert 3 * (ROOM if FRAMES < 1500 else limit) < FRAMES * 256 * 3072 * 4
    assert "refused: this fit cannot run: " in done.stdout
    assert "of main memory needed" in done.stdout
    assert "store: disk" in done.stdout.split("What would: ")[1]
    expected = fit(model_of(**limited_options(store="ram")), Noise(FRAMES, 128))
    assert torch.equal(torch.load(tmp_path / "bank.pt"), expected)


# Full disks


def test_reservation_that_fails_names_folder_need_and_remedies(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = rf"no room .* in {tmp_path}: 0.0\d GiB more needed, [\d.]+ GiB free \(No space left.*store_dir.*bfloat16"
    with pytest.raises(UserError, match=message):
        FeatureStore(1000, 10000, folder=str(tmp_path))
    with pytest.raises(UserError, match=message):
        fit(model_of(copies=8, store="disk", store_dir=str(tmp_path)), Noise(200))
    assert not open_files(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(store):
    for index in range(100):
        store.add(torch.ones(1, 10, 10, 192), torch.tensor([index]))


def test_disk_that_is_full(small_disk, monkeypatch):
    with pytest.raises(UserError, match=r"no room for the feature store .*No space left on device"):
        FeatureStore(192, 2000, folder=str(small_disk))
    assert store_plan.free_on_disk(small_disk) == 2**20
    monkeypatch.setattr(feature_store, "_GROW", 500)  # two reservations fit, the third does not
    monkeypatch.setattr(collection, "free_on_disk", lambda folder: 2**40)
    message = "no room for the feature store .*No space left on device"
    for reserves in (True, False):
        if not reserves:  # as on systems without posix_fallocate: the write itself fails
            monkeypatch.delattr(os, "posix_fallocate")
        store = FeatureStore(192, folder=str(small_disk))
        with pytest.raises(UserError, match=message):
            fill(store)
        assert len(store) >= 1000
        store.close()
        assert store_plan.free_on_disk(small_disk) == 2**20
    assert not list(small_disk.iterdir())


def test_folder_in_memory_is_counted_as_memory(small_disk):
    assert store_plan.lies_in_memory(small_disk)
    assert not store_plan.lies_in_memory("/proc")
    plan = dataclasses.replace(MSTC, store="disk", in_memory=True, disk=1e15, available=100 * GIB)
    with pytest.raises(UserError, match=r"of main memory needed.*a store_dir on a disk \(/data lies in memory\)"):
        plan.chosen()


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="no such folder; make it"):
        fit(model_of(store="disk", store_dir=str(tmp_path / "none")))
    with pytest.raises(UserError, match=r"store_dir /proc: cannot hold a file \(.*can be written to"):
        FeatureStore(3, 1, folder="/proc")


# The plan


MSTC = StorePlan(
    rows=55_000 * 1024, held_out=0, dimension=1536, projected=128, bank=563_200, store="auto", folder="/data",
    dtype=torch.float32, selection_memory=None, available=200 * GIB, disk=1000 * GIB, in_memory=False,
)  # fmt: skip


def test_plan_of_the_full_shanghai_set():
    plan = MSTC.chosen()
    assert plan.store == "disk"
    assert plan.features == plan.on_disk == 55_000 * 1024 * 1536 * 4  # 322 GiB
    assert plan.projections == 55_000 * 1024 * 128 * 4  # 27 GiB
    rows = 55_000 * 1024
    # projections, their centred copy, its square, bookkeeping; and what the picks take
    assert plan.peak == 3 * plan.projections + 96 * rows + 563_200 * (128 * 4 + 16) + 2**28
    assert str(plan) == (
        "56,320,000 patch features of 1536 numbers (float32), 322 GiB on disk in /data, their projections 26.86 GiB "
        "in RAM, memory bank 563,200 rows, 3.22 GiB, at most 86.13 GiB of RAM"
    )
    bounded = dataclasses.replace(MSTC, selection_memory=16.0).chosen()
    assert bounded.store == "disk"
    assert bounded.on_disk == plan.features + plan.projections
    assert bounded.peak < 20 * GIB
    flops = 1e12
    assert plan.seconds(flops) == pytest.approx(0.75 * 2 * rows * 566_200 * 128 / flops + 28, rel=0.01)
    assert plan.seconds(flops) < bounded.seconds(flops) < 2 * plan.seconds(flops)


def test_auto_takes_the_disk_beyond_half_of_memory():
    need = dataclasses.replace(MSTC, store="ram").peak
    for available, expected in ((2.01 * need, "ram"), (1.99 * need, "disk")):
        assert dataclasses.replace(MSTC, available=available).chosen().store == expected
    full = dataclasses.replace(MSTC, available=1.2 * need, disk=0)
    assert full.chosen().store == "ram"
    with pytest.raises(UserError, match=r"of main memory needed|of disk needed"):
        dataclasses.replace(full, available=0.9 * need).chosen()


@pytest.mark.parametrize(
    ("changes", "lacking", "ways"),
    [
        ({"store": "ram"}, "of main memory needed, 200 GiB available", ["store: disk;", "twice the patch_stride;"]),
        (
            {"store": "ram", "available": 300 * GIB, "disk": 0},
            "of main memory needed",
            ["store_dtype: bfloat16;", "twice the patch_stride;"],
        ),
        (
            {"store": "disk", "disk": 200 * GIB},
            "322 GiB of disk needed in /data, 200 GiB free",
            ["store_dtype: bfloat16;", "a store_dir on a larger disk;"],
        ),
        ({"available": 50 * GIB}, "of main memory needed", ["store: disk with selection_memory: "]),
        (
            {"bank": 5_632_000, "available": 60 * GIB},
            "of main memory needed",
            ["coreset_size: 1000000 and store: disk"],
        ),
        (
            {"store": "disk", "selection_memory": 1.0},
            "two rounds need 5,632,000",
            ["store: disk with selection_memory: 11.36;"],
        ),
        ({"store": "disk", "device": 40 * GIB}, "of accelerator memory needed", ["selection_memory: "]),
    ],
)
def test_refusal_names_what_would_fit(changes, lacking, ways):
    plan = dataclasses.replace(MSTC, **changes)
    with pytest.raises(UserError, match="this fit cannot run") as error:
        plan.chosen()
    message = str(error.value)
    assert lacking in message
    for way in ways:
        assert way in message.split("What would: ")[1]


def test_ways_that_are_named_do_fit():
    """Each way in the message, applied, is accepted; those of another kind that are not named are refused."""
    plan = dataclasses.replace(MSTC, available=50 * GIB)
    ways = dict.fromkeys(plan._ways())
    assert len(ways) >= 2
    gib = float(next(iter(ways)).split("selection_memory: ")[1])
    assert dataclasses.replace(plan, store="disk", selection_memory=gib).chosen().at_once >= least_at_once(
        plan.rows, plan.bank
    )
    assert not dataclasses.replace(plan, store="disk", selection_memory=0.97 * gib).fits
    assert not dataclasses.replace(plan, dtype=torch.bfloat16, store="disk").fits


@pytest.mark.parametrize("store", ["ram", "disk", "auto"])
def test_plan_is_told_before_the_fit(tmp_path, caplog, store):
    seen = []
    with caplog.at_level(logging.INFO):
        model = model_of(store=store, store_dir=str(tmp_path), calibration_share=0.2, coreset_size=None)
        fit(model, Noise(10, at=lambda index: seen.append("collecting" in caplog.text)))
    assert seen == [False] * 4 + [True] * 6
    place = f"on disk in {tmp_path}" if store == "disk" else "in RAM"
    (line,) = [record.message for record in caplog.records if "collecting" in record.message]
    assert line.startswith(
        f"collecting 128 patch features of 192 numbers (float32), 0.00 GiB {place}, their projections"
    )
    assert "memory bank 12 rows" in line
    assert line.endswith(" (an estimate).")


def test_fit_beyond_memory_is_refused_and_auto_turns_to_the_disk(tmp_path, monkeypatch, caplog):
    plan = StorePlan(160, 0, 1536, 16, 20, "ram", "/", torch.float32, None, 0, 1e9, False)
    disk = dataclasses.replace(plan, store="disk")
    monkeypatch.setattr(collection, "available_memory", lambda: (plan.peak + disk.peak) / 2)
    with pytest.raises(UserError, match=r"of main memory needed.*What would: store: disk"):
        fit(model_of(copies=8, store="ram"))
    with caplog.at_level(logging.INFO):
        fit(model_of(copies=8, store_dir=str(tmp_path)))
    assert f"on disk in {tmp_path}" in caplog.text
    monkeypatch.setattr(collection, "free_on_disk", lambda folder: 1000)
    with pytest.raises(UserError, match=r"0.00 GiB of disk needed in .*larger disk"):
        fit(model_of(copies=8, store="disk", store_dir=str(tmp_path)))


@pytest.mark.filterwarnings("ignore::pl_patchcore.backbone.UntrainedBackboneWarning")
def test_members_of_an_ensemble_share_the_memory(monkeypatch):
    members = [{"layers": ["layer1"]}, {"layers": ["layer2"]}]
    options = {"backbone": "resnet18", "weights": None, "resize": None, "crop": None, "coreset_size": 5, "store": "ram"}
    needs = []
    plain = StorePlan.chosen
    monkeypatch.setattr(StorePlan, "chosen", lambda plan: needs.append(plan.peak) or plain(plan))
    fit(PatchCoreEnsemble(members, **options))
    first, second = needs
    monkeypatch.setattr(collection, "available_memory", lambda: first + second + 1)
    fit(PatchCoreEnsemble(members, **options))
    monkeypatch.setattr(collection, "available_memory", lambda: first + second - 1)
    with pytest.raises(UserError, match="of main memory needed"):
        fit(PatchCoreEnsemble(members, **options))


def files(monkeypatch, **content):
    named = {name.replace("__", "/"): text for name, text in content.items()}
    monkeypatch.setattr(store_plan, "_lines", lambda path: named.get(str(path), "").splitlines())
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
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
    named["/proc/self/status"] = "Name: x\nVmSize:  3000 kB\nVmData:\t 1000 kB\n"
    limits = {resource.RLIMIT_DATA: 2000 * 1024, resource.RLIMIT_AS: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (limits[limit], -1))
    assert available_memory() == 1000 * 1024
    limits[resource.RLIMIT_AS] = 3500 * 1024
    assert available_memory() == 500 * 1024
    limits[resource.RLIMIT_AS] = 2000 * 1024
    assert available_memory() == 0


def test_available_memory_of_this_machine():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**26 < available_memory() < total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "cloud"}, "store must be auto, ram or disk, got 'cloud'"),
        ({"store_dtype": "int8"}, "store_dtype must be float32, float16 or bfloat16"),
        ({"selection_memory": 0}, "selection_memory must be GiB above 0"),
        ({"selection_memory": 1, "coreset_method": "approximate"}, "goes with coreset_method greedy"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        model_of(**options)


# The process that is limited or killed


def hang(folder):
    def wait(index):
        if index == 9:
            print("half way", flush=True)
            signal.pause()

    fit(model_of(store="disk", store_dir=folder), Noise(12, at=wait))


def limited(folder):
    status = Path("/proc/self/status").read_text()
    limit = int(status.split("VmData:")[1].split()[0]) * 1024 + ROOM
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    print(f"limit {limit} ")
    try:
        fit(model_of(**limited_options(store="ram")), Noise(FRAMES, 128))
    except UserError as error:
        print(f"refused: {error}")
    bank = fit(model_of(**limited_options(store="disk", store_dir=folder)), Noise(FRAMES, 128))
    torch.save(bank, Path(folder) / "bank.pt")


if __name__ == "__main__":
    {"hang": hang, "limited": limited}[sys.argv[1]](sys.argv[2])
