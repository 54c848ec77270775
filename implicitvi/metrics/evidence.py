"""Estimate the log evidence ``log p(x)`` of each datum under a model with known densities.

Each method takes ``log_joint(z)``, which maps codes ``z [S, B, D]`` to ``log p(x, z) [S, B]``, and the mean ``loc`` and
standard deviation ``scale [B, D]`` of each datum's posterior, which may be rough.
"""

from __future__ import annotations

from math import isfinite, log
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, StudentT

from implicitvi.errors import OptionError, ShapeError, check_positive, check_seed, check_whole
from implicitvi.numerics.types import LogDensity

_RESOLVED = 0.05  # nats of change without every other point; the remaining error is at most about a fourth of it
_OUTSIDE = 1e-5  # share of the evidence in the outermost cells; about ten times more lies beyond them


@torch.no_grad()
def importance_sampling(
    log_joint: LogDensity, loc: Tensor, scale: Tensor, *, num_samples: int = 5000, widen: float = 1.2, chunk: int = 500
) -> Tensor:
    """Estimate ``log p(x)`` by importance sampling from a Student t: a lower bound in expectation, ``[B]`` in nats.

    This is the bound of importance-weighted autoencoders. The heavy tails of the proposal bound the weights where the
    posterior is wider than ``scale``.

    Args:
        log_joint: ``z [S, B, D]`` to ``log p(x, z) [S, B]``.
        loc: Posterior means ``[B, D]``.
        scale: Posterior standard deviations ``[B, D]``.
        num_samples: Number of draws for each datum.
        widen: Scale of the proposal in units of ``scale``.
        chunk: Number of draws scored at a time.

    Raises:
        OptionError: An option, or a scale, has a value that cannot work.
        ShapeError: ``loc`` and ``scale`` do not have the same shape ``[B, D]``.

    References:
        Importance Weighted Autoencoders, Yuri Burda, Roger Grosse, Ruslan Salakhutdinov, 2016.
    """
    check_whole("num_samples", num_samples)
    check_whole("chunk", chunk)
    check_positive("widen", widen)
    check_start(log_joint, loc, scale)
    q = Independent(StudentT(5.0, loc, widen * scale, validate_args=False), 1, validate_args=False)
    weights = []
    for size in [min(chunk, num_samples - done) for done in range(0, num_samples, chunk)]:
        z = q.sample(torch.Size([size]))
        log_p = log_joint(z)
        check_scores(log_p, z)
        weights.append(log_p - q.log_prob(z))
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
    """Compute ``log p(x)`` by the midpoint rule on a grid over one or two latent dimensions: ``[B]`` in nats.

    Exact up to rounding once cells are smaller than the posterior is wide.

    Args:
        log_joint: ``z [S, 1, D]`` to ``log p(x, z) [S, B]``.
        loc: Tensor of shape ``[B, D]``; its values are not used.
        scale: Not used.
        low: Start of the grid along each dimension.
        high: End of the grid.
        points: Points along each dimension.
        chunk: Number of points scored at a time, over all data.

    Raises:
        OptionError: There are more than two latent dimensions, or the grid is too coarse or too small.
    """
    check_whole("points", points, 2)
    check_whole("chunk", chunk)
    if not all(isinstance(end, int | float) and isfinite(end) for end in (low, high)) or not low < high:
        raise OptionError.must_be("low and high", "finite numbers, low below high", f"{low!r} and {high!r}")
    moments = (torch.zeros(loc.shape), torch.ones(loc.shape)) if isinstance(loc, Tensor) else (loc, loc)
    check_start(log_joint, *moments)
    batch, dim = loc.shape
    if dim > 2:
        raise OptionError(f"Quadrature is for one or two latent dimensions, got {dim}. Use method='ais' or 'iwae'.")
    edges = torch.linspace(low, high, points + 1, dtype=loc.dtype, device=loc.device)
    middle = (edges[1:] + edges[:-1]) / 2
    grid = torch.cartesian_prod(*[middle] * dim).reshape(-1, 1, dim)
    # the codes [S, 1, D] are the same for all data, so they are decoded once
    parts = []
    for part in grid.split(max(1, min(chunk, len(grid) * batch) // batch)):
        scores = log_joint(part)
        check_scores(
            scores.expand(-1, batch) if getattr(scores, "ndim", 0) == 2 else scores, part.expand(-1, batch, -1)
        )
        parts.append(scores.expand(-1, batch))
    log_p = torch.cat(parts).reshape(*[points] * dim, batch)
    total = log_p.flatten(0, -2).logsumexp(0)
    _check_grid(log_p, total)
    return total + dim * log((high - low) / points)


def check_start(log_joint: LogDensity, loc: Tensor, scale: Tensor) -> None:
    """Raise an error unless ``log_joint`` is a function, and ``loc`` and ``scale [B, D]`` are moments of a Gaussian."""
    if not callable(log_joint):
        raise OptionError.must_be("log_joint", "a function of codes", repr(log_joint))
    tensors = all(
        isinstance(each, Tensor) and not each.is_sparse and each.is_floating_point() and each.numel()
        for each in (loc, scale)
    )
    if not tensors or loc.dim() != 2 or loc.shape != scale.shape:
        kinds = f"{type(loc).__name__} and {type(scale).__name__}"
        shapes = (
            f"shapes {tuple(loc.shape)} and {tuple(scale.shape)}" if tensors else f"{kinds}, empty or not of floats"
        )
        raise ShapeError.must_be("loc and scale", "[B, D], the moments of each datum's posterior", shapes)
    if not (loc.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
        scales = f"scales from {scale.min().item():g} to {scale.max().item():g}"
        do = "For an encoder without noise use start='prior', or the prior's moments."
        raise OptionError.must_be("loc and scale", "finite, and scale above 0", scales, do)


def check_scores(log_p: Tensor, z: Tensor) -> None:
    """Raise `ShapeError` unless a log joint of codes ``z [S, B, D]`` is a tensor ``log_p [S, B]``."""
    if not isinstance(log_p, Tensor) or log_p.shape != z.shape[:-1]:
        got = tuple(log_p.shape) if isinstance(log_p, Tensor) else type(log_p).__name__
        expected = f"of shape {tuple(z.shape[:-1])} for codes {tuple(z.shape)}"
        raise ShapeError.must_be("The log joint", expected, got)


def _check_grid(log_p: Tensor, total: Tensor) -> None:
    """Raise `OptionError` unless a grid ``[points, (points,) B]`` contains and resolves the ``total [B]``."""
    dim = log_p.dim() - 1
    ends = [log_p.select(axis, end).reshape(-1, len(total)) for axis in range(dim) for end in (0, -1)]
    outside = (torch.cat(ends).logsumexp(0) - total).exp().max().item()
    if outside > _OUTSIDE:
        share = f"{outside:.2g} of the evidence is in the outermost cells, at most {_OUTSIDE} may be"
        raise OptionError(f"The grid is smaller than the posterior: {share}. Widen the range from low to high.")
    half = log_p[(slice(None, None, 2),) * dim].flatten(0, -2).logsumexp(0) + dim * log(2)
    coarse = (half - total).abs().max().item()
    if not coarse < _RESOLVED:
        change = f"without every other point the result changes by {coarse:.2g} nats, must be below {_RESOLVED}"
        raise OptionError(f"The grid is too coarse for the posterior: {change}. Use more points, or a smaller range.")


class SemiImplicit(Protocol):
    """A sampler ``z = loc + L h`` with ``h ~ N(f(ε), σ²)``: an implicit mean, an explicit Gaussian around it."""

    loc: Tensor
    scale_tril: Tensor
    noise_dim: int
    latent_dim: int

    def conditional(self, eps: Tensor) -> Distribution:
        """Return the Gaussian of ``h [..., D]`` given ``ε [..., noise_dim - latent_dim]``."""

    def to_latent(self, h: Tensor) -> Tensor:
        """Map ``h [..., D]`` to ``z [..., D]``."""


@torch.no_grad()
def semi_implicit_bound(
    log_joint: LogDensity, sampler: SemiImplicit, *, num_samples: int = 1000, num_mixture: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Estimate a lower bound of ``log p(x)`` that holds for any sampler, and its standard error, in nats.

        L_K = E[log p(x, z) - log 1/(K + 1) Σ_{k=0}^{K} q(z | ε_k)] ≤ log p(x)      z ~ q(· | ε_0), ε_k ~ N(0, I)

    The mean over ``ε_0``, which generated ``z``, and ``K`` others is an upper bound of ``log q(z)`` in expectation, so
    a learned density is not needed. The bound rises with ``K`` to the ELBO. The estimate is unbiased: the value three
    standard errors below it is a bound with near certainty.

    Args:
        log_joint: ``log p(x, z)`` of draws ``[S, D]``: ``[S]``.
        sampler: A sampler without a context, such as `SemiImplicitSampler`.
        num_samples: Number of draws ``z``.
        num_mixture: ``K``, drawn independently for every ``z``.
        seed: Seed of the draws.

    References:
        Semi-Implicit Variational Inference, Mingzhang Yin, Mingyuan Zhou, 2018. Doubly Semi-Implicit Variational
        Inference, Dmitry Molchanov, Valery Kharitonov, Artem Sobolev, Dmitry Vetrov, 2019.
    """
    check_whole("num_samples", num_samples, 2)
    check_whole("num_mixture", num_mixture)
    seed = check_seed("seed", seed)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(sampler.loc)

    log_volume = sampler.scale_tril.diagonal().log().sum()
    terms = []
    for count in [min(100, num_samples - done) for done in range(0, num_samples, 100)]:
        eps = noise(num_mixture + 1, count, sampler.noise_dim - sampler.latent_dim)
        own: Any = sampler.conditional(eps[0])
        h = own.mean + own.stddev * noise(count, sampler.latent_dim)
        log_q = sampler.conditional(eps).log_prob(h).logsumexp(0) - log(num_mixture + 1)
        terms.append(log_joint(sampler.to_latent(h)) - log_q + log_volume)
    bound = torch.cat(terms).double()
    return bound.mean().item(), bound.std().item() / num_samples**0.5
