"""Gaussians and mixtures of them: moments, whitening, densities and draws."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, pi
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, constraints

from implicitvi import distributed
from implicitvi.errors import OptionError

JITTER = 1e-5  # added to the relative variances of a batch, so that a collapsed direction stays scorable


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean ``[(B,) D]`` of draws ``z [S, (B,) D]`` and the Cholesky factor of their covariance, regularised.

    Draws of all processes count. With fewer draws than dimensions the correlations are shrunk.
    """
    z = gather_draws(z)
    loc = z.mean(0)
    centred = (z - loc).movedim(0, -2)
    cov = centred.mT @ centred / max(len(z) - 1, 1)
    diagonal = cov.diagonal(dim1=-2, dim2=-1)
    cov = cov + torch.diag_embed(JITTER * diagonal + 1e-12)
    scale_tril, info = torch.linalg.cholesky_ex(cov)
    if info.any():  # fewer draws than dimensions: keep the variances
        scale_tril = torch.linalg.cholesky_ex(0.9 * cov + 0.1 * torch.diag_embed(diagonal + 1e-12)).L
    return loc, scale_tril


def whiten(z: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    """Return ``scale_tril⁻¹ (z - loc)`` for ``z [..., (B,) D]`` by one triangular solve for all draws of a context."""
    if loc.dim() == 1:
        rows: Tensor = torch.linalg.solve_triangular(scale_tril.mT, z - loc, upper=True, left=False)
        return rows
    solved: Tensor = torch.linalg.solve_triangular(scale_tril, (z - loc).movedim(0, -1), upper=False)
    return solved.movedim(-1, 0)


class Whitening:
    """A standardisation of draws by a location and a scale for each context; remembers the last result.

    Args:
        loc: ``m [..., D]``.
        scale_tril: Lower triangular ``L [..., D, D]``.
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor):
        self.loc = loc
        self.scale_tril = scale_tril
        self._last: tuple[Tensor, bool, Tensor] | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """Return ``L⁻¹ (z - m)`` for ``z [..., D]``, kept for the last ``z``: density and adversary both need it."""
        tracked = torch.is_grad_enabled()
        if self._last is None or self._last[0] is not z or self._last[1] != tracked:
            shape = torch.broadcast_shapes(z.shape, self.loc.shape)
            rows = z.expand(shape).reshape(-1, *self.loc.shape)
            self._last = (z, tracked, whiten(rows, self.loc, self.scale_tril).reshape(shape))
        return self._last[2]


class Gaussian(MultivariateNormal):
    """A `torch.distributions.MultivariateNormal` for many draws: drawn by one matrix product, standardised once."""

    _whitening: Whitening | None = None

    def standardise(self, value: Tensor) -> Tensor:
        """Return ``scale_tril⁻¹ (value - loc)`` of ``value [..., (B,) D]``."""
        # not in __init__, which torch's expand does not call
        if self._whitening is None:
            self._whitening = Whitening(self.loc, self._unbroadcasted_scale_tril)
        return self._whitening(value)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of ``value [..., (B,) D]`` in nats: ``[..., (B,)]``."""
        diagonal = self._unbroadcasted_scale_tril.diagonal(dim1=-2, dim2=-1)
        constant = diagonal.log().sum(-1) + 0.5 * log(2 * pi) * diagonal.shape[-1]
        return -0.5 * self.standardise(value).square().sum(-1) - constant

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw reparameterised samples ``[*sample_shape, (B,) D]``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        rows = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device).reshape(-1, *self.loc.shape)
        scaled = torch.einsum("...de,s...e->s...d", self._unbroadcasted_scale_tril, rows)
        draws: Tensor = self.loc + scaled.reshape(shape)
        return draws


