"""
Mixture with discrete assignments
=================================

Fit a mixture of three Normals: its discrete assignments are summed out in the fit and drawn afterwards.

Both results are compared with a Gibbs sampler.

The component of each observation is a latent site marked ``infer={"enumerate": "parallel"}``. The guide has only the
continuous latents, and each step sums over the assignments exactly. After the fit `to_arviz` draws the assignments from
their exact conditional given each draw; Pyro's `infer_discrete` does the same.

The labels of a mixture's components are arbitrary: with exchangeable priors the posterior would repeat itself six
times. The model therefore orders the means. Their spacings have a flat Dirichlet prior, which makes the means sorted
uniform draws. Gibbs sampling on the model without an order, with sorted draws, thus samples the same posterior.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.infer import infer_discrete
from scipy.stats import norm
from torch import Tensor

from implicitvi import AVBSVI, ImplicitGuide, to_arviz

torch.set_num_threads(1)  # the networks are small: a second thread would slow them down

LOW, HIGH = -6.0, 6.0
TRUTH = {"mean": [-2.0, 0.3, 2.5], "sd": [0.8, 0.5, 1.0], "weight": [0.4, 0.25, 0.35]}
COLOURS = ["#0072B2", "#D55E00", "#009E73"]
Draws = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run."""

    avb: dict[str, Any] = field(default_factory=dict)  # empty: the defaults of `AVBSVI`
    draws: int = 2000
    again: int = 500
    chains: int = 50
    gibbs: int = 2000


SMOKE = Sizes(avb={"num_steps": 8, "warm_start": 10}, draws=50, again=10, chains=20, gibbs=100)


def model(y: Tensor) -> None:
    spacings = pyro.sample("spacings", dist.Dirichlet(torch.ones(4)))
    mean = pyro.deterministic("mean", LOW + (HIGH - LOW) * spacings.cumsum(-1)[:-1], event_dim=1)
    weight = pyro.sample("weight", dist.Dirichlet(torch.full((3,), 2.0)))
    with pyro.plate("component", 3):
        variance = pyro.sample("variance", dist.InverseGamma(2.0, 1.0))
    with pyro.plate("row", len(y)):
        k = pyro.sample("k", dist.Categorical(weight), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mean[k], variance[k].sqrt()), obs=y)


