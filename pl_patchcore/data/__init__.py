"""Data sets as Lightning data modules."""

from pl_patchcore.data.base import AnomalyDataModule, ImageDataset, Record
from pl_patchcore.data.folder import FolderDataModule
from pl_patchcore.data.mstc import MSTCDataModule
from pl_patchcore.data.mtd import MTDDataModule
from pl_patchcore.data.mvtec import MVTecDataModule
from pl_patchcore.data.synthetic import SyntheticDataModule

__all__ = [
    "AnomalyDataModule",
    "FolderDataModule",
    "ImageDataset",
    "MSTCDataModule",
    "MTDDataModule",
    "MVTecDataModule",
    "Record",
    "SyntheticDataModule",
]
