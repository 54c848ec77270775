"""Posteriors of posteriordb with their reference draws, the models written for Pyro.

Data and draws are looked for in ``$IMPLICITVI_DATA/posteriors``: ``NAME.data.json``, and ``NAME.npz`` with
``names [D]`` and ``draws [10000, D]``. They are not part of the project: see
https://github.com/stan-dev/posteriordb.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from suite.target import Missing, Sites, Target

FOLDER = "IMPLICITVI_DATA"


def folder() -> Path:
    """Where the files are."""
    place = Path(os.environ.get(FOLDER, ""), "posteriors")
    if FOLDER not in os.environ or not place.is_dir():
        raise Missing(f"no folder ${FOLDER}/posteriors")
    return place


@dataclass(frozen=True)
class Posterior:
    """One entry of posteriordb."""

    name: str

    def data(self, *keys: str) -> tuple[Tensor, ...]:
        """Columns of the data in torch's default dtype."""
        data = json.loads(self._find(".data.json").read_text(encoding="utf-8"))
        return tuple(torch.tensor(data[key], dtype=torch.get_default_dtype()) for key in keys)

    def columns(self, names: Iterable[str]) -> Tensor:
        """The reference draws of these parameters, ``[10000, len(names)]`` in float64."""
        with np.load(self._find(".npz")) as file:
            place = {str(name): i for i, name in enumerate(file["names"])}
            return torch.tensor(file["draws"][:, [place[name] for name in names]]).double()

    def _find(self, ending: str) -> Path:
        path = folder() / (self.name + ending)
        if not path.exists():
            raise Missing(f"no {path.name} in ${FOLDER}/posteriors")
        return path


def numbered(name: str, count: int) -> list[str]:
    return [f"{name}[{i}]" for i in range(1, count + 1)]


def shuffled(x: Tensor) -> Callable[[int, torch.Generator], Tensor]:
    """All rows in random order: neighbours of a chain apart."""
    return lambda count, generator: x[torch.randperm(len(x), generator=generator)][:count]


def flat_prior(size: int) -> Any:
    """An improper uniform prior on the reals; the normal says only where to start."""
    return dist.Normal(torch.zeros(size), 1.0).to_event(1).mask(False)


def eight_schools_centred(sigma: Tensor, y: Tensor) -> None:
    """``theta`` drawn around ``mu``: a funnel."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    around = dist.Normal(mu[..., None].expand(*mu.shape, len(y)), tau[..., None])
    theta = pyro.sample("theta", around.to_event(1))
    pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)


def eight_schools_noncentred(sigma: Tensor, y: Tensor) -> None:
    """The same posterior with ``theta = mu + tau · eta``."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    eta = pyro.sample("eta", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    theta = mu[..., None] + tau[..., None] * eta
    pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)


def schools(name: str) -> Target:
    """Eight Schools in either form, judged by ``mu``, ``log tau`` and ``theta``."""
    source = Posterior("eight_schools-eight_schools_noncentered")
    x = source.columns(["mu", "tau", *numbered("theta", 8)])
    x[:, 1] = x[:, 1].log()

    def compare(sites: Sites) -> Tensor:
        mu, tau = sites["mu"][:, None], sites["tau"][:, None]
        theta = sites["theta"] if "theta" in sites else mu + tau * sites["eta"]
        return torch.cat([mu, tau.log(), theta], 1).double()

    def sites(x: Tensor) -> Sites:
        mu, tau, theta = x[:, 0], x[:, 1].exp(), x[:, 2:]
        eta = (theta - mu[:, None]) / tau[:, None]
        return {"mu": mu, "tau": tau, "theta": theta, "eta": eta}

    centred = name == "eight_schools_centred"
    model = eight_schools_centred if centred else eight_schools_noncentred
    data = source.data("sigma", "y")
    return Target(name, model, data, shuffled(x), compare, sites, log_evidence=-31.31)


