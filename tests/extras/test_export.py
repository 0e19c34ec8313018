"""Exported files: their answers are the model's, run without torch; one that differs is not kept."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import timm
import torch
from networks import TinyBackbone
from pages import code
from PIL import Image
from test_model import fit

from pl_patchcore import PatchCore, UserError
from pl_patchcore.cli import main
from pl_patchcore.export import export, onnx_file
from pl_patchcore.export import parity as export_parity

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporter itself
TENSORS = {"resize_by": "tensors"}
MODELS = {
    "ready": {"resize": (40, 56), "crop": (32, 48)},
    "squash": {"resize": (40, 56), "crop": (32, 48), "images": TENSORS},
    "shorter_side": {
        "resize": 56, "crop": (32, 48), "resize_mode": "shorter_side", "images": TENSORS | {"interpolation": "bicubic"},
    },
    "any size": {"resize": None, "crop": None, "sigma": 2.0, "images": {"crop_multiple": 8}},
    "crop": {"resize": None, "crop": (32, 48)},
    "official": {"num_neighbors": 3, "distance": "squared", "bank_dtype": "float16"},
    "top mean": {
        "image_score": "top_mean", "top_share": 0.1, "normalize_features": True, "distance": "half_squared",
    },
    "ensemble": {"ensemble": {"members": [{"layers": ["fine"]}, {"layers": ["coarse"], "num_neighbors": 2}]}},
    "all": {"coreset_method": "none"},
    "random": {"coreset_method": "random", "coreset_size": 1, "reweighting_neighbors": 1},
    "position": {"position_radius": 1, "num_neighbors": 2},
}  # fmt: skip
SIZES = ((60, 60), (33, 300), (300, 48), (257, 128))


def made(network=None, shape=(8, 3, 32, 48), calibrated=True, **options):
    """A fitted model, and thresholds."""
    layers = options.pop("layers", ["fine", "coarse"])
    module = PatchCore(
        network or TinyBackbone(), layers, None, **({"resize": (32, 48), "crop": None, "coreset_ratio": 0.2} | options)
    )
    fit(module.model, torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    module.model.calibration.clear()
    if calibrated:
        scores = module(torch.rand(40, *shape[1:], generator=torch.Generator().manual_seed(1)))[0]
        module.model.calibration.fill(scores, scores)
    return module


def opened(path):
    """What gives the answers of a file to a list of images."""
    session = onnxruntime.InferenceSession(path)
    names = [each.name for each in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {"image": np.stack(images)}), strict=True))


def pictures(size, number):
    """Structure of several scales, of levels 0 to 255."""
    rng = np.random.default_rng(sum(size))
    small = rng.integers(0, 256, (number, 9, 7, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(each).resize(size[::-1])) for each in small]


def ready(image, transform):
    """An image resized and cropped by Pillow, as someone without this package does it."""
    (height, width), (rows, columns) = transform.resize, transform.crop or transform.resize
    top, left = (height - rows) // 2, (width - columns) // 2
    small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    return small[top : top + rows, left : left + columns]


SIZE = (90, 140)  # of the images that these take
FIXED = {
    "roi": {"roi": [[20, 10, 120, 80]], "ignore": [[60, 40], [90, 40], [75, 70]], "images": TENSORS},
    "roi, top mean": {"roi": [10, 10, 70, 85], "image_score": "top_mean", "resize": (40, 56), "crop": (32, 48),
                      "images": TENSORS},
    "roi, all patches": {"roi": [10, 10, 70, 85], "image_score": "top_mean", "top_share_of": "all", "images": TENSORS},
    "roi, no resize": {"resize": None, "roi": [10, 10, 70, 85]},
    "longer_side": {"resize": 56, "resize_mode": "longer_side", "images": TENSORS},
    "longer_side, crop": {"resize": 56, "crop": (48, 40), "resize_mode": "longer_side", "images": TENSORS},
    "shorter_side": {"resize": 40, "resize_mode": "shorter_side", "images": TENSORS | {"crop_multiple": 8}},
    "tiles": {"resize": None, "tile": (48, 64), "tile_overlap": 16, "tile_batch": 2},
    "tiles, roi": {"resize": None, "tile": 48, "roi": [[20, 10, 120, 80]], "image_score": "top_mean", "top_share": 0.1},
    "tiles of an ensemble": {
        "resize": (64, 96), "tile": 48, "tile_overlap": 32, "images": TENSORS, "num_neighbors": 2,
        "ensemble": {"members": [{"layers": ["fine"]}, {"layers": ["coarse"]}]},
    },
    "roi, ensemble": {"roi": [20, 10, 120, 80], "images": TENSORS,
                      "ensemble": {"members": [{"layers": ["fine"]}, {"layers": ["coarse"]}]}},
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_images_of_one_size(name, tmp_path):
    module = made(**FIXED[name])
    for member in module.model.members:
        member.input_size.zero_()
    told = module.export(tmp_path / "m.onnx", image_size=SIZE)
    assert told["size"] == list(SIZE)
    check(module, opened(tmp_path / "m.onnx"), [SIZE])


def test_maps_of_the_input(tmp_path):
    module = made(**MODELS["squash"])
    assert "network's input" in module.export(tmp_path / "m.onnx", map_at="input")["outputs"]["anomaly_map"]
    images = pictures((257, 128), 3)
    with torch.inference_mode():
        scores, maps = module(torch.stack([module.transform(image) for image in images]))
    found = opened(tmp_path / "m.onnx")(images)
    np.testing.assert_allclose(found["score"], scores, rtol=1e-5)
    np.testing.assert_allclose(found["anomaly_map"], maps, rtol=0, atol=1e-4 * float(maps.max()))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of images."""
    folder = tmp_path_factory.mktemp("scenes")
    for i, size in enumerate([(64, 64), (120, 90), (257, 128)]):
        Image.fromarray(pictures(size, 1)[0]).save(folder / f"{i}.png")
    return folder


