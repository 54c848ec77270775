"""Fit a Gaussian to a log density: by natural gradient, by Adam, or by an encoder for every datum."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from implicitvi.inference.amortization import AmortizedSampler
from implicitvi.inference.minibatches import MinibatchSource
from implicitvi.inference.pathfinder import Paths, lower_triangular
from implicitvi.numerics.gaussian import whiten
from implicitvi.numerics.optimise import descend, gradients
from implicitvi.numerics.types import LogDensity
from implicitvi.pyro_model.arguments import Arguments

REFINING = 60  # most steps of natural gradient
AVERAGED = 10  # of them with falling rates, near the best Gaussian
FASTEST, SLOWEST = 0.5, 1e-4  # their rates
DRAWS = 512  # in each, or 20 for each dimension
REACH = 3.0  # most standard deviations that a mean moves in each dimension
FAIR = 100  # steps of an amortized start from which it should have arrived
LOOKS = 16  # at a noisy loss, to see whether its mean has arrived
PATIENCE = 20  # most steps before the rates fall
NEAR = (2.0, -1.0, 20.0)  # shift of the mean and range of the precision: limits for a start
SHIFT, SPREAD = 0.3, 0.25  # the same before the rates fall; the noise of the draws adds to the range
MANY = 50  # dimensions beyond which a single Gaussian is refined
WITHIN = 3.0  # standard deviations in each dimension, within which another Gaussian is not tried


def gaussian_fit(
    log_joint: LogDensity,
    loc: Tensor,
    scale_tril: Tensor,
    *,
    parameters: Sequence[Tensor] = (),
    num_steps: int = 600,
    num_particles: int = 32,
) -> tuple[Tensor, Tensor]:
    """Fit a full-rank Gaussian by Adam in the units of another one: for noisy log densities and many dimensions.

    Args:
        log_joint: Log density of points ``[S, D]``.
        loc: Mean ``[D]`` at the start.
        scale_tril: Lower triangular scale ``[D, D]`` at the start.
        parameters: Leaves of the log density to fit with the Gaussian.
        num_steps: Steps of Adam, the rate falling from 0.05 to 0.0025.
        num_particles: Draws a step.

    Returns:
        Location ``[D]`` and lower triangular scale ``[D, D]`` with a positive diagonal.
    """
    dim = len(loc)
    mean = torch.zeros_like(loc).requires_grad_()
    log_diagonal = torch.zeros_like(loc).requires_grad_()
    lower = torch.zeros_like(scale_tril).requires_grad_()

    def loss() -> Tensor | None:
        eps = torch.randn(num_particles, dim, dtype=loc.dtype, device=loc.device)
        v = mean + log_diagonal.exp() * (eps + eps @ lower.tril(-1).mT)
        u = loc + v @ scale_tril.mT
        scores = log_joint(u)
        finite = scores.isfinite()
        if not finite.all():
            if not finite.any():
                return None
            scores = log_joint(u[finite])
        return -scores.mean() - log_diagonal.sum()

    groups = [{"params": [mean, log_diagonal, lower], "lr": 0.05}, *parameter_groups(parameters)]
    descend(loss, groups, num_steps)
    with torch.no_grad():
        unit = torch.eye(dim, dtype=loc.dtype, device=loc.device)
        scale = log_diagonal.exp()[:, None] * (unit + lower.tril(-1))
        return loc + scale_tril @ mean, scale_tril @ scale


@dataclass(frozen=True, eq=False)
class GaussianFit:
    """A Gaussian with its expectations of a log density.

    Attributes:
        loc: Its mean ``[D]``.
        scale_tril: Its lower triangular scale ``[D, D]``.
        slope: ``E[s] [D]``, where ``s`` is the gradient of the log density in units of the Gaussian.
        values: Eigenvalues of ``-E[v sᵀ]``, made symmetric, ``[D]``, where ``v`` is a draw in these units.
        vectors: Its eigenvectors, the columns of ``[D, D]``.
        elbo: Evidence lower bound in nats, up to a constant that depends on ``D`` alone.
        error: Standard error of ``elbo``.
    """

    loc: Tensor
    scale_tril: Tensor
    slope: Tensor
    values: Tensor
    vectors: Tensor
    elbo: Tensor
    error: Tensor

    @classmethod
    def at(cls, log_joint: LogDensity, loc: Tensor, scale_tril: Tensor) -> GaussianFit | None:
        """Return the Gaussian of mean ``loc [D]`` and scale ``scale_tril [D, D]`` with its expectations.

        ``None`` if fewer than half of its draws have a density.
        """
        dim = len(loc)
        v = torch.randn(max(DRAWS, 20 * dim) // 2, dim, dtype=loc.dtype, device=loc.device)
        v = torch.cat([v, -v])
        log_p, score = gradients(log_joint, loc + v @ scale_tril.mT)
        finite = log_p.isfinite() & score.isfinite().all(1)
        if 2 * int(finite.sum()) < len(v):
            return None
        v, score = v[finite], score[finite] @ scale_tril
        slope = score.mean(0)
        spread = -(v.mT @ (score - slope)) / len(v)
        spread = (spread + spread.mT) / 2
        if not spread.isfinite().all():
            return None
        values, vectors = torch.linalg.eigh(spread)
        terms = log_p[finite] + 0.5 * v.square().sum(1)
        elbo = terms.mean() + scale_tril.diagonal().log().sum()
        return cls(loc, scale_tril, slope, values, vectors, elbo, terms.std() / sqrt(len(v)))

    def is_near(self, shift: float, low: float, high: float) -> bool:
        """Return whether the best mean is within ``shift`` standard deviations and the precision between the others."""
        within = self.slope.abs().max() < shift and low < self.values.min()
        return bool(within and self.values.max() < high)

    @property
    def arrived(self) -> bool:
        """True if the best Gaussian is near, so that a fit can start here."""
        return self.is_near(*NEAR)

    @property
    def settled(self) -> bool:
        """True if this is the best Gaussian up to the noise of the draws."""
        spread = SPREAD + 2.5 * sqrt(len(self.loc) / max(DRAWS, 20 * len(self.loc)))
        return self.is_near(SHIFT, 1 - spread, 1 + spread)

    def step(self, rate: float) -> tuple[Tensor, Tensor]:
        """Return mean and scale after a step of natural gradient."""
        precision = (1 + rate * (self.values - 1)).clamp(0.25, 16.0)
        shift = self.vectors @ (self.vectors.mT @ self.slope * rate / precision)
        shift = shift * (2 * REACH * rate * sqrt(len(shift)) / shift.norm()).clamp(max=1.0)
        root = self.scale_tril @ self.vectors * precision.rsqrt()
        return self.loc + self.scale_tril @ shift, lower_triangular(root)


def refine_gaussian(log_joint: LogDensity, loc: Tensor, scale_tril: Tensor) -> GaussianFit | None:
    """Refine a Gaussian approximation by natural gradient, in any units.

    The best Gaussian has ``E[s] = 0`` and ``-E[v sᵀ] = I``, where ``z = loc + scale_tril v`` and ``s`` is the gradient
    of the log density in ``v``. Steps of natural gradient, which are the same in all coordinates, lead there: with
    ``K = -E[v sᵀ]`` and the rate ``ρ`` the precision in ``v`` becomes ``P = (1 - ρ) I + ρ K``, and the mean
    ``ρ P⁻¹ E[s]``. A step after which the ELBO is lower is tried again at a quarter of its rate. Near the best Gaussian
    the rates fall, so that the noise of the steps averages out.

    Args:
        log_joint: Log density of points ``[S, D]``, the same at every look.
        loc: Mean ``[D]`` of the first Gaussian.
        scale_tril: Its lower triangular scale ``[D, D]``.

    Returns:
        The refined Gaussian; ``None`` where the first one has no density.

    References:
        The Variational Gaussian Approximation Revisited, Manfred Opper, Cédric Archambeau, 2009, eq. 8 and 9, for the
        identities. Handling the Positive-Definite Constraint in the Bayesian Learning Rule, Wu Lin, Mark Schmidt,
        Mohammad Emtiyaz Khan, 2020, for the steps.
    """
    here = GaussianFit.at(log_joint, loc, scale_tril)
    rate, averaged = FASTEST, 0
    for step in range(REFINING):
        if here is None or averaged == AVERAGED:
            break
        there = GaussianFit.at(log_joint, *here.step(min(rate, 1 / (averaged + 2))))
        if there is None or there.elbo < here.elbo - 2 * (there.error + here.error):
            rate /= 4
            if rate < SLOWEST:
                break
            continue
        here, rate = there, min(2 * rate, FASTEST)
        averaged += bool(averaged or here.settled or step >= PATIENCE)
    return here


def best_gaussian(
    log_joint: LogDensity, paths: Paths, *, tries: int, best: GaussianFit | None = None
) -> GaussianFit | None:
    """Refine the most promising Gaussians of the paths, and return the one with the highest ELBO.

    These are the best Gaussians of the paths with the highest ELBO, and the one at the highest end; in more than 50
    dimensions the first of them alone. A path that passes within the best Gaussian so far adds nothing.

    Args:
        log_joint: Log density of points ``[S, D]``, the same at every look.
        paths: Paths uphill.
        tries: Most Gaussians to refine, besides the one at the highest end.
        best: The best one so far.
    """
    many = paths.u.shape[1] > MANY
    by_elbo, by_height = (x.argsort(descending=True).tolist() for x in (paths.elbo, paths.log_p))
    places = [(paths.best_loc[k], paths.best_root[k]) for k in by_elbo[: 1 if many else tries]]
    places += [(paths.u[k], paths.root[k]) for k in by_height[: 0 if many else 1]]
    for loc, root in places:
        if best is not None and whiten(loc[None], best.loc, best.scale_tril).square().mean() < WITHIN**2:
            continue
        found = refine_gaussian(log_joint, loc, lower_triangular(root))
        if found is not None and (best is None or found.elbo > best.elbo + 2 * (found.error + best.error)):
            best = found
    return best


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

    # a shift of all local latents, which stays 0, and their mean scale over the number of data
    shift = sampler.local.loc.new_zeros(sampler.local.latent_dim).requires_grad_()
    unit = torch.diag(torch.ones_like(shift))

    def loss() -> Tensor | None:
        batch = source.batch(arguments)
        g, frame, log_scale = None, None, torch.zeros(())
        if shared is not None:
            frame = loc, scale_tril()
            g = loc + torch.randn(num_draws, dim).to(loc) @ frame[1].mT
            log_scale = log_diagonal.sum()
        x = sampler.context(batch.rows, g, frame)
        place, scales = sampler.local.frame(x)
        place = place + shift
        unit.copy_(scales.detach().flatten(0, -3).mean(0) / (batch.weight * len(batch.rows)))
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
    if shared is not None and num_steps >= FAIR:
        _warn_of_distance(loss, loc, lambda: scale_tril().detach(), "shared latents")
    if num_steps >= FAIR:
        _warn_of_distance(loss, shift, lambda: unit, "local latents")
    sampler.local.initialised.fill_(True)
    if shared is not None:
        shared.set_affine(loc.detach(), scale_tril().detach())


def _warn_of_distance(loss: Callable[[], Tensor | None], loc: Tensor, scale: Callable[[], Tensor], of: str) -> None:
    """Warn if the slope of a noisy loss at ``loc [D]``, in units of ``scale [D, D]``, says that the best is far."""
    values = [value for value in (loss() for _ in range(LOOKS)) if value is not None]
    slopes = [torch.autograd.grad(value, loc)[0] @ scale() for value in values]
    if len(slopes) < 2:
        return
    slope = torch.stack(slopes)
    off = (slope.mean(0).abs() - 3 * slope.std(0) / sqrt(len(slopes))).max().item()
    if off > NEAR[0]:
        warnings.warn(
            f"The start of the fit has not arrived: the mean of the {of} is off by more than {off:.1g} standard "
            "deviations. Bring the data to a mean near 0 and a scale near 1, or use more steps of warm_start.",
            stacklevel=7,
        )
