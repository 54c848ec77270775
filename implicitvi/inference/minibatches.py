"""Draw the minibatches of an amortized fit and score the model on them, datum by datum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from implicitvi.errors import ModelError, ShapeError
from implicitvi.inference.amortization import Amortization, rows_of_run
from implicitvi.numerics.types import Model
from implicitvi.pyro_model.arguments import Arguments
from implicitvi.pyro_model.log_joint import LogJoint
from implicitvi.pyro_model.plates import LocalLayout, PlateRun, read_plate
from implicitvi.pyro_model.sites import SiteLayout
from implicitvi.pyro_model.subsampling import PinnedSubsample
from implicitvi.pyro_model.tracing import PARTICLE_ERRORS, unvalidated


@dataclass(frozen=True)
class Minibatch:
    """The data of one turn.

    Attributes:
        rows: Features ``[B, C]``.
        weight: Weight of each row in the objective.
        arguments: The model's arguments, those of the datasets in the batch where the guide is amortized over datasets.
        layout: The latent sites of a run on the minibatch.
        indices: Elements ``[B]`` of the plate in the minibatch; ``None`` for all.
        picked: Rows of the minibatch that count; ``None`` for all. The model's run has the others too.
    """

    rows: Tensor
    weight: float
    arguments: Arguments
    layout: LocalLayout | None = None
    indices: Tensor | None = None
    picked: Tensor | None = None

    def pick(self, count: int) -> Minibatch:
        """Return the same minibatch with at most ``count`` rows that count."""
        if self.layout is None or count >= len(self.rows):
            return self
        picked = torch.randperm(len(self.rows), device=self.rows.device)[:count]
        return replace(self, rows=self.rows[picked], picked=picked)

    def values(self, g: Tensor | None, z: Tensor, layout: SiteLayout) -> dict[str, Tensor]:
        """Return the values of the latent sites in the first of draws ``g [S, G]`` and ``z [S, B, D]``.

        A guide amortized over datasets gives those of the first dataset, by the ``layout`` of one.
        """
        if self.layout is None:
            return layout.unpack(z[0, 0])[0]
        return self.layout.all.unpack(self.layout.join(g, z)[0])[0]


class MinibatchSource(Protocol):
    """A source of the minibatches that an amortized objective learns from."""

    def batch(self, arguments: Arguments) -> Minibatch:
        """Return the minibatch of a turn, from the model's arguments."""

    def terms(self, g: Tensor | None, z: Tensor, batch: Minibatch) -> Tensor:
        """Return ``log p`` of ``g [S, G]`` and ``z [S, B, D]``, shared, then of each datum: ``[S, 1 + B]`` in nats."""

    def scoring(self) -> str:
        """Return the mode of scoring the model, and the reason for it."""

    @property
    def log_joint(self) -> LogJoint:
        """The log joint in use."""


