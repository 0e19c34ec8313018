import dataclasses
import io
import sys
import threading
import urllib.error
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import reference
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from pl_patchcore import PatchFeatures, UserError
from pl_patchcore.backbone import UntrainedBackboneWarning, weights_sha256

pytestmark = pytest.mark.filterwarnings("ignore::pl_patchcore.backbone.UntrainedBackboneWarning")


@pytest.mark.parametrize(("patch_size", "stride"), [(1, 1), (3, 1), (5, 2)])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_matches_reference(tiny, patch_size, stride, size):
    features = PatchFeatures(tiny, ["fine", "coarse"], patch_size=patch_size, patch_stride=stride)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    found = features(images)
    tiny.eval()
    fine = tiny.fine(images)
    layers = [fine, tiny.coarse(fine)]
    for i in range(2):
        maps = [
            reference.mean_neighbourhood(layer[i].detach().double().numpy(), patch_size, stride) for layer in layers
        ]
        grid = maps[0].shape[1:]
        expected = np.concatenate([maps[0], reference.bilinear(maps[1], grid)])
        np.testing.assert_allclose(found[i].permute(2, 0, 1).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert found.shape[-1] == features.dimension == 20


def test_pooled_dimensions_in_the_authors_order(tiny):
    features = PatchFeatures(tiny, ["fine", "coarse"], layer_dim=30, feature_dim=17, patch_size=3)
    images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    tiny.eval()
    fine = tiny.fine(images)
    pooled = []
    for layer in (fine, tiny.coarse(fine)):
        b, c, h, w = layer.shape
        patches = F.unfold(layer, 3, padding=1).view(b * c * 9, 1, h, w)
        patches = F.interpolate(patches, fine.shape[-2:], mode="bilinear", align_corners=False)  # first interpolate,
        patches = patches.view(b, c * 9, -1).transpose(1, 2)
        pooled.append(F.adaptive_avg_pool1d(patches, 30))  # then pool
    expected = F.adaptive_avg_pool1d(torch.stack(pooled, 2).flatten(2), 17)
    torch.testing.assert_close(features(images).flatten(1, 2), expected.detach(), rtol=1e-5, atol=1e-6)


LAYERS = {
    "resnet18": ["layer2", "layer3"],
    "mobilenet_v2": ["features.6", "features.13"],
    "densenet121": ["features.denseblock2", "features.denseblock3"],
    "squeezenet1_1": ["features.0", "features.4"],
    "swin_t": ["features.3", "features.5"],
    "vit_b_16": ["encoder.layers.encoder_layer_1"],
    "regnet_y_400mf": ["trunk_output.block2"],
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "vit" in n else n for n in LAYERS])
def test_torchvision_backbones_give_what_hooks_see(name):
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.get_model(name).eval()
    seen = {}
    for layer in LAYERS[name]:  # cloned at once: what runs behind may write into it
        network.get_submodule(layer).register_forward_hook(lambda m, i, o, layer=layer: seen.update({layer: o.clone()}))
    size = (224, 224) if name == "vit_b_16" else (96, 96)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        network(images)
        features = PatchFeatures(name, LAYERS[name], None, seed=0)
        found = features.layers_of(images)
    for layer, output in zip(LAYERS[name], found, strict=True):
        expected = seen[layer]
        if name == "swin_t":
            expected = expected.permute(0, 3, 1, 2)
        if name == "vit_b_16":
            expected = expected[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_building_in_threads_disturbs_nothing():
    """Tracing changes torch's modules for a while: other networks run on, and all is as it was afterwards."""
    call, stderr, network, images = nn.Module.__call__, sys.stderr, nn.Conv2d(3, 4, 3), torch.rand(1, 3, 8, 8)
    expected, stop, found = network(images), threading.Event(), list[torch.Tensor]()

    def run():
        while not stop.is_set():
            found.append(network(images))

    def build(seed):
        return PatchFeatures("resnet18", ["layer1"], None, seed=seed % 2)

    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(run)
        built = list(pool.map(build, range(6)))
        stop.set()
        running.result()
    assert found
    assert all(torch.equal(each, expected) for each in found)
    assert [each.weights_sha256 for each in built[2:]] == [each.weights_sha256 for each in 2 * built[:2]]
    assert nn.Module.__call__ is call
    assert sys.stderr is stderr


def test_untraceable_module_falls_back_to_hooks(tiny):
    class Moody(type(tiny)):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    images = torch.rand(1, 3, 32, 32)
    moody = PatchFeatures(Moody(), ["fine", "coarse"])
    torch.testing.assert_close(moody(images), PatchFeatures(tiny, ["fine", "coarse"])(images))


def test_nothing_behind_the_last_layer_runs(tiny):
    tiny.head = nn.Linear(3, 3)  # would fail
    assert PatchFeatures(tiny, ["fine"])(torch.rand(1, 3, 32, 32)).shape == (1, 8, 8, 8)
    assert not any("head" in name or "coarse" in name for name, _ in PatchFeatures(tiny, ["fine"]).named_parameters())


def test_stays_frozen_and_in_eval_mode(tiny):
    features = PatchFeatures(tiny, ["fine", "coarse"])
    before = weights_sha256(features.network)
    images = torch.rand(4, 3, 32, 32)
    first = features.train()(images)
    assert not any(module.training for module in features.network.modules())
    assert not any(p.requires_grad for p in features.parameters())
    assert torch.equal(features(images), first)
    assert weights_sha256(features.network) == before
    assert any(p.requires_grad for p in tiny.parameters())  # the user's module is left alone
    assert tiny.fine[2].inplace


def test_compile_channels_last_and_bf16(tiny):
    features = PatchFeatures(tiny, ["fine", "coarse"])
    images = torch.rand(2, 3, 32, 32)
    expected = features(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's compiler itself
        compiled = torch.compile(features, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected)
    last = features.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = features(images)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.05, atol=0.05)


def test_backbone_lies_in_memory_as_convolutions_like_it(tiny):
    network = PatchFeatures(tiny, ["fine", "coarse"]).network
    weights = [weight for weight in network.parameters() if weight.ndim == 4]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_untrained_weights_warn_and_are_seeded():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with pytest.warns(UntrainedBackboneWarning, match="random weights"):
        first = PatchFeatures("resnet18", ["layer1"], None, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    hashes = [PatchFeatures("resnet18", ["layer1"], None, seed=seed).weights_sha256 for seed in (1, 2)]
    assert hashes[0] == first.weights_sha256 != hashes[1]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_from_a_file(tiny, tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    state = {k: v for k, v in type(tiny)(seed=9).state_dict().items() if not k.startswith("head")}  # no head needed
    save_file(state, path) if suffix == "safetensors" else torch.save({"state_dict": state}, path)
    loaded = PatchFeatures(tiny, ["fine"], weights=str(path))
    assert torch.equal(loaded.network.state_dict()["fine.0.weight"], state["fine.0.weight"])
    assert loaded.weights_sha256 == PatchFeatures(type(tiny)(seed=9), ["fine"]).weights_sha256


def test_weights_that_do_not_fit(tiny, tmp_path):
    path = tmp_path / "w.pth"
    state = tiny.state_dict()
    other = dict(state) | {"fine.0.weight": torch.zeros(9, 3, 4, 4), "fine.7.weight": torch.zeros(1)}
    del other["fine.0.bias"]
    torch.save(other, path)
    with pytest.raises(UserError) as error:
        PatchFeatures(tiny, ["fine"], weights=str(path))
    assert "w.pth: weights do not fit TinyBackbone: 1 missing (fine.0.bias); 1 unknown (fine.7.weight); " in str(
        error.value
    )
    assert "1 of another shape (fine.0.weight (9, 3, 4, 4) for (8, 3, 4, 4))" in str(error.value)


def test_weights_files_that_are_broken(tiny, tmp_path):
    for name in ("a.pth", "a.safetensors"):
        path = tmp_path / name
        buffer = io.BytesIO()
        torch.save(tiny.state_dict(), buffer) if name == "a.pth" else save_file(tiny.state_dict(), path)
        path.write_bytes((buffer.getvalue() or path.read_bytes())[:500])
        with pytest.raises(UserError, match="not a whole weights file"):
            PatchFeatures(tiny, ["fine"], weights=str(path))
    torch.save(tiny, tmp_path / "pickled.pth")
    with pytest.raises(UserError, match="holds more than tensors"):
        PatchFeatures(tiny, ["fine"], weights=str(tmp_path / "pickled.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="is not a state dict"):
        PatchFeatures(tiny, ["fine"], weights=str(tmp_path / "list.pth"))
    with pytest.raises(UserError, match="no such weights file"):
        PatchFeatures(tiny, ["fine"], weights=str(tmp_path / "none.pth"))


def test_no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(UserError, match=r"cannot be downloaded .*resnet18-.*\.pth.*give its path as weights"):
        PatchFeatures("resnet18", ["layer1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet81"}, "'resnet81' is unknown; did you mean 'resnet18'"),
        (
            {"layers": ["layer1", "layr2"]},
            "'layr2' is not in resnet18; did you mean 'layer2'.*Candidates: conv1, ",
        ),
        ({"layers": ["fc"]}, r"'fc' gives \(2, 1000\), which is no grid"),
        ({"layers": []}, "layers must be a list"),
        ({"layers": "layer1"}, "layers must be a list"),
        ({"layers": ["layer1", "layer1"]}, "layers must be a list of different"),
        (
            {"weights": "IMAGENET1K_V9"},
            "'IMAGENET1K_V9' are unknown for resnet18; torchvision has IMAGENET1K_V1",
        ),
        ({"patch_size": 2}, "patch_size must be odd"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        PatchFeatures(**({"backbone": "resnet18", "layers": ["layer1"], "weights": None} | options))


def test_ambiguous_output_is_refused(tiny):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Identity()

        def forward(self, x):
            return self.out(x.flatten(2).mean(1))  # (B, H W)

    with pytest.raises(UserError, match=r"'out' gives \(2, 12288\), which is no grid"):
        PatchFeatures(Odd(), ["out"])
    with pytest.raises(UserError, match="name torchvision's own"):
        PatchFeatures(tiny, ["fine"], weights="IMAGENET1K_V2")


def test_backbones_of_timm_need_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"need timm: pip install 'pl-patchcore\[timm\]'"):
        PatchFeatures("timm/resnet18", ["layer1"], None)


@dataclasses.dataclass
class Outputs:
    extra: None
    fine: torch.Tensor
    coarse: torch.Tensor


class Several(nn.Module):
    """Gives both layers of a `TinyBackbone` in one output, of a kind."""

    def __init__(self, tiny, kind):
        super().__init__()
        self.tiny, self.kind = tiny, kind

    def forward(self, x):
        fine = self.tiny.fine(x)
        return self.kind(fine, self.tiny.coarse(fine))


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        (lambda *both: both, "outer[0]", "outer[1]"),
        (lambda fine, coarse: {"a": fine, "b": coarse}, "outer[a]", "outer[b]"),
        (lambda fine, coarse: Outputs(None, fine, coarse), "outer", "outer[coarse]"),
        (lambda fine, coarse: (fine, (coarse, fine)), "outer[0]", "outer[1]"),
    ],
)
def test_layers_are_chosen_from_an_output_of_several(tiny, kind, first, second):
    network = nn.Sequential(OrderedDict(outer=Several(tiny, kind), head=nn.Identity()))
    images = torch.rand(2, 3, 32, 48)
    expected = PatchFeatures(tiny, ["fine", "coarse"])(images)
    assert torch.equal(PatchFeatures(network, [first, second])(images), expected)
    with pytest.raises(UserError, match=r"'outer\[7\]' gives no tensor"):
        PatchFeatures(network, ["outer[7]"])


def test_layers_counted_from_the_end(tiny):
    images = torch.rand(2, 3, 32, 48)
    last, counted = PatchFeatures(tiny, ["last"]), PatchFeatures(tiny, ["coarse.-1"])
    assert last.layers == ["coarse"]  # the head gives no grid
    assert counted.identity["layers"] == ["coarse.1"]
    assert torch.equal(last(images), counted(images))
    with pytest.raises(UserError, match="different layers"):
        PatchFeatures(tiny, ["coarse.1", "coarse.-1"])
    with pytest.raises(UserError, match=r"'coarse\.-3' is not in TinyBackbone"):
        PatchFeatures(tiny, ["coarse.-3"])


class Patches(nn.Module):
    """A convolution over time, of one picture, that takes multiples of 16 pixels, or images of one size only."""

    def __init__(self, only=None):
        super().__init__()
        self.embed, self.out, self.only = nn.Conv3d(3, 5, (1, 16, 16), (1, 16, 16)), nn.Identity(), only

    def forward(self, x):
        if x.shape[2] % 16 or x.shape[3] % 16 or self.only not in (None, tuple(x.shape[2:])):
            raise ValueError(f"cannot take {tuple(x.shape)}")
        return self.out(self.embed(x[:, :, None])[:, :, 0])


def test_sizes_that_a_network_does_not_take():
    images = torch.rand(2, 3, 32, 48)
    features = PatchFeatures(Patches(), ["out"])
    assert features.to(memory_format=torch.preserve_format)(images).shape == (2, 2, 3, 5)
    with pytest.raises(UserError, match="fails on images of 32x40 pixels: make both multiples of 16"):
        features(torch.rand(2, 3, 32, 40))
    with pytest.raises(UserError, match=r"fails on images of 40x32 pixels .*multiples of 16, such as 32x32 or 48x48"):
        PatchFeatures(Patches(), ["out"], image_size=(40, 32))
    fixed = PatchFeatures(Patches((32, 48)), ["out"], image_size=(32, 48))
    assert fixed.layouts == [("bchw", 0, 0)]
    assert fixed(images).shape == (2, 2, 3, 5)
    with pytest.raises(UserError, match="takes images of 256x256 pixels only: set resize and crop to that size"):
        PatchFeatures(Patches((256, 256)), ["out"], image_size=(32, 48))
