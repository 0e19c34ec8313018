"""Is the false-alarm rate that calibration promises held on new nominal images? Prints a table; `make bench`.

The 952 nominal tiles of Magnetic Tile Defects are parted at random, 80 % for fitting (a share of these is held out
for calibration) and 20 % as new images, again and again. n held-out images promise floor((n + 1) rate) / (n + 1).
Patch features are computed once; selection, calibration and scoring are the model's own.
"""

import math
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pl_patchcore import MTDDataModule, PatchCoreModel, PatchFeatures, Preprocessing
from pl_patchcore.calibration import conformal_threshold, draw_held_out
from pl_patchcore.coreset import CoresetOptions
from pl_patchcore.coreset.collection import Collection
from pl_patchcore.data.base import ImageDataset
from pl_patchcore.distributed import Processes
from pl_patchcore.options import StoreOptions

SHARED = Path(__file__).parents[2] / ".." / "shared"
RATES = (0.01, 0.05, 0.1, 0.2)
KINDS = ("anomaly score", "peak of the map")
SHARE, SIZE = 0.2, 160


def scores_and_peaks(model: PatchCoreModel, patches: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Of all images, ``(n,)`` each."""
    found = [model.scorer(part, model.memory_bank, (SIZE, SIZE)) for part in patches]
    return [torch.cat(values) for values in zip(*((s, m.amax((1, 2))) for s, m in found), strict=True)]


@torch.no_grad()
def main(splits: int = 25) -> None:
    if not SHARED.is_dir():
        print(f"{SHARED} is not there: no magnetic tiles to measure on.")
        return
    weights = str(SHARED / "weights" / "mobilenet_v2.pth")
    features = PatchFeatures("mobilenet_v2", ["features.6", "features.13"], weights)
    model = PatchCoreModel(features, coreset=CoresetOptions(ratio=0.002))
    records = [r for part in MTDDataModule(str(SHARED / "data" / "mtd")).records for r in part if r.label == 0]
    images = torch.utils.data.DataLoader(ImageDataset(records, Preprocessing(SIZE, None)), 32, num_workers=2)
    patches = torch.cat([features(batch["image"]) for batch in tqdm(images, "Features")])
    alarms: dict[tuple[str, float], list[float]] = {}
    for split in tqdm(range(splits), "Splits"):
        order = np.random.default_rng(split).permutation(len(patches))
        known, new = np.sort(order[: int(0.8 * len(order))]), order[int(0.8 * len(order)) :]
        aside = torch.zeros(len(known), dtype=torch.bool)
        aside[sorted(draw_held_out(len(known), SHARE, split))] = True
        collection = Collection(model.coreset, StoreOptions(), patches.device, held_out=True)
        collection.add(patches[known], torch.arange(len(known)), aside)
        model.memory_bank.fill(*collection.select(patches[:0], 0, Processes(alone=True)))
        held_out = scores_and_peaks(model, [image for _, image in collection.held_out_images()])
        collection.close()
        found_new = scores_and_peaks(model, patches[new].split(32))
        for name, calibration, values in zip(KINDS, held_out, found_new, strict=True):
            for rate in RATES:
                threshold, _ = conformal_threshold(calibration, rate)
                alarms.setdefault((name, rate), []).append((values > threshold).double().mean().item())
    n = int(aside.sum())
    table = Table("threshold of", "rate asked", "promised", "found, mean", "standard error", "difference / error")
    for (name, rate), found in alarms.items():
        promised = conformal_threshold(torch.zeros(n), rate)[1]
        mean, error = np.mean(found), np.std(found, ddof=1) / math.sqrt(splits)
        table.add_row(
            name, f"{rate:g}", f"{promised:.4f}", f"{mean:.4f}", f"{error:.4f}", f"{(mean - promised) / error:+.1f}"
        )
    console = Console()
    console.print(f"{splits} random splits: {len(known) - n} tiles fit, {n} calibrate, {len(new)} are new")
    console.print(table)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
