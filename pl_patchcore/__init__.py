"""PatchCore anomaly detection as a PyTorch Lightning module, with its training and evaluation pipeline.

The way of an image, one file a stage::

    preprocessing.py    image file               -> image (3, H, W), mask (H, W)
    data/               folders of a data set    -> samples, batches
    backbone.py         images (B, 3, H, W)      -> layers (B, C, h, w)
    patch_features.py   layers                   -> patch features (B, h, w, D)
    feature_store.py    the epoch's features     -> one store (N, D), as store_plan.py says: RAM or disk
    collection.py       the store                -> the rows kept (M, D), by those that follow
    coreset.py          (N, d) projected         -> kept rows (M,); coreset_bounded.py where RAM does not hold all,
                                                    coreset_shared.py on several processes; by
                                                    farthest_first.py, distance_bounds.py
    memory_bank.py      kept features (M, D)     -> nearest neighbours of queries; exact_search.py and
                                                    search_filter.py, approximate_search.py, shared_search.py
    anomaly_map.py      distances (B, h, w)      -> anomaly scores (B,), anomaly maps (B, H, W)
    metrics/            scores, maps, masks      -> AUROC, PRO and others
    calibration.py      scores of nominal images -> thresholds
    report/             figures, maps            -> tables, pictures, files
    patchcore.py        joins these; ensemble.py several of it; options.py its options in groups, configs.py its recipes
    anomaly_module.py   what is Lightning's of both: fit, test, predict; checkpoint.py what they save
    encoder_callback.py fits it on the encoder of a LightningModule of one's own, when that is trained
    cli.py              the command pl-patchcore; benchmark.py all categories, published.py what others had
"""

from pl_patchcore.data import (
    AnomalyDataModule,
    FolderDataModule,
    MSTCDataModule,
    MTDDataModule,
    MVTecDataModule,
    SyntheticDataModule,
)
from pl_patchcore.encoder_callback import MemoryBankCallback
from pl_patchcore.ensemble import PatchCoreEnsemble
from pl_patchcore.errors import UserError
from pl_patchcore.memory_bank import MemoryBank
from pl_patchcore.patch_features import PatchFeatures
from pl_patchcore.patchcore import PatchCore
from pl_patchcore.preprocessing import Preprocessing
from pl_patchcore.configs import recipe_names

__version__ = "0.1.0"
__all__ = [
    "recipe_names",
    "AnomalyDataModule",
    "FolderDataModule",
    "MSTCDataModule",
    "MTDDataModule",
    "MVTecDataModule",
    "MemoryBank",
    "MemoryBankCallback",
    "PatchCore",
    "PatchCoreEnsemble",
    "PatchFeatures",
    "Preprocessing",
    "SyntheticDataModule",
    "UserError",
]