CHANGES = {
    "resize_in_file": (MODELS["ready"], True),
    "bank_dtype": (MODELS["squash"], "int8"),
    "bank_dtype, ensemble": (MODELS["ensemble"], "float16"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_scores_is_measured(name, scenes, tmp_path):
    (options, value), option = CHANGES[name], name.partition(",")[0]
    module = made(**options)
    with pytest.raises(UserError, match=f"{option} changes scores; give images"):
        module.export(tmp_path / "m.onnx", **{option: value})
    with pytest.raises(UserError, match=r"max_score_change is 1e-09; the file is not kept"):
        module.export(tmp_path / "m.onnx", data=scenes, max_score_change=1e-9, **{option: value})
    assert not list(tmp_path.iterdir())
    told = module.export(tmp_path / "m.onnx", data=scenes, **{option: value})
    assert told["changed_by"] == [option]
    files = sorted(scenes.iterdir())
    levels = [np.asarray(Image.open(file)) for file in files]
    if not told["resize_in_file"]:
        levels = [np.asarray(Image.fromarray(each).resize((48, 32), Image.Resampling.BILINEAR)) for each in levels]
    run = opened(tmp_path / "m.onnx")
    scores = np.concatenate([run([each])["score"] for each in levels])
    changes = np.abs(scores / [each.score for each in module.inspect(files)] - 1)
    assert told["change"]["score_change_max"] == pytest.approx(changes.max(), rel=1e-3)
    assert told["change"]["score_change_median"] == pytest.approx(np.median(changes), rel=1e-3)
    assert 0 < changes.max() < 0.02


def test_thresholds_by_the_file_itself(scenes, tmp_path):
    module = made(**MODELS["squash"], false_alarm_rate=0.5)
    told = module.export(tmp_path / "m.onnx", data=scenes, calibration=scenes, bank_dtype="int8")
    run = opened(tmp_path / "m.onnx")
    found = [run([np.asarray(Image.open(file))]) for file in sorted(scenes.iterdir())]
    scores = np.sort([each["score"][0] for each in found])
    assert told["image_threshold"] == scores[1]  # of 3, with 2 of 4 allowed above
    assert told["pixel_threshold"] == np.sort([np.nanmax(each["anomaly_map"]) for each in found])[1]
    assert told["calibration_images"] == 3
    assert np.sort([each["p_value"][0] for each in found]).tolist() == [0.5, 0.75, 1.0]
    assert sum(each["anomalous"][0] for each in found) == 1
    assert module.image_threshold != told["image_threshold"]
    assert told["calibrated_by"] == "file"
    assert told["change"]["changed_verdicts"] <= 1  # by the file's threshold, which is the score of one of them


@pytest.mark.parametrize(("format", "ending"), [("onnx", "onnx"), ("openvino", "xml")])
@pytest.mark.parametrize(
    ("options", "size", "reason"),
    [(MODELS["crop"], (20, 20), r"crop \(32, 48\) is larger than an image of 20x20"),
     ({"resize": None, "roi": [10, 10, 40, 30]}, (64, 64), "has 64x64 pixels, and image_size is 32x48")],
)  # fmt: skip
def test_calibration_images_that_the_file_does_not_take(format, ending, options, size, reason, tmp_path):
    Image.fromarray(pictures(size, 1)[0]).save(image := tmp_path / "image.png")
    of_file = {"image_size": (32, 48)} if "roi" in options else {}
    with pytest.raises(UserError, match=rf"image\.png: {reason}"):
        made(**options).export(tmp_path / f"m.{ending}", format, calibration=image, **of_file)
    with pytest.raises(UserError, match="there is no image to calibrate with"):
        made(**options).export(tmp_path / f"m.{ending}", format, calibration=[], **of_file)
    assert list(tmp_path.iterdir()) == [image]


def test_calibration_of_a_model_of_one_size(tmp_path):
    module = made(resize=None, crop=None, calibrated=False)
    module.model.input_size = torch.tensor([32, 48])
    Image.fromarray(pictures((61, 67), 1)[0]).save(image := tmp_path / "image.png")
    with pytest.raises(UserError, match=r"image\.png: has 61x67 pixels, and this model takes 32x48"):
        module.export(tmp_path / "m.onnx", calibration=image)
    Image.fromarray(pictures((32, 48), 1)[0]).save(image)
    told = module.export(tmp_path / "m.onnx", calibration=image)
    assert list(told["outputs"]) == ["score", "anomalous", "p_value", "anomaly_map"]


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 16), ("int8", 8)])
def test_a_bank_of_fewer_bits(dtype, bits, scenes, tmp_path):
    module = made(coreset_method="none", resize=(64, 96), images=TENSORS)
    told = module.export(tmp_path / "m.onnx", data=scenes, bank_dtype=dtype)
    kept = {each.name: each for each in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert len(kept["members.0.rows.codes"].raw_data) * 8 == np.prod(module.bank_shape) * bits
    assert told["bank_dtype"] == dtype
    assert told["parity"]["score_difference"] < 1e-5  # from a model with such a bank


def test_parity_file(scenes, tmp_path):
    module = made(**MODELS["squash"])
    module.export(tmp_path / "m.onnx", data=scenes, parity_file=True)
    run, kept = opened(tmp_path / "m.onnx"), np.load(tmp_path / "m.onnx.npz")
    number = sum(name.startswith("image_") for name in kept)
    assert number == len(export_parity.SIDES) + export_parity.EXAMPLES
    for i in range(number):
        found = run([kept[f"image_{i}"]])
        for name in ("score", "anomalous", "anomaly_map"):
            np.testing.assert_allclose(found[name][0], kept[f"{name}_{i}"], rtol=1e-4)


def check(module, run, sizes=SIZES, numbers=(1, 2, 7)):
    """Compare a file with the model, on images that the export has not seen."""
    in_file = module.transform.resize is None or module.transform.resize_by == "tensors"
    for size in sizes:
        for number in numbers:
            images = pictures(size, number)
            if in_file:
                found, expected = run(images), module.inspect(images)
                scores, maps = ([getattr(each, of) for each in expected] for of in ("score", "anomaly_map"))
            else:
                found = run([ready(image, module.transform) for image in images])
                with torch.inference_mode():
                    scores, maps = module(torch.stack([module.transform(image) for image in images]))
            scores, maps = np.asarray(scores), np.asarray(maps)
            np.testing.assert_allclose(found["score"], scores, rtol=1e-5)
            np.testing.assert_allclose(found["anomaly_map"], maps, rtol=0, atol=1e-4 * np.nanmax(maps))
            assert ("anomalous" in found) == (module.image_threshold is not None)
            if "anomalous" in found:
                verdicts = module.model.calibration.verdicts(torch.from_numpy(scores))
                near = np.abs(scores / module.image_threshold - 1) < 1e-5
                assert ((found["anomalous"] == verdicts["anomalous"].numpy()) | near).all()
                np.testing.assert_allclose(found["p_value"], verdicts["p_value"], atol=1.01 / 41)


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_the_model(name, tmp_path):
    module = made(**MODELS[name])
    told = module.export(tmp_path / "m.onnx")
    assert told["parity"]["score_difference"] < 1e-5
    check(module, opened(tmp_path / "m.onnx"), ((64, 64), (40, 304), (304, 48)) if name == "any size" else SIZES)


def test_without_thresholds_there_is_no_verdict(tmp_path):
    module = made(calibrated=False)
    assert [*module.export(tmp_path / "m.onnx")["outputs"]] == ["score", "anomaly_map"]
    check(module, opened(tmp_path / "m.onnx"), numbers=(1,))
    module.image_threshold = 0.5
    assert [*module.export(tmp_path / "m.onnx")["outputs"]] == ["score", "anomalous", "anomaly_map"]


def test_transformer_of_timm(tmp_path):
    network = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2, img_size=(64, 96))
    module = made(network, (6, 3, 64, 96), layers=["blocks.0", "blocks.1"], resize=(64, 96), images=TENSORS)
    module.export(tmp_path / "m.onnx")
    check(module, opened(tmp_path / "m.onnx"))


