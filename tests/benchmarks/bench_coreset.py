"""Greedy selection: blocks against one pick at a time. Prints a table; `make bench`.

The yardstick is a fused loop: one float32 product and one minimum over all rows a pick, timed over 300 picks (its
cost per pick does not change) and extrapolated.
"""

import os
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from pl_patchcore import MTDDataModule, PatchCore
from pl_patchcore.coreset import greedy_coreset

SHARED = Path(__file__).parents[2] / ".." / "shared"
PICKS = 300


def mixture(rows: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(200, 128, generator=g)
    scale = torch.linspace(1, 0.05, 128) * torch.rand(rows, 1, generator=g)
    return centres[torch.randint(200, (rows,), generator=g)] + torch.randn(rows, 128, generator=g) * scale


def tiles(images: int) -> torch.Tensor:
    data = MTDDataModule(SHARED / "data" / "mtd", num_workers=0)
    weights = str(SHARED / "weights" / "mobilenet_v2.pth")
    model = PatchCore("mobilenet_v2", layers=["features.6", "features.13"], weights=weights, resize=224, crop=None)
    data.transform = model.transform
    data.setup("fit")
    samples = (data.train_set[i]["image"][None] for i in range(images))
    with torch.no_grad():
        return torch.cat([model.patch_features(image).flatten(0, 2) for image in samples])


def fused_loop(features: torch.Tensor, size: int) -> float:
    """Seconds that one pick at a time would take."""
    norm, gap, pick = features.square().sum(1), torch.full((len(features),), torch.inf), 0
    start = time.perf_counter()
    for _ in range(PICKS):
        torch.minimum(gap, torch.addmv(norm + norm[pick], features, features[pick], alpha=-2), out=gap)
        pick = int(gap.argmax())
    return (time.perf_counter() - start) / PICKS * size


def main() -> None:
    sets = {"mixture 20,000": mixture(20_000), "mixture 94,080": mixture(94_080)}
    if SHARED.is_dir():
        sets["MTD 94,080"] = tiles(120)
    table = Table("rows x 128", "share", "picks", "blocks, s", "loop, s (from 300 picks)", "loop / blocks")
    for name, features in sets.items():
        for share in (0.01, 0.1, 0.25):
            size = int(share * len(features))
            start = time.perf_counter()
            greedy_coreset(features, size)
            blocks, loop = time.perf_counter() - start, fused_loop(features, size)
            table.add_row(name, f"{share:.0%}", f"{size:,}", f"{blocks:.2f}", f"{loop:.2f}", f"{loop / blocks:.1f}")
    console = Console()
    console.print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    console.print(table)


if __name__ == "__main__":
    main()
