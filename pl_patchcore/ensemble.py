"""Several `PatchCoreModel` on the same images, their scores combined.

Each member has its own backbone, layers and memory bank. Their distances differ in scale, so they are brought to one
before they are averaged. Has the methods of `PatchCoreModel`; `patchcore.py` uses either.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pl_patchcore.calibration import Calibration
from pl_patchcore.counted import Counted
from pl_patchcore.distributed import on_first_process
from pl_patchcore.errors import UserError
from pl_patchcore.model import PatchCoreModel

log = logging.getLogger(__name__)
log.addFilter(on_first_process)


class EnsembleModel(nn.Module):
    """Scores images by several models; scores and maps are brought to one scale and averaged.

    Args:
        models: The members.
        combine: ``nominal``: in units of the mean distance of nominal patches to the member's memory bank.
            ``test_range``: scaled to [0, 1] over the whole test set, as in the authors' code: a first pass over all
            test images, and each score depends on the others. For comparison with their figures, not for use.

    Attributes:
        scale: Mean distance of nominal patches, of each member, float32 ``(n,)``.
        ranges: Least and greatest score, and least and greatest pixel, of each member over the test set, float32
            ``(n, 2, 2)``; of ``test_range`` only, NaN before `find_ranges`.
    """

    scale: Tensor
    ranges: Tensor

    def __init__(self, models: Sequence[PatchCoreModel], combine: str = "nominal") -> None:
        super().__init__()
        if not models:
            raise UserError("ensemble.members names no model; give the settings of at least one.")
        if combine not in ("nominal", "test_range"):
            raise UserError(f"ensemble.combine must be nominal or test_range, got {combine!r}.")
        self.models, self.combine = nn.ModuleList(models), combine
        self.calibration = Calibration()
        self.register_buffer("scale", torch.ones(len(models), dtype=torch.float32))
        unknown = torch.full((len(models), 2, 2), torch.nan, dtype=torch.float32)
        self.register_buffer("ranges", unknown, persistent=False)
        self.train(False)

    @property
    def members(self) -> list[PatchCoreModel]:
        """The models that it consists of."""
        return cast(list[PatchCoreModel], list(self.models))

    def forward(
        self, images: Tensor, counted: Counted | None = None, map_size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score images: combined anomaly scores ``(B,)`` and maps ``(B, H, W)``, as `PatchCoreModel`."""
        return self.combined([model(images, counted, map_size) for model in self.models])

    def combined(self, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Bring the scores and maps of the members to one scale, and average them."""
        scores, maps = (torch.stack(part) for part in zip(*parts, strict=True))  # (n, B), (n, B, H, W)
        if self.combine == "nominal":
            scale = self.scale.float()[:, None]
            return (scores / scale).mean(0), (maps / scale[..., None, None]).mean(0)
        if self.ranges.isnan().any():
            raise UserError("combine test_range scores whole sets, by test or predict; for single images use nominal.")
        low, high = self.ranges.float().unbind(2)  # (n, 2) each: of scores, of pixels
        span = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
        scores = (scores - low[:, :1]) / span[:, :1]
        return scores.mean(0), ((maps - low[:, 1, None, None, None]) / span[:, 1, None, None, None]).mean(0)

    @torch.no_grad()
    def find_ranges(self, batches: Iterable[tuple[Tensor, Counted | None]]) -> None:
        """Go through all images of a test set once, for ``test_range``."""
        log.info("combine test_range: going through all images once to find each member's range.")
        ranges = torch.tensor([torch.inf, -torch.inf], dtype=torch.float32).repeat(len(self.models), 2, 1)
        for images, counted in batches:
            for bounds, model in zip(ranges, self.models, strict=True):
                for bound, values in zip(bounds, model(images, counted), strict=True):
                    known = values[~values.isnan()]
                    bound[0] = torch.minimum(bound[0], known.min().cpu())
                    bound[1] = torch.maximum(bound[1], known.max().cpu())
        self.ranges = ranges.to(self.scale.device)

    def train(self, mode: bool = True) -> EnsembleModel:
        """Stay in eval mode."""
        return super().train(False)

    def identify(self) -> None:
        """As `PatchFeatures.identify`, of each member."""
        for model in self.members:
            model.identify()

    @property
    def fitted(self) -> bool:
        """Whether every member has a memory bank."""
        return all(model.fitted for model in self.members)

    @property
    def bank_shape(self) -> list[Any]:
        """Rows of each member's memory bank and numbers in each; empty where one is missing."""
        return [model.bank_shape for model in self.members] if self.fitted else []

    @property
    def identity(self) -> dict[str, Any]:
        """What the memory banks depend on, in plain values."""
        return {"members": [model.identity for model in self.members]}


def refuse_test_range(model: PatchCoreModel | EnsembleModel) -> None:
    """Refuse to calibrate an ensemble whose scores depend on all images of the test set.

    Raises:
        UserError: If it is one.
    """
    if isinstance(model, EnsembleModel) and model.combine == "test_range":
        raise UserError("combine test_range looks at the test set and cannot be calibrated; use nominal.")
