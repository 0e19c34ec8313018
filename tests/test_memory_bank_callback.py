"""A memory bank on the encoder of a user's own LightningModule, and `PatchCore` as a part of one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import free_port
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from networks import TinyBackbone
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pl_patchcore import MemoryBankCallback, PatchCore, SyntheticDataModule, UserError

OPTIONS = {"layers": ["fine", "coarse"], "resize": 32, "crop": None, "coreset_ratio": 0.1}


class Classifier(L.LightningModule):
    """A user's module: an encoder and its training, nothing of PatchCore's."""

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"encoder": TinyBackbone()})

    def forward(self, images):
        return self.model["encoder"](images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self(images + 0.01 * torch.randn_like(images)), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def images():
    return torch.rand(11, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def train_loader(images):
    return DataLoader(TensorDataset(images, torch.arange(11) % 2), batch_size=4, shuffle=True)


@pytest.fixture
def loader(images):
    return DataLoader(images, batch_size=4)


def trained(trainer, train_loader, callbacks, **options):
    L.seed_everything(1, verbose=False)
    module, runner = Classifier(), trainer(**({"max_epochs": 2, "callbacks": callbacks} | options))
    runner.fit(module, train_loader)
    return module, runner


def test_equals_a_plain_fit_on_the_trained_encoder(trainer, train_loader, loader, images, tmp_path):
    callback = MemoryBankCallback("model.encoder", data=loader, **OPTIONS)
    module, runner = trained(trainer, train_loader, [callback])
    encoder = module.model["encoder"]
    plain = PatchCore(encoder, **OPTIONS)
    trainer(enable_checkpointing=False).fit(plain, loader)
    bank = callback.patchcore.memory_bank.features
    assert len(bank) == 11 * 8 * 8 // 10
    assert torch.equal(bank, plain.memory_bank.features)
    assert not torch.equal(encoder.fine[0].weight, TinyBackbone().fine[0].weight)  # it has learnt
    expected = plain.eval()(images)
    for found in (
        callback.patchcore,
        PatchCore.load_from_checkpoint(callback.path, backbone=encoder).eval(),
        PatchCore.load_from_checkpoint(callback.path, backbone=TinyBackbone(seed=9)).eval(),  # the file has the weights
    ):
        for value, other in zip(found(images), expected, strict=True):
            assert torch.equal(value, other)
    assert callback.path == tmp_path / "patchcore.ckpt"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "patchcore.ckpt"]
    (figures,) = runner.test(callback.patchcore, DataLoader(TensorDataset(images, torch.arange(11) % 2)), verbose=False)
    assert "test/image_auroc" in figures


def test_training_is_the_same_with_and_without(trainer, train_loader, loader):
    states = []
    for callbacks in ([], [MemoryBankCallback("model.encoder", data=loader, **OPTIONS)]):
        module, _ = trained(trainer, train_loader, callbacks)
        assert module.training
        assert all(parameter.requires_grad for parameter in module.parameters())
        assert module.model["encoder"].fine[2].inplace
        states.append((module.state_dict(), torch.rand(3)))  # and so are random numbers afterwards
    for name, value in states[0][0].items():
        assert torch.equal(value, states[1][0][name]), name
    assert torch.equal(states[0][1], states[1][1])


def test_the_trainers_own_loader_and_data_modules(trainer, train_loader, images):
    own = MemoryBankCallback("model.encoder", **OPTIONS, coreset_method="none")
    data = SyntheticDataModule(train_images=5, test_nominal=2, test_per_defect=1, batch_size=2, num_workers=0)
    module = MemoryBankCallback("model.encoder", data=data, **OPTIONS, coreset_method="none")
    trained(trainer, train_loader, [own, module])
    patches = own.patchcore.patch_features(images).flatten(0, 2)
    nearest = torch.cdist(patches.double(), own.patchcore.memory_bank.features.double()).amin(1)
    assert own.patchcore.bank_shape == [11 * 64, 20]
    assert nearest.max() < 1e-5  # all images, in the order of the loader
    assert module.patchcore.bank_shape == [5 * 64, 20]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_features_are_in_full_precision(trainer, train_loader, loader, precision):
    callback = MemoryBankCallback("model.encoder", data=loader, **OPTIONS)
    module, _ = trained(trainer, train_loader, [callback], precision=precision)
    plain = PatchCore(module.model["encoder"].float(), **OPTIONS)
    trainer(enable_checkpointing=False).fit(plain, loader)
    assert torch.equal(callback.patchcore.memory_bank.features, plain.memory_bank.features)


def test_max_steps_leaves_a_bank_and_an_interruption_none(trainer, train_loader, loader, tmp_path):
    class Interrupt(Callback):
        def on_train_batch_end(self, *args):
            raise KeyboardInterrupt

    callback = MemoryBankCallback("model.encoder", data=loader, path=tmp_path / "deep" / "bank.ckpt", **OPTIONS)
    trained(trainer, train_loader, [callback], max_epochs=-1, max_steps=4)
    assert callback.patchcore.bank_shape == [70, 20]
    assert callback.path == tmp_path / "deep" / "bank.ckpt"
    callback.path.unlink()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trained(trainer, train_loader, [callback, Interrupt()])
    assert callback.patchcore is callback.path is None
    assert not list(tmp_path.rglob("bank*"))


def test_fast_dev_run_fits_a_batch_and_writes_nothing(trainer, train_loader, loader, tmp_path):
    callback = MemoryBankCallback("model.encoder", data=loader, **OPTIONS, coreset_method="none")
    trained(trainer, train_loader, [callback], fast_dev_run=True)
    assert callback.patchcore.bank_shape == [4 * 64, 20]
    assert not list(tmp_path.iterdir())


class Untrained(Classifier):
    def training_step(self, batch, batch_idx):
        raise AssertionError("training has begun")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "model.encodr"}, "Classifier has no module 'model.encodr' .* did you mean 'model.encoder'"),
        ({"layers": ["fine", "coarsest"]}, "layer 'coarsest' is not in TinyBackbone; did you mean 'coarse'"),
        ({"coreset_ratio": 2.0}, "coreset_ratio must be in"),
        ({"data": DataLoader([{"pixels": torch.rand(3, 32, 32)}])}, "a dict with 'image'.*loader of nominal images"),
        ({"data": DataLoader(torch.rand(2, 1, 32, 32))}, r"images must be \(B, 3, H, W\)"),
        ({"data": []}, "data has no batch"),
    ],
)
def test_what_would_fail_is_refused_before_training(trainer, train_loader, options, message):
    callback = MemoryBankCallback(**({"encoder": "model.encoder"} | OPTIONS | options))
    Untrained.__name__ = "Classifier"
    with pytest.raises(UserError, match=message):
        trainer(callbacks=[callback], max_epochs=1).fit(Untrained(), train_loader)


def test_a_train_loader_of_other_batches_is_refused_before_training(trainer):
    callback = MemoryBankCallback("model.encoder", **OPTIONS)
    views = DataLoader([{"views": torch.rand(2, 3, 32, 32)}])
    with pytest.raises(UserError, match="Give it a loader of nominal images as data"):
        trainer(callbacks=[callback], max_epochs=1).fit(Untrained(), views)


def test_unknown_options_and_unfit_strategies(trainer):
    with pytest.raises(UserError, match="no argument 'coreset_ration'; did you mean 'coreset_ratio'"):
        MemoryBankCallback("encoder", ["1"], coreset_ration=0.1)
    with pytest.raises(UserError, match="no argument 'weights'"):
        MemoryBankCallback("encoder", ["1"], weights=None)
    callback = MemoryBankCallback("model.encoder", **OPTIONS)

    class Sharded(L.Trainer):
        strategy = FSDPStrategy.__new__(FSDPStrategy)  # Lightning makes one only where a GPU is

        def __init__(self): ...

    with pytest.raises(UserError, match="FSDPStrategy may split it; take strategy ddp"):
        callback.setup(Sharded(), Classifier(), "fit")
    bounded = MemoryBankCallback("model.encoder", store={"selection_memory": 1.0}, **OPTIONS)

    class OnTwoProcesses(Sharded):
        strategy = SingleDeviceStrategy("cpu")
        world_size = 2

    with pytest.raises(UserError, match=r"store\.selection_memory .* of one process, there are 2; leave it out"):
        bounded.setup(OnTwoProcesses(), Classifier(), "fit")
    with pytest.raises(UserError, match="import lightning as L in place of pytorch_lightning"):
        callback.setup(SimpleNamespace(), Classifier(), "fit")


SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import lightning as L
import torch
from torch.utils.data import DataLoader
from test_memory_bank_callback import OPTIONS, Classifier, TinyBackbone
from pl_patchcore import MemoryBankCallback, PatchCore

out = sys.argv[1]
images = torch.rand(11, 3, 32, 32, generator=torch.Generator().manual_seed(0))
callback = MemoryBankCallback("model.encoder", data=DataLoader(images, batch_size=1), **OPTIONS, calibration_share=0.3)
own = MemoryBankCallback("model.encoder", path=out + "/own.ckpt", **OPTIONS, coreset_method="none")
trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", logger=False, max_epochs=2,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=out, callbacks=[callback, own],
)
module = Classifier()
module.anomaly = PatchCore(TinyBackbone(), **OPTIONS)  # no parameter of it may want a gradient
trainer.fit(module, DataLoader([(image, i % 2) for i, image in enumerate(images)], batch_size=1))
assert trainer.world_size == 2 and callback.path.is_file() and own.path.is_file()
result = {
    "state": callback.patchcore.state_dict(), "own": own.patchcore.memory_bank.features,
    "encoder": module.model["encoder"].state_dict(),
}
torch.save(result, out + f"/{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_equal_one(trainer, images, tmp_path):
    """Bit for bit, at as many threads, on the encoder that the two have trained."""
    (tmp_path / "fit.py").write_text(SCRIPT)
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "fit.py"), str(tmp_path)], capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": here}
        | {"MASTER_PORT": free_port()},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    encoder = TinyBackbone()
    encoder.load_state_dict(first["encoder"])
    assert not torch.equal(first["encoder"]["fine.1.running_mean"], second["encoder"]["fine.1.running_mean"])
    plain, threads = PatchCore(encoder, **OPTIONS, calibration_share=0.3), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer(enable_checkpointing=False).fit(plain, DataLoader(images, batch_size=1))
    finally:
        torch.set_num_threads(threads)
    saved = PatchCore.load_from_checkpoint(tmp_path / "patchcore.ckpt", backbone=encoder).state_dict()
    for state in (first["state"], second["state"], saved):
        assert state.keys() == plain.state_dict().keys()
        for name, value in plain.state_dict().items():
            assert torch.equal(state[name].nan_to_num(), value.nan_to_num()), name
    for result in (first, second):
        assert result["own"].shape == (11 * 64, 20)  # the Trainer's own loader, each image once


class Parent(L.LightningModule):
    """A user's module with a PatchCore among its parts, and arguments named like PatchCore's."""

    def __init__(self, seed=3, layers=("nothing",), net=None):
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.head = nn.Linear(3, 2)
        self.anomaly = PatchCore(TinyBackbone(), **OPTIONS, calibration_share=0.3)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(batch[0].mean((2, 3))), batch[1])

    def test_step(self, batch, batch_idx):
        scores, _ = self.anomaly(batch[0])
        self.log("anomaly", scores.mean())

    def predict_step(self, batch, batch_idx):
        return self.anomaly(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_a_part_of_another_module(trainer, train_loader, loader, images, tmp_path):
    parent = Parent(net=nn.Linear(1, 1))
    assert parent.anomaly.hparams["seed"] == 0
    assert parent.anomaly.hparams["layers"] == ["fine", "coarse"]
    assert not {"net"} & parent.anomaly.hparams.keys()
    trainer(enable_checkpointing=False).fit(parent.anomaly, loader)
    assert not any(p.requires_grad for p in parent.anomaly.parameters())  # DDP would wait for its gradient
    bank, head = parent.anomaly.memory_bank.features.clone(), parent.head.weight.clone()
    runner = trainer(max_epochs=1)
    runner.fit(parent, train_loader)
    assert not torch.equal(parent.head.weight, head)
    assert torch.equal(parent.anomaly.memory_bank.features, bank)
    expected = torch.cat([scores for scores, _ in runner.predict(parent, loader)])
    path = runner.checkpoint_callback.best_model_path
    again = Parent.load_from_checkpoint(path, weights_only=True).eval()
    assert torch.equal(again.anomaly.memory_bank.features, bank)
    assert again.anomaly.image_threshold == parent.anomaly.image_threshold is not None
    fresh = Parent()
    fresh.anomaly.patch_features.network.get_submodule("fine.0").weight.data.zero_()  # the file has the weights
    for module, options in ((again, {}), (fresh, {"ckpt_path": path, "weights_only": True})):
        found = torch.cat([scores for scores, _ in trainer().predict(module, loader, **options)])
        assert torch.equal(found, expected)
    (figures,) = trainer().test(again, DataLoader(TensorDataset(images), batch_size=11), verbose=False)
    assert figures["anomaly"] == pytest.approx(expected.mean().item())
    assert trainer(enable_checkpointing=False).fit(again.anomaly, loader) is None  # it can be fitted again
    assert torch.equal(again.anomaly.memory_bank.features, bank)


def test_calibration_images_are_refused():
    with pytest.raises(
        UserError, match=r"take leave_one_out or split, or calibrate its patchcore by patchcore\.calibrate"
    ):
        MemoryBankCallback("encoder", ["1"], calibration="images")
