"""Files that a stranger may send, changed at random: a clear line, or the right answer. ``--fuzz N`` tries more."""

import copy
import io
import pickle
import random
import zipfile

import lightning as L
import numpy as np
import pytest
import torch
from networks import TinyBackbone
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from pl_patchcore import FolderDataModule, PatchCore, UserError
from pl_patchcore.preprocessing import check_image, read_image, read_mask

STRANGE = [
    None, True, -1, 0, 2**40, 10**400, float("nan"), float("inf"), "", "x", "a\nb", [], {}, [[]], {"a": 1}, {1: 2},
    ("layer1",), ["1", "1"], b"bytes", {"class_path": "os.system", "init_args": {"command": "true"}},
    torch.zeros(0), torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.tensor(torch.nan),
    torch.zeros(1).to("meta"), torch.eye(2).to_sparse(), torch.zeros(1).expand(10**9), torch.full((4, 20), 1e30),
    torch.zeros((), dtype=torch.bool),
]  # fmt: skip


@pytest.fixture
def draws(request):
    """Seeds of the changes to try."""
    return range(request.config.getoption("--fuzz"))


KINDS = {
    "plain": {},
    "ensemble": {"ensemble": {"members": [{"layers": ["fine"]}, {"num_neighbors": 2, "patches": {"stride": 2}}]}},
    "with its backbone": {"save_backbone": True},
    "index of faiss": {"search": "HNSW8"},
}


@pytest.fixture(scope="module", params=KINDS)
def fitted(tmp_path_factory, request):
    options = {"resize": 16, "crop": None, "calibration_share": 0.3, "coreset_ratio": 0.2} | KINDS[request.param]
    model = PatchCore(TinyBackbone(), ["fine", "coarse"], **options)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    trainer.fit(model, DataLoader(images, 4))
    path = tmp_path_factory.mktemp("fuzz") / "good.ckpt"
    trainer.save_checkpoint(path)
    return path, images, model(images)


def answer(path, fitted):
    """What is wrong about the answer to a strange checkpoint; None where it is right."""
    _, images, (scores, maps) = fitted
    try:
        model = PatchCore.load_from_checkpoint(path, backbone=TinyBackbone())
        found = model(images)
        _ = model.image_threshold, model.pixel_threshold
    except UserError as error:
        return None if "\n" not in str(error).strip() else f"several lines: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if torch.equal(found[0], scores) and torch.equal(found[1], maps) else "other scores"


def changed(value, draw):
    """A copy with something at random replaced, left out, or added."""
    value = copy.deepcopy(value)
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        inside = place[key]
        if isinstance(inside, dict | list) and inside and draw.random() < 0.8:
            place = inside
            continue
        kind = draw.random()
        if kind < 0.2:
            del place[key]
        elif kind < 0.3 and isinstance(place, dict):
            place[draw.choice(["x", 5, None, "_instantiator", "_class_path"])] = draw.choice(STRANGE)
        elif kind < 0.5 and isinstance(inside, torch.Tensor) and inside.numel():
            place[key] = draw.choice([
                inside.double(), inside.flatten(), inside[None], inside.reshape(-1)[:-1].clone(), inside.to("meta"),
                torch.full_like(inside, torch.inf if inside.is_floating_point() else 97),
            ])  # fmt: skip
        else:
            place[key] = draw.choice(STRANGE)
        return value


# scores may be others where a setting of the scoring itself is changed to another one that is valid
SCORING = {"num_neighbors", "distance", "reweighting_neighbors", "sigma", "search"}


def test_changed_checkpoints(fitted, draws, tmp_path):
    good, path, wrong = torch.load(fitted[0], weights_only=True), tmp_path / "strange.ckpt", {}
    for seed in draws:
        strange = changed(good, random.Random(seed))
        settings = strange.get("hyper_parameters") if isinstance(strange, dict) else None
        torch.save(strange, path)
        what = answer(path, fitted)
        if what == "other scores" and any(settings.get(n) != good["hyper_parameters"][n] for n in SCORING):
            what = None
        if what is not None:
            wrong[seed] = what
    assert not wrong, "\n".join(f"seed {seed}: {what}" for seed, what in wrong.items())


def test_damaged_checkpoints(fitted, draws, tmp_path):
    good, path, wrong = fitted[0].read_bytes(), tmp_path / "strange.ckpt", {}
    for seed in draws:
        draw, raw = random.Random(seed), bytearray(good)
        place = draw.randrange(len(raw))
        if seed % 3 == 0:
            raw[place] ^= 1 << draw.randrange(8)
        elif seed % 3 == 1:
            raw[place : place + draw.randrange(1, 4000)] = draw.randbytes(draw.randrange(1, 4000))
        else:
            del raw[place:]
        path.write_bytes(raw)
        if (what := answer(path, fitted)) is not None:
            wrong[seed] = what
    assert not wrong, "\n".join(f"seed {seed}: {what}" for seed, what in wrong.items())


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_pickles_of_unbounded_work_are_refused(fitted, tmp_path, kind):
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(fitted[0]) as good, zipfile.ZipFile(path, "w", kind) as bomb:
        for entry in good.infolist():
            payload = b"\x80\x02" + b"(" * 20_000_000 + b"." if entry.filename.endswith(".pkl") else good.read(entry)
            bomb.writestr(entry.filename, payload)
    with pytest.raises(UserError, match="no checkpoint of PatchCore, or is damaged"):
        PatchCore.load_from_checkpoint(path, backbone=TinyBackbone())


