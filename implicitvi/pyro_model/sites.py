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
        event_dim: Number of rightmost dimensions that belong together in the value.
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
        """Number of leftmost dimensions of the value that are independent of each other."""
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
        parts = []
        for site in self.sites:
            u = site.transform.inv(values[site.name])
            batch = u.shape[: u.dim() - len(site.unconstrained_shape)]
            parts.append(u.reshape(*batch, site.size))
        return torch.cat(parts, -1)

    def coordinates(self) -> list[str]:
        """Name each entry of ``u``: ``"eta[3]"``; indices of a simplex count its unconstrained entries."""
        return [
            site.name + (f"[{','.join(map(str, index))}]" if index else "")
            for site in self.sites
            for index in np.ndindex(*site.unconstrained_shape)
        ]


def plate_names(node: dict[str, Any]) -> tuple[str | None, ...]:
    """Return the names of a traced site's plates, one for each batch dimension of its value."""
    dims: list[str | None] = [None] * (node["value"].dim() - node["fn"].event_dim)
    for frame in vectorized_plates(node):
        if -frame.dim <= len(dims):
            dims[frame.dim] = frame.name
    return tuple(dims)


def bijection(name: str, fn: Any) -> Transform:
    """Return the bijection from unconstrained values to the support of a continuous latent site.

    Raises:
        ModelError: There is none; the message names the site and what to write instead.
    """
    kind = type(unwrapped(fn)[0]).__name__
    cause: Exception | None = None
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
            cause = error
            line = str(error).splitlines()[0] if str(error) else "no support"
            problem = f"cannot be mapped to the real line, got {kind}: {line}"
            do = HINTS.get(kind, "Reparameterise the site (pyro.infer.reparam).")
    raise ModelError(f"Site {name!r} {problem}. {do}", faq="a-site-cannot-be-mapped-to-the-real-line") from cause


def _site(name: str, node: dict[str, Any]) -> Site:
    fn, value = node["fn"], node["value"]
    transform = bijection(name, fn)
    unconstrained_shape = tuple(transform.inv(value).shape)
    return Site(name, tuple(value.shape), unconstrained_shape, fn.event_dim, transform, plate_names(node))
