"""The command line, through its real entry point."""

import csv
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
import yaml

from pl_patchcore import RECIPES, PatchCore
from pl_patchcore.cli import PatchCoreCLI, main

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
TINY = {
    "model": {
        "backbone": "resnet18",
        "weights": None,
        "layers": ["layer1"],
        "resize": 32,
        "crop": None,
        "coreset_size": 30,
    },
    "data": {
        "class_path": "SyntheticDataModule",
        "init_args": {"train_images": 4, "test_nominal": 3, "test_per_defect": 1, "num_workers": 0},
    },
    "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::pl_patchcore.backbone.UntrainedBackboneWarning"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("warnings.formatwarning", None)
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)


@pytest.fixture
def config(tmp_path):
    def write(name="tiny.yaml", **changes):
        content = {key: value | changes.get(key, {}) for key, value in TINY.items()}
        content["trainer"]["default_root_dir"] = str(tmp_path / "out")
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content | {k: v for k, v in changes.items() if k not in content}))
        return str(path)

    return write


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def figures_of(text):
    return re.findall(r"^(image AUROC|pixel AUROC|PRO) (\d\.\d{4}|nan)$", text, re.MULTILINE)


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_config_is_parsed(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = {}
    monkeypatch.setattr(PatchCoreCLI, "instantiate_classes", lambda self: seen.update(self.config["fit"].as_dict()))
    monkeypatch.setattr(PatchCoreCLI, "_run_subcommand", lambda self, name: None)
    data = [] if "data" in yaml.safe_load(path.read_text()) else ["--config", "configs/data/synthetic.yaml"]
    main(["fit", "--config", str(path), *data])
    for section, options in yaml.safe_load(path.read_text()).items():
        parsed = seen[section]
        if "class_path" in options:
            assert parsed["class_path"].endswith(f".{options['class_path']}")
            parsed, options = parsed["init_args"], options.get("init_args", {})
        for name, value in options.items():
            assert parsed[name] == value or str(parsed[name]).endswith(str(value)), name


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_files_are_the_recipes(name):
    assert yaml.safe_load((ROOT / "configs" / "recipes" / f"{name}.yaml").read_text())["model"] == RECIPES[name]


def test_run_then_test_in_another_process(config, tmp_path, capsys):
    path = config()
    main(["run", "--config", path])
    printed = capsys.readouterr().out
    first = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [name for name, _ in figures_of(printed)] == ["image AUROC", "pixel AUROC", "PRO"]
    assert dict(figures_of(printed))["image AUROC"] == f"{first['image_auroc']:.4f}"
    for word in ("scratch", "stain", "foreign", "blur"):
        assert word in printed
        assert first["defects"][word]["anomalous"] == 1
    (checkpoint,) = (tmp_path / "out").rglob("*.ckpt")
    command = [sys.executable, "-m", "pl_patchcore", "test", "--config", path, "--ckpt_path", str(checkpoint)]
    again = subprocess.run([*command, "--data.batch_size", "1"], capture_output=True, text=True, check=True)
    assert figures_of(again.stdout) == figures_of(printed)
    second = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert second["image_auroc"] == pytest.approx(first["image_auroc"], abs=1e-6)
    assert second["pixel_auroc"] == pytest.approx(first["pixel_auroc"], abs=1e-6)
    assert second["pro"] == pytest.approx(first["pro"], abs=1e-6)
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.batch_size=0"], "batch_size must be at least 1, got 0."),
        (["--data.shots=0"], "shots must be at least 1, got 0; leave it out to train on all nominal images."),
        (["--data.texture=wood"], "data.texture must be one of 'brick', 'gravel', 'grass', got wood."),
        (
            ["--model.coreset_method=best"],
            "model.coreset_method must be one of 'greedy', 'approximate', 'random',",
        ),
        (["--model.coreset_ratio=abc"], "model.coreset_ratio must be float, got abc."),
        (["--trainer.max_epochs=x"], "trainer.max_epochs must be int, got x."),
        (["--trainer.accelerator=foo"], "You selected an invalid accelerator name"),
        (["--data=MTDDatamodule"], "no data module 'MTDDatamodule'; did you mean 'MTDDataModule'?"),
        (["--model.layers=3"], "model.layers must be Sequence, got 3."),
        (["--model.members=[{layer: [layer1]}]"], "'layer' cannot be set for a member; did you mean 'layers'"),
        (["--model.coreset_seconds=0"], "coreset_seconds must be more than 0"),
    ],
)
def test_what_a_constructor_refuses_is_one_line(config, capsys, arguments, message):
    assert message in error_of(capsys, "fit", "--config", config(), *arguments)


