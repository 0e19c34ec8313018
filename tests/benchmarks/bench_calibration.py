"""Is the false-alarm rate that calibration promises held on new nominal images? Prints a table; `make bench`.

The 952 nominal tiles of Magnetic Tile Defects are parted at random, 80 % for fitting (a share of these is held out
for calibration) and 20 % as new images, again and again. n held-out images promise floor((n + 1) rate) / (n + 1).
Patch features are computed once; selection, calibration and scoring are the model's own.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from pl_patchcore.collection import Collection, ExpectedImages
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pl_patchcore import MTDDataModule, PatchCore
from pl_patchcore.calibration import conformal_threshold, draw_held_out
from pl_patchcore.data.base import ImageDataset

SHARED = Path(__file__).parents[2] / ".." / "shared"
RATES = (0.01, 0.05, 0.1, 0.2)
SHARE = 0.2


@torch.no_grad()
def main(splits: int = 25) -> None:
    if not SHARED.is_dir():
        print(f"{SHARED} is not there: no magnetic tiles to measure on.")
        return
    weights = str(SHARED / "weights" / "mobilenet_v2.pth")
    model = PatchCore(
        "mobilenet_v2", ["features.6", "features.13"], weights, resize=160, crop=None, coreset_ratio=0.002,
        calibration_share=SHARE,
    ).eval()  # fmt: skip
    records = [r for part in MTDDataModule(str(SHARED / "data" / "mtd")).records for r in part if r.label == 0]
    images = torch.utils.data.DataLoader(ImageDataset(records, model.transform), 32, num_workers=2)
    patches = torch.cat([model.patch_features(batch["image"]) for batch in tqdm(images, "Features")])
    alarms: dict[tuple[str, float], list[float]] = {}
    for split in tqdm(range(splits), "Splits"):
        order = np.random.default_rng(split).permutation(len(patches))
        known, new = np.sort(order[: int(0.8 * len(order))]), order[int(0.8 * len(order)) :]
        aside = draw_held_out(len(known), SHARE, split)
        collection = model._collection = Collection(model.hparams, model.device)
        collection.reserve(patches.shape, ExpectedImages(len(known), len(aside), len(known)), model.memory_bank.check)
        model._input_shape = (3, 160, 160)
        for position, index in enumerate(known):
            collection.add(patches[[index]], torch.tensor([position]), torch.tensor([position in aside]))
        model.select()
        held = [(s, m.flatten(1).amax(1)) for _, s, m in model.score_held_out()]
        fresh = [model.scorer(part, model.memory_bank, (160, 160)) for part in patches[new].split(32)]
        for name, place in (("anomaly score", 0), ("peak of the map", 1)):
            calibration = torch.cat([part[place] for part in held])
            values = torch.cat([(s, m.flatten(1).amax(1))[place] for s, m in fresh])
            for rate in RATES:
                threshold, _ = conformal_threshold(calibration, rate)
                alarms.setdefault((name, rate), []).append((values > threshold).double().mean().item())
    n = len(aside)
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
