"""What every model here shares as a LightningModule: glue, no arithmetic.

One epoch of ``fit`` collects patch features, ``on_train_end`` selects the memory bank and calibrates, and from then
on ``test_step``, ``validation_step`` and ``predict_step`` score images. What is collected, selected and scored,
subclasses say: `PatchCore`, and `PatchCoreEnsemble` of several.

Nothing is learned by gradients. Lightning still wants to see a step: without one it writes no checkpoints, and
DDP refuses a module without a trainable parameter. So there is one parameter that nothing reads, trainable while
``fit`` runs only (as part of another module it must not be: DDP would wait for its gradient), and an optimiser with
learning rate 0 that is stepped once a batch.
"""

from __future__ import annotations

import copy
import inspect
import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import Tensor, nn

from pl_patchcore.calibration import conformal_threshold, draw_held_out, images_needed, is_held_out, p_values
from pl_patchcore.checkpoint import check_identity, plain, watch_checkpoints, write_checkpoints
from pl_patchcore.data.base import as_batch
from pl_patchcore.distributed import Processes, images_dealt, on_first_process, sampler_of
from pl_patchcore.errors import UserError
from pl_patchcore.metrics import AnomalyEvaluation, Mode
from pl_patchcore.preprocessing import UNKNOWN, Preprocessing

log = logging.getLogger(__name__)
log.addFilter(on_first_process)


