"""PatchCore in Lightning's Trainer: every flag, every way of checkpointing, one Trainer for several modules."""

import inspect
import warnings
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from pl_patchcore import PatchCore, UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning, about its own flags; what matters is asserted

IMAGES = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BATCHES = 5


def loader(images=IMAGES, **options):
    return DataLoader(images, **({"batch_size": 2} | options))


def module_of(tiny, **options):
    return PatchCore(tiny, ["fine", "coarse"], None, **({"resize": 32, "crop": None, "coreset_ratio": 0.2} | options))


@pytest.fixture(scope="module")
def expected():
    """Memory bank of each number of images, as a plain fit makes it."""
    from networks import TinyBackbone

    banks = {}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    for count in (2, 4, 10):
        module = module_of(TinyBackbone())
        L.Trainer(accelerator="cpu", max_epochs=1, **quiet).fit(module, loader(IMAGES[:count]))
        banks[count] = module.model.memory_bank.features.clone()
    return banks


FLAGS = {  # flag: (a value that is not the default, images that the memory bank is of)
    "accelerator": ("cpu", 10),
    "strategy": ("single_device", 10),
    "devices": (1, 10),
    "num_nodes": (1, 10),
    "precision": ("32-true", 10),
    "logger": (True, 10),
    "callbacks": ([L.pytorch.callbacks.Timer()], 10),
    "fast_dev_run": (2, 4),
    "max_epochs": (7, 10),
    "min_epochs": (3, 10),
    "max_steps": (50, 10),
    "min_steps": (100, 10),
    "max_time": ("00:01:00:00", 10),
    "limit_train_batches": (2, 4),
    "limit_val_batches": (1, 10),
    "limit_test_batches": (1, 10),
    "limit_predict_batches": (1, 10),
    "overfit_batches": (1, 2),
    "val_check_interval": (0.5, 10),
    "check_val_every_n_epoch": (2, 10),
    "num_sanity_val_steps": (0, 10),
    "log_every_n_steps": (1, 10),
    "enable_checkpointing": (True, 10),
    "enable_progress_bar": (True, 10),
    "enable_model_summary": (True, 10),
    "accumulate_grad_batches": (3, 10),
    "gradient_clip_val": (0.5, 10),
    "gradient_clip_algorithm": ("value", 10),
    "deterministic": (True, 10),
    "benchmark": (True, 10),
    "inference_mode": (False, 10),
    "use_distributed_sampler": (False, 10),
    "profiler": (SimpleProfiler(), 10),
    "detect_anomaly": (True, 10),
    "barebones": (True, 10),
    "plugins": ([AsyncCheckpointIO()], 10),
    "sync_batchnorm": (True, 10),
    "reload_dataloaders_every_n_epochs": (1, 10),
    "default_root_dir": (".", 10),
    "enable_autolog_hparams": (False, 10),
    "model_registry": ("organisation/patchcore", 10),
}


def test_every_flag_is_here():
    assert set(FLAGS) == set(inspect.signature(L.Trainer).parameters)


@pytest.mark.slow
@pytest.mark.parametrize("flag", FLAGS)
def test_flag(tiny, tmp_path, monkeypatch, expected, flag):
    monkeypatch.chdir(tmp_path)
    value, images = FLAGS[flag]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"accelerator": "cpu", "default_root_dir": tmp_path, "max_epochs": 1} | quiet | {flag: value}
    if flag == "barebones":
        options = {"accelerator": "cpu", "barebones": True, "max_epochs": 1}
    if flag == "gradient_clip_algorithm":
        options["gradient_clip_val"] = 0.5
    module, trainer = module_of(tiny), L.Trainer(**options)
    labelled = DataLoader([(image, 0) for image in IMAGES], batch_size=2)
    trainer.fit(module, loader(), labelled)
    assert torch.equal(module.model.memory_bank.features, expected[images])
    assert trainer.should_stop is False
    assert module.automatic_optimization is True
    assert not any(parameter.requires_grad for parameter in module.parameters())
    trainer.fit_loop.max_epochs = 2  # the same Trainer again
    if flag not in ("fast_dev_run", "overfit_batches", "limit_train_batches"):
        trainer.fit(module, loader(IMAGES[:4]))
        assert torch.equal(module.model.memory_bank.features, expected[4])


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"])
def test_precision_and_casts_load_again(tiny, trainer, tmp_path, precision):
    module, runner = module_of(tiny, calibration_share=0.2), trainer(precision=precision, max_epochs=1)
    runner.fit(module, loader())
    path = runner.checkpoint_callback.best_model_path
    plain = module_of(tiny, calibration_share=0.2)
    trainer(enable_checkpointing=False).fit(plain, loader())
    loaded = PatchCore.load_from_checkpoint(path, backbone=tiny)
    assert loaded.model.memory_bank.features.dtype == torch.float32
    rough = {"16": 1e-2, "bf16": 5e-2, "64": 1e-4}[precision.split("-")[0]]
    torch.testing.assert_close(loaded(IMAGES)[0].sort()[0], plain(IMAGES)[0].sort()[0], rtol=10 * rough, atol=rough)
    tests = DataLoader([(image, i % 2) for i, image in enumerate(IMAGES)], batch_size=3)
    trainer(precision=precision).test(module_of(tiny), tests, ckpt_path=path, verbose=False)
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        again = cast(PatchCore.load_from_checkpoint(path, backbone=tiny))
        runner = trainer()
        runner.strategy.connect(again)
        runner.save_checkpoint(tmp_path / "cast.ckpt")
        back = PatchCore.load_from_checkpoint(tmp_path / "cast.ckpt", backbone=tiny)
        assert back.image_threshold == pytest.approx(loaded.image_threshold, rel=1e-2)
        torch.testing.assert_close(back(IMAGES)[0], loaded(IMAGES)[0], rtol=5e-2, atol=5e-2)


