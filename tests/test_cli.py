"""The command line, through its real entry point."""

import builtins
import contextlib
import csv
import inspect
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
import torchvision
import yaml
from lightning.pytorch.cli import LightningCLI
from PIL import Image

import pl_patchcore.__main__
from pl_patchcore import FolderDataModule, PatchCore, SyntheticDataModule, __version__
from pl_patchcore.cli import main
from pl_patchcore.commands import COMMANDS
from pl_patchcore.configs import CONFIGS, config_names

DATA = {
    "data": {
        "class_path": "SyntheticDataModule",
        "init_args": {"image_size": 64, "train_images": 4, "test_nominal": 3, "test_per_defect": 1, "num_workers": 0},
    },
    "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False},
    "report": {"pictures": 0},
}
TINY = DATA | {
    "model": {
        "backbone": "resnet18",
        "weights": None,
        "layers": ["layer1"],
        "resize": 32,
        "crop": None,
        "coreset_size": 30,
        "store": {"kind": "ram"},
    }
}
HERE = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.default_root_dir=out"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::pl_patchcore.backbone.UntrainedBackboneWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # results go elsewhere than the fit's
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("warnings.formatwarning", None)
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)


def write(folder, content, name="config.yaml", **changes):
    """A configuration file, whose results go to ``out`` beside it."""
    folder.mkdir(exist_ok=True)
    content = {key: value | changes.pop(key, {}) for key, value in content.items()} | changes
    content["trainer"]["default_root_dir"] = str(folder / "out")
    path = folder / name
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def config(tmp_path):
    return lambda content=TINY, **changes: write(tmp_path, content, **changes)


def checkpoint_of(folder):
    (path,) = (folder / "out").rglob("*.ckpt")
    return str(path)


