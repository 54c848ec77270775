"""
Logistic regression on minibatches
==================================

Fit a million rows in minibatches of 256, with and without a control variate in the model.

The page shows that the cost of a step does not depend on the number of rows, and compares the fits with the exact
posterior.

Global latents can be fitted in minibatches: the model subsamples its plate, and Pyro scales the log likelihood. This
estimate is unbiased, but within one posterior standard deviation it scatters by about ``sqrt(N / B)`` nats, here 62.
The second model subtracts from each row a quadratic in the coefficients around a rough estimate, and adds its sum over
all rows, which follows from three sums computed once. The log likelihood stays unbiased and loses its scatter.

With a million rows the posterior is Normal, so its mode and its curvature there, by Newton's method, are exact.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.stats import norm
from torch import Tensor

from implicitvi import AVBSVI, ImplicitGuide

torch.set_num_threads(1)  # the networks are small: a second thread would slow them down

PRIOR_SD = 2.0


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run."""

    # The defaults of `AVBSVI`, but fewer steps than 2,500: two such fits would take four minutes.
    avb: dict[str, Any] = field(default_factory=lambda: {"num_steps": 800})
    rows: int = 1_000_000
    few_rows: int = 1_000
    batch: int = 256
    timed_steps: int = 50
    draws: int = 20_000


SMOKE = Sizes(avb={"num_steps": 8, "warm_start": 10}, rows=20_000, timed_steps=3, draws=200)


def generate(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return rows ``[N, 5]``, the first column ones, and labels ``[N]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator)
    x[:, 0] = 1.0
    logits = x @ torch.linspace(-1, 1, 5)
    return x, torch.bernoulli(logits.sigmoid(), generator=generator)


@dataclass(frozen=True)
class Plain:
    """A model with a subsampled plate."""

    batch: int

    def __call__(self, x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, PRIOR_SD).expand([5]).to_event(1))
        with pyro.plate("data", len(x), subsample_size=self.batch) as rows:
            pyro.sample("y", dist.Bernoulli(logits=x[rows] @ w), obs=y[rows])


class Controlled:
    """A model whose subsample estimates only the difference from a quadratic around ``centre``."""

    def __init__(self, batch: int, x: Tensor, y: Tensor):
        self.batch = batch
        self.centre = newton(x[:10_000], y[:10_000])[0].float()
        slope, curvature = derivatives(x, y, self.centre)
        self.slope = (slope[:, None] * x).sum(0)
        self.curvature = x.T @ (curvature[:, None] * x)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, PRIOR_SD).expand([5]).to_event(1))
        off = w - self.centre
        pyro.factor("all_rows", self.slope @ off - (self.curvature @ off) @ off / 2)
        with pyro.plate("data", len(x), subsample_size=self.batch) as rows:
            slope, curvature = derivatives(x[rows], y[rows], self.centre)
            moved = x[rows] @ off
            pyro.sample("y", dist.Bernoulli(logits=x[rows] @ w), obs=y[rows])
            pyro.factor("quadratic", curvature * moved**2 / 2 - slope * moved)


