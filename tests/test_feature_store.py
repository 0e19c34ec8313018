"""The feature store in main memory and on disk, full disks, and what a fit leaves behind.

Run as a script this file is the process that is limited and killed.
"""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import pl_patchcore
from pl_patchcore import PatchCore, UserError
from pl_patchcore.coreset import collection, random_projection, store
from pl_patchcore.coreset.plan import GIB, StorePlan
from pl_patchcore.coreset.store import FeatureStore

LINUX = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks into /proc")


class Wide(nn.Module):
    """Each block of 8 x 8 pixels, several times: (B, 3, H, W) -> (B, 192 copies, H / 8, W / 8)."""

    def __init__(self, copies=1):
        super().__init__()
        self.copies, self.wide = copies, nn.PixelUnshuffle(8)

    def forward(self, x):
        return self.wide(x.repeat(1, self.copies, 1, 1))


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
    return PatchCore(Wide(copies), **(defaults | {"coreset_size": 20} | options))


def fit(model, data=None):
    runner = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    runner.fit(model, DataLoader(Noise(10) if data is None else data, batch_size=4))
    return model.state_dict().get("model.memory_bank.features")


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


def add(kept, patches, images):
    for image, each in zip(images, patches, strict=True):
        kept.add(each.flatten(0, 1), image)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
