"""
A sampler of your own
=====================

A posterior with a known symmetry, and a sampler that has it by construction: two modes, each with half of the draws.
The defaults have to learn as much.

Of two factors only the product is observed, ``y ~ Normal(a b, 0.5)``, with normal priors of sd 2: the posterior is the
same at ``(a, b)`` and ``(-a, -b)``, and lies along the two branches of a hyperbola. Every factor model has an ambiguity
like this. A smooth network maps one connected cloud of noise to one connected cloud of draws, so by itself it either
keeps one branch or leaves a bridge between the two. The default looks for far modes first and gives each a network and
a weight, which is learned; whoever knows the symmetry can build it in. A sampler of your own may do anything at all
that can be drawn and differentiated; nobody asks for its density. So let it flip a coin.

The plane can be summed on a grid: draws and evidence are exact.

Run it with ``python examples/24_custom_sampler.py``; ``--smoke`` makes it quick and meaningless.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from implicitvi import AVBSVI, ImplicitGuide, plots
from implicitvi.avb.samplers import GatedSampler
from implicitvi.metrics import knn_kl

parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the figures")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
torch.set_num_threads(1)  # the networks are small: a second thread costs more than it brings
steps, warm_start, draws = (8, 10, 500) if options.smoke else (800, 600, 20_000)

# %%
# The model, and its exact posterior
# ----------------------------------

PRODUCT, NOISE, PRIOR_SD = 3.0, 0.5, 2.0


def model(y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, PRIOR_SD))
    b = pyro.sample("b", dist.Normal(0.0, PRIOR_SD))
    pyro.sample("y", dist.Normal(a * b, NOISE), obs=y)


def log_density(z: Tensor) -> Tensor:
    """Log joint of ``(a, b)``, ``[..., 2]`` to ``[...]``, in nats."""
    log_prior = dist.Normal(0.0, PRIOR_SD).log_prob(z).sum(-1)
    return log_prior + dist.Normal(z.prod(-1), NOISE).log_prob(torch.tensor(PRODUCT))


def exact(num: int) -> Tensor:
    """Draws ``[num, 2]``: a cell of a fine grid by its mass, and a place in it."""
    ticks = torch.linspace(-9, 9, 1801)
    grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="ij"), -1).flatten(0, 1)
    mass = log_density(grid).double().softmax(0)
    cell = torch.searchsorted(mass.cumsum(0), torch.rand(num, dtype=torch.float64))
    return grid[cell] + (ticks[1] - ticks[0]) * (torch.rand(num, 2) - 0.5)


# %%
# The sampler
# -----------
# `GatedSampler` is the default. This one turns each of its draws around with probability one half. The coin has no
# gradient, and needs none: it is fair whatever the parameters are, and given the coin the draw is differentiable.


class MirroredSampler(GatedSampler):
    """Draws ``s · f(ε)`` with a fair sign ``s``: symmetric under ``z → -z``."""

    def forward(self, num_samples: int, x: Tensor | None = None) -> Tensor:
        z = super().forward(num_samples, x)
        sign = 2.0 * torch.randint(2, (num_samples, 1), device=z.device) - 1
        return sign * z


# %%
# The fits
# --------
# All else is the same, and what the library does by default.

SAMPLERS: dict[str, Any] = {"gated (default)": "gated", "mirrored (ours)": MirroredSampler}


def branches(z: Tensor) -> tuple[float, float]:
    """Share of draws on the positive branch, and of those on neither: where ``a b`` is five sds too small."""
    positive = (z.sum(-1) > 0).float().mean().item()
    return positive, (z.prod(-1) < PRODUCT - 5 * NOISE).float().mean().item()


pyro.set_rng_seed(options.seed)
truth, other = exact(draws), exact(draws)
fitted: dict[str, Tensor] = {}
print(f"{'sampler':20}{'a > 0':>10}{'between':>10}{'KL(q||p)':>10}{'KL(p||q)':>10}{'seconds':>10}")


def row(name: str, z: Tensor, seconds: float) -> str:
    """Line of the table."""
    positive, between = branches(z)
    divergences = f"{knn_kl(z, truth):10.3f}{knn_kl(truth, z):10.3f}"
    return f"{name:20}{positive:10.3f}{between:10.3f}{divergences}{seconds:10.1f}"


for name, sampler in SAMPLERS.items():
    guide = ImplicitGuide(model, sampler=sampler)
    svi = AVBSVI(model, guide, num_steps=steps, warm_start=warm_start, seed=options.seed, progress=False)
    fit = svi.run(torch.tensor(PRODUCT))
    sites = guide.sample(draws)
    fitted[name] = torch.stack([sites["a"], sites["b"]], -1)
    print(row(name, fitted[name], fit.seconds), flush=True)
print(row("exact draws", other, 0.0))
print(
    "\nshare of draws on the positive branch (truth 0.5) and between the branches; divergences in nats, from draws;"
    "\nof exact draws what the estimator makes of its own noise"
)

# %%
# The picture
# -----------
# Draws on the contours of the truth; below, how the branches share them.

figure, axes = plt.subplot_mosaic("lr;ww", figsize=(10, 7), layout="constrained", height_ratios=[3.2, 1])
for place, (name, z) in zip("lr", fitted.items(), strict=True):
    ax = plots.draws_on_density(z, log_density, extent=(-6, 6, -6, 6), grid=500, legend=place == "l", ax=axes[place])
    ax.set(title=name, xlabel="factor $a$", ylabel="factor $b$", aspect="equal")
labels, ax = [*fitted, "truth"], axes["w"]
positive = np.array([*(branches(z)[0] for z in fitted.values()), 0.5])
ax.barh(labels, 1 - positive, color=plots.BLUE, label="a < 0")
ax.barh(labels, positive, left=1 - positive, color=plots.VERMILION, label="a > 0")
ax.axvline(0.5, color="black", lw=1)
ax.set(xlim=(0, 1), xlabel="share of the draws")
ax.invert_yaxis()
ax.legend(title="branch", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
options.output.mkdir(parents=True, exist_ok=True)
path = options.output / "custom_sampler.png"
figure.savefig(path, dpi=130)
print(f"\nwrote {path}")
