"""PatchCore as a LightningModule: glue, no arithmetic.

One epoch of ``fit`` collects patch features, ``on_train_end`` selects the coreset, and from then on
``test_step``, ``validation_step`` and ``predict_step`` score images. The way of the data is the table in
``pl_patchcore/__init__.py``. Source: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022.

Nothing is learned by gradients. Lightning still wants to see a step: without one it writes no checkpoints, and
DDP refuses a module without a trainable parameter. So there is one parameter that nothing reads, and an optimiser
with learning rate 0 that is stepped once a batch.
"""

from __future__ import annotations

import logging
import time
import warnings
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from tqdm import tqdm

from pl_patchcore.anomaly_map import AnomalyScorer, Distance
from pl_patchcore.backbone import PAPER_WEIGHTS, UntrainedBackboneWarning
from pl_patchcore.checkpoint import (
    check_identity,
    holds_backbone,
    plain,
    read_checkpoint,
    rewrite_checkpoints,
    watch_checkpoints,
)
from pl_patchcore.coreset import CoresetMethod, coreset_rows, random_projection, select_coreset
from pl_patchcore.data.base import as_batch
from pl_patchcore.errors import UserError
from pl_patchcore.feature_store import FeatureStore, held_out
from pl_patchcore.memory_bank import MemoryBank, Search
from pl_patchcore.metrics import AnomalyEvaluation, Mode
from pl_patchcore.patch_features import PatchFeatures
from pl_patchcore.preprocessing import IMAGENET_MEAN, IMAGENET_STD, UNKNOWN, Preprocessing
from pl_patchcore.recipes import RECIPES

log = logging.getLogger(__name__)


