"""The log evidence ``log p(x)`` of data under a model whose densities are known, datum by datum.

Each method takes ``log_joint(z)``, which maps codes ``z [S, B, D]`` to ``log p(x, z) [S, B]``, and the mean ``loc`` and
standard deviation ``scale [B, D]`` of a posterior for each datum, which need only be roughly right.
"""

from __future__ import annotations

from math import log
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, StudentT

from implicitvi.errors import OptionError, ShapeError, check_at_least, check_positive
from implicitvi.numerics.types import LogDensity

_RESOLVED = 0.05  # nats lost with every other point; the error that is left is at most about a fourth of it
_OUTSIDE = 1e-5  # share of the evidence in the outermost cells; what lies beyond is some ten times more


@torch.no_grad()
def importance_sampling(
    log_joint: LogDensity, loc: Tensor, scale: Tensor, *, num_samples: int = 5000, widen: float = 1.2, chunk: int = 500
) -> Tensor:
    """Importance sampling from a Student t around each posterior: a lower bound in expectation, ``[B]`` in nats.

    The bound of importance-weighted autoencoders with a proposal of heavier tails than a Gaussian, so that no weight
    is without bound where the posterior is wider than it was said to be.

    Args:
        log_joint: ``z [S, B, D]`` to ``log p(x, z) [S, B]``.
        loc: Posterior means ``[B, D]``.
        scale: Posterior standard deviations ``[B, D]``.
        num_samples: Draws for each datum.
        widen: Scale of the proposal in units of ``scale``.
        chunk: Draws scored at a time.

    Raises:
        OptionError: An option, or a scale, has a value that cannot work.
        ShapeError: ``loc`` and ``scale`` do not have the same shape ``[B, D]``.

    References:
        Importance Weighted Autoencoders, Yuri Burda, Roger Grosse, Ruslan Salakhutdinov, 2016.
    """
    check_at_least("num_samples", num_samples, 1)
    check_at_least("chunk", chunk, 1)
    check_positive("widen", widen)
    check_start(loc, scale)
    each = StudentT(5.0, loc, widen * scale, validate_args=False)
    q = Independent(each, 1, validate_args=False)
    sizes = [min(chunk, num_samples - done) for done in range(0, num_samples, chunk)]
    weights = []
    for size in sizes:
        z = q.sample(torch.Size([size]))
        weights.append(log_joint(z) - q.log_prob(z))
    return torch.cat(weights).logsumexp(0) - log(num_samples)


