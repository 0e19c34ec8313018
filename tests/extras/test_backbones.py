"""Backbones by name of timm's, and modules of transformers, with random weights: the smallest of each family."""

import copy
import hashlib
import http.server
import math
import os
import pickle
import subprocess
import sys
import threading
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save, save_file
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.utils.data import DataLoader
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from pl_patchcore import PatchCore, PatchFeatures, UserError
from pl_patchcore.tiles import TileOptions

pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages

FAMILIES = {  # name: layers, height and width
    "resnet10t": (["layer2", "layer3"], (64, 96)),
    "convnext_atto": (["stages.1"], (64, 96)),
    "efficientnet_lite0": (["blocks.2"], (64, 96)),
    "swin_tiny_patch4_window7_224": (["layers.1"], (224, 224)),
    "swinv2_tiny_window8_256": (["layers.1"], (256, 256)),
    "vit_tiny_patch16_224": (["blocks.3", "last"], (96, 128)),
    "deit_tiny_patch16_224": (["blocks.-1"], (224, 224)),
    "vit_small_patch14_dinov2": (["blocks.5"], (448, 336)),
    "vit_small_patch14_reg4_dinov2": (["blocks.1"], (518, 518)),
    "vit_small_patch16_dinov3": (["blocks.2"], (96, 128)),
    "eva02_tiny_patch14_224": (["last"], (112, 224)),
    "beit_base_patch16_224": (["blocks.1"], (96, 128)),
    "hiera_tiny_224": (["blocks.2"], (224, 160)),
    "pvt_v2_b0": (["stages.1"], (64, 96)),
}
LOADS = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from pl_patchcore import PatchCore
folder = sys.argv[1]
found = {}
for name in torch.load(f"{folder}/names.pt"):
    images = torch.load(f"{folder}/{name}.pt")
    found[name] = PatchCore.load_from_checkpoint(f"{folder}/{name}.ckpt")(images)
torch.save(found, f"{folder}/found.pt")
"""


def images_of(size):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


def test_every_family_is_fitted_and_loads_in_a_new_process(trainer, tmp_path):
    expected = {}
    for name, (layers, size) in FAMILIES.items():
        module = PatchCore(f"timm/{name}", layers, None, resize=None, crop=size, coreset_ratio=0.05)
        runner, images = trainer(max_epochs=1), images_of(size)
        runner.fit(module, DataLoader(images, batch_size=2))
        expected[name] = module(images + 0.1)
        assert expected[name][1].shape == (2, *size)
        assert expected[name][0].isfinite().all()
        torch.save(images + 0.1, tmp_path / f"{name}.pt")
        runner.save_checkpoint(tmp_path / f"{name}.ckpt")
    torch.save(list(FAMILIES), tmp_path / "names.pt")
    subprocess.run([sys.executable, "-c", LOADS, str(tmp_path)], check=True, timeout=600)
    found = torch.load(tmp_path / "found.pt")
    for name in FAMILIES:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def own_features(name, layer, size):
    """A layer as hooks see it, in the order of the image, of the network with the same random weights."""
    options = {"img_size": size} if "resnet" not in name else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(name, **options).eval()
    seen = {}
    network.get_submodule(layer).register_forward_hook(lambda module, args, output: seen.update(found=output))
    with torch.no_grad():
        network(images_of(size))
    return seen["found"], network


@pytest.mark.parametrize(
    ("name", "layer", "read", "side"),
    [
        ("vit_tiny_patch16_224", "blocks.3", "blocks.3", 16),
        ("vit_tiny_patch16_224", "last", "norm", 16),  # behind the final norm
        ("vit_small_patch14_reg4_dinov2", "blocks.-1", "norm", 14),
        ("swin_tiny_patch4_window7_224", "layers.1", "layers.1", 8),
        ("resnet10t", "layer2", "layer2", 8),
    ],
)
def test_layers_are_those_that_hooks_see(name, layer, read, side):
    size = (224, 224) if "swin" in name else (6 * side, 8 * side)
    h, w = size[0] // side, size[1] // side
    expected, network = own_features(name, read, size)
    if expected.ndim == 3:
        expected = expected[:, network.num_prefix_tokens :].unflatten(1, (h, w))
    elif "resnet" in name:
        expected = expected.permute(0, 2, 3, 1)
    found = PatchFeatures(f"timm/{name}", [layer], None, patch_size=1, image_size=size)
    torch.testing.assert_close(found(images_of(size)), expected, rtol=1e-4, atol=1e-5)


def test_hiera_is_in_the_order_of_the_image():
    """Its blocks hold their places in an order of their own."""
    found = PatchFeatures("timm/hiera_tiny_224", ["blocks.0"], None, patch_size=1, image_size=(224, 224))
    images = images_of((224, 224))
    other = images.clone()
    other[:, :, 144:148, 80:84] += 1.0
    changed = (found(images) - found(other)).abs().amax((0, 3)).nonzero()  # attention lies within units of 8 x 8 cells
    assert (changed // 8).unique(dim=0).tolist() == [[4, 2]]
    with pytest.raises(
        UserError, match=r"'blocks\.1' is not one that timm gives in the image's order; take blocks\.0, "
    ):
        PatchFeatures("timm/hiera_tiny_224", ["blocks.1"], None)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_from_a_file_are_resized_as_timm_does(tmp_path, suffix):
    name, size = "vit_tiny_patch16_224", (96, 128)
    torch.manual_seed(3)
    trained, path = timm.create_model(name), tmp_path / f"w.{suffix}"
    state = {key: value.contiguous() for key, value in trained.state_dict().items() if not key.startswith("head.")}
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    found = PatchFeatures(f"timm/{name}", ["last"], str(path), patch_size=1, image_size=size)
    trained.set_input_size(img_size=size)
    with torch.no_grad():
        (expected,) = trained.eval().forward_intermediates(images_of(size), 1, norm=True, intermediates_only=True)
    torch.testing.assert_close(found(images_of(size)), expected.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
    torch.save({"blocks.0.norm1.weight": torch.ones(192)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"weights do not fit timm/vit_tiny_patch16_224: Missing key.*cls_token"):
        PatchFeatures(f"timm/{name}", ["last"], str(tmp_path / "other.pth"))


def resized_by_authors(embedding, grid, offset=0.1):
    """Position embeddings ``(M, M, C)`` as DINOv2's code resizes them, float64: cubic convolution, a = -0.75."""

    def cubic(t):
        a, t = -0.75, abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    for axis, cells in enumerate(grid):
        side = embedding.shape[axis]
        matrix = np.zeros((cells, side))
        for i in range(cells):
            place = (i + 0.5) * side / (cells + offset) - 0.5
            for k in range(math.floor(place) - 1, math.floor(place) + 3):
                matrix[i, min(max(k, 0), side - 1)] += cubic(place - k)
        embedding = np.moveaxis(np.tensordot(matrix, embedding, (1, axis)), 0, axis)
    return embedding


