"""What cannot be exported is refused before any work, with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pl_patchcore.ensemble import EnsembleModel
from pl_patchcore.errors import UserError
from pl_patchcore.model import PatchCoreModel
from pl_patchcore.preprocessing import Preprocessing

MOST_BYTES = 2**31 - 2**24  # of a file of ONNX: 2 GiB, less what its graph may take


def check_exportable(model: PatchCoreModel | EnsembleModel, transform: Preprocessing) -> None:
    """Refuse a model that one file cannot repeat.

    Raises:
        UserError: With the reason and, where there is one, the remedy.
    """
    for reason in _reasons(model, transform):
        raise UserError(f"this model cannot be exported: {reason}.")


def _reasons(model: PatchCoreModel | EnsembleModel, transform: Preprocessing) -> Iterator[str]:
    if not model.fitted:
        yield "its memory bank is empty; fit it first"
    if isinstance(model, EnsembleModel) and model.combine == "test_range":
        yield "ensemble.combine test_range needs all images of a test set; nominal scores each by itself"
    if transform.marks:
        yield f"{transform.marks[0][0]} is in pixels of images of one size, and a file takes any; inspect uses it"
    if transform.resize is not None and transform.resize_mode == "longer_side":
        yield "resize_mode longer_side fills images up, and what is filled does not count, which a graph cannot tell"
    if transform.resize is not None and transform.resize_by == "tensors" and transform.size is None:
        yield "resize_mode shorter_side without a crop gives inputs of many shapes; set crop, and fit again"
    for member in model.members:
        features = member.patch_features
        if features.tiling is not None:
            yield "tile cuts each image into a number of tiles of its own, which a graph has no loop for"
        if member.foreground != "none":
            yield f"foreground {member.foreground} looks for an object in each image, which a graph cannot"
        if member.memory_bank.approximate:
            yield f"search {member.memory_bank.search} is faiss's; load the model with search=auto, which is exact"
        if features.like.dtype != torch.float32:
            yield f"its backbone is {features.like.dtype}; export the model as it was loaded, in float32"
        if {each.device.type for each in member.state_dict().values()} != {"cpu"}:
            yield "it is not on the CPU; model.cpu() brings it there"
    size = sum(value.numel() * 4 for value in model.state_dict().values())
    if size > MOST_BYTES:
        yield f"backbone and memory bank take {size / 2**30:.1f} GiB, a file of ONNX 2; a smaller coreset_size cuts it"
