"""What `patchcore.py` needs of Lightning beside its hooks: saving without optimiser steps, an anchor, cleaning up.

The one place that counts steps in Lightning's loop and calls its checkpoint callbacks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from pl_patchcore.checkpoint import read_checkpoint
from pl_patchcore.counted import Counted
from pl_patchcore.data.base import loader_error
from pl_patchcore.data.batch import as_batch, same_size_parts
from pl_patchcore.errors import UserError
from pl_patchcore.files import free_bytes, whole_file

NEEDED = (  # hooks of a fit and its checkpoints, none of which works without the others
    "setup", "configure_callbacks", "on_fit_start", "on_train_start", "on_train_epoch_start", "training_step",
    "on_train_epoch_end", "on_train_end", "on_fit_end", "on_save_checkpoint", "on_load_checkpoint",
)  # fmt: skip
LOGGED = ("train/images", "epoch", "step")  # what callbacks can monitor while a fit runs


class Anchor(nn.Module):
    """The one trainable parameter, which DDP asks for; outside the state dict, by the methods that torch documents."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros((), dtype=torch.float32), requires_grad=False)

    def _save_to_state_dict(self, *args: Any) -> None: ...

    def _load_from_state_dict(self, *args: Any) -> None: ...


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; reads one as the data of a stranger."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write it, in the same folder, so that it is whole or not there."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole_file(Path(path)) as partial:
            torch.save(checkpoint, partial)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Open it by `read_checkpoint`."""
        return read_checkpoint(path)


class ReleaseOnException(L.Callback):
    """What a module does when a run of it fails or is interrupted: modules have no such hook.

    Frees what it has collected, adds to the error of a loader process that was killed what helps, and says of a damaged
    ``ckpt_path`` what `read_checkpoint` says: Lightning has no hook between the choice of a checkpoint and its loading.
    """

    def __init__(self, module: L.LightningModule, release: Callable[[], None]) -> None:
        self.module, self.release = module, release

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Free it; explain the error; look at the checkpoint."""
        if pl_module is not self.module:
            return
        self.release()
        path = trainer.ckpt_path
        if isinstance(exception, Exception) and (explained := loader_error(exception)) is not exception:
            exception.add_note(str(explained))  # torch raises it wherever the run happens to be
        elif path is not None and "://" not in str(path) and isinstance(exception, Exception):
            read_checkpoint(path)  # raises, if it was that


def refuse_lost_hooks(kind: type[L.LightningModule], base: type[L.LightningModule]) -> None:
    """Refuse a subclass that has one of the `NEEDED` hooks and does not call that of its base, by a `UserError`."""
    for each in kind.__mro__[: kind.__mro__.index(base)]:
        for name in NEEDED:
            hook = vars(each).get(name)
            if inspect.isfunction(hook) and name not in _mentioned(hook):
                raise UserError(
                    f"{each.__name__}.{name} takes the place of {base.__name__}'s, without which nothing is fitted or "
                    f"saved; call super().{name}() in it."
                )


def _mentioned(function: Any) -> set[str]:
    """Names and texts in a function's code, in what is defined in it, and in functions that it decorates."""
    functions, found = [function], set[str]()
    for each in functions:
        codes = [each.__code__]
        for code in codes:
            found |= {*code.co_names, *(value for value in code.co_consts if isinstance(value, str))}
            codes += filter(inspect.iscode, code.co_consts)
        for cell in each.__closure__ or ():
            with suppress(ValueError):  # empty: what it names comes later
                if inspect.isfunction(cell.cell_contents) and cell.cell_contents not in functions:
                    functions.append(cell.cell_contents)
    return found