@pytest.mark.parametrize("left_out", [(0,), (1, 3), (3,), (0, 1, 2, 3)])
def test_images_left_out_are_as_if_they_had_not_come(tmp_path, order, left_out):
    patches = torch.rand(4, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    for folder in (None, str(tmp_path)):
        kept = [image for image in range(4) if image not in left_out]
        for matrix in (None, random_projection(8, 4, 0)):
            whole = FeatureStore(8, projection=matrix, folder=folder)
            for image in order:
                add(whole, patches[[image]], [image])
            whole.leave_out(left_out)
            assert (whole.images, len(whole)) == ([(image, 6) for image in kept], 6 * len(kept))
            assert torch.equal(whole.take(torch.arange(len(whole))), patches[kept].reshape(-1, 8))
            other = FeatureStore(8, projection=matrix)
            add(other, patches, range(4))
            assert torch.equal(whole.projected(), other.projected().view(4, 6, -1)[kept].flatten(0, 1))
            whole.close()


@pytest.mark.parametrize("rows", [None, 30, 84])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", ["ram", "disk", "all on disk"])
def test_rows_come_back_in_data_set_order(tmp_path, monkeypatch, place, dtype, rows):
    monkeypatch.setattr(store, "GROWTH", 5)
    features = torch.randn(14, 2, 3, 24, generator=torch.Generator().manual_seed(0))
    matrix = random_projection(24, 4, 0)
    folder = None if place == "ram" else str(tmp_path)
    kept = FeatureStore(24, rows, matrix, folder, dtype=dtype, projected_on_disk=place == "all on disk")
    images = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    for batch in images.split(4):
        add(kept, features[batch], (batch + 100).tolist())
    flat = features.flatten(0, 2)
    assert len(kept) == 84
    picks = torch.randint(84, (50,), generator=torch.Generator().manual_seed(2))
    assert torch.equal(kept.take(picks), flat[picks].to(dtype).float())
    expected = torch.cat([image.flatten(0, 1) @ matrix for image in features])
    assert torch.equal(kept.projected(), expected)
    assert torch.equal(kept.projected(picks), expected[picks])
    assert bool(open_files(tmp_path)) == (place != "ram")
    assert not list(tmp_path.iterdir())
    kept.close()
    assert not open_files(tmp_path)


@pytest.mark.parametrize("folder", [False, True])
def test_without_projection_the_features_are_read(tmp_path, folder):
    features = torch.randn(6, 1, 2, 3)
    kept = FeatureStore(3, 12, folder=str(tmp_path) if folder else None)
    add(kept, features, reversed(range(6)))
    assert torch.equal(kept.projected(), features.flip(0).flatten(0, 2))
    kept.close()


def test_number_beyond_float16_is_refused(tmp_path):
    for folder in (None, str(tmp_path)):
        kept = FeatureStore(2, 1, folder=folder, dtype=torch.float16)
        with pytest.raises(UserError, match=r"holds -?70000, beyond float16's 65504; set store\.dtype: bfloat16"):
            kept.add(torch.tensor([[1.0, -70000.0]]), 0)
        kept.close()


# The store in a fit


@LINUX
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_ram_and_disk_give_the_same_bank_bit_for_bit(tmp_path, share):
    banks, seen = [], []
    for kind in ("ram", "disk"):
        data = Noise(10, at=lambda index: seen.append(max(open_files(tmp_path), default=0)))
        model = model_of(store={"kind": kind, "folder": str(tmp_path)}, calibration_share=share)
        banks.append(fit(model, data))
        assert max(seen) == (0 if kind == "ram" else (7 if share else 10) * 16 * 192 * 4)
        assert not open_files(tmp_path)
        assert not list(tmp_path.iterdir())
    assert banks[0].shape == (20, 192)
    assert torch.equal(*banks)


@LINUX
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_fit_that_fails_leaves_nothing(tmp_path, error):
    during = []

    def fail(index):
        if index == 9:
            during.extend(open_files(tmp_path))
            raise error("the loader breaks")

    model = model_of(store={"kind": "disk", "folder": str(tmp_path)})
    with pytest.raises((error, SystemExit)):
        fit(model, Noise(12, at=fail))
    assert during == [12 * 16 * 192 * 4]
    assert not open_files(tmp_path)
    assert not list(tmp_path.iterdir())


def test_members_of_an_ensemble_share_the_memory(monkeypatch):
    members = [{"coreset_size": 30}, {"coreset_size": 20}]
    needs, chosen = [], StorePlan.chosen
    monkeypatch.setattr(StorePlan, "chosen", lambda plan: needs.append(plan.peak) or chosen(plan))
    fit(model_of(ensemble={"members": members}, store={"kind": "ram"}))
    monkeypatch.setattr(collection, "available_memory", lambda: sum(needs[:2]) - 1)
    with pytest.raises(UserError, match="of main memory needed"):
        fit(model_of(ensemble={"members": members}, store={"kind": "ram"}))


# Frames of 256 patches of 3,072 numbers, as layers 3 and 4 give: 1.5 GiB. With FRAMES=1500 in the environment the
# features are three times the whole limit, imports included.
FRAMES = int(os.environ.get("FRAMES", "500"))
ROOM = 450 * 2**20  # bytes of data segment beyond what the imports take
LIMITED = {"copies": 16, "coreset_size": 50}


@LINUX
@pytest.mark.slow
def test_limited_and_killed(tmp_path):
    """On disk a fit under ``ulimit -d`` gives the bank of an unlimited one; in RAM it is refused.

    There is room for less than a third of the features. Then a fit is killed half way, and leaves nothing.
    """
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 12 * GIB or os.statvfs(tmp_path).f_bavail < 2**21:
        pytest.skip("needs 12 GiB of memory and 8 GB of disk")
    env = os.environ | {"PYTHONPATH": str(Path(pl_patchcore.__file__).parents[1])}
    command, store_folder = [sys.executable, __file__, str(tmp_path)], tmp_path / "store"
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as run:
        try:
            lines = []
            while not lines or lines[-1] not in ("half way", ""):
                lines.append(run.stdout.readline().strip())
            assert open_files(store_folder, run.pid) == [12 * 16 * 192 * 4]
        finally:
            run.kill()
    assert run.returncode == -signal.SIGKILL
    assert not list(store_folder.iterdir())
    limit, refused, _ = lines
    assert 3 * (ROOM if FRAMES < 1500 else int(limit)) < FRAMES * 256 * 3072 * 4
    assert f"no memory for {FRAMES * 256} more patch features of 3072 numbers" in refused
    assert "set store.kind: disk" in refused
    expected = fit(model_of(**LIMITED, store={"kind": "ram"}), Noise(FRAMES, 128))
    assert torch.equal(torch.load(tmp_path / "bank.pt"), expected)


# Full disks


def test_reservation_that_fails_names_folder_need_and_remedies(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = (
        rf"no room .* in {tmp_path}: 0.0\d GiB more needed, [\d.]+ GiB free \(No space left.*store\.folder.*bfloat16"
    )
    with pytest.raises(UserError, match=message):
        FeatureStore(1000, 10000, folder=str(tmp_path))
    with pytest.raises(UserError, match=message):
        fit(model_of(copies=8, store={"kind": "disk", "folder": str(tmp_path)}), Noise(200))
    assert not open_files(tmp_path)
    assert not list(tmp_path.iterdir())


def fill(kept):
    for index in range(100):
        kept.add(torch.ones(100, 192), index)


def test_disk_that_is_full(small_disk, monkeypatch):
    with pytest.raises(UserError, match=r"no room for the feature store .*No space left on device"):
        FeatureStore(192, 2000, folder=str(small_disk))
    assert shutil.disk_usage(small_disk).free == 2**20
    monkeypatch.setattr(store, "GROWTH", 500)  # two reservations fit, the third does not
    message = "no room for the feature store .*No space left on device"
    for reserves in (True, False):
        if not reserves:  # as on systems without posix_fallocate: the write itself fails
            monkeypatch.delattr(os, "posix_fallocate")
        kept = FeatureStore(192, folder=str(small_disk))
        with pytest.raises(UserError, match=message):
            fill(kept)
        assert len(kept) >= 1000
        kept.close()
        assert shutil.disk_usage(small_disk).free == 2**20
    assert not list(small_disk.iterdir())


def test_folder_that_cannot_be_written_to():
    with pytest.raises(UserError, match=r"store\.folder /proc: cannot hold a file \(.*can be written to"):
        FeatureStore(3, 1, folder="/proc")


def limited_then_hanging(folder):
    status = Path("/proc/self/status").read_text()
    limit = int(status.split("VmData:")[1].split()[0]) * 1024 + ROOM
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    print(limit)
    try:
        fit(model_of(**LIMITED, store={"kind": "ram"}), Noise(FRAMES, 128))
    except UserError as error:
        print(error)
    on_disk = {"kind": "disk", "folder": str(folder / "store")}
    Path(on_disk["folder"]).mkdir()
    torch.save(fit(model_of(**LIMITED, store=on_disk), Noise(FRAMES, 128)), folder / "bank.pt")

    def wait(index):
        if index == 9:
            print("half way", flush=True)
            signal.pause()

    fit(model_of(store=on_disk), Noise(12, at=wait))


if __name__ == "__main__":
    limited_then_hanging(Path(sys.argv[1]))
