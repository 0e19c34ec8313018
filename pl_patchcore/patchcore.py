"""PatchCore in Lightning: hooks, no arithmetic.

``model`` is the method as a plain module (`model.py`, or `ensemble.py`). One epoch of ``fit`` hands images to its
companion (`fitting.py`), ``on_train_end`` selects the memory bank, and from then on ``test_step``, ``validation_step``
and ``predict_step`` score images.

Nothing is learned by gradients, and no optimiser step is taken. Lightning's own checkpoint callbacks save nothing while
no step was taken, so no file is written before there is a memory bank; ``on_train_end`` counts the batches as steps and
has the callbacks save. DDP refuses a module without a trainable parameter, so there is one, the anchor, which is
trainable during ``fit`` only (as part of another module it must not be: DDP would wait for its gradient).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import lightning as L
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pl_patchcore.anomaly_map import Distance, ImageScore, TopShareOf
from pl_patchcore.backbone import PAPER_WEIGHTS
from pl_patchcore.build import build
from pl_patchcore.calibration import DEFAULT_RATE, CalibrationKind
from pl_patchcore.checkpoint import (
    check_against,
    is_frozen,
    made_of,
    mark_of,
    plain,
    plain_arguments,
    read_checkpoint,
    write_checkpoint,
)
from pl_patchcore.configs import recipe
from pl_patchcore.coreset import CoresetMethod
from pl_patchcore.counted import Counted
from pl_patchcore.data.batch import OwnImages, joined, same_size_parts
from pl_patchcore.distributed import Processes, on_first_process
from pl_patchcore.ensemble import EnsembleModel, refuse_test_range
from pl_patchcore.errors import UserError
from pl_patchcore.files import whole_file
from pl_patchcore.fitting import Fitting, start_fitting, tell_tiles
from pl_patchcore.foreground import ForegroundKind
from pl_patchcore.foreign import Source
from pl_patchcore.inspection import Inspection, Settings, inspect
from pl_patchcore.lightning_parts import (
    Anchor,
    ReleaseOnException,
    all_has_come,
    all_images,
    begin_without_steps,
    calibration_loader,
    check_room,
    refuse_lost_hooks,
    refuse_monitors,
    refuse_too_few_steps,
    refuse_unfinished,
    running_loader,
    save_by_callbacks,
    single_loader,
)
from pl_patchcore.memory_bank import BankDtype, MemoryBank
from pl_patchcore.metrics import MetricsSize, Mode, TestFigures
from pl_patchcore.options import (
    EnsembleOptions,
    ImageOptions,
    PatchOptions,
    StoreOptions,
    keeps_arguments,
    takes_numpy,
)
from pl_patchcore.patch_features import Inference, PatchFeatures
from pl_patchcore.preprocessing import Color, ImageLike, ResizeMode
from pl_patchcore.suspicious import TrainingImage

log = logging.getLogger(__name__)
log.addFilter(on_first_process)


class PatchCore(L.LightningModule):
    """Anomaly detection by the distance of patch features to a memory bank of nominal ones.

    The defaults are the paper's; `from_recipe` gives the authors' code (``official``) and others.

    Args:
        backbone: Name of a torchvision model, ``timm/NAME``, or a module (a copy is used).
        layers: Layers by dotted name, ``layer2``, ``blocks.-1``, or ``last``; the first gives the patch grid.
        weights: Name of torchvision weights (of timm: ``pretrained``), path of a ``.pth``, ``.pt`` or ``.safetensors``
            state dict, or null for random ones, or a module's own.
        patch_size: Side of the neighbourhood a patch feature aggregates, odd, in cells of the layer's grid.
        resize: Size before the crop, pixels: a number, ``[height, width]``, or null to leave it.
        crop: Size of the centre crop, likewise; null: none.
        resize_mode: ``squash``, or keep the aspect ratio: by ``shorter_side``, or by ``longer_side``, padded.
        coreset_method: ``greedy``: exact farthest-first selection; ``approximate``: from the authors' 10 random rows;
            ``random``: a uniform draw; ``none``: all are kept.
        coreset_ratio: Share of the patch features kept, in (0, 1].
        coreset_size: Number of patch features kept, in place of ``coreset_ratio``; lowered at loading, it cuts a greedy
            memory bank down.
        projection_dim: Dimension of the random projection that the selection works in.
        num_neighbors: Nearest neighbours whose distances are averaged.
        distance: ``squared`` as in the authors' code, or half of that.
        reweighting_neighbors: b of the paper's equation 7; 1 for no re-weighting.
        sigma: Standard deviation of the maps' Gaussian, pixels; 0 for none.
        image_score: ``max``, or ``top_mean``, the mean of the highest ``top_share`` of the patches.
        top_share: In (0, 1]; at least one patch.
        top_share_of: ``all``: patches outside the object count 0, in maps too.
        normalize_features: To unit length.
        position_radius: Cells each way in which to search; null: all.
        tile: Side of tiles, or ``[height, width]``, pixels, in which the backbone is given larger images.
        tile_overlap: Pixels that tiles share; null: enough for whole-image features, up to half a tile.
        tile_batch: Tiles at once; null: by the device.
        foreground: Object that alone counts: found by features (``auto``, ``anomalydino``), or brightness.
        mask_references: Also in training images.
        search: Exact: ``auto``, what suits machine and bank; ``torch``, by a float32 product; ``int8``, by a filter of
            small integers. Approximate: a factory string of faiss, such as ``HNSW32``.
        bank_dtype: Type that the memory bank is kept and saved in.
        inference: What the backbone computes in when it scores; ``auto``: bf16 where that is much faster.
        calibration: Nominal images that set thresholds: ``leave_one_out``, training images, each without its own rows
            of the memory bank; ``split``, those that ``calibration_share`` keeps out of it; ``images``, the data
            module's; ``none``. Null: ``split`` where ``calibration_share`` is not 0.
        calibration_share: Share of the training images, in [0, 1), kept out of the memory bank for ``split``.
        calibration_images: Most images that ``leave_one_out`` scores, drawn by ``seed``.
        drop_suspicious: Leave out up to a tenth of the images, whose scores stand out.
        false_alarm_rate: Share of nominal images, in (0, 1), that may exceed thresholds.
        image_threshold: Threshold for anomaly scores set by hand; null: the calibrated one.
        pixel_threshold: The same for anomaly maps.
        metrics_mode: ``exact`` metrics keep every pixel (4 bytes each), ``streaming`` ones a histogram of bounded error
            and memory; ``auto`` is exact up to 67 million pixels.
        metrics_size: Pixels that figures are of.
        save_backbone: Put the backbone's weights into checkpoints.
        seed: Seed of all random choices.
        roi: What counts: boxes ``[left, top, right, bottom]`` or polygons ``[[x, y], ...]``, original pixels; or the
            path of a mask, or of a folder of masks.
        ignore: What does not count.
        reference_rotations: Angles that training images are turned by, around the centre, edges reflected; 8: by 45°.
        reference_brightness: Factors, such as ``[0.8, 1.2]``, that they are also darkened and lightened by.
        patches: Stride and pooling of patch features.
        images: Filter of the resize, mean and standard deviation of the normalisation.
        store: Where patch features go until the memory bank is selected.
        ensemble: Several models whose scores are combined: their settings that differ from these.

    Raises:
        UserError: For a value out of range, an unknown name, or weights that cannot be had or do not fit.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU())
        >>> module = PatchCore(network, layers=["1"], resize=64, crop=None)
        >>> module.model.patch_features(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 16, 16, 8])
    """

    arguments: dict[str, Any]  # of the outermost class's constructor, by `keeps_arguments`
    training_images: list[TrainingImage]  # of the last fit: those scored, the highest score first
    figures: dict[str, dict[str, Any]]  # of the last test: "all" and each defect type
    figures_by_category: dict[str, dict[str, Any]]  # of the last test, where batches name categories
    _test_figures: TestFigures | None = None  # of the test under way
    _fitting: Fitting | None = None  # the fit under way
    _updating = False  # whether a fit adds to the memory bank
    _own_images = OwnImages(None, 0, 1)  # of the loader under way
    _all_came: bool | None = None  # whether the loader has ended by itself; None before the epoch's end

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_lost_hooks(cls, PatchCore)
        if "__init__" in cls.__dict__:
            cls.__init__ = keeps_arguments(cls.__init__)  # type: ignore[method-assign]

    @keeps_arguments
    @takes_numpy
    def __init__(
        self,
        backbone: str | nn.Module = "wide_resnet50_2",
        layers: Sequence[str] = ("layer2", "layer3"),
        weights: str | None = PAPER_WEIGHTS,
        patch_size: int = 3,
        resize: int | tuple[int, int] | None = 256,
        crop: int | tuple[int, int] | None = 224,
        resize_mode: ResizeMode = "squash",
        coreset_method: CoresetMethod = "greedy",
        coreset_ratio: float = 0.1,
        coreset_size: int | None = None,
        projection_dim: int = 128,
        num_neighbors: int = 1,
        distance: Distance = "euclidean",
        reweighting_neighbors: int = 9,
        sigma: float = 4.0,
        image_score: ImageScore = "max",
        top_share: float = 0.01,
        top_share_of: TopShareOf = "scored",
        normalize_features: bool = False,
        position_radius: int | None = None,
        tile: int | tuple[int, int] | None = None,
        tile_overlap: int | None = None,
        tile_batch: int | None = None,
        foreground: ForegroundKind = "none",
        mask_references: bool = True,
        search: str = "auto",
        bank_dtype: BankDtype = "float32",
        inference: Inference = "float32",
        calibration: CalibrationKind | None = None,
        calibration_share: float = 0.0,
        calibration_images: int = 500,
        drop_suspicious: bool = False,
        false_alarm_rate: float = DEFAULT_RATE,
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
        metrics_mode: Mode = "auto",
        metrics_size: MetricsSize = "input",
        save_backbone: bool = False,
        seed: int = 0,
        roi: list[Any] | str | None = None,
        ignore: list[Any] | str | None = None,
        reference_rotations: int = 1,
        reference_brightness: tuple[float, float] | None = None,
        patches: PatchOptions = PatchOptions(),  # noqa: B008 - frozen
        images: ImageOptions = ImageOptions(),  # noqa: B008 - frozen
        store: StoreOptions = StoreOptions(),  # noqa: B008 - frozen
        ensemble: EnsembleOptions = EnsembleOptions(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        parts = build(PatchCore.__init__, dict(locals()))
        self.calibration, self.transform, self.references = parts.calibration, parts.transform, parts.references
        self.store, self.model = parts.store, parts.model
        self.calibration_share, self.calibration_images, self.seed = calibration_share, calibration_images, seed
        self.metrics_mode, self.metrics_size, self.save_backbone = metrics_mode, metrics_size, save_backbone
        self.drop_suspicious, self.anchor = drop_suspicious, Anchor()
        of_file, self.left_out = plain_arguments(self.arguments)
        self.hparams.update(of_file)
        self.training_images, self.figures, self.figures_by_category = [], {}, {}

    @classmethod
    def from_recipe(cls, name: str, category: str | None = None, **overrides: Any) -> PatchCore:
        """Build a model from a named recipe, some of its choices overridden.

        Args:
            name: Name of a file in ``configs/recipes``, such as ``paper``, ``official_wr50_224_10`` or ``mstc``.
            category: Category of a data set, for which the recipe may set others.
            overrides: Arguments of `PatchCore`.

        Raises:
            UserError: If the recipe is unknown.
        """
        return cls(**(recipe(name, category) | overrides))

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: Source,
        map_location: Any = None,
        strict: bool = True,
        weights_only: bool = True,
        **overrides: Any,
    ) -> PatchCore:
        """Load a fitted model. Nothing in the file is executed: its hyper-parameters are plain values.

        A model of images of one size runs on noise once, so that its first image takes little longer than later ones.

        Args:
            checkpoint_path: File written by a fit, or an open binary file.
            map_location: Device to move the model to, such as ``cuda``; None: the CPU.
            strict: See `torch.nn.Module.load_state_dict`.
            weights_only: Always so.
            overrides: Arguments of the class to change; ``weights=<path>`` if the backbone's weights lie elsewhere
                (checked by their hash), ``backbone=<module>`` for a module of your own.

        Raises:
            UserError: If the file is missing, cut short, of another model, or holds no memory bank.
        """
        try:
            device = torch.device("cpu" if map_location is None else map_location)
            torch.empty(0, device=device)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise UserError(f"map_location must be a device here, such as 'cuda:0', got {map_location!r}.") from error
        saved = read_checkpoint(checkpoint_path)
        module = made_of(cls, saved, overrides, str(checkpoint_path))
        module.strict_loading = strict
        module.on_load_checkpoint(saved)
        module.load_state_dict(saved["state_dict"], strict=strict)
        module.model.identify()
        module.to(device)
        for member in module.model.members:
            member.warm_up()
        return module

    # Scoring

    def forward(
        self, images: Tensor, counted: Counted | None = None, map_size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score images: see `PatchCoreModel.forward`."""
        return self.model(images, counted, map_size)  # type: ignore[no-any-return]

    def judge(self, images: Tensor, counted: Counted | None = None) -> dict[str, Tensor]:
        """Score images ``(B, 3, H, W)``, normalised, on the model's device.

        Args:
            images: As `PatchCoreModel.forward` takes them.
            counted: Which places of the images count; None: all.

        Returns:
            ``score (B,)`` and ``anomaly_map (B, H, W)``; of a model with thresholds also ``anomalous (B,)``, bool,
            whether the score is above the threshold, and ``normalized (B,)``, the score in units of the threshold; of a
            calibrated one ``p_value (B,)``, see `calibration.p_values`.
        """
        scores, maps = self(images, counted)
        return {"score": scores, "anomaly_map": maps} | self.model.calibration.verdicts(scores)

    @overload
    def inspect(  # type: ignore[overload-overlap]  # text is a sequence of texts, too
        self, images: ImageLike, color: Color = "rgb", least_area: int = 1
    ) -> Inspection: ...

    @overload
    def inspect(self, images: Sequence[ImageLike], color: Color = "rgb", least_area: int = 1) -> list[Inspection]: ...

    def inspect(
        self, images: ImageLike | Sequence[ImageLike], color: Color = "rgb", least_area: int = 1
    ) -> Inspection | list[Inspection]:
        """Inspect images: score, verdict, and where in the image.

        Takes what a camera, a file or OpenCV gives, and does the preprocessing. The scores are those of `forward`; a
        list is scored in batches. Several threads may call it at once.

        Args:
            images: One image, or a sequence of images of any sizes: a path, a PIL image, an array ``(H, W)``,
                ``(H, W, 3)`` or ``(H, W, 4)``, uint8, uint16 or floating-point in [0, 1], or a tensor ``(3, H, W)``,
                uint8 or floating-point in [0, 1]; see `preprocessing.read_image`. Not normalised.
            color: Order of the channels of arrays and tensors: ``rgb``, or ``bgr`` as OpenCV has it.
            least_area: Pixels of the original image below which a region is left out.

        Returns:
            An `Inspection`, or a list of them for a sequence.

        Raises:
            UserError: If the model is not fitted, or an image is of no kind that is read.
        """
        self._check_fitted()
        settings = Settings(self.image_threshold, self.pixel_threshold, least_area)
        device = self.memory_bank.features.device  # follows every way a module can be moved

        def score(batch: dict[str, Any]) -> dict[str, Tensor]:
            return self.judge(batch["image"].to(device), Counted.of(batch, device))

        return inspect(images, self.transform, score, settings, color)

    @property
    def image_threshold(self) -> float | None:
        """Score above which an image is anomalous; None where there is none.

        Set by hand, or the score that nominal images exceed at ``false_alarm_rate`` (`calibration.py`). Setting it
        keeps it in checkpoints; None brings the calibrated one back.
        """
        return self.model.calibration.image_threshold

    @image_threshold.setter
    def image_threshold(self, value: float | None) -> None:
        self.model.calibration.image_threshold = value
        self._note(image_threshold=value)

    @property
    def pixel_threshold(self) -> float | None:
        """Value of an anomaly map above which a pixel is anomalous; None where there is none.

        Set by hand, as ``image_threshold``, or what the peaks of nominal images' maps exceed at ``false_alarm_rate``.
        """
        return self.model.calibration.pixel_threshold

    @pixel_threshold.setter
    def pixel_threshold(self, value: float | None) -> None:
        self.model.calibration.pixel_threshold = value
        self._note(pixel_threshold=value)

    @property
    def false_alarm_rate(self) -> float:
        """Share of nominal images, in (0, 1), that may exceed the calibrated thresholds; setting it moves them."""
        return self.model.calibration.false_alarm_rate

    @false_alarm_rate.setter
    def false_alarm_rate(self, value: float) -> None:
        self.model.calibration.false_alarm_rate = value
        self._note(false_alarm_rate=value)

    def _note(self, **changed: float | None) -> None:
        """Keep arguments that were changed in checkpoints."""
        self.hparams.update({name: plain(value) for name, value in changed.items() if name in self.hparams})

    @property
    def patch_features(self) -> PatchFeatures:
        """Patch features of a single model (of an ensemble's first member)."""
        return self.model.members[0].patch_features

    @property
    def pixels_per_patch(self) -> int:
        """Pixels of the input from patch to patch (of an ensemble's first member)."""
        return self.patch_features.pixels_per_patch

    @property
    def memory_bank(self) -> MemoryBank:
        """Memory bank of a single model (of an ensemble's first member)."""
        return self.model.members[0].memory_bank

    @property
    def coverage_radii(self) -> Tensor:
        """How far patch features lie at most from the bank's first m rows, ``(M + 1,)``, projected; see `Selection`."""
        return self.memory_bank.radii

    @property
    def bank_shape(self) -> list[Any]:
        """Rows of the memory bank and numbers in each (of each member of an ensemble); empty where there is none."""
        return self.model.bank_shape

    def identity(self) -> dict[str, Any]:
        """What the memory bank depends on, in plain values: backbone, weights (hash), features, preprocessing."""
        return self.model.identity | {"preprocessing": self.transform.as_dict()}

    def processes(self) -> Processes:
        """The processes that work on this model."""
        return Processes(self.device, alone=self._trainer is None or self.trainer.world_size == 1)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Score a batch and add it to the figures.

        Returns:
            ``score (B,)``, ``anomaly_map (B, H, W)`` (a list of ``(H, W)`` where sizes differ), ``index (B,)``; of
            several processes without repeated images.
        """
        batch, found = self._own(batch, batch_idx, dataloader_idx), []
        for part in same_size_parts(batch):
            scores, maps = self(part["image"], Counted.of(part, self.device))
            self._figures_under_way().add(part, scores, maps)
            found.append({"score": scores, "anomaly_map": maps})
        return joined(found) | {"index": batch["index"]}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor] | None:
        """As `test_step`; inside ``fit``, where there is no memory bank yet, nothing."""
        return None if self.trainer.state.fn == "fit" else self.test_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Score a batch.

        Returns:
            As `judge`; of the batch, ``path``, ``index`` and geometry.
        """
        batch = self._own(batch, batch_idx, dataloader_idx)
        parts = same_size_parts(batch)
        result = joined([self.judge(part["image"], Counted.of(part, self.device)) for part in parts])
        return result | {k: batch[k] for k in ("path", "index", "original_size", "crop_box", "region") if k in batch}

    def on_test_epoch_start(self) -> None:
        """Start the figures; refuse an empty memory bank before any batch is read."""
        validating = self.trainer.state.fn == "validate"
        loaders = self.trainer.val_dataloaders if validating else self.trainer.test_dataloaders
        loader = single_loader(loaders)
        self._check_fitted()
        self.model.calibration.tell_in_use()
        self._find_ranges(loader)
        thresholds = self.image_threshold, self.pixel_threshold
        self._test_figures = TestFigures(*thresholds, self.metrics_mode, self.device, self.metrics_size)

    def on_test_epoch_end(self, prefix: str = "test") -> None:
        """Compute and log the figures: image AUROC, pixel AUROC, PRO."""
        self.figures, self.figures_by_category = self._figures_under_way().compute(self.processes())
        self._test_figures = None
        for name in ("image_auroc", "pixel_auroc", "pro"):
            self.log(f"{prefix}/{name}", self.figures["all"][name], rank_zero_only=True)

    def on_validation_epoch_start(self) -> None:
        """Say once why a validation inside ``fit`` scores nothing; otherwise forget the last evaluation."""
        if self.trainer.state.fn != "fit":
            self.on_test_epoch_start()
        elif self.trainer.sanity_checking or not self.trainer.num_sanity_val_steps:
            log.info("PatchCore has no memory bank before fit ends: validation inside fit scores nothing.")

    def on_validation_epoch_end(self) -> None:
        """Log the figures as ``val/...``."""
        if self.trainer.state.fn != "fit":
            self.on_test_epoch_end("val")

    def on_predict_epoch_start(self) -> None:
        """Refuse an empty memory bank before any batch is read."""
        self._check_fitted()
        self.model.calibration.tell_in_use()
        self._find_ranges(self.trainer.predict_dataloaders)

    def _find_ranges(self, loaders: Any) -> None:
        """For an ensemble's ``test_range``: go through all images once, on every process."""
        if isinstance(self.model, EnsembleModel) and self.model.combine == "test_range":
            self.model.find_ranges(all_images(self.trainer, loaders))

    def _figures_under_way(self) -> TestFigures:
        if self._test_figures is None:
            raise UserError("test_step runs within Trainer.test and Trainer.validate; call the model itself to score.")
        return self._test_figures

    def _check_fitted(self) -> None:
        if not self.model.fitted:
            raise UserError("the memory bank is empty; fit first, or give ckpt_path of a fitted model.")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `torch.nn.Module.load_state_dict`; cuts the memory bank down to ``coreset_size``, if it is larger."""
        loaded = super().load_state_dict(state_dict, strict, assign)
        if not isinstance(self.model, EnsembleModel):
            self.model.cut_bank()
        return loaded

    def _own(self, batch: Any, number: int, loader: int = 0) -> dict[str, Any]:
        """A batch as a dict, without images that a sampler repeats, with their places in the data set."""
        if number == 0:
            running = running_loader(self.trainer, loader)
            self._own_images = OwnImages(running, self.global_rank, self.trainer.world_size)
        own = self._own_images.of(batch)
        if number == 0 and not self.trainer.training and len(own["image"]):
            tell_tiles(self.model, own["image"][0][None])
        return own

    # Fitting

    def setup(self, stage: str) -> None:
        """Refuse what would fail only after minutes of work."""
        self.save_hyperparameters(dict(self.hparams))  # for loggers
        if stage != "fit":
            return
        self.model.identify()  # before Lightning casts the weights
        self.anchor.value.requires_grad_(True)
        self.store.check_processes(self.trainer.world_size)
        refuse_monitors(self.trainer)

    def configure_callbacks(self) -> list[L.Callback]:
        """A callback that frees what was collected when a fit fails or is interrupted."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        there = any(isinstance(c, ReleaseOnException) and c.module is self for c in callbacks)
        return [] if there else [ReleaseOnException(self, self.release)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimiser that takes no step (see the module's docstring)."""
        return torch.optim.SGD(self.anchor.parameters(), lr=0.0)

    def on_fit_start(self) -> None:
        """Refuse ``max_steps`` that end the fit before all images have come, and missing calibration images."""
        self._all_came = None
        if self.calibration == "images" and not self._updating and calibration_loader(self.trainer) is None:
            raise UserError(
                "calibration is images, but the data module has none; set data.calibration to a folder of nominal "
                "images, or calibrate the fitted model by pl-patchcore calibrate (in Python model.calibrate)."
            )
        refuse_too_few_steps(self.trainer)

    def on_train_start(self) -> None:
        """Start to collect; also before every trial of a Tuner."""
        self._close_fitting()
        begin_without_steps(self)
        self._all_came = None
        loader, batches = self.trainer.train_dataloader, self.trainer.num_training_batches
        neighbours = self.trainer.num_devices if self.trainer.world_size > 1 else 1
        self._fitting = start_fitting(self, loader, batches, self.processes(), neighbours, update=self._updating)

    def on_train_epoch_start(self) -> None:
        """End the fit after one epoch, whatever ``min_epochs`` and ``min_steps`` say."""
        if self._all_came is not None:
            raise StopIteration  # which ends Lightning's loop over epochs

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Collect the patch features of a batch."""
        assert self._fitting is not None  # since on_train_start
        own = self._own(batch, batch_idx)
        self._fitting.add_batch(own)
        if batch_idx == 0:
            check_room(self.trainer, self._fitting.bank_bytes + sum(value.nbytes for value in self._saved().values()))
        self.log("train/images", float(self._fitting.count), batch_size=max(1, len(own["image"])))
        if 0 <= self.trainer.max_steps <= batch_idx + 1:
            self.trainer.should_stop = True  # Lightning counts no steps

    def on_train_epoch_end(self) -> None:
        """One epoch is enough."""
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        last = progress.is_last_batch
        if not last and not self.trainer.should_stop:
            log.warning(
                "the training loader announced %s batches and gave %d; the memory bank is made of those.",
                *(self.trainer.num_training_batches, progress.current.processed),
            )
        self._all_came = last or not self.trainer.should_stop
        self.trainer.should_stop = True

    def finish(self) -> None:
        """Select the memory bank and calibrate, once the last batch has come; a second call does nothing.

        Every process must call it.
        """
        if self._fitting is None or self.model.fitted or not all_has_come(self.trainer, bool(self._all_came)):
            return
        shown = self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero
        self._fitting.select(shown=shown)
        self.training_images = self._fitting.training_images
        self._tell_images(sum(self.processes().objects(self._fitting.count)), len(self._fitting.left_out))
        if self.calibration == "images" and (loader := calibration_loader(self.trainer)) is not None:
            with self.trainer.precision_plugin.forward_context():
                self._calibrate_on(loader, kept=True)
        self.model.calibration.tell(self.calibration)

    def _tell_images(self, images: int, dropped: int) -> None:
        """Account for each image of a fit."""
        scored = int((self.model.calibration.images >= 0).sum())
        held_out, by = (0, " by leave-one-out") if self.calibration == "leave_one_out" else (scored, "")
        told = f"; thresholds from {scored} of them{by}" if scored else ""
        told = f", {dropped} left out as suspicious" * bool(dropped) + told
        inside = images - held_out - dropped
        log.info("%d images: %d in the memory bank, %d held out%s.", images, inside, held_out, told)

    def on_train_end(self) -> None:
        """Select the memory bank, then have the checkpoint callbacks save it."""
        saved = self.model.fitted  # by a callback that saved after the last batch
        self.finish()
        self.trainer.should_stop = False  # a Tuner trains again in the same fit
        if self.model.fitted and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            save_by_callbacks(self, saved=saved)

    def on_fit_end(self) -> None:
        """Free what was collected; refuse a fit without a memory bank."""
        began = self._fitting is not None
        self.release()
        refuse_unfinished(self.trainer, began, self.model.fitted)

    def release(self) -> None:
        """Free what a fit has collected."""
        self._close_fitting()
        self.automatic_optimization = True
        self.anchor.value.requires_grad_(False)

    def _close_fitting(self) -> None:
        if self._fitting is not None:
            self._fitting.close()
        self._fitting = None

    @property
    def selected(self) -> tuple[Tensor, Tensor] | None:
        """Projected patch features ``(N, d)`` and the picks among them ``(M,)``, of a single model, until fit ends."""
        collections = self._fitting.collections if self._fitting is not None else []
        return collections[0].selected if len(collections) == 1 else None

    def update(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Add nominal images to a fitted model.

        The memory bank is selected again from what it held and the new images' patch features, down to
        ``coreset_size``, or to ``coreset_ratio`` of all patch features ever seen. What an earlier selection left
        out is gone: the bank is as good as one fitted on all images at once where the earlier bank stands well for
        its images. Scores of the calibration stay as they were, and new images' scores come to them, as
        ``calibration`` says.

        Args:
            trainer: A Trainer.
            args: As `lightning.Trainer.fit` takes them after the model: loader or data module of the new images.
            kwargs: As `lightning.Trainer.fit`.

        Raises:
            UserError: If the model is not fitted.
        """
        self._check_fitted()
        before = {name: value.clone() for name, value in self.model.state_dict().items() if "features." not in name}
        self._updating = True
        try:
            trainer.fit(self, *args, **kwargs)
        except BaseException:
            self.model.load_state_dict(self.model.state_dict() | before)  # as it was
            raise
        finally:
            self._updating = False

    def calibrate(self, loader: Any) -> None:
        """Set the thresholds of a fitted model from nominal images that are not in its memory bank, without a fit.

        They take the place of those before. For a memory bank that was cut down, or a new camera or light.

        Args:
            loader: Loader of batches as `lightning.Trainer.fit` takes them. Of images with the same ``group`` one is
                drawn.

        Raises:
            UserError: If the model is not fitted, an image is labelled anomalous, or the threshold is 0.
        """
        self._check_fitted()
        refuse_test_range(self.model)
        self._calibrate_on(loader)
        self.model.calibration.tell("images")

    def _calibrate_on(self, loader: Any, *, kept: bool = False) -> None:
        shown = tqdm(loader, "Calibration", unit=" batches", delay=2)
        self.model.calibration.fill_from(self, map(OwnImages(loader, 0, 1).of, shown), self.seed, kept=kept)

    # Checkpoints

    def save(self, path: str | Path) -> None:
        """Write a fitted model to a file that `load_from_checkpoint` and the command read, without a Trainer.

        Thresholds that were changed are in it. The file is there when it is whole.

        Raises:
            UserError: If the model is not fitted, or the file cannot be written.
        """
        self._check_fitted()
        with whole_file(Path(path)) as partial:
            write_checkpoint(self, partial)

    def export(
        self, path: str | Path, format: str = "onnx", data: Any = None, calibration: Any = None, **options: Any
    ) -> dict[str, Any]:
        """Write a fitted model as one file that runs without this package: see `export.export`.

        Args:
            path: The file.
            format: ``onnx``, ``openvino`` or ``torch``.
            data: Folder of images, or image files, to compare the file with the model on, beside noise.
            calibration: Nominal images whose scores by the file set its thresholds, likewise; None: it has the model's.
            options: What the file is to be like, as `export.FileOptions` takes it.

        Returns:
            What is known of the file.
        """
        from pl_patchcore.export import FileOptions, export

        return export(self, path, format, data, options=FileOptions(**options), calibration=calibration)

    def _saved(self) -> dict[str, Tensor]:
        """What a checkpoint holds: all but the frozen backbone, unless it is to be saved."""
        return {n: v for n, v in self.state_dict().items() if self.save_backbone or not is_frozen(n)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Finish the fit if its last batch has come; say what is in the file; leave the frozen backbone out."""
        self.finish()
        checkpoint["state_dict"] = self._saved()  # Lightning's was taken before the memory bank
        checkpoint["patchcore"] = mark_of(self, began=self._fitting is not None and self._fitting.count > 0)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose memory bank was not made with this model's features."""
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        if fitting and checkpoint.get("patchcore", {}).get("began", True):
            raise UserError(
                "PatchCore fits in one pass and cannot resume from a checkpoint; leave ckpt_path out to fit again, "
                "or test with it."
            )
        if not fitting:  # while it is, a Tuner puts back what it saved before its trials
            check_against(self, checkpoint, None if self._trainer is None else self.trainer.ckpt_path)
        frozen = {name: value for name, value in self.state_dict().items() if is_frozen(name)}
        checkpoint["state_dict"] = frozen | checkpoint["state_dict"]
