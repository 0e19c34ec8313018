"""PatchCore anomaly detection as a PyTorch Lightning module, with its training and evaluation pipeline.

The way of an image, one file a stage::

    data/               folders of a data set    -> samples, batches
    preprocessing.py    image of any kind        -> image (3, H, W), mask (H, W); roi.py which of its pixels count,
                        resize.py the resize in tensors
    backbone.py         name or module           -> a network that gives layers (B, C, h, w)
    timm_networks.py    a name of timm's         -> the same, by timm's own code; weights_file.py reads weights
    references.py       training images          -> their views: turned, in other light
    patch_features.py   images (B, 3, H, W)      -> patch features (B, h, w, D)
    coreset/            patch features (N, D)    -> the rows kept (M, D): the store, the greedy loop, over processes
    memory_bank.py      rows kept (M, D)         -> nearest neighbours of queries, with search/
    anomaly_map.py      distances (B, h, w)      -> anomaly scores (B,), anomaly maps (B, H, W)
    model.py            joins these: PatchCoreModel, a plain module; ensemble.py several of it
    fitting.py          training images          -> a model with a memory bank
    leave_one_out.py    training images          -> their scores without their own rows of the memory bank
    calibration.py      scores of nominal images -> thresholds; suspicious.py the training images that stand out
    inspection.py       images of any kind       -> verdicts, and by regions.py where, on the original image
    patchcore.py        the model in Lightning: fit, test, predict; checkpoint.py what is saved, foreign.py what is
                        looked at in a file from elsewhere, options.py its options, configs.py the YAML that comes with
                        it, build.py the model of its arguments
    memory_bank_callback.py fits it on the encoder of a LightningModule of one's own, when that is trained
    metrics/            scores, maps, masks      -> AUROC, PRO and others
    report/             figures, maps            -> tables, pictures, files; files.py writes them whole
    export/             a fitted model           -> a file that runs without this package
    cli.py              the command pl-patchcore; commands.py what needs no torch, option_errors.py wrong options
    benchmark.py        all categories of a data set; published.py what others had

Names are imported when they are first used: importing the package imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pl_patchcore.data import AnomalyDataModule as AnomalyDataModule
    from pl_patchcore.data import BTADDataModule as BTADDataModule
    from pl_patchcore.data import FolderDataModule as FolderDataModule
    from pl_patchcore.data import KolektorSDD2DataModule as KolektorSDD2DataModule
    from pl_patchcore.data import MPDDDataModule as MPDDDataModule
    from pl_patchcore.data import MSTCDataModule as MSTCDataModule
    from pl_patchcore.data import MTDDataModule as MTDDataModule
    from pl_patchcore.data import MVTecAD2DataModule as MVTecAD2DataModule
    from pl_patchcore.data import MVTecDataModule as MVTecDataModule
    from pl_patchcore.data import MVTecLOCODataModule as MVTecLOCODataModule
    from pl_patchcore.data import RealIADDataModule as RealIADDataModule
    from pl_patchcore.data import SyntheticDataModule as SyntheticDataModule
    from pl_patchcore.data import VisADataModule as VisADataModule
    from pl_patchcore.errors import UserError as UserError
    from pl_patchcore.inspection import Inspection as Inspection
    from pl_patchcore.memory_bank import MemoryBank as MemoryBank
    from pl_patchcore.memory_bank_callback import MemoryBankCallback as MemoryBankCallback
    from pl_patchcore.model import PatchCoreModel as PatchCoreModel
    from pl_patchcore.patch_features import PatchFeatures as PatchFeatures
    from pl_patchcore.patchcore import PatchCore as PatchCore
    from pl_patchcore.preprocessing import Preprocessing as Preprocessing
    from pl_patchcore.regions import Region as Region

__version__ = "0.2.0"
_MODULES = {  # name: module it is from
    "AnomalyDataModule": "data",
    "BTADDataModule": "data",
    "FolderDataModule": "data",
    "Inspection": "inspection",
    "KolektorSDD2DataModule": "data",
    "MPDDDataModule": "data",
    "MSTCDataModule": "data",
    "MTDDataModule": "data",
    "MVTecAD2DataModule": "data",
    "MVTecDataModule": "data",
    "MVTecLOCODataModule": "data",
    "MemoryBank": "memory_bank",
    "MemoryBankCallback": "memory_bank_callback",
    "PatchCore": "patchcore",
    "PatchCoreModel": "model",
    "PatchFeatures": "patch_features",
    "Preprocessing": "preprocessing",
    "RealIADDataModule": "data",
    "Region": "regions",
    "SyntheticDataModule": "data",
    "UserError": "errors",
    "VisADataModule": "data",
}
__all__ = list(_MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
