"""Where the minibatches of an amortized fit come from, and what the model makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from implicitvi.errors import ShapeError
from implicitvi.inference.amortization import Amortization
from implicitvi.numerics.types import Model
from implicitvi.pyro_model.log_joint import LogJoint
from implicitvi.pyro_model.plates import LocalLayout, PlateRun, read_plate
from implicitvi.pyro_model.sites import SiteLayout
from implicitvi.pyro_model.subsampling import PinnedSubsample
from implicitvi.pyro_model.tracing import PARTICLE_ERRORS, unvalidated


@dataclass(frozen=True)
class Minibatch:
    """What a turn looks at.

    Attributes:
        rows: Features ``[B, C]``.
        weight: What each row counts for in the objective.
        args: The model's arguments, of the datasets in the batch where the guide is amortized over them.
        kwargs: Its keyword arguments.
        layout: The latent sites of a run on the minibatch.
        indices: The elements ``[B]`` of the plate that make up the minibatch; ``None`` for all.
        picked: Rows of the minibatch that are looked at; ``None`` for all. The others are in the model's run, without
            a say.
    """

    rows: Tensor
    weight: float
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layout: LocalLayout | None = None
    indices: Tensor | None = None
    picked: Tensor | None = None

    def pick(self, count: int) -> Minibatch:
        """The same minibatch with at most ``count`` rows of it looked at."""
        if self.layout is None or count >= len(self.rows):
            return self
        picked = torch.randperm(len(self.rows), device=self.rows.device)[:count]
        return replace(self, rows=self.rows[picked], picked=picked)

    def values(self, g: Tensor | None, z: Tensor, layout: SiteLayout) -> dict[str, Tensor]:
        """Values of the latent sites in the first of draws ``g [S, G]`` and ``z [S, B, D]``.

        Of the first dataset where the guide is amortized over them; ``layout`` is that of one.
        """
        if self.layout is None:
            return layout.unpack(z[0, 0])[0]
        return self.layout.all.unpack(self.layout.join(g, z)[0])[0]


class Source(Protocol):
    """What an amortized objective learns from."""

    def batch(self, *args: Any, **kwargs: Any) -> Minibatch:
        """The minibatch of a turn, from the model's arguments."""

    def terms(self, g: Tensor | None, z: Tensor, batch: Minibatch) -> Tensor:
        """``log p`` of draws ``g [S, G]`` and ``z [S, B, D]``: shared, then of each datum, ``[S, 1 + B]`` in nats."""

    def how(self) -> str:
        """How the model is scored, and why."""

    @property
    def log_joint(self) -> LogJoint:
        """The log joint in use."""


