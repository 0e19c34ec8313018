"""What a file is to be like; what cannot be exported is refused before any work, with the reason."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from pl_patchcore.ensemble import EnsembleModel
from pl_patchcore.errors import UserError
from pl_patchcore.export.geometry import comes_resized
from pl_patchcore.export.rows import FileDtype
from pl_patchcore.export.runtime import MapAt
from pl_patchcore.model import PatchCoreModel
from pl_patchcore.preprocessing import MOST_PIXELS, Preprocessing

MOST_CALLS = 16  # of the backbone, which the graph holds as often; with 16 it takes a minute or two to record
OF_ONE_SIZE = "give image_size, and the file takes images of that size alone"
Precision = Literal["float32", "bf16"]
MOST_BYTES = 2**31 - 2**24  # of a file of ONNX: 2 GiB, less what its graph may take


@dataclass(frozen=True)
class FileOptions:
    """What a file is to be like.

    Args:
        resize_in_file: Of a model whose images Pillow resizes: do it in the file, which moves scores.
        image_size: Take images of this height and width alone. Then the file may have a region of interest, and resize
            to the longer side.
        bank_dtype: Type of the memory bank's rows in the file: ``float32``, ``float16`` or ``int8``.
        precision: Of products when the file runs: ``float32``, or ``bf16``, with OpenVINO alone.
        map_at: Maps on the pixels of the ``image``, or of the network's ``input``.
        max_score_change: Refuse a file that changes a score by more than this share of it; None: tell it only.
        parity_file: Write images and what the model says of them beside the file, for tests elsewhere.

    Raises:
        UserError: If a value is not one of these.
    """

    resize_in_file: bool = False
    image_size: tuple[int, int] | None = None
    bank_dtype: FileDtype = "float32"
    precision: Precision = "float32"
    map_at: MapAt = "image"
    max_score_change: float | None = None
    parity_file: bool = False

    def __post_init__(self) -> None:
        for name, known in (("bank_dtype", FileDtype), ("precision", Precision), ("map_at", MapAt)):
            if (value := getattr(self, name)) not in get_args(known):
                raise UserError(f"{name} must be {', '.join(get_args(known))}, got {value!r}.")
        if self.image_size is not None:
            size = tuple(self.image_size)
            if len(size) != 2 or not all(isinstance(n, int) and 1 <= n <= MOST_PIXELS for n in size):
                raise UserError(f"image_size must be height and width, from 1 to {MOST_PIXELS} pixels, got {size}.")
            object.__setattr__(self, "image_size", size)
        if self.max_score_change is not None and not self.max_score_change >= 0:
            raise UserError(f"max_score_change must be at least 0, got {self.max_score_change}.")

    def changes(self, transform: Preprocessing) -> list[str]:
        """Options by which a file's scores are others than the model's."""
        found = {
            "resize_in_file": self.resize_in_file and comes_resized(transform),
            "bank_dtype": self.bank_dtype != "float32",
            "precision": self.precision != "float32",
        }
        return [name for name, changed in found.items() if changed]


def check_exportable(model: PatchCoreModel | EnsembleModel, transform: Preprocessing, options: FileOptions) -> None:
    """Refuse a model that one file cannot repeat.

    Args:
        model: The model.
        transform: Its preprocessing, as it will be in the file.
        options: What the file is to be like.

    Raises:
        UserError: With the reason and, where there is one, the remedy.
    """
    reasons = itertools.chain(_of_images(transform, options), _of_model(model, transform, options.image_size))
    for reason in reasons:
        raise UserError(f"this model cannot be exported: {reason}.")


def _of_images(transform: Preprocessing, options: FileOptions) -> Iterator[str]:
    ready, mode = comes_resized(transform), None if transform.resize is None else transform.resize_mode
    for name, where in transform.marks:
        if isinstance(where, str) and Path(where).is_dir():
            yield f"{name} is a folder of masks by the images' names, which a file is not given; inspect uses them"
        if options.image_size is None:
            yield f"{name} is in pixels of images of one size; {OF_ONE_SIZE}"
    if transform.marks and ready:
        yield f"{transform.marks[0][0]} needs the resize in the file; give resize_in_file"
    if mode == "longer_side":
        if ready:
            yield "resize_mode longer_side needs the resize in the file; give resize_in_file"
        if options.image_size is None:
            yield f"resize_mode longer_side fills images up, and what is filled does not count; {OF_ONE_SIZE}"
    if mode is not None and not ready and transform.size is None and options.image_size is None:
        yield f"resize_mode shorter_side without a crop gives inputs of many shapes; set crop, or {OF_ONE_SIZE}"
    if options.image_size is not None and ready:
        yield "image_size is of images before their resize, which Pillow does before the file; give resize_in_file"


def _of_model(
    model: PatchCoreModel | EnsembleModel, transform: Preprocessing, image: tuple[int, int] | None
) -> Iterator[str]:
    size = transform.size if image is None else transform.geometry(*image).size
    if not model.fitted:
        yield "its memory bank is empty; fit it first"
    if isinstance(model, EnsembleModel) and model.combine == "test_range":
        yield "ensemble.combine test_range needs all images of a test set; nominal scores each by itself"
    for member in model.members:
        features = member.patch_features
        if features.tiling is not None:
            if size is None:
                yield f"tile cuts images by their size; {OF_ONE_SIZE}"
            elif (number := features.tiling.calls(*size, features.like.device)) > MOST_CALLS:
                yield f"its tiles call the backbone {number} times, and a graph {MOST_CALLS}; raise tile_batch, or tile"
        if member.foreground != "none":
            yield f"foreground {member.foreground} looks for an object in each image, which a graph cannot"
        if member.memory_bank.approximate:
            yield f"search {member.memory_bank.search} is faiss's; load the model with search=auto, which is exact"
        if features.like.dtype != torch.float32:
            yield f"its backbone is {features.like.dtype}; export the model as it was loaded, in float32"
        if member.inference != "float32":
            yield f"its inference is {member.inference}; load it with inference=float32: of a file, precision says it"
        if {each.device.type for each in member.state_dict().values()} != {"cpu"}:
            yield "it is not on the CPU; model.cpu() brings it there"
    total = sum(value.numel() * 4 for value in model.state_dict().values())
    if total > MOST_BYTES:
        yield f"backbone and memory bank take {total / 2**30:.1f} GiB, a file of ONNX 2; a smaller coreset_size cuts it"
