"""What several test modules use: a tiny backbone, a Trainer that is quiet, processes that meet at a port.

Imports torch in fixtures only: the process that hands tests out to others needs none of it.
"""

import contextlib
import logging
import multiprocessing
import os
import secrets
import socket
import subprocess

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are short, and run side by side; torch reads it when imported
# A busy machine is no reason to fail: hypothesis otherwise times each example, and how long they take to draw.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True, scope="module")
def log_levels():
    """The command line sets levels for the whole process; no module sees those of another."""
    loggers = [logging.getLogger(name) for name in ("pl_patchcore", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def tiny():
    from networks import TinyBackbone

    return TinyBackbone()


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def trainer(tmp_path):
    import lightning as L

    def make(**options):
        defaults = {
            "accelerator": "cpu",
            "logger": False,
            "default_root_dir": tmp_path,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return L.Trainer(**(defaults | options))

    return make


def free_port() -> str:
    """A port below those that systems deal out (32,768, or 16,000, and more), which others may take first."""
    while True:
        port = 10_000 + secrets.randbelow(6_000)
        with contextlib.suppress(OSError), socket.socket() as tried:
            tried.bind(("127.0.0.1", port))
            return str(port)


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=60, metavar="N", help="files changed at random, of each kind")


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Starts processes as copies of one that has imported torch, Lightning and the package: seconds, once for all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pl_patchcore.patchcore", "pl_patchcore.data.mtd", "pl_patchcore.report"])
    return context