DINOV2 = {"patch_size": 1, "position_embedding": "dinov2"}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_small_patch14_dinov2", (448, 672)),
        ("vit_small_patch14_dinov2", (518, 518)),
        ("vit_small_patch14_dinov2", (518, 112)),
        ("vit_small_patch14_reg4_dinov2", (448, 336)),
    ],
)
def test_position_embeddings_resized_as_dinov2s_authors_do(name, size, tmp_path):
    """Of a model without registers; with registers they do as timm does. Weights are those of the authors' file."""
    torch.manual_seed(0)
    network, grid = timm.create_model(name, depth=1).eval(), (size[0] // 14, size[1] // 14)
    nn.init.normal_(network.pos_embed, std=0.5)
    whole = timm.create_model(name)
    state = whole.state_dict() | network.state_dict()
    torch.save(state | {"mask_token": torch.zeros(1, 384)}, tmp_path / "w.pth")  # of which timm knows the authors' file
    found = PatchFeatures(f"timm/{name}", ["blocks.0"], str(tmp_path / "w.pth"), image_size=size, **DINOV2)
    extra = network.pos_embed.shape[1] - 37 * 37
    own = network.pos_embed.detach()[0, extra:].view(37, 37, -1)
    if grid != (37, 37) and extra:
        own = torch.from_numpy(resized_by_authors(own.double().numpy(), grid)).float()
    else:
        own = resample_abs_pos_embed(network.pos_embed.detach()[:, extra:], list(grid), num_prefix_tokens=0)[0]
    network.set_input_size(size)
    network.pos_embed.data[0, extra:] = own.reshape(-1, 384)
    with torch.no_grad():
        (expected,) = network.forward_intermediates(images_of(size), 1, norm=False, intermediates_only=True)
    torch.testing.assert_close(found(images_of(size)), expected.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    timms = PatchFeatures(f"timm/{name}", ["blocks.0"], str(tmp_path / "w.pth"), patch_size=1, image_size=size)
    alike = torch.allclose(timms(images_of(size)), found(images_of(size)), atol=1e-3)
    assert alike == (extra == 0 or grid == (37, 37))


def test_position_embeddings_are_part_of_the_identity(trainer, tmp_path):
    """A checkpoint knows how they were resized, refuses the other way, and one from before has timm's."""
    options = {"backbone": "timm/vit_small_patch14_dinov2", "layers": ["blocks.0"], "weights": None, "resize": None}
    options |= {"crop": (112, 126), "patch_size": 1, "coreset_ratio": 0.2, "save_backbone": True}
    for rule in ("dinov2", "timm"):
        module, runner = PatchCore(**options, patches={"position_embedding": rule}), trainer(max_epochs=1)
        runner.fit(module, DataLoader(images_of((112, 126)), batch_size=2))
        path = tmp_path / f"{rule}.ckpt"
        runner.save_checkpoint(path)
        copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module.model)), PatchCore.load_from_checkpoint(path)
        images = images_of((112, 126)) + 0.1
        for other in copies:
            torch.testing.assert_close(other(images), module(images))
        other_rule = {"position_embedding": "timm" if rule == "dinov2" else "dinov2"}
        with pytest.raises(UserError, match="position_embedding"):
            PatchCore.load_from_checkpoint(path, patches=other_rule)
    file = torch.load(path, weights_only=True)
    del file["patchcore"]["identity"]["position_embedding"], file["hyper_parameters"]["patches"]["position_embedding"]
    torch.save(file, tmp_path / "older.ckpt")
    torch.testing.assert_close(PatchCore.load_from_checkpoint(tmp_path / "older.ckpt")(images), module(images))


