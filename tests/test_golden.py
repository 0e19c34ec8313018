"""Frozen results of six settings on small images that lie beside this file: picked rows, scores, maps, thresholds.

``golden/golden.npz`` holds images, the weights of a tiny network, and what version 0.1 of the package made of them. Its
engine was compared with the authors' code and with float64 on real images. Processors differ in the last bits: scores
and maps are compared to 1e-5, picks by their index.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from pl_patchcore import PatchCore

GOLDEN = np.load(Path(__file__).parent / "golden" / "golden.npz")
BASE = {"layers": ["fine", "coarse"], "resize": None, "crop": None, "projection_dim": 8, "seed": 3}
MEMBERS = [{"layers": ["fine"], "coreset_ratio": 0.1}, {"layers": ["coarse"], "coreset_ratio": 0.3}]
SETTINGS = {
    "paper": {"coreset_ratio": 0.1},
    "official": {
        "coreset_ratio": 0.1,
        "patches": {"layer_dim": 16, "feature_dim": 16},
        "coreset_method": "approximate",
        "distance": "squared",
        "reweighting_neighbors": 1,
    },
    "neighbours": {
        "coreset_ratio": 0.2,
        "num_neighbors": 3,
        "patch_size": 5,
        "patches": {"stride": 2},
        "sigma": 1.5,
        "reweighting_neighbors": 4,
    },
    "random": {"coreset_ratio": 0.15, "coreset_method": "random", "bank_dtype": "float16", "sigma": 0.0},
    "calibrated": {"coreset_size": 60, "calibration_share": 0.25, "false_alarm_rate": 0.3},
    "ensemble": {"ensemble": {"members": MEMBERS}},
}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(8, 12, 2, 2), nn.ReLU())
        weights = {k.removeprefix("weights."): GOLDEN[k] for k in GOLDEN.files if k.startswith("weights.")}
        self.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})

    def forward(self, x):
        return self.coarse(self.fine(x))


def images(name):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (torch.from_numpy(GOLDEN[name]).float() / 255 - mean) / std


@pytest.mark.parametrize("name", SETTINGS)
def test_golden(trainer, name):
    module = PatchCore(Network(), weights=None, **(BASE | SETTINGS[name]))
    train, test = images("train"), images("test")
    trainer(enable_checkpointing=False, max_epochs=1).fit(module, DataLoader(train, batch_size=3))
    for place, member in enumerate(module.model.members):
        key = f"{name}.{place}" if name == "ensemble" else name
        features = member.patch_features(train).flatten(0, 2)
        bank = member.memory_bank.features.float()
        picks = torch.cdist(bank.double(), features.double()).argmin(1)
        assert picks.tolist() == GOLDEN[f"{key}.picks"].tolist()
        torch.testing.assert_close(bank, features[picks], rtol=1e-3 if name == "random" else 1e-6, atol=1e-3)
    scores, maps = module(test)
    np.testing.assert_allclose(scores.numpy(), GOLDEN[f"{name}.scores"], rtol=1e-5)
    np.testing.assert_allclose(maps.numpy(), GOLDEN[f"{name}.maps"], rtol=1e-5, atol=1e-6)
    if name == "calibrated":
        calibration = module.model.calibration
        np.testing.assert_allclose(calibration.scores.numpy(), GOLDEN["calibrated.calibration_scores"], rtol=1e-5)
        np.testing.assert_allclose(calibration.peaks.numpy(), GOLDEN["calibrated.calibration_peaks"], rtol=1e-5)
