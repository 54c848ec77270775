"""Posteriors whose truth is known: the Eight Schools of the AVB paper and densities of the plane.

Each has a plain Pyro ``model`` to fit, exact independent draws to compare with and its log
normalising constant (of the Eight Schools: the log evidence, in nats). Data and draws live on the
CPU in torch's default dtype; constants are computed in float64. Draws come from the generator
passed, or from torch's own.

Adding a toy density: a frozen dataclass derived from `ToyDensity`, its ``log_prob`` made of plain
tensor arithmetic (no branch on values, so that ``torch.func.vmap`` can run it); then join
`toy_densities`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from implicitvi.errors import check_at_least

__all__ = [
    "Banana",
    "EightSchools",
    "Rosenbrock",
    "Torus",
    "ToyDensity",
    "TwoModes",
    "XShaped",
    "eight_schools",
    "toy_densities",
]

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class EightSchools:
    """Eight Schools as the AVB paper has it: a ten-dimensional posterior with two mirrored modes.

    ``mu, tau, eta_i ~ N(0, 1)`` and ``y_i ~ N(mu + tau · eta_i, sigma_i²)``. The scale ``tau`` may
    be negative, so the posterior is symmetric under ``(tau, eta) → (-tau, -eta)``.

    Attributes:
        y: Effects, ``[8]``.
        sigma: Their standard errors, ``[8]``.

    References:
        Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), section 5.1; the data are
        those of its published code.
    """

    y: Tensor
    sigma: Tensor

    @staticmethod
    def model(sigma: Tensor, y: Tensor | None = None) -> None:
        """Pyro model: sites ``mu``, ``tau`` and, in plate ``schools``, ``eta [8]``, ``obs [8]``.

        Args:
            sigma: Standard errors, ``[8]``.
            y: Effects, ``[8]``; ``None`` to draw them.
        """
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.Normal(0.0, 1.0))
        with pyro.plate("schools", len(sigma)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)

    def log_evidence(self) -> float:
        """``log p(y)`` in nats, -12.7108 for the paper's data.

        ``eta`` and ``mu`` integrate out in closed form; ``tau`` does on a grid.

        >>> round(eight_schools().log_evidence(), 4)
        -12.7108
        """
        return _log_integral(self._log_tau, -10.0, 10.0)

    def exact_draws(
        self, num_samples: int, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Draw independently from the exact posterior.

        Args:
            num_samples: Number ``S`` of draws.
            generator: Source of randomness; ``None`` for torch's own.

        Returns:
            ``{"mu": [S], "tau": [S], "eta": [S, 8]}``.

        >>> draws = eight_schools().exact_draws(5)
        >>> {name: tuple(draw.shape) for name, draw in draws.items()}
        {'mu': (5,), 'tau': (5,), 'eta': (5, 8)}
        """
        check_at_least("num_samples", num_samples, 1)
        tau = _inverse_cdf_draws(self._log_tau, -10.0, 10.0, num_samples, generator)
        mean, precision = self._mu_given_tau(tau)
        mu = mean + _noise(num_samples, generator) / precision.sqrt()
        y, variance = self.y.double(), self.sigma.double().square()
        total = variance + tau[:, None].square()
        eta = tau[:, None] * (y - mu[:, None]) / total
        eta = eta + (variance / total).sqrt() * _noise((num_samples, len(y)), generator)
        dtype = torch.get_default_dtype()
        return {"mu": mu.to(dtype), "tau": tau.to(dtype), "eta": eta.to(dtype)}

    def _mu_given_tau(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and precision ``[S]`` of the normal ``p(mu | tau, y)``, for ``tau [S]``."""
        weights = 1 / (self.sigma.double().square() + tau[:, None].square())
        precision = 1 + weights.sum(-1)
        return (weights * self.y.double()).sum(-1) / precision, precision

    def _log_tau(self, tau: Tensor) -> Tensor:
        """``log p(tau, y) [S]``: ``log p(mu, tau, y) - log p(mu | tau, y)``, at the mean ``mu``."""
        mu, precision = self._mu_given_tau(tau)
        variance = self.sigma.double().square() + tau[:, None].square()
        residual = (self.y.double() - mu[:, None]).square() / variance
        log_likelihood = -0.5 * (residual + variance.log() + _LOG_2PI).sum(-1)
        log_priors = -0.5 * (mu.square() + tau.square()) - _LOG_2PI
        return log_likelihood + log_priors - 0.5 * (precision.log() - _LOG_2PI)


def eight_schools() -> EightSchools:
    """Return the Eight Schools data of the AVB paper's code, in torch's default dtype.

    The effects are the usual ones divided by ten, the errors by about twenty: hence the two modes.

    >>> eight_schools().y[:3]
    tensor([ 2.8000,  0.8000, -0.3000])
    """
    return EightSchools(
        y=torch.tensor([2.8, 0.8, -0.3, 0.7, -0.1, 0.1, 1.8, 1.2]),
        sigma=torch.tensor([0.8, 0.5, 0.8, 0.6, 0.5, 0.6, 0.5, 0.4]),
    )


class ToyDensity(ABC):
    """A density of the plane, perhaps unnormalised, that can be drawn from exactly.

    Implementing a toy density: see the head of this module.

    Attributes:
        name: Short name, the key in `toy_densities`.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of a window that holds nearly all of the mass, for plots."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """Log density ``[...]`` of ``z [..., 2]``, before `log_normaliser` is subtracted."""

    @abstractmethod
    def log_normaliser(self) -> float:
        """Log integral of ``exp(log_prob)`` over the plane; 0 where `log_prob` is normalised."""

    @abstractmethod
    def draw(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """Draw ``[S, 2]`` independently and exactly, in float64; called by `sample`."""

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw independently and exactly.

        Args:
            num_samples: Number ``S`` of draws.
            generator: Source of randomness; ``None`` for torch's own.

        Returns:
            Draws, ``[S, 2]``.
        """
        check_at_least("num_samples", num_samples, 1)
        return self.draw(num_samples, generator).to(torch.get_default_dtype())

    def model(self) -> Tensor:
        """Pyro model with one latent site ``z [2]`` and this log density, nothing added to it.

        The site itself is flat: its normal distribution is masked out and only says where to start.
        """
        start = dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False)
        z: Tensor = pyro.sample("z", start)
        pyro.factor("log_density", self.log_prob(z))
        return z