class Windows(torch.nn.Module):
    """Attention within windows of 8 patches: five axes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.mixed = torch.nn.Conv2d(3, 24, 8, 8), torch.nn.Conv2d(24, 16, 1)

    def forward(self, images):
        patches = self.patches(images)  # (B, 24, h, w)
        found = patches.flatten(2).unflatten(2, (-1, 8)).unflatten(1, (3, 2, 4))  # (B, 3, heads, 4, windows, 8)
        query, key, value = found.permute(1, 0, 4, 2, 5, 3)  # (B, windows, heads, 8, 4) each
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)  # (B, 8, h w)
        return self.mixed(torch.cat([mixed.unflatten(2, patches.shape[2:]), patches[:, :16]], 1))


def test_attention_within_windows(tmp_path):
    module = made(Windows(), layers=["mixed"], images=TENSORS)
    module.export(tmp_path / "m.onnx")
    check(module, opened(tmp_path / "m.onnx"), numbers=(1, 2))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model, and its graph as a file."""
    module, path = made(), tmp_path_factory.mktemp("written") / "m.onnx"
    module.export(path)
    return module, path


def test_images_with_the_patches_of_the_bank(tmp_path):
    """Distances of 0 beside long patch features, which a float32 product does not tell."""
    module = made(calibrated=False)
    (image,) = pictures((32, 48), 1)  # of many different patches: of one alone, rounding may hit 0
    Image.fromarray(image).save(tmp_path / "own.png")
    own = module.model.patch_features(module.transform(tmp_path / "own.png")[None]).reshape(-1, 20)
    far = 30 * torch.rand(40, 20, generator=torch.Generator().manual_seed(0))
    module.memory_bank.fill(torch.cat([own, far]))
    assert not module.export(tmp_path / "m.onnx")["rows_looked_up"]
    told = module.export(tmp_path / "m.onnx", data=tmp_path)
    assert told["rows_looked_up"]
    assert np.nanmax(opened(tmp_path / "m.onnx")([image])["anomaly_map"]) < 1e-4


