"""Are defective images among the training images found by their leave-one-out scores? Prints tables; `make bench`.

Among 200 nominal tiles of Magnetic Tile Defects lie 1, 4 or 16 defective ones of one kind, drawn at random again and
again. Shown are the share of the defective tiles among as many first ones in the order of the scores, and among the
first 10; how many of the defective and of the nominal tiles stand out, by the package's rule; and the image AUROC on
the other tiles, of the memory bank with the defective tiles in it, of that of `drop_suspicious`, and of one from the
nominal tiles alone. Last, 8 defective tiles of the five kinds among 50 tiles.

Patch features are computed once; selection, scores and rule are the package's own.
"""

import argparse
import logging
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from bench_calibration import BACKBONES, LAYERS, SHARED, Known
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from tqdm import tqdm

from pl_patchcore import MTDDataModule, PatchCoreModel, PatchFeatures, Preprocessing
from pl_patchcore.anomaly_map import AnomalyScorer
from pl_patchcore.coreset import CoresetOptions
from pl_patchcore.data.base import NOMINAL, ImageDataset
from pl_patchcore.fitting import Fitting

SIDE, BANK = 128, 0.01  # pixels; share of the patch features
TILES, DEFECTIVE, NEW = 200, (1, 4, 16), 300  # nominal tiles of a fit, defective ones among them, new nominal ones
MIXED, AMONG = 8, 50  # defective tiles of different kinds, and all tiles of such a fit
FIRST = 10


class Found(NamedTuple):
    """What a fit found."""

    first: float  # share of the defective tiles among as many first ones
    in_ten: float  # and among the first 10
    standing: float  # share of the defective tiles that stand out
    nominal: float  # share of the nominal tiles that stand out
    before: float  # AUROC with the defective tiles in the memory bank
    after: float  # by drop_suspicious
    clean: float  # without them


def tiles() -> tuple[Tensor, dict[str, Tensor]]:
    """Patch features of all tiles, ``(N, D, h, w)``, and the numbers of the tiles of each kind."""
    records = [r for part in MTDDataModule(str(SHARED / "data" / "mtd")).records for r in part]
    images = torch.utils.data.DataLoader(ImageDataset(records, Preprocessing(SIDE, None)), 32)
    network = PatchFeatures("mobilenet_v2", LAYERS, BACKBONES["MobileNetV2"])
    features = torch.cat([network(batch["image"]).permute(0, 3, 1, 2) for batch in tqdm(images, "Features")])
    kinds = np.array([record.defect for record in records])
    return features, {str(kind): torch.from_numpy((kinds == kind).nonzero()[0]) for kind in np.unique(kinds)}


def fitted(training: Tensor, seed: int, drop: bool = False) -> tuple[PatchCoreModel, Fitting]:
    """A model of patch features ``(n, D, h, w)``, and its fit."""
    coreset = CoresetOptions(ratio=BANK, seed=seed)
    model = PatchCoreModel(Known(), scorer=AnomalyScorer(sigma=0), coreset=coreset)  # type: ignore[arg-type]
    fitting = Fitting(model, seed=seed, images=len(training), leave_one_out=len(training), drop_suspicious=drop)
    for batch in training.split(32):
        fitting.add(batch)
    fitting.select()
    fitting.close()
    return model, fitting


def auroc(model: PatchCoreModel, nominal: Tensor, defective: Tensor) -> float:
    """Image AUROC on the patch features of other tiles."""
    scores = torch.cat([model(part)[0] for part in torch.cat([nominal, defective]).split(32)])
    labels = torch.cat([torch.zeros(len(nominal)), torch.ones(len(defective))]).long()
    return float(binary_auroc(scores, labels))


def contaminated(features: Tensor, nominal: Tensor, bad: Tensor, other: Tensor, size: int, seed: int) -> Found:
    """Fit on ``size`` nominal tiles and the ``bad`` ones, test on the next nominal and the ``other`` defective ones."""
    draw = np.random.default_rng(seed)
    order = draw.permutation(size + len(bad))  # the defective tiles lie anywhere
    training = torch.cat([nominal[:size], bad])[torch.from_numpy(order)]
    is_bad = order >= size
    tested = features[nominal[size : size + NEW]], features[other]
    model, fitting = fitted(features[training], seed)
    ranked = is_bad[[each.image for each in fitting.training_images]]
    standing = np.array([each.stands_out for each in fitting.training_images])
    return Found(
        ranked[: len(bad)].sum() / len(bad),
        ranked[:FIRST].sum() / len(bad),
        standing[ranked].mean(),
        standing[~ranked].mean(),
        auroc(model, *tested),
        auroc(fitted(features[training], seed, drop=True)[0], *tested),
        auroc(fitted(features[training[~is_bad]], seed)[0], *tested),
    )


def add_row(table: Table, names: list[str], draws: Iterable[Found]) -> None:
    """Add the means over the draws."""
    table.add_row(*names, *(f"{mean:.3f}" for mean in np.mean(list(draws), 0)))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--mixed_draws", type=int, default=25)
    given = parser.parse_args()
    if not SHARED.is_dir():
        print(f"{SHARED} is not there: no magnetic tiles to measure on.")
        return
    logging.getLogger("pl_patchcore").setLevel(logging.ERROR)
    features, kinds = tiles()
    nominal = kinds.pop(NOMINAL)
    columns = ("first", "first 10", "stand out", "nominal stand out", "AUROC before", "left out", "nominal alone")
    table, ten = Table("kind", "defective", *columns, title=f"Among {TILES} nominal tiles"), list[float]()
    for kind, numbers in kinds.items():
        for count in DEFECTIVE:
            found = []
            for seed in tqdm(range(given.draws), f"{count} {kind}"):
                draw = torch.Generator().manual_seed(seed)
                mine = numbers[torch.randperm(len(numbers), generator=draw)]
                rest = torch.cat([mine[count:], *(tiles for name, tiles in kinds.items() if name != kind)])
                good = nominal[torch.randperm(len(nominal), generator=draw)]
                found.append(contaminated(features, good, mine[:count], rest, TILES, seed))
            add_row(table, [kind, str(count)], found)
    mixed = Table("defective", *columns, title=f"{MIXED} of different kinds among {AMONG} tiles")
    found = []
    for seed in tqdm(range(given.mixed_draws), mixed.title):
        draw = torch.Generator().manual_seed(seed)
        shuffled = [numbers[torch.randperm(len(numbers), generator=draw)] for numbers in kinds.values()]
        turns = [shuffled[place % len(shuffled)][place // len(shuffled)] for place in range(MIXED)]
        bad = torch.stack(turns)
        rest = torch.cat([*kinds.values()])
        good = nominal[torch.randperm(len(nominal), generator=draw)]
        found.append(contaminated(features, good, bad, rest[~torch.isin(rest, bad)], AMONG - MIXED, seed))
        ten.append(MIXED * found[-1].in_ten)
    add_row(mixed, [str(MIXED)], found)
    console = Console(width=160)
    console.print(table)
    console.print(mixed)
    enough = sum(number > MIXED - 1.5 for number in ten)
    console.print(f"At least {MIXED - 1} of {MIXED} are among the first {FIRST} in {enough} of {len(ten)} draws.")


if __name__ == "__main__":
    main()