@dataclass(frozen=True)
class Torus(ToyDensity):
    """A ring of radius √2: ``log p = -(z₁² + z₂² - 2)²``, unnormalised.

    >>> Torus().log_prob(torch.tensor([1.0, 0.0])).item()
    -1.0

    References:
        Published code of Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017).
    """

    name: ClassVar[str] = "torus"

    @property
    def extent(self) -> tuple[float, float, float, float]:
        return -2.5, 2.5, -2.5, 2.5

    def log_prob(self, z: Tensor) -> Tensor:
        return -(z.square().sum(-1) - 2).square()

    def log_normaliser(self) -> float:
        # In s = |z|², whose area element is π ds, the density is that of N(2, 1/2) cut at 0.
        return math.log(math.pi * 0.5 * math.sqrt(math.pi) * (1 + math.erf(2)))

    def draw(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        squared = _inverse_cdf_draws(lambda s: -(s - 2).square(), 0.0, 9.0, num_samples, generator)
        angle = 2 * math.pi * _uniform(num_samples, generator)
        return _plane(squared.sqrt() * angle.cos(), squared.sqrt() * angle.sin())


@dataclass(frozen=True)
class Rosenbrock(ToyDensity):
    """A curved valley: ``log p = -(z₁ - 1)² - (z₂² - z₁)²``, unnormalised.

    >>> Rosenbrock().log_prob(torch.tensor([2.0, 1.0])).item()
    -2.0

    References:
        Published code of Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017).
    """

    name: ClassVar[str] = "rosenbrock"

    @property
    def extent(self) -> tuple[float, float, float, float]:
        return -1.0, 4.0, -2.5, 2.5

    def log_prob(self, z: Tensor) -> Tensor:
        z1, z2 = z.unbind(-1)
        return -(z1 - 1).square() - (z2.square() - z1).square()

    def log_normaliser(self) -> float:
        # Over z₁ in closed form, over z₂ on a grid.
        return 0.5 * math.log(math.pi / 2) + _log_integral(_rosenbrock_log_z2, -4.0, 4.0)

    def draw(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        z2 = _inverse_cdf_draws(_rosenbrock_log_z2, -4.0, 4.0, num_samples, generator)
        return _plane(0.5 * (1 + z2.square() + _noise(num_samples, generator)), z2)


@dataclass(frozen=True)
class Banana(ToyDensity):
    """A bent normal: ``(z₁, z₁² + z₂ + 1)`` is normal with unit variances, normalised.

    Args:
        correlation: Of that normal, inside (-1, 1).

    References:
        Unbiased implicit variational inference (Titsias, Ruiz, 2019).
    """

    name: ClassVar[str] = "banana"
    correlation: float = 0.9

    @property
    def extent(self) -> tuple[float, float, float, float]:
        return -4.0, 4.0, -13.0, 2.0

    def log_prob(self, z: Tensor) -> Tensor:
        z1, z2 = z.unbind(-1)
        return _log_correlated(z1, z1.square() + z2 + 1, self.correlation)

    def log_normaliser(self) -> float:
        return 0.0

    def draw(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        z1, second = _correlated(_noise((2, num_samples), generator), self.correlation)
        return _plane(z1, second - z1.square() - 1)


@dataclass(frozen=True)
class TwoModes(ToyDensity):
    """Two round modes on the first axis: the equal mixture of ``N((±offset, 0), I)``, normalised.

    Args:
        offset: Distance of each mode from the origin, 0 or more.

    References:
        Unbiased implicit variational inference (Titsias, Ruiz, 2019).
    """

    name: ClassVar[str] = "two_modes"
    offset: float = 2.0

    @property
    def extent(self) -> tuple[float, float, float, float]:
        return -self.offset - 3.5, self.offset + 3.5, -3.5, 3.5

    def log_prob(self, z: Tensor) -> Tensor:
        z1, z2 = z.unbind(-1)
        left, right = -0.5 * (z1 + self.offset).square(), -0.5 * (z1 - self.offset).square()
        return torch.logaddexp(left, right) - 0.5 * z2.square() - math.log(2) - _LOG_2PI

    def log_normaliser(self) -> float:
        return 0.0

    def draw(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        z1, z2 = _noise((2, num_samples), generator)
        return _plane(z1 + self.offset * _signs(num_samples, generator), z2)


@dataclass(frozen=True)
class XShaped(ToyDensity):
    """A cross: the equal mixture of ``N(0, 2 [[1, ±ρ], [±ρ, 1]])``, normalised.

    Args:
        correlation: The ``ρ`` of the two arms, inside (-1, 1).

    References:
        Unbiased implicit variational inference (Titsias, Ruiz, 2019).
    """

    name: ClassVar[str] = "x_shaped"
    correlation: float = 0.9

    @property
    def extent(self) -> tuple[float, float, float, float]:
        return -5.0, 5.0, -5.0, 5.0

    def log_prob(self, z: Tensor) -> Tensor:
        z1, z2 = (z / math.sqrt(2)).unbind(-1)
        arms = [_log_correlated(z1, z2, sign * self.correlation) for sign in (1, -1)]
        return torch.logaddexp(*arms) - 2 * math.log(2)

    def log_normaliser(self) -> float:
        return 0.0

    def draw(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        z1, z2 = _correlated(_noise((2, num_samples), generator), self.correlation)
        return math.sqrt(2) * _plane(z1, z2 * _signs(num_samples, generator))


def toy_densities() -> dict[str, ToyDensity]:
    """Return the toy densities by name.

    >>> list(toy_densities())
    ['torus', 'rosenbrock', 'banana', 'two_modes', 'x_shaped']
    """
    densities = [Torus(), Rosenbrock(), Banana(), TwoModes(), XShaped()]
    return {density.name: density for density in densities}


def _rosenbrock_log_z2(z2: Tensor) -> Tensor:
    """Marginal of ``z₂``, less a constant: ``z₁ | z₂`` is ``N((1 + z₂²) / 2, 1/4)``."""
    return -0.5 * (1 - z2.square()).square()


def _log_correlated(a: Tensor, b: Tensor, correlation: float) -> Tensor:
    """Log density of two standard normals with a correlation."""
    rest = 1 - correlation**2
    square = (a.square() - 2 * correlation * a * b + b.square()) / rest
    return -0.5 * square - _LOG_2PI - 0.5 * math.log(rest)


def _correlated(noise: Tensor, correlation: float) -> tuple[Tensor, Tensor]:
    """Two standard normals with a correlation, from independent ones ``[2, S]``."""
    return noise[0], correlation * noise[0] + math.sqrt(1 - correlation**2) * noise[1]


def _plane(z1: Tensor, z2: Tensor) -> Tensor:
    return torch.stack([z1, z2], -1)


def _uniform(shape: int | tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _noise(shape: int | tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _signs(num_samples: int, generator: torch.Generator | None) -> Tensor:
    return 1.0 - 2 * torch.randint(2, (num_samples,), generator=generator)


def _log_integral(log_density: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    """Log integral by the midpoint rule, for a smooth density that vanishes at both ends."""
    return float(_cell_weights(log_density, low, high)[1].logsumexp(0))


def _inverse_cdf_draws(
    log_density: Callable[[Tensor], Tensor],
    low: float,
    high: float,
    num_samples: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw ``[S]`` by the inverse distribution function, even inside each of 65 536 cells."""
    midpoints, log_weights = _cell_weights(log_density, low, high)
    cumulative = log_weights.softmax(0).cumsum(0)
    level = _uniform(num_samples, generator) * cumulative[-1]
    cell = torch.searchsorted(cumulative, level, right=True).clamp(max=len(midpoints) - 1)
    width = (high - low) / len(midpoints)
    return midpoints[cell] + width * (_uniform(num_samples, generator) - 0.5)


def _cell_weights(
    log_density: Callable[[Tensor], Tensor], low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Midpoints of even cells and the log mass of each, float64 ``[65536]``."""
    cells = 2**16
    width = (high - low) / cells
    midpoints = low + width * (torch.arange(cells, dtype=torch.float64) + 0.5)
    return midpoints, log_density(midpoints) + math.log(width)