class Own(Checkpoint):
    """A checkpoint callback of another class."""

    def __init__(self, folder, hook, steps=False):
        self.folder, self.steps = folder, steps
        setattr(self, hook, self.save)

    def save(self, trainer, *args):
        if not self.steps or trainer.global_step:
            trainer.save_checkpoint(self.folder / "own.ckpt")


SETTINGS = {
    "default": lambda folder: [],
    "save_last": lambda folder: [ModelCheckpoint(folder, save_last=True)],
    "link": lambda folder: [ModelCheckpoint(folder, save_last="link")],
    "last only": lambda folder: [ModelCheckpoint(folder, save_last=True, save_top_k=0)],
    "monitor": lambda folder: [ModelCheckpoint(folder, monitor="train/images", mode="max", save_top_k=2)],
    "two": lambda folder: [
        ModelCheckpoint(folder / "a"),
        ModelCheckpoint(folder / "b", every_n_train_steps=2, save_weights_only=True),
    ],
    "all": lambda folder: [ModelCheckpoint(folder, save_top_k=-1)],
    "every step": lambda folder: [ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)],
    "every 3 steps": lambda folder: [ModelCheckpoint(folder, every_n_train_steps=3, save_last=True)],
    "every 2 epochs": lambda folder: [ModelCheckpoint(folder, every_n_epochs=2)],
    "time": lambda folder: [ModelCheckpoint(folder, train_time_interval=timedelta(microseconds=1), save_top_k=-1)],
    "hour": lambda folder: [ModelCheckpoint(folder, train_time_interval=timedelta(hours=1))],
    "after validation": lambda folder: [ModelCheckpoint(folder, save_on_train_epoch_end=False)],
    "averaging": lambda folder: [WeightAveraging(), ModelCheckpoint(folder)],
    "own, at the epoch's end": lambda folder: [Own(folder, "on_train_epoch_end")],
    "own, after steps": lambda folder: [Own(folder, "on_train_epoch_end", steps=True)],
    "own, each batch": lambda folder: [Own(folder, "on_train_batch_end")],
    "own, at the end": lambda folder: [Own(folder, "on_train_end")],
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_checkpoint_holds_the_finished_bank(tiny, trainer, tmp_path, expected, setting, monkeypatch):
    whole = []  # whether each file was whole when it was written first

    def saved(self, path, *args, **kwargs):
        written(self, path, *args, **kwargs)
        whole.append(torch.load(path, weights_only=True)["patchcore"]["fitted"])

    written = L.Trainer.save_checkpoint
    monkeypatch.setattr(L.Trainer, "save_checkpoint", saved)
    runner = trainer(callbacks=SETTINGS[setting](tmp_path / "kept"), max_epochs=1)
    module = module_of(tiny)
    runner.fit(module, loader())
    files = list(tmp_path.rglob("*.ckpt"))
    assert files
    for file in files:
        loaded = PatchCore.load_from_checkpoint(file, backbone=tiny)
        assert torch.equal(loaded.model.memory_bank.features, expected[10])
    if "own" not in setting:
        assert all(whole)
        # a save_last comes once before the steps are counted, once after
        assert len([file for file in files if "last" not in file.name]) == (
            0 if setting == "last only" else 2 if setting == "two" else 1
        )
    for callback in runner.checkpoint_callbacks:
        for path in (getattr(callback, "best_model_path", ""), getattr(callback, "last_model_path", "")):
            assert not path or Path(path).exists()
    assert runner.global_step == BATCHES


