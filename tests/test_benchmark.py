"""The benchmark, through real processes."""

import csv
import fcntl
import json
import logging
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fakes
import pytest
import yaml

import pl_patchcore
from pl_patchcore import AnomalyDataModule, MTDDataModule, MVTecAD2DataModule, MVTecDataModule, PatchCore, UserError
from pl_patchcore.benchmark import Job, _start, plan, run_jobs, table_lines, write_overview, write_table
from pl_patchcore.cli import main
from pl_patchcore.configs import recipe
from pl_patchcore.published import PUBLISHED, others_had, published_for

WRN50 = {"image_auroc": 99.2, "pixel_auroc": 98.1, "pro": 94.4}
MODEL = {"backbone": "resnet18", "weights": None, "layers": ["layer1"], "resize": 32, "crop": None, "coreset_size": 20}


def finished(folder, category, figures, shots=None, seed=None):
    """A row as if it had been run."""
    name = f"{category}_shots{shots}_seed{seed}"
    job = Job(category, shots, seed, folder / name, {"model": {"coreset_ratio": 0.1}})
    job.folder.mkdir(parents=True)
    (job.folder / "job.yaml").write_text(yaml.safe_dump(job.settings))
    row = dict(zip(("image_auroc", "pixel_auroc", "pro"), figures, strict=True))
    (job.folder / "metrics.json").write_text(json.dumps(row))
    return job


def test_mean_and_standard_error(tmp_path):
    values = {("a", 0): 0.5, ("a", 1): 0.7, ("a", 2): 0.9, ("b", 0): 0.9, ("b", 1): 0.9, ("b", 2): 0.6}
    jobs = [finished(tmp_path, c, (v, None, 1.0), shots=5, seed=s) for (c, s), v in values.items()]
    a, b, average = table_lines(jobs)
    assert [line["category"] for line in (a, b, average)] == ["a", "b", "average"]
    assert a["image_auroc"] == pytest.approx(0.7)
    assert a["image_auroc_se"] == pytest.approx(0.2 / math.sqrt(3))
    assert average["image_auroc"] == pytest.approx(0.75)  # of 0.7, 0.8, 0.75
    assert average["image_auroc_se"] == pytest.approx(0.05 / math.sqrt(3))
    assert a["pixel_auroc"] is None
    assert a["pro_se"] == 0
    assert (a["seeds"], a["missing"], a["shots"]) == (3, 0, 5)


def test_published_figures_stand_beside_ours(tmp_path):
    run = next(run for run in PUBLISHED if run.average == WRN50)
    jobs = [finished(tmp_path, name, (0.99, 0.98, 0.9)) for name in run.categories]
    lines = table_lines(jobs, run)
    assert lines[0]["category"] == "bottle"
    assert lines[0]["image_auroc_published"] == 1.0
    assert lines[-1]["image_auroc_published"] == pytest.approx(0.992)
    write_table(tmp_path, lines, {"x": "gone"}, run)
    text = (tmp_path / "benchmark.md").read_text()
    assert "| bottle | 99.00 | 100.0 (-1.0) | 98.00 | 98.5 (-0.5) | 90.00 | 97.1 (-7.1) |" in text
    assert "| average | 99.00 | 99.2 (-0.2) |" in text
    assert "x failed: gone" in text
    few = table_lines(jobs[:3], run)
    assert few[-1]["image_auroc_published"] is None  # the average is over all fifteen


def test_published_averages_are_those_of_the_categories():
    assert len(PUBLISHED) >= 7
    for run in PUBLISHED:
        assert issubclass(getattr(pl_patchcore, run.data), AnomalyDataModule)
        assert run.source
        assert run.average
        for figures in (run.average, *run.categories.values()):
            assert all(0 < value <= 100 for value in figures.values())
        if run.categories:
            assert len(run.categories) == 15
            for key, average in run.average.items():
                assert sum(row[key] for row in run.categories.values()) / 15 == pytest.approx(average, abs=0.11)


