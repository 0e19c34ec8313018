"""Options in groups, and what became of former arguments."""

import copy
import dataclasses
import inspect

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pl_patchcore import PatchCore, UserError
from pl_patchcore.checkpoint import plain_settings
from pl_patchcore.foreign import is_plain
from pl_patchcore.options import (
    GROUPS,
    EnsembleOptions,
    ImageOptions,
    PatchOptions,
    StoreOptions,
    keeps_arguments,
    options_of,
    refuse_unknown,
)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (PatchOptions, {"stride": 0}, r"patches\.stride must be at least 1, got 0\."),
        (PatchOptions, {"layer_dim": 8}, r"patches\.layer_dim and patches\.feature_dim go together, got 8 and None"),
        (PatchOptions, {"layer_dim": 8, "feature_dim": 0}, r"patches\.feature_dim must be at least 1, got 0\."),
        (ImageOptions, {"interpolation": "cubic"}, r"images\.interpolation must be bilinear or bicubic, got 'cubic'"),
        (ImageOptions, {"mean": [0.5, 0.5]}, r"images\.mean must be a list of 3 \(a finite number each\)"),
        (ImageOptions, {"std": [1, 1, 0]}, r"images\.std must be three positive numbers, got \[1\.0, 1\.0, 0\.0\]\."),
        (StoreOptions, {"kind": "tape"}, r"store\.kind must be auto, ram or disk, got 'tape'\."),
        (StoreOptions, {"dtype": "int8"}, r"store\.dtype must be float32, float16 or bfloat16, got 'int8'\."),
        (StoreOptions, {"selection_memory": 0}, r"store\.selection_memory must be GiB above 0, got 0"),
        (EnsembleOptions, {"combine": "max"}, r"ensemble\.combine must be nominal or test_range, got 'max'\."),
        (EnsembleOptions, {"members": []}, r"ensemble\.members names no model"),
        (EnsembleOptions, {"members": ["resnet18"]}, r"ensemble\.members must be a list \(settings by name each\)"),
        (
            EnsembleOptions,
            {"members": [{"layer": ["a"]}]},
            "member of an ensemble has no argument 'layer'; .* 'layers'",
        ),
        (EnsembleOptions, {"members": [{"resize": 32}]}, "has no argument 'resize'"),
        (EnsembleOptions, {"members": [{"layer_dim": 8}]}, r"layer_dim is now patches\.layer_dim\."),
        (EnsembleOptions, {"members": [{"patches": {"stride": 0}}]}, r"patches\.stride must be at least 1"),
        (StoreOptions, {"knd": "ram"}, "store has no argument 'knd'; did you mean 'kind'?"),
    ],
)
def test_groups_check_themselves(kind, values, message):
    with pytest.raises(UserError, match=message):
        options_of(kind, values)


@pytest.mark.parametrize("kind", GROUPS.values())
def test_a_group_or_a_dict_of_it(kind):
    group = kind()
    assert options_of(kind, group) is group
    assert options_of(kind, dataclasses.asdict(group)) == group
    with pytest.raises(UserError, match=f"{kind.group} must be {kind.__name__} or a dict"):
        options_of(kind, 3)


def test_a_plain_string_for_the_store_names_its_kind():
    with pytest.raises(UserError, match=r"got 'disk'; store=\{'kind': \.\.\.\} sets store\.kind\."):
        options_of(StoreOptions, "disk")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("store_dir", r"^store_dir is now store\.folder\.$"),
        ("shard_bank", r"^shard_bank is gone: every process holds the whole memory bank\.$"),
        ("coreset_ration", r"^PatchCore has no argument 'coreset_ration'; did you mean 'coreset_ratio'\?$"),
    ],
)
def test_former_and_misspelt_arguments(name, message):
    with pytest.raises(UserError, match=message):
        PatchCore(**{name: 1})
    with pytest.raises(UserError, match=message):
        refuse_unknown([name], ["coreset_ratio", "store"])


def test_arguments_of_the_outermost_class_are_kept():
    class Base:
        @keeps_arguments
        def __init__(self, size=1):
            self.size = size

    class Sub(Base):
        @keeps_arguments
        def __init__(self, colour="red", **settings):
            super().__init__(**settings)
            self.colour = colour

    sub = copy.deepcopy(Sub(colour="blue", size=2))
    assert (sub.size, sub.colour, sub.arguments) == (2, "blue", {"colour": "blue", "size": 2})
    assert Base(3).arguments == {"size": 3}
    assert list(inspect.signature(Base).parameters) == ["size"]
    with pytest.raises(UserError, match="Base has no argument 'sise'; did you mean 'size'"):
        Base(sise=2)