def test_private_methods_of_model_checkpoint_are_there():
    """`lightning_parts.save_by_callbacks` needs them; where they go, it must change."""
    for name, parameters in (("_save_topk_checkpoint", 3), ("_save_last_checkpoint", 3)):
        assert len(inspect.signature(getattr(ModelCheckpoint, name)).parameters) == parameters


def test_selection_runs_in_on_train_end(tiny, trainer, monkeypatch):
    from pl_patchcore.fitting import Fitting

    hooks = []

    def select(self, **options):
        hooks.extend(frame.function for frame in inspect.stack() if frame.function.startswith("on_"))
        return chosen(self, **options)

    chosen = Fitting.select
    monkeypatch.setattr(Fitting, "select", select)
    trainer(max_epochs=1).fit(module_of(tiny), loader())
    assert hooks == ["on_train_end", "on_run_end"]


def test_own_save_after_the_last_batch_is_whole_and_an_earlier_one_is_refused(tiny, trainer, tmp_path, expected):
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, number):
            if number in (2, BATCHES - 1):
                trainer.save_checkpoint(tmp_path / f"{number}.ckpt")

    module = module_of(tiny)
    trainer(callbacks=[Saves()], max_epochs=1, enable_checkpointing=False).fit(module, loader())
    whole = PatchCore.load_from_checkpoint(tmp_path / f"{BATCHES - 1}.ckpt", backbone=tiny)
    assert torch.equal(whole.model.memory_bank.features, expected[10])
    with pytest.raises(UserError, match=r"2\.ckpt: holds no memory bank: it was written before its fit had ended"):
        PatchCore.load_from_checkpoint(tmp_path / "2.ckpt", backbone=tiny)
    with pytest.raises(UserError, match="holds no memory bank"):
        trainer().test(module, loader(), ckpt_path=tmp_path / "2.ckpt")