class PatchCore(L.LightningModule):
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
        search: Nearest-neighbour search by ``torch`` or ``faiss``, or ``auto``; the answers are the same.
        calibration_share: Share of the training images, in [0, 1), kept out of the memory bank and scored after
            selection (``calibration_scores``), to set thresholds with.
        metrics_mode: ``exact`` metrics keep every pixel of the test set (4 bytes each), ``streaming`` ones a histogram
            of bounded memory, whose error is bounded and reported; ``auto`` is exact up to 67 million pixels.
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

    calibration_scores: Tensor

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
        calibration_share: float = 0.0,
        metrics_mode: Mode = "auto",
        save_backbone: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < coreset_ratio <= 1:
            raise UserError(f"coreset_ratio must be in (0, 1], got {coreset_ratio}; 0.1 keeps one patch in ten.")
        if coreset_size is not None and coreset_size < 1:
            raise UserError(f"coreset_size must be at least 1, got {coreset_size}; leave it out to use coreset_ratio.")
        if coreset_method not in ("greedy", "approximate", "random", "none"):
            raise UserError(f"coreset_method must be greedy, approximate, random or none, got {coreset_method!r}.")
        if projection_dim < 1:
            raise UserError(f"projection_dim must be at least 1, got {projection_dim}.")
        if not 0 <= calibration_share < 1:
            raise UserError(f"calibration_share must be in [0, 1), got {calibration_share}.")
        weights = None if weights is None else str(weights)
        self.save_hyperparameters(ignore=["backbone"] if isinstance(backbone, nn.Module) else None)
        for name, value in self.hparams.items():
            self.hparams[name] = plain(value)  # so that checkpoints load with weights_only=True
        self.automatic_optimization = False
        self.transform = Preprocessing(resize, crop, resize_mode, interpolation, mean, std)
        self.patch_features = PatchFeatures(
            backbone, layers, weights, patch_size, patch_stride, layer_dim, feature_dim, seed
        )
        self.memory_bank = MemoryBank(search)
        self.scorer = AnomalyScorer(num_neighbors, distance, reweighting_neighbors, sigma)
        self.register_buffer("calibration_scores", torch.empty(0))
        self.unused = nn.Parameter(torch.zeros(()))  # see the module's docstring
        self.evaluation = AnomalyEvaluation(mode=metrics_mode)
        self.figures: dict[str, dict[str, Any]] = {}  # of the last test: "all" and each defect type
        self.figures_by_category: dict[str, dict[str, Any]] = {}  # of the last test, where batches name categories
        self._defects: dict[int, str] = {}
        self._categories: dict[int, str] = {}
        self._store: FeatureStore | None = None
        self._held_out: FeatureStore | None = None
        self._input_shape: tuple[int, ...] | None = None

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

    # Scoring

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Score images.

        Args:
            images: float ``(B, 3, H, W)``, as ``transform`` makes them.

        Returns:
            Anomaly scores float32 ``(B,)`` and anomaly maps float32 ``(B, H, W)``, 0 and up, without bound.

        Raises:
            UserError: If the memory bank is empty, or was made from images of another size.
        """
        shape = tuple(images.shape[1:])
        if self._input_shape not in (None, shape):
            raise UserError(
                f"images of {shape}, but the memory bank is from images of {self._input_shape}; "
                "bring them to its size (model.transform does), or fit again."
            )
        size = (images.shape[-2], images.shape[-1])
        scores, maps = self.scorer(self.patch_features(images), self.memory_bank, size)
        return scores, maps

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Score a batch and add it to the evaluation; returns ``score (B,)`` and ``anomaly_map (B, H, W)``."""
        batch = as_batch(batch)
        if "label" not in batch:
            raise UserError("a test batch needs labels (0 nominal, 1 anomalous): a dict with 'label', or a tuple.")
        scores, maps = self(batch["image"])
        labels = torch.as_tensor(batch["label"], device=scores.device)
        masks = batch.get("mask")
        if masks is None:
            masks = torch.full_like(maps, UNKNOWN, dtype=torch.uint8)
        defects = batch.get("defect", ["anomalous"] * len(scores))
        groups = [zlib.crc32(name.encode()) for name in defects]
        self._defects |= {g: d for g, d, y in zip(groups, defects, labels.tolist(), strict=True) if y == 1}
        categories = None
        if "category" in batch:
            categories = torch.tensor([zlib.crc32(name.encode()) for name in batch["category"]], device=scores.device)
            self._categories |= dict(zip(categories.tolist(), batch["category"], strict=True))
        self.evaluation.update(scores, maps, labels, masks, torch.tensor(groups, device=scores.device), categories)
        return {"score": scores, "anomaly_map": maps}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        """As `test_step`; inside ``fit``, where there is no memory bank yet, nothing."""
        return None if self.trainer.state.fn == "fit" else self.test_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Score a batch: ``score (B,)``, ``anomaly_map (B, H, W)`` and, of the batch, ``path`` and geometry."""
        batch = as_batch(batch)
        scores, maps = self(batch["image"])
        kept = {name: batch[name] for name in ("path", "index", "original_size", "crop_box") if name in batch}
        return {"score": scores, "anomaly_map": maps} | kept

    def on_test_epoch_start(self) -> None:
        """Forget the last evaluation; refuse an empty memory bank before any batch is read."""
        self._check_fitted()
        self.evaluation.reset()
        self._defects, self._categories = {}, {}

    def on_test_epoch_end(self, prefix: str = "test") -> None:
        """Compute and log the figures: image AUROC, pixel AUROC, PRO."""
        figures = self.evaluation.compute()
        groups, categories = figures.pop("by_group"), figures.pop("by_category")
        named = {self._defects.get(group, str(group)): row for group, row in groups.items()}
        self.figures = {name: _numbers(row) for name, row in ({"all": figures} | dict(sorted(named.items()))).items()}
        named = {self._categories.get(number, str(number)): row for number, row in categories.items()}
        self.figures_by_category = {name: _numbers(row) for name, row in sorted(named.items()) if self._categories}
        for name in ("image_auroc", "pixel_auroc", "pro"):
            self.log(f"{prefix}/{name}", self.figures["all"][name], rank_zero_only=True)

    def on_validation_epoch_start(self) -> None:
        """Say once why a validation inside ``fit`` scores nothing; otherwise forget the last evaluation."""
        if self.trainer.state.fn != "fit":
            self.on_test_epoch_start()
        elif self.trainer.sanity_checking or not self.trainer.num_sanity_val_steps:
            rank_zero_info("PatchCore has no memory bank before fit ends: validation inside fit scores nothing.")

    def on_validation_epoch_end(self) -> None:
        """Log the figures as ``val/...``."""
        if self.trainer.state.fn != "fit":
            self.on_test_epoch_end("val")

    def on_predict_epoch_start(self) -> None:
        """Refuse an empty memory bank before any batch is read."""
        self._check_fitted()

    def _check_fitted(self) -> None:
        if not len(self.memory_bank):
            raise UserError("the memory bank is empty; fit first, or give ckpt_path of a fitted model.")

    # Fitting

    def setup(self, stage: str) -> None:
        """Refuse what would fail only after minutes of work, and damaged checkpoints by name."""
        watch_checkpoints(self.trainer)
        if stage != "fit":
            return
        if self.trainer.world_size > 1:
            raise UserError(
                f"fitting on {self.trainer.world_size} processes is not supported yet; set trainer.devices to 1 "
                "and trainer.num_nodes to 1 (a fitted model can be tested on several)."
            )
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if isinstance(monitor, str) and monitor.startswith(("val", "test")):
                raise UserError(
                    f"{type(callback).__name__} monitors {monitor!r}, but PatchCore has no memory bank, hence no "
                    "figures, before fit ends; take monitor out (the finished model is what gets saved)."
                )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimiser that changes nothing (see the module's docstring)."""
        return torch.optim.SGD([self.unused], lr=0.0)

    def on_fit_start(self) -> None:
        """Start clean, for exactly one epoch."""
        self.memory_bank.fill(torch.empty(0, 0, device=self.device))
        self.calibration_scores = torch.empty(0, device=self.device)
        self._store = self._held_out = self._input_shape = None
        self._position = 0
        loop = self.trainer.fit_loop
        wanted = loop.max_epochs
        loop.max_epochs = self.trainer.current_epoch + 1
        loop.min_epochs = None
        if wanted not in (None, loop.max_epochs):
            rank_zero_info(f"PatchCore takes exactly one epoch; max_epochs={wanted} was set to 1.")

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Collect the patch features of a batch."""
        batch = as_batch(batch)
        images = batch["image"]
        if self._input_shape not in (None, tuple(images.shape[1:])):
            raise UserError(
                f"training images of {tuple(images.shape[1:])} after others of {self._input_shape}; "
                "bring all to one size (model.transform does)."
            )
        self._input_shape = tuple(images.shape[1:])
        index = torch.as_tensor(batch.get("index", torch.arange(self._position, self._position + len(images)))).cpu()
        self._position += len(images)
        with torch.no_grad():
            patches = self.patch_features(images)  # (B, h, w, D)
        if self._store is None:
            self._store, self._held_out = self._make_stores(patches)
        aside = torch.tensor([held_out(int(i), self._share, int(self.hparams["seed"])) for i in index])
        for store, chosen in ((self._store, ~aside), (self._held_out, aside)):
            if store is not None and chosen.any():
                store.add(patches[chosen.to(patches.device)], index[chosen])
        self.log("train/images", float(self._position), batch_size=len(images), prog_bar=False)
        optimizer = self.optimizers()
        optimizer.step()  # type: ignore[union-attr]

    def on_train_end(self) -> None:
        """Select the coreset and fill the memory bank."""
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        if self._store is None or not progress.is_last_batch:
            return  # on_fit_end says so
        store, start = self._store, time.perf_counter()
        if not len(store):
            raise UserError("no training image is left for the memory bank; lower calibration_share.")
        hp = self.hparams
        size = coreset_rows(len(store), hp["coreset_ratio"], hp["coreset_size"])
        projection = random_projection(store.dimension, hp["projection_dim"], hp["seed"])
        shown = self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero
        with tqdm(total=size, desc="Coreset", unit=" patches", disable=not shown, mininterval=0.5) as bar:
            if hp["coreset_method"] in ("greedy", "approximate"):
                projected = store.project(projection).to(self.device)
            else:
                projected = torch.empty(len(store), 0)
            picks = select_coreset(projected, size, hp["coreset_method"], seed=hp["seed"], progress=bar.update)
        self.memory_bank.fill(store.take(picks).to(self.device))
        seconds = time.perf_counter() - start
        log.info(
            "memory bank: %d of %d patch features, %d numbers each, selected in %.1f s.",
            *(len(picks), len(store), store.dimension, seconds),
        )
        if self._held_out is not None and len(self._held_out):
            self.calibration_scores = self._score_held_out(self._held_out)
        self._store = self._held_out = None

    def on_fit_end(self) -> None:
        """Refuse a fit without a memory bank; write the finished model over what callbacks saved before it."""
        self._store = self._held_out = None
        if not len(self.memory_bank):
            raise UserError(
                "fit ended before every training batch was seen, so that there is no memory bank; look at max_time, "
                "max_steps, limit_train_batches and at callbacks that stop the Trainer."
            )
        rewrite_checkpoints(self.trainer)

    def _make_stores(self, patches: Tensor) -> tuple[FeatureStore, FeatureStore | None]:
        batches, (b, h, w, d) = self.trainer.num_training_batches, patches.shape
        self._share, self._grid = float(self.hparams["calibration_share"]), (h, w)
        images = int(batches) * b if batches != float("inf") else None
        if images is not None:
            gib = images * h * w * d * 4 / 2**30
            log.info("collecting up to %d patch features of %d numbers (%.2f GiB).", images * h * w, d, gib)
        held_out = FeatureStore(d, 64 * h * w) if self._share else None
        return FeatureStore(d, None if images is None else images * h * w), held_out

    def _score_held_out(self, held_out: FeatureStore) -> Tensor:
        h, w = self._grid
        rows = torch.arange(len(held_out)).split(16 * h * w)
        size = (h, w)  # the maps are not wanted
        parts = (held_out.take(part).view(-1, h, w, held_out.dimension).to(self.device) for part in rows)
        return torch.cat([self.scorer(part, self.memory_bank, size)[0] for part in parts])

    # Checkpoints

    def identity(self) -> dict[str, Any]:
        """What the memory bank depends on, in plain values: backbone, weights (hash), features, preprocessing."""
        return self.patch_features.identity() | {"preprocessing": self.transform.as_dict()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's identity; leave the frozen backbone out unless asked to save it."""
        checkpoint["patchcore"] = self.identity() | {"input_shape": list(self._input_shape or ())}
        if not self.hparams["save_backbone"]:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith("patch_features.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose memory bank was not made with this model's features."""
        if self._trainer is not None and self._trainer.state.fn == "fit":
            raise UserError(
                "PatchCore fits in one pass and cannot resume from a checkpoint; leave ckpt_path out to fit again, "
                "or test with it."
            )
        state = checkpoint["state_dict"]
        own = {k: v for k, v in self.state_dict().items() if k.startswith("patch_features.")}
        check_identity(checkpoint, self.identity())
        checkpoint["state_dict"] = own | state
        self.calibration_scores = torch.empty_like(state["calibration_scores"], device=self.device)
        self._input_shape = tuple(checkpoint["patchcore"]["input_shape"]) or None


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in row.items()}
