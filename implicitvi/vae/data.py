"""From what a user hands in to batches on the device, the same ones after a resume."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from implicitvi import distributed
from implicitvi.errors import OptionError, ShapeError, check_at_least
from implicitvi.rng import RandomStream

Transform = Callable[[Tensor], Tensor]


class Batches(ABC):
    """Data in batches ``[B, *x_shape]``, on the model's device and in its dtype.

    Args:
        like: A tensor of the model's: its device and dtype are those of the batches.

    Attributes:
        steps: Batches of an epoch.
    """

    steps: int

    def __init__(self, like: Tensor):
        self.like = like

    @abstractmethod
    def epoch(self, seed: int) -> Iterator[Tensor]:
        """The batches of an epoch in the order of ``seed``, and of each this process's own rows."""

    @abstractmethod
    def all(self) -> Iterator[Tensor]:
        """All data once, and of each batch all rows."""

    def state_dict(self) -> dict[str, Any]:
        """What the next epochs depend on besides their seeds."""
        return {"generators": [generator.get_state() for generator in self.generators()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for generator, place in zip(self.generators(), state["generators"], strict=True):
            generator.set_state(place)

    def generators(self) -> list[torch.Generator]:
        """Generators of the user's that decide the order."""
        return []

    def fingerprint(self) -> str | None:
        """By what the data are known again; ``None`` where that would take a pass through them."""
        return None

    def _placed(self, rows: Tensor) -> Tensor:
        return rows.to(self.like, non_blocking=True)


class TensorBatches(Batches):
    """Rows of one tensor that lies on the device, shuffled anew for every epoch.

    Rows that do not fill a last batch are left out of an epoch. Whole numbers, such as the bytes of images, become
    floats batch by batch.

    Args:
        data: All data ``[N, *x_shape]``.
        batch_size: Rows of a batch, over all processes; with fewer data, all of them.
        like: As for `Batches`.
    """

    def __init__(self, data: Tensor, batch_size: int, like: Tensor):
        super().__init__(like)
        self.data = data.to(like.device)
        self.batch_size = min(batch_size, len(data)) // distributed.count() * distributed.count()
        _check_share(min(batch_size, len(data)))
        self.steps = len(data) // self.batch_size

    def epoch(self, seed: int) -> Iterator[Tensor]:
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(seed))
        batches = order[: self.steps * self.batch_size].view(self.steps, distributed.count(), -1)
        for rows in batches[:, distributed.rank()].to(self.data.device):
            yield self._placed(self.data[rows])

    def all(self) -> Iterator[Tensor]:
        return map(self._placed, self.data.split(self.batch_size))

    def fingerprint(self) -> str:
        some = self.data[:: max(1, len(self.data) // 1000)].contiguous().cpu()
        seen = hashlib.sha256(some.reshape(-1).view(torch.uint8).numpy().data)
        return f"{len(self.data)} rows, {seen.hexdigest()[:16]}"


class LoaderBatches(Batches):
    """Batches of a `torch.utils.data.DataLoader`, or of anything with a length that can be iterated again and again.

    Of a batch that is a tuple the first part is taken: labels are not needed. A last batch that is not full is taken as
    it comes. The order, and whatever else the loader draws from torch's generators, is decided by the seed; a generator
    of the loader's own goes on as it would alone, and is part of the state.

    Several processes read the same batches, and each takes its part of the rows; a loader with a
    `torch.utils.data.DistributedSampler` has parted them already.

    Args:
        loader: The loader.
        like: As for `Batches`.
    """

    def __init__(self, loader: Any, like: Tensor):
        super().__init__(like)
        self.loader = loader
        try:
            self.steps = len(loader)
        except TypeError as error:
            raise OptionError(
                "the loader has no length, so an epoch has no end",
                got=type(loader).__name__,
                do="Give it (or its dataset) a __len__: the number of its batches (of its rows).",
            ) from error
        if not self.steps:
            raise OptionError(
                "the loader is empty",
                got="0 batches",
                expected="at least one",
                do="Lower its batch_size, or leave out drop_last.",
            )
        self._sampler: Any = getattr(loader, "sampler", None)

    def epoch(self, seed: int) -> Iterator[Tensor]:
        parted = isinstance(self._sampler, DistributedSampler)
        if parted:
            self._sampler.set_epoch(seed % 2**32)
        stream = RandomStream(seed)
        with stream:
            batches = iter(self.loader)
        for step in range(self.steps):
            with stream:
                batch = next(batches, None)
            if batch is None:
                raise OptionError(
                    "the loader ended before its length",
                    got=f"{step} batches",
                    expected=self.steps,
                    do="It must give as many batches in every epoch: is it an iterator?",
                )
            rows = first_of(batch)
            yield self._placed(rows if parted else _own(rows))

    def all(self) -> Iterator[Tensor]:
        return (self._placed(first_of(batch)) for batch in self.loader)

    def generators(self) -> list[torch.Generator]:
        owners = (self.loader, self._sampler)
        own = [g for g in (getattr(owner, "generator", None) for owner in owners) if g is not None]
        return own[:1] if own and own[0] is own[-1] else own


def batches_of(data: Any, batch_size: int, like: Tensor, *, shuffle: bool = True) -> Batches:
    """Batches of a tensor, an array, a dataset or a loader, which has a ``batch_size`` of its own.

    Raises:
        OptionError, ShapeError: The data cannot be read, or there are none.
    """
    check_at_least("batch_size", batch_size, 1)
    if isinstance(data, TensorDataset):
        data = data.tensors[0]
    if isinstance(data, Tensor | np.ndarray):
        return TensorBatches(tensor_of(data), batch_size, like)
    if isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size)
    elif isinstance(data, Dataset):
        size = min(batch_size, len(data))  # type: ignore[arg-type]
        data = DataLoader(data, max(size, 1), shuffle=shuffle and size > 0, drop_last=shuffle)
    if isinstance(data, tuple | dict | str) or not isinstance(data, Iterable):
        raise OptionError(
            "the data cannot be read",
            got=type(data).__name__,
            expected="a tensor or an array [N, *x_shape], a Dataset, or a DataLoader",
            do="Labels are not needed: hand in the data alone." if isinstance(data, tuple | dict) else "",
        )
    return LoaderBatches(data, like)


def tensor_of(data: Any) -> Tensor:
    """Data ``[N, *x_shape]`` as a tensor."""
    try:
        tensor = torch.as_tensor(data)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError("the data are no numbers", got=str(error).splitlines()[0]) from error
    if not tensor.numel():
        raise ShapeError("there are no data", got=f"shape {tuple(tensor.shape)}")
    if tensor.is_complex() or not tensor.dim():
        raise ShapeError(
            "the data are no rows of real numbers",
            got=f"{tensor.dtype} of shape {tuple(tensor.shape)}",
            expected="[N, *x_shape]",
        )
    return tensor


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


def _own(rows: Tensor) -> Tensor:
    """This process's rows of a batch; a remainder that does not divide among the processes is left out."""
    _check_share(len(rows))
    each = len(rows) // distributed.count()
    return rows[distributed.rank() * each :][:each]


def _check_share(rows: int) -> None:
    if rows < distributed.count():
        raise OptionError(
            "a batch has fewer rows than there are processes",
            got=rows,
            expected=f">= {distributed.count()}",
            do="Raise batch_size, set drop_last on the loader, or start fewer processes.",
        )
