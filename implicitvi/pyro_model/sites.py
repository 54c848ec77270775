"""Map the latent sites of a Pyro model to one flat unconstrained vector ``u [..., D]``, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Transform, biject_to

from implicitvi.errors import ModelError
from implicitvi.pyro_model.tracing import latent_nodes, unwrapped, vectorized_plates

CIRCULAR = ("VonMises", "SineBivariateVonMises", "SineSkewed")
HINTS = {
    "Wishart": "Sample LKJCholesky and scales, and multiply them.",
    "ProjectedNormal": "Write poutine.reparam(model, config={site: ProjectedNormalReparam()}).",
    "MixtureSameFamily": 'Sample the component too, as a discrete site marked infer={"enumerate": "parallel"}.',
}


@dataclass(frozen=True)
class Site:
    """A latent site of a model.

    Attributes:
        name: The site's name.
        shape: Shape of its value.
        unconstrained_shape: Shape of its unconstrained value; a simplex loses one entry.
        event_dim: Number of rightmost dimensions of an event.
        transform: Bijection from unconstrained values to the support.
        dims: Names of the site's plates, one for each batch dimension of ``shape``; ``None`` where there is none.
    """

    name: str
    shape: tuple[int, ...]
    unconstrained_shape: tuple[int, ...]
    event_dim: int
    transform: Transform
    dims: tuple[str | None, ...]

    @property
    def size(self) -> int:
        """Number of entries of ``u`` that belong to the site."""
        return prod(self.unconstrained_shape)

    @property
    def batch_dim(self) -> int:
        """Number of leftmost dimensions of the value that are not of an event."""
        return len(self.shape) - self.event_dim

    def open_shape(self, plate: str | None) -> tuple[int | None, ...]:
        """Return the shape with ``None`` for the size of a plate."""
        dims = [*self.dims, *[None] * self.event_dim]
        return tuple(None if dim is not None and dim == plate else n for n, dim in zip(self.shape, dims, strict=True))

    def unflatten(self, flat: Tensor) -> Tensor:
        """Reshape ``flat [..., size]`` to unconstrained values ``[..., *unconstrained_shape]``."""
        shape = self.unconstrained_shape
        return flat.unflatten(-1, shape) if shape else flat[..., 0]

    def constrain(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``flat [..., size]`` to the value ``[..., *shape]`` and ``log|J| [..., *batch shape]``."""
        u = self.unflatten(flat)
        value = self.transform(u)
        log_det = self.transform.log_abs_det_jacobian(u, value)
        return value, sum_rightmost(log_det, log_det.dim() - (flat.dim() - 1 + self.batch_dim))

    def unconstrain(self, value: Tensor) -> Tensor:
        """Map ``value [..., *shape]`` to ``flat [..., size]``; the inverse of `constrain`."""
        u: Tensor = self.transform.inv(value)
        return u.reshape(*u.shape[: u.dim() - len(self.unconstrained_shape)], self.size)


@dataclass(frozen=True)
class SiteLayout:
    """The layout of a model's latent sites on the flat vector ``u``, in the model's order."""

    sites: tuple[Site, ...]

    @classmethod
    def from_trace(cls, trace: Any) -> SiteLayout:
        """Read the layout from a Pyro trace."""
        return cls(tuple(_site(name, node) for name, node in latent_nodes(trace)))

    @property
    def dim(self) -> int:
        """Dimension ``D`` of ``u``."""
        return sum(site.size for site in self.sites)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites in order."""
        return tuple(site.name for site in self.sites)

    def split(self, u: Tensor) -> Iterator[tuple[Site, Tensor]]:
        """Yield each site with its part of ``u [..., D]``."""
        yield from zip(self.sites, u.split([site.size for site in self.sites], -1), strict=True)

    def unpack(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Map ``u [..., D]`` to values ``{name: [..., *site shape]}`` and ``log|J| [...]`` in nats."""
        values, log_dets = self.unpack_each(u)
        each = (sum_rightmost(log_dets[site.name], site.batch_dim) for site in self.sites)
        return values, sum(each, u.new_zeros(u.shape[:-1]))

    def unpack_each(self, u: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Unpack with the ``log|J| [..., *batch shape]`` of each site kept apart."""
        pairs = {site.name: site.constrain(flat) for site, flat in self.split(u)}
        return {k: value for k, (value, _) in pairs.items()}, {k: log_det for k, (_, log_det) in pairs.items()}

    def plate_size(self, plate: str) -> int:
        """Return the number of elements of a plate that contains a site."""
        site = next(site for site in self.sites if plate in site.dims)
        return site.shape[site.dims.index(plate)]

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Map values ``{name: [..., *site shape]}`` to ``u [..., D]``; the inverse of `unpack`."""
        return torch.cat([site.unconstrain(values[site.name]) for site in self.sites], -1)

    def coordinates(self) -> list[str]:
        """Name each entry of ``u``: ``"eta[3]"``; indices of a simplex count its unconstrained entries.

        A scalar site whose name is that of an entry of another, ``eta[3]``, gets quotation marks.
        """
        entries = [
            (site.name, f"[{','.join(map(str, index))}]" if index else "")
            for site in self.sites
            for index in np.ndindex(*site.unconstrained_shape)
        ]
        taken = {name + index for name, index in entries if index}
        return [repr(name) if not index and name in taken else name + index for name, index in entries]


def plate_names(node: dict[str, Any]) -> tuple[str | None, ...]:
    """Return the names of a traced site's plates, one for each batch dimension of its value."""
    names = {frame.dim: frame.name for frame in vectorized_plates(node)}
    return tuple(names.get(dim) for dim in range(node["fn"].event_dim - node["value"].dim(), 0))


def bijection(name: str, fn: Any) -> Transform:
    """Return the bijection from the real line to the support of a continuous latent site, or raise `ModelError`."""
    kind, cause = type(unwrapped(fn)[0]).__name__, None
    if kind in CIRCULAR:
        problem = f"is an angle: its density repeats along the whole real line, got {kind}"
        do = "Use ProjectedNormal with ProjectedNormalReparam, or Uniform(-π, π) and the density in a pyro.factor."
    elif kind in ("Delta", "Empirical"):
        problem = f"takes single values only, so it has no density, got {kind}"
        do = "Use pyro.deterministic for a value that follows from others."
    else:
        try:
            transform: Transform = biject_to(fn.support)
            return transform
        except (AttributeError, NotImplementedError) as error:
            cause, line = error, (str(error).splitlines() or ["no support"])[0]
            problem = f"cannot be mapped to the real line, got {kind}: {line}"
            do = HINTS.get(kind, "Reparameterise the site (pyro.infer.reparam).")
    raise ModelError(f"Site {name!r} {problem}. {do}", faq="a-site-cannot-be-mapped-to-the-real-line") from cause


def _site(name: str, node: dict[str, Any]) -> Site:
    fn, value, transform = node["fn"], node["value"], bijection(name, node["fn"])
    unconstrained_shape = tuple(transform.inv(value).shape)
    return Site(name, tuple(value.shape), unconstrained_shape, fn.event_dim, transform, plate_names(node))
