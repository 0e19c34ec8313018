"""The resize as an ONNX graph of open sizes equals eager in onnxruntime."""

import numpy as np
import onnxruntime
import pytest
import torch

from pl_patchcore.resize import resized

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporter itself


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_equals_eager_at_any_size(kind, tmp_path):
    class Graph(torch.nn.Module):
        def forward(self, images):
            return resized(images, (40, 36), (4, -2), (33, 40), kind)

    open_sizes = (dict.fromkeys(range(3), torch.export.Dim.DYNAMIC),)
    example = (torch.zeros(2, 50, 71, 3, dtype=torch.uint8),)
    torch.onnx.export(Graph(), example, tmp_path / "m.onnx", dynamo=True, dynamic_shapes=open_sizes)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    for shape in ((1, 1, 1, 3), (2, 90, 33, 3), (1, 3, 900, 3), (1, 1024, 1000, 3)):
        images = rng.integers(0, 256, shape, dtype=np.uint8)
        (found,) = session.run(None, {session.get_inputs()[0].name: images})
        expected = resized(torch.from_numpy(images), (40, 36), (4, -2), (33, 40), kind)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)  # level
