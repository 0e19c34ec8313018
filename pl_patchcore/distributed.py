"""What the processes of a fit or test tell each other, by ``torch.distributed``; nothing where there is one.

Tensors go on the device that the backend moves tensors of. Every process must call in the same order.
"""

from __future__ import annotations

import atexit
import functools
import logging
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DistributedSampler


class Processes:
    """The processes that work on one model together.

    Args:
        device: Device of this process.
        alone: Whether this process works by itself, whatever ``torch.distributed`` says.

    Attributes:
        rank: This process's number, from 0.
        count: Number of processes.
    """

    def __init__(self, device: torch.device | str = "cpu", alone: bool = False) -> None:
        alone = alone or not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if alone else dist.get_rank()
        self.count = 1 if alone else dist.get_world_size()
        on_gpu = not alone and "nccl" in str(dist.get_backend())
        if not (alone or on_gpu):
            _destroy_at_exit()
        self.device = torch.device(device) if on_gpu else torch.device("cpu")

    def gather_at_first(self, tensor: Tensor) -> list[Tensor] | None:
        """On process 0 the tensors of all, of one shape and type, in the order of ranks; None on the others."""
        if self.count == 1:
            return [tensor]
        own = tensor.to(self.device).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.count)] if self.rank == 0 else None
        dist.gather(own, parts)
        return parts and [part.to(tensor.device) for part in parts]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Tensor of process 0."""
        if self.count == 1:
            return tensor
        own = tensor.to(self.device).contiguous()
        dist.broadcast(own, 0)
        return own.to(tensor.device)

    def objects(self, value: Any) -> list[Any]:
        """Any value of every process, in the order of ranks (pickled on the way, between processes of one program)."""
        if self.count == 1:
            return [value]
        parts = [None] * self.count
        dist.all_gather_object(parts, value)
        return parts

    def largest(self, *values: float) -> list[float]:
        """Largest of each value over the processes; NaN where any is."""
        largest: list[float] = torch.tensor(self.objects(values), dtype=torch.float64).amax(0).tolist()
        return largest


@functools.cache
def _destroy_at_exit() -> None:
    """Let the connections end before Python does.

    Gloo's threads may otherwise free a tensor when Python is gone already, and abort a process that has done its work;
    torchrun then waits 5 minutes for it (pytorch/pytorch#179291). Lightning sees to this with NCCL only.
    """

    @atexit.register
    def destroy() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def on_first_process(record: logging.LogRecord) -> bool:
    """Filter of a logger: what all processes would say, process 0 says."""
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


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

    def of(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch without repeated images, and with ``index`` int64 ``(B,)``, the images' places in the data set."""
        first, images = self.position, len(batch["image"])
        if self.order is not None and len(self.order) - first < images:
            images = max(0, len(self.order) - first)
            batch = {name: value[:images] if _of_each(value, batch) else value for name, value in batch.items()}
        self.position += images
        if "index" in batch:
            index = torch.as_tensor(batch["index"])
        elif self.order is not None:
            index = torch.tensor(self.order[first : self.position], dtype=torch.int64)
        else:
            index = torch.arange(first, self.position) * self.world_size + self.rank
        return batch | {"index": index}


def _of_each(value: Any, batch: dict[str, Any]) -> bool:
    """Whether an entry of a batch has a value for each image."""
    sized = value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, list | tuple)
    return sized and len(value) == len(batch["image"])
