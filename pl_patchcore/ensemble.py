"""Several PatchCores on the same images, their scores combined.

Each member has its own backbone, layers and memory bank. Their distances differ in scale, so that they are brought
to one before they are averaged: in units of what is usual among nominal patches (``combine="nominal"``), or, as in
the authors' code, to the range over the whole test set (``combine="test_range"``), which takes a first pass over
all test images and makes each score depend on the others. Reads and returns what `patchcore.py` does.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pl_patchcore.anomaly_module import AnomalyModule
from pl_patchcore.data.base import as_batch
from pl_patchcore.errors import UserError
from pl_patchcore.patchcore import FlatPatchCore as PatchCore

Combine = Literal["nominal", "test_range"]

_OWN = (
    "backbone", "layers", "weights", "patch_size", "patch_stride", "layer_dim", "feature_dim", "coreset_method",
    "coreset_ratio", "coreset_size", "projection_dim", "num_neighbors", "distance", "reweighting_neighbors", "sigma",
    "search", "bank_dtype",
)  # fmt: skip


class PatchCoreEnsemble(AnomalyModule):
    """Several PatchCores on the same images, scores and maps averaged.

    Args:
        members: Settings of each member, arguments of `PatchCore` that differ from the shared ones: its ``backbone``,
            ``layers`` and so on. Preprocessing, calibration and seed are shared.
        combine: ``nominal``: scores and maps in units of the mean distance of nominal patches to the member's memory
            bank, averaged. ``test_range``: each member's scores and maps scaled to [0, 1] over the whole test set,
            averaged, as in the authors' code; for comparison with their figures, not for use.
        **settings: Arguments of `PatchCore` that all members share.

    Raises:
        UserError: If there is no member, or one sets what must be shared.
    """

    scale: Tensor
    ranges: Tensor

    def __init__(self, members: Sequence[dict[str, Any]], combine: Combine = "nominal", **settings: Any) -> None:
        if not members:
            raise UserError("members names no model; give the settings of at least one.")
        for member in members:
            for name in member:
                if name not in _OWN:
                    nearest = difflib.get_close_matches(name, _OWN, 1, 0)[0]
                    raise UserError(f"{name!r} cannot be set for a member; did you mean {nearest!r}, or is it shared?")
        if combine not in ("nominal", "test_range"):
            raise UserError(f"combine must be nominal or test_range, got {combine!r}.")
        if settings.get("shard_bank"):
            raise UserError("shard_bank is for a single PatchCore; leave it out of an ensemble.")
        models = [PatchCore(**(settings | member)) for member in members]
        shared = models[0].hparams
        if combine == "test_range" and shared["calibration_share"]:
            raise UserError("combine test_range looks at the test set and cannot be calibrated; use nominal.")
        own = ("calibration_share", "false_alarm_rate", "metrics_mode")
        super().__init__(models[0].transform, *(shared[name] for name in own))
        self.save_arguments()
        for name in (*own, "save_backbone", "seed"):
            self.hparams[name] = shared[name]
        self.members = nn.ModuleList(models)
        self.combine = combine
        self.register_buffer("scale", torch.ones(len(models)))  # mean distance of nominal patches
        self.ranges = torch.empty(0)  # (members, 2, 2) least and greatest score and pixel of the test set

    def _models(self) -> list[PatchCore]:
        return list(self.members)  # type: ignore[arg-type]

    @property
    def bank_shape(self) -> list[list[int]]:
        """Rows and dimensions of each member's memory bank; empty where there is none."""
        shapes = [model.bank_shape for model in self._models()]
        return shapes if all(shapes) else []

    def identity(self) -> dict[str, Any]:
        """What the memory banks depend on, in plain values."""
        return {"members": [model.identity() for model in self._models()]}

    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Combined anomaly scores ``(B,)`` and maps ``(B, H, W)``."""
        return self._combined([model.score(images) for model in self._models()])

    def _combined(self, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        scores, maps = (torch.stack(part) for part in zip(*parts, strict=True))  # (members, B), (members, B, H, W)
        if self.combine == "nominal":
            return (scores / self.scale[:, None]).mean(0), (maps / self.scale[:, None, None, None]).mean(0)
        if not len(self.ranges):
            raise UserError("combine test_range scores whole sets, by test or predict; for single images use nominal.")
        low, high = self.ranges.to(scores.device).unbind(2)  # (members, 2) each: of scores, of pixels
        span = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
        scores = (scores - low[:, :1]) / span[:, :1]
        return scores.mean(0), ((maps - low[:, 1, None, None, None]) / span[:, 1, None, None, None]).mean(0)

    def on_test_epoch_start(self) -> None:
        """As `AnomalyModule`; for ``test_range`` also go through the test set once, for the ranges."""
        super().on_test_epoch_start()
        fn = self.trainer.state.fn
        self._find_ranges(self.trainer.val_dataloaders if fn == "validate" else self.trainer.test_dataloaders)

    def on_predict_epoch_start(self) -> None:
        """As `AnomalyModule`; for ``test_range`` also go through the images once, for the ranges."""
        super().on_predict_epoch_start()
        self._find_ranges(self.trainer.predict_dataloaders)

    def _find_ranges(self, loaders: Any) -> None:
        if self.combine != "test_range":
            return
        rank_zero_info("combine test_range: going through all images once to find each member's range.")
        ranges = torch.tensor([torch.inf, -torch.inf], device=self.device).repeat(len(self.members), 2, 1)
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            for batch in _second_loader(loader):
                images = self.trainer.strategy.batch_to_device(as_batch(batch)["image"], self.device)
                for place, model in zip(ranges, self._models(), strict=True):
                    for bounds, values in zip(place, model.score(images), strict=True):
                        bounds[0] = torch.minimum(bounds[0], values.min())
                        bounds[1] = torch.maximum(bounds[1], values.max())
        self.ranges = ranges

    # Fitting

    def clear(self) -> None:
        """Forget the memory banks, and what was collected for them."""
        for model in self._models():
            model.trainer = self.trainer
            model.clear()
        self.ranges = torch.empty(0)

    def release(self) -> None:
        """Free what was collected."""
        for model in self._models():
            model.release()

    def collect(self, images: Tensor, index: Tensor, aside: Tensor) -> None:
        """Store each member's patch features of the images."""
        promised = 0.0
        for model in self._models():
            model._input_shape = tuple(images.shape[1:])
            model.memory_promised = promised
            model.collect(images, index, aside)
            promised += model.memory_planned

    def select(self) -> None:
        """Select each member's coreset, and find what distances are usual among nominal patches."""
        for model in self._models():
            model.select()
        scale = torch.tensor([model.nominal_distance() for model in self._models()], device=self.device)
        self.scale = torch.where(scale > 0, scale, torch.ones_like(scale))

    def score_held_out(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Indices, combined anomaly scores and maps of the images collected for calibration, some at a time."""
        for parts in zip(*(model.score_held_out() for model in self._models()), strict=True):
            yield parts[0][0], *self._combined([part[1:] for part in parts])


def _second_loader(loader: Any) -> Any:
    """A loader of the whole data set, apart from the one that Lightning has begun; the same on every process."""
    if not isinstance(loader, DataLoader):
        return loader
    return DataLoader(
        loader.dataset, loader.batch_size or 1, num_workers=loader.num_workers, collate_fn=loader.collate_fn
    )