@pytest.mark.parametrize("name", ["timm/resnet10t", "timm/eva02_tiny_patch14_224", "resnet18"])
def test_position_embeddings_of_another_kind(name):
    with pytest.raises(UserError, match=f"position_embedding .*{name}; set it to timm"):
        PatchFeatures(name, ["last"], None, **DINOV2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "timm/vit_tiny_patch16_242"}, "'timm/vit_tiny_patch16_242' is unknown; did you mean 'timm/vit_t"),
        ({"weights": "IMAGENET1K_V2"}, "'IMAGENET1K_V2' are unknown for timm/vit_tiny_patch16_224; give pretrained"),
        ({"layers": ["blocks.-13"]}, r"'blocks.-13' is not in timm/vit_tiny_patch16_224; .*Candidates: .*blocks\.0"),
        ({"layers": ["blocks.11", "last"]}, "list of different layers"),
        ({"image_size": (100, 250)}, "fails on images of 100x250 .*multiples of 16, such as 96x240 or 112x256"),
    ],
)
def test_bad_options(options, message):
    given = {"backbone": "timm/vit_tiny_patch16_224", "layers": ["last"], "weights": None} | options
    with pytest.raises(UserError, match=message):
        PatchFeatures(**given)


def test_network_of_one_size_names_it():
    with pytest.raises(UserError, match="takes images of 224x224 pixels only: set resize and crop to that size"):
        PatchFeatures(timm.create_model("vit_tiny_patch16_224"), ["blocks.1"], None, image_size=(256, 256))


