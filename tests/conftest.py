"""What several test modules use: a tiny backbone, a Trainer that is quiet, processes that meet at a port."""

import contextlib
import multiprocessing
import os
import secrets
import socket

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch: tests are small, and there is one for each core

import hypothesis
import lightning as L
import pytest
import torch
from torch import nn

# A busy machine is no reason to fail: hypothesis otherwise times each example, and how long they take to draw.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


class TinyBackbone(nn.Module):
    """Two convolutions, 4 and 8 pixels a cell, with weights drawn once."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.fine = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
            self.coarse = nn.Sequential(nn.Conv2d(8, 12, 2, 2), nn.ReLU(inplace=True))
            self.head = nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.coarse(self.fine(x)).mean((2, 3)))


@pytest.fixture
def tiny():
    return TinyBackbone()


@pytest.fixture
def trainer(tmp_path):
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


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Starts processes as copies of one that has imported torch, Lightning and the package: seconds, once for all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning", "pl_patchcore.patchcore", "pl_patchcore.data.mtd", "pl_patchcore.report"])
    return context