@torch.no_grad()
def quadrature(
    log_joint: LogDensity,
    loc: Tensor,
    scale: Tensor,
    *,
    low: float = -6.0,
    high: float = 6.0,
    points: int = 400,
    chunk: int = 20_000,
) -> Tensor:
    """The midpoint rule on a grid over all of one or two latent dimensions: ``[B]`` in nats.

    Exact up to rounding once cells are smaller than the posterior is wide; a grid that is too coarse or leaves
    something out is refused, not believed.

    Args:
        log_joint: ``z [S, 1, D]`` to ``log p(x, z) [S, B]``.
        loc: Of the right shape ``[B, D]``; the values are not used.
        scale: Not used.
        low: Where the grid begins along each dimension.
        high: Where it ends.
        points: Points along each dimension.
        chunk: Points scored at a time, over all data.

    Raises:
        OptionError: There are more than two latent dimensions, or the grid does not suit the posterior.
    """
    check_at_least("points", points, 2)
    check_at_least("chunk", chunk, 1)
    check_positive("high - low", high - low)
    batch, dim = loc.shape
    if dim > 2:
        raise OptionError("quadrature is for one or two latent dimensions", got=dim, do="Use method='ais' or 'iwae'.")
    edges = torch.linspace(low, high, points + 1, dtype=loc.dtype, device=loc.device)
    middle = (edges[1:] + edges[:-1]) / 2
    grid = torch.cartesian_prod(*[middle] * dim).reshape(-1, 1, dim)
    # the codes are the same for all data: [S, 1, D] is decoded once, and meets each datum in its score
    parts = [log_joint(part).expand(-1, batch) for part in grid.split(max(1, chunk // batch))]
    log_p = torch.cat(parts).reshape(*[points] * dim, batch)
    total = log_p.flatten(0, -2).logsumexp(0)
    _check_grid(log_p, total)
    return total + dim * log((high - low) / points)


def check_start(loc: Tensor, scale: Tensor) -> None:
    """Raise an error unless ``loc`` and ``scale`` are moments ``[B, D]`` of a Gaussian."""
    if loc.dim() != 2 or loc.shape != scale.shape:
        raise ShapeError(
            "loc and scale are not the moments of each datum's posterior",
            got=f"shapes {tuple(loc.shape)} and {tuple(scale.shape)}",
            expected="[B, D] both",
        )
    if not (loc.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
        raise OptionError(
            "loc and scale are not the moments of a Gaussian",
            got=f"scales from {scale.min().item():g} to {scale.max().item():g}",
            expected="finite numbers, and scales above 0",
            do="An encoder without noise has none: use start='prior', or the prior's moments.",
        )


def _check_grid(log_p: Tensor, total: Tensor) -> None:
    """Refuse a grid ``[points, (points,) B]`` that does not hold the ``total [B]`` of each datum."""
    dim = log_p.dim() - 1
    ends = [log_p.select(axis, end) for axis in range(dim) for end in (0, -1)]
    edge = torch.cat([end.reshape(-1, len(total)) for end in ends]).logsumexp(0) - total
    outside = edge.exp().max().item()
    if outside > _OUTSIDE:
        raise OptionError(
            "the grid ends where the posterior does not",
            got=f"{outside:.2g} of the evidence in the outermost cells",
            expected=f"<= {_OUTSIDE}",
            do="Take a wider range, low to high.",
        )
    half = log_p[(slice(None, None, 2),) * dim].flatten(0, -2).logsumexp(0) + dim * log(2)
    coarse = (half - total).abs().max().item()
    if not coarse < _RESOLVED:
        raise OptionError(
            "the grid is too coarse for the posterior",
            got=f"{coarse:.2g} nats of difference where every other point is left out",
            expected=f"< {_RESOLVED}",
            do="Take more points, or a smaller range.",
        )


class SemiImplicit(Protocol):
    """A sampler ``z = loc + L h`` with ``h ~ N(f(ε), σ²)``: an implicit mean, an explicit Gaussian around it."""

    loc: Tensor
    scale_tril: Tensor
    noise_dim: int
    latent_dim: int

    def conditional(self, eps: Tensor) -> Distribution:
        """The Gaussian of ``h [..., D]`` given ``ε [..., noise_dim - latent_dim]``."""

    def to_latent(self, h: Tensor) -> Tensor:
        """``h [..., D]`` to ``z [..., D]``."""


@torch.no_grad()
def semi_implicit_bound(
    log_joint: LogDensity, sampler: SemiImplicit, *, num_samples: int = 1000, num_mixture: int = 200, seed: int = 0
) -> tuple[float, float]:
    """A lower bound of ``log p(x)`` that no bad training can break, and its standard error, in nats.

        L_K = E[log p(x, z) - log 1/(K + 1) Σ_{k=0}^{K} q(z | ε_k)] ≤ log p(x)      z ~ q(· | ε_0), ε_k ~ N(0, I)

    The mean over ``ε_0``, which made ``z``, and ``K`` others is an upper bound of ``log q(z)`` in expectation, so no
    density is learned and none is flattered. It rises with ``K`` to the ELBO. What is returned is an unbiased
    estimate: three standard errors below it hold with near certainty.

    Args:
        log_joint: ``log p(x, z)`` of draws ``[S, D]``: ``[S]``.
        sampler: Without a context; `SemiImplicitSampler` is one.
        num_samples: Draws ``z``.
        num_mixture: ``K``, fresh ones for every draw.
        seed: Of the draws.

    References:
        Semi-Implicit Variational Inference, Mingzhang Yin, Mingyuan Zhou, 2018.
        Doubly Semi-Implicit Variational Inference, Dmitry Molchanov, Valery Kharitonov, Artem Sobolev, Dmitry Vetrov,
        2019.
    """
    check_at_least("num_samples", num_samples, 2)
    check_at_least("num_mixture", num_mixture, 1)
    generator = torch.Generator().manual_seed(seed)
    mean_dim = sampler.noise_dim - sampler.latent_dim

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(sampler.loc)

    log_volume = sampler.scale_tril.diagonal().log().sum()
    terms = []
    for count in [min(100, num_samples - done) for done in range(0, num_samples, 100)]:
        eps = noise(num_mixture + 1, count, mean_dim)
        own: Any = sampler.conditional(eps[0])
        h = own.mean + own.stddev * noise(count, sampler.latent_dim)
        log_q = sampler.conditional(eps).log_prob(h).logsumexp(0) - log(num_mixture + 1)
        terms.append(log_joint(sampler.to_latent(h)) - log_q + log_volume)
    bound = torch.cat(terms).double()
    return bound.mean().item(), bound.std().item() / num_samples**0.5
