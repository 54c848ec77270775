"""Latents local to a plate: which sites they are, and how they stand on one vector for each datum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from implicitvi.errors import ModelError, did_you_mean
from implicitvi.numerics.types import Model
from implicitvi.pyro_model.enumeration import is_enumerated
from implicitvi.pyro_model.sites import Site, SiteLayout, latent_nodes


@dataclass(frozen=True)
class LocalLayout:
    """The latent sites of a model with a plate whose elements have latents of their own.

    Attributes:
        all: Every latent site, as the log joint takes them, ``u [D]``.
        shared: Those outside the plate, ``g [G]``.
        local: Those inside, with the plate's axis among the batch dimensions of each, counted from the right.
        size: Elements ``B`` of the plate in a run of the model.
        full_size: Elements ``N`` of the whole plate.
    """

    all: SiteLayout
    shared: SiteLayout
    local: tuple[tuple[Site, int], ...]
    size: int
    full_size: int

    @property
    def datum_dim(self) -> int:
        """Latent dimension ``D`` of one datum."""
        return sum(site.size // self.size for site, _ in self.local)

    def resized(self, size: int) -> LocalLayout:
        """The same sites in a plate of ``size`` elements."""
        resized = {site.name: (_resized(site, dim, size), dim) for site, dim in self.local}
        everything = (resized.get(site.name, (site, 0))[0] for site in self.all.sites)
        return LocalLayout(SiteLayout(tuple(everything)), self.shared, tuple(resized.values()), size, self.full_size)

    def join(self, g: Tensor | None, z: Tensor) -> Tensor:
        """Shared ``g [S, G]`` and local ``z [S, B, D]`` to ``u [S, G + B D]`` in the order of the sites."""
        parts = {} if g is None else {site.name: flat for site, flat in self.shared.split(g)}
        sizes = [site.size // self.size for site, _ in self.local]
        for (site, dim), flat in zip(self.local, z.split(sizes, -1), strict=True):
            rest, axis = _without(site, dim)
            value = flat.reshape(*flat.shape[:-1], *rest).movedim(1, axis)
            parts[site.name] = value.reshape(len(z), -1)
        return torch.cat([parts[site.name] for site in self.all.sites], -1)

    def part(self, u: Tensor) -> tuple[Tensor | None, Tensor]:
        """``u [S, G + B D]`` to ``g [S, G]``, ``None`` where nothing is shared, and ``z [S, B, D]``: undoes `join`."""
        flats = {site.name: flat for site, flat in self.all.split(u)}
        columns = []
        for site, dim in self.local:
            _, axis = _without(site, dim)
            value = flats[site.name].reshape(len(u), *site.unconstrained_shape)
            columns.append(value.movedim(axis, 1).reshape(len(u), self.size, -1))
        shared = [flats[site.name] for site in self.shared.sites]
        return (torch.cat(shared, -1) if shared else None), torch.cat(columns, -1)


def _resized(site: Site, dim: int, size: int) -> Site:
    """A site whose plate, at batch dimension ``dim``, has ``size`` elements."""
    shape, unconstrained = list(site.shape), list(site.unconstrained_shape)
    shape[dim - site.event_dim] = size
    unconstrained[dim - (len(unconstrained) - len(shape) + site.event_dim)] = size
    return replace(site, shape=tuple(shape), unconstrained_shape=tuple(unconstrained))


def _without(site: Site, dim: int) -> tuple[tuple[int, ...], int]:
    """Unconstrained shape of a site without its plate, and the plate's axis there, counted from the right."""
    shape = list(site.unconstrained_shape)
    axis = dim - (len(shape) - len(site.shape) + site.event_dim)
    del shape[axis]
    return tuple(shape), axis


@dataclass(frozen=True)
class PlateRun:
    """One run of a model, read for a plate.

    Attributes:
        layout: The latent sites.
        indices: Elements ``[B]`` of the plate that were in the run.
        observed: What the model observes inside the plate, one row for each element, ``[B, C]``; ``None`` for nothing.
        u: The latents of the run on one vector, ``[G + B D]``.
        frames: The plates of each latent site.
    """

    layout: LocalLayout
    indices: Tensor
    observed: Tensor | None
    u: Tensor
    frames: dict[str, tuple[Any, ...]]


