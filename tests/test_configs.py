"""The YAML files that come with the package."""

import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from pl_patchcore import PatchCore, UserError
from pl_patchcore.configs import CONFIGS, config_file, config_names, recipe

ROOT = Path(__file__).parents[1]


def test_names():
    assert {"demo", "patchcore", "data/folder", "recipes/mtd", "trainer/ddp"} <= set(config_names())
    assert {"paper", "official", "mstc"} <= set(config_names("recipes"))


def test_a_file_of_ones_own_wins_over_one_that_comes_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_file("demo") == CONFIGS / "demo.yaml"
    Path("demo").write_text("model: {}")
    assert config_file("demo") == Path("demo")
    with pytest.raises(UserError, match=r"recipes/mdt: no such configuration file.*did you mean 'recipes/mtd'\?"):
        config_file("recipes/mdt")


def test_recipes(tiny):
    with pytest.raises(UserError, match=r"recipe 'mine' is unknown; choose one of anomalydino_448, .*, mtd, official"):
        recipe("mine")
    model = PatchCore.from_recipe("official", backbone=tiny, layers=["fine"], resize=64, crop=48)
    assert model.transform.resize_mode == "shorter_side"
    assert model.model.scorer.distance == "squared"


def test_paper_is_the_defaults():
    """The paper's recipe says nothing; so these must not change."""
    assert recipe("paper") == {}
    import inspect

    defaults = {name: p.default for name, p in inspect.signature(PatchCore.__init__).parameters.items()}
    paper = {
        "backbone": "wide_resnet50_2", "layers": ("layer2", "layer3"), "weights": "IMAGENET1K_V1", "patch_size": 3,
        "resize": 256, "crop": 224, "resize_mode": "squash", "coreset_method": "greedy", "coreset_ratio": 0.1,
        "projection_dim": 128, "num_neighbors": 1, "distance": "euclidean", "reweighting_neighbors": 9, "sigma": 4.0,
    }  # fmt: skip
    assert {name: defaults[name] for name in paper} == paper
    patches, images = defaults["patches"], defaults["images"]
    assert (patches.stride, patches.layer_dim, patches.feature_dim) == (1, None, None)
    assert images.interpolation == "bilinear"


def test_the_wheel_holds_them(tmp_path):
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"configs": "pl_patchcore/configs"}
    build = pytest.importorskip("hatchling.builders.wheel", reason="hatchling builds the wheel")
    (path,) = build.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    held = zipfile.ZipFile(path).namelist()
    assert {f"pl_patchcore/configs/{name}.yaml" for name in config_names()} <= set(held)
    assert {"pl_patchcore/report/report.html", "pl_patchcore/published.csv"} <= set(held)
    for name in config_names():
        assert (
            zipfile.ZipFile(path).read(f"pl_patchcore/configs/{name}.yaml") == (CONFIGS / f"{name}.yaml").read_bytes()
        )
    assert yaml.safe_load((CONFIGS / "demo.yaml").read_text())["data"]
