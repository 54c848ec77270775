"""Read the latents local to a plate, and lay them out on one vector for each datum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from implicitvi.errors import ModelError, did_you_mean
from implicitvi.numerics.types import Model
from implicitvi.pyro_model.checks import FillImproper
from implicitvi.pyro_model.enumeration import is_enumerated
from implicitvi.pyro_model.sites import Site, SiteLayout
from implicitvi.pyro_model.subsampling import full_size
from implicitvi.pyro_model.tracing import is_deterministic, is_scored, latent_nodes


@dataclass(frozen=True)
class LocalLayout:
    """The latent sites of a model, split into those shared and those local to a plate.

    Attributes:
        all: Every latent site, in the order of the log joint, ``u [G + B D]``.
        shared: Sites outside the plate, ``g [G]``.
        local: Sites inside, each with the plate's axis among its batch dimensions, counted from the right.
        size: Number of elements ``B`` of the plate in a run of the model.
        full_size: Number of elements ``N`` of the whole plate.
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
        """Return the layout of the same sites in a plate of ``size`` elements."""
        resized = {site.name: (_resized(site, dim, size), dim) for site, dim in self.local}
        everything = SiteLayout(tuple(resized.get(site.name, (site, 0))[0] for site in self.all.sites))
        return replace(self, all=everything, local=tuple(resized.values()), size=size)

    def join(self, g: Tensor | None, z: Tensor) -> Tensor:
        """Join shared ``g [S, G]`` and local ``z [S, B, D]`` to ``u [S, G + B D]``, in the order of the sites."""
        parts = {} if g is None else {site.name: flat for site, flat in self.shared.split(g)}
        sizes = [site.size // self.size for site, _ in self.local]
        for (site, dim), flat in zip(self.local, z.split(sizes, -1), strict=True):
            rest, axis = list(site.unconstrained_shape), _plate_axis(site, dim)
            del rest[axis]
            parts[site.name] = flat.reshape(*flat.shape[:-1], *rest).movedim(1, axis).reshape(len(z), -1)
        return torch.cat([parts[site.name] for site in self.all.sites], -1)

    def part(self, u: Tensor) -> tuple[Tensor | None, Tensor]:
        """Part ``u [S, G + B D]`` into ``g [S, G]``, ``None`` if nothing is shared, and ``z [S, B, D]``."""
        flats = {site.name: flat for site, flat in self.all.split(u)}
        values = (site.unflatten(flats[site.name]).movedim(_plate_axis(site, dim), 1) for site, dim in self.local)
        columns = [value.reshape(len(u), self.size, -1) for value in values]
        shared = [flats[site.name] for site in self.shared.sites]
        return (torch.cat(shared, -1) if shared else None), torch.cat(columns, -1)


def _resized(site: Site, dim: int, size: int) -> Site:
    """Return a site whose plate, at batch dimension ``dim``, has ``size`` elements."""
    shape, unconstrained = list(site.shape), list(site.unconstrained_shape)
    shape[dim - site.event_dim] = size
    unconstrained[_plate_axis(site, dim)] = size
    return replace(site, shape=tuple(shape), unconstrained_shape=tuple(unconstrained))


def _plate_axis(site: Site, dim: int) -> int:
    """Return the axis of a plate, at batch dimension ``dim``, in the unconstrained shape, counted from the right."""
    return dim - (len(site.unconstrained_shape) - len(site.shape) + site.event_dim)


@dataclass(frozen=True)
class PlateRun:
    """A run of a model, read for a plate.

    Attributes:
        layout: The latent sites.
        indices: Indices ``[B]`` of the plate's elements in the run.
        observed: Observed values inside the plate, one row for each element, ``[B, C]``; ``None`` if there are none.
        u: The latents of the run as one vector, ``[G + B D]``.
        frames: The plates of each latent site.
    """

    layout: LocalLayout
    indices: Tensor
    observed: Tensor | None
    u: Tensor
    frames: dict[str, tuple[Any, ...]]


def read_plate(model: Model, plate: str, *args: Any, **kwargs: Any) -> PlateRun:
    """Run the model once and read the sites inside a plate.

    Raises:
        ModelError: There is no such plate, or it has no latent site, or cannot be amortized.
    """
    with poutine.block():
        trace: Any = poutine.trace(FillImproper()(model)).get_trace(*args, **kwargs)
    frames = {f.name: f for node in trace.nodes.values() for f in node.get("cond_indep_stack", ())}
    if plate not in frames:
        expected = f"one of {', '.join(map(repr, sorted(frames)))}" if frames else "left out, as the model has no plate"
        hint = did_you_mean(plate, sorted(frames))
        raise ModelError.must_be("The plate to amortize", expected, repr(plate), hint, faq="a-latent-for-every-row")
    frame = frames[plate]
    if not frame.vectorized:
        raise ModelError(f"Plate {plate!r} must not be sequential. Write it as a context: with pyro.plate(...).")
    latents = dict(latent_nodes(trace))
    inside = {name for name, node in latents.items() if frame in node["cond_indep_stack"]}
    if not inside:
        raise ModelError(f"Plate {plate!r} has no latent site inside. Leave amortize= out of the guide.")
    if any(map(is_enumerated, latents.values())):
        message = (
            "A guide amortized over a plate does not sum discrete sites out. Sum by hand (dist.MixtureSameFamily)."
        )
        raise ModelError(message, faq="a-discrete-latent-is-refused")
    everything = SiteLayout.from_trace(trace)
    shared = SiteLayout(tuple(site for site in everything.sites if site.name not in inside))
    local = tuple((site, frame.dim) for site in everything.sites if site.name in inside)
    data = [
        node for node in trace.nodes.values() if is_scored(node) and node["is_observed"] and not is_deterministic(node)
    ]
    rows = [_rows(node, frame) for node in data if frame in node["cond_indep_stack"]]
    return PlateRun(
        LocalLayout(everything, shared, local, frame.size, full_size(frame)),
        trace.nodes[plate]["value"],
        torch.cat(rows, -1) if rows else None,
        everything.pack({name: node["value"] for name, node in latents.items()}),
        {name: node["cond_indep_stack"] for name, node in latents.items()},
    )


def _rows(node: Any, frame: Any) -> Tensor:
    """Return the value of a site as one row for each element of the plate: ``[B, C]``."""
    value: Tensor = node["value"].expand(node["fn"].shape())
    return value.movedim(frame.dim - node["fn"].event_dim, 0).reshape(frame.size, -1)


def by_datum(trace: Any, log_dets: dict[str, Tensor], plate: str) -> Tensor:
    """Split the log density of a scored trace by datum: outside a plate, then of each element in it: ``[1 + B]``, nats.

    The weight ``N / B`` of a subsampled plate is removed from its elements; ``log_dets {site: [*batch]}`` are log|J|.
    """
    outside, inside = [], []
    for name, node in trace.nodes.items():
        if "log_prob" not in node:
            continue
        frame = next((f for f in node["cond_indep_stack"] if f.name == plate), None)
        share = 1 if frame is None else frame.size / full_size(frame)
        terms = [share * node["log_prob"], *([log_dets[name]] if name in log_dets else [])]
        if frame is None:
            outside += [term.sum() for term in terms]
        else:
            inside += [term.movedim(frame.dim, 0).reshape(frame.size, -1).sum(1) for term in terms]
    each = torch.stack(inside).sum(0)
    return torch.cat([sum(outside, each.new_zeros(()))[None], each])
