"""The whole method as a plain module: images -> anomaly scores and anomaly maps. No Lightning.

`PatchCoreModel` joins the parts in the order of an image's way: patch features, the memory bank, the scorer. It can be
copied, pickled, saved whole, moved, cast, called from several threads, nested in any module, and exported by
``torch.export``. `fitting.py` fills its memory bank; `patchcore.py` puts it into Lightning. Source: Roth et al.,
"Towards Total Recall in Industrial Anomaly Detection", CVPR 2022.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_patchcore.anomaly_map import AnomalyScorer
from pl_patchcore.calibration import Calibration
from pl_patchcore.coreset import CoresetOptions
from pl_patchcore.counted import Counted, one_by_one
from pl_patchcore.distributed import on_first_process
from pl_patchcore.errors import UserError
from pl_patchcore.foreground import ForegroundKind, foreground
from pl_patchcore.memory_bank import ForeignRows, MemoryBank
from pl_patchcore.patch_features import Band, Inference, PatchFeatures

log = logging.getLogger(__name__)
log.addFilter(on_first_process)


class PatchCoreModel(nn.Module):
    """Scores images by the distance of their patch features to a memory bank of nominal ones.

    Always in eval mode. All that a fit finds is in buffers, which load by ``load_state_dict`` whatever their size.

    Args:
        patch_features: Images to patch features: the backbone and its layers.
        memory_bank: Nearest neighbours; None: an empty bank with exact search.
        scorer: Distances to scores and maps; None: as in the paper.
        coreset: Which patch features a fit keeps; None: one in ten, greedy.
        foreground: Whether only an object in front of a plain background counts, and by what it is found.
        mask_references: Whether that holds of the images of the memory bank, too.
        inference: What the backbone computes in when images are scored: ``float32``; ``bf16``; ``auto``: bf16 where
            the processor multiplies it much faster. Distances are exact for the patch features so computed.

    Raises:
        UserError: If ``inference`` is none of these.

    Attributes:
        input_size: Height and width of the images that it scores, int64 ``(2,)``; zeros: any size.
        calibration: Scores of nominal images, and the thresholds.

    Example:
        >>> from pl_patchcore.fitting import Fitting
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU())
        >>> model = PatchCoreModel(PatchFeatures(network, ["1"], None))
        >>> fitting = Fitting(model)
        >>> for batch in torch.rand(6, 3, 32, 32).split(2):
        ...     fitting.add(batch)
        >>> fitting.select()
        >>> scores, maps = model(torch.rand(4, 3, 32, 32))
        >>> scores.shape, maps.shape
        (torch.Size([4]), torch.Size([4, 32, 32]))
    """

    input_size: Tensor

    def __init__(
        self,
        patch_features: PatchFeatures,
        memory_bank: MemoryBank | None = None,
        scorer: AnomalyScorer | None = None,
        coreset: CoresetOptions | None = None,
        foreground: ForegroundKind = "none",
        mask_references: bool = True,
        inference: Inference = "float32",
    ) -> None:
        super().__init__()
        if inference not in get_args(Inference):
            raise UserError(f"inference must be float32, bf16 or auto, got {inference!r}.")
        self.inference = inference
        self.foreground, self.mask_references = foreground, mask_references
        self.patch_features = patch_features
        self.memory_bank = MemoryBank() if memory_bank is None else memory_bank
        self.scorer = AnomalyScorer() if scorer is None else scorer
        self.coreset = CoresetOptions() if coreset is None else coreset
        self.calibration = Calibration()
        self.register_buffer("input_size", torch.zeros(2, dtype=torch.int64))
        self.train(False)

    def forward(
        self,
        images: Tensor,
        counted: Counted | None = None,
        map_size: tuple[int, int] | None = None,
        bank: MemoryBank | ForeignRows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Score images.

        Args:
            images: ``(B, 3, H, W)``, of any floating type, normalised; or uint8 levels.
            counted: Which places of the images count; None: all.
            map_size: Height and width of the maps, in whose pixels they are smoothed; None: those of the images.
            bank: What to compare with; None: the model's memory bank.

        Returns:
            Anomaly scores float32 ``(B,)`` and anomaly maps float32 ``(B, H, W)``, feature distances: 0 and up,
            without bound; NaN in maps where a pixel does not count.

        Raises:
            UserError: If the memory bank is empty, or was made from images of another size; if no patch counts.
        """
        if not isinstance(images, Tensor):
            raise UserError(f"images must be a tensor (B, 3, H, W), got {type(images).__name__}; inspect takes others.")
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                f"images must be (B, 3, H, W), got {tuple(images.shape)}; images[None] makes a batch of one."
            )
        size = images.shape[-2:]
        if not torch.compiler.is_compiling():  # a recorded graph cannot ask
            fixed = self.input_size.tolist()
            if any(fixed) and fixed != list(size):
                raise UserError(
                    f"images of {size[0]}x{size[1]} pixels, but the memory bank is from images of "
                    f"{fixed[0]}x{fixed[1]}; bring them to its size (model.transform does), or fit again."
                )
            if not images.shape[0]:
                none = images.new_zeros(0, *size, dtype=torch.float32)
                return none.flatten(1).sum(1), none
        if self.patch_features.tiling is not None and len(images) > 1:  # one at a time: each may be many tiles
            found = [self(*part, map_size, bank) for part in one_by_one(images, counted)]
            scores, maps = zip(*found, strict=True)
            return torch.cat(scores), torch.cat(maps)
        bands: Iterable[Band] = self.patch_features.bands(images, self.inference, raw=self.foreground != "none")
        if self.foreground != "none":
            bands, counted = self.in_front(bands, images, counted, self.inference)
        bank = self.memory_bank if bank is None else bank
        return self.scorer(bands, bank, map_size or size, counted)  # type: ignore[no-any-return]

    def in_front(
        self, bands: Iterable[Band], images: Tensor, counted: Counted | None, inference: Inference = "float32"
    ) -> tuple[Iterable[Band], Counted]:
        """Find the object in front of a plain background.

        Args:
            bands: Patch features of the images, as long as they are.
            images: ``(B, 3, H, W)``.
            counted: Which places of them count; None: all.
            inference: What the network computes in.

        Returns:
            The patch features, of unit length where that is asked for, and which places of the object count.
        """
        tiling = self.patch_features.tiling
        if tiling is None or tiling.holds(*images.shape[2:]):
            bands = list(bands)
            features = bands[0].features
        else:  # the features of a large image are never all there: the object is found in a small one
            images = self.patch_features.small(images)
            features = next(self.patch_features.bands(images, inference, raw=True)).features
        found = foreground(self.foreground, images, features)
        if (empty := ~found.flatten(1).any(1)).any():
            if self.scorer.top_share_of == "scored":
                found[empty] = True
            else:
                log.warning("no object is found in %d of %d images, which score 0.", int(empty.sum()), len(empty))
        if self.patch_features.normalize:
            bands = (band._replace(features=F.normalize(band.features, dim=3)) for band in bands)
        return bands, Counted.of_objects(images, counted, found)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Run on noise, if all images have one size: torch makes its kernels for a size with the first image of it.

        One row of patches is compared with the memory bank.
        """
        size = self.input_size.tolist()
        if self.fitted and any(size) and self.patch_features.tiling is None:
            noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
            for band in self.patch_features.bands(noise.to(self.input_size.device), self.inference):
                self.scorer([band._replace(features=band.features[:, :1])], self.memory_bank, size)

    def train(self, mode: bool = True) -> PatchCoreModel:
        """Stay in eval mode."""
        return super().train(False)

    def cut_bank(self) -> None:
        """Bring a larger memory bank down to the coreset's size: its first rows are the coreset of that size.

        Thresholds that were calibrated with the larger bank are left out.

        Raises:
            UserError: If the bank was selected in no order.
        """
        bank, size = self.memory_bank, self.coreset.size
        if size is None or size >= bank.size:
            return
        if self.coreset.method not in ("greedy", "approximate"):
            raise UserError(
                f"coreset_size cannot cut down a bank selected by {self.coreset.method}, which has no order; fit again."
            )
        log.info("memory bank: the first %d of %d patch features.", size, bank.size)
        if len(self.calibration.scores):
            log.warning(
                "the thresholds were calibrated with the larger memory bank and are left out; pl-patchcore calibrate "
                "(in Python model.calibrate) sets new ones."
            )
        height, width = bank.grid.tolist()
        bank.fill(bank.features[:size], bank.radii[: size + 1], bank.images[:size], bank.places[:size], (height, width))
        self.calibration.clear()

    def identify(self) -> None:
        """As `PatchFeatures.identify`."""
        self.patch_features.identify()

    @property
    def members(self) -> list[PatchCoreModel]:
        """The models that it consists of: itself (see `EnsembleModel`)."""
        return [self]

    @property
    def fitted(self) -> bool:
        """Whether there is a memory bank."""
        return self.memory_bank.size > 0

    @property
    def bank_shape(self) -> list[Any]:
        """Rows of the memory bank and numbers in each; empty where there is none."""
        return list(self.memory_bank.features.shape) if self.fitted else []

    @property
    def identity(self) -> dict[str, Any]:
        """What the memory bank depends on, in plain values."""
        return self.patch_features.identity