def test_ensemble(config, tmp_path, capsys):
    members = [{"layers": ["layer1"]}, {"layers": ["layer2"], "coreset_size": 20}]
    path = config(model={"members": members, "calibration_share": 0.3, "false_alarm_rate": 0.5, "layers": ["layer3"]})
    main(["run", "--config", path])
    first = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert first["memory_bank"] == [[30, 64], [20, 128]]
    (checkpoint,) = (tmp_path / "out").rglob("*.ckpt")
    data = tmp_path / "data.yaml"
    data.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(Path(path).read_text()).items() if k != "model"}))
    main(["test", "--config", str(data), "--ckpt_path", str(checkpoint), "--model.false_alarm_rate", "0.6"])
    second = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert second["image_auroc"] == pytest.approx(first["image_auroc"], abs=1e-6)
    assert second["model"]["false_alarm_rate"] == 0.6
    capsys.readouterr()
    main(["predict", "--config", str(data), "--ckpt_path", str(checkpoint)])
    with (tmp_path / "out" / "predictions.csv").open() as file:
        assert "anomalous" in next(csv.DictReader(file))


def test_checkpoint_brings_its_model(config, tmp_path, capsys):
    main(["fit", "--config", config()])
    (checkpoint,) = (tmp_path / "out").rglob("*.ckpt")
    data = config("data.yaml")
    content = yaml.safe_load(Path(data).read_text())
    del content["model"]
    Path(data).write_text(yaml.safe_dump(content))
    main(["test", "--config", data, "--ckpt_path", str(checkpoint), "--model.reweighting_neighbors", "1"])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["model"]["layers"] == ["layer1"]
    assert metrics["model"]["reweighting_neighbors"] == 1
    assert metrics["memory_bank"] == [30, 64]
    capsys.readouterr()
    message = error_of(capsys, "test", "--config", data, "--ckpt_path", str(checkpoint), "--model.resize", "48")
    assert "resize 32, here 48" in message


def test_mtd(config, tmp_path, capsys):
    root = fakes.mtd(tmp_path / "mtd")
    data = {"class_path": "MTDDataModule", "init_args": {"num_workers": 0}}
    main(["run", "--config", config(data=data), "--data.root", str(root), "--report.pictures", "1"])
    printed = capsys.readouterr().out
    assert "blowhole" in printed
    assert float(dict(figures_of(printed))["image AUROC"]) == 1  # white squares on grey
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 5


def test_predict(config, tmp_path, capsys):
    path = config()
    main(["fit", "--config", path])
    (checkpoint,) = (tmp_path / "out").rglob("*.ckpt")
    main(["predict", "--config", path, "--ckpt_path", str(checkpoint), "--predictions.maps", "true"])
    assert "7 anomaly scores written to" in capsys.readouterr().out
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    model = PatchCore.load_from_checkpoint(checkpoint)
    cli_data = yaml.safe_load(Path(path).read_text())["data"]["init_args"]
    from pl_patchcore import SyntheticDataModule

    records = SyntheticDataModule(**cli_data).records[1]
    assert [row["path"] for row in rows] == [str(record.path) for record in records]
    images = torch.stack([model.transform(record.image()) for record in records])
    scores, _ = model.eval()(images)
    assert [float(row["score"]) for row in rows] == pytest.approx(scores.tolist(), rel=1e-5)
    heat = np.load(tmp_path / "out" / rows[0]["map"])
    assert heat.shape == (192, 192)
    assert heat.dtype == np.float32
    assert len({row["map"] for row in rows}) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ftt"], "unknown command 'ftt'; did you mean 'fit'?"),
        (
            ["fit", "--trainer.max_epoch", "2"],
            "unknown option 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?",
        ),
        (["fit", "--model.backbon=x"], "unknown option 'model.backbon'; did you mean 'model.backbone'?"),
        (["fit", "--modle.backbone=x"], "unknown option 'modle.backbone'; did you mean 'model.backbone'?"),
        (
            ["fit", "--data=MTDDataModule", "--data.rot=x"],
            "unknown option 'data.rot'; did you mean 'data.root'?",
        ),
        (["test", "--report.picture=1"], "unknown option 'report.picture'; did you mean 'report.pictures'?"),
        (["fit", "--config", "none.yaml"], "none.yaml: no such configuration file"),
    ],
)
def test_misspelt_option_on_the_command_line(capsys, arguments, message):
    assert message in error_of(capsys, *arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"coreset_ration": 0.1}},
            "'model.coreset_ration' in {}; did you mean 'model.coreset_ratio'?",
        ),
        (
            {"trainer": {"acelerator": "cpu"}},
            "'trainer.acelerator' in {}; did you mean 'trainer.accelerator'?",
        ),
        ({"trane": {"devices": 1}}, "'trane.devices' in {}; did you mean 'trainer.devices'?"),
        (
            {"data": {"init_args": {"textur": "brick"}}},
            "'data.textur' in {}; did you mean 'data.texture'?",
        ),
        (
            {"trainer": {"callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"save_lst": True}}]}},
            "'save_lst' in {}; did you mean 'save_last'?",
        ),
    ],
)
def test_misspelt_option_in_a_file(capsys, config, changes, message):
    path = config(**changes)
    assert message.format(path) in error_of(capsys, "fit", "--config", path)


