"""What does `inspect` cost beside preprocessing and forward, and what do map and regions cost? A table; `make bench`.

A WideResNet-50 with random weights and a memory bank of random rows: the times do not depend on them. The defect is a
disc of a tenth of the image's width, with two specks beside it. Then what an image of 100 megapixels takes of memory
where its map has as many, each in a process of its own.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measuring import Call, apart, forget_peak, medians, memory, seconds
from PIL import Image
from rich.console import Console
from rich.table import Table

from pl_patchcore import Inspection, PatchCore, Preprocessing
from pl_patchcore.inspection import Settings
from pl_patchcore.report.pictures import Gallery, Shown

TURNS = 15
SIZES = ((256, 256), (1024, 1024), (2000, 3000))  # height, width
LARGE = (8000, 12_000)  # height, width
ROWS, DIMENSIONS, SIDE = 10_000, 1536, 224  # of the memory bank; of the model's input


def disc() -> np.ndarray:
    """An anomaly map of the input: 2 in the defects, 0 elsewhere, with soft edges."""
    y, x = np.mgrid[:SIDE, :SIDE]
    places = ((110, 110, SIDE / 20), (30, 180, 3), (190, 40, 3))
    heats = [2 / (1 + np.exp(np.hypot(y - a, x - b) - r)) for a, b, r in places]
    found: np.ndarray = np.stack(heats).max(0).astype(np.float32)
    return found


def large(part: str) -> None:
    """Print the highest memory above the start, MB, and the seconds, for one part of the work on a large image."""
    heat = np.full(LARGE, 0.5, np.float32)
    heat[100:130, 200:280] = heat[7900:7950, 11_000:11_060] = 2.0
    region = None
    if part.endswith("region"):
        region = np.ones(LARGE, np.uint8)
        region[:, :500] = 0
        heat[:, :500] = np.nan
    image, levels = Image.new("RGB", LARGE[::-1], (90, 100, 110)), torch.full((3, *LARGE), 90, dtype=torch.uint8)
    forget_peak()
    before, began = memory(), time.perf_counter()
    found = Inspection(2.0, True, None, heat, LARGE, None, lambda: image, Settings(1.0, 1.0), region)
    if part.startswith("regions"):
        assert len(found.regions) == 1 + (region is None)
    elif part.startswith("draw"):
        found.draw(1600)
    elif part.startswith("map"):
        assert np.nanmax(found.map_of_size(600, 900)) > 1.5
    else:
        gallery = Gallery(4)
        item = Shown.of(1.0, 0, "large", levels, torch.from_numpy(heat), None, Preprocessing(None, None))
        gallery.add(item, 1)
        with tempfile.TemporaryDirectory() as folder:
            gallery.write(Path(folder), 1.0, 1.0)
    print(f"{(memory('VmHWM') - before) / 1e6:.0f} {time.perf_counter() - began:.1f}")


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
            calls: list[Call] = [lambda: found.anomaly_map, lambda: found.mask]
            calls += [lambda: [r.outline for r in found.regions], found.draw]
            return [1e3 * seconds(call) for call in calls]

        forward, inspected = medians({"plain": plain, "judged": judged}, TURNS).values()
        costs = np.median([parts() for _ in range(TURNS)], axis=0)
        row = [f"{1e3 * forward:.1f}", f"{1e3 * inspected:.1f}", f"{inspected / forward:.3f}"]
        table.add_row(f"{height} x {width}", *row, *(f"{cost:.1f} ms" for cost in costs))
    console = Console(width=120)
    console.print(table)
    for part in ("regions", "draw", "map", "gallery", "regions, region", "draw, region", "map, region"):
        peak, spent = apart(__file__, "large", part)[-1].split()
        console.print(f"100 megapixels, {part}: {peak} MB above the image and its map, {spent} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["large"]:
        large(sys.argv[2])
    else:
        main(*sys.argv[1:2])
