"""The plain model as an ONNX graph equals eager in onnxruntime."""

import numpy as np
import onnxruntime
import pytest
import torch
from test_model import BACKBONES, PatchCoreModel, PatchFeatures, fit, fitted

from pl_patchcore.ensemble import EnsembleModel

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporter itself


def ensemble():
    from networks import TinyBackbone

    members = [PatchCoreModel(PatchFeatures(TinyBackbone(), [layer], None)) for layer in ("fine", "coarse")]
    return fit(EnsembleModel(members))


@pytest.mark.parametrize("name", [*BACKBONES, "ensemble"])
def test_equals_eager_at_any_batch(name, tmp_path):
    torch.manual_seed(0)
    if name == "ensemble":
        model, size = ensemble(), (32, 48)
    else:
        make, layers, size, _ = BACKBONES[name]
        model = fitted(make(), layers, torch.rand(4, 3, *size))
    shapes = {"images": {0: torch.export.Dim("batch")}}
    torch.onnx.export(model, (torch.rand(2, 3, *size),), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for count in (1, 2, 5):
        new = torch.rand(count, 3, *size)
        found = session.run(None, {session.get_inputs()[0].name: new.numpy()})
        for ours, theirs in zip(model(new), found, strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-3, atol=1e-4)
