"""From files to features: what the loader gives, what the backbone takes; and a whole run. `make bench`.

    python tests/benchmarks/bench_pipeline.py [loader] [backbone] [scoring] [whole]

Loader and backbone (at their best of some turns) should take about as long: the slower of them sets the pace.
``scoring`` is `Trainer.test` and `Trainer.predict` with 1 % memory banks, beside what each part of the work takes
alone. ``whole`` is the command `run` on Magnetic Tile Defects with MobileNetV2, 224 pixels and 1 %: imports, fit, test,
figures and pictures. Beside it stands the same with a loop that picks one row at a time in place of the selection,
timed over 300 picks and extrapolated. Without the data set, generated images are loaded and the whole run is left out.
"""

import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from bench_coreset import compiled_loop, official_loop
from measuring import LAYERS, MTD, SHARED, WEIGHTS, Call, machine, patch_features, seconds, silence, tiles, trainer
from rich.console import Console
from rich.table import Table

from pl_patchcore import PatchCore, PatchFeatures, Preprocessing, SyntheticDataModule
from pl_patchcore.coreset import random_projection
from pl_patchcore.data import AnomalyDataModule
from pl_patchcore.metrics import AnomalyEvaluation
from pl_patchcore.patch_features import CPU_PIXELS

NETWORKS = {"mobilenet_v2": LAYERS, "wide_resnet50_2": ["layer2", "layer3"]}
CONFIGS = Path(__file__).parents[2] / "configs"
BATCH, TURNS = 16, 5
BANK_IMAGES = 160  # whose patch features the bank of `scoring` is drawn from
console = Console(width=120)


def data_module(workers: int) -> AnomalyDataModule:
    if SHARED.is_dir():
        return tiles(batch_size=BATCH, num_workers=workers)
    data = SyntheticDataModule(batch_size=BATCH, num_workers=workers)
    data.transform = Preprocessing(224, None)
    data.setup("fit")
    data.setup("test")
    return data


def loader() -> None:
    table = Table("loader processes", "images / s, the first epoch's start left out")
    for workers in (0, 1, 2, 4):
        batches = iter(data_module(workers).train_dataloader())
        next(batches)
        start, images = time.perf_counter(), 0
        for batch in batches:
            images += len(batch["image"])
        table.add_row(str(workers), f"{images / (time.perf_counter() - start):.0f}")
    console.print(table)


def best(call: Call) -> float:
    return min(seconds(call) for _ in range(TURNS))


def backbone() -> None:
    table = Table("images / s", "(B, C, H, W) in memory", "channels last", "and bf16", "channels last, compiled")
    for name, layers in NETWORKS.items():
        network = PatchFeatures(name, layers, None).network
        images = torch.rand(BATCH, 3, 224, 224)
        with torch.no_grad():
            network.to(memory_format=torch.contiguous_format)
            found = [best(partial(network, images))]
            network.to(memory_format=torch.channels_last)
            found.append(best(partial(network, images)))
            with torch.autocast("cpu", torch.bfloat16):
                found.append(best(partial(network, images)))
            network.compile()
            found.append(best(partial(network, images)))
        table.add_row(name, *(f"{BATCH / value:.0f}" for value in found))
    console.print(table)


