"""What the processes of a fit or test tell each other, by ``torch.distributed``; nothing where there is one.

Tensors go on the device that the backend moves tensors of, and are counted. Every process must call in the same order.
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

_AT_ONCE = 1 << 24  # bytes of one collective in `merge`


class Processes:
    """The processes that work on one model together.

    Args:
        device: Device of this process.
        alone: Whether this process works by itself, whatever ``torch.distributed`` says.

    Attributes:
        rank: This process's number, from 0.
        count: Number of processes.
        collectives: Collectives of tensors so far.
        bytes: Bytes that this process has put into them.
    """

    def __init__(self, device: torch.device | str = "cpu", alone: bool = False) -> None:
        alone = alone or not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if alone else dist.get_rank()
        self.count = 1 if alone else dist.get_world_size()
        on_gpu = not alone and "nccl" in str(dist.get_backend())
        if not (alone or on_gpu):
            _destroy_at_exit()
        self.device = torch.device(device) if on_gpu else torch.device("cpu")
        self.collectives = self.bytes = 0

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Tensor of every process, in the order of ranks; all of one shape and type."""
        if self.count == 1:
            return [tensor]
        own = self._counted(tensor)
        parts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(parts, own)
        return [part.to(tensor.device) for part in parts]

    def gather_at_first(self, tensor: Tensor) -> list[Tensor] | None:
        """As `gather`, on process 0; None on the others."""
        if self.count == 1:
            return [tensor]
        own = self._counted(tensor)
        parts = [torch.empty_like(own) for _ in range(self.count)] if self.rank == 0 else None
        dist.gather(own, parts)
        return parts and [part.to(tensor.device) for part in parts]

    def gather_rows(self, tensor: Tensor) -> list[Tensor]:
        """As `gather`, of tensors of any length."""
        lengths = [int(n) for n in self.gather(torch.tensor([len(tensor)]))]
        if self.count == 1:
            return [tensor]
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        return [part[:n] for part, n in zip(self.gather(padded), lengths, strict=True)]

    def merge(self, tensor: Tensor) -> Tensor:
        """Put together, in place, what each process knows a part of: float32 or float64, 0 where others know better.

        Bits are added, not numbers, so that every value arrives as it was.
        """
        if self.count > 1:
            bits = tensor.view(torch.int32).flatten()  # a view: contiguous
            for part in bits.split(_AT_ONCE // 4):
                own = self._counted(part)
                dist.all_reduce(own)
                part.copy_(own)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Tensor of process 0."""
        if self.count == 1:
            return tensor
        own = self._counted(tensor, sent=self.rank == 0)
        dist.broadcast(own, 0)
        return own.to(tensor.device)

    def largest(self, *values: float) -> list[float]:
        """Largest of each value over the processes; NaN where any is."""
        parts = self.gather(torch.tensor(values, dtype=torch.float64))
        largest: list[float] = torch.stack(parts).amax(0).tolist()
        return largest

    def objects(self, value: Any) -> list[Any]:
        """Any value of every process, in the order of ranks (pickled on the way, between processes of one program)."""
        if self.count == 1:
            return [value]
        parts = [None] * self.count
        dist.all_gather_object(parts, value)
        return parts

    def _counted(self, tensor: Tensor, sent: bool = True) -> Tensor:
        self.collectives += 1
        self.bytes += tensor.numel() * tensor.element_size() if sent else 0
        return tensor.to(self.device).contiguous()


@functools.cache
def _destroy_at_exit() -> None:
    """Let the connections end before Python does.

    Gloo's threads may otherwise free a tensor when Python is gone already, and abort a process that has done its work;
    torchrun then waits 5 minutes for it (pytorch/pytorch#179291). Lightning sees to this with NCCL only.
    """
    atexit.register(_destroy)


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def on_first_process(record: logging.LogRecord) -> bool:
    """Filter of a logger: what all processes would say, process 0 says."""
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


def places(images: list[int], processes: Processes) -> tuple[Tensor, int]:
    """Place of each of this process's images among those of all, in the order of the data set.

    Args:
        images: Index of each in the data set, ascending.
        processes: The processes.

    Returns:
        int64 ``(n,)``, ascending, and the number of images of all. Images with one index follow each other in the
        order of ranks.
    """
    parts = processes.gather_rows(torch.tensor(images, dtype=torch.int64))
    order = torch.cat(parts).argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return place.split([len(part) for part in parts])[processes.rank], len(order)


def sampler_of(loader: Any) -> DistributedSampler[Any] | None:
    """The sampler that deals a loader's images out to processes, if there is one."""
    for holder in (loader, getattr(loader, "batch_sampler", None)):
        sampler = getattr(holder, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None


def images_dealt(sampler: DistributedSampler[Any]) -> int:
    """Images of this process that are not repeated to give all processes as many (they come last).

    Example:
        >>> [images_dealt(DistributedSampler(range(5), 3, rank)) for rank in range(3)]
        [2, 2, 1]
    """
    total = min(len(sampler.dataset), sampler.num_replicas * sampler.num_samples)  # type: ignore[arg-type]
    return len(range(sampler.rank, total, sampler.num_replicas))


class OwnImages:
    """Numbers the images of a loader as in the data set, and leaves out those that a sampler repeats.

    Samplers repeat images so that all processes get as many; these come last. Left out, each image counts once, in the
    memory bank and in figures.

    Args:
        loader: The loader.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, loader: Any, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.sampler = sampler_of(loader) if world_size > 1 else None
        self.order = None if self.sampler is None else list(self.sampler)
        self.position = 0  # images so far, of this process

    def of(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch without repeated images, and with ``index`` int64 ``(B,)``, the images' places in the data set."""
        first, came = self.position, len(batch["image"])
        images = came if self.sampler is None else max(0, min(came, images_dealt(self.sampler) - first))
        if images < came:
            batch = {name: value[:images] if _of_each(value, came) else value for name, value in batch.items()}
        self.position += images
        if "index" in batch:
            index = torch.as_tensor(batch["index"])
        elif self.order is not None:
            index = torch.tensor(self.order[first : self.position], dtype=torch.int64)
        else:
            index = torch.arange(first, self.position) * self.world_size + self.rank
        return batch | {"index": index}


def _of_each(value: Any, images: int) -> bool:
    """Whether an entry of a batch has a value for each image."""
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) == images
    return isinstance(value, list | tuple) and len(value) == images