def metrics_of(folder):
    return json.loads((folder / "out" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder in which ``run`` has been called, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("ran"), io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("warnings.formatwarning", None)
        patch.setattr(logging, "basicConfig", lambda **options: None)
        main(["run", "--config", write(folder, TINY)])
    return folder, printed.getvalue()


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("pl-patchcore: error: ")


def parsed(capsys, *arguments):
    """The whole configuration that a command line stands for."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def figures_of(text):
    return re.findall(r"^(image AUROC|pixel AUROC|PRO) (\d\.\d{4}|nan)$", text, re.MULTILINE)


def leaves(content, name=""):
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{name}{key}.")
        else:
            yield f"{name}{key}", value


PLAIN = {}  # data module: what every option is without a configuration file


@pytest.mark.slow
@pytest.mark.parametrize("name", config_names())
def test_every_config_is_parsed(name, tmp_path, monkeypatch, capsys):
    """Its values arrive, and none is what it would be anyway; each has a reason behind it.

    Those for images of one's own are the defaults of the command line: what they depart from are those of the classes.
    """
    monkeypatch.chdir(tmp_path)
    text = (CONFIGS / f"{name}.yaml").read_text()
    content = yaml.safe_load(text)
    data = content.get("data", DATA["data"])["class_path"]
    whole = dict(leaves(parsed(capsys, "fit", "--data", data, "--config", name)))
    if data not in PLAIN:
        PLAIN[data] = dict(leaves(parsed(capsys, "fit", "--data", data)))
    plain = PLAIN[data]
    if name == "data/folder":
        assert plain == whole
        plain = {f"model.{key}": p.default for key, p in inspect.signature(PatchCore.__init__).parameters.items()}
        plain["model.images.resize_by"] = plain["model.images"].resize_by
        plain["data.init_args.test_share"] = inspect.signature(FolderDataModule).parameters["test_share"].default
    for option, value in leaves(content):
        if option == "data.class_path":
            assert whole[option].endswith(f".{value}")
        elif value != {}:
            assert whole[option] == value != plain.get(option), option
    assert not re.findall(r"^ +(?!class_path)\w+: [^#\n]+$", text, re.MULTILINE), "no reason behind it"


def test_run(ran):
    folder, printed = ran
    metrics = metrics_of(folder)
    assert [name for name, _ in figures_of(printed)] == ["image AUROC", "pixel AUROC", "PRO"]
    assert dict(figures_of(printed))["image AUROC"] == f"{metrics['image_auroc']:.4f}"
    for word in ("scratch", "stain", "foreign", "blur"):
        assert word in printed
        assert metrics["defects"][word]["anomalous"] == 1


@pytest.mark.slow
def test_test_in_another_process(ran, tmp_path):
    """The model comes from the checkpoint."""
    folder, printed = ran
    command = [sys.executable, "-m", "pl_patchcore", "test", "--config", write(tmp_path, DATA)]
    command += ["--ckpt_path", checkpoint_of(folder), "--data.batch_size", "1"]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert figures_of(again.stdout) == figures_of(printed)
    first, second = metrics_of(folder), metrics_of(tmp_path)
    for name in ("image_auroc", "pixel_auroc", "pro"):
        assert second[name] == pytest.approx(first[name], abs=1e-5)
    assert "Traceback" not in again.stderr
    assert len(again.stderr.splitlines()) <= 3, "what Lightning and other libraries say is for -v"


def test_options_win_over_the_checkpoint(ran, config, tmp_path, capsys):
    path = checkpoint_of(ran[0])
    data = config(DATA, model={"num_neighbors": 2})
    main(["test", "--config", data, "--ckpt_path", path, "--model.reweighting_neighbors", "1"])
    metrics = metrics_of(tmp_path)
    assert metrics["memory_bank"] == [30, 64]
    assert metrics["model"]["layers"] == ["layer1"]
    assert metrics["model"]["reweighting_neighbors"] == 1
    assert metrics["model"]["num_neighbors"] == 2
    # what is saved starts the same again, the checkpoint's settings included
    saved = tmp_path / "out" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["model"] == {"num_neighbors": 2, "reweighting_neighbors": 1}
    main(["test", "--config", str(saved)])
    assert metrics_of(tmp_path)["model"] == metrics["model"]
    capsys.readouterr()
    message = error_of(capsys, "test", "--config", data, "--ckpt_path", path, "--model.resize", "48")
    assert "resize 32, here 48" in message


def settings_of(capsys, *arguments):
    """What a command line stands for: data module, its test_share, crop, save_backbone, false_alarm_rate, distance."""
    whole = parsed(capsys, *arguments)
    data, model = whole["data"], whole["model"]
    names = ("crop", "save_backbone", "false_alarm_rate", "distance")
    module = data["class_path"].removeprefix("pl_patchcore.").removesuffix("DataModule")
    return [module, data["init_args"].get("test_share"), *(model[name] for name in names)]


def test_order_of_settings(tmp_path, capsys, caplog):
    """Defaults for images of one's own < recipes < other files < options, wherever they stand."""
    mine = write(tmp_path, {"model": {"false_alarm_rate": 0.2}, "trainer": {}})
    own = ["Folder", 0, None, True, 0.05, "euclidean"]
    assert settings_of(capsys, "fit") == own
    assert settings_of(capsys, "fit", "--data", "FolderDataModule", "--data.nominal", "x") == own
    assert settings_of(capsys, "fit", "--data=MTDDataModule") == ["MTD", None, 224, False, 0.01, "euclidean"]
    assert settings_of(capsys, "fit", "--config", "recipes/mtd") == ["MTD", None, 224, False, 0.01, "euclidean"]
    assert settings_of(capsys, "fit", "--model.crop", "40", "-c", mine) == ["Folder", 0, 40, True, 0.2, "euclidean"]
    assert not [message for message in caplog.messages if "as published" in message]
    files = ["--config", "data/folder", "--config", mine, "--config=recipes/official"]
    with caplog.at_level(logging.INFO):
        for order in (files, files[::-1][:1] + files[:-1]):
            published = ["Folder", 0.3, 224, False, 0.2, "squared"]
            assert settings_of(capsys, "fit", "--data.test_share", "0.3", *order) == published
    (first, second) = [message for message in caplog.messages if "as published" in message]
    assert first.startswith("recipes/official sets the model as published: crop 224 (was None), ")
    assert "save_backbone False (was True)" in first
    assert first == second


def test_own_images(tmp_path, monkeypatch, capsys, caplog):
    """The whole image, every image, a model file that is named, and nothing but it to predict."""
    monkeypatch.chdir(tmp_path)
    fakes.stranger(tmp_path / "images")
    settings = {name: value for name, value in TINY.items() if name != "data"}
    small = write(tmp_path, settings, model={"crop": None, "false_alarm_rate": 0.4})
    files = []
    with caplog.at_level(logging.INFO):
        main(["fit", "--config", small, "--data.nominal", "images/ok", "--data.num_workers", "0"])
        assert "FolderDataModule: 10 nominal training images; no test images (data.test_share 0)" in caplog.messages
        assert (
            "10 images: 10 in the memory bank, 0 held out; thresholds from 10 of them by leave-one-out."
            in caplog.messages
        )
        listed = Path("out/training_images.csv").read_text(encoding="utf-8").splitlines()
        assert len(listed) == 11
        assert listed[1].startswith("images/ok/")
        assert len(list(Path("out/training_images").iterdir())) == 4
        files.append(checkpoint_of(tmp_path))
        assert caplog.messages[-2] == f"Model: {Path(files[0]).relative_to(tmp_path)}"
        # the configuration that fit has saved is one for every command
        main(["run", "--config", "out/config.yaml", "--model.seed", "1"])
        assert "There are no test images, so there is nothing to test." in caplog.messages
        name, earlier = re.fullmatch(r"Model: (.*) \(beside it, of earlier fits: (.*)\)", caplog.messages[-2]).groups()
        assert earlier == Path(files[0]).name != Path(name).name
        assert caplog.messages[-1] == f"Next: pl-patchcore predict --ckpt_path {name} --data.predict IMAGES"
    loaded = PatchCore.load_from_checkpoint(name)
    assert (loaded.hparams["seed"], loaded.transform.crop, loaded.hparams["save_backbone"]) == (1, None, True)
    shutil.rmtree(tmp_path / "images" / "ok")
    capsys.readouterr()
    main(["predict", "--config", "out/config.yaml", "--ckpt_path", name, "--data.predict", "images/bad"])
    assert "3 anomaly scores written to" in capsys.readouterr().out
    # a share asks for a split, in place of what is there by default; the configuration says so, too
    main(["fit", "--config", small, "--data.nominal", "images/bad", "--model.calibration_share", "0.4", *HERE])
    assert yaml.safe_load(Path("out/config.yaml").read_text())["model"]["calibration"] is None
    # what comes with the package does not win over a checkpoint
    main(["predict", "--config", "data/folder", "--ckpt_path", name, "--data.predict", "images/bad", *HERE])
    rate = yaml.safe_load(Path("out/config.yaml").read_text())["model"].get("false_alarm_rate")
    assert (rate, loaded.false_alarm_rate) == (None, 0.4)


def test_validate_with_the_checkpoint_in_the_file(ran, config, tmp_path, capsys):
    path = config(DATA, ckpt_path=checkpoint_of(ran[0]))
    main(["validate", "--config", path, "--data.validation", "test"])
    assert figures_of(capsys.readouterr().out) == figures_of(ran[1])
    assert metrics_of(tmp_path)["image_auroc"] == metrics_of(ran[0])["image_auroc"]


def test_without_nominal_test_images_the_reason_is_told(ran, config, tmp_path, capsys):
    fakes.stranger(tmp_path / "images")
    data = ["--data.nominal", str(tmp_path / "images/ok"), "--data.anomalous", str(tmp_path / "images/bad")]
    settings = {name: value for name, value in DATA.items() if name != "data"}
    main(["test", "--config", config(settings), "--ckpt_path", checkpoint_of(ran[0]), *data, "--data.num_workers=0"])
    printed = capsys.readouterr().out
    assert "There are no nominal test images: image AUROC needs both" in printed
    assert "There are no masks" in printed
    assert ("image AUROC", "nan") in figures_of(printed)


@pytest.mark.slow
def test_completion():
    """In a process of its own: it changes how classes are read."""
    pytest.importorskip("shtab", reason="completion by tab needs shtab")
    command = [sys.executable, "-m", "pl_patchcore", "--print_completion", "bash"]
    script = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "--model.coreset_ratio" in script


def test_settings_of_a_checkpoint_are_data(ran, config, tmp_path, capsys):
    """Text that YAML would read as a class stays text; what is no argument, or no plain value, is refused."""
    checkpoint = torch.load(checkpoint_of(ran[0]), weights_only=True)
    data, path = config(DATA), tmp_path / "changed.ckpt"
    evil = "{class_path: pathlib.Path, init_args: {args: [x]}}"
    for changed, message in (
        ({"backbone": evil}, "pathlib.Path"),
        ({"backbone": {"class_path": "pathlib.Path"}}, "'backbone' is no plain value"),
        ({"ensemble": {"members": [{"backbone": evil}]}}, "pathlib.Path"),
        ({"ensemble": {"members": [{"class_path": "pathlib.Path"}]}}, "has no argument 'class_path'"),
        ({"_instantiator": "os.system"}, "PatchCore has no argument '_instantiator'"),
    ):
        torch.save(checkpoint | {"hyper_parameters": checkpoint["hyper_parameters"] | changed}, path)
        assert message in error_of(capsys, "test", "--config", data, "--ckpt_path", str(path))


def test_calibrate_and_thresholds_set_by_hand(ran, config, tmp_path, capsys):
    path = checkpoint_of(ran[0])
    main(["calibrate", "--config", config(DATA), "--ckpt_path", path, "--data.seed", "1"])
    new = tmp_path / "out" / "calibrated.ckpt"
    assert f"calibrated model: {new}" in capsys.readouterr().out.replace("\n", "")
    model, old = PatchCore.load_from_checkpoint(new), PatchCore.load_from_checkpoint(path)
    assert torch.equal(model.memory_bank.features, old.memory_bank.features)
    data = SyntheticDataModule(**DATA["data"]["init_args"], seed=1)
    with torch.no_grad():
        scores = model(torch.stack([model.transform(record.image()) for record in data.records[0]]))[0]
    torch.testing.assert_close(model.model.calibration.scores, scores)
    by_hand = ["--model.image_threshold", "1e9", "--ckpt_path", str(new)]
    file = config(DATA, model={"false_alarm_rate": 0.2})  # another call's rate does not matter
    main(["predict", "--config", file, *by_hand])
    with (tmp_path / "out" / "predictions.csv").open() as table:
        assert {row["anomalous"] for row in csv.DictReader(table)} == {"0"}
    both = error_of(capsys, "predict", "--config", file, *by_hand, "--model.false_alarm_rate=0.1")
    assert both == "false_alarm_rate moves calibrated thresholds, and image_threshold is set by hand; give one of them."
    assert "calibrate needs ckpt_path" in error_of(capsys, "calibrate", "--config", config(DATA))
    (tmp_path / "fit").mkdir()
    main(["fit", "--config", write(tmp_path / "fit", TINY), "--model.pixel_threshold", "7.5"])
    assert PatchCore.load_from_checkpoint(checkpoint_of(tmp_path / "fit")).pixel_threshold == 7.5


def test_update(ran, config, tmp_path, capsys):
    main(["update", "--config", config(DATA), "--ckpt_path", checkpoint_of(ran[0]), "--data.seed", "1"])
    bank = PatchCore.load_from_checkpoint(checkpoint_of(tmp_path)).memory_bank
    assert (bank.size, int(bank.seen)) == (30, (4 + 4) * 64)
    assert "update needs ckpt_path" in error_of(capsys, "update", "--config", config(DATA))


def test_predict(ran, config, tmp_path, capsys):
    path = checkpoint_of(ran[0])
    main(["predict", "--config", config(DATA), "--ckpt_path", path, "--predictions.maps", "true"])
    assert "7 anomaly scores written to" in capsys.readouterr().out
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    model = PatchCore.load_from_checkpoint(path)
    records = SyntheticDataModule(**DATA["data"]["init_args"]).records[1]
    assert [row["path"] for row in rows] == [str(record.path) for record in records]
    images = torch.stack([model.transform(record.image()) for record in records])
    scores, _ = model.eval()(images)
    assert [float(row["score"]) for row in rows] == pytest.approx(scores.tolist(), rel=1e-5)
    heat = np.load(tmp_path / "out" / rows[0]["map"])
    assert heat.shape == (64, 64)
    assert heat.dtype == np.float32
    assert len({row["map"] for row in rows}) == 7


@pytest.mark.slow
def test_ensemble(config, tmp_path, capsys):
    members = [{"layers": ["layer1"]}, {"layers": ["layer2"], "coreset_size": 20, "patches": {"stride": 2}}]
    shared = {"ensemble": {"members": members}, "calibration_share": 0.3, "false_alarm_rate": 0.5, "layers": ["layer3"]}
    main(["run", "--config", config(model=shared)])
    first, path = metrics_of(tmp_path), checkpoint_of(tmp_path)
    assert first["memory_bank"] == [[30, 64], [12, 128]]  # 4 x 4 cells, every second, of 3 images
    data = config(DATA)
    main(["test", "--config", data, "--ckpt_path", path, "--model.false_alarm_rate", "0.6"])
    second = metrics_of(tmp_path)
    assert second["image_auroc"] == pytest.approx(first["image_auroc"], abs=1e-6)
    assert second["model"]["false_alarm_rate"] == 0.6
    main(["predict", "--config", data, "--ckpt_path", path])
    with (tmp_path / "out" / "predictions.csv").open() as file:
        assert "anomalous" in next(csv.DictReader(file))
    main(["update", "--config", data, "--ckpt_path", path, "--data.seed", "1"])
    (new,) = {str(file) for file in (tmp_path / "out").rglob("*.ckpt")} - {str(path)}
    updated = PatchCore.load_from_checkpoint(new)
    assert all(int(member.memory_bank.seen) for member in updated.model.members)


def test_mtd(config, tmp_path, capsys):
    root = fakes.mtd(tmp_path / "mtd")
    data = {"class_path": "MTDDataModule", "init_args": {"num_workers": 0}}
    main(["run", "--config", config(data=data), "--data.root", str(root), "--report.pictures", "1"])
    printed = capsys.readouterr().out
    assert "blowhole" in printed
    assert float(dict(figures_of(printed))["image AUROC"]) == 1  # white squares on grey
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 5


def test_backbone_of_your_own_by_its_class(config, tmp_path, capsys):
    backbone = {"class_path": "networks.TinyBackbone", "init_args": {"seed": 3}}
    path = config(model={"backbone": backbone, "layers": ["fine"]})
    main(["fit", "--config", path])
    checkpoint = checkpoint_of(tmp_path)
    main(["test", "--config", path, "--ckpt_path", checkpoint])
    assert len(figures_of(capsys.readouterr().out)) == 3
    assert "give it as model.backbone" in error_of(capsys, "test", "--config", config(DATA), "--ckpt_path", checkpoint)


def test_checkpoint_with_its_backbone_needs_no_weights_file(config, tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    layers = [f"layer{i}.{j}.{part}" for i in (1, 2) for j in (0, 1) for part in ("conv1", "bn2")]
    main(["fit", "--config", config(model={"weights": weights.name, "layers": layers, "save_backbone": True})])
    weights.unlink()
    fit_config = str((tmp_path / "out" / "config.yaml").rename(tmp_path / "fit.yaml"))
    main(["test", "--config", config(DATA), "--ckpt_path", checkpoint_of(tmp_path)])
    assert len(figures_of(capsys.readouterr().out)) == 3
    assert not [w for w in recwarn if "random weights" in str(w.message)]
    assert metrics_of(tmp_path)["model"]["layers"] == layers
    main(["test", "--config", fit_config, "--ckpt_path", checkpoint_of(tmp_path)])  # names the file, too
    saved = torch.load(checkpoint_of(tmp_path), weights_only=True)["hyper_parameters"]
    assert saved["weights"] == str(weights)  # holds in any folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # a name that is none
        ("ftt", "unknown command 'ftt'; did you mean 'fit'?"),
        ("--config demo fit", "the command comes first: pl-patchcore fit --config demo"),
        ("fit --trainer.max_epoch 2", "unknown option 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
        ("fit --model.backbon=x", "unknown option 'model.backbon'; did you mean 'model.backbone'?"),
        ("fit --modle.backbone=x", "unknown option 'modle.backbone'; did you mean 'model.backbone'?"),
        ("fit --model.store.knd=x", "unknown option 'model.store.knd'; did you mean 'model.store.kind'?"),
        (
            "fit --data=MTDDataModule --data.rot=x",
            "'data.rot' of MTDDataModule; did you mean 'data.root'?",
        ),
        ("fit --data.root=x", "unknown option 'data.root' of FolderDataModule"),
        ("fit", "no images are named: set data.nominal"),
        ("predict --data.predict x", "predict needs ckpt_path"),
        (
            "fit --trainer.logger=CSVLogger --trainer.logger.save_di=x",
            "unknown option 'trainer.logger.save_di' of CSVLogger; did you mean 'trainer.logger.save_dir'?",
        ),
        (
            "fit --trainer.callbacks+=EarlyStopping --trainer.callbacks.montor=x",
            "unknown option 'trainer.callbacks.montor' of EarlyStopping; did you mean 'trainer.callbacks.monitor'?",
        ),
        (
            "fit --trainer.callbacks=[EarlyStopping]",
            "trainer.callbacks: EarlyStopping needs monitor; set trainer.callbacks.monitor.",
        ),
        (
            "fit --trainer.callbacks+=EarlyStoping",
            "no class 'EarlyStoping'; did you mean 'EarlyStopping'?",
        ),
        ("fit --trainer.logger=CSVLoger", "trainer.logger: no class 'CSVLoger'; did you mean 'CSVLogger'?"),
        ("fit --data=nowhere.MyData", "data: no class 'nowhere.MyData': No module named 'nowhere'."),
        (
            "fit --data=networks.TinyBackbone",
            "data: networks.TinyBackbone is no AnomalyDataModule; derive it",
        ),
        ("test --report.picture=1", "unknown option 'report.picture'; did you mean 'report.pictures'?"),
        ("fit --config none.yaml", "none.yaml: no such configuration file"),
        ("fit --config recipes/mdt", "did you mean 'recipes/mtd'?"),
        ("fit --model.store_dir x", "model.store_dir is now model.store.folder."),
        ("fit --model.store disk", "model.store is now model.store.kind."),
        ("fit --model.shard_bank true", "model.shard_bank is gone: every process holds the whole memory bank."),
        ("fit --model.patches 3", "model.patches is a group of options, model.patches.combine,"),
        # a value that it cannot have
        ("fit --config demo --data.batch_size=0", "batch_size must be at least 1, got 0."),
        ("fit --config demo --data.shots=0", "shots must be at least 1, got 0; leave it out to train on all"),
        ("fit --config demo --data.texture=wood", "data.texture must be one of 'brick', 'gravel', 'grass', got wood."),
        (
            "fit --config demo --model.coreset_method=best",
            "model.coreset_method must be one of 'greedy', 'approximate'",
        ),
        (
            "fit --config demo --model.store.kind=tape",
            "model.store.kind must be one of 'auto', 'ram', 'disk', got tape.",
        ),
        ("fit --config demo --model.coreset_ratio=abc", "model.coreset_ratio must be float, got abc."),
        ("fit --config demo --model.coreset_ratio=1.5", "coreset_ratio must be in (0, 1], got 1.5"),
        ("fit --config demo --model.patches.stride=0", "patches.stride must be at least 1, got 0."),
        ("fit --config demo --model.layers=3", "model.layers must be Sequence, got 3."),
        (
            "fit --config demo --model.roi=[9,9,5,5]",
            "roi [9, 9, 5, 5]: a box is [left, top, right, bottom], right above",
        ),
        (
            "fit --config demo --model.ignore=[[0,0],[9,9]]",
            "ignore must be a box [left, top, right, bottom], a polygon",
        ),
        (
            "fit --config demo --model.ignore=a.png",
            "a.png: no such file or folder; give a mask image, a folder of masks",
        ),
        ("fit --config demo --model.layers=[layer9]", "layer 'layer9' is not in resnet18; did you mean"),
        (
            "fit --config demo --model.weights=nowhere.pth",
            "nowhere.pth: no such weights file; give its path as --model",
        ),
        ("fit --config demo --model.ensemble.members=[{layer:[x]}]", "no argument 'layer'; did you mean 'layers'"),
        ("fit --config demo --trainer.max_epochs=x", "trainer.max_epochs must be int, got x."),
        (
            "fit --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=x --trainer.callbacks.patience=y",
            "trainer.callbacks.patience must be int, got y.",
        ),
        ("fit --config demo --trainer.accelerator=cpu --trainer.devices=two", "trainer: `devices` selected with"),
        ("fit --data.nominal=nowhere", "nowhere: no such folder; set data.nominal to a folder of images."),
        ("fit --config demo --trainer.accelerator=foo", "You selected an invalid accelerator name"),
        ("fit --config demo --data=MTDDatamodule", "data: no class 'MTDDatamodule'; did you mean 'MTDDataModule'?"),
        ("fit --config demo --data=MTDDataModule --data.root=nowhere", "MT_Free/Imgs: no such folder"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *(word.replace("layer:[", "layer: [") for word in arguments.split()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("model: {coreset_ration: 0.1}", "'model.coreset_ration' in {}; did you mean 'model.coreset_ratio'?"),
        ("trainer: {acelerator: cpu}", "'trainer.acelerator' in {}; did you mean 'trainer.accelerator'?"),
        ("trane: {devices: 1}", "'trane.devices' in {}; did you mean 'trainer.devices'?"),
        (
            "data: {init_args: {textur: brick}}",
            "'data.textur' of SyntheticDataModule in {}; did you mean 'data.texture'?",
        ),
        ("model: {store: {knd: ram}}", "'model.store.knd' in {}; did you mean 'model.store.kind'?"),
        ("model: {store: disk}", "{}: model.store is now model.store.kind."),
        ("model: {layer_dim: 8}", "{}: model.layer_dim is now model.patches.layer_dim."),
        (
            "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {save_lst: true}}]}",
            "'trainer.callbacks.save_lst' of ModelCheckpoint in {}; did you mean 'trainer.callbacks.save_last'?",
        ),
        (
            "trainer: {callbacks: [{class_path: lightning.pytorch.callback.EarlyStopping}]}",
            "trainer.callbacks in {}: no class 'lightning.pytorch.callback.EarlyStopping': module 'lightning.pytorch'",
        ),
        ("model: [1, 2", "{}: is no YAML file"),
        ("- model", "{}: must hold options as 'name: value'."),
    ],
)
def test_what_is_wrong_in_a_file(capsys, tmp_path, changes, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(changes)
    assert message.format(path) in error_of(capsys, "fit", "--config", "demo", "--config", str(path))


def test_error_in_a_loader_process_is_one_line(capsys, config, tmp_path):
    root = fakes.mtd(tmp_path / "mtd")
    path = root / "MT_Free" / "Imgs" / "exp2_num_1002.jpg"
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)  # header and end are whole
    path.write_bytes(content[:220] + b"\xff\xd9")
    data = {"class_path": "MTDDataModule", "init_args": {"num_workers": 1}}
    message = error_of(capsys, "fit", "--config", config(data=data), "--data.root", str(root))
    assert "exp2_num_1002.jpg: cannot be read" in message


def test_help(capsys):
    commands = "{fit,validate,test,predict,run,update,calibrate,benchmark,export}"
    assert commands in error_of(capsys)
    main(["-v", "--help"])
    assert commands in capsys.readouterr().out
    assert set(COMMANDS) == LightningCLI.subcommands().keys() | {"run", "update", "calibrate", "benchmark", "export"}


@pytest.mark.parametrize("columns", [80, 120])
def test_help_of_a_command_is_short(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 400
    assert max(map(len, printed.splitlines())) <= columns + 20  # names are not broken
    words = " ".join(printed.split())
    for name in ("coreset_ratio", "calibration_share", "resize_mode", "store.kind", "patches.stride", "images.mean"):
        assert f"--model.{name}" in words
    assert "Share of the patch features kept, in (0, 1]. (type: float, default: 0.1)" in words
    assert "Folder of the file; null: the system's folder" in words
    assert "--trainer.max_epochs MAX_EPOCHS Stop training once this number of epochs is reached. (default: 1)" in words
    assert "--data.help" in words
    assert "known subclasses" not in words


def test_what_needs_no_torch_imports_none(tmp_path):
    """Help and version, of a process of its own."""
    code = "import sys, pl_patchcore.__main__ as m; m.main(); assert not {'torch', 'lightning'} & {*sys.modules}"
    for option, expected in (("--help", "usage: pl-patchcore"), ("--version", f"pl-patchcore {__version__}\n")):
        done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True)
        assert done.stdout.startswith(expected)


def test_the_package_names_all_and_imports_nothing():
    code = """
import sys, pl_patchcore, pl_patchcore.errors, pl_patchcore.published
heavy = {"torch", "lightning", "torchvision", "scipy", "matplotlib", "numpy", "PIL"} & {*sys.modules}
assert not heavy, heavy
assert {*pl_patchcore.__all__, "__version__", "errors"} <= {*dir(pl_patchcore)}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_what_few_need_is_imported_where_it_is_used(ran, tmp_path):
    """Not even `predict` needs it."""
    code = """
import sys, pl_patchcore.cli
pl_patchcore.cli.main(sys.argv[1:])
few = {"av", "faiss", "skimage", "onnx", "pl_patchcore.export", "pl_patchcore.benchmark"} & {*sys.modules}
assert not few, few
"""
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    words = ["predict", "--ckpt_path", str(Path(checkpoint_of(ran[0])).absolute()), "--data.predict=.", *HERE]
    subprocess.run([sys.executable, "-c", code, *words], check=True, cwd=tmp_path)
    assert (tmp_path / "out" / "predictions.csv").is_file()


HOLDING = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1] + "/.in_use").acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("command", ["fit", "calibrate"])
def test_a_folder_in_use_is_refused(command, ran, tmp_path, config, capsys):
    folder = tmp_path / "out"
    options = ["--trainer.logger", "false", *(["--ckpt_path", checkpoint_of(ran[0])] if command == "calibrate" else [])]
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        error = error_of(capsys, command, "--config", config(TINY if command == "fit" else DATA), *options)
        assert error == f"{folder}: another run writes there now; wait for it, or choose another folder."
        other.communicate(b"")
    assert [path.name for path in folder.iterdir()] == [".in_use"]


def test_interrupted_while_importing(monkeypatch):
    def interrupt(name, *args):
        if name == "pl_patchcore.cli":
            raise KeyboardInterrupt
        return importing(name, *args)

    monkeypatch.setattr("sys.argv", ["pl-patchcore", "fit"])
    importing = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", interrupt)
    with pytest.raises(SystemExit) as stop:
        pl_patchcore.__main__.main()
    assert stop.value.code == 130
