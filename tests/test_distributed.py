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
CASES = {  # name: what is fitted, training images, images in a batch
    "one image a batch": ("", 13, 1),
    "batches of 4": ("", 13, 4),
    "fewer images than processes": ("", 2, 1),
    "own loader": ("loader", 13, 1),
    "approximate": ("approximate", 13, 1),
    "random": ("random", 13, 1),
    "update": ("update", 13, 1),
    "ensemble": ("ensemble", 13, 1),
    "few images to test and to predict": ("few", 13, 1),
    "magnetic tiles": ("tiles", 19, 1),
    "magnetic tiles in batches of 4": ("tiles", 19, 4),
}
SCRIPT = """
import faulthandler, json, os, sys, time, warnings
faulthandler.dump_traceback_later(240)  # where it is, if it hangs
warnings.simplefilter("ignore")
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader
from pl_patchcore import FolderDataModule, MTDDataModule, PatchCore, SyntheticDataModule
from pl_patchcore.distributed import Processes
from pl_patchcore.report import PredictionWriter

devices, folder, cases = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
machines = int(os.environ.get("MACHINES", 1))

class SomeTiles(MTDDataModule):
    def load_records(self):
        train, test = super().load_records()
        return train[:19], test[::30]

def wait(out):
    open(out + "/pid", "w").write(str(os.getpid()))
    time.sleep(600)

class Disturbed(PatchCore):
    how = ""

    def training_step(self, batch, number):
        if self.how == "fails" and self.global_rank == 1:
            raise RuntimeError("no second process today")
        if self.how == f"hangs collecting {self.global_rank}" and number > 1:
            wait(out)
        return super().training_step(batch, number)

gather_at_first, rounds = Processes.gather_at_first, 0

def hang_or_gather(self, tensor):
    global rounds
    rounds += 1
    if own == f"hangs selecting {self.rank}" and rounds > 3:
        wait(out)
    return gather_at_first(self, tensor)

Processes.gather_at_first = hang_or_gather

def trainer_of():
    return L.Trainer(
        accelerator="cpu", devices=devices, num_nodes=machines, logger=False, default_root_dir=out, max_epochs=1,
        strategy="ddp" if devices * machines > 1 else "auto", enable_progress_bar=False, enable_model_summary=False,
    )

for name, (own, images, batch) in cases.items():
    out = os.path.join(folder, name)
    os.makedirs(out, exist_ok=True)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=4), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()
    )
    options = {"resize": 64, "crop": None, "coreset_ratio": 0.1, "projection_dim": 16, "layers": ["1", "3"]}
    options["calibration_share"] = 0.3 if images > 4 else 0.0
    if own in ("approximate", "random"):
        options["coreset_method"] = own
    if own == "ensemble":
        options["ensemble"] = {"members": [{"layers": ["1"]}, {"layers": ["3"]}]}
    data = SyntheticDataModule(
        batch_size=batch, num_workers=0, train_images=images, test_nominal=5, test_per_defect=2, image_size=96
    )
    if own == "tiles":
        net, weights = "mobilenet_v2", os.environ["SHARED"] + "/weights/mobilenet_v2.pth"
        options = {"layers": ["features.6", "features.13"], "weights": weights, "resize": 112, "crop": None}
        data = SomeTiles(os.environ["SHARED"] + "/data/mtd", batch_size=batch, num_workers=0)
    model, trainer = Disturbed(net, **options), trainer_of()
    model.how = own
    loader = None
    if own == "loader":
        data.transform = model.transform
        data.setup("fit")
        images = torch.stack([data.train_set[i]["image"] for i in range(images)])
        loader = DataLoader(images, batch_size=batch)
    trainer.fit(model, loader or data)
    if own == "update":
        trainer = trainer_of()
        more = SyntheticDataModule(batch_size=batch, num_workers=0, train_images=7, seed=1, image_size=96)
        model.update(trainer, more)
    tested = predicted = data
    if own == "few":  # images to test and to predict
        data.setup("test")
        few = [data.test_set[i] for i in (0, 6)]
        tested = DataLoader([(sample["image"], sample["label"], sample["mask"]) for sample in few], batch_size=batch)
        predicted = FolderDataModule(predict=os.path.dirname(folder) + "/few", batch_size=batch, num_workers=0)
    trainer.test(model, tested, verbose=False)
    trainer.callbacks.append(PredictionWriter(maps=True))
    trainer.predict(model, predicted, return_predictions=False)
    if trainer.is_global_zero:
        state = {k: v for k, v in model.state_dict().items() if "patch_features" not in k}
        torch.save(state, out + "/state.pt")
        saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
        assert all(torch.equal(saved[k], v) for k, v in state.items() if "features" in k)
        json.dump({"all": model.figures, "names": sorted(model.figures)}, open(out + "/figures.json", "w"))
"""
STARTED: list[subprocess.Popen[str]] = []


