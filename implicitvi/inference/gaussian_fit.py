"""Start a fit: find a point that the model accepts, then the location and scale of a Gaussian fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from implicitvi.errors import ModelError
from implicitvi.inference.amortization import AmortizedSampler
from implicitvi.inference.minibatches import MinibatchSource
from implicitvi.numerics.optimise import descend, gradients
from implicitvi.numerics.types import LogDensity
from implicitvi.pyro_model.arguments import Arguments

TRIES = 100
WIDEST = 200  # most dimensions in which a Gaussian is refined
REFINING = 60  # most steps of natural gradient
DRAWS = 512  # in each, or 20 for each dimension
REACH = 3.0  # most standard deviations that a mean moves in each dimension
# shift of the mean and range of the precision: limits for Adam's fit to stay, and the aim of refining
NEAR, REFINED = (0.75, 0.05, 6.0), (0.3, 0.4, 2.5)


def starting_point(log_joint: LogDensity, u: Tensor, describe: Callable[[Tensor], str]) -> Tensor:
    """Return ``u [D]`` if its log density and gradient are finite, else the first such of 100 random points.

    Args:
        log_joint: Log density of points ``[S, D]``.
        u: The point to try first.
        describe: Function that names the sites of a point ``[D]`` that are not finite.

    Raises:
        ModelError: There is no such point; lists the sites and values of the first.
    """
    for attempt in range(TRIES + 1):
        candidate = u if attempt == 0 else torch.rand_like(u) * 4 - 2
        v = candidate.detach()[None].requires_grad_()
        with torch.enable_grad():
            score = log_joint(v).sum()
            if score.isfinite() and torch.autograd.grad(score, v)[0].isfinite().all():
                return candidate
    got = describe(u) or "a finite log density whose gradient is not finite"
    advice = "Look for NaN in the data, observations outside their support, and priors that exclude the data."
    message = f"The log density must be finite at the start or at one of {TRIES} random points, got {got}. {advice}"
    raise ModelError(message, faq="the-log-density-is-not-finite-at-the-start")


def gaussian_fit(
    log_joint: LogDensity,
    loc: Tensor,
    *,
    parameters: Sequence[Tensor] = (),
    num_steps: int = 600,
    num_particles: int = 32,
) -> tuple[Tensor, Tensor]:
    """Fit a full-rank Gaussian by a short run of Adam: a robust location and scale of a posterior.

    Args:
        log_joint: Log density of points ``[S, D]``.
        loc: The mean ``[D]`` at the start.
        parameters: Leaves of the log density to fit with the Gaussian.
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


