"""Where a fit starts: a point the model accepts, then the place and scale of a Gaussian fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from implicitvi.errors import ModelError
from implicitvi.numerics.optimise import descend, gradients
from implicitvi.numerics.types import LogDensity

TRIES = 100
WIDEST = 200  # dimensions in which a Gaussian is settled
SETTLING = 60  # steps at most
DRAWS = 512  # in each, or 20 for each dimension
REACH = 3.0  # standard deviations that a mean moves in each dimension at most
# shift of the mean, range of the precision: where Adam's fit may stay, and what is worked for
NEAR, SETTLED = (0.75, 0.05, 6.0), (0.3, 0.4, 2.5)


def starting_point(log_joint: LogDensity, u: Tensor, describe: Callable[[Tensor], str]) -> Tensor:
    """``u [D]`` where its log density and gradient are finite, else the first of 100 random points.

    Args:
        log_joint: Log density of points ``[S, D]``.
        u: Where to look first.
        describe: Names the sites of a point ``[D]`` that are not finite.

    Raises:
        ModelError: None of the points will do; lists the sites and values of the first.
    """
    for attempt in range(TRIES + 1):
        candidate = u if attempt == 0 else torch.rand_like(u) * 4 - 2
        v = candidate.detach()[None].requires_grad_()
        with torch.enable_grad():
            score = log_joint(v).sum()
            if score.isfinite() and torch.autograd.grad(score, v)[0].isfinite().all():
                return candidate
    raise ModelError(
        f"the log density is not finite at the start nor at {TRIES} random points",
        got=describe(u) or "a finite log density whose gradient is not",
        expected="a finite log density",
        do="Look for NaN in the data, observations outside their support, and priors that exclude the data.",
        faq="the-log-density-is-not-finite-at-the-start",
    )


def gaussian_fit(
    log_joint: LogDensity,
    loc: Tensor,
    *,
    parameters: Sequence[Tensor] = (),
    num_steps: int = 600,
    num_particles: int = 32,
) -> tuple[Tensor, Tensor]:
    """A short variational fit of a full-rank Gaussian: robust location and scale of a posterior.

    Args:
        log_joint: Log density of points ``[S, D]``.
        loc: Where to start, ``[D]``.
        parameters: Leaves of the log density that are fitted with the Gaussian.
        num_steps: Steps of Adam, the rate falling from 0.05 to 0.0025.
        num_particles: Draws a step.

    Returns:
        Location ``[D]`` and lower triangular scale ``[D, D]`` with a positive diagonal.
    """
    dim = len(loc)
    loc = loc.clone().requires_grad_()
    log_diagonal = loc.new_full((dim,), 0.1).log().requires_grad_()
    lower = loc.new_zeros(dim, dim).requires_grad_()

    def loss() -> Tensor | None:
        eps = torch.randn(num_particles, dim, dtype=loc.dtype, device=loc.device)
        u = loc + log_diagonal.exp() * (eps + eps @ lower.tril(-1).mT)
        scores = log_joint(u)
        finite = scores.isfinite()
        if not finite.all():
            if not finite.any():
                return None
            scores = log_joint(u[finite])
        return -scores.mean() - log_diagonal.sum()

    groups = [{"params": [loc, log_diagonal, lower], "lr": 0.05}, *parameter_groups(parameters)]
    descend(loss, groups, num_steps)
    unit = torch.eye(dim, dtype=loc.dtype, device=loc.device)
    scale_tril = log_diagonal.exp()[:, None] * (unit + lower.tril(-1))
    return loc.detach(), scale_tril.detach()


def settle(log_joint: LogDensity, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
    """Take a Gaussian on to the best one, in whatever units; one that is near it stays as it is.

    The best Gaussian has ``E[s] = 0`` and ``-E[v sᵀ] = I``, where ``z = loc + scale_tril v`` and ``s`` is the gradient
    of the log density in ``v``. Where that is far from true, steps of natural gradient follow, which are the same in
    all coordinates: with ``K = -E[v sᵀ]`` the precision in ``v`` becomes ``P = (I + K) / 2``, and the mean
    ``P⁻¹ E[s] / 2``. Adam's steps have a size of their own, and a posterior can be too far away for it, or too narrow.

    Args:
        log_joint: Log density of points ``[S, D]``, the same one at every look.
        loc: Mean ``[D]`` of a first Gaussian.
        scale_tril: Its lower triangular scale ``[D, D]``.

    Returns:
        Mean and scale of the Gaussian that has been arrived at, if the ELBO says so too; of the first one otherwise. In
        more than 200 dimensions of the first one: it would take too many draws to know.

    References:
        The Variational Gaussian Approximation Revisited, Manfred Opper, Cédric Archambeau, 2009, eq. 8 and 9, for the
        identities. Handling the Positive-Definite Constraint in the Bayesian Learning Rule, Wu Lin, Mark Schmidt,
        Mohammad Emtiyaz Khan, 2020, for the steps.
    """
    dim = len(loc)
    if dim > WIDEST:
        return loc, scale_tril
    first = _at(log_joint, loc, scale_tril)
    if first is None or first.is_near(*NEAR):
        return loc, scale_tril
    here, place = first, first.step()
    for _ in range(SETTLING):
        there = _at(log_joint, *place)
        if there is None:  # over the edge of the support
            place = (here.loc + place[0]) / 2, place[1] / 2
            continue
        here = there
        if here.is_near(*SETTLED):
            break
        place = here.step()
    # a posterior that is improper has ever better ones, further and further out
    arrived = here.is_near(*NEAR) and here.elbo > first.elbo
    return (here.loc, here.scale_tril) if arrived else (loc, scale_tril)


@dataclass(frozen=True, eq=False)
class _Gaussian:
    """A Gaussian beside a log density.

    Attributes:
        loc: Its mean ``[D]``.
        scale_tril: Its lower triangular scale ``[D, D]``.
        slope: ``E[s] [D]``.
        values: Eigenvalues of ``-E[v sᵀ]``, made symmetric, ``[D]``.
        vectors: Its eigenvectors, the columns of ``[D, D]``.
        elbo: Mean log density and entropy, up to a constant.
    """

    loc: Tensor
    scale_tril: Tensor
    slope: Tensor
    values: Tensor
    vectors: Tensor
    elbo: Tensor

    def is_near(self, shift: float, low: float, high: float) -> bool:
        """Whether the best mean is less than so many standard deviations away, and the precision within a range."""
        within = self.slope.abs().max() < shift and low < self.values.min()
        return bool(within and self.values.max() < high)

    def step(self) -> tuple[Tensor, Tensor]:
        """Mean and scale after a step of natural gradient."""
        precision = (1 + self.values.clamp(-0.5, 31.0)) / 2
        shift = self.vectors @ (self.vectors.mT @ self.slope / (2 * precision))
        shift = shift * (REACH * sqrt(len(shift)) / shift.norm()).clamp(max=1.0)
        root = self.scale_tril @ self.vectors * precision.rsqrt()
        upper = torch.linalg.qr(root.mT).R
        scale_tril = upper.mT * upper.diagonal().sign()
        return self.loc + self.scale_tril @ shift, scale_tril


def _at(log_joint: LogDensity, loc: Tensor, scale_tril: Tensor) -> _Gaussian | None:
    """A Gaussian with its expectations; ``None`` where half of its draws have no density."""
    dim = len(loc)
    v = torch.randn(max(DRAWS, 20 * dim), dim, dtype=loc.dtype, device=loc.device)
    log_p, score = gradients(log_joint, loc + v @ scale_tril.mT)
    finite = log_p.isfinite() & score.isfinite().all(1)
    if 2 * int(finite.sum()) < len(v):
        return None
    v, score = v[finite], score[finite] @ scale_tril
    slope = score.mean(0)
    spread = -(v.mT @ (score - slope)) / len(v)
    values, vectors = torch.linalg.eigh((spread + spread.mT) / 2)
    elbo = log_p[finite].mean() + scale_tril.diagonal().log().sum()
    return _Gaussian(loc, scale_tril, slope, values, vectors, elbo)


def parameter_groups(parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Adam's groups for the parameters of a model: weights of its networks learn at a tenth of the others' rate."""
    weights = [p for p in parameters if isinstance(p, nn.Parameter)]
    others = [p for p in parameters if not isinstance(p, nn.Parameter)]
    rates = ((weights, 0.005), (others, 0.05))
    return [{"params": group, "lr": rate} for group, rate in rates if group]
