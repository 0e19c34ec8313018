"""The plain model: fitted without Lightning, copied, pickled, cast, nested, called from threads, exported."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import reference
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pl_patchcore import PatchCoreModel, UserError
from pl_patchcore.coreset import CoresetOptions
from pl_patchcore.ensemble import EnsembleModel
from pl_patchcore.fitting import Fitting
from pl_patchcore.patch_features import PatchFeatures

IMAGES = torch.rand(8, 3, 32, 48, generator=torch.Generator().manual_seed(0))
NEW = torch.rand(5, 3, 32, 48, generator=torch.Generator().manual_seed(1))


class Asking(nn.Module):
    """Its forward asks for the image's values, so it cannot be traced."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 12, 2, 2)
            self.norm = nn.BatchNorm2d(12)

    def forward(self, x):
        if float(x.detach().abs().max()) > 1e6:
            x = x * 0
        return self.norm(self.second(self.first(x).relu()))


def fitted(network, layers, images=IMAGES, fixed_size=False, **options):
    features = PatchFeatures(network, layers, None, image_size=tuple(images.shape[-2:]))
    model = PatchCoreModel(features, coreset=CoresetOptions(ratio=0.2, **options))
    return fit(model, images, fixed_size=fixed_size)


def fit(model, images=IMAGES, **options):
    fitting = Fitting(model, calibration_share=0.25, images=len(images), **options)
    for part in images.split(3):
        fitting.add(part)
    fitting.select()
    fitting.close()
    return model


@pytest.fixture(params=["traced", "asking", "ensemble"])
def model(request, tiny):
    if request.param == "asking":
        return fitted(Asking(), ["first", "norm"])
    if request.param == "traced":
        return fitted(tiny, ["fine", "coarse"])
    members = [PatchCoreModel(PatchFeatures(tiny, [layer], None)) for layer in ("fine", "coarse")]
    return fit(EnsembleModel(members))


def same(model, other, images=NEW, **tolerance):
    for ours, theirs in zip(model(images), other(images), strict=True):
        torch.testing.assert_close(theirs, ours, **tolerance)


def test_scores_match_the_reference(tiny):
    model = fitted(tiny, ["fine", "coarse"])
    scores, maps = model(NEW)
    patches, bank = model.patch_features(NEW).numpy(), model.memory_bank.features.numpy()
    for i in range(len(NEW)):
        score, heat = reference.score_and_map(patches[i], bank, NEW.shape[-2:])
        assert scores[i].item() == pytest.approx(score, rel=1e-5)
        np.testing.assert_allclose(maps[i].numpy(), heat, rtol=1e-5)


def test_copies(model):
    """By copy, pickle, torch.save, moving to a device, averaging, and as a part of another module."""
    before = [tensor.clone() for tensor in model(NEW)]
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(whole, weights_only=False),
        AveragedModel(model),
        copy.deepcopy(nn.ModuleDict({"part": model}).train())["part"],
        model.to("cpu"),
    ):
        same(model, other, rtol=0, atol=0)
        same(model, other, NEW[:1], rtol=0, atol=0)
        assert not any(module.training for module in other.modules() if not isinstance(module, AveragedModel))
    for tensor, again in zip(before, model(NEW), strict=True):
        assert torch.equal(tensor, again)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_casts(model, dtype):
    """Images of any type are brought to the model's."""
    cast = copy.deepcopy(model).to(dtype)
    rough = {torch.float64: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}[dtype]
    for images in (NEW, NEW.to(dtype), NEW.double()):
        same(model, cast, images, rtol=rough, atol=rough)
    assert cast.calibration.image_threshold == pytest.approx(model.calibration.image_threshold, rel=1e-2)


def test_inference_in_bf16(model, monkeypatch):
    """The bank stays; scores move a little, and are exact for the patch features so computed."""
    exact, _ = model(NEW)
    for member in model.members:
        member.inference = "bf16"
    scores, _ = model(NEW)
    assert 0 < (scores / exact - 1).abs().max() < 0.03
    (member, *_) = model.members
    features = torch.cat([band.features for band in member.patch_features.bands(NEW, "bf16")], 1)
    assert features.dtype == torch.float32
    nearest = torch.cdist(features.flatten(1, 2).double(), member.memory_bank.features.double()).amin(2)
    own, _ = member.scorer.__class__(reweighting_neighbors=1)(
        member.patch_features.bands(NEW, "bf16"), member.memory_bank, NEW.shape[2:]
    )
    torch.testing.assert_close(own.double(), nearest.amax(1), rtol=1e-6, atol=0)
    refit = copy.deepcopy(model)
    fit(refit)
    for ours, theirs in zip(model.members, refit.members, strict=True):
        assert torch.equal(ours.memory_bank.features, theirs.memory_bank.features)
    for fast, expected in ((True, scores), (False, exact)):
        monkeypatch.setattr("pl_patchcore.patch_features.bf16_is_fast", lambda device, fast=fast: fast)
        for member in model.members:
            member.inference = "auto"
        assert torch.equal(model(NEW)[0], expected)