def read_plate(model: Model, plate: str, *args: Any, **kwargs: Any) -> PlateRun:
    """Run the model once and read what there is inside a plate.

    Raises:
        ModelError: There is no such plate, or it has no latent site, or cannot be amortized.
    """
    with poutine.block():
        trace: Any = poutine.trace(model).get_trace(*args, **kwargs)
    frames = {f.name: f for node in trace.nodes.values() for f in node.get("cond_indep_stack", ())}
    if plate not in frames:
        raise ModelError(
            "the model has no plate of the name to amortize",
            got=repr(plate),
            expected=f"one of {', '.join(map(repr, sorted(frames))) or 'none: it has no plate'}",
            do=did_you_mean(plate, sorted(frames)),
            faq="a-latent-for-every-row",
        )
    frame = frames[plate]
    if not frame.vectorized:
        raise ModelError(f"plate {plate!r} is sequential", do="Write it as a context: with pyro.plate(...).")
    latents = dict(latent_nodes(trace))
    inside = {name for name, node in latents.items() if frame in node["cond_indep_stack"]}
    if not inside:
        raise ModelError(f"plate {plate!r} has no latent site inside", do="Leave amortize= out of the guide.")
    if any(map(is_enumerated, latents.values())):
        raise ModelError(
            "a guide amortized over a plate does not sum discrete sites out",
            do="Sum them out by hand, for instance with dist.MixtureSameFamily.",
            faq="a-discrete-latent-is-refused",
        )
    everything = SiteLayout.from_trace(trace)
    layout = LocalLayout(
        all=everything,
        shared=SiteLayout(tuple(s for s in everything.sites if s.name not in inside)),
        local=tuple((s, frame.dim) for s in everything.sites if s.name in inside),
        size=frame.size,
        full_size=frame.full_size or frame.size,
    )
    rows = [_rows(node, frame) for node in trace.nodes.values() if _is_data(node, frame)]
    return PlateRun(
        layout,
        trace.nodes[plate]["value"],
        torch.cat(rows, -1) if rows else None,
        everything.pack({name: node["value"] for name, node in latents.items()}),
        {name: node["cond_indep_stack"] for name, node in latents.items()},
    )


def _is_data(node: Any, frame: Any) -> bool:
    return bool(
        node["type"] == "sample"
        and node["is_observed"]
        and frame in node["cond_indep_stack"]
        and not site_is_subsample(node)
    )


def _rows(node: Any, frame: Any) -> Tensor:
    """The value of a site, one row for each element of the plate: ``[B, ...]``."""
    value: Tensor = node["value"].expand(node["fn"].shape())
    return value.movedim(frame.dim - node["fn"].event_dim, 0).reshape(frame.size, -1)


def by_datum(trace: Any, log_dets: dict[str, Tensor], plate: str) -> Tensor:
    """A scored trace to the log density outside a plate, then of each element in it: ``[1 + B]`` in nats.

    The weight ``N / B`` of a subsampled plate is taken out of its elements.

    Args:
        trace: Pyro trace whose nodes have a ``log_prob``.
        log_dets: ``log|J| [*batch shape]`` of the latent sites, by name.
        plate: Name of the plate.
    """
    outside: list[Tensor] = []
    inside: list[Tensor] = []
    for name, node in trace.nodes.items():
        if "log_prob" not in node:
            continue
        frame = next((f for f in node["cond_indep_stack"] if f.name == plate), None)
        log_det = [log_dets[name]] if name in log_dets else []
        if frame is None:
            outside += [term.sum() for term in (node["log_prob"], *log_det)]
        else:
            share = frame.size / (frame.full_size or frame.size)
            terms = (share * node["log_prob"], *log_det)
            inside += [term.movedim(frame.dim, 0).reshape(frame.size, -1).sum(1) for term in terms]
    each = torch.stack(inside).sum(0)
    return torch.cat([sum(outside, each.new_zeros(()))[None], each])
