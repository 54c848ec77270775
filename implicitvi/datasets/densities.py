"""Two-dimensional densities, each with exact draws, its normalising constant and a Pyro model.

To add a toy density, derive a frozen dataclass from `ToyDensity` and add it to `toy_densities`. Write ``log_prob`` in
tensor arithmetic without branches on values, so that ``torch.func.vmap`` can run it.

References:
    Published code of Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), for `Torus` and `Rosenbrock`.
    Unbiased implicit variational inference (Titsias, Ruiz, 2019), for the others.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from implicitvi.datasets.grids import LOG_2PI, inverse_cdf_draws, log_integral, noise, uniform
from implicitvi.errors import check_at_least


class ToyDensity(ABC):
    """A density of the plane, possibly unnormalised, with exact draws; ``name`` is its key in `toy_densities`."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of a window for plots that holds nearly all of the mass."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log density ``[...]`` of ``z [..., 2]``, before `log_normaliser` is subtracted."""

    def log_normaliser(self) -> float:
        """Return the log integral of ``exp(log_prob)`` over the plane, 0 by default."""
        return 0.0

    @abstractmethod
    def draw(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """Draw ``[S, 2]`` independently and exactly, in float64; called by `sample`."""

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``[S, 2]`` independently and exactly; with ``generator=None`` from torch's own generator."""
        check_at_least("num_samples", num_samples, 1)
        return self.draw(num_samples, generator).to(torch.get_default_dtype())

    def model(self) -> Tensor:
        """Run the Pyro model: one latent site ``z [2]`` with exactly this log density.

        The site itself is flat: its normal distribution is masked out and only provides starting points.
        """
        z: Tensor = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
        pyro.factor("log_density", self.log_prob(z))
        return z