def generate(seed: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Return eighty observations and their components."""
    rng = np.random.default_rng(seed)
    k = rng.choice(3, 80, p=TRUTH["weight"])
    y = rng.normal(np.array(TRUTH["mean"])[k], np.array(TRUTH["sd"])[k])
    return torch.tensor(y, dtype=torch.float32), k


def gibbs(y: NDArray[np.float64], chains: int, steps: int, seed: int) -> Draws:
    """Return draws of parallel chains, sorted by their means, and the probabilities ``[N, 3]`` of the assignments."""
    rng = np.random.default_rng(seed)
    mean, variance = rng.uniform(y.min(), y.max(), (chains, 3)), np.ones((chains, 3))
    weight = rng.dirichlet(np.ones(3), chains)
    kept: list[tuple[NDArray[Any], ...]] = []
    for step in range(steps + steps // 2):
        log_joint = np.log(weight[:, None]) + norm.logpdf(y[:, None], mean[:, None], np.sqrt(variance)[:, None])
        chance = np.exp(log_joint - log_joint.max(-1, keepdims=True))
        chance /= chance.sum(-1, keepdims=True)
        if step >= steps // 2 and step % 10 == 0:
            kept.append((mean, variance, weight, chance))
        k = (rng.uniform(size=(chains, len(y), 1)) > chance.cumsum(-1)[..., :-1]).sum(-1)
        member = k[..., None] == np.arange(3)
        count = member.sum(1)
        weight = rng.standard_gamma(2.0 + count)
        weight /= weight.sum(-1, keepdims=True)
        squares = (member * (y[:, None] - mean[:, None]) ** 2).sum(1)
        variance = (1.0 + squares / 2) / rng.standard_gamma(2.0 + count / 2)
        # a truncated Normal, or uniform between the bounds if the component is empty
        centre = (member * y[:, None]).sum(1) / np.maximum(count, 1)
        tails = np.array([LOW, HIGH])[:, None, None]
        sd = np.sqrt(variance / np.maximum(count, 1))
        low, high = norm.cdf(tails, centre, sd)
        uniform = rng.uniform(size=mean.shape)
        inside = norm.ppf(np.clip(low + uniform * (high - low), 1e-12, 1 - 1e-12), centre, sd)
        mean = np.where(count > 0, inside, LOW + (HIGH - LOW) * uniform)
    mean, variance, weight, chance = (np.concatenate(each) for each in zip(*kept, strict=True))
    order = mean.argsort(-1)
    mean, variance, weight = (np.take_along_axis(each, order, -1) for each in (mean, variance, weight))
    chance = np.take_along_axis(chance, order[:, None], -1).mean(0)
    return {"mean": mean, "sd": np.sqrt(variance), "weight": weight, "chance": chance}


def shares(k: NDArray[Any]) -> NDArray[np.float64]:
    """Return how often draws ``[S, N]`` assign each observation to each component: ``[N, 3]``."""
    return (k[..., None] == np.arange(3)).mean(0)


def assigned(draws: dict[str, Tensor], y: Tensor) -> NDArray[np.float64]:
    """Return the same shares by Pyro's `infer_discrete`.

    The model is conditioned inside `infer_discrete`; `Predictive` would condition outside, where the sum ignores it.
    """
    k = []
    for i in range(len(draws["weight"])):
        at = poutine.condition(model, data={name: value[i] for name, value in draws.items()})
        trace = poutine.trace(infer_discrete(at, first_available_dim=-2)).get_trace(y)
        k.append(trace.nodes["k"]["value"].numpy())
    return shares(np.stack(k))


def fit(y: Tensor, sizes: Sizes, seed: int) -> tuple[Draws, float]:
    """Return draws of the fit with its shares of the assignments, and the seconds of the fit."""
    guide = ImplicitGuide(model)
    done = AVBSVI(model, guide, seed=seed, progress=False, **sizes.avb).run(y)
    began = time.perf_counter()
    idata = to_arviz(guide, model, y, num_samples=sizes.draws)
    posterior = {name: idata.posterior[name].values[0] for name in idata.posterior.data_vars}
    chance = shares(posterior["k"])
    seconds = time.perf_counter() - began
    print(f"{sizes.draws:,} draws of all assignments by to_arviz in {seconds:.1f} s", flush=True)
    again = np.abs(assigned(guide.sample(sizes.again), y) - chance).mean()
    print(f"{sizes.again:,} by infer_discrete: shares differ by {again:.4f} on average\n")
    draws = {"mean": posterior["mean"], "sd": np.sqrt(posterior["variance"])}
    return {**draws, "weight": posterior["weight"], "chance": chance}, done.seconds


def compare(sizes: Sizes, seed: int) -> tuple[Draws, Draws]:
    """Fit, print the table and return the draws of the fit and of Gibbs."""
    y, component = generate(seed)
    fitted, seconds = fit(y, sizes, seed)
    began = time.perf_counter()
    exact = gibbs(y.double().numpy(), sizes.chains, sizes.gibbs, seed)
    gibbs_seconds = time.perf_counter() - began
    print(f"{'latent':12}{'truth':>10}{'exact':>10}{'sd':>10}{'error (sd)':>12}{'sd ratio':>10}")
    for name, values in TRUTH.items():
        for i, value in enumerate(values):
            mean, sd = exact[name][:, i].mean(), exact[name][:, i].std()
            error, ratio = (abs(fitted[name][:, i].mean() - mean) / sd, fitted[name][:, i].std() / sd)
            print(f"{f'{name} {i + 1}':12}{value:10.3f}{mean:10.3f}{sd:10.3f}{error:12.3f}{ratio:10.3f}")
    off = np.abs(fitted["chance"] - exact["chance"])
    right = [(each["chance"].argmax(-1) == component).mean() for each in (fitted, exact)]
    print(f"\n{seconds:.1f} seconds of fitting, {gibbs_seconds:.1f} of Gibbs")
    print(
        f"errors of the assignment probabilities: {off.mean():.4f} on average, at most {off.max():.4f}; "
        f"the likeliest is right for {right[0]:.1%}, by Gibbs for {right[1]:.1%}"
    )
    return fitted, exact


def draw(fitted: Draws, exact: Draws, seed: int) -> plt.Figure:
    """Plot the density of the data, the probabilities of the assignments, and the posterior of the means."""
    y, _ = generate(seed)
    figure, (density, chances, means) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    grid = np.linspace(LOW, HIGH, 200)

    def mixture(each: Any) -> NDArray[np.float64]:
        mean, sd, weight = (np.asarray(each[name])[..., None] for name in TRUTH)
        return (weight * norm.pdf(grid, mean, sd)).sum(-2)

    density.hist(y.numpy(), 30, density=True, color="0.85", label="data")
    low, high = np.quantile(mixture(fitted), [0.05, 0.95], axis=0)
    density.fill_between(grid, low, high, color="#56B4E9", alpha=0.7, lw=0, label="fit, 90 %")
    for edge in np.quantile(mixture(exact), [0.05, 0.95], axis=0):
        density.plot(grid, edge, color="black", lw=0.8)
    density.plot([], [], color="black", lw=0.8, label="Gibbs, 90 %")
    density.plot(grid, mixture(TRUTH), "--", color="#CC79A7", label="truth")
    density.set(xlabel="$y$ (no unit)", ylabel="density")
    density.legend(frameon=False, fontsize=8)
    order = y.numpy().argsort()
    for i, colour in enumerate(COLOURS):
        chances.plot(y.numpy()[order], exact["chance"][order, i], color="black", lw=0.8)
        chances.plot(y.numpy(), fitted["chance"][:, i], ".", color=colour, label=f"{i + 1}")
        bins = np.linspace(*np.quantile(exact["mean"][:, i], [0.001, 0.999]), 40)
        means.hist(fitted["mean"][:, i], bins, density=True, color=colour, alpha=0.6)
        means.hist(exact["mean"][:, i], bins, density=True, color="black", histtype="step")
        means.axvline(TRUTH["mean"][i], color="#CC79A7", ls="--")
    chances.set(xlabel="$y$ (no unit)", ylabel="probability of the component (black: Gibbs)")
    chances.legend(title="component", frameon=False, fontsize=8)
    means.set(xlabel="mean of a component (unit of $y$)", ylabel="posterior density (black: Gibbs)")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    pyro.set_rng_seed(options.seed)
    fitted, exact = compare(sizes, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(fitted, exact, options.seed).savefig(options.output / "mixture_enumeration.png", dpi=150)
    print(f"\nmixture_enumeration.png is in {options.output}/")


if __name__ == "__main__":
    main()
