"""A memory bank on the features of any LightningModule's encoder, at the end of its training.

A copy of the trained encoder becomes the backbone of a `PatchCore`, which is fitted on the device, and in the
processes, of the user's Trainer. Next: `patchcore.py`.
"""

from __future__ import annotations

import copy
import inspect
import logging
import multiprocessing
import os
from collections.abc import Sequence
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from tqdm import tqdm

from pl_patchcore.data.base import AnomalyDataModule
from pl_patchcore.data.batch import OwnImages, as_batch, same_size_parts
from pl_patchcore.distributed import Processes, on_first_process
from pl_patchcore.errors import UserError
from pl_patchcore.files import output_folder
from pl_patchcore.fitting import start_fitting
from pl_patchcore.lightning_parts import same_data
from pl_patchcore.options import nearest, refuse_unknown
from pl_patchcore.patchcore import PatchCore

log = logging.getLogger(__name__)
log.addFilter(on_first_process)


class MemoryBankCallback(L.Callback):
    """Fits a `PatchCore` on the encoder of a LightningModule when its training has ended.

    It takes the weights as training and all other callbacks leave them; for those of a checkpoint, fit a
    ``PatchCore(backbone=encoder)``. The encoder is copied, in float32 and eval mode; training is the same, bit for bit,
    with and without the callback. On several processes (``ddp``) each extracts its share of the images, and every
    process has the result, of the first process's encoder. A training that is interrupted or fails leaves no memory
    bank. With ``fast_dev_run`` a few batches are fitted and nothing is written.

    Args:
        encoder: Dotted name of the encoder in the LightningModule, such as ``encoder`` or ``model.backbone``.
        layers: Layers by dotted name inside the encoder; the first gives the patch grid.
        data: Loader or data module (one that the Trainer has not got) of nominal images, in the batches that
            `PatchCore` takes: images float ``(B, 3, H, W)``, alone or first of a tuple of up to three, or a dict with
            ``image``; normalised, for the module's own hooks on batches do not run. None: the Trainer's own training
            loader, of nominal images only; its augmentations go into the memory bank, and what ``drop_last`` leaves out
            does not.
        path: File to write the `PatchCore` to; None: ``patchcore.ckpt`` in the Trainer's ``log_dir``, or
            ``patchcore_<encoder>.ckpt`` where several callbacks have no path. An earlier one is replaced.
        options: Other arguments of `PatchCore`, such as ``coreset_ratio``. Those of images should say what the loader
            does: they are for ``patchcore.transform``, which brings new images to the same form. ``save_backbone`` is
            True here unless given.

    Attributes:
        patchcore: The fitted model, on the CPU, in eval mode; None before the end of training.
        path: File that was written; None before the end of training.

    Raises:
        UserError: If an option is unknown; when ``fit`` starts also for the encoder's and the layers' names, values of
            options, and strategies whose processes do not hold the whole encoder; with the first batch of a loader, if
            it holds no such images or the encoder does not take them.

    Example:
        >>> callback = MemoryBankCallback("encoder", ["1"], resize=64, crop=None, coreset_ratio=0.01)
        >>> trainer = L.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu")

        After ``trainer.fit(module, loader)``: ``scores, maps = callback.patchcore(images)``, and in another process
        ``PatchCore.load_from_checkpoint(callback.path, backbone=encoder)``, where ``encoder`` need not be trained.
    """

    def __init__(
        self,
        encoder: str,
        layers: Sequence[str],
        data: DataLoader[Any] | L.LightningDataModule | None = None,
        path: str | Path | None = None,
        **options: Any,
    ) -> None:
        known = inspect.signature(PatchCore).parameters.keys() - {"backbone", "layers", "weights"}
        refuse_unknown(options, known, "MemoryBankCallback")
        if options.get("calibration") == "images":
            raise UserError(
                "MemoryBankCallback has no images for calibration images; take leave_one_out or split, or calibrate "
                "its patchcore by patchcore.calibrate."
            )
        self.encoder, self.layers, self.data, self.asked_path = encoder, layers, data, path
        self.options = {"save_backbone": True} | options
        self.patchcore: PatchCore | None = None
        self.path: Path | None = None
        self._trial: PatchCore | None = None  # until the first batch of the Trainer's own loader has been looked at
        self._made_in = os.getpid()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what would fail only after training."""
        if stage != "fit":
            return
        if not isinstance(trainer, L.Trainer):
            raise UserError(
                f"MemoryBankCallback works in a Trainer of the package lightning, got {type(trainer).__module__}; "
                "import lightning as L in place of pytorch_lightning."
            )
        strategy, whole = trainer.strategy, (SingleDeviceStrategy, DDPStrategy)
        if not isinstance(strategy, whole) or isinstance(strategy, DeepSpeedStrategy):
            raise UserError(
                f"MemoryBankCallback needs the whole encoder in each process, {type(strategy).__name__} may split it; "
                "take strategy ddp, or fit a PatchCore(backbone=encoder) after training, on the loaded checkpoint."
            )
        if getattr(multiprocessing.parent_process(), "pid", None) == self._made_in:
            raise UserError(
                "MemoryBankCallback does not work in processes that end with training (ddp_spawn, ddp_notebook): its "
                "patchcore would end with them; take strategy ddp, or devices=1."
            )
        self.patchcore = self.path = self._trial = None
        with isolate_rng():
            model = self._model(pl_module)
            model.store.check_processes(trainer.world_size)
            if self.data is None:
                self._trial = model
            elif not isinstance(self.data, L.LightningDataModule):  # whose loaders are made when they are needed
                self._try(model, next(iter(self.data), None))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the first batch, where it is the Trainer's own loader that is to be fitted on."""
        if self._trial is not None:
            with isolate_rng():
                self._try(self._trial, batch)
            self._trial = None

    def _try(self, model: PatchCore, batch: Any) -> None:
        if batch is None:
            raise UserError("MemoryBankCallback: data has no batch; give it a loader of nominal images.")
        try:
            images = same_size_parts(as_batch(batch))[0]["image"]
        except UserError as error:
            raise UserError(f"MemoryBankCallback: {error} Give it a loader of nominal images as data.") from error
        with torch.no_grad():
            model.patch_features(images[:1].cpu())

    def _model(self, module: L.LightningModule) -> PatchCore:
        try:
            encoder = module.get_submodule(self.encoder)
        except AttributeError as error:
            known = [name for name, _ in module.named_modules() if name]
            children = ", ".join(name for name, _ in module.named_children()) or "none"
            raise UserError(
                f"{type(module).__name__} has no module {self.encoder!r} for MemoryBankCallback; did you mean "
                f"{nearest(self.encoder, known)!r}? Its modules: {children} (and those inside them)."
            ) from error
        return PatchCore(copy.deepcopy(encoder).cpu().float(), self.layers, None, **self.options)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit a `PatchCore` on the encoder, and write it."""
        log.info("fitting a memory bank on %s.%s of this training.", type(pl_module).__name__, self.encoder)
        device = trainer.strategy.root_device
        with isolate_rng(), torch.autocast(device.type, enabled=False):
            model = self._model(pl_module).to(device)
            self._fit(model, trainer)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
            unnamed = sum(isinstance(each, MemoryBankCallback) and each.asked_path is None for each in callbacks)
            name = "patchcore.ckpt" if unnamed == 1 else f"patchcore_{self.encoder}.ckpt"
            path = Path(self.asked_path or output_folder(trainer) / name)
            if trainer.is_global_zero:
                model.save(path)
            trainer.strategy.barrier()
            self.path = path
            log.info("PatchCore on the trained encoder: %s", path)
        self.patchcore = model.cpu()

    def _fit(self, model: PatchCore, trainer: L.Trainer) -> None:
        device, (loader, batches) = trainer.strategy.root_device, self._loader(model, trainer)
        own_images = OwnImages(loader, trainer.global_rank, trainer.world_size)
        processes = Processes(device, alone=trainer.world_size == 1)
        for weight in model.patch_features.network.state_dict().values():
            weight.copy_(processes.broadcast(weight))  # batch norms differ between processes
        model.patch_features.identify()
        fitting = start_fitting(model, loader, batches or float("inf"), processes, trainer.num_devices)
        shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
        try:
            for batch in tqdm(islice(loader, batches), "Memory bank", batches, disable=not shown, unit=" batches"):
                fitting.add_batch(own_images.of(batch))
            fitting.select(shown=shown)
            model.training_images = fitting.training_images
        finally:
            fitting.close()
        model.model.calibration.tell(model.calibration)

    def _loader(self, model: PatchCore, trainer: L.Trainer) -> tuple[Any, int | None]:
        """The loader of this process's share, and how many of its batches to take; None where that is not known."""
        limit = int(trainer.num_training_batches) if trainer.num_training_batches < float("inf") else None
        data: Any = self.data
        if data is None:
            return trainer.train_dataloader, limit
        if isinstance(data, L.LightningDataModule):
            if isinstance(data, AnomalyDataModule):
                data.transform = data.transform or model.transform
            if trainer.local_rank == 0:
                data.prepare_data()
            trainer.strategy.barrier()
            data.setup("fit")
            data = data.train_dataloader()
        if trainer.world_size > 1 and isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
            sampler: Any = DistributedSampler(data.dataset, trainer.world_size, trainer.global_rank, shuffle=False)
            data = same_data(data, sampler)
        batches = length_hint(data) or None
        if trainer.fast_dev_run and limit is not None:  # type: ignore[attr-defined]
            batches = min(batches or limit, limit)
        return data, batches
