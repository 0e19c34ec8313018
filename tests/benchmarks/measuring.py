"""What the benchmarks share: clocks, memory, processes, magnetic tiles."""

import argparse
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import Tensor

from pl_patchcore import MTDDataModule, PatchFeatures, Preprocessing

SHARED = (Path(__file__).parents[2] / ".." / "shared").resolve()
MTD = SHARED / "data" / "mtd"
WEIGHTS = SHARED / "weights" / "mobilenet_v2.pth"
LAYERS = ["features.6", "features.13"]  # of MobileNetV2: 32 and 96 numbers, strides of 8 and 16 pixels
Call = Callable[[], object]


def seconds(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def medians(calls: Mapping[str, Call], turns: int, clock: Callable[[Call], float] = seconds) -> dict[str, float]:
    """Median seconds of each, in turns, so that other load on the machine meets all alike; a first turn warms up."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns + 1):
        for name, call in calls.items():
            found[name].append(clock(call))
    return {name: median(times[1:]) for name, times in found.items()}


def memory(name: str = "VmRSS") -> int:
    """Bytes that this process holds; ``RssAnon``: files left out; ``VmHWM``: at most, since `forget_peak`."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[name].split()[0])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def apart(script: str, *words: str, **environment: str) -> list[str]:
    """Lines that a script prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, script, *words], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def machine(threads: str | None = None, load: bool = False) -> str:
    told = f"{os.cpu_count()} cores, {threads or f'{torch.get_num_threads()} threads'}, torch {torch.__version__}"
    return told + (f", load before {', '.join(f'{value:.1f}' for value in os.getloadavg())}" if load else "")


def parser_of(text: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def silence() -> None:
    logging.getLogger("pl_patchcore").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # of random weights, and Lightning's about loaders


def ready_for_tiles() -> bool:
    """Silence logs and warnings; tell if there are no magnetic tiles."""
    silence()
    if not SHARED.is_dir():
        print(f"{SHARED} is not there: no magnetic tiles to measure on.")
    return SHARED.is_dir()


def tiles(**options: Any) -> MTDDataModule:
    """Magnetic tiles, whole, squashed to 224 pixels."""
    data = MTDDataModule(str(MTD), **({"num_workers": 0} | options))
    data.transform = Preprocessing(224, None)
    data.setup("fit")
    data.setup("test")
    return data


@torch.no_grad()
def patch_features(samples: Iterable[Any], layers: list[str] = LAYERS) -> Tensor:
    """Patch features ``(N, D)`` of magnetic tiles, by MobileNetV2 with ImageNet's weights."""
    network = PatchFeatures("mobilenet_v2", layers, str(WEIGHTS))
    return torch.cat([network(sample["image"][None]).flatten(0, 2) for sample in samples])


def trainer(**options: Any) -> L.Trainer:
    """A silent Trainer."""
    parts = ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar")
    return L.Trainer(accelerator="cpu", **(dict.fromkeys(parts, False) | options))
