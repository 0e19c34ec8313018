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
import ranks
import torch
from conftest import forkserver, free_port
from PIL import Image
from ranks import SHARED

CASES = {  # name: what is fitted, training images, images in a batch
    "one image a batch": ("", 13, 1),
    "leave one out": ("leave one out", 13, 1),
    "drop suspicious": ("drop suspicious", 13, 1),
    "batches of 4": ("", 13, 4),
    "fewer images than processes": ("", 2, 1),
    "own loader": ("loader", 13, 1),
    "approximate": ("approximate", 13, 1),
    "random": ("random", 13, 1),
    "update": ("update", 13, 1),
    "ensemble": ("ensemble", 13, 1),
    "places": ("places", 13, 1),
    "views": ("views", 13, 1),
    "views of batches of 4": ("views", 13, 4),
    "few images to test and to predict": ("few", 13, 1),
    "magnetic tiles": ("tiles", 19, 1),
    "magnetic tiles in batches of 4": ("tiles", 19, 4),
}


class Copy:
    """A process with the face of `subprocess.Popen`: a copy of one that has imported everything."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], output: Path) -> None:
        self.process = forkserver().Process(target=ranks.work, args=(arguments, environment, output))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> None:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("ranks.py", timeout)


pytestmark = pytest.mark.slow
STARTED: list[subprocess.Popen[str] | Copy] = []


def draw(folder: Path) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(2, 64, 64, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")


def start(
    folder: Path, devices: int, cases: dict, launcher: Sequence[str] = (), **environment
) -> subprocess.Popen[str] | Copy:
    folder.mkdir(exist_ok=True)
    if not (folder.parent / "few").exists():
        draw(folder.parent / "few")
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_PORT": free_port()} | environment
    arguments, output = [str(devices), str(folder), json.dumps(cases)], folder / f"output {len(STARTED)}"
    if launcher:
        with output.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *launcher, ranks.__file__, *arguments],
                env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
    else:
        process = Copy(arguments, environment, output)
    process.output = output
    STARTED.append(process)
    return process


def finish(process: subprocess.Popen[str] | Copy, seconds: int = 240) -> str:
    """Output of a process and of those it started, once all have ended."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        for each in STARTED:
            end(each)
        pytest.fail("\n\n".join([f"not done after {seconds} s:", *(each.output.read_text() for each in STARTED)]))
    finally:
        end(process)
    return process.output.read_text()


def end(process: subprocess.Popen[str] | Copy) -> None:
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
    """1 and 3 processes, each started once for all cases, and 2 and 4 for the first ones.

    Bit for bit where each image is a batch; the backbone's last bits depend on what else is in a batch.
    """
    every = {name: case for name, case in CASES.items() if case[0] != "tiles" or SHARED.is_dir()}
    cases_of = {1: every, 2: dict([*every.items()][:5]), 3: every, 4: dict([*every.items()][:5])}
    for count, cases in cases_of.items():
        meeting = {"MASTER_PORT": free_port()}
        own = [meeting | {"LOCAL_RANK": str(rank)} for rank in range(count)] if count > 1 else [{}]
        processes = [start(tmp_path / str(count), count, cases, **environment) for environment in own]
        for process in processes:
            output = finish(process)
            assert process.returncode == 0, output
        assert not list((tmp_path / str(count)).rglob("*.partial"))
    for name, (own, _, batch) in every.items():
        state, figures, table = results(tmp_path / "1" / name)
        assert len(table) == 1 + {"few": 2, "tiles": 20}.get(own, 5 + 4 * 2)
        for count in (n for n in (2, 3, 4) if name in cases_of[n]):
            found, others, rows = results(tmp_path / str(count) / name)
            assert found.keys() == state.keys()
            if own == "drop suspicious":
                lists = [tmp_path / n / name / "training_images.csv" for n in ("1", str(count))]
                assert lists[0].read_text() == lists[1].read_text()
                assert len(lists[0].read_text().splitlines()) == 14
            for key, value in state.items():
                if batch == 1:
                    assert torch.equal(found[key], value), (name, count, key)
                else:  # rows of the same patches in the same order
                    torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
            for row, other in zip(table[1:], rows[1:], strict=True):
                assert row[0] == other[0]
                assert row[-1] == other[-1]  # the map's name
                assert float(row[1]) == pytest.approx(float(other[1]), rel=1e-5)
                assert row[-2] == other[-2]  # the picture's
                assert all((tmp_path / str(count) / name / file).is_file() for file in other[-2:])
            if "verdict" in table[0]:
                one, several = (
                    json.loads((tmp_path / n / name / "defects.json").read_text()) for n in ("1", str(count))
                )
                assert [image["file_name"] for image in several["images"]] == [row[0] for row in table[1:]]
                assert [a["image_id"] for a in several["annotations"]] == [a["image_id"] for a in one["annotations"]]
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
