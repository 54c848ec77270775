"""
Bayesian neural network
=======================

Fit a small network on one input with a gap in the data: the band of the implicit posterior widens in the gap.

It is compared point by point with the band of NUTS.

Hidden units can be swapped and their signs flipped, so the weights have thousands of equivalent modes, and no fit finds
them all. We compare the function instead. NUTS runs one short chain here; it is a reference, not the truth.
``--no-nuts`` omits it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

from implicitvi import AVBSVI, ImplicitGuide

torch.set_num_threads(1)  # the networks are small: a second thread would slow them down

HIDDEN = 8
NOISE = 0.1


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run."""

    avb: dict[str, Any] = field(default_factory=dict)  # empty: the defaults of `AVBSVI`
    warmup: int = 100
    nuts: int = 200
    depth: int = 6
    draws: int = 2000


SMOKE = Sizes(avb={"num_steps": 8, "warm_start": 10}, warmup=5, nuts=10, depth=3, draws=50)


class Network(PyroModule):
    """A network with one hidden tanh layer; all weights are latent."""

    def __init__(self) -> None:
        super().__init__()
        self.input = PyroModule[torch.nn.Linear](1, HIDDEN)
        self.input.weight = PyroSample(dist.Normal(0.0, 2.0).expand([HIDDEN, 1]).to_event(2))
        self.input.bias = PyroSample(dist.Normal(0.0, 2.0).expand([HIDDEN]).to_event(1))
        self.output = PyroModule[torch.nn.Linear](HIDDEN, 1, bias=False)
        scale = HIDDEN**-0.5
        self.output.weight = PyroSample(dist.Normal(0.0, scale).expand([1, HIDDEN]).to_event(2))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.output(torch.tanh(self.input(x[:, None])))[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, NOISE), obs=y)
        return mean


def generate(seed: int) -> tuple[Tensor, Tensor]:
    """Return forty noisy points of a curve, none between -0.5 and 0.6."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.rand(2, 20, generator=generator)
    x = torch.cat([-1.5 + left, 0.6 + 0.9 * right])
    return x, curve(x) + NOISE * torch.randn(40, generator=generator)


def curve(x: Tensor) -> Tensor:
    return 0.6 * torch.sin(3 * x) + 0.2 * x


def functions(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return values ``[S, N]`` of the network at draws of its weights."""
    hidden = weights["input.weight"] @ x[None] + weights["input.bias"][:, :, None]
    return (weights["output.weight"] @ torch.tanh(hidden))[:, 0]


def implicit(x: Tensor, y: Tensor, sizes: Sizes, seed: int) -> dict[str, Tensor]:
    """Draw the weights by the defaults of the library."""
    model = Network()
    guide = ImplicitGuide(model)
    fit = AVBSVI(model, guide, seed=seed, progress=False, **sizes.avb).run(x, y)
    print(f"log joint by {fit.log_joint}; {guide.layout.dim} weights")
    return guide.sample(sizes.draws)


def nuts(x: Tensor, y: Tensor, sizes: Sizes, seed: int) -> dict[str, Tensor]:
    """Draw the weights by a short chain."""
    kernel = NUTS(Network(), max_tree_depth=sizes.depth)
    mcmc = MCMC(kernel, num_samples=sizes.nuts, warmup_steps=sizes.warmup, disable_progbar=True)
    mcmc.run(x, y)
    return mcmc.get_samples()


def row(name: str, seconds: float, values: Tensor, reference: Tensor, gap: Tensor) -> str:
    """Return a line of the table: sds inside and outside the gap, distance of the mean from the reference."""
    sd = values.std(0)
    off = (values.mean(0) - reference.mean(0)).abs() / reference.std(0)
    shares = f"{sd[gap].mean():12.3f}{sd[~gap].mean():14.3f}{sd[gap].mean() / sd[~gap].mean():8.2f}"
    return f"{name:12}{seconds:9.1f}{shares}{off.mean():18.3f}"


HEADER = f"{'method':12}{'seconds':>9}{'sd in gap':>12}{'sd elsewhere':>14}{'ratio':>8}{'mean off by (sd)':>18}"


def compare(sizes: Sizes, seed: int, *, with_nuts: bool) -> dict[str, Tensor]:
    """Run the methods, print the table and return values ``[S, N]`` on the grid, by name."""
    x, y = generate(seed)
    methods = {"implicit": implicit} | ({"NUTS": nuts} if with_nuts else {})
    values, seconds = {}, {}
    for name, method in methods.items():
        pyro.set_rng_seed(seed)
        began = time.perf_counter()
        weights = method(x, y, sizes, seed)
        seconds[name] = time.perf_counter() - began
        values[name] = functions(weights, GRID)
    gap = (GRID > x[:20].max()) & (GRID < x[20:].min())
    data = (GRID >= x.min()) & (GRID <= x.max())
    print(HEADER)
    for name in values:
        reference = values["NUTS" if with_nuts else name]
        print(row(name, seconds[name], values[name][:, data], reference[:, data], gap[data]))
    return values


GRID = torch.linspace(-2, 2, 161)


def draw(values: dict[str, Tensor], seed: int) -> plt.Figure:
    """Plot bands of the function, one panel for each method, with the data and the true curve."""
    x, y = generate(seed)
    figure, axes = plt.subplots(1, len(values), figsize=(5.5 * len(values), 4.5), sharey=True, squeeze=False)
    colours = {"implicit": "#0072B2", "NUTS": "#D55E00"}
    for panel, (name, each) in zip(axes[0], values.items(), strict=True):
        marks = each.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]), dim=0)
        for low, high, alpha in ((0, 4, 0.25), (1, 3, 0.4)):
            panel.fill_between(GRID, marks[low], marks[high], color=colours[name], alpha=alpha, lw=0)
        panel.plot(GRID, marks[2], color=colours[name], label="median, 50 % and 90 % bands")
        panel.plot(GRID, curve(GRID), color="black", ls="--", lw=1, label="truth")
        panel.plot(x, y, "k.", ms=4, label="data")
        panel.set(title=name, xlabel="$x$ (no unit)", ylim=(-1.3, 1.3))
    axes[0, 0].set_ylabel("$f(x)$ (no unit)")
    axes[0, 0].legend(frameon=False, loc="upper left")
    figure.tight_layout()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-nuts", action="store_true", help="omit the reference")
    options = parser.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    values = compare(sizes, options.seed, with_nuts=not options.no_nuts)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(values, options.seed).savefig(options.output / "bnn_regression.png", dpi=150)
    print(f"\nbnn_regression.png is in {options.output}/")


if __name__ == "__main__":
    main()
