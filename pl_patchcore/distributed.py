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
