"""Data sets as Lightning data modules."""

from pl_patchcore.data.base import AnomalyDataModule, ImageDataset, Record
from pl_patchcore.data.btad import BTADDataModule
from pl_patchcore.data.folder import FolderDataModule
from pl_patchcore.data.kolektor import KolektorSDD2DataModule
from pl_patchcore.data.loco import MVTecLOCODataModule
from pl_patchcore.data.mpdd import MPDDDataModule
from pl_patchcore.data.mstc import MSTCDataModule
from pl_patchcore.data.mtd import MTDDataModule
from pl_patchcore.data.mvtec import MVTecDataModule
from pl_patchcore.data.mvtec_ad_2 import MVTecAD2DataModule
from pl_patchcore.data.real_iad import RealIADDataModule
from pl_patchcore.data.synthetic import SyntheticDataModule
from pl_patchcore.data.visa import VisADataModule

__all__ = [
    "AnomalyDataModule",
    "BTADDataModule",
    "FolderDataModule",
    "ImageDataset",
    "KolektorSDD2DataModule",
    "MPDDDataModule",
    "MSTCDataModule",
    "MTDDataModule",
    "MVTecAD2DataModule",
    "MVTecDataModule",
    "MVTecLOCODataModule",
    "RealIADDataModule",
    "Record",
    "SyntheticDataModule",
    "VisADataModule",
]
