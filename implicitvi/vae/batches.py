"""From what a user hands in to batches on the device, the same ones after a resume."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from implicitvi import processes
from implicitvi.errors import OptionError, ShapeError, check_at_least

Transform = Callable[[Tensor], Tensor]


class Batches(Protocol):
    """The batches of every step."""

    steps: int
    rows: int

    def at(self, step: int) -> Tensor:
        """The batch ``[B, *x_shape]`` of a step, counted from 0 over all epochs; steps are asked for in order."""


class TensorBatches:
    """Rows of a tensor that lies on the device, reshuffled every epoch; a last batch that is not full is left out.

    The order depends on the seed and the epoch alone. Several processes take their own rows of the same batch.

    Args:
        data: All data ``[N, *x_shape]``.
        batch_size: Rows of a batch, over all processes.
        seed: Seed of the order.
    """

    def __init__(self, data: Tensor, batch_size: int, seed: int):
        check_at_least("batch_size", batch_size, 1)
        everyone = processes.count()
        self.batch_size = min(batch_size, len(data)) // everyone * everyone
        if not self.batch_size:
            raise OptionError(
                "a batch has fewer rows than there are processes",
                got=min(batch_size, len(data)),
                expected=f">= {everyone}",
            )
        self.data = data
        self.seed = seed
        self.steps = len(data) // self.batch_size
        self.rows = self.batch_size // everyone
        self._epoch = -1
        self._order = torch.empty(0)

    def at(self, step: int) -> Tensor:
        """Rows ``[B, *x_shape]`` of this process."""
        epoch, place = divmod(step, self.steps)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed + epoch) % 2**63)
            self._order = torch.randperm(len(self.data), generator=generator).to(self.data.device)
            self._epoch = epoch
        first = place * self.batch_size + processes.rank() * self.rows
        return self.data[self._order[first : first + self.rows]]


class LoaderBatches:
    """Batches of a `torch.utils.data.DataLoader`, or of anything with a length that can be iterated again and again.

    Of a batch that is a tuple the first part is taken, as labels are not needed. Under several processes the loader
    has to give each of them its own rows (`torch.utils.data.DistributedSampler`).

    Args:
        loader: The loader.
        device: Where the batches go.
    """

    def __init__(self, loader: Any, device: torch.device):
        self.loader = loader
        self.device = device
        if not isinstance(loader, Sized):
            raise OptionError(
                "the loader has no length, so an epoch has no end",
                got=type(loader).__name__,
                do="Give it a __len__, the number of its batches.",
            )
        self.steps = len(loader)
        if not self.steps:
            raise OptionError("the loader is empty", got="0 batches", expected="at least one")
        self.rows = int(getattr(loader, "batch_size", None) or 0)
        self._iterator: Iterator[Any] = iter(())

    def at(self, step: int) -> Tensor:
        """The next batch ``[B, *x_shape]``."""
        if step % self.steps == 0:
            self._iterator = iter(self.loader)
        return first_of(next(self._iterator)).to(self.device, non_blocking=True)


def batches_of(data: Any, batch_size: int, device: torch.device, seed: int) -> Batches:
    """Batches of a tensor, an array, a dataset or a loader."""
    if isinstance(data, Tensor | np.ndarray | list):
        return TensorBatches(tensor_of(data).to(device), batch_size, seed)
    if isinstance(data, Dataset) and not isinstance(data, DataLoader):
        data = DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True)
    if not isinstance(data, Iterable):
        raise OptionError(
            "the data cannot be read",
            got=type(data).__name__,
            expected="a tensor or array [N, ...], a Dataset, or a DataLoader",
        )
    return LoaderBatches(data, device)


def tensor_of(data: Any) -> Tensor:
    """Data ``[N, ...]`` as a tensor of floats; what has fewer bits than 32, or is whole, becomes float32."""
    try:
        tensor = torch.as_tensor(data)
    except (TypeError, ValueError) as error:
        raise OptionError("the data are no numbers", got=str(error).splitlines()[0]) from error
    if tensor.dim() == 0 or not len(tensor):
        raise ShapeError(
            "there are no data", got=f"shape {tuple(tensor.shape)}", expected="[N, ...]"
        )
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def first_of(batch: Any) -> Tensor:
    """The data of a loader's batch."""
    if isinstance(batch, list | tuple):
        if not batch:
            raise OptionError("the loader's batch is an empty tuple")
        batch = batch[0]
    if isinstance(batch, dict):
        raise OptionError(
            "the loader's batches are dictionaries",
            got=f"keys {sorted(map(str, batch))}",
            expected="tensors, or tuples whose first part is the data",
            do="Pass collate_fn=… to the loader, or wrap it.",
        )
    return tensor_of(batch)
