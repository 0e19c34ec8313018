"""How many pixels should the backbone be given at once on the CPU? A table of milliseconds an image; `make bench`."""

from __future__ import annotations

import statistics
import time
import warnings

import torch
from rich.console import Console
from rich.table import Table

from pl_patchcore import PatchFeatures, patch_features

BACKBONES = {
    "mobilenet_v2": ["features.6", "features.13"],
    "resnet18": ["layer2", "layer3"],
    "wide_resnet50_2": ["layer2", "layer3"],
}
IMAGES, SIDE, TURNS = 32, 224, 5
AT_ONCE = (1, 2, 4, 5, 8, 16, 32)  # images


@torch.inference_mode()
def main() -> None:
    """Sizes in turns, medians; features are compared bit by bit."""
    table = Table("images at once", *BACKBONES)
    images, found = torch.rand(IMAGES, 3, SIDE, SIDE), dict[str, list[float]]()
    for name, layers in BACKBONES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random weights are meant
            network = PatchFeatures(name, layers, None)
        times: list[list[float]] = [[] for _ in AT_ONCE]
        expected = network(images)
        for _ in range(TURNS):
            for number, kept in zip(AT_ONCE, times, strict=True):
                patch_features.CPU_PIXELS = number * SIDE * SIDE
                began = time.perf_counter()
                assert torch.equal(network(images), expected)
                kept.append(1e3 * (time.perf_counter() - began) / IMAGES)
        found[name] = [statistics.median(kept) for kept in times]
    for i, number in enumerate(AT_ONCE):
        table.add_row(f"{number}", *(f"{of_size[i]:.1f}" for of_size in found.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
