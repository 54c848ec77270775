"""Targets that can be drawn from exactly: the Eight Schools of the AVB paper, toys, a funnel, mixtures and more."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from implicitvi.datasets import eight_schools, toy_densities
from suite.target import Sites, Target

WEIGHTS = {2: (0.3, 0.7), 4: (0.1, 0.2, 0.3, 0.4)}
REACH = 3.0  # of each mode from the origin, in standard deviations of a mode
TOYS = {"banana": "banana", "x_shaped": "x_shaped", "multimodal": "two_modes"}


def one_site(name: str) -> dict[str, Any]:
    """The coordinates of a model of a single site on the real line: the site itself."""
    return {"compare": lambda sites: sites[name].double(), "sites": lambda x: {name: x}}


def paper() -> Target:
    """Eight Schools of the AVB paper: ten latents, two mirrored modes joined by a bridge."""
    schools = eight_schools()

    def draw(count: int, generator: torch.Generator) -> Tensor:
        return flat(schools.exact_draws(count, generator=generator))

    def flat(sites: Sites) -> Tensor:
        columns = [sites["mu"][:, None], sites["tau"][:, None], sites["eta"]]
        return torch.cat(columns, 1).double()

    return Target(
        "eight_schools_paper",
        schools.model,
        (schools.sigma, schools.y),
        draw,
        flat,
        lambda x: {"mu": x[:, 0], "tau": x[:, 1], "eta": x[:, 2:]},
        modes=lambda x: (x[:, 1] > 0).long(),
        num_draws=20_000,
        log_evidence=schools.log_evidence(),
    )


def toy(name: str) -> Target:
    """A density of the plane: 20 000 draws judge it, as in the papers that quote its divergences."""
    density = toy_densities()[TOYS[name]]
    return Target(
        name,
        density.model,
        (),
        lambda count, generator: density.sample(count, generator).double(),
        **one_site("z"),
        modes=(lambda x: (x[:, 0] > 0).long()) if name == "multimodal" else None,
        num_draws=20_000,
        log_evidence=0.0,
    )


def funnel(dim: int = 10) -> Target:
    """Neal's funnel: ``v ~ N(0, 3²)`` and ``x_i ~ N(0, e^v)``, a variance."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        scale = (v / 2).exp()[..., None].expand(*v.shape, dim - 1)
        pyro.sample("x", dist.Normal(torch.zeros(dim - 1), scale).to_event(1))

    def draw(count: int, generator: torch.Generator) -> Tensor:
        eps = torch.randn(count, dim, generator=generator, dtype=torch.float64)
        v = 3 * eps[:, :1]
        return torch.cat([v, (v / 2).exp() * eps[:, 1:]], 1)

    return Target(
        f"funnel_{dim}",
        model,
        (),
        draw,
        lambda sites: torch.cat([sites["v"][:, None], sites["x"]], 1).double(),
        lambda x: {"v": x[:, 0], "x": x[:, 1:]},
        log_evidence=0.0,
    )


def mixture(components: int, dim: int) -> Target:
    """Unit Gaussians of unequal weights, each three standard deviations from the origin.

    Two modes face each other along the diagonal, six apart; four stand on a cross, neighbours 4.2 apart.
    """
    weights = torch.tensor(WEIGHTS[components], dtype=torch.float64)
    first = torch.ones(dim) / math.sqrt(dim)
    second = (-1.0) ** torch.arange(dim) / math.sqrt(dim)  # at a right angle to it, for an even dim
    arms = [first, -first, second, -second][:components]
    locs = REACH * torch.stack(arms)
    log_weights = weights.log().float()

    def log_prob(z: Tensor) -> Tensor:
        squared = (z[..., None, :] - locs).square().sum(-1)
        constant = 0.5 * dim * math.log(2 * math.pi)
        return (log_weights - 0.5 * squared).logsumexp(-1) - constant

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1).mask(False))
        pyro.factor("log_density", log_prob(z))

    def draw(count: int, generator: torch.Generator) -> Tensor:
        which = torch.multinomial(weights, count, replacement=True, generator=generator)
        return locs.double()[which] + torch.randn(count, dim, generator=generator, dtype=torch.float64)

    return Target(
        f"mixture_{components}_modes_{dim}d",
        model,
        (),
        draw,
        **one_site("z"),
        modes=lambda x: (x @ locs.double().T).argmax(1),  # all modes are as far from the origin
        log_evidence=0.0,
    )