def test_no_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "{fit,validate,test,predict,run,update,benchmark}" in capsys.readouterr().err


def test_config_that_is_no_yaml(capsys, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("model: [1, 2")
    assert "bad.yaml: is no YAML file" in error_of(capsys, "fit", "--config", str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.coreset_ratio", "1.5"], "coreset_ratio must be in (0, 1], got 1.5"),
        (["--model.layers", "[layer9]"], "layer 'layer9' is not in resnet18; did you mean"),
        (["--model.weights", "nowhere.pth"], "nowhere.pth: no such weights file"),
        (["--data", "MTDDataModule", "--data.root", "nowhere"], "MT_Free/Imgs: no such folder"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(capsys, config, options, message):
    assert message in error_of(capsys, "fit", "--config", config(), *options)


def test_error_in_a_loader_process_is_one_line(capsys, config, tmp_path):
    root = fakes.mtd(tmp_path / "mtd")
    path = root / "MT_Free" / "Imgs" / "exp2_num_1002.jpg"
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)  # header and end are whole
    path.write_bytes(content[:220] + b"\xff\xd9")
    data = {"class_path": "MTDDataModule", "init_args": {"num_workers": 1}}
    message = error_of(capsys, "fit", "--config", config(data=data), "--data.root", str(root))
    assert "exp2_num_1002.jpg: cannot be read" in message


def test_help_names_every_model_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for name in ("coreset_ratio", "calibration_share", "resize_mode"):
        assert f"--model.{name}" in printed
    assert "Share of the patch features kept" in printed


def test_backbone_of_your_own_by_its_class(config, tmp_path, capsys):
    backbone = {"class_path": "conftest.TinyBackbone", "init_args": {"seed": 3}}
    path = config(model={"backbone": backbone, "layers": ["fine"]})
    main(["fit", "--config", path])
    (checkpoint,) = (tmp_path / "out").rglob("*.ckpt")
    main(["test", "--config", path, "--ckpt_path", str(checkpoint)])
    assert len(figures_of(capsys.readouterr().out)) == 3
    bare = tmp_path / "bare.yaml"
    content = yaml.safe_load(Path(path).read_text())
    del content["model"]
    bare.write_text(yaml.safe_dump(content))
    assert "give it as model.backbone" in error_of(
        capsys, "test", "--config", str(bare), "--ckpt_path", str(checkpoint)
    )


def test_checkpoint_with_its_backbone_needs_no_weights_file(config, tmp_path, capsys, recwarn):
    import torchvision

    weights = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    # names that fill more than one line of YAML
    layers = [f"layer{i}.{j}.{part}" for i in (1, 2) for j in (0, 1) for part in ("conv1", "conv2", "bn1", "bn2")]
    main(["fit", "--config", config(model={"weights": str(weights), "layers": layers, "save_backbone": True})])
    (checkpoint,) = (tmp_path / "out").rglob("*.ckpt")
    weights.unlink()
    bare = Path(config("bare.yaml"))
    content = yaml.safe_load(bare.read_text())
    del content["model"]
    bare.write_text(yaml.safe_dump(content))
    main(["test", "--config", str(bare), "--ckpt_path", str(checkpoint)])
    assert len(figures_of(capsys.readouterr().out)) == 3
    assert not [w for w in recwarn if "random weights" in str(w.message)]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["model"]["layers"] == layers
