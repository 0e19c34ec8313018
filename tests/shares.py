"""What processes do that share a test set out among them; few imports, since each process makes them anew."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from pl_patchcore.distributed import Processes
from pl_patchcore.metrics import (
    AUPIMO,
    PRO,
    SPRO,
    AnomalyEvaluation,
    ImageAUROC,
    PixelAUROC,
    SegF1,
    TestFigures,
    streaming,
)

WHOLE = {"streaming": ("streaming", 0), "exact": ("exact", 0), "switched": ("auto", 300), "late": ("auto", 1079)}
SHARES = {"uneven": [0, 4, 11], "empty": [0, 12, 12], "one each": [0, 1, 2]}  # first image of each process
NAMES = {-2: "scratch", 5: "hole", 11: "nominal", 3: "screw", 8: "grid"}


def defects_of(masks: Tensor) -> list[list[tuple[Tensor, int]]]:
    """Two defects of each anomalous image, which overlap: all its anomalous pixels, and those on the left."""
    left = torch.arange(masks.shape[2]) < masks.shape[2] // 2
    flags = [mask == 1 for mask in masks]
    return [[(flag, 4), (flag & left, 1000)] if flag.any() else [] for flag in flags]


def per_image() -> AUPIMO:
    """For tiny images, whose false-positive rates are large."""
    return AUPIMO(bounds=(0.01, 0.3), num_thresholds=500)


def names(numbers: Tensor) -> list[str]:
    return [NAMES[number] for number in numbers.tolist()]


def figures_by_name(columns: tuple[Tensor, ...], processes: Processes, size: int = 5) -> Any:
    """Figures of images in batches as `data/base.py` makes them."""
    figures = TestFigures(1.0, 0.5)
    for start in range(0, len(columns[0]), size):
        scores, maps, labels, masks, groups, categories = (column[start : start + size] for column in columns)
        batch = {"label": labels, "mask": masks, "defect": names(groups), "category": names(categories)}
        figures.add(batch, scores, maps)
    return figures.compute(processes)


def share(rank: int, folder: Path) -> None:
    """One of three processes: its shares of the images in, everybody's figures out."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    streaming.BINS, streaming.APART = 2**11, 1
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=3)
    first_two, results = dist.new_group([0, 1]), {}
    shared = torch.load(folder / "columns.pt")
    for world, group in ((3, None), (2, first_two)):
        for name, starts in SHARES.items() if rank < world else ():
            own = slice(starts[rank], [*starts[:world], 12][rank + 1])
            for mode, (kind, limit) in WHOLE.items():
                metric = AnomalyEvaluation(mode=kind, pixel_limit=limit)
                metric.process_group, metric.compute_with_cache = group, False
                for part in zip(*(column[own].split(2) for column in shared), strict=True):
                    metric.update(*part)
                # after the first, states are its own again, and can be gathered a second time
                results[world, name, mode] = [metric.compute(), metric.compute()]
    tied = torch.load(folder / "tied.pt")
    for cut in (9, 12) if rank < 2 else ():
        scores, maps, labels, masks, groups = (column[:cut] if rank == 0 else column[cut:] for column in tied)
        single = {
            "image_auroc": (ImageAUROC(), (scores, labels)),
            "pixel_auroc": (PixelAUROC(), (maps, masks)),
            "pro": (PRO(), (maps, masks)),
            "aupimo": (per_image(), (maps, masks, labels, groups)),
            "seg_f1": (SegF1(0.5), (maps, masks)),
            "spro": (SPRO(), (maps, defects_of(masks), labels, groups)),
        }
        for metric, columns in single.values():
            metric.process_group = first_two
            metric.update(*columns)
        results["single", cut] = {name: metric.compute() for name, (metric, _) in single.items()}
    own = slice([0, 4, 11][rank], [4, 11, 12][rank])
    results["named"] = figures_by_name(tuple(column[own] for column in shared), Processes())
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