class PlateMinibatches:
    """A source of minibatches of a plate, with the log joint of shared and local latents term by term.

    Args:
        model: The Pyro model.
        amortization: The plate, and the features of its elements.
        mode: Mode of scoring the model, as in `LogJoint`.
    """

    def __init__(self, model: Model, amortization: Amortization, *, mode: str = "auto"):
        assert amortization.plate is not None
        self.minibatch = PinnedSubsample()
        self.model = self.minibatch(model)
        self.plate = amortization.plate
        self.amortization = amortization
        self.mode = mode
        self._log_joints: dict[int, LogJoint] = {}
        self._last: tuple[tuple[Any, ...], list[int], PlateRun] | None = None

    def read(self, arguments: Arguments) -> PlateRun:
        """Run the model on a new minibatch; return the last run again where nothing can have changed."""
        args, kwargs = arguments.args, arguments.kwargs
        leaves = tuple(tree_leaves((args, kwargs)))
        # the entries of a tensor may have changed, and so may data that are not among the arguments
        versions = [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
        if self._last is not None and versions:
            seen, then, run = self._last
            whole = run.layout.size == run.layout.full_size
            same = len(seen) == len(leaves) and all(map(is_, seen, leaves))
            if whole and same and then == versions:
                return run
        with self.minibatch.pinned():
            run = read_plate(self.model, self.plate, *args, **kwargs)
        self._last = (leaves, versions, run)
        return run

    def batch(self, arguments: Arguments) -> Minibatch:
        """Return a minibatch of the plate."""
        run = self.read(arguments)
        layout = run.layout
        rows = rows_of_run(self.amortization.rows(run, *arguments.args, **arguments.kwargs), run)
        indices = None if layout.size == layout.full_size else run.indices
        return Minibatch(rows, layout.full_size / layout.size, arguments, layout, indices)

    def terms(self, g: Tensor | None, z: Tensor, batch: Minibatch) -> Tensor:
        """Return ``log p`` of the shared part, then of each datum: ``[S, 1 + B]`` in nats.

        Raises:
            ModelError: The model draws minibatches of its own, so each run has other data than the features.
        """
        layout = batch.layout
        assert layout is not None
        if layout.size not in self._log_joints:  # a model of its own for minibatches of each size
            self._log_joints[layout.size] = LogJoint(self.model, layout.all, mode=self.mode, plate=self.plate)
        if batch.picked is not None:
            place = torch.arange(layout.size, device=z.device) % len(batch.picked)
            place[batch.picked] = torch.arange(len(batch.picked), device=z.device)
            z = z[:, place]
        pinned = {} if batch.indices is None else {self.plate: batch.indices}
        log_joint, call = self._log_joints[layout.size], batch.arguments
        with self.minibatch.pinned(pinned):
            terms = log_joint(layout.join(g, z), *call.args, **call.kwargs)
        for name, (_, part) in log_joint.own_minibatches.items():
            what, expected = f"the data of {name!r}", "those whose features the guide sees"
            got = f"{part} others in the next run of the model, which draws them itself"
            advice = f"Let Pyro draw them: with pyro.plate({self.plate!r}, size, subsample_size={part}) as index."
            raise ModelError.must_be(what, expected, got, advice, faq="the-model-draws-its-own-minibatch")
        if batch.picked is None:
            return terms
        return torch.cat([terms[:, :1], terms[:, 1 + batch.picked]], 1)

    @property
    def log_joint(self) -> LogJoint:
        """The log joint of the last size of minibatch."""
        return list(self._log_joints.values())[-1]

    def scoring(self) -> str:
        """Return the mode of scoring the model, and the reason for it."""
        return "; ".join(f"{each.mode} ({each.reason})" for each in self._log_joints.values())


class DatasetMinibatches:
    """A source of minibatches of whole datasets: each tensor among the model's arguments has one more axis, in front.

    Args:
        model: The Pyro model of one dataset.
        amortization: The features of a dataset.
        layout: The latent sites.
        mode: Mode of scoring the model, as in `LogJoint`.
        num_datasets: Datasets in a minibatch.
    """

    def __init__(
        self,
        model: Model,
        amortization: Amortization,
        layout: SiteLayout,
        *,
        mode: str = "auto",
        num_datasets: int = 64,
    ):
        self.log_joint = LogJoint(model, layout, mode=mode)
        self.amortization = amortization
        self.num_datasets = num_datasets
        self._nests: bool | None = None

    def batch(self, arguments: Arguments) -> Minibatch:
        """Return datasets drawn without replacement, or all of them where they are few."""
        count = count_datasets(arguments)
        if count > self.num_datasets:
            which = torch.randperm(count)[: self.num_datasets]
            arguments = arguments.map(lambda t: t[which.to(t.device)])
            count = self.num_datasets
        each = [dataset(i, arguments) for i in range(count)]
        rows = torch.cat([self.amortization.row(*one.args, **one.kwargs) for one in each])
        return Minibatch(rows, 1 / count, arguments)

    def terms(self, g: Tensor | None, z: Tensor, batch: Minibatch) -> Tensor:
        """Return zeros, then ``log p(x, z)`` of each dataset: ``[S, 1 + B]`` in nats."""
        if self._nests is None:
            self._choose(z, batch)
        scores = self._score(z, batch)
        return torch.cat([scores.new_zeros(len(z), 1), scores], 1)

    def scoring(self) -> str:
        """Return the mode of scoring the model, and the reason for it."""
        mode, whole = ("vmap", "") if self._nests else (self.log_joint.mode, ", one dataset at a time")
        return f"{mode} ({self.log_joint.reason}){whole}"

    def _choose(self, z: Tensor, batch: Minibatch) -> None:
        """Score datasets together only where that gives the scores of one by one."""
        first = dataset(0, batch.arguments)
        self.log_joint.choose(z[:, 0].detach(), *first.args, **first.kwargs)
        self._nests = False
        if not self.log_joint.vmaps:
            return
        with torch.no_grad():
            try:
                self._nests = bool(
                    torch.allclose(self._together(z, batch), self._one_by_one(z, batch), rtol=1e-4, equal_nan=True)
                )
            except Exception:  # whatever a model does under two vmaps, one by one is right
                return

    def _score(self, z: Tensor, batch: Minibatch) -> Tensor:
        if self._nests:
            try:
                return self._together(z, batch)
            except PARTICLE_ERRORS:
                pass
        return self._one_by_one(z, batch)

    def _together(self, z: Tensor, batch: Minibatch) -> Tensor:
        leaves, form = tree_flatten((batch.arguments.args, batch.arguments.kwargs))

        def one(z: Tensor, *leaves: Any) -> Tensor:
            args, kwargs = tree_unflatten(leaves, form)
            return self.log_joint.vmap(z, *args, **kwargs)

        dims = tuple(0 if isinstance(leaf, Tensor) else None for leaf in leaves)
        with unvalidated():
            scores: Tensor = torch.func.vmap(one, (1, *dims), out_dims=1, randomness="same")(z, *leaves)
        return scores

    def _one_by_one(self, z: Tensor, batch: Minibatch) -> Tensor:
        each = [dataset(i, batch.arguments) for i in range(z.shape[1])]
        return torch.stack([self.log_joint(z[:, i], *one.args, **one.kwargs) for i, one in enumerate(each)], 1)


def count_datasets(arguments: Arguments) -> int:
    """Return the number of datasets that are stacked in the tensors among the model's arguments.

    Raises:
        ShapeError: There is no tensor, or they have different numbers.
    """
    tensors = arguments.tensors()
    counts = {len(t) if t.dim() else 0 for t in tensors}
    if len(counts) != 1 or counts == {0}:
        got = [tuple(t.shape) for t in tensors] or "no tensor"
        advice = "Stack the arguments of the datasets with torch.stack; guide.sample takes those of one."
        raise ShapeError.must_be("stacked datasets", "tensors [M, ...] of M datasets each", got, advice)
    return counts.pop()


def dataset(i: int, arguments: Arguments) -> Arguments:
    """Return the arguments of the ``i``-th of stacked datasets."""
    return arguments.map(lambda t: t[i])