class Other(L.LightningModule):
    """A module that learns."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch, number):
        return self.layer(batch.mean((2, 3))).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_one_trainer_for_several_modules(tiny, trainer, expected):
    """PatchCore, another module, PatchCore, PatchCore: the checkpoints are those of plain modules."""
    runner, seen = trainer(max_epochs=1), []
    for number, kind in enumerate((PatchCore, Other, PatchCore, PatchCore, Other)):
        module = module_of(tiny) if kind is PatchCore else Other()
        runner.fit_loop.max_epochs = number + 1
        runner.fit(module, loader())
        path = Path(runner.checkpoint_callback.best_model_path)
        assert path.exists()
        assert path not in seen
        seen.append(path)
        if kind is PatchCore:
            loaded = PatchCore.load_from_checkpoint(path, backbone=tiny)
            assert torch.equal(loaded.model.memory_bank.features, expected[10])
        else:
            Other.load_from_checkpoint(path)
        assert runner.global_step == BATCHES * (number + 1)


class Fails(L.Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        if number == 2:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_fit_that_fails_leaves_nothing_but_what_is_refused(tiny, trainer, tmp_path, expected, error):
    kept = tmp_path / "kept"
    # OnExceptionCheckpoint takes its file away when a fit ends well; ModelCheckpoint's option leaves it
    callbacks = [Fails(error), OnExceptionCheckpoint(kept), ModelCheckpoint(kept, save_last=True)]
    module, runner = module_of(tiny), trainer(callbacks=callbacks, max_epochs=1)
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        runner.fit(module, loader())
    (file,) = tmp_path.rglob("*.ckpt")
    assert file.name == "on_exception.ckpt"
    with pytest.raises(UserError, match="holds no memory bank"):
        PatchCore.load_from_checkpoint(file, backbone=tiny)
    with pytest.raises(UserError, match="the memory bank is empty"):
        trainer().test(module, loader())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    trainer(enable_checkpointing=False, max_epochs=1).fit(module, loader())
    assert torch.equal(module.model.memory_bank.features, expected[10])


def test_failure_while_selecting_leaves_no_bank(tiny, trainer, tmp_path, monkeypatch):
    from pl_patchcore.calibration import Calibration

    def fails(*args):
        raise RuntimeError("broken")

    module = module_of(tiny, calibration_share=0.2)
    monkeypatch.setattr(Calibration, "fill", fails)
    with pytest.raises(RuntimeError, match="broken"):
        trainer(max_epochs=1).fit(module, loader())
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not module.model.fitted


def test_checkpoint_without_room_is_refused_before_the_fit(tiny, trainer, small_disk):
    module = module_of(tiny, resize=160, coreset_method="none")
    read = []

    def collate(images):
        read.append(len(images))
        return torch.stack(images)

    images = [torch.rand(3, 160, 160) for _ in range(10)]
    message = r"small.*: the checkpoint takes 1\.3 MB, and 1\.0 MB are free; make room, or choose another folder"
    with pytest.raises(UserError, match=message):
        trainer(default_root_dir=small_disk).fit(module, loader(images, collate_fn=collate))
    assert len(read) < BATCHES
    assert not list(small_disk.rglob("*.ckpt"))


def test_used_up_epochs_leave_the_old_bank(tiny, trainer, expected):
    module, runner = module_of(tiny), trainer(max_epochs=1, enable_checkpointing=False)
    runner.fit(module, loader(IMAGES[:4]))
    with pytest.raises(UserError, match="its epochs, steps or time are used up"):
        runner.fit(module, loader())
    assert torch.equal(module.model.memory_bank.features, expected[4])


class Stops(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        trainer.should_stop = number == 2


@pytest.mark.parametrize(
    ("options", "images", "message"),
    [
        ({"max_steps": 2}, IMAGES, "max_steps 2 ends the fit before its 5 batches"),
        ({"max_time": "00:00:00:00"}, IMAGES, "its epochs, steps or time are used up"),
        ({"callbacks": [Stops()]}, IMAGES, "fit ended before every training batch was seen"),
        ({"limit_train_batches": 0}, IMAGES, "the training loader has no batch"),
        ({"callbacks": [EarlyStopping("val/image_auroc")]}, IMAGES, "EarlyStopping monitors 'val/image_auroc'"),
        ({"callbacks": [ModelCheckpoint(monitor="train_loss")]}, IMAGES, "ModelCheckpoint monitors 'train_loss'"),
    ],
)
def test_fits_that_cannot_end_well(tiny, trainer, options, images, message):
    with pytest.raises(UserError, match=message):
        trainer(**({"max_epochs": 1} | options)).fit(module_of(tiny), loader(images))


class Stream(IterableDataset):
    def __init__(self, said):
        self.said = said

    def __iter__(self):
        return iter(IMAGES)


class Announced(Stream):
    def __len__(self):
        return self.said


def test_streams(tiny, trainer, expected, caplog):
    for stream in (Stream(0), Announced(100)):
        module = module_of(tiny)
        trainer(enable_checkpointing=False).fit(module, loader(stream))
        assert torch.equal(module.model.memory_bank.features, expected[10])
    assert "announced 50 batches and gave 5" in caplog.text


def test_tuner_finds_a_batch_size(tiny, trainer, expected):
    class Data(L.LightningDataModule):
        batch_size = 1

        def train_dataloader(self):
            return loader(batch_size=self.batch_size)

        def val_dataloader(self):
            return []

    data, runner = Data(), trainer(max_epochs=1)
    module = module_of(tiny)
    assert Tuner(runner).scale_batch_size(module, datamodule=data, max_trials=2, init_val=1) in (2, 4)
    runner.fit(module, data)
    torch.testing.assert_close(module.model.memory_bank.features, expected[10])


def test_loggers_that_upload_find_the_finished_model(tiny, trainer, tmp_path, expected):
    class Uploads(CSVLogger):
        found: ClassVar[list[bool]] = []

        def after_save_checkpoint(self, callback):
            self.found.append(torch.load(callback.best_model_path, weights_only=True)["patchcore"]["fitted"])

    logger = Uploads(tmp_path)
    trainer(logger=logger, max_epochs=1).fit(module_of(tiny), loader())
    assert logger.found == [True]
    assert (Path(logger.log_dir) / "hparams.yaml").read_text().count("coreset_ratio: 0.2") == 1


def test_asynchronous_writer_has_written_when_fit_returns(tiny, trainer, expected):
    runner = trainer(plugins=[AsyncCheckpointIO()], max_epochs=1)
    runner.fit(module_of(tiny), loader())
    loaded = PatchCore.load_from_checkpoint(runner.checkpoint_callback.best_model_path, backbone=tiny)
    assert torch.equal(loaded.model.memory_bank.features, expected[10])


def test_damaged_file_in_ckpt_path(tiny, trainer, tmp_path):
    runner = trainer(max_epochs=1)
    module = module_of(tiny)
    runner.fit(module, loader())
    file = Path(runner.checkpoint_callback.best_model_path)
    file.write_bytes(file.read_bytes()[:2000])
    with warnings.catch_warnings(), pytest.raises(UserError, match="is damaged or cut short"):
        trainer().test(module, loader(), ckpt_path=file)
    with pytest.raises(UserError, match="no such checkpoint"):
        trainer().test(module, loader(), ckpt_path=tmp_path / "none.ckpt")
