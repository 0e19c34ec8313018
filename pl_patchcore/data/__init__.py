"""Data sets as Lightning data modules."""

from pl_patchcore.data.base import AnomalyDataModule, ImageDataset, Record
from pl_patchcore.data.mtd import MTDDataModule
from pl_patchcore.data.synthetic import SyntheticDataModule

__all__ = ["AnomalyDataModule", "ImageDataset", "MTDDataModule", "Record", "SyntheticDataModule"]
