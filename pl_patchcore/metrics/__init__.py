"""Figures of anomaly detection from raw scores of any range: exact, or streaming in bounded memory.

For any anomaly scores ``(B,)``, maps ``(B, H, W)`` and masks, whatever made them; larger scores mean more anomalous.
Classes are `torchmetrics.Metric`: ``update`` per batch, ``compute`` at the end, right on several processes.
"""

from pl_patchcore.metrics.aupimo import AUPIMO
from pl_patchcore.metrics.evaluation import AnomalyEvaluation
from pl_patchcore.metrics.named import MetricsSize, TestFigures
from pl_patchcore.metrics.regions import pixel_areas
from pl_patchcore.metrics.single import PRO, AveragePrecision, BestF1, ImageAUROC, PixelAUROC
from pl_patchcore.metrics.spro import SPRO
from pl_patchcore.metrics.state import Mode
from pl_patchcore.metrics.thresholded import ClassF1, SegF1

__all__ = [
    "AUPIMO",
    "PRO",
    "SPRO",
    "AnomalyEvaluation",
    "AveragePrecision",
    "BestF1",
    "ClassF1",
    "ImageAUROC",
    "MetricsSize",
    "Mode",
    "PixelAUROC",
    "SegF1",
    "TestFigures",
    "pixel_areas",
]