class AnomalyModule(L.LightningModule, ABC):
    """Base of the models: fits in one epoch, calibrates, scores, evaluates, saves.

    The keyword arguments are those of `PatchCore` that concern the model as a whole; the others are a subclass's.

    Args:
        transform: Preprocessing of the images.
        calibration_share: See `PatchCore`.
        false_alarm_rate: See `PatchCore`.
        metrics_mode: See `PatchCore`.
    """

    sized_by_fit: ClassVar[tuple[str, ...]] = ("calibration_scores", "calibration_peaks")  # buffers
    calibration_scores: Tensor
    calibration_peaks: Tensor

    def __init__(
        self,
        transform: Preprocessing,
        calibration_share: float,
        false_alarm_rate: float,
        metrics_mode: Mode = "auto",
    ) -> None:
        super().__init__()
        if not 0 <= calibration_share < 1:
            raise UserError(f"calibration_share must be in [0, 1), got {calibration_share}.")
        if not 0 < false_alarm_rate < 1:
            raise UserError(f"false_alarm_rate must be in (0, 1), got {false_alarm_rate}.")
        self.automatic_optimization = False
        self.transform = transform
        self.register_buffer("calibration_scores", torch.empty(0))
        self.register_buffer("calibration_peaks", torch.empty(0))  # of the anomaly maps of the same images
        self.unused = nn.Parameter(torch.zeros(()), requires_grad=False)  # see the module's docstring
        self.evaluation = AnomalyEvaluation(mode=metrics_mode)
        self.figures: dict[str, dict[str, Any]] = {}  # of the last test: "all" and each defect type
        self.figures_by_category: dict[str, dict[str, Any]] = {}  # of the last test, where batches name categories
        self._defects: dict[int, str] = {}
        self._categories: dict[int, str] = {}
        self._input_shape: tuple[int, ...] | None = None
        self._position = 0  # images of the epoch so far, of this process
        self._dealt: list[int] | None = None  # their indices in the data set, where a sampler deals them out
        self.updating = False  # fit adds to the memory bank
        self._aside: frozenset[int] | None = None  # images kept for calibration, where their number is known

    def save_arguments(self, *ignored: str) -> None:
        """Make the constructor's arguments the hyper-parameters, as plain values (see `checkpoint.plain`).

        To be called in the constructor. Lightning's own ``save_hyperparameters`` would also take the arguments of a
        LightningModule in whose constructor this one is built, and put them over this one's.

        Args:
            ignored: Names of arguments to leave out.
        """
        arguments: dict[str, Any] = {}
        for part in collect_init_args(inspect.currentframe().f_back, [], classes=(type(self),)):  # type: ignore[union-attr, arg-type]
            arguments |= part
        self._set_hparams({name: plain(value) for name, value in arguments.items() if name not in ignored})
        self._hparams_initial = copy.deepcopy(self.hparams)
        self._log_hyperparams = True

    # What a subclass says

    @property
    @abstractmethod
    def bank_shape(self) -> list[Any]:
        """Rows and dimensions of the memory bank; empty where there is none."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the memory bank depends on, in plain values."""

    @abstractmethod
    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly scores ``(B,)`` and maps ``(B, H, W)``."""

    @abstractmethod
    def clear(self) -> None:
        """Forget the memory bank, and what was collected for one."""

    @abstractmethod
    def collect(self, images: Tensor, index: Tensor, aside: Tensor) -> None:
        """Take in training images, their indices in the data set, and which of them are for calibration."""

    @abstractmethod
    def select(self) -> None:
        """Select the memory bank from what was collected."""

    @abstractmethod
    def score_held_out(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Indices, anomaly scores and maps of the images collected for calibration, some at a time."""

    @abstractmethod
    def release(self) -> None:
        """Free what was collected."""

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
        if not len(images):
            return images.new_zeros(0), images.new_zeros(0, *shape[1:])
        return self.score(images)

    @property
    def image_threshold(self) -> float | None:
        """Anomaly score that nominal images exceed at ``false_alarm_rate`` (`calibration.py`); None if uncalibrated."""
        return self._threshold(self.calibration_scores)

    @property
    def pixel_threshold(self) -> float | None:
        """Value that the peaks of nominal images' anomaly maps exceed at ``false_alarm_rate``; None if uncalibrated."""
        return self._threshold(self.calibration_peaks)

    def _threshold(self, scores: Tensor) -> float | None:
        return conformal_threshold(scores, self.hparams["false_alarm_rate"])[0] if len(scores) else None

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Score a batch and add it to the evaluation.

        Returns:
            ``score (B,)``, ``anomaly_map (B, H, W)``, ``index (B,)``; of several processes without repeated images.
        """
        batch = self._own_images(batch, batch_idx, dataloader_idx)
        if "label" not in batch:
            raise UserError("a test batch needs labels (0 nominal, 1 anomalous): a dict with 'label', or a tuple.")
        scores, maps = self(batch["image"])
        result = {"score": scores, "anomaly_map": maps, "index": torch.as_tensor(batch["index"])}
        labels = torch.as_tensor(batch["label"], device=scores.device)
        masks = batch.get("mask")
        if masks is None:
            masks = torch.full_like(maps, UNKNOWN, dtype=torch.uint8)
        defects = batch.get("defect", ["anomalous"] * len(scores))
        if not len(scores):
            return result
        groups = [zlib.crc32(name.encode()) for name in defects]
        self._defects |= {g: d for g, d, y in zip(groups, defects, labels.tolist(), strict=True) if y == 1}
        categories = None
        if "category" in batch:
            categories = torch.tensor([zlib.crc32(name.encode()) for name in batch["category"]], device=scores.device)
            self._categories |= dict(zip(categories.tolist(), batch["category"], strict=True))
        self.evaluation.update(scores, maps, labels, masks, torch.tensor(groups, device=scores.device), categories)
        return result

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor] | None:
        """As `test_step`; inside ``fit``, where there is no memory bank yet, nothing."""
        return None if self.trainer.state.fn == "fit" else self.test_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Score a batch.

        Returns:
            ``score (B,)`` and ``anomaly_map (B, H, W)``; of a calibrated model also ``anomalous (B,)``, bool,
            whether the score is above the threshold, ``normalized (B,)``, the score in units of the threshold, and
            ``p_value (B,)``, see `calibration.p_values`; of the batch, ``path``, ``index`` and geometry.
        """
        batch = self._own_images(batch, batch_idx, dataloader_idx)
        scores, maps = self(batch["image"])
        result = {"score": scores, "anomaly_map": maps}
        if (threshold := self.image_threshold) is not None:
            result["anomalous"] = scores > threshold
            result["normalized"] = scores / threshold
            result["p_value"] = p_values(scores, self.calibration_scores)
        kept = {name: batch[name] for name in ("path", "index", "original_size", "crop_box") if name in batch}
        return result | kept

    def on_test_epoch_start(self) -> None:
        """Forget the last evaluation; refuse an empty memory bank before any batch is read."""
        self._check_fitted()
        self.evaluation.reset()
        self.evaluation.image_threshold, self.evaluation.pixel_threshold = self.image_threshold, self.pixel_threshold
        self._defects, self._categories = {}, {}

    def on_test_epoch_end(self, prefix: str = "test") -> None:
        """Compute and log the figures: image AUROC, pixel AUROC, PRO."""
        self.on_scored()
        figures = self.evaluation.compute()
        groups, categories = figures.pop("by_group"), figures.pop("by_category")
        for defects, names in self.processes().objects((self._defects, self._categories)):
            self._defects, self._categories = self._defects | defects, self._categories | names
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

    def on_predict_epoch_end(self) -> None:
        """As `on_scored`: predictions are their callers' to keep."""
        self.on_scored()

    def on_scored(self) -> None:
        """What a process does after its last image, before it waits for the others: nothing, unless overridden."""

    def _check_fitted(self) -> None:
        if not self.bank_shape:
            raise UserError("the memory bank is empty; fit first, or give ckpt_path of a fitted model.")

    # Several processes

    def processes(self) -> Processes:
        """The processes that work on this model."""
        return Processes(self.device, alone=self._world_size == 1)

    def _own_images(self, batch: Any, number: int, loader: int = 0) -> dict[str, Any]:
        """Batch without the images that a sampler repeats to give all processes as many, with ``index``.

        They are the last ones that a process gets. So each image counts once, in the memory bank and in the figures.

        Args:
            batch: A batch in any form that `as_batch` reads.
            number: Number of the batch, from 0.
            loader: Number of the loader, where there are several.
        """
        own = as_batch(batch)
        if number == 0:
            self._position, self._dealt = 0, None
        first, came, step = self._position, len(own["image"]), self._world_size
        sampler = sampler_of(self._loader(loader)) if step > 1 else None
        images = came if sampler is None else max(0, min(came, images_dealt(sampler) - first))
        if images < came:
            own = {name: value[:images] if _holds(value, came) else value for name, value in own.items()}
        self._position += images
        if "index" not in own:
            index = list(range(first * step + self.global_rank, self._position * step, step))
            if sampler is not None:
                self._dealt = list(sampler) if self._dealt is None else self._dealt
                index = self._dealt[first : self._position]
            own["index"] = torch.tensor(index, dtype=torch.int64)
        return own

    @property
    def _world_size(self) -> int:
        return 1 if self._trainer is None else self._trainer.world_size

    def _loader(self, number: int) -> Any:
        trainer = self.trainer
        loaders: Any = (
            trainer.train_dataloader if trainer.training
            else trainer.test_dataloaders if trainer.testing
            else trainer.predict_dataloaders if trainer.predicting
            else trainer.val_dataloaders
        )  # fmt: skip
        return loaders[number] if isinstance(loaders, list | tuple) else loaders

    # Fitting

    def setup(self, stage: str) -> None:
        """Refuse what would fail only after minutes of work, and damaged checkpoints by name."""
        watch_checkpoints(self.trainer)
        if stage != "fit":
            return
        self.unused.requires_grad_(True)
        self.check_processes(self.trainer.world_size)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if isinstance(monitor, str) and monitor.startswith(("val", "test")):
                raise UserError(
                    f"{type(callback).__name__} monitors {monitor!r}, but PatchCore has no memory bank, hence no "
                    "figures, before fit ends; take monitor out (the finished model is what gets saved)."
                )

    def check_processes(self, count: int) -> None:
        """Refuse settings that so many processes cannot fit with.

        Raises:
            UserError: If there are any.
        """
        if count > 1 and self.hparams.get("selection_memory") is not None:
            raise UserError(
                f"selection_memory selects within chunks of one process, there are {count}: leave it out (each holds "
                "only its share of the patch features), or set trainer.devices to 1."
            )

    def configure_callbacks(self) -> list[L.Callback]:
        """A callback that frees what was collected when a fit fails or is interrupted: the module has no such hook."""
        return [_ReleaseOnException()]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimiser that changes nothing (see the module's docstring)."""
        return torch.optim.SGD([self.unused], lr=0.0)

    def on_fit_start(self) -> None:
        """Start clean, for exactly one epoch."""
        self.clear()
        self._position = 0
        self.calibration_scores = self.calibration_peaks = torch.empty(0, device=self.device)
        self._input_shape = self._input_shape if self.updating else None
        loop = self.trainer.fit_loop
        wanted = loop.max_epochs
        loop.max_epochs = self.trainer.current_epoch + 1
        loop.min_epochs = None
        if wanted not in (None, loop.max_epochs):
            rank_zero_info(f"PatchCore takes exactly one epoch; max_epochs={wanted} was set to 1.")

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Collect the patch features of a batch."""
        batch = self._own_images(batch, batch_idx)
        images = batch["image"]
        if self._input_shape not in (None, tuple(images.shape[1:])):
            raise UserError(
                f"training images of {tuple(images.shape[1:])} after others of {self._input_shape}; "
                "bring all to one size (model.transform does)."
            )
        self._input_shape = tuple(images.shape[1:])
        index = torch.as_tensor(batch["index"]).cpu()
        if len(images):
            with torch.no_grad():
                self.collect(images, index, self._is_aside(index))
        self.log("train/images", float(self._position), batch_size=max(1, len(images)), prog_bar=False)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # of float16, which steps for a gradient only
            self.unused.grad = scaler.scale(torch.zeros_like(self.unused))
        optimizer = self.optimizers()
        optimizer.step()  # type: ignore[union-attr]

    def _is_aside(self, index: Tensor) -> Tensor:
        """Which images are kept for calibration, bool."""
        share, seed = float(self.hparams["calibration_share"]), int(self.hparams["seed"])
        if self._aside is None:
            return torch.tensor([is_held_out(i, share, seed) for i in index.tolist()], dtype=torch.bool)
        return torch.tensor([i in self._aside for i in index.tolist()], dtype=torch.bool)

    def on_train_start(self) -> None:
        """Draw the images kept for calibration, if their number is known."""
        try:
            number = len(self.trainer.train_dataloader.dataset)  # type: ignore[union-attr]
        except (AttributeError, TypeError):
            self._aside = None
        else:
            self._aside = draw_held_out(number, self.hparams["calibration_share"], self.hparams["seed"])

    def on_train_end(self) -> None:
        """Select the memory bank, then calibrate."""
        processes = self.processes()
        images = sum(int(n) for n in processes.gather(torch.tensor([self._position])))
        if not images or not self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # on_fit_end says so
        self.select()
        parts = [torch.empty(3, 0, dtype=torch.float64)]  # of an image in each column: index, score, peak of its map
        for index, scores, maps in self.score_held_out():
            parts.append(torch.stack([values.cpu().double() for values in (index, scores, maps.flatten(1).amax(1))]))
        known = torch.cat(processes.gather_rows(torch.cat(parts, 1).T.contiguous()))  # (n, 3)
        _, scores, peaks = known[known[:, 0].argsort(stable=True)].float().to(self.device).unbind(1)
        self.calibration_scores, self.calibration_peaks = scores.clone(), peaks.clone()
        if len(known):
            self._tell_thresholds()
        elif self.hparams["calibration_share"]:
            log.warning("calibration_share holds no image out of %d; there are no thresholds.", images)

    def _tell_thresholds(self) -> None:
        n, rate = len(self.calibration_scores), self.hparams["false_alarm_rate"]
        promised = conformal_threshold(self.calibration_scores, rate)[1]
        log.info(
            "thresholds from %d held-out nominal images: %.4g for anomaly scores, %.4g for anomaly maps; a nominal "
            "image exceeds each with probability %.3g.",
            *(n, self.image_threshold, self.pixel_threshold, promised),
        )
        if n < images_needed(rate):
            log.warning(
                "false_alarm_rate %g needs at least %d held-out images, there are %d: the thresholds are the highest "
                "of them, and promise %.3g; raise calibration_share or take more nominal images.",
                *(rate, images_needed(rate), n, promised),
            )

    def on_fit_end(self) -> None:
        """Refuse a fit without a memory bank; write the finished model where callbacks saved before it."""
        self.release()
        self.unused.requires_grad_(False)
        if not self.bank_shape:
            raise UserError(
                "fit ended before every training batch was seen, so that there is no memory bank; look at max_time, "
                "max_steps, limit_train_batches and at callbacks that stop the Trainer."
            )
        write_checkpoints(self.trainer)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's identity; leave the frozen backbone out unless asked to save it."""
        checkpoint["patchcore"] = self.identity() | {"input_shape": list(self._input_shape or ())}
        if not self.hparams["save_backbone"]:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if "patch_features." not in k}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose memory bank was not made with this model's features."""
        if self._trainer is not None and self._trainer.state.fn == "fit":
            raise UserError(
                "PatchCore fits in one pass and cannot resume from a checkpoint; leave ckpt_path out to fit again, "
                "or test with it."
            )
        state = checkpoint["state_dict"]
        own = {k: v for k, v in self.state_dict().items() if "patch_features." in k}
        check_identity(checkpoint, self.identity())
        checkpoint["state_dict"] = own | state
        self._input_shape = tuple(checkpoint["patchcore"]["input_shape"]) or None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.sized_by_fit:
            if (saved := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(saved, device=self.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _holds(value: Any, images: int) -> bool:
    """Whether an entry of a batch has a value for each image."""
    return (
        isinstance(value, Tensor | list | tuple)
        and len(torch.atleast_1d(value) if isinstance(value, Tensor) else value) == images
    )


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in row.items()}


class _ReleaseOnException(L.Callback):
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, AnomalyModule):
            pl_module.release()
            pl_module.unused.requires_grad_(False)
