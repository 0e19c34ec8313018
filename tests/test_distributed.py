"""Fit and test on several processes: the memory bank and the figures of one."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import free_port
from PIL import Image

SHARED = (Path(__file__).parents[1] / ".." / "shared").resolve()
SCRIPT = """
import faulthandler, json, os, sys, warnings
faulthandler.dump_traceback_later(180)  # where it is, if it hangs
warnings.simplefilter("ignore")
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader
from pl_patchcore import PatchCore, SyntheticDataModule
from pl_patchcore.report import PredictionWriter

devices, images, out, own, batch = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(3, 16, 3, stride=4), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()
)
model = PatchCore(
    net, layers=["1", "3"], resize=64, crop=None, coreset_ratio=0.1, projection_dim=16,
    calibration_share=0.3 if images > 4 else 0.0, coreset_method=own if own in ("approximate", "random") else "greedy",
    shard_bank=own == "sharded",
)
data = SyntheticDataModule(batch_size=batch, num_workers=0, train_images=images, test_nominal=5, test_per_defect=2)
if own == "tiles":
    from pl_patchcore import MTDDataModule
    class SomeTiles(MTDDataModule):
        def load_records(self):
            train, test = super().load_records()
            return train[:images], test[::30]
    model = PatchCore(
        "mobilenet_v2", layers=["features.6", "features.13"],
        weights=os.environ["SHARED"] + "/weights/mobilenet_v2.pth", resize=112, crop=None, coreset_ratio=0.1,
        projection_dim=64,
    )
    data = SomeTiles(os.environ["SHARED"] + "/data/mtd", batch_size=batch, num_workers=0)
if own == "sharded":
    class Dealt(PatchCore):
        def on_scored(self):
            assert abs(len(self.memory_bank.features) * devices - len(self.memory_bank)) < devices
            super().on_scored()
    model.__class__ = Dealt
if own == "fails":
    class Fails(PatchCore):
        def collect(self, images, index, aside):
            if self.global_rank == 1:
                raise RuntimeError("no second process today")
            super().collect(images, index, aside)
    model.__class__ = Fails
if own.startswith("hangs"):
    _, where, rank = own.split()
    from pl_patchcore.coreset_shared import _SharedFarthestFirst
    def hang():
        open(out + "/pid", "w").write(str(os.getpid()))
        import time
        time.sleep(600)
    class Hangs(PatchCore):
        def collect(self, images, index, aside):
            if where == "collecting" and self.global_rank == int(rank) and index.min() > 3:
                hang()
            super().collect(images, index, aside)
    model.__class__ = Hangs
    pick = _SharedFarthestFirst._pick
    def hang_or_pick(self, *args):
        if where == "selecting" and self.processes.rank == int(rank) and self.count > 1:
            hang()
        return pick(self, *args)
    _SharedFarthestFirst._pick = hang_or_pick
machines = int(os.environ.get("MACHINES", 1))
strategy = "ddp" if devices * machines > 1 else "auto"
trainer = L.Trainer(
    accelerator="cpu", devices=devices, num_nodes=machines, strategy=strategy, logger=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
)
if own == "loader":
    data.transform = model.transform
    data.setup("fit")
    class Bare(torch.utils.data.Dataset):
        def __len__(self): return len(data.train_set)
        def __getitem__(self, i): return data.train_set[i]["image"]
    trainer.fit(model, DataLoader(Bare(), batch_size=batch))
else:
    trainer.fit(model, data)
if own == "update":
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, num_nodes=machines, strategy=strategy, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
    )
    model.update(trainer, SyntheticDataModule(batch_size=batch, num_workers=0, train_images=7, seed=1))
tested = predicted = data
if own == "few":  # images to test and to predict
    from pl_patchcore import FolderDataModule
    data.setup("test")
    few = [data.test_set[i] for i in (0, 6)]
    tested = DataLoader([(sample["image"], sample["label"], sample["mask"]) for sample in few], batch_size=batch)
    predicted = FolderDataModule(predict=os.path.dirname(out) + "/few", batch_size=batch, num_workers=0)
