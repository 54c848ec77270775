"""The log evidence ``log p(x)`` of data under a model whose densities are known, datum by datum.

Each method takes ``log_joint(z)``, which maps codes ``z [S, B, D]`` to ``log p(x, z) [S, B]``, and the mean ``loc`` and
standard deviation ``scale [B, D]`` of a posterior for each datum, which need only be roughly right.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log

import torch
from torch import Tensor
from torch.distributions import Independent, StudentT

from implicitvi.errors import OptionError, check_at_least, check_positive

LogJoint = Callable[[Tensor], Tensor]


@torch.no_grad()
def importance_sampling(
    log_joint: LogJoint,
    loc: Tensor,
    scale: Tensor,
    *,
    num_samples: int = 5000,
    widen: float = 1.2,
    chunk: int = 500,
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

    References:
        Importance Weighted Autoencoders, Yuri Burda, Roger Grosse, Ruslan Salakhutdinov, 2016.
    """
    check_at_least("num_samples", num_samples, 1)
    check_positive("widen", widen)
    q = Independent(StudentT(5.0, loc, widen * scale + 1e-6, validate_args=False), 1)
    sizes = [min(chunk, num_samples - done) for done in range(0, num_samples, chunk)]
    weights = []
    for size in sizes:
        z = q.sample(torch.Size([size]))
        weights.append(log_joint(z) - q.log_prob(z))
    return torch.cat(weights).logsumexp(0) - log(num_samples)


@torch.no_grad()
def quadrature(
    log_joint: LogJoint,
    loc: Tensor,
    scale: Tensor,
    *,
    low: float = -6.0,
    high: float = 6.0,
    points: int = 400,
    chunk: int = 20_000,
) -> Tensor:
    """A grid over all of one or two latent dimensions: the exact value up to the mesh, ``[B]`` in nats.

    Args:
        log_joint: ``z [S, B, D]`` to ``log p(x, z) [S, B]``.
        loc: Of the right shape ``[B, D]``; the values are not used.
        scale: Not used.
        low: Where the grid begins along each dimension.
        high: Where it ends.
        points: Points along each dimension.
        chunk: Points scored at a time.

    Raises:
        OptionError: There are more than two latent dimensions.
    """
    batch, dim = loc.shape
    if dim > 2:
        raise OptionError(
            "quadrature is for one or two latent dimensions",
            got=dim,
            do="Use method='ais' or 'iwae'.",
        )
    edges = torch.linspace(low, high, points + 1, dtype=loc.dtype, device=loc.device)
    middle = (edges[1:] + edges[:-1]) / 2
    grid = torch.cartesian_prod(*[middle] * dim).reshape(-1, 1, dim)
    parts = [log_joint(part.expand(-1, batch, -1)) for part in grid.split(max(1, chunk // batch))]
    cell = dim * log((high - low) / points)
    return torch.cat(parts).logsumexp(0) + cell
