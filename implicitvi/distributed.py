"""Fit one model with several processes, each on its own rows of every batch.

The processes exchange only inside `join`. Elsewhere each counts as the only one, whatever `torch.distributed` says: one
of them may evaluate a model after the others have exited.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass
class _Group:
    """A group of joined processes: the device of their tensors, and whether this one was interrupted."""

    device: torch.device
    interrupted: bool = False


_group: ContextVar[_Group | None] = ContextVar("group", default=None)


def count() -> int:
    """Return the number of processes."""
    return 1 if _group.get() is None else dist.get_world_size()


def rank() -> int:
    """Return the number of this process, from 0."""
    return 0 if _group.get() is None else dist.get_rank()


def per_process(number: int) -> int:
    """Return each process's part of a number of draws, rounded up."""
    return -(-number // count())


@contextmanager
def join(device: torch.device) -> Iterator[None]:
    """Work with the other processes, on ``device``: those of ``torchrun``, or of a group that the caller has started.

    A group started here stays until the process ends. An interrupt waits until all have taken the same steps (`agree`).
    """
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield
        return
    group = _Group(device)
    token = _group.set(group)
    try:
        with _held_interrupts(group):
            yield
    finally:
        _group.reset(token)


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Average tensors over all processes, detached, in one exchange; a single process returns them unchanged."""
    if count() == 1 or not tensors:
        return list(tensors)
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / count()).split([tensor.numel() for tensor in tensors])
    return [p.view_as(t).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]


def gather(tensor: Tensor) -> Tensor:
    """Concatenate all processes' rows ``[count · N, ...]`` by rank, detached; all must have the same number."""
    if count() == 1:
        return tensor
    parts = [torch.empty_like(tensor, requires_grad=False) for _ in range(count())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Copy the first process's values to all others."""
    if count() == 1:
        return
    for tensor in tensors:
        sent = tensor.detach().flatten().contiguous().view(torch.uint8)  # gloo does not support booleans
        dist.broadcast(sent, 0)
        tensor.detach().copy_(sent.view(tensor.dtype).view_as(tensor))


def agree(reason: str | None) -> str | None:
    """Return the first reason that any process has to stop, the same for all, ``None`` if none has one."""
    group = _group.get()
    if group is None:
        return reason
    if group.interrupted:
        reason = reason or "interrupted"
    stopping = torch.tensor(float(reason is not None), device=group.device)
    dist.all_reduce(stopping)
    if not stopping:
        return None
    reasons: list[Any] = [None] * count()
    dist.all_gather_object(reasons, reason)
    return next(each for each in reasons if each is not None)  # type: ignore[no-any-return]


@contextmanager
def _held_interrupts(group: _Group) -> Iterator[None]:
    """Record an interrupt instead of raising it: in the middle of a step the others would wait for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def record(*_: Any) -> None:
        group.interrupted = True

    before = signal.signal(signal.SIGINT, record)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