class GaussianMixture(Distribution):
    """A mixture of ``K`` Gaussians with event shape ``[D]``, scored by one matrix product.

    Args:
        weights: Weights ``[K]``, summing to 1.
        locs: Means ``[K, D]``.
        scale_trils: Lower triangular scales ``[K, D, D]``.

    >>> one = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    >>> round(one.log_prob(torch.zeros(2)).item(), 4)
    -1.8379
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(self, weights: Tensor, locs: Tensor, scale_trils: Tensor):
        super().__init__(event_shape=locs.shape[-1:], validate_args=False)
        # copies: a distribution in use must not change with the next batch
        self.weights = weights.clone()
        self.centre = weights @ locs
        self.shifts = locs - self.centre
        self.scale_trils = scale_trils.clone()
        unit = torch.eye(locs.shape[-1], dtype=locs.dtype, device=locs.device)
        self._inverses = torch.linalg.solve_triangular(scale_trils, unit, upper=False)
        self._standard_shifts = torch.einsum("ked,kd->ke", self._inverses, self.shifts)
        log_scale = scale_trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        self._constants = self.weights.log() - log_scale - 0.5 * log(2 * pi) * len(unit)
        self._last: tuple[Tensor, bool, Tensor, Tensor] | None = None

    def log_joint(self, value: Tensor) -> Tensor:
        """Return the joint log density of ``value [..., D]`` and each component: ``[..., K]`` in nats."""
        return self._both(value)[1]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of ``value [..., D]``: ``[...]`` in nats."""
        return self.log_joint(value).logsumexp(-1)

    def local(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``value [..., D]`` standardised by component, averaged by responsibility; and these ``[..., K]``."""
        standard, joint = self._both(value)
        shares = joint.softmax(-1)
        return (shares[..., None, :] @ standard).squeeze(-2), shares

    def _both(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``value`` standardised by component ``[..., K, D]`` and `log_joint`, kept for the last ``value``."""
        tracked = torch.is_grad_enabled()
        if self._last is None or self._last[0] is not value or self._last[1] != tracked:
            flat = (value - self.centre) @ self._inverses.flatten(0, 1).mT
            standard = flat.unflatten(-1, self._standard_shifts.shape) - self._standard_shifts
            joint: Tensor = self._constants - 0.5 * standard.square().sum(-1)
            self._last = (value, tracked, standard, joint)
        return self._last[2], self._last[3]

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw independent samples ``[*sample_shape, D]``."""
        shape = torch.Size(sample_shape)
        which = torch.multinomial(self.weights.nan_to_num(1.0), shape.numel(), replacement=True)
        noise = torch.randn((len(which), *self.event_shape), dtype=self.centre.dtype, device=self.centre.device)
        parts = noise.split(which.bincount(minlength=len(self.weights)).tolist())
        scaled = [part @ scale.mT for part, scale in zip(parts, self.scale_trils, strict=True)]
        draws = torch.empty_like(noise)
        draws[which.argsort()] = torch.cat(scaled)
        return (draws + self.shifts[which] + self.centre).reshape(shape + self.event_shape)


class Mixture(Distribution):
    """A mixture of any distributions with event shape ``[D]``.

    Args:
        weights: Weights ``[K]``, summing to 1.
        parts: The ``K`` distributions.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(self, weights: Tensor, parts: Sequence[Distribution]):
        super().__init__(event_shape=parts[0].event_shape, validate_args=False)
        self.weights = weights
        self.parts = parts

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of ``value [..., D]``: ``[...]`` in nats."""
        each = torch.stack([part.log_prob(value) for part in self.parts], -1)
        return (each + self.weights.log()).logsumexp(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw independent samples ``[*sample_shape, D]``."""
        shape = torch.Size(sample_shape)
        which = torch.multinomial(self.weights.nan_to_num(1.0), shape.numel(), replacement=True)
        counts = which.bincount(minlength=len(self.parts)).tolist()
        draws = [part.sample((n,)) for part, n in zip(self.parts, counts, strict=True) if n]
        return torch.cat(draws)[which.argsort().argsort()].reshape(shape + self.event_shape)


def gather_draws(z: Tensor) -> Tensor:
    """Gather draws without context ``[S, D]`` from all processes; draws of a context belong to one process."""
    return distributed.gather(z) if z.dim() == 2 else z


def mean_and_cholesky(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean ``[D]`` of draws ``[S, D]`` and the Cholesky factor ``[D, D]`` of their covariance.

    Unlike `moments` it adds nothing to the covariance, and the units of the coordinates do not matter. It raises
    `OptionError` where a coordinate is constant or the draws lie on a plane of lower dimension.
    """
    loc, scale = z.mean(0), standard_deviations(z)
    unit = ((z - loc) / scale).mT
    factor, info = torch.linalg.cholesky_ex((unit @ unit.mT) / (len(z) - 1))
    if info or not factor.diagonal().min() > 1e-7:
        do = "Check whether the fit has collapsed, or one coordinate is a function of others."
        raise OptionError(f"The draws lie on a plane: their covariance is singular. {do}")
    return loc, scale[:, None] * factor


def standard_deviations(z: Tensor) -> Tensor:
    """Return the standard deviations ``[D]`` of draws ``[S, D]``; raise `OptionError` if a coordinate is constant."""
    scale = z.std(0)
    constant = ~(scale > 1e-12 * z.abs().amax(0))  # of a constant column it is a rounding error
    if constant.any():
        where = constant.nonzero().flatten().tolist()
        raise OptionError(f"Draws must vary in every dimension, got constant dimensions {where}. Leave these out.")
    return scale