def test_weights_that_cannot_be_had(monkeypatch):
    make = timm.create_model

    def refuse(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no network")
        return make(name, **options)

    monkeypatch.setattr(timm, "create_model", refuse)
    for weights in ("pretrained", "IMAGENET1K_V1"):
        with pytest.raises(
            UserError, match=r"cannot be had \(no network\); fetch https://huggingface.co/timm/resnet10t"
        ):
            PatchFeatures("timm/resnet10t.c3_in1k", ["layer1"], weights)


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as huggingface.co does for files of models."""

    files: ClassVar = {}

    def do_GET(self):
        content = self.files.get(self.path.partition("/resolve/main/")[0].removeprefix("/timm/"))
        self.send_response(404 if content is None or "safetensors" not in self.path else 200)
        content = content or b""
        headers = {"ETag": hashlib.sha256(content).hexdigest(), "X-Repo-Commit": "0" * 40}
        for name, value in (headers | {"Content-Length": len(content)}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


FETCH = """
import sys, warnings
warnings.simplefilter("ignore")
from pl_patchcore import PatchFeatures, UserError
for name in sys.argv[1:]:
    try:
        print(PatchFeatures(f"timm/{name}", ["last"], "pretrained").weights_sha256)
    except UserError as error:
        print(error)
"""


def test_pretrained_weights_from_a_hub(tmp_path):
    """The right file, one of another network, a part of one, one with NaN, none; then from the cache, without a hub."""
    torch.manual_seed(1)
    state = {name: value.contiguous() for name, value in timm.create_model("test_vit").state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    right = (tmp_path / "w.safetensors").read_bytes()
    names = [f"test_{name}.r160_in1k" for name in ("vit", "resnet", "vit2", "efficientnet", "vit3")]
    spoilt = save({name: value / 0 for name, value in timm.create_model("test_vit2").state_dict().items()})
    Hub.files = dict(zip(names, (right, right, spoilt, right[:5000]), strict=False))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        options = {"check": True, "capture_output": True, "text": True, "timeout": 300}
        fetch = [sys.executable, "-c", FETCH]
        lines = subprocess.run([*fetch, *names], env=environment, **options).stdout.splitlines()
        server.shutdown()
    own = PatchFeatures("timm/test_vit", ["last"], str(tmp_path / "w.safetensors")).weights_sha256
    assert lines[0] == own
    for line, name, fault in zip(
        lines[1:],
        names[1:],
        ("do not fit it (Missing key", "hold NaN", "cannot be had (Error", "cannot be had ("),
        strict=True,
    ):
        assert line.startswith(f"weights of timm/{name} {fault}")
        assert f"fetch https://huggingface.co/timm/{name}/resolve/main/model.safetensors on a machine" in line
    environment["HF_HUB_OFFLINE"] = "1"
    lines = subprocess.run([*fetch, names[0], names[-1]], env=environment, **options).stdout.splitlines()
    assert lines[0] == own
    assert f"weights of timm/{names[-1]} cannot be had (" in lines[1]


def vit():
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTModel(ViTConfig(**options, image_size=64, patch_size=8)), (64, 64)


def dinov2():
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Dinov2Model(Dinov2Config(**options, image_size=112, patch_size=14)), (112, 168)


def resnet():
    options = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    return ResNetModel(ResNetConfig(**options)), (64, 96)


@pytest.mark.parametrize("make", [vit, dinov2, resnet])
def test_modules_of_transformers_give_their_hidden_states(trainer, make):
    network, size = make()
    images = images_of(size)
    with torch.no_grad():
        expected = network.eval()(images).last_hidden_state
    if expected.ndim == 3:
        side = 8 if make is vit else 14
        expected = expected[:, 1:].unflatten(1, (size[0] // side, size[1] // side))
    else:
        expected = expected.permute(0, 2, 3, 1)
    features = PatchFeatures(network, ["last"], None, patch_size=1, image_size=size)
    torch.testing.assert_close(features(images), expected, rtol=1e-4, atol=1e-5)
    if make is resnet:
        for layer in ("encoder[0]", "encoder[last_hidden_state]"):
            chosen = PatchFeatures(network, [layer], None, patch_size=1, image_size=size)
            torch.testing.assert_close(chosen(images), expected, rtol=1e-4, atol=1e-5)
    module = PatchCore(network, ["last"], None, resize=None, crop=size)
    runner = trainer(max_epochs=1)
    runner.fit(module, DataLoader(images, batch_size=2))
    loaded = PatchCore.load_from_checkpoint(runner.checkpoint_callback.best_model_path, backbone=network)
    torch.testing.assert_close(loaded(images), module(images))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {}),
        ("vit_tiny_patch16_224", {}),
        ("pvt_v2_b0", {}),
        ("vit_tiny_patch16_224", {"layers": ["blocks.1.mlp"]}),  # timm gives no such layer, nor can it be traced: hooks
        ("eva02_tiny_patch14_224", {"layers": ["blocks.1.mlp"]}),
        ("vit_small_patch14_dinov2", {"layers": ["blocks.0"], "image_size": (112, 126), **DINOV2}),
    ],
)
def test_exports_with_a_dynamic_batch(name, options):
    layers, size = FAMILIES[name]
    options = {"layers": layers, "image_size": size} | options
    features, size = PatchFeatures(f"timm/{name}", weights=None, **options), options["image_size"]
    program = torch.export.export(features, (images_of(size),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    images = torch.rand(3, 3, *size)
    torch.testing.assert_close(program.module()(images), features(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "tile", "options"),
    [
        ("vit_tiny_patch16_224", (64, 96), {}),
        ("vit_small_patch14_dinov2", (56, 84), DINOV2),
        ("swin_tiny_patch4_window7_224", (112, 112), {}),
    ],
)
def test_tiles(name, tile, options):
    """Patches at the outer corner of an image are those of its first tile."""
    layers = ["layers.0" if "swin" in name else "blocks.0"]
    options = {"patch_size": 1} | options
    tiled = PatchFeatures(f"timm/{name}", layers, None, tiles=TileOptions(tile, 0), **options)
    alone = PatchFeatures(f"timm/{name}", layers, None, image_size=tile, **options)
    images = images_of((2 * tile[0], 2 * tile[1]))
    found, expected = tiled(images), alone(images[:, :, -tile[0] :, : tile[1]])
    h, w = expected.shape[1:3]
    assert found.shape == (2, 2 * h, 2 * w, expected.shape[3])
    torch.testing.assert_close(found[:, -h:, :w], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"fails on images of 50x50 .*or tile, to multiples of|make both multiples of"):
        PatchFeatures(f"timm/{name}", layers, None, tiles=TileOptions(50), **options)(images)


def test_ensemble_with_torchvisions(trainer, tmp_path):
    """Members are what they are alone; update, copies, and a file that brings the weights."""
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "w.pth")
    of_timm = {"backbone": "timm/resnet10t", "layers": ["layer2"], "weights": str(tmp_path / "w.pth")}
    members = [{"backbone": "timm/vit_tiny_patch16_224", "layers": ["blocks.0"], "patch_size": 1}, of_timm, {}]
    shared = {"backbone": "resnet18", "layers": ["layer1"], "weights": None, "resize": 64, "crop": None}
    shared |= {"coreset_ratio": 0.1, "save_backbone": True}
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ensemble = PatchCore(**shared, ensemble={"members": members})
    trainer(max_epochs=1).fit(ensemble, DataLoader(images, batch_size=2))
    for member, own in zip(ensemble.model.members, members, strict=True):
        alone = PatchCore(**(shared | own))
        trainer(max_epochs=1).fit(alone, DataLoader(images, batch_size=2))
        assert torch.equal(member.memory_bank.features, alone.memory_bank.features)
    ensemble.update(trainer(max_epochs=1), DataLoader(images + 0.1, batch_size=2))
    ensemble.save(tmp_path / "model.ckpt")
    (tmp_path / "w.pth").unlink()
    loaded = PatchCore.load_from_checkpoint(tmp_path / "model.ckpt")
    for other in (loaded, copy.deepcopy(ensemble)):
        torch.testing.assert_close(other(images + 0.2), ensemble(images + 0.2))
    assert loaded.hparams["ensemble"] == ensemble.hparams["ensemble"]


def test_by_command(tmp_path):
    (tmp_path / "timm.yaml").write_text("""
data: {class_path: SyntheticDataModule, init_args: {image_size: 64, train_images: 3, test_nominal: 2,
  test_per_defect: 1, num_workers: 0}}
trainer: {accelerator: cpu, logger: false, enable_progress_bar: false, enable_model_summary: false}
report: {pictures: 0}
""")
    command = [sys.executable, "-m", "pl_patchcore"]
    words = ["--model.backbone=timm/vit_tiny_patch16_224", "--model.weights=null", "--model.layers=[blocks.-1]"]
    small = ["--model.resize=64", "--model.crop=null", "--model.coreset_size=10"]
    run = [*command, "run", "--config=timm.yaml", *words, *small, "--trainer.default_root_dir=out"]
    subprocess.run(run, check=True, cwd=tmp_path, timeout=300, capture_output=True)
    (path,) = (tmp_path / "out").rglob("*.ckpt")
    loaded = PatchCore.load_from_checkpoint(path)
    assert loaded.hparams["backbone"] == "timm/vit_tiny_patch16_224"
    assert loaded.model.patch_features.layers == ["blocks.11"]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.default_root_dir=two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([*run, *two], check=True, cwd=tmp_path, timeout=300, capture_output=True, env=environment)
    (path,) = (tmp_path / "two").rglob("*.ckpt")
    bank = PatchCore.load_from_checkpoint(path).memory_bank
    torch.testing.assert_close(bank.features, loaded.memory_bank.features)
    refused = subprocess.run([*run, "--model.resize=70"], cwd=tmp_path, timeout=300, capture_output=True, text=True)
    assert "fails on images of 70x70 pixels" in refused.stderr
    assert refused.stderr.count("multiples of 16, such as 64x64 or 80x80") == 1
    assert "Traceback" not in refused.stderr