class Declared(PatchCore):
    """Passes on what it does not know."""

    def __init__(self, *args, extra=3, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = extra


class Twice(Declared):
    def __init__(self, more=1, **kwargs):
        super().__init__(**kwargs)
        self.more = more


class ByPosition(PatchCore):
    def __init__(self, *args):
        super().__init__(*args)


SMALL = {"layers": ["fine"], "weights": None, "resize": 32, "crop": None}


@pytest.fixture
def noise_fit(trainer):
    def fit(model):
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        trainer(max_epochs=1, enable_checkpointing=False).fit(model, DataLoader(images, batch_size=2))
        return model

    return fit


def test_subclass_passes_arguments_on(tiny, noise_fit, tmp_path):
    model = noise_fit(Twice(more=2, extra=4, backbone=tiny, **SMALL))
    assert model.hparams == SMALL | {"more": 2, "extra": 4}
    assert model.left_out == ["backbone"]
    model.save(tmp_path / "model")
    for own in ({}, {"extra": 5, "num_neighbors": 2}):
        found = Twice.load_from_checkpoint(tmp_path / "model", backbone=tiny, **own)
        assert (found.more, found.extra) == (2, own.get("extra", 4))
        assert found.hparams == model.hparams | own
    with pytest.raises(UserError, match=r"^Twice has no argument 'extr'; did you mean 'extra'\?$"):
        Twice(extr=5)
    with pytest.raises(UserError, match=r"^Twice has no argument 'coreset_ration'; did you mean 'coreset_ratio'"):
        Twice.load_from_checkpoint(tmp_path / "model", backbone=tiny, coreset_ration=0.2)


def test_arguments_by_position_belong_to_the_next_constructor(tiny):
    model = Declared(tiny, ["fine"], None, resize=32, crop=None)
    assert model.hparams == SMALL | {"extra": 3}
    assert model.left_out == ["backbone"]
    with pytest.raises(TypeError, match="multiple values for argument 'layers'"):
        Declared(tiny, ["fine"], layers=["fine"])
    with pytest.raises(UserError, match=r"^ByPosition passes on an argument that has no name there; give it by name"):
        ByPosition("resnet18")


NUMPY = [
    {"patch_size": np.int64(3)},
    {"seed": np.int64(3)},
    {"resize": np.int64(32)},
    {"resize": np.array([32, 32])},
    {"resize": (np.int64(32), np.int64(32))},
    {"tile": np.int64(16), "tile_overlap": np.int16(8)},
    {"normalize_features": np.bool_(True)},
    {"resize_mode": np.str_("squash")},
    {"layers": np.array(["fine"])},
    {"coreset_ratio": np.float32(0.25)},
    {"image_threshold": np.float64(1)},
    {"reference_brightness": np.array([0.5, 1.5])},
    {"roi": [np.array([0, 0, 16, 16])]},
    {"patches": {"stride": np.int64(1)}},
    {"patches": PatchOptions(layer_dim=np.int64(8), feature_dim=np.int64(8))},
    {"images": {"bits": np.int32(12), "mean": np.full(3, 0.5), "crop_multiple": np.int64(4)}},
    {"ensemble": {"members": [{"patch_size": np.int64(3), "patches": {"stride": np.int64(1)}}]}},
    {"ensemble": EnsembleOptions([{"patch_size": np.int64(1), "position_radius": np.int64(1)}])},
]


@pytest.mark.parametrize("options", NUMPY, ids=str)
def test_numpy_values_become_plain(tiny, noise_fit, tmp_path, options):
    model = noise_fit(PatchCore(**({"backbone": tiny} | SMALL | options)))
    model.save(tmp_path / "model.ckpt")
    found = PatchCore.load_from_checkpoint(tmp_path / "model.ckpt", backbone=tiny)
    assert found.identity() == model.identity()
    assert is_plain(dict(model.hparams) | model.identity())


class Evil:
    """What a checkpoint must not have made."""


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"_instantiator": "os.system"}, "x.ckpt: PatchCore has no argument '_instantiator'"),
        ({"seed": {1}}, "x.ckpt: 'seed' is no plain value"),
        ({"store": {"kind": Evil()}}, "x.ckpt: 'store' is no plain value"),
        ({"layers": ["layer1", {"a": Evil}]}, "x.ckpt: 'layers' is no plain value"),
        ({"backbone": {"class_path": "os.system"}}, "x.ckpt: 'backbone' is no plain value"),
    ],
)
def test_hyper_parameters_are_plain_data(saved, message):
    with pytest.raises(UserError, match=message):
        plain_settings(saved, ["seed", "store", "layers", "backbone"], "x.ckpt")


BAD_VALUES = [
    None, True, -1, -0.5, 1.5, 10**30, float("nan"), float("inf"), 1e300, "", "x", "9" * 400, b"x", [], {}, [1, 2, 3],
    [None], {"a": 1}, object(), torch.zeros(2),
]  # fmt: skip


@pytest.mark.parametrize("name", [*inspect.signature(PatchCore.__init__).parameters][1:])
def test_no_value_ends_in_a_riddle(tiny, name):
    refused = 0
    for value in BAD_VALUES:
        try:
            PatchCore(**({"backbone": tiny, "layers": ["fine"], "resize": 64, "crop": None} | {name: value}))
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 - it may well be taken
            refused += 1
    assert refused >= len(BAD_VALUES) - 5