def refine_gaussian(log_joint: LogDensity, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
    """Refine a Gaussian approximation by natural gradient, in any units. Return it unchanged if it is already close.

    The best Gaussian has ``E[s] = 0`` and ``-E[v sᵀ] = I``, where ``z = loc + scale_tril v`` and ``s`` is the gradient
    of the log density in ``v``. Steps of natural gradient, which are the same in all coordinates, lead there: with
    ``K = -E[v sᵀ]`` the precision in ``v`` becomes ``P = (I + K) / 2``, and the mean ``P⁻¹ E[s] / 2``. Adam's steps
    have a size of their own, so that a posterior can be too far away or too narrow for it.

    Args:
        log_joint: Log density of points ``[S, D]``, the same at every look.
        loc: Mean ``[D]`` of the first Gaussian.
        scale_tril: Its lower triangular scale ``[D, D]``.

    Returns:
        Mean and scale of the refined Gaussian if its ELBO is higher too; of the first one otherwise, and in more than
        200 dimensions, where the expectations would take too many draws.

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
    for _ in range(REFINING):
        there = _at(log_joint, *place)
        if there is None:  # beyond the edge of the support
            place = (here.loc + place[0]) / 2, place[1] / 2
            continue
        here = there
        if here.is_near(*REFINED):
            break
        place = here.step()
    # an improper posterior has better and better ones further and further out
    arrived = here.is_near(*NEAR) and here.elbo > first.elbo
    return (here.loc, here.scale_tril) if arrived else (loc, scale_tril)


@dataclass(frozen=True, eq=False)
class _Gaussian:
    """A Gaussian with its expectations of a log density.

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
        """Return whether the best mean is within ``shift`` standard deviations and the precision between the others."""
        within = self.slope.abs().max() < shift and low < self.values.min()
        return bool(within and self.values.max() < high)

    def step(self) -> tuple[Tensor, Tensor]:
        """Return mean and scale after a step of natural gradient."""
        precision = (1 + self.values.clamp(-0.5, 31.0)) / 2
        shift = self.vectors @ (self.vectors.mT @ self.slope / (2 * precision))
        shift = shift * (REACH * sqrt(len(shift)) / shift.norm()).clamp(max=1.0)
        root = self.scale_tril @ self.vectors * precision.rsqrt()
        upper = torch.linalg.qr(root.mT).R
        scale_tril = upper.mT * upper.diagonal().sign()
        return self.loc + self.scale_tril @ shift, scale_tril


def _at(log_joint: LogDensity, loc: Tensor, scale_tril: Tensor) -> _Gaussian | None:
    """Return a Gaussian with its expectations; ``None`` where half of its draws have no density."""
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
    """Return Adam's groups for the parameters of a model: weights of its networks at a tenth of the others' rate."""
    weights = [p for p in parameters if isinstance(p, nn.Parameter)]
    others = [p for p in parameters if not isinstance(p, nn.Parameter)]
    rates = ((weights, 0.005), (others, 0.05))
    return [{"params": group, "lr": rate} for group, rate in rates if group]


def amortized_gaussian_fit(
    sampler: AmortizedSampler,
    source: MinibatchSource,
    arguments: Arguments,
    parameters: Sequence[Tensor],
    *,
    num_steps: int,
    num_draws: int = 4,
) -> None:
    """Fit a Gaussian of the shared latents, and by the encoder the location and scale of every datum's.

    The local sampler starts as this Gaussian; adversarial training adds its shape.

    Args:
        sampler: The sampler, whose affine maps are set.
        source: Minibatches, and the log joint of each.
        arguments: The model's arguments.
        parameters: Leaves of the log density to fit too.
        num_steps: Steps of Adam.
        num_draws: Draws of every datum in a step.
    """
    shared = sampler.shared
    groups = [{"params": list(sampler.local.encoder.parameters()), "lr": 0.01}, *parameter_groups(parameters)]
    if shared is not None:
        dim = shared.latent_dim
        loc = shared.loc.clone().requires_grad_()
        log_diagonal = loc.new_full((dim,), 0.1).log().requires_grad_()
        lower = loc.new_zeros(dim, dim).requires_grad_()
        groups.append({"params": [loc, log_diagonal, lower], "lr": 0.05})

    def scale_tril() -> Tensor:
        return log_diagonal.exp()[:, None] * (torch.eye(dim).to(loc) + lower.tril(-1))

    def loss() -> Tensor | None:
        batch = source.batch(arguments)
        g, frame, log_scale = None, None, torch.zeros(())
        if shared is not None:
            frame = loc, scale_tril()
            g = loc + torch.randn(num_draws, dim).to(loc) @ frame[1].mT
            log_scale = log_diagonal.sum()
        x = sampler.context(batch.rows, g, frame)
        place, scales = sampler.local.frame(x)
        eps = torch.randn(num_draws, *place.shape[-2:]).to(place)
        z = place + (scales @ eps[..., None]).squeeze(-1)
        terms = source.terms(g, z, batch)
        weights = terms.new_full(terms.shape[1:], batch.weight)
        weights[0] = 1.0
        scores = terms @ weights
        scores = scores[scores.isfinite()]
        if not len(scores):
            return None
        log_scales = scales.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        per_draw = log_scales.expand(num_draws, -1).sum(-1)
        return -scores.mean() - log_scale - batch.weight * per_draw.mean()

    descend(loss, groups, num_steps, normalised=True)
    sampler.local.initialised.fill_(True)
    if shared is not None:
        shared.set_affine(loc.detach(), scale_tril().detach())
