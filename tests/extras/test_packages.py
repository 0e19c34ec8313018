"""Networks of timm and transformers as backbones, loggers and configurations of others."""

import mlflow  # noqa: F401 - the logger needs it
import pytest
import timm
import torch
from lightning.pytorch.loggers import MLFlowLogger
from omegaconf import OmegaConf
from torch.utils.data import DataLoader
from transformers import Dinov2Config, Dinov2Model

from pl_patchcore import PatchCore

pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages


def swin():
    options = {"embed_dim": 24, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 4, 8)}
    return timm.create_model("swin_tiny_patch4_window7_224", **options), "layers.1", {}, 224


def dinov2_of_timm():
    network = timm.create_model("vit_small_patch14_dinov2", depth=2, embed_dim=32, num_heads=2)
    return network, "blocks.1", {"resize": 518, "crop": 518}, 518


def dinov2_of_transformers():
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224, "patch_size": 14}
    network = Dinov2Model(Dinov2Config(**options))
    layer = next(name for name, _ in network.named_modules() if name.endswith(("layer.1", "layers.1")))
    return network, layer, {}, 224


@pytest.mark.parametrize("make", [swin, dinov2_of_timm, dinov2_of_transformers])
def test_backbone_is_fitted_scores_and_loads(trainer, make):
    network, layer, options, side = make()
    images = torch.rand(3, 3, side, side)
    module = PatchCore(network, [layer], None, **({"resize": None, "crop": None, "coreset_ratio": 0.05} | options))
    runner = trainer(max_epochs=1)
    runner.fit(module, DataLoader(images, batch_size=2))
    scores, maps = module(images)
    assert maps.shape == (3, side, side)
    loaded = PatchCore.load_from_checkpoint(runner.checkpoint_callback.best_model_path, backbone=network)
    torch.testing.assert_close(loaded(images), (scores, maps))


def test_mlflow_uploads_the_finished_model(tiny, trainer, tmp_path):
    logger = MLFlowLogger(
        tracking_uri=f"sqlite:///{tmp_path}/m.db", artifact_location=str(tmp_path / "artifacts"), log_model="all"
    )
    module = PatchCore(tiny, ["fine"], None, resize=32, crop=None)
    trainer(logger=logger, max_epochs=1).fit(module, DataLoader(torch.rand(6, 3, 32, 32), batch_size=2))
    files = list((tmp_path / "artifacts").rglob("*.ckpt"))
    assert files
    for file in files:
        assert PatchCore.load_from_checkpoint(file, backbone=tiny).memory_bank.size == module.memory_bank.size


def test_settings_of_hydra(tiny, trainer):
    config = OmegaConf.create({"layers": ["fine", "coarse"], "resize": 32, "crop": None, "store": {"kind": "ram"}})
    module, runner = PatchCore(tiny, weights=None, **config), trainer(max_epochs=1)
    images = torch.rand(6, 3, 32, 32)
    runner.fit(module, DataLoader(images, batch_size=2))
    loaded = PatchCore.load_from_checkpoint(runner.checkpoint_callback.best_model_path, backbone=tiny)
    assert loaded.hparams["layers"] == ["fine", "coarse"]
    assert torch.equal(loaded(images)[0], module(images)[0])
