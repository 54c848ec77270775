"""Failures planted on purpose, which a diagnosis must flag, and exact draws, which it must not."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from math import log, pi
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from implicitvi import AVBSVI, ImplicitGuide
from implicitvi.avb.samplers import Sampler
from implicitvi.rng import RandomStream

Draw = Callable[[int], Tensor]
LogDensity = Callable[[Tensor], Tensor]

ROOT = torch.tensor([[1.0, 0.0], [0.8, 0.6]])


def several_sites() -> None:
    """Five coordinates: two scalars of different units, a positive one, a correlated pair."""
    pyro.sample("a", dist.Normal(1.0, 0.5))
    pyro.sample("b", dist.Normal(-1.0, 2.0))
    pyro.sample("s", dist.LogNormal(0.0, 0.8))
    pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=ROOT))


def flat(dim: int) -> Tensor:
    return pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (dim,)))


def two_modes() -> None:
    z = flat(2)
    pyro.factor("target", log_two_modes(z))


def heavy_tails() -> None:
    pyro.sample("z", dist.StudentT(3.0).expand([3]).to_event(1))


def banana() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.5))


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 2.0))
    pyro.sample("x", dist.Normal(torch.zeros(4), (v / 2).exp()).to_event(1))


def log_two_modes(z: Tensor) -> Tensor:
    near = torch.logaddexp(-((z[..., 0] - 4) ** 2) / 2, -((z[..., 0] + 4) ** 2) / 2) - log(2)
    return near - z[..., 1] ** 2 / 2 - log(2 * pi)


def log_banana(z: Tensor) -> Tensor:
    x, y = z[..., 0], z[..., 1]
    return -(x**2) / 2 - ((y - x**2) / 0.5) ** 2 / 2 - log(2 * pi * 0.5)


def draw_several(count: int) -> Tensor:
    eps = torch.randn(count, 5)
    first = torch.tensor([1.0, -1.0, 0.0]) + eps[:, :3] * torch.tensor([0.5, 2.0, 0.8])
    return torch.cat([first, eps[:, 3:] @ ROOT.T], 1)


def draw_two_modes(count: int) -> Tensor:
    z = torch.randn(count, 2)
    z[:, 0] += 8 * (torch.rand(count) < 0.5) - 4
    return z


def draw_banana(count: int) -> Tensor:
    x, eps = torch.randn(2, count)
    return torch.stack([x, x**2 + 0.5 * eps], 1)


def draw_tails(count: int) -> Tensor:
    return dist.StudentT(3.0).sample((count, 3))


def draw_funnel(count: int) -> Tensor:
    v = 2 * torch.randn(count, 1)
    return torch.cat([v, (v / 2).exp() * torch.randn(count, 4)], 1)


def log_several(u: Tensor) -> Tensor:
    loc, scale = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.5, 2.0, 0.8])
    pair = dist.MultivariateNormal(torch.zeros(2), scale_tril=ROOT)
    return dist.Normal(loc, scale).log_prob(u[:, :3]).sum(1) + pair.log_prob(u[:, 3:])


def log_tails(z: Tensor) -> Tensor:
    return dist.StudentT(3.0).log_prob(z).sum(1)


def log_funnel(z: Tensor) -> Tensor:
    v = z[:, :1]
    return (dist.Normal(0.0, 2.0).log_prob(v) + _inner(v, z[:, 1:])).squeeze(1)


def _inner(v: Tensor, x: Tensor) -> Tensor:
    return dist.Normal(0.0, (v / 2).exp()).log_prob(x).sum(1, keepdim=True)


@dataclass(frozen=True)
class Target:
    """A model without data, exact draws ``u [S, D]`` of it, and their log density."""

    model: Callable[[], None]
    draw: Draw
    log_prob: LogDensity


TARGETS = {
    "several sites": Target(several_sites, draw_several, log_several),
    "two modes": Target(two_modes, draw_two_modes, log_two_modes),
    "banana": Target(banana, draw_banana, log_banana),
    "heavy tails": Target(heavy_tails, draw_tails, log_tails),
    "funnel": Target(funnel, draw_funnel, log_funnel),
}


class Drawn(Sampler):
    """A sampler defined by a function."""

    def __init__(self, latent_dim: int, draw: Draw):
        super().__init__(latent_dim)
        self.draw = draw

    def forward(self, num_samples: int, x: Tensor | None = None) -> Tensor:
        return self.draw(num_samples)

    def transform(self, eps: Tensor, x: Tensor | None = None) -> Tensor:
        raise NotImplementedError


def dressed(target: Target, draw: Draw, log_q: LogDensity) -> ImplicitGuide:
    """Return draws and a claimed log density as a trained guide."""
    guide = ImplicitGuide(target.model, sampler=lambda dim: Drawn(dim, draw)).setup()
    guide.set_log_density(log_q)
    return guide


def exact(name: str) -> ImplicitGuide:
    target = TARGETS[name]
    return dressed(target, target.draw, target.log_prob)


def bare(target: Target, u: Tensor) -> dict[str, Tensor]:
    return ImplicitGuide(target.model).setup().layout.unpack(u)[0]


def mode_missing() -> Any:
    u = draw_two_modes(4000)
    return bare(TARGETS["two modes"], u[u[:, 0] > 0])


def scaled(share: float) -> Draw:
    centre = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])
    return lambda count: centre + share * (draw_several(count) - centre)


def variance_halved() -> Any:
    return bare(TARGETS["several sites"], scaled(0.5**0.5)(2000))


def mean_shifted() -> Any:
    sds = torch.tensor([0.5, 2.0, 0.8, 1.0, 1.0])
    return bare(TARGETS["several sites"], draw_several(2000) + 0.3 * sds)


def collapsed() -> Any:
    """Collapse the sampler, with a learned density that makes its loss look perfect."""
    return dressed(TARGETS["several sites"], scaled(0.01), log_several)


def tails_cut() -> Any:
    u = draw_tails(20_000)
    return bare(TARGETS["heavy tails"], u[(u.abs() < 3).all(1)][:2000])


def wrong_jacobian() -> Any:
    """Draw the positive site as if its density did not change with the transform: ``exp(-u)`` too much."""
    u = draw_several(2000)
    u[:, 2] -= 0.8**2
    return bare(TARGETS["several sites"], u)


def swapped_sites() -> Any:
    draws = bare(TARGETS["several sites"], draw_several(2000))
    return draws | {"a": draws["b"], "b": draws["a"]}


def gaussian_of(z: Tensor) -> dist.MultivariateNormal:
    return dist.MultivariateNormal(z.mean(0), covariance_matrix=z.T.cov())


def with_ratio(share: float) -> Any:
    """Return a Gaussian contrast of banana draws, with a share of its true log ratio learned."""
    r = gaussian_of(draw_banana(20_000))
    learned = lambda z: r.log_prob(z) + share * (log_banana(z) - r.log_prob(z))  # noqa: E731
    return dressed(TARGETS["banana"], draw_banana, learned)


def stale_contrast() -> Any:
    """Return the contrast of draws one standard deviation away, with the current ratio."""
    r = gaussian_of(draw_banana(20_000))
    off = r.stddev * torch.tensor([1.0, -1.0])
    learned = lambda z: log_banana(z) - r.log_prob(z) + r.log_prob(z - off)  # noqa: E731
    return dressed(TARGETS["banana"], draw_banana, learned)


def nan_skipping() -> Any:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = torch.where(z[0] > 0.5, torch.nan, 0.0) * z[0]
        pyro.sample("y", dist.Normal(loc, 1.0, validate_args=False), obs=torch.zeros(()))

    return short_fit(model, num_steps=60)


def short_fit(model: Callable[[], None], **options: Any) -> Any:
    guide = ImplicitGuide(model)
    seed = int(torch.randint(2**31, ()))
    return AVBSVI(model, guide, progress=False, seed=seed, **options).run()


def adversary_off_half_way() -> Any:
    """Train against an adversary that is frozen half-way."""
    kept: dict[str, Any] = {}

    def freeze(trainer: Any) -> None:
        avb = svi.objective.avb
        if trainer.step_count == 60:
            kept["state"] = deepcopy(avb.adversary.state_dict())
        if kept:
            avb.adversary.load_state_dict(kept["state"])

    svi = AVBSVI(
        banana,
        ImplicitGuide(banana),
        num_steps=300,
        num_particles=128,
        contrast="gaussian",
        averaging=0.0,
        lr=3e-3,
        warm_start=200,
        progress=False,
        seed=int(torch.randint(2**31, ())),
        callbacks=[freeze],
    )
    return svi.run()


PLANTED: dict[str, Callable[[], Any]] = {
    "one mode missing": mode_missing,
    "variance halved": variance_halved,
    "mean shifted by 0.3 sd": mean_shifted,
    "collapsed sampler": collapsed,
    "under-trained adversary": lambda: with_ratio(0.4),
    "adversary switched off half-way": adversary_off_half_way,
    "heavy tails cut": tails_cut,
    "wrong Jacobian": wrong_jacobian,
    "swapped sites": swapped_sites,
    "NaN-skipping run": nan_skipping,
    "stale contrast": stale_contrast,
    "wrong sign of T": lambda: with_ratio(-1.0),
}
MODELS = {
    "one mode missing": two_modes,
    "heavy tails cut": heavy_tails,
    "under-trained adversary": banana,
    "adversary switched off half-way": banana,
    "stale contrast": banana,
    "wrong sign of T": banana,
}


def planted(name: str, seed: int) -> tuple[Any, Callable[[], None]]:
    """Return the source of a planted failure and its model."""
    with RandomStream(seed):
        source = PLANTED[name]()
    return source, getattr(source, "model", MODELS.get(name, several_sites))