trainer.test(model, tested, verbose=False)
trainer.callbacks.append(PredictionWriter(maps=True))
trainer.predict(model, predicted, return_predictions=False)
if trainer.is_global_zero:
    state = {k: v for k, v in model.state_dict().items() if "patch_features" not in k}
    torch.save(state, out + "/state.pt")
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    assert torch.equal(saved["memory_bank.features"], state["memory_bank.features"])
    json.dump({"all": model.figures, "names": sorted(model.figures)}, open(out + "/figures.json", "w"))
"""
STARTED: list[subprocess.Popen[str]] = []


def draw(folder: Path) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(2, 64, 64, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")


def start(
    folder: Path, devices: int, images: int, own: str = "", batch: int = 1, launcher: Sequence[str] = (), **environment
) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    if not (folder.parent / "few").exists():
        draw(folder.parent / "few")
    script = folder / "fit.py"
    if not script.exists():  # one started before may be reading it
        script.write_text(SCRIPT)
    env = os.environ | {"SHARED": str(SHARED), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"MASTER_PORT": free_port()} | environment
    command = [sys.executable, *launcher, str(script), str(devices), str(images), str(folder), own, str(batch)]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    STARTED.append(process)
    return process


def finish(process: subprocess.Popen[str], seconds: int = 240) -> str:
    """Output of a process and of those it started, once all have ended."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        for each in STARTED:
            end(each)
        outputs = [each.communicate(timeout=60)[0] for each in STARTED if not each.stdout.closed]
        return pytest.fail("\n\n".join([f"not done after {seconds} s:", *outputs]))
    finally:
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    """Those that torchrun started are in sessions of their own, which it ends when it is told to."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(40)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def none_left():
    yield
    while STARTED:
        end(STARTED.pop())


needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared (MTD and MobileNetV2 weights)")


@pytest.mark.parametrize(
    ("images", "devices", "own", "batch"),
    [
        (13, (2, 3), "", 1),
        (13, (2, 3), "", 4),
        (2, (3,), "", 1),
        (13, (2,), "loader", 1),
        (13, (2,), "approximate", 1),
        (13, (2,), "random", 1),
        (13, (2,), "update", 1),
        (13, (2, 3), "sharded", 1),
        (13, (3,), "few", 1),
        pytest.param(19, (2, 3), "tiles", 1, marks=needs_shared),
        pytest.param(19, (2, 3), "tiles", 4, marks=needs_shared),
    ],
    ids=[
        "does not divide",
        "batches of 4",
        "more processes than images",
        "a user's own loader",
        "approximate",
        "random",
        "update",
        "a bank dealt out",
        "fewer images to test and to predict",
        "magnetic tiles",
        "magnetic tiles in batches of 4",
    ],
)
def test_equals_one_process(tmp_path, images, devices, own, batch):
    """Bit for bit where each image is a batch; the backbone's last bits depend on what else is in a batch."""
    results, tables = {}, {}
    for count in (1, *devices):
        folder = tmp_path / str(count)
        process = start(folder, count, images, own, batch)
        output = finish(process)
        assert process.returncode == 0, output
        assert not list(folder.rglob("*.partial"))
        tables[count] = list(csv.reader((folder / "predictions.csv").read_text().splitlines()))
        results[count] = (
            torch.load(folder / "state.pt", weights_only=True),
            json.loads((folder / "figures.json").read_text()),
        )
    state, figures = results[1]
    for count in devices:
        found, others = results[count]
        assert found.keys() == state.keys()
        for name, value in state.items():
            assert found[name].shape == value.shape, name
            if batch == 1:
                assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), name
            else:  # rows of the same patches in the same order
                assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6, equal_nan=True), name
        assert len(tables[count]) == 1 + {"few": 2, "tiles": 20}.get(own, 5 + 4 * 2)
        for row, other in zip(tables[1], tables[count], strict=True):
            assert row[0] == other[0]
            assert row[-1] == other[-1]  # the map's name
            assert row[0] == "path" or float(row[1]) == pytest.approx(float(other[1]), rel=1e-5)
            assert row[0] == "path" or (tmp_path / str(count) / row[-1]).is_file()
        assert others["names"] == figures["names"]
        for name, row in figures["all"].items():
            assert others["all"][name] == pytest.approx(row, abs=1e-6, nan_ok=True), name


