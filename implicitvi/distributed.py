"""Several processes that fit one model together, each on its own rows of every batch.

Only what happens inside `join` is common to them. Elsewhere there is one process, whatever `torch.distributed` says:
one of them may evaluate a model while the others have gone home.
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
    """What the processes have in common while they are joined: where their tensors lie, whether to stop."""

    device: torch.device
    interrupted: bool = False


_group: ContextVar[_Group | None] = ContextVar("group", default=None)


def count() -> int:
    """How many processes take part."""
    return 1 if _group.get() is None else dist.get_world_size()


def rank() -> int:
    """Which of them this is, from 0."""
    return 0 if _group.get() is None else dist.get_rank()


def part(number: int) -> int:
    """This process's part of a number of draws: the same for all, together at least so many."""
    return -(-number // count())


@contextmanager
def join(device: torch.device) -> Iterator[None]:
    """Work with the other processes, on ``device``: those of ``torchrun``, or of a group that the caller has started.

    A group that is started here stays until the process ends. An interrupt waits until all processes have taken the
    same steps (`agree`).
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
    """Means of tensors over all processes, detached, in one exchange; with one process the tensors as they are."""
    if count() == 1 or not tensors:
        return list(tensors)
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / count()).split([tensor.numel() for tensor in tensors])
    return [p.view_as(t).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]


def gather(tensor: Tensor) -> Tensor:
    """All processes' rows ``[count · N, ...]`` in the order of their ranks, detached; all have the same number."""
    if count() == 1:
        return tensor
    parts = [torch.empty_like(tensor, requires_grad=False) for _ in range(count())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def share(tensors: Sequence[Tensor]) -> None:
    """Give every process the first one's values."""
    if count() == 1:
        return
    for tensor in tensors:
        sent = tensor.detach().flatten().contiguous().view(torch.uint8)  # gloo knows no booleans
        dist.broadcast(sent, 0)
        tensor.detach().copy_(sent.view(tensor.dtype).view_as(tensor))


def agree(reason: str | None) -> str | None:
    """The first reason that any of the processes has to stop, the same for all of them, ``None`` where none has."""
    group = _group.get()
    if group is None:
        return reason
    if group.interrupted:
        reason = reason or "interrupted"
    wishes = torch.tensor(float(reason is not None), device=group.device)
    dist.all_reduce(wishes)
    if not wishes:
        return None
    reasons: list[Any] = [None] * count()
    dist.all_gather_object(reasons, reason)
    return next(each for each in reasons if each is not None)  # type: ignore[no-any-return]


@contextmanager
def _held_interrupts(group: _Group) -> Iterator[None]:
    """Note an interrupt instead of raising it: in the middle of a step the others would wait for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(*_: Any) -> None:
        group.interrupted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
