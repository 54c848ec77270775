"""Several processes that fit one model together, each on its own rows of every batch.

Nothing here does anything where `torch.distributed` has not been started. `join` starts it under ``torchrun``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch import distributed as dist


def count() -> int:
    """How many processes take part."""
    return dist.get_world_size() if _started() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if _started() else 0


@contextmanager
def join(device: torch.device) -> Iterator[None]:
    """Take part in the group that ``torchrun`` describes, if there is one; leave it again if it was joined here."""
    if _started() or "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over all processes, in one exchange."""
    if count() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= count()
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, part in zip(tensors, flat.split(sizes), strict=True):
        tensor.detach().copy_(part.view_as(tensor))


def share(tensors: Sequence[Tensor]) -> None:
    """Give every process the first one's tensors."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def gather(tensor: Tensor) -> Tensor:
    """All processes' rows, ``[count · N, ...]``, in the order of their ranks."""
    if count() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(count())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()
