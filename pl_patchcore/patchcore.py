"""PatchCore as a LightningModule: glue, no arithmetic.

One epoch of ``fit`` collects patch features, the end of the epoch selects the coreset, and from then on images are
scored by their distance to it. The way of the data is the table in ``pl_patchcore/__init__.py``; what is Lightning's
is in `anomaly_module.py`. Source: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pl_patchcore.anomaly_map import AnomalyScorer, Distance
from pl_patchcore.anomaly_module import AnomalyModule
from pl_patchcore.backbone import PAPER_WEIGHTS, UntrainedBackboneWarning
from pl_patchcore.checkpoint import holds_backbone, read_checkpoint
from pl_patchcore.coreset import CoresetMethod, coreset_rows, random_projection, select_coreset
from pl_patchcore.errors import UserError
from pl_patchcore.feature_store import FeatureStore
from pl_patchcore.memory_bank import BankDtype, MemoryBank, Search
from pl_patchcore.patch_features import PatchFeatures
from pl_patchcore.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from pl_patchcore.recipes import RECIPES

log = logging.getLogger(__name__)


class PatchCore(AnomalyModule):
    """Anomaly detection by the distance of patch features to a memory bank of nominal ones.

    The defaults are the recipe ``paper``; `from_recipe` gives it and ``official``, the authors' code.

    Args:
        backbone: Name of a torchvision classification model, or a module of your own (a copy is used).
        layers: Layers by dotted name, such as ``layer2`` or ``features.6``; the first gives the patch grid.
        weights: Name of torchvision weights, path of a ``.pth``, ``.pt`` or ``.safetensors`` state dict, or null for
            random weights. A module keeps the weights it has unless a path is given.
        patch_size: Side of the neighbourhood a patch feature aggregates, odd, in cells of the layer's grid.
        patch_stride: Step between patches, in cells of the layer's grid.
        layer_dim: Null: features are averaged over the neighbourhood and layers concatenated. A number: adaptive
            pooling of each layer to so many numbers, as in the authors' code; goes with ``feature_dim``.
        feature_dim: Adaptive pooling of all layers together to so many numbers.
        resize: Size of the image before the crop, pixels: a number, ``[height, width]``, or null to leave it.
        crop: Size of the centre crop, pixels: a number, ``[height, width]``, or null for none.
        resize_mode: ``squash`` both sides to ``resize``, or resize the ``shorter_side`` and keep the aspect ratio.
        interpolation: Filter of the resize, ``bilinear`` or ``bicubic``, antialiased.
        mean: Mean of the normalisation, RGB in [0, 1].
        std: Standard deviation of the normalisation, RGB in [0, 1].
        coreset_method: ``greedy``: exact farthest-first selection. ``approximate``: with the authors' start of 10
            random rows. ``random``: a uniform draw. ``none``: every patch feature is kept.
        coreset_ratio: Share of the patch features kept, in (0, 1].
        coreset_size: Number of patch features kept, in place of ``coreset_ratio``.
        projection_dim: Dimension of the random projection the selection works in; features of no more dimensions
            are not projected.
        num_neighbors: Nearest neighbours whose distances are averaged.
        distance: ``euclidean``, or ``squared`` as in the authors' code.
        reweighting_neighbors: b of the paper's equation 7; 1 for no re-weighting.
        sigma: Standard deviation of the Gaussian that smooths anomaly maps, pixels; 0 for none.
        search: Nearest-neighbour search. Exact, the same answers: ``torch``, ``pca``, ``bf16``, ``int8``, ``faiss``, or
            ``auto``, what is fastest on the machine. Approximate: a factory string of faiss, such as ``HNSW32``;
            built and its recall measured at the end of fit.
        bank_dtype: Type the memory bank is kept and saved in: ``float32``, ``float16`` or ``bfloat16``.
        calibration_share: Share of the training images, in [0, 1), kept out of the memory bank and scored after
            selection, to set thresholds for anomaly scores and maps with; 0 for no thresholds.
        false_alarm_rate: Share of nominal images, in (0, 1), that may exceed these thresholds; can be changed
            without fitting again.
        save_backbone: Put the backbone's weights into checkpoints (they are named and hashed otherwise).
        seed: Seed of all random choices: projection, selection, calibration split, random weights.

    Raises:
        UserError: For a value out of range, an unknown name, or weights that cannot be had or do not fit.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU())
        >>> model = PatchCore(network, layers=["1"], resize=64, crop=None)
        >>> model.patch_features(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 16, 16, 8])
    """

    def __init__(
        self,
        backbone: str | nn.Module = "wide_resnet50_2",
        layers: Sequence[str] = ("layer2", "layer3"),
        weights: str | None = PAPER_WEIGHTS,
        patch_size: int = 3,
        patch_stride: int = 1,
        layer_dim: int | None = None,
        feature_dim: int | None = None,
        resize: int | tuple[int, int] | None = 256,
        crop: int | tuple[int, int] | None = 224,
        resize_mode: Literal["squash", "shorter_side"] = "squash",
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        coreset_method: CoresetMethod = "greedy",
        coreset_ratio: float = 0.1,
        coreset_size: int | None = None,
        projection_dim: int = 128,
        num_neighbors: int = 1,
        distance: Distance = "euclidean",
        reweighting_neighbors: int = 9,
        sigma: float = 4.0,
        search: Search = "auto",
        bank_dtype: BankDtype = "float32",
        calibration_share: float = 0.0,
        false_alarm_rate: float = 0.01,
        save_backbone: bool = False,
        seed: int = 0,
    ) -> None:
        transform = Preprocessing(resize, crop, resize_mode, interpolation, mean, std)
        super().__init__(transform, calibration_share, false_alarm_rate)
        if not 0 < coreset_ratio <= 1:
            raise UserError(f"coreset_ratio must be in (0, 1], got {coreset_ratio}; 0.1 keeps one patch in ten.")
        if coreset_size is not None and coreset_size < 1:
            raise UserError(f"coreset_size must be at least 1, got {coreset_size}; leave it out to use coreset_ratio.")
        if coreset_method not in ("greedy", "approximate", "random", "none"):
            raise UserError(f"coreset_method must be greedy, approximate, random or none, got {coreset_method!r}.")
        if projection_dim < 1:
            raise UserError(f"projection_dim must be at least 1, got {projection_dim}.")
        weights = None if weights is None else str(weights)
        self.save_hyperparameters(ignore=["backbone"] if isinstance(backbone, nn.Module) else None)
        self.make_plain()
        self.patch_features = PatchFeatures(
            backbone, layers, weights, patch_size, patch_stride, layer_dim, feature_dim, seed
        )
        self.memory_bank = MemoryBank(search, bank_dtype)
        self.scorer = AnomalyScorer(num_neighbors, distance, reweighting_neighbors, sigma)
        self._store: FeatureStore | None = None
        self._held_out: FeatureStore | None = None
        self._grid = (0, 0)  # patches of an image, down and across

    @classmethod
    def from_recipe(cls, name: str, **overrides: Any) -> PatchCore:
        """Build a model from a named recipe, some of its choices overridden.

        Args:
            name: ``paper`` or ``official``.
            overrides: Arguments of `PatchCore`.

        Raises:
            UserError: If the recipe is unknown.
        """
        if name not in RECIPES:
            raise UserError(f"recipe {name!r} is unknown; choose one of {', '.join(RECIPES)}.")
        return cls(**(RECIPES[name] | overrides))

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **overrides: Any) -> PatchCore:
        """Load a fitted model, with ``weights_only=True``.

        Args:
            checkpoint_path: File written by a fit.
            args: As `lightning.LightningModule.load_from_checkpoint`.
            overrides: Also arguments of `PatchCore` to change; ``weights=<path>`` if the backbone's weights lie
                elsewhere (checked by their hash), ``backbone=<module>`` for a module of your own.

        Raises:
            UserError: If the file is missing, cut short, of another model, or holds no memory bank.
        """
        saved = read_checkpoint(checkpoint_path)
        own = "backbone" not in saved["hyper_parameters"]
        if own and "backbone" not in overrides:
            raise UserError(
                f"{checkpoint_path} was fitted with a module as backbone ({saved['patchcore']['backbone']}); "
                "pass it: load_from_checkpoint(path, backbone=module)."
            )
        brings_weights = holds_backbone(saved)
        with warnings.catch_warnings():
            if brings_weights and "weights" not in overrides:
                warnings.simplefilter("ignore", UntrainedBackboneWarning)
                overrides["weights"] = None
            overrides.setdefault("weights_only", True)
            model: PatchCore = super().load_from_checkpoint(checkpoint_path, *args, **overrides)
        if brings_weights:
            model.hparams["weights"] = saved["hyper_parameters"]["weights"]
        return model

    # What `AnomalyModule` asks for

    @property
    def bank_shape(self) -> list[int]:
        """Rows and dimensions of the memory bank; empty where there is none."""
        return list(self.memory_bank.features.shape) if len(self.memory_bank) else []

    def identity(self) -> dict[str, Any]:
        """What the memory bank depends on, in plain values: backbone, weights (hash), features, preprocessing."""
        return self.patch_features.identity() | {"preprocessing": self.transform.as_dict()}

    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly scores ``(B,)`` and maps ``(B, H, W)``."""
        scores, maps = self.scorer(self.patch_features(images), self.memory_bank, images.shape[-2:])
        return scores, maps

    def clear(self) -> None:
        """Forget the memory bank, and what was collected for one."""
        self.memory_bank.fill(torch.empty(0, 0, device=self.device))
        self.release()

    def release(self) -> None:
        """Free what was collected."""
        self._store = self._held_out = None

    def collect(self, images: Tensor, index: Tensor, aside: Tensor) -> None:
        """Store the images' patch features, those for calibration apart."""
        patches = self.patch_features(images)  # (B, h, w, D)
        if self._store is None:
            self._store, self._held_out = self._make_stores(patches)
        for store, chosen in ((self._store, ~aside), (self._held_out, aside)):
            if store is not None and chosen.any():
                store.add(patches[chosen.to(patches.device)], index[chosen])

    def select(self) -> None:
        """Select the coreset and fill the memory bank."""
        store, start = self._store, time.perf_counter()
        if store is None or not len(store):
            raise UserError("no training image is left for the memory bank; lower calibration_share.")
        hp = self.hparams
        size = coreset_rows(len(store), hp["coreset_ratio"], hp["coreset_size"])
        projection = random_projection(store.dimension, hp["projection_dim"], hp["seed"])
        trainer = self._trainer
        shown = trainer is not None and trainer.progress_bar_callback is not None and trainer.is_global_zero
        with tqdm(total=size, desc="Coreset", unit=" patches", disable=not shown, mininterval=0.5) as bar:
            if hp["coreset_method"] in ("greedy", "approximate"):
                projected = store.project(projection).to(self.device)
            else:
                projected = torch.empty(len(store), 0)
            picks = select_coreset(projected, size, hp["coreset_method"], seed=hp["seed"], progress=bar.update)
        self.memory_bank.fill(store.take(picks).to(self.device))
        if self.memory_bank.approximate:
            self.memory_bank.recall(self._stored_sample())
        log.info(
            "memory bank: %d of %d patch features, %d numbers each, selected in %.1f s.",
            *(len(picks), len(store), store.dimension, time.perf_counter() - start),
        )

    def score_held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Anomaly scores and maps of the images collected for calibration, 16 at a time."""
        if self._held_out is None or self._input_shape is None:
            return
        h, w = self._grid
        for rows in torch.arange(len(self._held_out)).split(16 * h * w):
            patches = self._held_out.take(rows).view(-1, h, w, self._held_out.dimension).to(self.device)
            yield self.scorer(patches, self.memory_bank, self._input_shape[-2:])

    def nominal_distance(self, rows: int = 1000) -> float:
        """Mean distance of stored patch features to the memory bank, themselves not counted.

        Args:
            rows: Patch features looked at, evenly spread over the training images.
        """
        nearest, _ = self.memory_bank(self._stored_sample(rows), min(2, len(self.memory_bank)))
        distance = torch.where(nearest[:, 0] > 0, nearest[:, 0], nearest[:, -1]).double()
        return float((distance.square() if self.hparams["distance"] == "squared" else distance).mean())

    def _stored_sample(self, rows: int = 1000) -> Tensor:
        """Stored patch features, evenly spread over the training images."""
        assert self._store is not None
        chosen = torch.linspace(0, len(self._store) - 1, min(rows, len(self._store))).long()
        return self._store.take(chosen).to(self.device)

    def _make_stores(self, patches: Tensor) -> tuple[FeatureStore, FeatureStore | None]:
        batches, (b, h, w, d) = self.trainer.num_training_batches, patches.shape
        self._grid = (h, w)
        images = int(batches) * b if batches != float("inf") else None
        kept = None
        if images is not None:
            ratio = 1.0 if self.hparams["coreset_method"] == "none" else self.hparams["coreset_ratio"]
            kept = coreset_rows(images * h * w, ratio, self.hparams["coreset_size"])  # at most
        self.memory_bank.check(d, kept)
        if images is not None:
            gib = images * h * w * d * 4 / 2**30
            log.info("collecting up to %d patch features of %d numbers (%.2f GiB).", images * h * w, d, gib)
        held_out = FeatureStore(d, 64 * h * w) if self.hparams["calibration_share"] else None
        return FeatureStore(d, None if images is None else images * h * w), held_out
