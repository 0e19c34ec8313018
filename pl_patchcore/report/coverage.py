"""What the coreset covers, as a picture: the selected rows against as many random ones (the paper's figure 3)."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import pad

from pl_patchcore.files import output_folder, plain_console, whole_file
from pl_patchcore.memory_bank import MemoryBank

SHOWN = 20_000  # patch features drawn and measured, at most


def draw_coverage(features: Tensor, rows: Tensor, path: Path) -> None:
    """Draw which features were selected, beside a random selection of the same size, on two principal components.

    The titles give the mean and largest distance of the features drawn to the nearest selected one, in all dimensions.

    Args:
        features: (Projected) patch features, ``(N, d)``.
        rows: Rows selected, ``(M,)``, int64.
        path: Picture to write.
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).to(features.device)
    drawn = features[order[:SHOWN]].float()  # (n, d)
    mean = drawn.mean(0)
    _, _, axes = torch.pca_lowrank(drawn - mean, q=min(2, *drawn.shape), center=False)  # (d, 2)
    picture = Figure(figsize=(11, 5), layout="constrained")
    panels = picture.subplots(1, 2, sharex=True, sharey=True)
    for panel, (name, chosen) in zip(panels, (("coreset", rows), ("random", order[: len(rows)])), strict=True):
        picked, bank = features[chosen].float(), MemoryBank()
        bank.fill(picked)
        distance = bank(drawn)[0][:, 0]
        for points, size, colour in ((drawn, 2, "0.8"), (picked, 6, "tab:red")):
            flat = pad((points - mean) @ axes, (0, 2 - axes.shape[1])).cpu().numpy()  # (n, 2)
            panel.scatter(flat[:, 0], flat[:, 1], s=size, c=colour, linewidths=0, rasterized=True)
        panel.set_title(
            f"{name}: {len(chosen)} of {len(features)}\ndistance {distance.mean():.3g}, at most {distance.max():.3g}"
        )
        panel.set_xlabel("first principal component")
    panels[0].set_ylabel("second principal component")
    with whole_file(path) as partial:
        picture.savefig(partial, dpi=100)


class CoverageReport(Callback):
    """Draws ``coverage.png`` when a fit ends: the coreset in its patch features, beside a random one.

    Reads the module's ``selected``: projected patch features and the rows picked, or None.

    Args:
        draw: Whether to draw it.
    """

    def __init__(self, draw: bool = False) -> None:
        self.draw = draw

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, while the module still holds its patch features."""
        folder = output_folder(trainer)
        if not self.draw or not trainer.is_global_zero:
            return
        if (selected := getattr(pl_module, "selected", None)) is None:
            said = "No coverage.png: there is one only for a single model with a greedy coreset, fitted by one process."
        else:
            features, rows = selected
            draw_coverage(features, rows, folder / "coverage.png")
            said = f"Written to {folder}: coverage.png"
        plain_console().print(said)
