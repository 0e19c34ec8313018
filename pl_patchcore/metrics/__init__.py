"""Figures of anomaly detection from raw scores of any range: exact, or streaming in bounded memory.

For any anomaly scores ``(B,)``, maps ``(B, H, W)`` and masks, whatever made them; larger scores mean more anomalous.
Classes are `torchmetrics.Metric`: ``update`` per batch, ``compute`` at the end, right on several processes.
"""

from pl_patchcore.metrics.curve import (
    Curve,
    Figure,
    area,
    auroc,
    average_precision,
    best_f1,
    curve_area,
    curve_points,
    exact_curve,
    pro,
)
from pl_patchcore.metrics.evaluation import AnomalyEvaluation
from pl_patchcore.metrics.named import TestFigures
from pl_patchcore.metrics.regions import pixel_areas
from pl_patchcore.metrics.single import PRO, AveragePrecision, BestF1, FalseAlarmRate, ImageAUROC, PixelAUROC
from pl_patchcore.metrics.state import Mode

AUPRO = PRO  # the same figure's other name

__all__ = [
    "AUPRO",
    "PRO",
    "AnomalyEvaluation",
    "AveragePrecision",
    "BestF1",
    "Curve",
    "FalseAlarmRate",
    "Figure",
    "ImageAUROC",
    "Mode",
    "PixelAUROC",
    "TestFigures",
    "area",
    "auroc",
    "average_precision",
    "best_f1",
    "curve_area",
    "curve_points",
    "exact_curve",
    "pixel_areas",
    "pro",
]
