"""Batches on the device from a user's data, the same ones after a resume."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from implicitvi import distributed
from implicitvi.errors import OptionError, ShapeError, check_whole, reason_of
from implicitvi.rng import RandomStream
from implicitvi.vae.identity import digest_of

Transform = Callable[[Tensor], Tensor]
Stream = Generator[Tensor, None, None]
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
COMPUTABLE = (*FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


class Batches(ABC):
    """A source of batches ``[B, *x_shape]``, on the device and in the dtype of the tensor ``like`` of the model."""

    steps: int  # of an epoch

    def __init__(self, like: Tensor):
        self.like = like

    @abstractmethod
    def epoch(self, seed: int) -> Stream:
        """Yield the batches of an epoch in the order of ``seed``: of each the rows of this process."""

    @abstractmethod
    def all(self) -> Stream:
        """Yield all data once, in batches with all their rows."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state on which the next epochs depend besides their seeds."""
        return {"generators": [generator.get_state() for generator in self.generators()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        for generator, saved in zip(self.generators(), state["generators"], strict=True):
            generator.set_state(saved)

    def generators(self) -> list[torch.Generator]:
        """Return the user's generators that decide the order."""
        return []

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a text that identifies the data as far as a look at a few of them can."""

    def _to_device(self, rows: Tensor, *, copy: bool = True) -> Tensor:
        """Return rows on the device; a copy, unless they are one already: a transform may change it in place."""
        return rows.to(self.like, non_blocking=True, copy=copy)


class TensorBatches(Batches):
    """A tensor ``[N, *x_shape]`` on the device, whose rows are shuffled for every epoch.

    A batch has ``batch_size`` rows over all processes, or all rows if there are fewer; an epoch leaves out rows that do
    not fill a last batch. Integers, such as the bytes of images, become floats batch by batch.
    """

    def __init__(self, data: Tensor, batch_size: int, like: Tensor):
        super().__init__(like)
        self.data = data.to(like.device)
        self.batch_size = _per_process(min(batch_size, len(data))) * distributed.count()
        self.steps = len(data) // self.batch_size

    def epoch(self, seed: int) -> Stream:
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(seed))
        batches = order[: self.steps * self.batch_size].view(self.steps, distributed.count(), -1)
        for rows in batches[:, distributed.rank()].to(self.data.device):
            yield self._to_device(self.data[rows], copy=False)

    def all(self) -> Stream:
        yield from map(self._to_device, self.data.split(self.batch_size))

    def fingerprint(self) -> str:
        return f"{len(self.data)} rows, {digest_of(self.data[:: max(1, len(self.data) // 1000)])}"


class LoaderBatches(Batches):
    """A `torch.utils.data.DataLoader`, or any object with a length that can be iterated repeatedly.

    Of batches that are tuples the first part is used: labels are not needed. A last batch that is not full is used as
    it is. The seed decides the order, and all other numbers that the loader draws from torch's generators; a generator
    of the loader's own continues as it would without a seed, and is part of the state.

    Several processes read the same batches, and each takes its part of the rows; a loader with a
    `torch.utils.data.DistributedSampler` has divided them already.
    """

    def __init__(self, loader: Any, like: Tensor):
        super().__init__(like)
        self.loader = loader
        try:
            self.steps = len(loader)
        except TypeError as error:
            do = "Give it (or its dataset) a __len__: the number of its batches (of its rows)."
            kind = f"{type(loader).__name__} without"
            raise OptionError(f"A loader must have a length, at which an epoch ends, got {kind}. {do}") from error
        if not self.steps:
            raise OptionError("The loader is empty. Lower its batch_size, or leave out drop_last.")
        self._sampler: Any = getattr(loader, "sampler", None)

    def epoch(self, seed: int) -> Stream:
        divided = isinstance(self._sampler, DistributedSampler)
        if divided:
            self._sampler.set_epoch(seed % 2**32)
        stream = RandomStream(seed)
        with stream:
            batches = iter(self.loader)
        try:
            for step in range(self.steps):
                with stream:
                    batch = next(batches, None)
                if batch is None:
                    given = f"{self.steps} batches, its length, in every epoch, got {step}"
                    raise OptionError(f"The loader must give {given}. Is it an iterator?")
                rows = first_of(batch)
                yield self._to_device(rows if divided else _own(rows))
        finally:
            self._end_workers(batches)

    def all(self) -> Stream:
        batches = iter(self.loader)
        try:
            for batch in batches:
                yield self._to_device(first_of(batch))
        finally:
            self._end_workers(batches)

    def fingerprint(self) -> str:
        """Return a text about three items of a dataset or list, without a trace in torch's and numpy's generators."""
        items = getattr(self.loader, "dataset", self.loader)
        name = type(items).__name__
        outside = np.random.get_state(), random.getstate()
        try:
            first, again = (self._glance(items) for _ in range(2))
            seen = first if first == again else "different whenever they are looked at"
        except Exception:  # a dataset without numbered rows, or whose batches are made by a function of its own
            seen = "not looked at"
        finally:
            np.random.set_state(outside[0])
            random.setstate(outside[1])
        return f"{len(items) if isinstance(items, Sized) else 'unnumbered'} items of a {name}, {seen}"

    @staticmethod
    def _glance(items: Any) -> str:
        np.random.seed(0)
        random.seed(0)
        with RandomStream(0):
            return digest_of(*(first_of(items[i]) for i in (0, len(items) // 2, len(items) - 1)))

    def _end_workers(self, batches: Any) -> None:
        """End the processes of a loader's iterator now: a traceback may keep it alive, and them with it."""
        end = getattr(batches, "_shutdown_workers", None)  # torch has no public way
        if end is not None and not getattr(self.loader, "persistent_workers", False):
            end()

    def generators(self) -> list[torch.Generator]:
        both = (getattr(owner, "generator", None) for owner in (self.loader, self._sampler))
        return list(dict.fromkeys(generator for generator in both if generator is not None))


def batches_of(data: Any, batch_size: int, like: Tensor, *, shuffle: bool = True) -> Batches:
    """Return batches of a tensor, an array, a dataset, or a loader, which has a ``batch_size`` of its own."""
    check_whole("batch_size", batch_size)
    if isinstance(data, TensorDataset):
        data = data.tensors[0]
    if isinstance(data, Tensor | np.ndarray):
        return TensorBatches(tensor_of(data), batch_size, like)
    if isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size)
    elif isinstance(data, Dataset):
        size = min(batch_size, len(data) if isinstance(data, Sized) else 0)
        data = DataLoader(data, max(size, 1), shuffle=shuffle and size > 0, drop_last=shuffle)
    if isinstance(data, tuple | dict | str) or not isinstance(data, Iterable):
        hint = "Labels are not needed: pass the data alone." if isinstance(data, tuple | dict) else ""
        kinds = "a tensor or an array [N, *x_shape], a Dataset or a DataLoader"
        raise OptionError.must_be("Data", kinds, type(data).__name__, hint)
    return LoaderBatches(data, like)


def tensor_of(data: Any, what: str = "Data") -> Tensor:
    """Return ``data [N, ...]``, named ``what`` in errors, as a tensor that torch can compute with."""
    if isinstance(data, np.ma.MaskedArray):
        raise OptionError.must_be(what, "an array without a mask", "a masked array", "Drop or impute masked entries.")
    try:
        tensor = torch.as_tensor(data).detach()
        if tensor.layout is torch.strided and tensor.dtype not in COMPUTABLE and not tensor.is_complex():
            tensor = tensor.to(torch.float64)  # such as uint16, of which torch knows little more than the name
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{what} must be numbers. torch says: {reason_of(error)}") from error
    if tensor.is_inference():
        tensor = tensor.clone()  # an ordinary one, from which gradients can start
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        got = "a meta tensor" if tensor.is_meta else "a nested tensor" if tensor.is_nested else f"{tensor.layout}"
        raise ShapeError.must_be(what, "a dense tensor with values", got, "x.to_dense() makes one of a sparse tensor.")
    if tensor.is_complex() or not tensor.dim():
        got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise ShapeError.must_be(what, "rows of real numbers [N, *x_shape]", got)
    if not tensor.numel():
        raise ShapeError.must_be(what, "at least one row", f"shape {tuple(tensor.shape)}")
    return tensor


def first_of(batch: Any) -> Tensor:
    """Return the data of a loader's batch: the first part of a tuple."""
    kinds = "tensors, or tuples whose first part is the data"
    if isinstance(batch, list | tuple):
        if not batch:
            raise OptionError.must_be("The loader's batches", kinds, "an empty tuple")
        batch = batch[0]
    if isinstance(batch, dict):
        keys = f"a dictionary with keys {sorted(map(str, batch))}"
        raise OptionError.must_be("The loader's batches", kinds, keys, "Pass collate_fn=… to the loader, or wrap it.")
    return tensor_of(batch)


def _own(rows: Tensor) -> Tensor:
    """Return this process's rows of a batch, without the remainder of the division among processes."""
    each = _per_process(len(rows))
    return rows[distributed.rank() * each :][:each]


def _per_process(rows: int) -> int:
    if rows < (count := distributed.count()):
        do = "Raise batch_size, set drop_last on the loader, or start fewer processes."
        raise OptionError.must_be("Rows of a batch", f"at least as many as processes, {count}", rows, do)
    return rows // count