def test_pickles_run_nothing(fitted, tmp_path):
    class Payload:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    for place in ("hyper_parameters", "patchcore", "state_dict", "callbacks"):
        checkpoint = torch.load(fitted[0], weights_only=True)
        checkpoint.setdefault(place, {})["x"] = Payload()
        torch.save(checkpoint, tmp_path / "x.ckpt", pickle_module=pickle)
        with pytest.raises(UserError):
            PatchCore.load_from_checkpoint(tmp_path / "x.ckpt", backbone=TinyBackbone())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_changed_weights(draws, tmp_path, suffix):
    good, path, wrong = dict(TinyBackbone().state_dict()), tmp_path / f"strange{suffix}", {}
    for seed in draws:
        draw = random.Random(seed)
        if suffix == ".safetensors" or seed % 2:
            (save_file if suffix == ".safetensors" else torch.save)(good, path)
            raw = bytearray(path.read_bytes())
            header = draw.randrange(1200) if suffix == ".safetensors" else draw.randrange(len(raw))
            raw[header : header + draw.randrange(3)] = draw.randbytes(draw.randrange(1, 3))
            path.write_bytes(raw)
        else:
            torch.save(changed(good, draw), path)
        try:
            PatchCore(TinyBackbone(), ["fine"], str(path), resize=16, crop=None)
        except UserError as error:
            if "\n" in str(error) or path.name not in str(error):
                wrong[seed] = f"says {error}"
        except Exception as error:
            wrong[seed] = f"{type(error).__name__}: {error}"
    assert not wrong, "\n".join(f"seed {seed}: {what}" for seed, what in wrong.items())


def test_damage_is_noticed_by_a_trainer_too(fitted, tmp_path):
    raw = bytearray(fitted[0].read_bytes())
    state = torch.load(fitted[0], weights_only=True)["state_dict"]
    bank = next(value for name, value in state.items() if name.endswith("memory_bank.features"))
    raw[raw.index(bank.numpy().tobytes()) + 10] ^= 1
    (tmp_path / "x.ckpt").write_bytes(raw)
    model = PatchCore(TinyBackbone(), ["fine", "coarse"], resize=16, crop=None)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(UserError, match="is damaged or cut short"):
        trainer.predict(model, DataLoader(fitted[1]), ckpt_path=tmp_path / "x.ckpt")


GREY = np.random.default_rng(0).integers(0, 256, (20, 30)).astype(np.uint8)
IMAGES = {
    "png": ("PNG", GREY, {}), "deep": ("PNG", GREY * np.uint16(200), {}), "rgba": ("PNG", np.dstack([GREY] * 4), {}),
    "jpeg": ("JPEG", GREY, {}), "tiff": ("TIFF", GREY, {}), "lzw": ("TIFF", GREY, {"compression": "tiff_lzw"}),
    "int32": ("TIFF", GREY.astype(np.int32), {}), "float": ("TIFF", GREY.astype(np.float32), {}),
    "bmp": ("BMP", GREY, {}), "webp": ("WEBP", GREY, {}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged tags
@pytest.mark.parametrize("kind", IMAGES)
def test_damaged_images(kind, draws, tmp_path):
    whole, path = io.BytesIO(), tmp_path / "image.png"
    form, pixels, options = IMAGES[kind]
    Image.fromarray(pixels).save(whole, form, **options)
    for draw in draws:
        rng = random.Random(draw)
        data = bytearray(whole.getvalue())
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data) if rng.random() < 0.5 else 60)] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data)) if rng.random() < 0.3 else None])
        for read in (read_image, read_mask, check_image):
            try:
                read(path)
            except UserError as error:
                assert str(path) in str(error)  # noqa: PT017 - it may well be read
                assert "\n" not in str(error)  # noqa: PT017


def test_damaged_manifests(draws, tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    lines = ["path,label,split,mask", "a.png,nominal,train,", "b.png,anomalous,test,m.png", "c.png,0,,"]
    text = "\n".join(lines).encode()
    for draw in draws:
        rng = random.Random(draw)
        data = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.choice([0, 10, 13, 34, 44, 59, 255, rng.randrange(128)])
        (tmp_path / "list.csv").write_bytes(data)
        try:
            FolderDataModule(manifest=tmp_path / "list.csv", num_workers=0).prepare_data()
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 - it may well be read
