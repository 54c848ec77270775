"""
Empirical Bayes
===============

Estimate hyperparameters together with the posterior, and compare them with the exact maximum likelihood.

In a hierarchical Normal model the mean, the spread of the groups and the noise are `pyro.param`.

Groups of unequal size have effects ``a ~ Normal(mean, spread)`` and observations ``y ~ Normal(a, noise)``. The effects
can be integrated out analytically, so SciPy can maximise the marginal likelihood. Given the parameters, the posterior
of the effects is Normal and known too. Maximising the ELBO over the parameters maximises the marginal likelihood if the
guide is exact.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import constraints

from implicitvi import AVBSVI, ImplicitGuide

torch.set_num_threads(1)  # the networks are small: a second thread would slow them down

GROUPS = 12
TRUTH = {"mean": 1.0, "spread": 1.5, "noise": 0.7}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run."""

    avb: dict[str, Any] = field(default_factory=dict)  # empty: the defaults of `AVBSVI`
    draws: int = 20_000


SMOKE = Sizes(avb={"num_steps": 8, "warm_start": 10}, draws=200)


def model(group: Tensor, y: Tensor) -> None:
    mean = pyro.param("mean", torch.tensor(0.0))
    spread = pyro.param("spread", torch.tensor(1.0), constraint=constraints.positive)
    noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("groups", GROUPS):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(effect[group], noise), obs=y)


def generate(seed: int) -> tuple[Tensor, Tensor]:
    """Return group ``[N]`` and value ``[N]`` of every row; each group has two to ten rows."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(GROUPS), rng.integers(2, 11, GROUPS))
    effect = rng.normal(TRUTH["mean"], TRUTH["spread"], GROUPS)
    y = rng.normal(effect[group], TRUTH["noise"])
    return torch.tensor(group), torch.tensor(y, dtype=torch.float32)


def log_evidence(at: dict[str, float], group: np.ndarray, y: np.ndarray) -> float:
    """Return the log marginal likelihood in nats; a group's ``y`` has covariance ``noise² I + spread² 1 1ᵀ``."""
    size = np.bincount(group)
    rest = y - at["mean"]
    total, squares = np.bincount(group, rest), np.bincount(group, rest**2)
    whole = at["noise"] ** 2 + size * at["spread"] ** 2
    shrunk = squares - at["spread"] ** 2 * total**2 / whole
    log_det = (size - 1) * np.log(at["noise"] ** 2) + np.log(whole)
    return float(-(size * np.log(2 * np.pi) + log_det + shrunk / at["noise"] ** 2).sum() / 2)


def maximum(group: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Return the parameters at the maximum of the marginal likelihood."""

    def named(v: np.ndarray) -> dict[str, float]:
        return {"mean": v[0], "spread": float(np.exp(v[1])), "noise": float(np.exp(v[2]))}

    best = minimize(lambda v: -log_evidence(named(v), group, y), np.zeros(3), method="BFGS")
    return named(best.x)


def posterior(at: dict[str, float], group: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return exact means and sds ``[G]`` of the effects, given the parameters."""
    precision = np.bincount(group) / at["noise"] ** 2 + 1 / at["spread"] ** 2
    weighted = np.bincount(group, y) / at["noise"] ** 2 + at["mean"] / at["spread"] ** 2
    return weighted / precision, precision**-0.5


def compare(sizes: Sizes, seed: int) -> tuple[np.ndarray, dict[str, float]]:
    """Fit, print the tables and return the draws of the effects and the exact parameters."""
    group, y = generate(seed)
    guide = ImplicitGuide(model)
    fit = AVBSVI(model, guide, seed=seed, progress=False, **sizes.avb).run(group, y)
    fitted = {name: value.item() for name, value in fit.parameters.items()}
    exact = maximum(group.numpy(), y.double().numpy())
    print(f"{'parameter':12}{'fitted':>10}{'exact':>10}{'truth':>10}")
    for name, value in TRUTH.items():
        print(f"{name:12}{fitted[name]:10.4f}{exact[name]:10.4f}{value:10.4f}")
    short = log_evidence(exact, group.numpy(), y.numpy()) - log_evidence(fitted, group.numpy(), y.numpy())
    draws = guide.sample(sizes.draws)["effect"].numpy()
    mean, sd = posterior(exact, group.numpy(), y.numpy())
    error, ratio = np.abs(draws.mean(0) - mean) / sd, draws.std(0) / sd
    print(f"\n{fit.seconds:.1f} seconds; log marginal likelihood {short:.4f} nats short of its maximum")
    print(
        f"effects: error of the means {error.mean():.3f} sds, at most {error.max():.3f}; "
        f"ratio of the sds {ratio.min():.3f} to {ratio.max():.3f}"
    )
    return draws, exact


def draw(draws: np.ndarray, exact: dict[str, float], seed: int) -> plt.Figure:
    """Plot the groups' means, the exact posterior at the exact parameters, and the fit."""
    group, y = (each.numpy() for each in generate(seed))
    mean, sd = posterior(exact, group, y)
    figure, panel = plt.subplots(figsize=(9, 4.5), layout="constrained")
    at = np.arange(GROUPS)
    panel.plot(group - 0.22, y, ".", color="0.7", ms=4, label="data")
    panel.plot(at - 0.22, np.bincount(group, y) / np.bincount(group), "_", color="black", ms=12)
    panel.plot([], [], "_", color="black", ms=12, label="mean of the group")
    panel.errorbar(at, mean, 1.645 * sd, fmt="o", color="black", ms=4, label="exact, 90 %")
    low, middle, high = np.quantile(draws, [0.05, 0.5, 0.95], axis=0)
    bars = [middle - low, high - middle]
    panel.errorbar(at + 0.15, middle, bars, fmt="o", color="#0072B2", ms=4, label="fit, 90 %")
    panel.axhline(exact["mean"], color="#D55E00", lw=1, ls="--", label="mean of all groups, exact")
    sizes = [f"{number}\n{size}" for number, size in zip(at, np.bincount(group), strict=True)]
    panel.set_xticks(at, sizes)
    panel.set_xlabel("group, and below it the number of rows")
    panel.set_ylabel("effect (unit of $y$)")
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    pyro.set_rng_seed(options.seed)
    draws, exact = compare(sizes, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(draws, exact, options.seed).savefig(options.output / "empirical_bayes.png", dpi=150)
    print(f"\nempirical_bayes.png is in {options.output}/")


if __name__ == "__main__":
    main()