@cache
def waveforms(count: int = 400) -> tuple[Tensor, Tensor]:
    """Features ``[N, 22]``, the first of them 1, and labels ``[N]`` of two classes of noisy waves.

    References:
        Classification and Regression Trees, Leo Breiman, Jerome Friedman, Richard Olshen, Charles Stone, 1984, section
        2.6.2: each wave is a random convex combination of two of three triangles, plus unit noise.
    """
    generator = torch.Generator().manual_seed(22)
    place = torch.arange(1, 22)
    triangle = torch.stack([(6 - (place - peak).abs()).clamp(min=0) for peak in (7, 15, 11)])
    label = torch.randint(2, (count,), generator=generator)
    share = torch.rand(count, 1, generator=generator)
    other = triangle[1 + label]
    noise = torch.randn(count, 21, generator=generator)
    waves = share * triangle[0] + (1 - share) * other + noise
    return torch.cat([torch.ones(count, 1), waves], 1), label.float()


def logistic(scale: float = 10.0) -> Target:
    """Logistic regression in 22 dimensions on waveforms, coefficients ``N(0, 10²)``."""
    x, y = waveforms()

    def model(x: Tensor, y: Tensor) -> None:
        prior = dist.Normal(torch.zeros(x.shape[1]), scale).to_event(1)
        beta = pyro.sample("beta", prior)
        pyro.sample("y", dist.Bernoulli(logits=beta @ x.mT).to_event(1), obs=y)

    return Target(
        "logistic_22",
        model,
        (x, y),
        partial(logistic_draws, x.double(), y.double(), scale),
        **one_site("beta"),
        num_reference=20_000,
    )


def logistic_draws(
    x: Tensor, y: Tensor, scale: float, count: int, generator: torch.Generator, sweeps: int = 10
) -> Tensor:
    """Independent posterior draws ``[count, D]``: as many Hamiltonian chains, in the frame of Laplace's approximation.

    There the posterior is nearly a standard normal, which a trajectory of length π/2 forgets its start in.
    """
    dim = x.shape[1]

    def gradient(beta: Tensor) -> Tensor:
        return (y - (beta @ x.T).sigmoid()) @ x - beta / scale**2

    def log_prob(beta: Tensor) -> Tensor:
        logits = beta @ x.T
        fit = (y * logits - torch.nn.functional.softplus(logits)).sum(-1)
        return fit - 0.5 * (beta / scale).square().sum(-1)

    mode = x.new_zeros(dim)
    for _ in range(50):  # Newton; the density is log-concave
        p = (x @ mode).sigmoid()
        precision = (x * (p * (1 - p))[:, None]).T @ x + torch.eye(dim).double() / scale**2
        mode = mode + torch.linalg.solve(precision, gradient(mode[None])[0])
    factor = torch.linalg.inv(torch.linalg.cholesky(precision))  # factorᵀ factor = precision⁻¹

    def noise() -> Tensor:
        return torch.randn(count, dim, generator=generator, dtype=torch.float64)

    def place(w: Tensor) -> Tensor:
        return mode + w @ factor

    steps, length = 8, math.pi / 16
    w = noise()
    for _ in range(sweeps):
        v, momentum = w, noise()
        before = log_prob(place(w)) - 0.5 * momentum.square().sum(-1)
        momentum = momentum + 0.5 * length * gradient(place(v)) @ factor.T
        for i in range(steps):
            v = v + length * momentum
            last = 0.5 if i == steps - 1 else 1.0
            momentum = momentum + last * length * gradient(place(v)) @ factor.T
        after = log_prob(place(v)) - 0.5 * momentum.square().sum(-1)
        chance = torch.rand(count, generator=generator, dtype=torch.float64)
        w = torch.where((chance.log() < after - before)[:, None], v, w)
    return place(w)


SYNTHETIC: dict[str, Callable[[], Target]] = {
    **{name: partial(toy, name) for name in TOYS},
    "eight_schools_paper": paper,
    "funnel_10": funnel,
    "logistic_22": logistic,
    **{
        f"mixture_{components}_modes_{dim}d": partial(mixture, components, dim)
        for components in WEIGHTS
        for dim in (2, 10, 50)
    },
}