class Stopwatch(L.Callback):
    """Seconds of the batches of a test or predict, the first one left out, which starts the loaders."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def on_test_batch_start(self, *given: Any) -> None:
        if given[3] == 1:
            self.began = time.perf_counter()

    def on_test_batch_end(self, *given: Any) -> None:
        self.seconds = time.perf_counter() - self.began

    def on_predict_batch_start(self, *given: Any) -> None:
        self.on_test_batch_start(*given)

    def on_predict_batch_end(self, *given: Any) -> None:
        self.on_test_batch_end(*given)


def scoring() -> None:
    table = Table("ms an image", *NETWORKS)
    columns = [scored(name, layers) for name, layers in NETWORKS.items()]
    for row in columns[0]:
        table.add_row(row, *(column[row] for column in columns))
    console.print(table)


@torch.inference_mode()
def scored(name: str, layers: list[str]) -> dict[str, str]:
    """Milliseconds an image of each part, and of whole runs."""
    data = data_module(1)
    images = [data.test_set[i] for i in range(BATCH)]
    batch = torch.stack([image["image"] for image in images])
    weights = str(WEIGHTS) if WEIGHTS.stem == name and WEIGHTS.is_file() else None
    model = PatchCore(name, layers, weights, resize=224, crop=None)
    inner = model.model.members[0]
    features = inner.patch_features(batch).flatten(0, 2)
    size = round(0.01 * len(data.train_set) * len(features) / BATCH)
    nominal = torch.stack([data.train_set[i]["image"] for i in range(BANK_IMAGES)])
    rows = torch.cat([inner.patch_features(part).flatten(0, 2) for part in nominal.split(BATCH)])
    model.memory_bank.fill(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:size]])
    network = inner.patch_features.network.to(memory_format=torch.channels_last)
    pixels = batch.to(memory_format=torch.channels_last)
    metric, masks = AnomalyEvaluation(), torch.stack([image["mask"] for image in images])
    labels = torch.tensor([image["label"] for image in images])
    scores, maps = model(batch)

    def read() -> None:
        for i in range(BATCH):
            data.test_set[i]

    parts: dict[str, Call] = {
        "reading, resize": read,
        "backbone": lambda: [network(part) for part in pixels.split(CPU_PIXELS // 224**2)],
        "patch features, backbone left out": lambda: inner.patch_features(batch),
        "search": lambda: model.memory_bank(features),
        "scores and maps": lambda: model(batch),
        "figures": lambda: metric.update(scores, maps, labels, masks, labels),
    }
    taken = {part: best(call) for part, call in parts.items()}
    taken["scores and maps"] -= taken["patch features, backbone left out"] + taken["search"]
    taken["patch features, backbone left out"] -= taken["backbone"]
    found = {part: f"{1e3 * value / BATCH:.1f}" for part, value in taken.items()}
    found["sum"] = f"{1e3 * sum(taken.values()) / BATCH:.1f}"
    for run in ("test", "predict"):
        watch = Stopwatch()
        if run == "test":
            trainer(callbacks=watch).test(model, data, verbose=False)
        else:
            trainer(callbacks=watch).predict(model, data.test_dataloader(), return_predictions=False)
        each = watch.seconds / (len(data.test_set) - BATCH)
        share = taken["backbone"] / BATCH / each
        found[f"Trainer.{run} (share of the backbone's own rate)"] = f"{1e3 * each:.1f} ({share:.0%})"
    found["memory bank"] = f"{size:,} x {features.shape[1]}"
    return found


def whole_run(share: float = 0.01) -> None:
    if not SHARED.is_dir():
        console.print("whole run left out: Magnetic Tile Defects are not here.")
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "pl_patchcore", "run"),
            *("--config", CONFIGS / "recipes" / "mtd.yaml", "--config", CONFIGS / "data" / "mtd.yaml"),
            *("--data.root", MTD, "--model.backbone", "mobilenet_v2", "--model.weights", WEIGHTS),
            *("--model.layers", f"[{','.join(LAYERS)}]", "--model.resize", "224", "--model.crop", "null"),
            *("--model.coreset_ratio", share, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", folder),
            *("--trainer.enable_progress_bar", "false"),
        ]
        start = time.perf_counter()
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
        total = time.perf_counter() - start
    told = re.search(r"(\d+) of (\d+) patch features, .* selected in ([\d.]+) s", done.stdout + done.stderr)
    assert told is not None
    size, rows, selection = int(told[1]), int(told[2]), float(told[3])
    data = tiles()
    few = patch_features(data.train_set[i] for i in range(120))
    matrix = random_projection(few.shape[1], 128, 0)
    few = few if matrix is None else few @ matrix
    features = few[torch.arange(rows) % len(few)]  # the time of a pick depends on their number alone
    table = Table("selection", "seconds", "share of the run", "whole run, s", "times longer than ours")
    for name, taken in (
        ("ours", selection),
        ("compiled loop", compiled_loop(features) * size),
        ("official loop", official_loop(features) * size),
    ):
        whole = total - selection + taken
        table.add_row(name, f"{taken:.1f}", f"{taken / whole:.1%}", f"{whole:.1f}", f"{whole / total:.1f}")
    console.print(f"{rows:,} patch features, {size:,} picks; loops extrapolated from 300 picks.")
    console.print(table)


def main() -> None:
    silence()
    console.print(machine(load=True))
    parts = {"loader": loader, "backbone": backbone, "scoring": scoring, "whole": whole_run}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