def linear_target(
    name: str, model: Callable[..., None], args: tuple[Tensor, ...], x: Tensor, evidence: float
) -> Target:
    """A regression of coefficients ``beta`` and, in the last column, a scale ``sigma``, judged by its log."""
    x = torch.cat([x[:, :-1], x[:, -1:].log()], 1)

    def compare(sites: Sites) -> Tensor:
        return torch.cat([sites["beta"], sites["sigma"][:, None].log()], 1).double()

    def sites(x: Tensor) -> Sites:
        return {"beta": x[:, :-1], "sigma": x[:, -1].exp()}

    return Target(name, model, args, shuffled(x), compare, sites, log_evidence=evidence)


def kidiq() -> Target:
    """Scores of children on their mothers' schooling, IQ, and the product; raw units, so badly scaled."""

    def model(x: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", flat_prior(4))
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
        pyro.sample("y", dist.Normal(beta @ x.mT, sigma[..., None]).to_event(1), obs=y)

    source = Posterior("kidiq-kidscore_interaction")
    score, school, iq = source.data("kid_score", "mom_hs", "mom_iq")
    x = torch.stack([torch.ones_like(iq), school, iq, school * iq], 1)
    draws = source.columns([*numbered("beta", 4), "sigma"])
    return linear_target("kidiq", model, (x, score), draws, -1872.816)


def mesquite() -> Target:
    """Log weight of bushes on the logs of their measures; every prior flat, that of ``sigma`` on the positive line."""

    def model(x: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", flat_prior(7))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0).mask(False))
        pyro.sample("y", dist.Normal(beta @ x.mT, sigma[..., None]).to_event(1), obs=y)

    source = Posterior("mesquite-logmesquite")
    keys = ("diam1", "diam2", "canopy_height", "total_height", "density")
    logs = [column.log() for column in source.data(*keys)]
    weight, group = source.data("weight", "group")
    x = torch.stack([torch.ones_like(group), *logs, group], 1)
    draws = source.columns([*numbered("beta", 7), "sigma"])
    return linear_target("mesquite", model, (x, weight.log()), draws, -20.525)


def wells() -> Target:
    """Who changes to a safe well: logistic regression on distance, arsenic, and the product, centred."""

    def model(x: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", flat_prior(4))
        pyro.sample("y", dist.Bernoulli(logits=beta @ x.mT).to_event(1), obs=y)

    source = Posterior("wells_data-wells_interaction_c_model")
    distance, arsenic, switched = source.data("dist", "arsenic", "switched")
    distance, arsenic = (distance - distance.mean()) / 100, arsenic - arsenic.mean()
    x = torch.stack([torch.ones_like(arsenic), distance, arsenic, distance * arsenic], 1)
    draws = source.columns(["alpha", *numbered("beta", 3)])
    return Target(
        "wells",
        model,
        (x, switched),
        shuffled(draws),
        lambda sites: sites["beta"].double(),
        lambda x: {"beta": x},
        log_evidence=-1971.165,
    )


def two_gaussians(y: Tensor, mu: Tensor, sigma: Tensor, theta: Tensor) -> None:
    """The likelihood of a mixture with means and scales ``[..., 2]``, the first of weight ``theta [...]``."""
    each = dist.Normal(mu[..., None], sigma[..., None]).log_prob(y)
    weights = torch.stack([theta.log(), (-theta).log1p()], -1)
    pyro.factor("y", (weights[..., None] + each).logsumexp(-2).sum(-1))


def gauss_mix(*, ordered: bool) -> Target:
    """A mixture of two Gaussians fitted to 1 000 data. Without the order of the means it has two mirrored modes."""

    def model(y: Tensor) -> None:
        if ordered:
            lower = pyro.sample("lower", dist.Normal(0.0, 2.0))
            gap = pyro.sample("gap", dist.HalfNormal(1.0).mask(False))
            mu = torch.stack([lower, lower + gap], -1)
            pyro.factor("upper", dist.Normal(0.0, 2.0).log_prob(lower + gap))
        else:
            mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(2 * torch.ones(2)).to_event(1))
        theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
        two_gaussians(y, mu, sigma, theta)

    source = Posterior("low_dim_gauss_mix-low_dim_gauss_mix")
    x = source.columns([*numbered("mu", 2), *numbered("sigma", 2), "theta"])
    x = torch.cat([x[:, :2], x[:, 2:4].log(), x[:, 4:].logit()], 1)
    if not ordered:
        mirror = torch.cat([x[:, [1, 0, 3, 2]], -x[:, 4:]], 1)
        odd = torch.arange(len(x)) % 2 == 1
        x = torch.where(odd[:, None], mirror, x)

    def compare(sites: Sites) -> Tensor:
        mu = sites.get("mu")
        if mu is None:
            mu = torch.stack([sites["lower"], sites["lower"] + sites["gap"]], 1)
        rest = [sites["sigma"].log(), sites["theta"][:, None].logit()]
        return torch.cat([mu, *rest], 1).double()

    def sites(x: Tensor) -> Sites:
        shared = {"sigma": x[:, 2:4].exp(), "theta": x[:, 4].sigmoid()}
        return {"mu": x[:, :2], "lower": x[:, 0], "gap": x[:, 1] - x[:, 0], **shared}

    return Target(
        "gauss_mix_ordered" if ordered else "gauss_mix_mirrored",
        model,
        source.data("y"),
        shuffled(x),
        compare,
        sites,
        modes=None if ordered else lambda x: (x[:, 0] > x[:, 1]).long(),
        log_evidence=-2115.683 if ordered else -2114.990,
    )


def root(x: Tensor, rho: Tensor, alpha: Tensor) -> Tensor:
    """Cholesky factor ``[..., N, N]`` of a squared-exponential kernel, in float64: its jitter is 1e-10."""
    x, rho, alpha = x.double(), rho.double()[..., None, None], alpha.double()[..., None, None]
    kernel = alpha.square() * (-0.5 * ((x[:, None] - x) / rho).square()).exp()
    factor: Tensor = torch.linalg.cholesky(kernel + 1e-10 * torch.eye(len(x)).double())
    return factor


def gp_poisson() -> Target:
    """Counts with a Gaussian process for their log rate, judged by ``log rho``, ``log alpha`` and the process ``f``."""

    def model(x: Tensor, k: Tensor) -> None:
        rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
        alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
        noise = pyro.sample("noise", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
        f = (root(x, rho, alpha) @ noise.double()[..., None])[..., 0].to(noise)
        pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=k)

    source = Posterior("gp_pois_regr-gp_pois_regr")
    place, k = source.data("x", "k")
    draws = source.columns(["rho", "alpha", *numbered("f", len(k))])
    draws[:, :2] = draws[:, :2].log()

    def compare(sites: Sites) -> Tensor:
        rho, alpha = sites["rho"], sites["alpha"]
        f = root(place, rho, alpha) @ sites["noise"].double()[..., None]
        return torch.cat([rho[:, None].log(), alpha[:, None].log(), f[..., 0]], 1).double()

    def sites(x: Tensor) -> Sites:
        rho, alpha = x[:, 0].exp(), x[:, 1].exp()
        factor = root(place, rho, alpha)
        noise = torch.linalg.solve_triangular(factor, x[:, 2:, None].double(), upper=False)
        return {"rho": rho, "alpha": alpha, "noise": noise[..., 0].to(x)}

    return Target("gp_poisson", model, (place, k), shuffled(draws), compare, sites, log_evidence=-47.63)


POSTERIORDB: dict[str, Callable[[], Target]] = {
    "eight_schools_noncentred": lambda: schools("eight_schools_noncentred"),
    "eight_schools_centred": lambda: schools("eight_schools_centred"),
    "kidiq": kidiq,
    "wells": wells,
    "mesquite": mesquite,
    "gauss_mix_ordered": lambda: gauss_mix(ordered=True),
    "gauss_mix_mirrored": lambda: gauss_mix(ordered=False),
    "gp_poisson": gp_poisson,
}
