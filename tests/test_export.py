"""What an export needs no other package for: its geometry, what it refuses, its command line."""

import sys

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from pl_patchcore import PatchCore, Preprocessing, UserError
from pl_patchcore.anomaly_map import anomaly_map, to_original
from pl_patchcore.cli import main
from pl_patchcore.export import export
from pl_patchcore.export.geometry import Frame, back_matrix, map_matrix

SIDE = st.integers(1, 300)
OPTIONS = st.one_of(
    st.fixed_dictionaries({"resize": st.tuples(SIDE, SIDE)}),
    st.fixed_dictionaries({"resize": SIDE, "resize_mode": st.just("shorter_side")}),
    st.just({"resize": None}),
)


@hypothesis.given(
    options=OPTIONS, height=SIDE, width=SIDE, cropped=st.booleans(), share=st.floats(0.1, 1), step=st.integers(1, 9)
)
def test_geometry_is_that_of_the_preprocessing(options, height, width, cropped, share, step):
    most = (height, width) if options["resize"] is None else np.broadcast_to(options["resize"], 2)
    crop = tuple(max(1, int(share * side)) for side in most) if cropped else None
    hypothesis.assume(cropped or "resize_mode" not in options)
    step = min(step, *(crop or most))
    transform = Preprocessing(**options, crop=crop, resize_by="tensors", crop_multiple=int(step))
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    sample = transform.apply(Image.fromarray(levels))
    found, axes = Frame(transform)(torch.from_numpy(levels)[None])
    torch.testing.assert_close(found[0] / 255, transform.denormalise(sample["image"]), rtol=0, atol=1e-4)
    (down, rows), (across, columns) = (back_matrix(axis) for axis in axes)
    heat = torch.rand(found.shape[2:])
    box = transform.geometry(height, width).box  # of which `crop_box` has the float32
    back = torch.where(rows[:, None] & columns, down @ heat @ across.T, torch.nan)
    torch.testing.assert_close(back, to_original(heat, (height, width), box), rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("size", "sigma"), [((40, 64), 4.0), ((33, 40), 0.0), ((5, 7), 8.0)])
def test_matrices_are_upsampling_and_gaussian(size, sigma):
    distances = torch.rand(2, 5, 8)
    found = map_matrix(size[0], 5, sigma) @ distances @ map_matrix(size[1], 8, sigma).T
    torch.testing.assert_close(found, anomaly_map(distances, size, sigma), rtol=1e-4, atol=1e-5)


def made(tiny, **options):
    """A model with a memory bank."""
    module = PatchCore(tiny, ["fine"], None, **({"resize": (32, 48), "crop": None} | options))
    for member in module.model.members:
        member.memory_bank.fill(torch.rand(9, member.patch_features.dimension))
    return module


SIZE = (90, 140)
REFUSED = {
    "tile": ({"tile": 32, "resize": None}, "tile cuts images by their size; give image_size"),
    "tiles": (
        {"tile": 16, "resize": None},
        "tiles call the backbone 187 times, and a graph 16; raise tile_batch, or tile",
        {"image_size": SIZE},
    ),
    "roi": ({"roi": [0, 0, 20, 20], "resize": None}, "roi is in pixels of images of one size; give image_size"),
    "roi, pillow": (
        {"roi": [0, 0, 20, 20]},
        "roi needs the resize in the file; give resize_in_file",
        {"image_size": SIZE},
    ),
    "masks by name": ({"ignore": "."}, "ignore is a folder of masks", {"resize_in_file": True}),
    "size, pillow": ({}, "image_size is of images before their resize", {"image_size": SIZE}),
    "foreground": ({"foreground": "brightness"}, "foreground brightness looks"),
    "inference": ({"inference": "bf16"}, "inference is bf16; load it with inference=float32"),
    "faiss": ({"search": "HNSW32"}, "search HNSW32 is faiss's"),
    "longer_side": (
        {"resize_mode": "longer_side", "images": {"resize_by": "tensors"}},
        "longer_side fills images up, and what is filled does not count; give image_size",
    ),
    "longer_side, pillow": ({"resize_mode": "longer_side"}, "longer_side needs the resize in the file"),
    "open": (
        {"resize": 32, "resize_mode": "shorter_side", "images": {"resize_by": "tensors"}},
        "shorter_side without a crop",
    ),
    "test_range": ({"ensemble": {"members": [{}], "combine": "test_range"}}, "test_range needs all images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_cannot_repeat_is_refused(name, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("pl_patchcore.export.onnx_file.require", lambda *names: {})
    options, reason, *of_file = REFUSED[name]
    Image.new("RGB", SIZE[::-1]).save(picture := tmp_path / "picture.png")
    with pytest.raises(UserError, match=reason):
        made(tiny, **options).export(tmp_path / "m.onnx", data=picture, **dict(*of_file))
    assert list(tmp_path.iterdir()) == [picture]


def test_wrong_use_is_refused(tiny, tmp_path, monkeypatch):
    module = PatchCore(tiny, ["fine"], None)
    with pytest.raises(UserError, match="bank_dtype must be float32, float16, int8, got 'int4'"):
        module.export(tmp_path / "m.onnx", bank_dtype="int4")
    with pytest.raises(UserError, match="image_size must be height and width"):
        module.export(tmp_path / "m.onnx", image_size=(3, 0))
    with pytest.raises(UserError, match="max_score_change must be at least 0"):
        module.export(tmp_path / "m.onnx", max_score_change=-1)
    with pytest.raises(UserError, match="onnx runs in float32 on the CPU, not in bf16; openvino does"):
        module.export(tmp_path / "m.onnx", precision="bf16")
    Image.new("RGB", (30, 20)).save(image := tmp_path / "image.png")
    with pytest.raises(UserError, match=r"image\.png: has 20x30 pixels, and image_size is 9x8"):
        module.export(tmp_path / "m.onnx", data=image, image_size=(9, 8))
    with pytest.raises(UserError, match="bank_dtype changes scores; give images of the real scene"):
        module.export(tmp_path / "m.onnx", bank_dtype="int8")
    with pytest.raises(UserError, match="format must be"):
        export(module, tmp_path / "m.onnx", "onyx")
    with pytest.raises(UserError, match=r"ends with \.onnx"):
        export(module, tmp_path / "m.ckpt")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"needs onnx: pip install 'pl-patchcore\[onnx\]'"):
        export(module, tmp_path / "m.onnx")
    monkeypatch.setattr("pl_patchcore.export.onnx_file.require", lambda *names: {})
    with pytest.raises(UserError, match="memory bank is empty"):
        export(module, tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"backbone is torch\.float16"):
        export(made(tiny).half(), tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "required: --ckpt_path"),
        (["--ckpt_path", "a.ckpt", "--format", "tf"], "invalid choice: 'tf'"),
        (["--ckpt_path", "a.ckpt", "--outputs", "b"], "unrecognized arguments: --outputs b"),
        (["--ckpt_path", "a.ckpt"], "a.ckpt: no such checkpoint"),
    ],
)
def test_wrong_options_are_one_line(words, error, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", *words])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert error in told
    assert len(told.splitlines()) == 1


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", "--help"])
    assert stop.value.code == 0
    assert "--ckpt_path" in capsys.readouterr().out
