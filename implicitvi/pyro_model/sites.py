"""The sites of a Pyro model on one flat unconstrained vector ``u [..., D]``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from pyro.distributions import ExpandedDistribution, Independent, MaskedDistribution
from pyro.distributions.util import sum_rightmost
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Transform, biject_to

from implicitvi.errors import ModelError

CIRCULAR = ("VonMises", "SineBivariateVonMises", "SineSkewed")
HINTS = {
    "Wishart": "Sample LKJCholesky and scales, and multiply them.",
    "ProjectedNormal": "Write poutine.reparam(model, config={site: ProjectedNormalReparam()}).",
    "MixtureSameFamily": "Sample the component too, as a discrete site marked "
    'infer={"enumerate": "parallel"}, which is summed out.',
}


@dataclass(frozen=True)
class Site:
    """One latent site of a model.

    Attributes:
        name: The site's name.
        shape: Shape of its value.
        unconstrained_shape: Shape of its image under the inverse transform; a simplex loses one entry.
        event_dim: Number of rightmost dimensions that belong together in the value.
        transform: Bijection from unconstrained values to the support.
        dims: Names of the site's plates, one for each batch dimension of ``shape``, ``None`` where unnamed.
    """

    name: str
    shape: tuple[int, ...]
    unconstrained_shape: tuple[int, ...]
    event_dim: int
    transform: Transform
    dims: tuple[str | None, ...]

    @property
    def size(self) -> int:
        """Number of entries of ``u`` that the site takes."""
        return prod(self.unconstrained_shape)

    @property
    def batch_dim(self) -> int:
        """Number of leftmost dimensions of the value that are independent of each other."""
        return len(self.shape) - self.event_dim

    def unflatten(self, flat: Tensor) -> Tensor:
        """``flat [..., size]`` to the site's unconstrained values ``[..., *unconstrained_shape]``."""
        shape = self.unconstrained_shape
        return flat.unflatten(-1, shape) if shape else flat[..., 0]

    def constrain(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """``flat [..., size]`` to the value ``[..., *shape]`` and ``log|J| [..., *batch shape]``."""
        u = self.unflatten(flat)
        value = self.transform(u)
        log_det = self.transform.log_abs_det_jacobian(u, value)
        return value, sum_rightmost(log_det, log_det.dim() - (flat.dim() - 1 + self.batch_dim))


@dataclass(frozen=True)
class SiteLayout:
    """Where each latent site of a model stands in the flat vector ``u``, in the model's order."""

    sites: tuple[Site, ...]

    @classmethod
    def from_trace(cls, trace: Any) -> SiteLayout:
        """Read the layout off a Pyro trace."""
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
        """Each site with its part of ``u [..., D]``."""
        yield from zip(self.sites, u.split([site.size for site in self.sites], -1), strict=True)

    def unpack(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """``u [..., D]`` to values ``{name: [..., *site shape]}`` and ``log|J| [...]`` in nats."""
        values = {}
        log_det = u.new_zeros(u.shape[:-1])
        for site, flat in self.split(u):
            values[site.name], each = site.constrain(flat)
            log_det = log_det + sum_rightmost(each, site.batch_dim)
        return values, log_det

    def unpack_each(self, u: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As `unpack`, with the ``log|J| [..., *batch shape]`` of every site by itself."""
        pairs = {site.name: site.constrain(flat) for site, flat in self.split(u)}
        return {k: value for k, (value, _) in pairs.items()}, {k: log_det for k, (_, log_det) in pairs.items()}

    def plate_size(self, plate: str) -> int:
        """Number of elements of a plate that a site stands in."""
        sites = (site for site in self.sites if plate in site.dims)
        site = next(sites)
        return site.shape[site.dims.index(plate)]

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values ``{name: [..., *site shape]}`` to ``u [..., D]``; the inverse of `unpack`."""
        parts = []
        for site in self.sites:
            u = site.transform.inv(values[site.name])
            batch = u.shape[: u.dim() - len(site.unconstrained_shape)]
            parts.append(u.reshape(*batch, site.size))
        return torch.cat(parts, -1)

    def coordinates(self) -> list[str]:
        """A name for each entry of ``u``: ``"eta[3]"``; for a simplex they count unconstrained entries."""
        return [
            site.name + (f"[{','.join(map(str, index))}]" if index else "")
            for site in self.sites
            for index in np.ndindex(*site.unconstrained_shape)
        ]


def latent_nodes(trace: Any) -> Iterator[tuple[str, Any]]:
    """Names and nodes of the unobserved sites of a Pyro trace."""
    for name, node in trace.iter_stochastic_nodes():
        if not site_is_subsample(node):
            yield name, node


def plate_names(node: dict[str, Any]) -> tuple[str | None, ...]:
    """Names of the plates of a traced site, one for each batch dimension of its value."""
    dims: list[str | None] = [None] * (node["value"].dim() - node["fn"].event_dim)
    for frame in node["cond_indep_stack"]:
        if frame.vectorized and -frame.dim <= len(dims):
            dims[frame.dim] = frame.name
    return tuple(dims)


def bijection(name: str, fn: Any) -> Transform:
    """The bijection from unconstrained values to the support of a continuous latent site.

    Raises:
        ModelError: There is none: the message names the site and says what to write instead.
    """
    kind = _kind(fn)
    if kind in CIRCULAR:
        raise ModelError(
            f"site {name!r} is an angle: its density repeats along the whole real line",
            got=kind,
            do="Sample Uniform(-π, π) and add the density with pyro.factor, or use ProjectedNormal with "
            "ProjectedNormalReparam.",
            faq="a-site-cannot-be-mapped-to-the-real-line",
        )
    if kind in ("Delta", "Empirical"):
        raise ModelError(
            f"site {name!r} takes single values only, so it has no density",
            got=kind,
            do="Use pyro.deterministic for a value that follows from others.",
            faq="a-site-cannot-be-mapped-to-the-real-line",
        )
    try:
        transform: Transform = biject_to(fn.support)
    except (AttributeError, NotImplementedError) as error:
        raise ModelError(
            f"site {name!r} cannot be mapped to the real line",
            got=f"{kind}: {str(error).splitlines()[0] if str(error) else 'no support'}",
            do=HINTS.get(kind, "Reparameterise the site (pyro.infer.reparam)."),
            faq="a-site-cannot-be-mapped-to-the-real-line",
        ) from error
    return transform


def _kind(fn: Any) -> str:
    """Name of a distribution's class, wrappers aside."""
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return type(fn).__name__


def _site(name: str, node: dict[str, Any]) -> Site:
    fn, value = node["fn"], node["value"]
    transform = bijection(name, fn)
    return Site(
        name=name,
        shape=tuple(value.shape),
        unconstrained_shape=tuple(transform.inv(value).shape),
        event_dim=fn.event_dim,
        transform=transform,
        dims=plate_names(node),
    )