def derivatives(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the negative second derivative of each row's log likelihood in its logit."""
    p = (x @ w).sigmoid()
    return y - p, p * (1 - p)


def newton(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the posterior mode ``[5]`` and the standard deviations ``[5]`` from its curvature."""
    x, y = x.double(), y.double()
    w, precision = x.new_zeros(5), torch.eye(5, dtype=x.dtype) / PRIOR_SD**2
    for _ in range(12):
        slope, curvature = derivatives(x, y, w)
        hessian = x.T @ (curvature[:, None] * x) + precision
        w = w + torch.linalg.solve(hessian, x.T @ slope - precision @ w)
    return w, torch.linalg.inv(hessian).diagonal().sqrt()


@dataclass(frozen=True)
class Result:
    """The draws ``[S, 5]`` of one fit, their cost, and the library's warnings."""

    draws: Tensor
    seconds: float
    step: float
    said: list[str]


def fit(model: Any, x: Tensor, y: Tensor, sizes: Sizes, seed: int) -> Result:
    """Fit a model of the rows."""
    guide = ImplicitGuide(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = AVBSVI(model, guide, seed=seed, progress=False, **sizes.avb).run(x, y)
    step = (done.seconds - done.setup_seconds) / done.num_steps
    said = [str(warning.message) for warning in caught]
    return Result(guide.sample(sizes.draws)["w"], done.seconds, step, said)


def time_steps(rows: int, sizes: Sizes, seed: int) -> float:
    """Return the milliseconds of an early step with this number of rows."""
    x, y = generate(rows, seed)
    model = Plain(sizes.batch)
    svi = AVBSVI(model, ImplicitGuide(model), seed=seed, progress=False, warm_start=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the noise of these minibatches, shown below
        svi.step(x, y)
    began = time.perf_counter()
    for _ in range(sizes.timed_steps):
        svi.step(x, y)
    return (time.perf_counter() - began) / sizes.timed_steps * 1000


def compare(sizes: Sizes, seed: int, *, control: bool) -> tuple[dict[str, Result], Tensor, Tensor]:
    """Fit, print the tables and return the fits by name with the exact means and standard deviations."""
    for rows in (sizes.few_rows, sizes.rows):
        print(f"{time_steps(rows, sizes, seed):.1f} ms a step at N = {rows:,}", flush=True)
    x, y = generate(sizes.rows, seed)
    began = time.perf_counter()
    mean, sd = newton(x, y)
    print(f"{time.perf_counter() - began:.1f} s for the exact posterior, once\n")
    print(f"{'model':20}{'seconds':>9}{'ms/step':>9}{'mean error':>12}{'at most':>9}{'sd ratio':>10}{'to':>8}")
    models = {"plain": lambda: Plain(sizes.batch)}
    if control:
        models["control variate"] = lambda: Controlled(sizes.batch, x, y)
    results = {}
    for name, make in models.items():
        results[name] = fit(make(), x, y, sizes, seed)
        draws = results[name].draws.double()
        error, ratio = ((draws.mean(0) - mean) / sd).abs(), draws.std(0) / sd
        cost = f"{results[name].seconds:9.1f}{results[name].step * 1000:9.1f}"
        numbers = f"{error.mean():12.3f}{error.max():9.3f}{ratio.min():10.3f}{ratio.max():8.3f}"
        print(f"{name:20}{cost}{numbers}", flush=True)
    # with the control variate there are no warnings
    for name, result in results.items():
        print("".join(f"\nwarning for the {name} model: {each}" for each in result.said))
    return results, mean, sd


def draw(results: dict[str, Result], mean: Tensor, sd: Tensor) -> plt.Figure:
    """Plot each coefficient's density: the truth in black, the fits in colour."""
    figure, axes = plt.subplots(1, len(mean), figsize=(14, 3.6), layout="constrained")
    for i, panel in enumerate(axes):
        centre, width = mean[i].item(), sd[i].item()
        for name, result in results.items():
            heights, edges = np.histogram(result.draws[:, i].numpy(), 60, density=True)
            filled = name != "plain"  # the other is hidden by the black line
            colour = "#56B4E9" if filled else "#D55E00"
            panel.stairs(heights, edges, color=colour, fill=filled, label=name)
        grid = np.linspace(centre - 4 * width, centre + 4 * width, 200)
        panel.plot(grid, norm.pdf(grid, centre, width), color="black", label="exact")
        panel.locator_params(axis="x", nbins=4)
        panel.set_yticks([])
        panel.set_xlabel(f"$w_{i + 1}$ (log odds per unit of $x_{i + 1}$)")
    axes[0].set_ylabel("posterior density")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-control", action="store_true", help="fit the plain model only, in half the time")
    options = parser.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    pyro.set_rng_seed(options.seed)
    results, mean, sd = compare(sizes, options.seed, control=not options.no_control)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(results, mean, sd).savefig(options.output / "logistic_minibatch.png", dpi=150)
    print(f"\nlogistic_minibatch.png is in {options.output}/")


if __name__ == "__main__":
    main()
