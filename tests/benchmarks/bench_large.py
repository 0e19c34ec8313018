"""Large images: are small defects found, and what do memory and time grow with? Two tables; `make bench`.

Photographs are generated: brushed metal with noise, and scratches of some pixels. MobileNetV2 with ImageNet's weights,
whose file is the first argument; without it only costs are measured, of random weights.
"""

import sys
import tempfile
from pathlib import Path
from timeit import timeit
from typing import Any

import numpy as np
import torch
from measuring import LAYERS, WEIGHTS, apart, memory, seconds, silence, trainer
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from pl_patchcore import FolderDataModule, PatchCore

PHOTOGRAPH = (2000, 3000)  # height, width
SCRATCHES = (20, 40, 78)  # pixels long
WIDTH = 3  # pixels
NOMINAL, TRAINING = 15, 12  # photographs; those of them that fit, the others are tested beside the scratched ones
SIDES = ((800, 1200), (2400, 4000), (8000, 12000))  # 1, 10, 100 megapixels
TILE = 512  # pixels


def photograph(seed: int, size: tuple[int, int] = PHOTOGRAPH) -> np.ndarray:
    """Brushed metal, uint8 ``(H, W, 3)``."""
    random = np.random.default_rng(seed)
    small = (min(size[0], 2000), min(size[1], 3000))
    brushed = ndimage.gaussian_filter(random.standard_normal(small).astype(np.float32), (1, 25)) * 90
    light = ndimage.zoom(random.standard_normal((4, 4)).astype(np.float32), (small[0] / 4, small[1] / 4), order=1) * 4
    grey = 140 + brushed + light[: small[0], : small[1]] + 3 * random.standard_normal(small).astype(np.float32)
    tiled = np.tile(grey.clip(0, 255).astype(np.uint8), [-(-n // m) for n, m in zip(size, small, strict=True)])
    return np.repeat(tiled[: size[0], : size[1], None], 3, axis=2)


def scratched(image: np.ndarray, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The image with a scratch at an angle, and its mask, bool ``(H, W)``."""
    random = np.random.default_rng(seed)
    height, width = image.shape[:2]
    y, x, angle = random.uniform(200, height - 200), random.uniform(200, width - 200), random.uniform(0.5, 2.6)
    ends = [(x + sign * length / 2 * np.cos(angle), y + sign * length / 2 * np.sin(angle)) for sign in (-1, 1)]
    drawn = Image.new("L", (width, height))
    ImageDraw.Draw(drawn).line(ends, 255, WIDTH)
    mask = np.asarray(drawn) > 0
    return np.where(mask[..., None], (0.55 * image).astype(np.uint8), image), mask


def model_of(weights: str | None, **options: Any) -> PatchCore:
    """A model of MobileNetV2."""
    made = {"layers": LAYERS, "weights": weights, "resize": None, "crop": None, "coreset_size": 2000}
    return PatchCore("mobilenet_v2", **made | options)


def finding(console: Console, weights: str) -> None:
    """Scores of scratches beside those of nominal photographs, squashed and in tiles."""
    ways: dict[str, dict[str, Any]] = {"squashed to 256": {"resize": 256}, f"tile {TILE}": {"tile": TILE}}
    table = Table("photographs of 2000 x 3000", "highest nominal", *(f"scratch of {n} pixels" for n in SCRATCHES))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(TRAINING):
            Image.fromarray(photograph(number)).save(Path(folder) / f"{number}.png")
        for name, options in ways.items():
            model = model_of(weights, **options)
            trainer().fit(model, datamodule=FolderDataModule(folder, test_share=0.0, batch_size=1, num_workers=1))
            nominal = max(model.inspect(photograph(number)).score for number in range(TRAINING, NOMINAL))
            cells = []
            for number, length in enumerate(SCRATCHES):
                image, mask = scratched(photograph(100 + number), length, number)
                found = model.inspect(image)
                near = ndimage.binary_dilation(mask, iterations=8)
                x, y = found.peak
                place = "peak on it" if near[y, x] else "peak elsewhere"
                cells.append(f"{found.score:.3f}, {place}")
            table.add_row(name, f"{nominal:.3f}", *cells)
    console.print(table)


def cost(path: str) -> None:
    """Print what `inspect` takes for an image: seconds, MiB; number of tiles, seconds of the backbone on them alone."""
    torch.manual_seed(0)
    model = model_of(None, tile=TILE)
    model.memory_bank.fill(torch.randn(2000, 128))
    model.inspect(photograph(0, (600, 600)))
    before = memory("VmHWM")
    taken = seconds(lambda: model.inspect(path).score)
    peak = (memory("VmHWM") - before) / 2**20
    width, height = Image.open(path).size
    tiling, network = model.patch_features.tiling, model.patch_features.network
    assert tiling is not None  # the model has tiles
    number = len(tiling.along(0, height)) * len(tiling.along(1, width))
    tiles = torch.rand(1, 3, *tiling.size)
    with torch.inference_mode():
        network(tiles)
        print(taken, peak, number, timeit(lambda: network(tiles), number=20) / 20 * number)


def costs(console: Console) -> None:
    """Time and memory of `inspect` by megapixels, each in a process of its own."""
    table = Table("image", "tiles", "seconds", "by megapixel", "backbone on the tiles alone, s", "peak memory, MiB")
    with tempfile.TemporaryDirectory() as folder:
        for size in SIDES:
            path = str(Path(folder) / "image.png")
            Image.fromarray(photograph(1, size)).save(path, compress_level=1)
            taken, peak, tiles, alone = map(float, apart(__file__, "cost", path)[-1].split())
            pixels = size[0] * size[1] / 1e6
            row = [f"{tiles:.0f}", f"{taken:.1f}", f"{taken / pixels:.2f}", f"{alone:.1f}", f"{peak:.0f}"]
            table.add_row(f"{size[0]} x {size[1]}", *row)
    console.print(table)


def main(weights: str = str(WEIGHTS)) -> None:
    """Both tables."""
    console = Console(width=140)
    costs(console)
    if Path(weights).exists():
        finding(console, weights)
    else:
        console.print("no weights: whether scratches are found is not measured")


if __name__ == "__main__":
    silence()
    match sys.argv[1:]:
        case ["cost", path]:
            cost(path)
        case _:
            main(*sys.argv[1:2])
