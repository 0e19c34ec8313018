"""Image AUROC, pixel AUROC and PRO: exact, on raw scores of any range."""

from pl_patchcore.metrics.auroc import ImageAUROC, PixelAUROC, auroc, curve_area
from pl_patchcore.metrics.evaluation import AnomalyEvaluation, evaluate
from pl_patchcore.metrics.pro import PRO, pro, split_regions

__all__ = [
    "PRO",
    "AnomalyEvaluation",
    "ImageAUROC",
    "PixelAUROC",
    "auroc",
    "curve_area",
    "evaluate",
    "pro",
    "split_regions",
]