class PlateSource:
    """Minibatches of a plate, and the log joint of shared and local latents term by term.

    Args:
        model: The Pyro model.
        amortization: The plate, and what is known of each of its elements.
        mode: How the model is scored, as in `LogJoint`.
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

    def read(self, *args: Any, **kwargs: Any) -> PlateRun:
        """A run of the model on a fresh minibatch; the last one again where nothing can have changed."""
        leaves = tuple(tree_leaves((args, kwargs)))
        # what is in a tensor may have changed, and data that no argument brings may too
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

    def batch(self, *args: Any, **kwargs: Any) -> Minibatch:
        """The minibatch of a turn."""
        run = self.read(*args, **kwargs)
        layout = run.layout
        rows = self.amortization.rows(run, *args, **kwargs)
        if len(rows) != layout.size:
            rows = rows[run.indices]
        indices = None if layout.size == layout.full_size else run.indices
        return Minibatch(rows, layout.full_size / layout.size, args, kwargs, layout, indices)

    def terms(self, g: Tensor | None, z: Tensor, batch: Minibatch) -> Tensor:
        """``log p`` of what is shared, then of each datum: ``[S, 1 + B]`` in nats."""
        layout = batch.layout
        assert layout is not None
        if layout.size not in self._log_joints:  # minibatches of another size are another model
            self._log_joints[layout.size] = LogJoint(self.model, layout.all, mode=self.mode, plate=self.plate)
        if batch.picked is not None:
            place = torch.arange(layout.size, device=z.device) % len(batch.picked)
            place[batch.picked] = torch.arange(len(batch.picked), device=z.device)
            z = z[:, place]
        pinned = {} if batch.indices is None else {self.plate: batch.indices}
        with self.minibatch.pinned(pinned):
            terms = self._log_joints[layout.size](layout.join(g, z), *batch.args, **batch.kwargs)
        if batch.picked is None:
            return terms
        return torch.cat([terms[:, :1], terms[:, 1 + batch.picked]], 1)

    @property
    def log_joint(self) -> LogJoint:
        """The log joint of the last size of minibatch."""
        return list(self._log_joints.values())[-1]

    def how(self) -> str:
        """How the model is scored, and why."""
        return "; ".join(f"{each.mode} ({each.reason})" for each in self._log_joints.values())


class DatasetSource:
    """Minibatches of whole datasets: every tensor among the model's arguments has one more dimension, in front.

    Args:
        model: The Pyro model of one dataset.
        amortization: What the network is shown of a dataset.
        layout: The latent sites.
        mode: How the model is scored, as in `LogJoint`.
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

    def batch(self, *args: Any, **kwargs: Any) -> Minibatch:
        """The minibatch of a turn: datasets drawn without replacement, or all of them where they are few."""
        count = count_datasets(args, kwargs)
        if count > self.num_datasets:
            which = torch.randperm(count)[: self.num_datasets]
            args, kwargs = tree_map_only(Tensor, lambda t: t[which.to(t.device)], (args, kwargs))
            count = self.num_datasets
        each = [dataset(i, args, kwargs) for i in range(count)]
        rows = torch.cat([self.amortization.row(*a, **k) for a, k in each])
        return Minibatch(rows, 1 / count, args, kwargs)

    def terms(self, g: Tensor | None, z: Tensor, batch: Minibatch) -> Tensor:
        """Zeros, then ``log p(x, z)`` of each dataset: ``[S, 1 + B]`` in nats."""
        if self._nests is None:
            self._choose(z, batch)
        scores = self._score(z, batch)
        return torch.cat([scores.new_zeros(len(z), 1), scores], 1)

    def how(self) -> str:
        """How the model is scored, and why."""
        whole = "" if self._nests else ", one dataset at a time"
        return f"{self.log_joint.mode} ({self.log_joint.reason}){whole}"

    def _choose(self, z: Tensor, batch: Minibatch) -> None:
        """Score datasets together only where that has given what they score one by one."""
        first = dataset(0, batch.args, batch.kwargs)
        self.log_joint.choose(z[:, 0].detach(), *first[0], **first[1])
        self._nests = False
        if self.log_joint.mode != "vmap":
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
        leaves, form = tree_flatten((batch.args, batch.kwargs))

        def one(z: Tensor, *leaves: Any) -> Tensor:
            args, kwargs = tree_unflatten(leaves, form)
            return self.log_joint.vmap(z, *args, **kwargs)

        dims = tuple(0 if isinstance(leaf, Tensor) else None for leaf in leaves)
        with unvalidated():
            scores: Tensor = torch.func.vmap(one, (1, *dims), out_dims=1, randomness="same")(z, *leaves)
        return scores

    def _one_by_one(self, z: Tensor, batch: Minibatch) -> Tensor:
        each = [dataset(i, batch.args, batch.kwargs) for i in range(z.shape[1])]
        return torch.stack([self.log_joint(z[:, i], *a, **k) for i, (a, k) in enumerate(each)], 1)


def count_datasets(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many datasets are stacked in the tensors among the model's arguments."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    counts = {len(t) if t.dim() else 0 for t in tensors}
    if len(counts) != 1 or counts == {0}:
        raise ShapeError(
            "a guide amortized over datasets is trained on stacks of them",
            got=[tuple(t.shape) for t in tensors] or "no tensor",
            expected="tensors [M, ...] of M datasets each",
            do="Stack the arguments of the datasets with torch.stack; guide.sample takes those of one.",
        )
    return counts.pop()


def dataset(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the ``i``-th of stacked datasets."""
    one: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(Tensor, lambda t: t[i], (args, kwargs))
    return one
