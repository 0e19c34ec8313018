"""PatchCore as a LightningModule: glue, no arithmetic.

One epoch of ``fit`` collects patch features, the end of the epoch selects the coreset, and from then on images are
scored by their distance to it. The way of the data is the table in ``pl_patchcore/__init__.py``; what is Lightning's
is in `anomaly_module.py`. Source: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from pl_patchcore.anomaly_map import AnomalyScorer, Distance
from pl_patchcore.anomaly_module import AnomalyModule
from pl_patchcore.backbone import PAPER_WEIGHTS, UntrainedBackboneWarning
from pl_patchcore.checkpoint import holds_backbone, read_checkpoint
from pl_patchcore.collection import Collection, ExpectedImages
from pl_patchcore.coreset import CoresetMethod
from pl_patchcore.distributed import Processes, on_first_process
from pl_patchcore.errors import UserError
from pl_patchcore.memory_bank import BankDtype, MemoryBank, Search
from pl_patchcore.metrics import Mode
from pl_patchcore.patch_features import PatchFeatures
from pl_patchcore.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from pl_patchcore.options import EnsembleOptions, ImageOptions, PatchOptions, RefusesUnknown, StoreOptions, options_of
from pl_patchcore.configs import recipe
from pl_patchcore.store_plan import StoreDtype, StoreKind

log = logging.getLogger(__name__)
log.addFilter(on_first_process)


class FlatPatchCore(AnomalyModule):
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
        coreset_size: Number of patch features kept, in place of ``coreset_ratio``. Lowered when a greedy bank is loaded
            from a checkpoint, it cuts the bank down: the first ones selected are the coreset of that size.
        coreset_seconds: Time after which greedy selection stops with the patch features it has; null takes its time.
        projection_dim: Dimension of the random projection the selection works in; features of no more dimensions
            are not projected.
        store: Where the patch features of the training images go until the memory bank is selected: ``ram``,
            ``disk`` (a temporary file), or ``auto``: the disk where the fit would take more than half of the main
            memory available. The memory bank is the same.
        store_dir: Folder of the file; null: the system's folder for temporary files.
        store_dtype: ``float32``, or ``float16`` or ``bfloat16`` to halve the space: the memory bank's features are
            rounded so (which are selected does not change).
        selection_memory: GiB that the greedy selection may take; where that is too little to hold all projected
            features, it selects within chunks, then among the selected: farther from the best coverage, at most 4
            times in place of 2. Null: select exactly.
        num_neighbors: Nearest neighbours whose distances are averaged.
        distance: ``euclidean``, or ``squared`` as in the authors' code.
        reweighting_neighbors: b of the paper's equation 7; 1 for no re-weighting.
        sigma: Standard deviation of the Gaussian that smooths anomaly maps, pixels; 0 for none.
        search: Nearest-neighbour search. Exact, the same answers: ``torch``, ``pca``, ``bf16``, ``int8``, ``faiss``, or
            ``auto``, what is fastest on the machine. Approximate: a factory string of faiss, such as ``HNSW32``;
            built and its recall measured at the end of fit.
        bank_dtype: Type the memory bank is kept and saved in: ``float32``, ``float16`` or ``bfloat16``.
        shard_bank: Where several processes validate, test or predict, let each keep only its share of the memory bank
            on its device and search it for the images of all; the same scores, for banks larger than a device.
        calibration_share: Share of the training images, in [0, 1), kept out of the memory bank and scored after
            selection, to set thresholds for anomaly scores and maps with; 0 for no thresholds.
        false_alarm_rate: Share of nominal images, in (0, 1), that may exceed these thresholds; can be changed
            without fitting again.
        metrics_mode: ``exact`` metrics keep every pixel of the test set (4 bytes each), ``streaming`` ones a histogram
            of bounded memory, whose error is bounded and reported; ``auto`` is exact up to 67 million pixels.
        compile_backbone: Run the backbone through ``torch.compile``: a quarter of a minute at the start, up to twice
            as fast from then on.
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

    sized_by_fit = (*AnomalyModule.sized_by_fit, "coverage_radii")
    seen: Tensor
    coverage_radii: Tensor
    coverage: Tensor

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
        coreset_seconds: float | None = None,
        projection_dim: int = 128,
        store: StoreKind = "auto",
        store_dir: str | None = None,
        store_dtype: StoreDtype = "float32",
        selection_memory: float | None = None,
        num_neighbors: int = 1,
        distance: Distance = "euclidean",
        reweighting_neighbors: int = 9,
        sigma: float = 4.0,
        search: Search = "auto",
        bank_dtype: BankDtype = "float32",
        shard_bank: bool = False,
        calibration_share: float = 0.0,
        false_alarm_rate: float = 0.01,
        metrics_mode: Mode = "auto",
        compile_backbone: bool = False,
        save_backbone: bool = False,
        seed: int = 0,
    ) -> None:
        transform = Preprocessing(resize, crop, resize_mode, interpolation, mean, std)
        super().__init__(transform, calibration_share, false_alarm_rate, metrics_mode)
        if not 0 < coreset_ratio <= 1:
            raise UserError(f"coreset_ratio must be in (0, 1], got {coreset_ratio}; 0.1 keeps one patch in ten.")
        if coreset_size is not None and coreset_size < 1:
            raise UserError(f"coreset_size must be at least 1, got {coreset_size}; leave it out to use coreset_ratio.")
        if coreset_method not in ("greedy", "approximate", "random", "none"):
            raise UserError(f"coreset_method must be greedy, approximate, random or none, got {coreset_method!r}.")
        if coreset_seconds is not None and coreset_seconds <= 0:
            raise UserError(f"coreset_seconds must be more than 0, got {coreset_seconds}; leave it out for no limit.")
        if projection_dim < 1:
            raise UserError(f"projection_dim must be at least 1, got {projection_dim}.")
        if store not in ("auto", "ram", "disk"):
            raise UserError(f"store must be auto, ram or disk, got {store!r}.")
        if store_dtype not in ("float32", "float16", "bfloat16"):
            raise UserError(f"store_dtype must be float32, float16 or bfloat16, got {store_dtype!r}.")
        if selection_memory is not None and coreset_seconds is not None:
            raise UserError("coreset_seconds goes with exact selection; leave it or selection_memory out.")
        if selection_memory is not None and (coreset_method != "greedy" or not selection_memory > 0):
            raise UserError(
                f"selection_memory must be GiB above 0 and goes with coreset_method greedy, got {selection_memory} "
                f"and {coreset_method}; leave it out to select exactly."
            )
        memory_bank = MemoryBank(search, bank_dtype)
        if shard_bank and memory_bank.approximate:
            raise UserError(f"shard_bank goes with exact search, got {search!r}; leave one of them out.")
        weights = None if weights is None else str(weights)
        self.save_arguments(*(["backbone"] if isinstance(backbone, nn.Module) else []))
        self.patch_features = PatchFeatures(
            backbone, layers, weights, patch_size, patch_stride, layer_dim, feature_dim, seed
        )
        if compile_backbone:
            self.patch_features.backbone.network.compile()
        self.memory_bank = memory_bank
        self.scorer = AnomalyScorer(num_neighbors, distance, reweighting_neighbors, sigma)
        self._collection: Collection | None = None
        self._kept: Tensor | None = None  # the bank that an update starts from
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # patch features selected from, all updates
        self.register_buffer("coverage_radii", torch.empty(0))  # (M + 1,), see coreset.Selection, projected
        self.register_buffer("coverage", torch.full((2,), torch.nan))  # see `measure_coverage`
        self.keep_selected = False  # whether to hold projected patch features and picks until fit ends
        self.memory_promised = 0.0  # bytes that others (of an ensemble) will still take

    @classmethod
    def from_recipe(cls, name: str, **overrides: Any) -> PatchCore:
        """Build a model from a named recipe, some of its choices overridden.

        Args:
            name: ``paper``, ``official`` or ``mstc``.
            overrides: Arguments of `PatchCore`.

        Raises:
            UserError: If the recipe is unknown.
        """
        return cls(**(recipe(name) | overrides))

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

    def update(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Add nominal images to a fitted model.

        The memory bank is selected again from what it held and the new images' patch features, down to
        ``coreset_size``, or to ``coreset_ratio`` of all patch features ever seen. What an earlier selection left
        out is gone: the bank is as good as one fitted on all images at once where the earlier bank stands well for
        its images. Thresholds are calibrated anew on held-out new images, if ``calibration_share`` asks for them.

        Args:
            trainer: A Trainer.
            args: As `lightning.Trainer.fit` takes them after the model: loader or data module of the new images.
            kwargs: As `lightning.Trainer.fit`.

        Raises:
            UserError: If the model is not fitted.
        """
        self._check_fitted()
        before = {name: value for name, value in self._buffers.items() if value is not None}
        bank, self.updating = self.memory_bank.features, True
        before["seen"] = self.seen.clone()
        try:
            trainer.fit(self, *args, **kwargs)
        except BaseException:
            self._buffers.update(before)
            self.memory_bank.fill(bank)  # as it was
            raise
        finally:
            self.updating, self._kept = False, None

    # What `AnomalyModule` asks for

    @property
    def bank_shape(self) -> list[int]:
        """Rows and dimensions of the memory bank; empty where there is none."""
        return [len(self.memory_bank), self.memory_bank.features.shape[1]] if len(self.memory_bank) else []

    def identity(self) -> dict[str, Any]:
        """What the memory bank depends on, in plain values: backbone, weights (hash), features, preprocessing."""
        return self.patch_features.identity() | {"preprocessing": self.transform.as_dict()}

    def setup(self, stage: str) -> None:
        """As `AnomalyModule`; also deal the memory bank out to the processes, before a device has to hold it."""
        super().setup(stage)
        if stage != "fit" and self.hparams["shard_bank"] and self.trainer.world_size > 1:
            self.memory_bank.share(Processes(self.trainer.strategy.root_device))
            self._ddp_params_and_buffers_to_ignore = ["memory_bank.features"]  # Lightning would send all process 0's

    def on_scored(self) -> None:
        """Search for the processes that have images left."""
        self.memory_bank.serve()

    def teardown(self, stage: str) -> None:
        """Put the memory bank together again."""
        self.memory_bank.unshare()

    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly scores ``(B,)`` and maps ``(B, H, W)``."""
        scores, maps = self.scorer(self.patch_features(images), self.memory_bank, images.shape[-2:])
        return scores, maps

    def clear(self) -> None:
        """Forget the memory bank (an update puts it aside), and what was collected for one."""
        if self.updating:
            self._kept = self.memory_bank.features
        else:
            self._kept = None
            self.seen.zero_()
        self.coverage_radii = torch.empty(0, device=self.device)
        self.memory_bank.fill(torch.empty(0, 0, device=self.device))
        self.release()

    def release(self) -> None:
        """Free what was collected."""
        if self._collection is not None:
            self._collection.close()
        self._collection = None

    @property
    def selected(self) -> tuple[Tensor, Tensor] | None:
        """Projected patch features and the picks among them, if they are kept (`keep_selected`), until fit ends."""
        return None if self._collection is None else self._collection.selected

    @property
    def memory_planned(self) -> float:
        """Bytes that this fit takes until what it collected is freed."""
        return 0.0 if self._collection is None else self._collection.peak

    def collect(self, images: Tensor, index: Tensor, aside: Tensor) -> None:
        """Store the images' patch features, those for calibration apart."""
        patches = self.patch_features(images)  # (B, h, w, D)
        if self._collection is None:
            near = self.trainer.num_devices if self.trainer.world_size > 1 else 1
            collection = Collection(self.hparams, self.device)
            expected = self._expected_images(len(patches))
            collection.reserve(patches.shape, expected, self.memory_bank.check, near, self.memory_promised)
            self._collection = collection
        self._collection.add(patches, index, aside)

    def select(self) -> None:
        """Select the coreset and fill the memory bank."""
        start, trainer = time.perf_counter(), self._trainer
        if self._collection is None:  # no image came to this process
            self._collection = Collection(self.hparams, self.device)
        collection = self._collection
        collection.join(self.processes())
        kept = torch.empty(0, collection.dimension) if self._kept is None else self._kept.float().cpu()
        self.seen += collection.total
        shown = trainer is not None and trainer.progress_bar_callback is not None and trainer.is_global_zero
        bank, radii = collection.select(kept, int(self.seen), keep=self.keep_selected, shown=shown)
        self.memory_bank.fill(bank.to(self.device))
        self._kept = None
        if self.memory_bank.approximate:
            self.memory_bank.recall(collection.sample().to(self.device))
        log.info(
            "memory bank: %d of %d patch features, %d numbers each, selected in %.1f s.",
            *(len(bank), len(kept) + collection.total, bank.shape[1], time.perf_counter() - start),
        )
        if radii is not None:
            self.coverage_radii = radii.to(self.device)
        self.coverage = self.measure_coverage()
        log.info(
            "coverage: patch features lie %.4g from the memory bank on average, %.4g at most.",
            *(self.coverage[1].item(), self.coverage[0].item()),
        )

    def score_held_out(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Indices, anomaly scores and maps of the images collected for calibration, one at a time."""
        if self._collection is None or self._input_shape is None:
            return
        for index, patches in self._collection.held_out_images():
            scores, maps = self.scorer(patches.to(self.device), self.memory_bank, self._input_shape[-2:])
            yield torch.tensor([index]), scores, maps

    def measure_coverage(self) -> Tensor:
        """Largest and mean distance of stored patch features to the memory bank, those in it counted with 0.

        Returns:
            float32 ``(2,)``, of at most 1000 patch features, evenly spread over the training images.
        """
        nearest = self.memory_bank(self._stored_sample())[0][:, 0]
        return torch.stack([nearest.max(), nearest.mean()])

    def nominal_distance(self) -> float:
        """Mean distance of stored patch features to the memory bank, themselves not counted, as in the score.

        Of at most 1000 patch features, evenly spread over the training images.
        """
        nearest, _ = self.memory_bank(self._stored_sample(), min(2, len(self.memory_bank)))
        distance = torch.where(nearest[:, 0] > 0, nearest[:, 0], nearest[:, -1]).double()
        return float((distance.square() if self.hparams["distance"] == "squared" else distance).mean())

    def _stored_sample(self) -> Tensor:
        assert self._collection is not None
        return self._collection.sample().to(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As `AnomalyModule`; also cut the bank down to ``coreset_size``."""
        super().on_load_checkpoint(checkpoint)
        state, size = checkpoint["state_dict"], self.hparams["coreset_size"]
        bank, radii = state["memory_bank.features"], state["coverage_radii"]
        if size is not None and size < len(bank):
            saved = checkpoint.get("hyper_parameters", {}).get("coreset_method")
            if saved not in ("greedy", "approximate"):
                raise UserError(
                    f"coreset_size cannot cut down a bank selected by {saved}, which has no order; fit again."
                )
            log.info("memory bank: the first %d of %d patch features.", size, len(bank))
            state["memory_bank.features"] = bank[:size].clone()
            state["coverage_radii"] = radii[: size + 1].clone()
            if len(state["calibration_scores"]):
                log.warning("the thresholds were calibrated with the larger memory bank and are left out; fit again.")
            state["calibration_scores"], state["calibration_peaks"] = torch.empty(2, 0)

    def _expected_images(self, batch: int) -> ExpectedImages | None:
        """Most images that can come, where their number is known."""
        batches, world = self.trainer.num_training_batches, self.trainer.world_size
        if batches == float("inf"):
            return None
        images = int(batches) * batch
        try:
            total = len(self.trainer.train_dataloader.dataset)  # type: ignore[union-attr]
        except (AttributeError, TypeError):
            return ExpectedImages(images, 0, images * world)
        images = min(images, -(-total // world))
        aside = len(self._aside or ())
        return ExpectedImages(min(images, total - aside), min(images, aside), min(images * world, total - aside))


class EnsembleOr(RefusesUnknown):
    """Stand-in: makes the old ensemble where members are given."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls, *args, **kwargs)
        if options_of(EnsembleOptions, kwargs.get("ensemble", EnsembleOptions())).members is None:
            return made
        from pl_patchcore.ensemble import PatchCoreEnsemble

        flat = flat_settings(kwargs)
        members, combine = flat.pop("members"), flat.pop("combine")
        members = [{k: v for k, v in flat_settings(m).items() if k not in (
            "interpolation", "mean", "std", "store", "store_dir", "store_dtype", "selection_memory", "members",
            "combine") and not (k in ("patch_stride", "layer_dim", "feature_dim") and "patches" not in m)} for m in members]

        class Ensemble(PatchCoreEnsemble):
            def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                super().on_save_checkpoint(checkpoint)
                checkpoint["hyper_parameters"] = nested_settings(kwargs)

        return Ensemble(members, combine, **flat)


class PatchCore(EnsembleOr, FlatPatchCore):
    """Stand-in with the new constructor until the model is rebuilt.

    Args:
        backbone: Name of a torchvision classification model, or a module of your own (a copy is used).
        layers: Layers by dotted name, such as ``layer2`` or ``features.6``; the first gives the patch grid.
        weights: Name of torchvision weights, path of a ``.pth``, ``.pt`` or ``.safetensors`` state dict, or null.
        patch_size: Side of the neighbourhood a patch feature aggregates, odd, in cells of the layer's grid.
        resize: Size of the image before the crop, pixels: a number, ``[height, width]``, or null to leave it.
        crop: Size of the centre crop, pixels: a number, ``[height, width]``, or null for none.
        resize_mode: ``squash`` both sides to ``resize``, or resize the ``shorter_side``.
        coreset_method: How the coreset is selected.
        coreset_ratio: Share of the patch features kept, in (0, 1].
        coreset_size: Number of patch features kept, in place of ``coreset_ratio``.
        projection_dim: Dimension of the random projection the selection works in.
        num_neighbors: Nearest neighbours whose distances are averaged.
        distance: ``euclidean``, or ``squared`` as in the authors' code.
        reweighting_neighbors: b of the paper's equation 7; 1 for no re-weighting.
        sigma: Standard deviation of the Gaussian that smooths anomaly maps, pixels; 0 for none.
        search: Nearest-neighbour search.
        bank_dtype: Type the memory bank is kept and saved in.
        calibration_share: Share of the training images, in [0, 1), kept out of the memory bank.
        false_alarm_rate: Share of nominal images, in (0, 1), that may exceed these thresholds.
        metrics_mode: ``exact``, ``streaming`` or ``auto``.
        save_backbone: Put the backbone's weights into checkpoints.
        seed: Seed of all random choices.
        patches: How a layer becomes patch features.
        images: How an image's pixels are resized and normalised.
        store: Where the patch features of the training images wait for the selection.
        ensemble: Several models on the same images.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "wide_resnet50_2",
        layers: Sequence[str] = ("layer2", "layer3"),
        weights: str | None = PAPER_WEIGHTS,
        patch_size: int = 3,
        resize: int | tuple[int, int] | None = 256,
        crop: int | tuple[int, int] | None = 224,
        resize_mode: Literal["squash", "shorter_side"] = "squash",
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
        metrics_mode: Mode = "auto",
        save_backbone: bool = False,
        seed: int = 0,
        patches: PatchOptions = PatchOptions(),
        images: ImageOptions = ImageOptions(),
        store: StoreOptions = StoreOptions(),
        ensemble: EnsembleOptions = EnsembleOptions(),
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        flat = flat_settings(given)
        flat.pop("members"), flat.pop("combine")
        FlatPatchCore.__init__(self, **flat)
        for name in ("patches", "images", "ensemble"):
            self.hparams.pop(name, None)
        self.hparams.update(flat)
        if isinstance(backbone, nn.Module):
            del self.hparams["backbone"]
        self.nested = nested_settings(given)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] = self.nested | {"weights": self.hparams["weights"]}


def flat_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Old names of the nested options."""
    given = dict(given)
    patches = options_of(PatchOptions, given.pop("patches", PatchOptions()))
    images = options_of(ImageOptions, given.pop("images", ImageOptions()))
    store = options_of(StoreOptions, given.pop("store", StoreOptions()))
    ensemble = options_of(EnsembleOptions, given.pop("ensemble", EnsembleOptions()))
    given |= {"patch_stride": patches.stride, "layer_dim": patches.layer_dim, "feature_dim": patches.feature_dim}
    given |= {"interpolation": images.interpolation, "mean": images.mean, "std": images.std}
    given |= {"store": store.kind, "store_dir": store.folder, "store_dtype": store.dtype}
    given["selection_memory"] = store.selection_memory
    given |= {"members": ensemble.members, "combine": ensemble.combine}
    return given


def nested_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Plain values, to save."""
    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            value = dataclasses.asdict(value)
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value
    return {k: plain(v) for k, v in given.items() if not isinstance(v, nn.Module)}
