"""What does `inspect` cost beside preprocessing and forward, and what do map and regions cost? A table; `make bench`.

A WideResNet-50 with random weights and a memory bank of random rows: the times do not depend on them. The defect is a
disc of a tenth of the image's width, with two specks beside it.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from pl_patchcore import Inspection, PatchCore
from pl_patchcore.inspection import Settings

TURNS = 15
SIZES = ((256, 256), (1024, 1024), (2000, 3000))  # height, width
ROWS, DIMENSIONS, SIDE = 10_000, 1536, 224  # of the memory bank; of the model's input


def seconds(calls: Sequence[Callable[[], Any]], turns: int) -> list[float]:
    """Median of each call, in turns, so that what else the machine does falls on all of them."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(turns + 1):  # the first one warms up
        for times, call in zip(found, calls, strict=True):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    return [statistics.median(times[1:]) for times in found]


def disc() -> np.ndarray:
    """An anomaly map of the input: 2 in the defects, 0 elsewhere, with soft edges."""
    y, x = np.mgrid[:SIDE, :SIDE]
    places = ((110, 110, SIDE / 20), (30, 180, 3), (190, 40, 3))
    heats = [2 / (1 + np.exp(np.hypot(y - a, x - b) - r)) for a, b, r in places]
    found: np.ndarray = np.stack(heats).max(0).astype(np.float32)
    return found


@torch.inference_mode()
def main(device: str = "cpu") -> None:
    model = PatchCore(weights=None).to(device)
    model.memory_bank.fill(torch.randn(ROWS, DIMENSIONS, device=device))
    model.model.calibration.fill(torch.rand(20), torch.rand(20))
    table = Table("image", "preprocessing, forward, ms", "inspect, ms", "ratio", "map", "mask", "regions", "draw")
    for height, width in SIZES:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))

        def plain(image: Image.Image = image) -> float:
            scores, _ = model(model.transform(image)[None].to(device))
            return float(scores)

        def judged(image: Image.Image = image) -> bool | None:
            return model.inspect(image).anomalous

        def parts(image: Image.Image = image, size: tuple[int, int] = (height, width)) -> list[float]:
            found = Inspection(2.0, True, None, disc(), size, None, image.copy, Settings(1.0, 1.0))
            began, times = time.perf_counter(), []
            for call in (
                lambda: found.anomaly_map,
                lambda: found.mask,
                lambda: [r.outline for r in found.regions],
                found.draw,
            ):
                call()
                times.append(1e3 * (time.perf_counter() - began))
                began = time.perf_counter()
            return times

        forward, inspected = seconds((plain, judged), TURNS)
        costs = np.median([parts() for _ in range(TURNS)], axis=0)
        row = [f"{1e3 * forward:.1f}", f"{1e3 * inspected:.1f}", f"{inspected / forward:.3f}"]
        table.add_row(f"{height} x {width}", *row, *(f"{cost:.1f} ms" for cost in costs))
    Console(width=120).print(table)


if __name__ == "__main__":
    main(*sys.argv[1:2])
