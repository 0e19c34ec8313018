"""Are defective images among the training images found by their leave-one-out scores? Prints tables; `make bench`.

Among 200 nominal tiles of Magnetic Tile Defects lie 1, 4 or 16 defective ones of one kind, drawn at random again and
again. Shown are the share of the defective tiles among as many first ones in the order of the scores, and among the
first 10, there also with a memory bank from the nominal tiles alone, as the best to be had; how many of the defective
and of the nominal tiles stand out, by the package's rule; and the image AUROC on the other tiles, of the memory bank
with the defective tiles in it, of that of `drop_suspicious`, and of one from the nominal tiles alone. Last, 8 defective
images of different kinds among 50, of the tiles and of generated images.

Patch features are computed once; selection, scores and rule are the package's own.
"""

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from bench_calibration import features_of, fitted
from measuring import MTD, WEIGHTS, parser_of, ready_for_tiles
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from tqdm import tqdm

from pl_patchcore import MTDDataModule, PatchCoreModel, SyntheticDataModule
from pl_patchcore.data.base import NOMINAL, Record

SIDE, BANK = 128, 0.01  # pixels; share of the patch features
TILES, DEFECTIVE, NEW = 200, (1, 4, 16), 300  # nominal tiles of a fit, defective ones among them, new nominal ones
MIXED, AMONG = 8, 50  # defective tiles of different kinds, and all tiles of such a fit
FIRST = 10


class Found(NamedTuple):
    """What a fit found."""

    first: float  # share of the defective tiles among as many first ones
    in_ten: float  # and among the first 10
    best: float  # among the first 10 where the memory bank is from the nominal tiles alone
    standing: float  # share of the defective tiles that stand out
    nominal: float  # share of the nominal tiles that stand out
    before: float  # AUROC with the defective tiles in the memory bank
    after: float  # by drop_suspicious
    clean: float  # without them


def known(records: list[Record]) -> tuple[Tensor, dict[str, Tensor]]:
    """Patch features of all images, ``(N, D, h, w)``, and the numbers of the images of each kind."""
    kinds = np.array([record.defect for record in records])
    numbers = {str(kind): torch.from_numpy((kinds == kind).nonzero()[0]) for kind in np.unique(kinds)}
    return features_of(records, SIDE, str(WEIGHTS)), numbers


def auroc(model: PatchCoreModel, nominal: Tensor, defective: Tensor) -> float:
    """Image AUROC on the patch features of other tiles."""
    scores = torch.cat([model(part)[0] for part in torch.cat([nominal, defective]).split(32)])
    labels = torch.cat([torch.zeros(len(nominal)), torch.ones(len(defective))]).long()
    return float(binary_auroc(scores, labels))


def contaminated(training: Tensor, bad: Tensor, tested: tuple[Tensor, Tensor], seed: int) -> Found:
    """Fit on nominal tiles and the ``bad`` ones, all as patch features; test on nominal and defective ones."""
    order = np.random.default_rng(seed).permutation(len(training) + len(bad))  # the defective tiles lie anywhere
    mixed, is_bad = torch.cat([training, bad])[torch.from_numpy(order)], order >= len(training)
    dropping, fitting = fitted([mixed], BANK, seed, leave_one_out=len(mixed), drop_suspicious=True)
    ranked = is_bad[[each.image for each in fitting.training_images]]
    standing = np.array([each.stands_out for each in fitting.training_images])
    keeping, _ = fitted([mixed], BANK, seed)
    clean, fitting = fitted([training], BANK, seed, leave_one_out=len(training))
    nominal, known = [each.score for each in fitting.training_images], clean(bad)[0].tolist()
    best = np.argsort([*nominal, *known])[::-1][:FIRST] >= len(nominal)
    return Found(
        ranked[: len(bad)].sum() / len(bad), ranked[:FIRST].sum() / len(bad), best.sum() / len(bad),
        standing[ranked].mean(), standing[~ranked].mean(),
        *(auroc(model, *tested) for model in (keeping, dropping, clean)),
    )  # fmt: skip


def mixed_row(table: Table, name: str, features: Tensor, kinds: dict[str, Tensor], draws: int) -> str:
    """Add a row of `MIXED` defective images of different kinds; say in how many draws nearly all come first."""
    nominal, found = kinds[NOMINAL], list[Found]()
    shown = [numbers for kind, numbers in kinds.items() if kind != NOMINAL]
    for seed in tqdm(range(draws), f"{MIXED} of {name}"):
        good, *shuffled = (shuffle(numbers, seed) for numbers in (nominal, *shown))
        turns = [shuffled[place % len(shuffled)][place // len(shuffled)] for place in range(MIXED)]
        bad, every = torch.stack(turns), torch.cat(shown)
        clean = AMONG - MIXED
        tested = features[good[clean : clean + NEW]], features[every[~torch.isin(every, bad)]]
        found.append(contaminated(features[good[:clean]], features[bad], tested, seed))
    add_row(table, [name, str(MIXED)], found)
    enough = [sum(MIXED * share > MIXED - 1.5 for share in shares) for shares in list(zip(*found, strict=True))[1:3]]
    return (
        f"{name}: at least {MIXED - 1} of {MIXED} are among the first {FIRST} in {enough[0]} of {draws} draws, with a "
        f"memory bank from the nominal images alone in {enough[1]}."
    )


def shuffle(numbers: Tensor, seed: int) -> Tensor:
    """The numbers in an order drawn by the seed."""
    return numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))]


def add_row(table: Table, names: list[str], draws: Iterable[Found]) -> None:
    """Add the means over the draws."""
    table.add_row(*names, *(f"{mean:.3f}" for mean in np.mean(list(draws), 0)))


@torch.no_grad()
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--mixed_draws", type=int, default=10)
    given = parser.parse_args()
    if not ready_for_tiles():
        return
    features, kinds = known([*chain(*MTDDataModule(str(MTD)).records)])
    columns = (
        *("first", "first 10", "by nominal bank", "stand out", "nominal stand out"),
        *("AUROC before", "left out", "nominal alone"),
    )
    table = Table("kind", "defective", *columns, title=f"Among {TILES} nominal tiles: means of {given.draws} draws")
    for kind in sorted(kinds.keys() - {NOMINAL}):
        for count in DEFECTIVE:
            found = []
            for seed in tqdm(range(given.draws), f"{count} {kind}"):
                good, bad = shuffle(kinds[NOMINAL], seed), shuffle(kinds[kind], seed)
                rest = [bad[count:], *(numbers for other, numbers in kinds.items() if other not in (NOMINAL, kind))]
                tested = features[good[TILES : TILES + NEW]], features[torch.cat(rest)]
                found.append(contaminated(features[good[:TILES]], features[bad[:count]], tested, seed))
            add_row(table, [kind, str(count)], found)
    mixed = Table("images", "defective", *columns, title=f"{MIXED} of different kinds among {AMONG}")
    told = [mixed_row(mixed, "magnetic tiles", features, kinds, given.mixed_draws)]
    drawn = SyntheticDataModule(test_nominal=150, test_per_defect=25, image_size=SIDE).records[1]
    told.append(mixed_row(mixed, "generated images", *known(drawn), given.mixed_draws))
    console = Console(width=170)
    for each in (table, mixed, *told):
        console.print(each)


if __name__ == "__main__":
    main()