def move(tensor, by):
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(by), tensor.name))


SPOILT = {  # what is wrong: a change of the graph, given its constants by name
    "its score by": lambda model, constants: move(constants["members.0.rows.codes"], 1.01),
    "its map by": lambda model, constants: move(constants["members.0.down"], 1.01),
    "its p-value is": lambda model, constants: move(constants["verdict.scores"], 100.0),
    "its outputs are": lambda model, constants: model.graph.output.pop(1),
    "does not run": lambda model, constants: move(constants["members.0.down"], np.ones((2, 1, 1))),
}


@pytest.mark.parametrize("reason", SPOILT)
def test_a_file_that_differs_is_not_kept(reason, written, tmp_path, monkeypatch):
    module, path = written

    def spoilt(runtime, partial):
        model = onnx.load(path)
        SPOILT[reason](model, {each.name: each for each in model.graph.initializer})
        onnx.save(model, partial)

    monkeypatch.setattr(onnx_file, "write", spoilt)
    with pytest.raises(UserError, match=reason):
        module.export(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_the_bank_is_once_in_the_file(written):
    module, path = written
    shapes = [sorted(each.dims) for each in onnx.load(path).graph.initializer]
    assert shapes.count(sorted(module.bank_shape)) == 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint of a real network, exported by the command; images."""
    folder = tmp_path_factory.mktemp("exported")
    layers = ["features.6", "features.13"]
    module = made("mobilenet_v2", (6, 3, 64, 80), layers=layers, resize=(72, 96), crop=(64, 80))
    module.save(folder / "m.ckpt")
    (folder / "images" / "inner").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        Image.fromarray(pictures(size, 1)[0]).save(folder / "images" / "inner" / f"{number}.png")
    main(["export", "--ckpt_path", str(folder / "m.ckpt"), "--data", str(folder / "images")])
    return module, folder


def test_command(exported, tmp_path):
    module, folder = exported
    check(module, opened(folder / "m.onnx"), numbers=(1, 3))
    told = json.loads((folder / "m.onnx.json").read_text())
    inside = {each.key: each.value for each in onnx.load(folder / "m.onnx").metadata_props}
    assert {name: value if isinstance(value, str) else json.dumps(value) for name, value in told.items()} == inside
    assert told["parity"]["images"] == 4
    assert told["image_threshold"] == module.image_threshold
    assert told["model"] == module.model.identity
    assert "resized by Pillow's Image.resize with Resampling.BILINEAR to 72x96 pixels" in told["input"]
    options = ["--ckpt_path", str(folder / "m.ckpt"), "--output", str(tmp_path / "other.onnx")]
    main(["export", *options, "--model.image_threshold", "0.25", "--data", str(folder / "images" / "inner" / "0.png")])
    assert json.loads((tmp_path / "other.onnx.json").read_text())["image_threshold"] == 0.25


def test_consumer_of_the_page_runs_without_torch(exported):
    module, folder = exported
    files = sorted((folder / "images" / "inner").iterdir())
    banned = "import sys; sys.modules['torch'] = sys.modules['pl_patchcore'] = None\n"
    program = [sys.executable, "-c", banned + code("Without PyTorch"), folder / "m.onnx", *files]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    for line, expected in zip(done.stdout.splitlines(), module.inspect(files), strict=True):
        found = json.loads(line)
        assert found["score"] == pytest.approx(expected.score, rel=1e-4)
        assert found["anomalous"] == expected.anomalous
        assert found["p_value"] == pytest.approx(expected.p_value, abs=1.01 / 41)


@pytest.mark.parametrize("name", ["shorter_side", "official"])
def test_openvino(name, tmp_path):
    module = made(**MODELS[name])
    told = module.export(tmp_path / "m.xml", "openvino")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m.bin", "m.xml", "m.xml.json"]
    model = openvino.Core().read_model(tmp_path / "m.xml")
    assert json.loads(model.get_rt_info(["framework", "parity"]).astype(str)) == told["parity"]
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(images):
        found = compiled({"image": np.stack(images)})
        return {each: found[each] for each in told["outputs"]}

    check(module, run)


def test_bf16_is_measured(scenes, tmp_path):
    module = made(**MODELS["squash"])
    told = module.export(tmp_path / "m.xml", "openvino", scenes, precision="bf16")
    assert told["parity"]["score_difference"] < 1e-5  # of the same file in float32
    assert (told["precision"], told["changed_by"]) == ("bf16", ["precision"])
    assert told["change"]["score_change_max"] < 0.1


@pytest.mark.parametrize("name", ["squash", "ensemble"])
def test_torch(name, tmp_path):
    module = made(**MODELS[name])
    told = module.export(tmp_path / "m.pt2", "torch")
    inside = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=inside).module()
    assert json.loads(json.loads(inside["metadata.json"])["parity"]) == told["parity"]

    def run(images):
        return {name: value.detach().numpy() for name, value in program(torch.from_numpy(np.stack(images))).items()}

    check(module, run)


def test_a_missing_image_is_told_before_work(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.png: no such file"):
        export(made(), tmp_path / "m.onnx", data=[tmp_path / "nothing.png"])
    assert not list(tmp_path.iterdir())
