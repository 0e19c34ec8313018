"""Metrics: speed beside anomalib and scikit-learn, memory of a large test set, share of a test loop. `make bench`.

    python tests/benchmarks/bench_metrics.py [speed] [memory] [loop]

Peers come with the extra ``bench`` and are left out where they are absent. Maps are 256x256, smooth positive
noise around 40 as distances are, with 60 % anomalous images; each time is the best of some runs, all at the same
number of threads (OMP_NUM_THREADS).
Labelling: finding the regions of the masks, which scikit-learn does not need. The answers kept for masks seen before
are thrown away before each run.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from measuring import Call, apart, forget_peak, machine, memory, seconds, silence
from rich.console import Console
from rich.table import Table
from scipy import ndimage
from torch import Tensor

from pl_patchcore import PatchCoreModel, PatchFeatures
from pl_patchcore.distributed import Processes
from pl_patchcore.metrics import PRO, AnomalyEvaluation, Mode, PixelAUROC, TestFigures, pixel_areas, regions

SIDE, BATCH = 256, 32
console = Console()


def smooth_noise(images: int, seed: int = 0) -> np.ndarray:
    g = np.random.default_rng(seed)
    base = np.stack([ndimage.gaussian_filter(g.standard_normal((SIDE, SIDE)), 4) for _ in range(min(images, 64))])
    base = (base / base.std()).astype(np.float32)
    maps = np.empty((images, SIDE, SIDE), np.float32)
    for index in range(images):
        noise = base[index % len(base)] + 0.1 * g.standard_normal((SIDE, SIDE), np.float32)
        maps[index] = 40 * np.exp(0.25 * noise)
    return maps


def make_test_set(images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Maps and masks: about 60 % of the images have two or three defects of 2 % of the image together."""
    g = np.random.default_rng(seed)
    maps, masks = smooth_noise(images, seed), np.zeros((images, SIDE, SIDE), np.uint8)
    for index in range(images * 6 // 10):
        for height, width in ((30, 40), (8, 8), (3, 20))[: g.integers(2, 4)]:
            row, column = g.integers(0, SIDE - 40, 2)
            masks[index, row : row + height, column : column + width] = 1
    maps[masks == 1] += 15
    return torch.from_numpy(maps), torch.from_numpy(masks)


def best(call: Call, runs: int) -> tuple[float, object]:
    least, results = float("inf"), list[object]()
    for _ in range(runs):
        regions.mask_areas.cache_clear()
        least = min(least, seconds(lambda: results.append(call())))
    return least, results[-1]


def figure(make: Callable[[], Any], maps: Tensor, masks: Tensor) -> float:
    metric = make()
    for heat, mask in zip(maps.split(BATCH), masks.split(BATCH), strict=True):
        metric.update(heat, mask)
    return float(metric.compute())


def speed() -> None:
    table = Table("maps", "figure", "seconds", "peer / ours", "value")
    for images in (100, 400):
        maps, masks = make_test_set(images)
        runs = 7 if images == 100 else 4
        label, _ = best(partial(pixel_areas, masks), runs)
        table.add_row(str(images), "labelling the masks", f"{label:.3f}", "", "")
        times = {}
        for mode in ("streaming", "exact"):
            for make in (PRO, PixelAUROC):
                taken, value = best(partial(figure, partial(make, mode=mode), maps, masks), runs)
                times[make.__name__, mode] = taken
                note = ", labelling included" if make is PRO else ""
                table.add_row("", f"{make.__name__} {mode}{note}", f"{taken:.3f}", "", f"{value:.7f}")
        peers: dict[str, tuple[str, Callable[[], float]]] = {}
        if find_spec("anomalib"):
            from anomalib.metrics.aupro import _AUPRO

            peers["anomalib AUPRO"] = ("PRO", partial(figure, _AUPRO, maps, masks.int()))
        if find_spec("sklearn"):
            from sklearn.metrics import roc_auc_score

            flat = masks.numpy().ravel(), maps.numpy().ravel()
            peers["scikit-learn ROC"] = ("PixelAUROC", partial(roc_auc_score, *flat))
        for name in {"anomalib AUPRO", "scikit-learn ROC"} - set(peers):
            print(f"{name} left out: not installed (pip install -e '.[bench]').")
        for name, (own, call) in peers.items():
            taken, value = best(call, 2)
            streaming, exact = times[own, "streaming"], times[own, "exact"]
            ratio = f"{taken / streaming:.1f} streaming, {taken / exact:.1f} exact"
            if own == "PRO":
                ratio += f"; {(taken - label) / (streaming - label):.1f} streaming, labelling taken off both"
            else:
                ratio += f"; {(taken + label) / (streaming + label):.1f} streaming, labelling added to both"
            table.add_row("", name, f"{taken:.3f}", ratio, f"{value:.7f}")
        table.add_section()
    console.print(table)


def simulated_mstc(images: int = 8600) -> None:
    """One pass over maps that are made on the fly; prints the largest memory above the start."""
    base, _ = make_test_set(64)
    masks = make_test_set(64, seed=1)[1]
    g = torch.Generator().manual_seed(0)
    metric = AnomalyEvaluation(mode="streaming")
    batch(base, masks, g)  # libraries and code pages are loaded
    forget_peak()
    before, largest, start = memory(), 0, time.perf_counter()
    for _ in range(images // BATCH + 1):
        metric.update(*batch(base, masks, g))
        largest = max(largest, memory())
    figures = metric.compute()
    taken, peak = time.perf_counter() - start, memory("VmHWM")
    print(*(f"{each / 1e6:.0f}" for each in (before, largest - before, peak - before)), f"{taken:.0f}")
    print({name: f"{float(value):.2e}" for name, value in figures.items() if name.endswith("_bound")})


def simulated_originals(images: int) -> None:
    """A test whose maps of 256x256 are compared to masks of 5 megapixels, each other than the last; prints the peak."""
    height, width = 1944, 2592
    maps = make_test_set(16)[0]
    g, figures = np.random.default_rng(0), TestFigures(mode="streaming", size="original")
    place = {"original_size": torch.tensor([[height, width]]), "crop_box": torch.tensor([[0.0, 0.0, height, width]])}
    forget_peak()
    before, start = memory(), time.perf_counter()
    for number in range(images):
        mask = torch.zeros(1, height, width, dtype=torch.uint8)
        if label := number % 2:
            row, column = g.integers(0, 1500, 2)
            mask[0, row : row + 300, column : column + 400] = 1
        heat = maps[number % 16][None] * (1 + 0.001 * number)
        figures.add({"label": torch.tensor([label]), "mask": mask} | place, heat.amax((1, 2)), heat)
    row, _ = figures.compute(Processes())
    bound = row["all"]["pixel_auroc_bound"]
    print(f"{(memory('VmHWM') - before) / 1e6:.0f} {time.perf_counter() - start:.0f} {bound:.2e}")


def batch(base: Tensor, masks: Tensor, g: torch.Generator) -> tuple[Tensor, ...]:
    chosen = torch.randint(len(base), (BATCH,), generator=g)
    mask = masks[chosen]
    maps = base[chosen] * (0.9 + 0.2 * torch.rand(BATCH, 1, 1, generator=g)) + 15 * (mask == 1)
    labels = mask.flatten(1).amax(1).long()
    return maps.amax((1, 2)), maps, labels, mask, labels, torch.randint(12, (BATCH,), generator=g)


def of_large_sets() -> None:
    printed = apart(__file__, "simulated_mstc")
    before, running, peak, taken = printed[-2].split()
    console.print(
        f"8,600 maps of 256x256 in streaming mode, 12 categories: {running} MB above the start ({before} MB) after "
        f"batches, {peak} MB at the highest; {taken} s with making the maps. Bounds: {printed[-1]}"
    )
    for images in (10, 300):
        peak, taken, bound = apart(__file__, "simulated_originals", str(images))[-1].split()
        console.print(
            f"metrics_size original, streaming, {images} images of 5 megapixels: {peak} MB above the start at the "
            f"highest; {taken} s; pixel AUROC to {bound}"
        )


def loop(images: int = 32, bank: int = 10_000) -> None:
    """All metrics against a test loop with WideResNet-50 (untrained: the same work) on the CPU."""
    model = PatchCoreModel(PatchFeatures(weights=None))
    g = torch.Generator().manual_seed(0)
    model.memory_bank.fill(torch.randn(bank, 1536, generator=g))
    maps, masks = make_test_set(images)
    labels = masks.flatten(1).amax(1).long()
    pictures = torch.rand(images, 3, SIDE, SIDE, generator=g)
    with torch.no_grad():
        model(pictures[:8])
        scoring = seconds(lambda: [model(part) for part in pictures.split(8)])
    table = Table("", "s / image", "share of the loop")
    table.add_row(f"scoring, {bank:,} rows in the memory bank", f"{scoring / images:.4f}", "")
    modes: tuple[Mode, ...] = ("exact", "streaming")
    for mode in modes:

        def run(mode: Mode = mode) -> None:
            metric = AnomalyEvaluation(mode=mode)
            for at in range(0, images, 8):
                part = slice(at, at + 8)
                metric.update(maps[part].amax((1, 2)), maps[part], labels[part], masks[part], labels[part])
            metric.compute()

        taken, _ = best(run, 3)
        table.add_row(f"all metrics, {mode}", f"{taken / images:.4f}", f"{taken / (scoring + taken):.1%}")
    console.print(table)


def main() -> None:
    silence()
    console.print(machine(load=True))
    parts = {"speed": speed, "memory": of_large_sets, "loop": loop}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["simulated_mstc"]:
            simulated_mstc()
        case ["simulated_originals", images]:
            simulated_originals(int(images))
        case _:
            main()
