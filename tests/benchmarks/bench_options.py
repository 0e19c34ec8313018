"""What options of features, scores and references do to magnetic tiles, one at a time. Prints a table; `make bench`.

Magnetic Tile Defects, complete, with the split of published results and MobileNetV2, as in the first table of
``docs/measured.md``: tiles squashed to 224 x 224, no crop. All rows have a memory bank of the same size, 1 % of the
patch features that the tiles have as they are, but for the last two: 1 % of those of all views. The values of the
options were fixed before any figure was seen. Options that this version does not have are named and passed over.
"""

import inspect
from typing import Any

import lightning as L
import torch
from measuring import LAYERS, MTD, WEIGHTS, parser_of, ready_for_tiles, trainer
from rich.console import Console
from rich.table import Table

from pl_patchcore import MTDDataModule, PatchCore

BANK = 5_966  # rows: 1 % of 761 tiles of 784 patches
SHARED_SETTINGS: dict[str, Any] = {
    "backbone": "mobilenet_v2",
    "layers": LAYERS,
    "weights": str(WEIGHTS),
    "resize": 224,
    "crop": None,
    "coreset_size": BANK,
}
LARGER = {"coreset_size": None, "coreset_ratio": 0.01}
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "image_score: top_mean": {"image_score": "top_mean"},
    "normalize_features": {"normalize_features": True},
    "position_radius: 3": {"position_radius": 3},
    "reference_rotations: 8": {"reference_rotations": 8},
    "reference_brightness: [0.8, 1.2]": {"reference_brightness": (0.8, 1.2)},
    "reference_rotations: 8, larger bank": {"reference_rotations": 8} | LARGER,
    "reference_brightness: [0.8, 1.2], larger bank": {"reference_brightness": (0.8, 1.2)} | LARGER,
}
FIGURES = ("image_auroc", "pixel_auroc", "pro")


def fitted(options: dict[str, Any]) -> tuple[PatchCore, MTDDataModule, L.Trainer]:
    """A model with these options, and what it was fitted with."""
    data = MTDDataModule(str(MTD), train_files=str(MTD / "differnet_train_filenames.txt"), num_workers=0)
    fitter, model = trainer(max_epochs=1, enable_progress_bar=True), PatchCore(**(SHARED_SETTINGS | options))
    fitter.fit(model, data)
    return model, data, fitter


def figures_of(options: dict[str, Any]) -> list[str]:
    """Rows of the memory bank, and figures, of a fit and a test with these options."""
    model, data, fitter = fitted(options)
    fitter.test(model, data, verbose=False)
    return [f"{model.memory_bank.size:,}", *(f"{model.figures['all'][name]:.4f}" for name in FIGURES)]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="*", choices=ROWS, default=[*ROWS], help="rows to measure")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    if not ready_for_tiles():
        return
    torch.set_num_threads(given.threads)
    console, known = Console(width=120), inspect.signature(PatchCore).parameters
    table = Table("option", "memory bank", *FIGURES, title="Magnetic tiles")
    for name in given.only:
        if missing := ROWS[name].keys() - known:
            console.print(f"{name}: PatchCore has no {', '.join(missing)}.")
            continue
        table.add_row(name, *(found := figures_of(ROWS[name])))
        console.print(f"{name}: {', '.join(found)}")  # there are minutes between the rows
    console.print(table)


if __name__ == "__main__":
    main()