def refuse_monitors(trainer: L.Trainer) -> None:
    """Refuse callbacks that monitor what there is not before a fit ends, by a `UserError`."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor not in LOGGED:
            raise UserError(
                f"{type(callback).__name__} monitors {monitor!r}, but PatchCore has no figures before fit ends; "
                "take monitor out (the finished model is what gets saved)."
            )


def check_room(trainer: L.Trainer, needed: int) -> None:
    """Refuse a fit whose checkpoint, of ``needed`` bytes, finds no room: a `UserError` on the process that writes."""
    for callback in trainer.checkpoint_callbacks if trainer.is_global_zero else ():
        folder = getattr(callback, "dirpath", None)
        if folder is not None and "://" not in str(folder) and (free := free_bytes(Path(folder))) < needed:
            raise UserError(
                f"{folder}: the checkpoint takes {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free; make room, "
                "or choose another folder by trainer.default_root_dir."
            )


def begin_without_steps(module: L.LightningModule) -> None:
    """Take no optimiser step from now on; ``global_step`` stays as it is.

    To be called in ``on_train_start``: before it, Lightning refuses clipping and accumulation to such modules.
    """
    loop = module.trainer.fit_loop.epoch_loop
    module.automatic_optimization = False
    steps = loop.automatic_optimization.optim_progress.optimizer_steps
    loop.manual_optimization.optim_step_progress.total.completed = steps


def save_by_callbacks(module: L.LightningModule, *, saved: bool) -> None:
    """Count the batches as steps, and have the checkpoint callbacks save, which hold back while there is no step.

    ``saved`` tells whether a callback has saved since the last batch.
    """
    trainer, loop = module.trainer, module.trainer.fit_loop.epoch_loop
    batches: Any = loop.batch_progress.current
    module.automatic_optimization = True
    # Lightning has no public way to count a step without an optimiser; this is the counter that it saves by
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed += batches.processed
    epoch, step = torch.tensor(trainer.current_epoch), torch.tensor(trainer.global_step)
    metrics = trainer.callback_metrics | {"epoch": epoch, "step": step}
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            # Its public hooks were tried: with every_n_train_steps, train_time_interval and every_n_epochs they save
            # nothing at the end of the only epoch. tests/test_trainer.py notices when these two methods go.
            callback._save_topk_checkpoint(trainer, metrics)
            callback._save_last_checkpoint(trainer, metrics)
        elif not saved:  # of another class; it may have held back, too
            callback.on_train_epoch_end(trainer, module)
            callback.on_train_end(trainer, module)


def single_loader(loaders: Any) -> Any:
    """The loader of a test or validation; a `UserError` if there are several."""
    several = loaders if isinstance(loaders, Sequence) else [loaders]
    if len(several) > 1:
        raise UserError(
            f"{len(several)} loaders to test on, but figures are of one set of images: call test once for each loader, "
            "or give one loader over torch.utils.data.ConcatDataset."
        )
    return several[0] if several else None


def running_loader(trainer: L.Trainer, number: int = 0) -> Any:
    """The loader whose batches a step gets; of several the one of that number."""
    loaders: Any = (
        trainer.train_dataloader if trainer.training
        else trainer.test_dataloaders if trainer.testing
        else trainer.predict_dataloaders if trainer.predicting
        else trainer.val_dataloaders
    )  # fmt: skip
    return loaders[number] if isinstance(loaders, list | tuple) else loaders


def calibration_loader(trainer: L.Trainer) -> Any:
    """The data module's loader of images to calibrate with; None where there are none."""
    loader = getattr(trainer.datamodule, "calibration_dataloader", None)  # type: ignore[attr-defined]
    return None if loader is None else loader()


def same_data(loader: DataLoader[Any], sampler: Sampler[int] | None = None) -> DataLoader[Any]:
    """A new loader of the same data set, in its order if there is no ``sampler``."""
    options: Any = {"num_workers": loader.num_workers, "collate_fn": loader.collate_fn, "sampler": sampler}
    return DataLoader(loader.dataset, loader.batch_size or 1, **options)


def all_images(trainer: L.Trainer, loaders: Any) -> Iterator[tuple[Tensor, Counted | None]]:
    """Images ``(B, 3, H, W)`` of whole data sets, apart from what Lightning has begun; the same on every process."""
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        for batch in same_data(loader) if isinstance(loader, DataLoader) else loader:
            device = trainer.strategy.root_device
            for part in same_size_parts(as_batch(batch)):
                yield trainer.strategy.batch_to_device(part["image"], device), Counted.of(part, device)


def refuse_too_few_steps(trainer: L.Trainer) -> None:
    """Refuse ``max_steps`` that end a fit before all images have come, by a `UserError`."""
    if trainer.max_steps >= 0:
        trainer.fit_loop.setup_data()
        if trainer.max_steps < trainer.num_training_batches < math.inf:
            raise UserError(
                f"max_steps {trainer.max_steps} ends the fit before its {trainer.num_training_batches} "
                "batches have come; leave it out, or take fewer images by limit_train_batches."
            )


def all_has_come(trainer: L.Trainer, ended: bool) -> bool:
    """Whether the last batch of a fit that goes well has come, on all processes; ``ended``: this one's loader has."""
    if trainer.sanity_checking or trainer.state.fn != "fit" or trainer.state.status != TrainerStatus.RUNNING:
        return False  # also after an exception, perhaps of one process only
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    last = progress.is_last_batch and progress.current.processed == progress.current.ready
    return bool(trainer.strategy.reduce_boolean_decision(bool(last or ended)))


def refuse_unfinished(trainer: L.Trainer, began: bool, fitted: bool) -> None:
    """Refuse a fit that ended without a memory bank, by a `UserError` with the reason."""
    if trainer.limit_train_batches == 0 or trainer.num_training_batches == 0:
        raise UserError("the training loader has no batch; look at drop_last, the batch size and limit_train_batches.")
    if not began:
        raise UserError(
            "the Trainer has trained nothing: its epochs, steps or time are used up; take a new Trainer. "
            "The model is as it was."
        )
    if not fitted:
        raise UserError(
            "fit ended before every training batch was seen, so there is no memory bank; look at max_time and at "
            "callbacks that stop the Trainer."
        )