def test_an_error_of_one_process_ends_all(tmp_path):
    process = start(tmp_path / "run", 2, 13, "fails")
    output = finish(process, 120)
    assert process.returncode != 0
    assert "no second process today" in output
    assert not list((tmp_path / "run").rglob("*.ckpt"))


@pytest.mark.parametrize("launcher", ["Lightning", "torchrun", "SLURM"])
def test_two_machines_equal_one(tmp_path, launcher):
    """Two launches that meet at an address; SLURM is the environment that srun gives its tasks."""
    (maps := (folder := tmp_path / "two") / "maps").mkdir(parents=True)
    for i in range(3000):  # of an earlier run, which both take away
        (maps / f"{i:06d}-old.npy").touch()
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "MACHINES": "2"}
    torchrun = (*("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),)
    torchrun += ("--master-addr", meet["MASTER_ADDR"], "--master-port", meet["MASTER_PORT"])
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    slurm |= {"SLURM_NNODES": "2", "SLURM_LOCALID": "0", "SLURM_NODELIST": "127.0.0.1"}
    processes = []
    for machine in "01":
        if launcher == "torchrun":
            how = {"launcher": (*torchrun, "--node-rank", machine), "MACHINES": "2", "LOGLEVEL": "INFO"}
        else:
            how = meet | ({"NODE_RANK": machine} if launcher == "Lightning" else {})
            how |= slurm | {"SLURM_PROCID": machine, "SLURM_NODEID": machine} if launcher == "SLURM" else {}
        processes.append(start(folder, 1, 13, **how))
    one = start(tmp_path / "one", 1, 13)
    for process in (*processes, one):
        output = finish(process)
        assert process.returncode == 0, output
    state, found = (torch.load(place / "state.pt", weights_only=True) for place in (tmp_path / "one", folder))
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), name
    figures, others = (json.loads((place / "figures.json").read_text()) for place in (tmp_path / "one", folder))
    for name, row in figures["all"].items():
        assert others["all"][name] == pytest.approx(row, abs=1e-6, nan_ok=True), name
    assert len((folder / "predictions.csv").read_text().splitlines()) == 1 + 5 + 4 * 2
    assert len(list(maps.iterdir())) == 5 + 4 * 2


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["collecting", "selecting"])
def test_a_killed_process_ends_all(tmp_path, where, rank, machines):
    (folder := tmp_path / "run").mkdir()
    own = f"hangs {where} {rank}"
    if machines == 1:
        processes = [start(folder, 2, 13, own)]
    else:
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "MACHINES": "2"}
        processes = [start(folder, 1, 13, own, **meet, NODE_RANK=str(machine)) for machine in (0, 1)]
    name, until = folder / "pid", time.monotonic() + 120
    while not (name.is_file() and name.read_text()):
        ended = [finish(process) for process in processes if process.poll() is not None]
        assert not ended, ended
        assert time.monotonic() < until
        time.sleep(0.1)
    time.sleep(1)  # the other one waits for it
    killed = time.monotonic()
    os.kill(int(name.read_text()), signal.SIGKILL)
    for process in processes:
        output = finish(process, 60)
        assert process.returncode != 0, output
    assert time.monotonic() - killed < 60
    assert not list(folder.rglob("*.ckpt"))
    assert not list(folder.rglob("*.partial"))


def test_connections_end_before_python_does(tmp_path):
    """Else gloo's threads now and then abort a process that has done its work."""
    script = """
import atexit, sys
from torch import distributed as dist
from pl_patchcore.distributed import Processes
atexit.register(lambda: print("left:", dist.is_initialized()))
dist.init_process_group("gloo", f"file://{sys.argv[1]}", rank=0, world_size=1)
Processes()
print("open:", dist.is_initialized())
"""
    command = [sys.executable, "-c", script, str(tmp_path / "meeting")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
    assert output.split("\n")[:2] == ["open: True", "left: False"]
