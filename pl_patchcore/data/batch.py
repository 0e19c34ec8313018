"""What a loader gives, ours or another -> a batch as a dict, with each image's place in the data set."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from pl_patchcore.errors import UserError

NAMES = ("path", "defect", "category")  # entries that name each image, by texts or numbers
NUMBERS = {"index": "the images of the data set", "group": "the groups"}  # entries that number them


def as_batch(batch: Any) -> dict[str, Any]:
    """Read a batch of any of the accepted forms as a dict.

    Args:
        batch: A dict with at least ``image``, a tensor of images, or a list of them where they differ in size; or a
            tuple ``(image[, label[, mask]])``. Images are floating-point ``(B, 3, H, W)``, of any precision, and
            normalised, or uint8 levels; labels are numbers ``(B,)``.

    Returns:
        The entries that are not None. Names (``path``, ``defect``, ``category``) are lists of texts, ``index`` and
        ``group`` int64 ``(B,)``; masks that were NumPy arrays are tensors.

    Raises:
        UserError: If it is none of these, or comes from several loaders, or has not a name or number for each image.
    """
    if isinstance(batch, Mapping):
        named = dict(batch)
    else:
        entries = (batch,) if isinstance(batch, Tensor) else batch
        listed = isinstance(entries, tuple | list) and len(entries) <= 3
        named = dict(zip(("image", "label", "mask"), entries, strict=False)) if listed else {}
    named = {key: value for key, value in named.items() if value is not None}
    images: Any = named.get("image")
    labels = named.get("label")
    first = labels[0] if isinstance(labels, tuple | list) and labels else labels
    of_sizes = isinstance(images, list) and isinstance(batch, Mapping) and all(isinstance(x, Tensor) for x in images)
    if not (isinstance(images, Tensor) or of_sizes) or isinstance(first, Mapping) or getattr(first, "ndim", 0) == 4:
        raise UserError(
            f"a batch must be a dict with 'image', a tensor, or a tuple (image[, label[, mask]]), got a "
            f"{type(batch).__name__}; where it comes from several loaders give one loader, e.g. over "
            "torch.utils.data.ConcatDataset."
        )
    for image in [images] if isinstance(images, Tensor) else [each[None] for each in images]:
        if image.ndim != 4 or image.shape[1] != 3:
            raise UserError(f"images must be (B, 3, H, W), got {tuple(image.shape)}.")
        if not image.is_floating_point() and image.dtype != torch.uint8:
            raise UserError(
                f"images must be floating-point, got {image.dtype}; make them with model.transform, "
                "or as float32 in [0, 1], then normalised."
            )
    if labels is not None:
        if not isinstance(labels, Tensor) and np.asarray(labels).dtype.kind not in "biuf":
            raise UserError(f"labels must be numbers, 0 nominal or 1 anomalous, got {first!r}; change the data set.")
        if np.shape(labels)[:1] != (len(images),):
            raise UserError(f"labels must be one for each of the {len(images)} images, got {tuple(np.shape(labels))}.")
    for key, values in named.items():
        if key in NAMES:
            named[key] = _names(key, values, len(images))
        elif key in NUMBERS:
            named[key] = _numbers(key, values, len(images))
        elif key == "mask":
            named[key] = _masks(values)
    return named


def _names(key: str, values: Any, images: int) -> list[str]:
    """Names as texts; the default collate makes a tensor of numbers."""
    each = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
    each = [each] * images if isinstance(each, str) else each  # one for all
    if not isinstance(each, list | tuple) or len(each) != images or None in each:
        raise UserError(
            f"the entry '{key}' of a batch must hold a text, or a text or number for each of the {images} images, got "
            f"{_told(values)}; change the data set, or leave it out."
        )
    return [str(name.item() if isinstance(name, Tensor) else name) for name in each]


def _numbers(key: str, values: Any, images: int) -> Tensor:
    """Whole numbers, int64 ``(B,)``."""
    try:
        numbers = torch.as_tensor(values).flatten()
    except (TypeError, ValueError, RuntimeError):  # texts, None, lists of different lengths
        numbers = torch.empty(0)
    if numbers.shape != (images,) or (images and (numbers.is_floating_point() or numbers.is_complex())):
        raise UserError(
            f"the entry '{key}' of a batch must hold a whole number for each image, got {_told(values)}; number "
            f"{NUMBERS[key]}, or leave it out."
        )
    return numbers.long()


def _masks(masks: Any) -> Any:
    """Arrays as tensors, copied: they may be read-only, mirrored or of the other byte order; in a list, too."""
    if isinstance(masks, list | tuple):
        return [_masks(mask) for mask in masks]
    if not isinstance(masks, np.ndarray) or masks.dtype.kind not in "biuf":
        return masks
    return torch.from_numpy(masks.astype(masks.dtype.newbyteorder("="), order="C"))


def _told(values: Any) -> str:
    """An entry in a few words."""
    if isinstance(values, Tensor | np.ndarray):
        return f"{values.dtype} of shape {tuple(values.shape)}"
    return reprlib.repr(values)


def same_size_parts(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Neighbours of one size in a batch, as batches: all of it, where ``image`` is one tensor.

    Example:
        >>> batch = {"image": [torch.ones(3, 4, 4), torch.ones(3, 4, 4), torch.ones(3, 2, 8)], "label": [0, 1, 0]}
        >>> [(tuple(part["image"].shape), part["label"]) for part in same_size_parts(batch)]
        [((2, 3, 4, 4), [0, 1]), ((1, 3, 2, 8), [0])]
    """
    if isinstance(batch["image"], Tensor):
        return [dict(batch)]
    found, first = [], 0
    for _, group in itertools.groupby(image.shape for image in batch["image"]):
        part = slice(first, first := first + len(list(group)))
        found.append({name: _stacked(each[part]) if _of_each(each, batch) else each for name, each in batch.items()})
    return found


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Outputs for the parts of a batch as those for all of it; of several parts, maps stay a list."""
    if len(parts) == 1:
        return dict(parts[0])
    maps = [image for part in parts for image in part["anomaly_map"]]
    others = parts[0].keys() - {"anomaly_map"}
    return {name: torch.cat([part[name] for part in parts]) for name in others} | {"anomaly_map": maps}


def _stacked(values: Any) -> Any:
    """Tensors of one shape in a list as one tensor; other values as they are."""
    alike = isinstance(values, list) and isinstance(values[0], Tensor) and len({value.shape for value in values}) == 1
    return torch.stack(values) if alike else values


class OwnImages:
    """Numbers the images of a loader as in the data set, and leaves out those that a sampler repeats.

    Samplers repeat images so that all processes get as many; these come last. Left out, each image counts once, in the
    memory bank and in figures.

    Args:
        loader: The loader.
        rank: Number of this process.
        world_size: Number of processes.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> shares = [DataLoader(range(5), sampler=DistributedSampler(range(5), 3, rank, False)) for rank in range(3)]
        >>> [OwnImages(loader, rank, 3).order for rank, loader in enumerate(shares)]
        [[0, 3], [1, 4], [2]]
    """

    def __init__(self, loader: Any, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.order: list[int] | None = None  # this process's images, where a sampler shares them out
        self.position = 0  # images so far, of this process
        for holder in (loader, getattr(loader, "batch_sampler", None)):
            sampler = getattr(holder, "sampler", None)
            if world_size > 1 and self.order is None and isinstance(sampler, DistributedSampler):
                total = min(len(sampler.dataset), sampler.num_replicas * sampler.num_samples)  # type: ignore[arg-type]
                self.order = list(sampler)[: len(range(sampler.rank, total, sampler.num_replicas))]

    def of(self, batch: Any) -> dict[str, Any]:
        """The batch, of any form, without repeated images; with ``index`` int64 ``(B,)``, their places in the set.

        And ``group`` ``(B,)``, the number of the group that each belongs to: its index, where the batch tells no other.
        """
        named = as_batch(batch)
        first, images = self.position, len(named["image"])
        if self.order is not None and len(self.order) - first < images:
            images = max(0, len(self.order) - first)
            named = {name: value[:images] if _of_each(value, named) else value for name, value in named.items()}
        self.position += images
        if "index" in named:
            index = named["index"]
        elif self.order is not None:
            index = torch.tensor(self.order[first : self.position], dtype=torch.int64)
        else:
            index = torch.arange(first, self.position) * self.world_size + self.rank
        return named | {"index": index, "group": named.get("group", index)}


def _of_each(value: Any, batch: Mapping[str, Any]) -> bool:
    """Whether an entry of a batch has a value for each image."""
    sized = value.ndim > 0 if isinstance(value, Tensor | np.ndarray) else isinstance(value, list | tuple)
    return sized and len(value) == len(batch["image"])