def draw(folder: Path) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(2, 64, 64, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")


def start(
    folder: Path, devices: int, cases: dict, launcher: Sequence[str] = (), **environment
) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    if not (folder.parent / "few").exists():
        draw(folder.parent / "few")
    script = folder / "fit.py"
    if not script.exists():  # one started before may be reading it
        script.write_text(SCRIPT)
    env = os.environ | {"SHARED": str(SHARED), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"MASTER_PORT": free_port()} | environment
    command = [sys.executable, *launcher, str(script), str(devices), str(folder), json.dumps(cases)]
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


def test_equals_one_process(tmp_path):
    """1, 2, 3 and 4 processes, each started once for all cases.

    Bit for bit where each image is a batch; the backbone's last bits depend on what else is in a batch.
    """
    cases = {name: case for name, case in CASES.items() if case[0] != "tiles" or SHARED.is_dir()}
    for count in (1, 2, 3, 4):
        process = start(tmp_path / str(count), count, cases)
        output = finish(process)
        assert process.returncode == 0, output
        assert not list((tmp_path / str(count)).rglob("*.partial"))
    for name, (own, _, batch) in cases.items():
        state, figures, table = results(tmp_path / "1" / name)
        assert len(table) == 1 + {"few": 2, "tiles": 20}.get(own, 5 + 4 * 2)
        for count in (2, 3, 4):
            found, others, rows = results(tmp_path / str(count) / name)
            assert found.keys() == state.keys()
            for key, value in state.items():
                if batch == 1:
                    assert torch.equal(found[key], value), (name, count, key)
                else:  # rows of the same patches in the same order
                    torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
            for row, other in zip(table[1:], rows[1:], strict=True):
                assert row[0] == other[0]
                assert row[-1] == other[-1]  # the map's name
                assert float(row[1]) == pytest.approx(float(other[1]), rel=1e-5)
                assert (tmp_path / str(count) / name / other[-1]).is_file()
            assert others["names"] == figures["names"]
            for key, row in figures["all"].items():
                assert others["all"][key] == pytest.approx(row, abs=1e-6, nan_ok=True), (name, count, key)


def results(folder: Path):
    """Buffers, figures and predictions of a case."""
    table = list(csv.reader((folder / "predictions.csv").read_text().splitlines()))
    figures = json.loads((folder / "figures.json").read_text())
    return torch.load(folder / "state.pt", weights_only=True), figures, table


def test_an_error_of_one_process_ends_all(tmp_path):
    process = start(tmp_path / "run", 2, {"run": ("fails", 13, 1)})
    output = finish(process, 120)
    assert process.returncode != 0
    assert "no second process today" in output
    assert not list((tmp_path / "run").rglob("*.ckpt"))


@pytest.mark.parametrize("launcher", ["Lightning", "torchrun", "SLURM"])
def test_two_machines_equal_one(tmp_path, launcher):
    """Two launches that meet at an address; SLURM is the environment that srun gives its tasks."""
    (maps := (folder := tmp_path / "two") / "run" / "maps").mkdir(parents=True)
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
        processes.append(start(folder, 1, {"run": ("", 13, 1)}, **how))
    one = start(tmp_path / "one", 1, {"run": ("", 13, 1)})
    for process in (*processes, one):
        output = finish(process)
        assert process.returncode == 0, output
    (state, figures, table), (found, others, rows) = (results(place / "run") for place in (tmp_path / "one", folder))
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found[name], value), name
    for name, row in figures["all"].items():
        assert others["all"][name] == pytest.approx(row, abs=1e-6, nan_ok=True), name
    assert len(rows) == len(table) == 1 + 5 + 4 * 2
    assert len(list(maps.iterdir())) == 5 + 4 * 2


@pytest.mark.parametrize(
    ("where", "rank", "machines"),
    [("collecting", 0, 2), ("collecting", 1, 1), ("selecting", 0, 1), ("selecting", 1, 2)],
)
def test_a_killed_process_ends_all(tmp_path, where, rank, machines):
    (folder := tmp_path / "run").mkdir()
    own = {"run": (f"hangs {where} {rank}", 13, 1)}
    if machines == 1:
        processes = [start(folder, 2, own)]
    else:
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "MACHINES": "2"}
        processes = [start(folder, 1, own, **meet, NODE_RANK=str(machine)) for machine in (0, 1)]
    name, until = folder / "run" / "pid", time.monotonic() + 120
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