def test_headline_figures_are_the_columns(tmp_path):
    jobs = [finished(tmp_path, name, (0.9, 0.8, 0.7)) for name in ("can", "vial")]
    for job in jobs:
        (job.folder / "metrics.json").write_text(json.dumps({"pro_0.05": 0.25, "image_auroc": None, "pro": 0.5}))
    jobs = [replace(job, headline=MVTecAD2DataModule.headline) for job in jobs]
    write_table(tmp_path, table_lines(jobs), {}, None, others_had("MVTecAD2DataModule"))
    header, _, can, _, average, *notes = (tmp_path / "benchmark.md").read_text().splitlines()
    assert header == "| category | PRO at 0.05 | PRO | SegF1 | image AUROC |"
    assert can == "| can | 25.00 | 50.00 | – | – |"
    assert average == "| average | 25.00 | 50.00 | – | – |"
    assert notes[1] == (
        "Published elsewhere: PatchCore on the private test (Heckler-Kram et al. 2025, arXiv:2503.21622, table VII): "
        "PRO at 0.05 28.8, SegF1 3.7."
    )


def test_one_page_of_several_data_sets(tmp_path):
    mvtec = [finished(tmp_path / "mvtec", name, (0.9, 0.8, 0.7), shots) for name in ("a", "b") for shots in (None, 1)]
    write_table(tmp_path / "mvtec", table_lines(mvtec), {"b": "gone"}, None)
    other = [replace(finished(tmp_path / "mtd", "mtd", (1.0, 0.5, 0.5)), headline=("image_auroc", "seg_f1"))]
    write_table(tmp_path / "mtd", table_lines(other), {}, PUBLISHED[-1])
    write_overview(tmp_path, {"mvtec": "1 of 4 rows failed", "mtd": "", "visa": "no such folder"})
    assert (tmp_path / "benchmark.md").read_text().splitlines() == [
        "| data set | shots | image AUROC | pixel AUROC | PRO | SegF1 |",
        "|---|---:|---:|---:|---:|---:|",
        "| mvtec | all | 90.00 | 80.00 | 70.00 | – |",
        "| mvtec | 1 | 90.00 | 80.00 | 70.00 | – |",
        "| mtd | all | 100.00 | – | – | – |",
        "",
        "visa failed: no such folder",
        "",
        "## mvtec",
        "",
        "| category | shots | image AUROC | pixel AUROC | PRO |",
        "|---|---:|---:|---:|---:|",
        "| a | all | 90.00 | 80.00 | 70.00 |",
        "| b | all | 90.00 | 80.00 | 70.00 |",
        "| average | all | 90.00 | 80.00 | 70.00 |",
        "| a | 1 | 90.00 | 80.00 | 70.00 |",
        "| b | 1 | 90.00 | 80.00 | 70.00 |",
        "| average | 1 | 90.00 | 80.00 | 70.00 |",
        "",
        "b failed: gone",
        "",
        "## mtd",
        "",
        "| category | image AUROC | SegF1 |",
        "|---|---:|---:|",
        "| mtd | 100.00 | – |",
    ]
    with (tmp_path / "benchmark.csv").open() as file:
        assert [row["dataset"] for row in csv.DictReader(file)] == ["mvtec"] * 6 + ["mtd"]
    content = json.loads((tmp_path / "benchmark.json").read_text())["datasets"]
    assert content["visa"]["failed"] == {"visa": "no such folder"}
    assert content["mvtec"]["failed"] == {"b": "gone"}


def test_published_is_found_by_the_settings():
    paper = {
        "backbone": "wide_resnet50_2", "layers": ["layer2", "layer3"], "weights": "IMAGENET1K_V1", "patch_size": 3,
        "resize": 256, "crop": 224, "coreset_method": "greedy", "coreset_ratio": 0.1, "distance": "euclidean",
        "patches": {"stride": 1, "layer_dim": None, "feature_dim": None},
        "ensemble": {"members": None, "combine": "nominal"},
    }  # fmt: skip
    assert published_for("MVTecDataModule", paper | {"coreset_ratio": 0.25}).run == "the paper, 25 %"
    assert published_for("MVTecDataModule", paper | {"coreset_ratio": 0.1, "coreset_method": "random"}) is None
    official = paper | recipe("official")
    assert published_for("MVTecDataModule", official).average == WRN50
    assert published_for("MVTecDataModule", official | {"crop": 320}) is None
    assert published_for("MTDDataModule", official | {"backbone": "resnet18"}) is None
    ensemble = published_for("MVTecDataModule", paper | recipe("official_ensemble_320_1"))
    assert ensemble.average == {"image_auroc": 99.6, "pixel_auroc": 98.2, "pro": 94.9}
    assert published_for("VisADataModule", paper) is None  # what others had is no run of ours


