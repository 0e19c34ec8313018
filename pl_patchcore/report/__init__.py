"""Figures and maps -> what a person looks at: tables, pictures, files."""

from pl_patchcore.report.coverage import CoverageReport, draw_coverage
from pl_patchcore.report.predictions import PredictionWriter
from pl_patchcore.report.submission import SubmissionWriter, check_submission
from pl_patchcore.report.summary import TestReport
from pl_patchcore.report.training_images import TrainingImagesReport

__all__ = [
    "CoverageReport",
    "PredictionWriter",
    "SubmissionWriter",
    "TestReport",
    "TrainingImagesReport",
    "check_submission",
    "draw_coverage",
]
