"""A fit does not depend on the units of its data, nor on how far these lie from the median of the prior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from implicitvi import AVBSVI, ImplicitGuide

STEPS = 1  # of a fit, which then is its start
WIDE = 4e6  # standard deviation of the prior of a level, in units of the noise
X = torch.linspace(-1, 1, 40).double()
NOISE = torch.randn(40, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
Model = Callable[..., Any]


def level(y: Tensor, c: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * c, WIDE * c))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu, c), obs=y)


def level_and_scale(y: Tensor, c: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * c, WIDE * c))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2 * c))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu, sigma), obs=y)


def regression(y: Tensor, c: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * c, WIDE * c))
    slope = pyro.sample("slope", dist.Normal(0 * c, 100 * c))
    sigma = pyro.sample("sigma", dist.Exponential(1 / c))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu + slope * X.to(y), sigma), obs=y)


def polynomial(y: Tensor, c: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * c, WIDE * c))
    beta = pyro.sample("beta", dist.Normal(0 * c, 100 * c).expand([3]).to_event(1))
    with pyro.plate("data", len(y)):
        powers = torch.stack([X, X**2, X**3], -1).to(y)
        pyro.sample("obs", dist.Normal(mu + (powers * beta).sum(-1), c), obs=y)


def robust(y: Tensor, c: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * c, WIDE * c))
    sigma = pyro.sample("sigma", dist.LogNormal(c.log(), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.StudentT(4.0, mu, sigma), obs=y)


def laplace(y: Tensor, c: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * c, WIDE * c))
    sigma = pyro.sample("sigma", dist.HalfNormal(3 * c))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Laplace(mu, sigma), obs=y)


def groups(y: Tensor, c: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * c, WIDE * c))
    with pyro.plate("groups", 4):
        beta = pyro.sample("beta", dist.Normal(0 * c, 2 * c))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu + beta[..., torch.arange(40) % 4], c), obs=y)


def change(y: Tensor, c: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * c, WIDE * c))
    beta = pyro.sample("beta", dist.StudentT(3.0, 0 * c, 10 * c))
    sigma = pyro.sample("sigma", dist.HalfNormal(3 * c))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu + beta * (X > 0).to(y), sigma), obs=y)


def two_levels(y: Tensor, c: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * c, WIDE * c).expand([2]).to_event(1))
    with pyro.plate("data", len(y)):
        both = torch.stack([mu[..., :1] + 0 * y, mu.mean(-1, keepdim=True) + 0 * y], -1)
        pyro.sample("obs", dist.Normal(both, c).to_event(1), obs=torch.stack([y, y.flip(0)], -1))


def rates(y: Tensor, c: Tensor) -> None:
    """Waiting times, whose logarithm has the location."""
    rate = pyro.sample("mu", dist.LogNormal(-c.log(), 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Exponential(rate), obs=c * (y / c - (y / c).mean()).exp())


MODELS: list[Model] = [
    level,
    level_and_scale,
    regression,
    polynomial,
    robust,
    laplace,
    groups,
    change,
    two_levels,
    rates,
]
# units, location in standard deviations of the posterior, dtype; float32 keeps 7 digits, so a location of 10⁶ standard
# deviations leaves steps of 0.06 of them
PLACES = [(1e-6, 0.0, torch.float32), (1e-3, 1e5, torch.float32), (1e6, 1e6, torch.float64)]


def standardised(model: Model, unit: float, distance: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Mean and standard deviation of each site ``[2, ...]``, in units of the noise and relative to the location."""
    at = distance / 40**0.5
    y = (unit * (at + NOISE)).to(dtype)
    c = torch.tensor(unit, dtype=dtype)
    guide = ImplicitGuide(model)
    AVBSVI(model, guide, num_steps=STEPS, num_particles=128, seed=0, progress=False, max_modes=1).run(y, c)
    summary = {}
    for name, value in guide.sample(4000).items():
        x = value.double()
        if name == "mu":
            x = (x * unit).log() if model is rates else x / unit - at
        elif name == "sigma":
            x = (x / unit).log()
        elif name in ("slope", "beta"):
            x = x / unit
        summary[name] = torch.stack([x.mean(0), x.std(0)])
    return summary


@pytest.fixture(scope="module")
def plain() -> Callable[[Model], dict[str, Tensor]]:
    """Remember the posterior of each model in plain units."""
    known: dict[str, dict[str, Tensor]] = {}

    def of(model: Model) -> dict[str, Tensor]:
        if model.__name__ not in known:
            known[model.__name__] = standardised(model, 1.0, 0.0, torch.float64)
        return known[model.__name__]

    return of


@pytest.mark.parametrize(
    "place", PLACES, ids=lambda place: f"{place[0]:g}-{place[1]:g}-{place[2]}".replace("torch.", "")
)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_the_posterior_is_the_same_in_all_units_and_places(
    model: Model, place: tuple[float, float, torch.dtype], plain: Callable[[Model], dict[str, Tensor]]
) -> None:
    """Means differ by less than 0.15 standard deviations, and standard deviations by less than 15 %."""
    for name, (mean, sd) in standardised(model, *place).items():
        expected_mean, expected_sd = plain(model)[name]
        assert ((mean - expected_mean) / expected_sd).abs().max() < 0.15, name
        assert (sd / expected_sd).log().abs().max() < 0.15, name