@dataclass(frozen=True)
class Torus(ToyDensity):
    """A ring of radius √2, ``log p = -(z₁² + z₂² - 2)²``, unnormalised.

    >>> Torus().log_prob(torch.tensor([1.0, 0.0])).item()
    -1.0
    """

    name: ClassVar[str] = "torus"

    extent = (-2.5, 2.5, -2.5, 2.5)

    def log_prob(self, z: Tensor) -> Tensor:
        return -(z.square().sum(-1) - 2).square()

    def log_normaliser(self) -> float:
        # in s = |z|², with area element π ds, this is the density of N(2, 1/2) truncated at 0
        return math.log(math.pi * 0.5 * math.sqrt(math.pi) * (1 + math.erf(2)))

    def draw(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        squared = inverse_cdf_draws(lambda s: -(s - 2).square(), 0.0, 9.0, num_samples, generator)
        angle = 2 * math.pi * uniform(num_samples, generator)
        return _plane(squared.sqrt() * angle.cos(), squared.sqrt() * angle.sin())


@dataclass(frozen=True)
class Rosenbrock(ToyDensity):
    """A curved valley, ``log p = -(z₁ - 1)² - (z₂² - z₁)²``, unnormalised.

    >>> Rosenbrock().log_prob(torch.tensor([2.0, 1.0])).item()
    -2.0
    """

    name: ClassVar[str] = "rosenbrock"

    extent = (-1.0, 4.0, -2.5, 2.5)

    def log_prob(self, z: Tensor) -> Tensor:
        z1, z2 = z.unbind(-1)
        return -(z1 - 1).square() - (z2.square() - z1).square()

    def log_normaliser(self) -> float:
        # z₁ in closed form, z₂ on a grid
        return 0.5 * math.log(math.pi / 2) + log_integral(_rosenbrock_log_z2, -4.0, 4.0)

    def draw(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        z2 = inverse_cdf_draws(_rosenbrock_log_z2, -4.0, 4.0, num_samples, generator)
        return _plane(0.5 * (1 + z2.square() + noise(num_samples, generator)), z2)


@dataclass(frozen=True)
class Banana(ToyDensity):
    """A bent normal, normalised: ``(z₁, z₁² + z₂ + 1)`` is normal with unit variances and a correlation in (-1, 1)."""

    name: ClassVar[str] = "banana"
    correlation: float = 0.9

    extent = (-4.0, 4.0, -13.0, 2.0)

    def log_prob(self, z: Tensor) -> Tensor:
        z1, z2 = z.unbind(-1)
        return _log_correlated(z1, z1.square() + z2 + 1, self.correlation)

    def draw(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        z1, second = _correlated(noise((2, num_samples), generator), self.correlation)
        return _plane(z1, second - z1.square() - 1)


@dataclass(frozen=True)
class TwoModes(ToyDensity):
    """A pair of round modes: equal parts ``N((±offset, 0), I)`` with ``offset >= 0``, normalised."""

    name: ClassVar[str] = "two_modes"
    offset: float = 2.0

    @property
    def extent(self) -> tuple[float, float, float, float]:
        return -self.offset - 3.5, self.offset + 3.5, -3.5, 3.5

    def log_prob(self, z: Tensor) -> Tensor:
        z1, z2 = z.unbind(-1)
        left, right = -0.5 * (z1 + self.offset).square(), -0.5 * (z1 - self.offset).square()
        return torch.logaddexp(left, right) - 0.5 * z2.square() - math.log(2) - LOG_2PI

    def draw(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        z1, z2 = noise((2, num_samples), generator)
        return _plane(z1 + self.offset * _signs(num_samples, generator), z2)


@dataclass(frozen=True)
class XShaped(ToyDensity):
    """A cross: equal parts ``N(0, 2 [[1, ±ρ], [±ρ, 1]])`` with ``correlation`` ``ρ`` in (-1, 1), normalised."""

    name: ClassVar[str] = "x_shaped"
    correlation: float = 0.9

    extent = (-5.0, 5.0, -5.0, 5.0)

    def log_prob(self, z: Tensor) -> Tensor:
        z1, z2 = (z / math.sqrt(2)).unbind(-1)
        arms = [_log_correlated(z1, z2, sign * self.correlation) for sign in (1, -1)]
        return torch.logaddexp(*arms) - 2 * math.log(2)

    def draw(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        z1, z2 = _correlated(noise((2, num_samples), generator), self.correlation)
        return math.sqrt(2) * _plane(z1, z2 * _signs(num_samples, generator))


def toy_densities() -> dict[str, ToyDensity]:
    """Return the toy densities by name.

    >>> list(toy_densities())
    ['torus', 'rosenbrock', 'banana', 'two_modes', 'x_shaped']
    """
    densities = [Torus(), Rosenbrock(), Banana(), TwoModes(), XShaped()]
    return {density.name: density for density in densities}


def _rosenbrock_log_z2(z2: Tensor) -> Tensor:
    """Return the log marginal of ``z₂`` up to a constant: ``z₁ | z₂`` is ``N((1 + z₂²) / 2, 1/4)``."""
    return -0.5 * (1 - z2.square()).square()


def _log_correlated(a: Tensor, b: Tensor, correlation: float) -> Tensor:
    """Return the log density of two standard normals with a correlation."""
    rest = 1 - correlation**2
    square = (a.square() - 2 * correlation * a * b + b.square()) / rest
    return -0.5 * square - LOG_2PI - 0.5 * math.log(rest)


def _correlated(eps: Tensor, correlation: float) -> tuple[Tensor, Tensor]:
    """Return two standard normals with a correlation, from independent ones ``[2, S]``."""
    return eps[0], correlation * eps[0] + math.sqrt(1 - correlation**2) * eps[1]


def _plane(z1: Tensor, z2: Tensor) -> Tensor:
    return torch.stack([z1, z2], -1)


def _signs(num_samples: int, generator: torch.Generator | None) -> Tensor:
    return 1.0 - 2 * torch.randint(2, (num_samples,), generator=generator)
