"""Figures of anomaly detection from raw scores of any range: exact, or streaming in bounded memory.

For any anomaly scores ``(B,)``, maps ``(B, H, W)`` and masks, whatever made them; larger scores mean more anomalous.
Classes are `torchmetrics.Metric`: ``update`` per batch, ``compute`` at the end, right on several processes.
"""

from pl_patchcore.metrics.aupimo import AUPIMO
from pl_patchcore.metrics.evaluation import AnomalyEvaluation
from pl_patchcore.metrics.named import TestFigures
from pl_patchcore.metrics.regions import pixel_areas
from pl_patchcore.metrics.single import PRO, AveragePrecision, BestF1, ImageAUROC, PixelAUROC
from pl_patchcore.metrics.state import Mode

__all__ = [
    "AUPIMO",
    "PRO",
    "AnomalyEvaluation",
    "AveragePrecision",
    "BestF1",
    "ImageAUROC",
    "Mode",
    "PixelAUROC",
    "TestFigures",
    "pixel_areas",
]