def test_changed_settings_are_noticed(tmp_path):
    job = finished(tmp_path, "a", (1.0, 1.0, 1.0))
    changed = Job("a", None, None, job.folder, {"model": {"coreset_ratio": 0.01}})
    with pytest.raises(UserError, match=r"was run with model\.coreset_ratio 0\.1, which is 0\.01 now"):
        run_jobs([changed])
    elsewhere = Job("a", None, None, job.folder, job.settings | {"trainer": {"devices": 2}, "report": {"pictures": 0}})
    assert elsewhere.figures() == {"image_auroc": 1.0, "pixel_auroc": 1.0, "pro": 1.0}


def test_a_row_that_another_process_is_at_is_left_alone(tmp_path):
    job = Job("a", None, None, tmp_path / "a", {"model": {}})
    job.folder.mkdir()
    with (job.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert _start(job, 0, 1) is None
    assert not (job.folder / "job.yaml").exists()
    process = _start(job, 0, 1)  # free again; the run fails for want of data
    assert _start(job, 0, 1) is None  # and holds the lock while it lives
    process.kill()
    process.wait()
    second = _start(job, 0, 1)
    assert second is not None
    second.kill()
    second.wait()


@pytest.mark.parametrize(
    ("visible", "processes", "expected"),
    [
        (None, 3, ["0", "1", "0"]),
        ("4,6", 2, ["4", "6"]),
        ("GPU-1f,GPU-2e", 3, ["GPU-1f", "GPU-2e", "GPU-1f"]),
        ("4,6", 1, ["4,6"]),  # one row at a time: it may use all
    ],
)
def test_rows_are_dealt_out_to_gpus(tmp_path, monkeypatch, visible, processes, expected):
    """Stand-ins for two GPUs and for the runs; that a run takes the device it sees is torch's part."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    seen = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, env, **kwargs: seen.append(env.get("CUDA_VISIBLE_DEVICES")))
    for slot in range(processes):
        _start(Job(f"row{slot}", None, None, tmp_path / f"row{slot}", {"model": {}, "trainer": {}}), slot, processes)
    assert seen == expected


def test_plan(tmp_path):
    root = str(fakes.mvtec(tmp_path / "data", ["a", "b"]))
    settings = {"model": {"seed": 7}, "data": {"class_path": "X", "init_args": {"root": root}}, "trainer": {}}
    jobs = plan(settings, MVTecDataModule(root), tmp_path, ["a", "b"], [1, 5], [0, 3])
    assert [job.folder.name for job in jobs][:3] == ["a_shots1_seed0", "a_shots1_seed3", "a_shots5_seed0"]
    last = jobs[-1].settings
    assert last["data"]["init_args"] == {"root": root, "category": "b", "shots": 5, "shots_seed": 3}
    assert last["model"]["seed"] == 3
    assert [job.category for job in plan(settings, MVTecDataModule(root), tmp_path)] == ["a", "b"]
    (alone,) = plan(settings, MTDDataModule(), tmp_path)
    assert alone.category == "mtd"
    assert alone.settings["data"] == settings["data"]
    assert alone.settings["model"] == settings["model"]
    assert settings["trainer"] == {}
    a, b = plan(
        settings, MVTecDataModule(root), tmp_path, by_category={"b": {"seed": 1, "images": {"bits": 12}}, "c": {}}
    )
    assert (a.settings["model"], b.settings["model"]) == ({"seed": 7}, {"seed": 1, "images": {"bits": 12}})


@pytest.fixture
def made(monkeypatch):
    """Models and rows that a command comes to, in place of their fits."""
    found = []

    def run(self, model: PatchCore, datamodule: AnomalyDataModule) -> None:
        """Fit and test."""
        found.append(model)

    monkeypatch.setattr("pl_patchcore.cli.Trainer.run", run)
    monkeypatch.setattr("pl_patchcore.benchmark.run_jobs", lambda jobs, *_: found.extend(jobs) or {})
    monkeypatch.setattr("pl_patchcore.benchmark.write_table", lambda *_: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    return found


@pytest.mark.filterwarnings("ignore")
def test_settings_by_category(made, tmp_path, monkeypatch, caplog, capsys):
    """Weaker than options, stronger than files; of the category that ``run`` and each row of a benchmark take."""
    monkeypatch.chdir(tmp_path)
    root = str(fakes.mvtec(tmp_path / "data", ["a", "b"]))
    by_category = {"b": {"sigma": 2.0, "layers": ["layer2"], "images": {"bits": 12}}}
    data = {"class_path": "MVTecDataModule", "init_args": {"root": root}}
    settings = {"model": MODEL | {"sigma": 1.0, "images": {"interpolation": "bicubic"}}, "data": data}
    Path("own.yaml").write_text(yaml.safe_dump(settings | {"by_category": by_category}))
    caplog.set_level(logging.INFO)
    for words in (["--data.category", "b"], ["--data.category=b", "--model.sigma=3"], ["--data.category", "a"]):
        main(["run", "--config", "own.yaml", *words])
    assert [model.model.scorer.sigma for model in made] == [2.0, 3.0, 1.0]
    assert [model.patch_features.layers for model in made] == [["layer2"], ["layer2"], ["layer1"]]
    assert [(model.transform.interpolation, model.transform.bits) for model in made] == [
        ("bicubic", 12), ("bicubic", 12), ("bicubic", None)
    ]  # fmt: skip
    assert "by_category: b has images {'bits': 12}, layers ['layer2'], sigma 2.0." in caplog.text
    made.clear()
    main(["benchmark", "--config", "own.yaml", "--model.sigma=3"])
    models = [job.settings["model"] for job in made]
    assert [(model["sigma"], model["layers"], model["images"]["bits"]) for model in models] == [
        (3.0, ["layer1"], None), (3.0, ["layer2"], 12)
    ]  # fmt: skip
    assert all("by_category" not in job.settings for job in made)
    for wrong, message in (
        ("{b: {sigmas: 1}}", "no argument 'by_category.b.sigmas'; did you mean 'by_category.b.sigma'?"),
        ("{b: {sigma: wide}}", "by_category.b.sigma must be a finite number, got 'wide'"),
        ("{b: {images: {bit: 1}}}", "images has no argument 'bit'; did you mean 'bits'?"),
        ("{b: 3}", "by_category"),
    ):
        with pytest.raises(SystemExit):
            main(["benchmark", "--config", "own.yaml", f"--by_category={wrong}"])
        assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_settings_of_a_category_end_with_their_recipe(made, tmp_path):
    root = str(fakes.mvtec(tmp_path / "data", ["bottle"]))
    words = ["--model.backbone=resnet18", "--model.weights=null", "--model.layers=[layer1]", f"--data.root={root}"]
    words += ["--data.category=bottle"]
    for name in ("anomalydino_448", "anomalydino_448_informed"):
        main(["run", f"--config=recipes/{name}", *words, "--model.patches.position_embedding=timm"])
    main(["run", "--config=recipes/anomalydino_448", "--config=recipes/paper", *words])
    assert [model.model.foreground for model in made] == ["none", "none", "none"]
    assert [model.references.rotations for model in made] == [8, 1, 1]


def test_categories_of_anomalydino():
    """Those that the authors mask and turn, by name of their data sets."""
    masked = {"capsule", "hazelnut", "pill", "screw", "toothbrush", "candle", "pcb1", "macaroni2", "pipe_fryum"}
    plain = ["bottle", "cable", "carpet", "grid", "leather", "metal_nut", "tile", "transistor", "wood", "zipper"]
    for size in (448, 672):
        for name, turned in (
            (f"anomalydino_{size}", {*masked, *plain}),
            (f"anomalydino_{size}_informed", {"hazelnut", "screw"}),
        ):
            for category in (*masked, *plain):
                found = recipe(name, category)
                assert found["resize"] == size
                assert found["foreground"] == ("anomalydino" if category in masked else "none")
                assert found.get("reference_rotations", 1) == (8 if category in turned else 1)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A benchmark of three categories, one of which cannot be read."""
    monkeypatch.setattr("warnings.formatwarning", None)
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    root = fakes.mvtec(tmp_path / "data", ["bottle", "cable", "zipper"])
    (root / "zipper" / "train" / "good" / "001.png").write_bytes(b"no image")
    settings = {
        "model": MODEL,
        "data": {"class_path": "MVTecDataModule", "init_args": {"root": str(root), "num_workers": 0}},
        "trainer": {"accelerator": "cpu"},
        "report": {"pictures": 0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return ["benchmark", "--config", str(tmp_path / "config.yaml"), "--folder", str(tmp_path / "out")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pl_patchcore.backbone.UntrainedBackboneWarning")
@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_goes_on_when_killed_and_when_a_row_fails(command, tmp_path, capsys, caplog):
    def error(*more):
        with pytest.raises(SystemExit) as stop:
            main([*command, *more])
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "no category 'botle'; there are bottle, cable, zipper" in error("--categories", "[botle]")
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-m", "pl_patchcore", *command], stderr=subprocess.DEVNULL)
    while not (out / "cable" / "job.yaml").exists():  # bottle is done, cable is at work
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    stamp = (out / "bottle" / "metrics.json").stat().st_mtime_ns
    assert not (out / "benchmark.csv").exists()
    caplog.set_level(logging.INFO)
    # the row left behind is at work still, or has just finished by itself
    assert error("--processes", "2").endswith("1 of 3 rows failed: zipper; start again to retry.")
    assert re.search(r"[12] of 3 rows are finished already", caplog.text)
    assert (out / "bottle" / "metrics.json").stat().st_mtime_ns == stamp
    content = json.loads((out / "benchmark.json").read_text())
    assert "001.png: cannot be read" in content["failed"]["zipper"]
    assert [row["missing"] for row in content["rows"]] == [0, 0, 1, 1]
    with (out / "benchmark.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["category"] for row in rows] == ["bottle", "cable", "zipper", "average"]
    mean = sum(float(row["image_auroc"]) for row in rows[:2]) / 2
    assert float(rows[3]["image_auroc"]) == pytest.approx(mean)
    assert "was run with model.coreset_size 20, which is 30 now" in error("--model.coreset_size", "30")


class InThisProcess:
    """A stand-in for the process of a row, which would import torch for each."""

    def __init__(self, words, **_):
        self.returncode = 0
        try:
            main(words[words.index("run") :])
        except SystemExit as stop:
            self.returncode = stop.code

    def poll(self):
        return self.returncode


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_one_command_over_fakes_of_all_sets(tmp_path, monkeypatch, capsys):
    """Two categories of each set that has some. One set is not there, and one row fails: the others lose nothing."""
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    monkeypatch.setattr(subprocess, "Popen", InThisProcess)
    monkeypatch.setattr("pl_patchcore.benchmark._POLL_SECONDS", 0)
    monkeypatch.chdir(tmp_path)
    make = {
        "visa": fakes.visa, "btad": fakes.btad, "mpdd": lambda root: fakes.mvtec(root, ["connector", "tubes"]),
        "mvtec_ad_2": fakes.mvtec_ad_2, "mvtec_loco": fakes.loco, "kolektor_sdd2": fakes.kolektor_sdd2,
        "real_iad": fakes.real_iad, "mtd": fakes.mtd,
    }  # fmt: skip
    for name, fake in make.items():
        fake(tmp_path / "data" / name)
    (tmp_path / "data/mpdd/tubes/train/good/001.png").write_bytes(b"no image")
    settings = {"model": MODEL, "trainer": {"accelerator": "cpu"}, "report": {"pictures": 0, "page": False}}
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    names = ",".join(f"data/{name}" for name in (*make, "mstc"))
    command = ["benchmark", f"--datasets=[{names}]", "--folder", "out", "--config=config.yaml", "--data.num_workers=0"]
    with pytest.raises(SystemExit):
        main(command)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith("2 of 9 data sets have errors: mpdd, mstc; start again to retry.")
    content = json.loads(Path("out/benchmark.json").read_text())["datasets"]
    assert "no video SS_NNN" in content["mstc"]["failed"]["mstc"]
    assert list(content["mpdd"]["failed"]) == ["tubes"]
    for name, one in content.items():
        if name != "mstc":
            rows = {row["category"]: row for row in one["rows"]}
            assert len(rows) == (1 if name in ("kolektor_sdd2", "mtd") else 3)
            assert [category for category, row in rows.items() if row["missing"]] == (
                ["tubes", "average"] if name == "mpdd" else []
            )
            assert list(rows.values())[-1]["image_auroc"] > 0.9
            assert (Path("out") / name / "benchmark.md").is_file()
    shown = Path("out/benchmark.md").read_text()
    assert "| data set | image AUROC | pixel AUROC | PRO |" in shown
    assert [line.removeprefix("## ") for line in shown.splitlines() if line.startswith("## ")] == list(make)
    assert len(list(Path("out").glob("*/*/metrics.json"))) == 13


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[data/mvtec,data/nothing]", "data/nothing: no such configuration file"),
        ("[data/mvtec,recipes/paper]", "recipes/paper names no data set"),
        ("[data/mvtec,own/mvtec.yaml]", "two files have one name"),
        ("[]", "must be a list of configuration files, got []"),
        ("3", "must be a list of configuration files, got 3"),
        ("[", "benchmark: while parsing a flow"),
    ],
)
def test_wrong_data_sets_are_one_line(value, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "--datasets", value])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
