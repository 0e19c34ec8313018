"""How many pixels should the backbone be given at once on the CPU? A table of milliseconds an image; `make bench`."""

import torch
from measuring import LAYERS, Call, medians, silence
from rich.console import Console
from rich.table import Table

from pl_patchcore import PatchFeatures, patch_features

BACKBONES = {"mobilenet_v2": LAYERS, "resnet18": ["layer2", "layer3"], "wide_resnet50_2": ["layer2", "layer3"]}
IMAGES, SIDE, TURNS = 32, 224, 5
AT_ONCE = (1, 2, 4, 5, 8, 16, 32)  # images


def at_once(number: int, network: PatchFeatures, images: torch.Tensor, expected: torch.Tensor) -> Call:
    """A call with so many images at once; features are compared bit by bit."""

    def call() -> None:
        patch_features.CPU_PIXELS = number * SIDE * SIDE
        assert torch.equal(network(images), expected)

    return call


@torch.inference_mode()
def main() -> None:
    """Sizes in turns, medians."""
    silence()
    table = Table("images at once", *BACKBONES)
    images, columns = torch.rand(IMAGES, 3, SIDE, SIDE), list[list[str]]()
    for name, layers in BACKBONES.items():
        network = PatchFeatures(name, layers, None)
        expected = network(images)
        found = medians({str(number): at_once(number, network, images, expected) for number in AT_ONCE}, TURNS)
        columns.append([f"{1e3 * value / IMAGES:.1f}" for value in found.values()])
    for number, *row in zip(AT_ONCE, *columns, strict=True):
        table.add_row(str(number), *row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