def test_inference_of_other_types_is_refused(tiny):
    with pytest.raises(UserError, match="inference must be float32, bf16 or auto, got 'int8'"):
        PatchCoreModel(PatchFeatures(tiny, ["fine"], None), inference="int8")


def test_state_dict_of_any_size(model):
    """A fitted model's buffers load into an empty one, and into one of another size, strictly."""
    names = {name for name in model.state_dict() if "patch_features" not in name}
    larger = copy.deepcopy(model)
    fit(larger, torch.cat([IMAGES, NEW]), fixed_size=True)
    empty = copy.deepcopy(model)
    empty.load_state_dict(larger.state_dict())
    same(larger, empty, rtol=0, atol=0)
    for assign in (False, True):
        other = copy.deepcopy(larger)
        other.load_state_dict(model.state_dict(), assign=assign)
        same(model, other, rtol=0, atol=0)
        assert {name for name in other.state_dict() if "patch_features" not in name} == names
    with pytest.raises(UserError, match="images of 32x32 pixels, but the memory bank is from images of 32x48"):
        empty(torch.rand(1, 3, 32, 32))
    assert model(torch.rand(1, 3, 40, 40))[1].shape == (1, 40, 40)  # no size was fixed


def test_threads(model):
    requests = [torch.rand(1 + i % 3, 3, 32, 48, generator=torch.Generator().manual_seed(i)) for i in range(16)]
    expected = [model(request)[0] for request in requests]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: model(requests[i % 16])[0], range(64)))
    for i, scores in enumerate(found):
        torch.testing.assert_close(scores, expected[i % 16])


def test_no_image_and_no_bank(tiny):
    model = fitted(tiny, ["fine"])
    scores, maps = model(NEW[:0])
    assert scores.shape == (0,)
    assert maps.shape == (0, 32, 48)
    with pytest.raises(UserError, match="memory bank is empty"):
        PatchCoreModel(PatchFeatures(tiny, ["fine"], None))(NEW)
    with pytest.raises(UserError, match=r"images are torch.int64; make them by model.transform"):
        model(torch.zeros(1, 3, 32, 48, dtype=torch.int64))


def test_training_images(tiny, caplog):
    """Raw levels are told, another size is refused."""
    model = PatchCoreModel(PatchFeatures(tiny, ["fine"], None))
    fitting = Fitting(model, fixed_size=True)
    fitting.add(255 * IMAGES)
    assert "training images reach 255" in caplog.text
    with pytest.raises(UserError, match=r"training images of \(3, 16, 16\) after others of \(3, 32, 48\)"):
        fitting.add(torch.rand(1, 3, 16, 16))


BACKBONES = {
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(), ["features.3", "features.6"], (64, 64), True),
    "resnet18": (lambda: torchvision.models.resnet18(), ["layer1", "layer2"], (64, 64), True),
    "vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32),
        ["encoder.layers.encoder_layer_1"],
        (32, 32),
        False,
    ),
}


def exports(model, size, free_size):
    example = torch.rand(2, 3, *size)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    graph = torch.export.export(model, (example,), dynamic_shapes=shapes)
    for count in (1, 2, 5):
        new = torch.rand(count, 3, *size)
        same(model, graph.module(), new, rtol=1e-4, atol=1e-5)
    if free_size:
        shapes = {"images": {0: torch.export.Dim("batch"), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}}
        graph = torch.export.export(model, (torch.rand(2, 3, 64, 96),), dynamic_shapes=shapes)
        same(model, graph.module(), torch.rand(3, 3, 96, 64), rtol=1e-4, atol=1e-5)
    return graph


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "vit" else pytest.mark.slow) for n in BACKBONES])
def test_export(name):
    """torch.export, with a dynamic batch and, where the backbone allows, a dynamic size, equals eager."""
    make, layers, size, free_size = BACKBONES[name]
    torch.manual_seed(0)
    exports(fitted(make(), layers, torch.rand(4, 3, *size)), size, free_size)


def test_export_of_an_ensemble(tiny):
    members = [PatchCoreModel(PatchFeatures(tiny, [layer], None)) for layer in ("fine", "coarse")]
    exports(fit(EnsembleModel(members)), (32, 48), False)
