"""
A sampler of your own
=====================

Write a sampler that has a known symmetry of the posterior by construction: two modes, each with half of the draws.

The default sampler has to learn this symmetry.

Only the product of two factors is observed, ``y ~ Normal(a b, 0.5)``, with normal priors of sd 2. The posterior is the
same at ``(a, b)`` and ``(-a, -b)``, and lies along the two branches of a hyperbola. Every factor model has such an
ambiguity. A smooth network maps one connected cloud of noise to one connected cloud of draws, so by itself it either
keeps one branch or leaves a bridge between the two. The default first searches for far modes and gives each a network
and a learned weight. If you know the symmetry, you can build it in: your sampler may use any draws that can be
differentiated, because it does not need a density. This one flips a coin.

A sum over a grid of the plane gives exact draws.

Run it with ``python examples/24_custom_sampler.py``; ``--smoke`` runs a tiny version to check
that it works; its results are meaningless.
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
parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the figures")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
torch.set_num_threads(1)  # the networks are small: a second thread would slow them down
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
    """Return the log joint of ``(a, b)``, ``[..., 2]`` to ``[...]``, in nats."""
    log_prior = dist.Normal(0.0, PRIOR_SD).log_prob(z).sum(-1)
    return log_prior + dist.Normal(z.prod(-1), NOISE).log_prob(torch.tensor(PRODUCT))


def exact(num: int) -> Tensor:
    """Draw ``[num, 2]``: a cell of a fine grid by its mass, then a point in the cell."""
    ticks = torch.linspace(-9, 9, 1801)
    grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="ij"), -1).flatten(0, 1)
    mass = log_density(grid).double().softmax(0)
    cell = torch.searchsorted(mass.cumsum(0), torch.rand(num, dtype=torch.float64))
    return grid[cell] + (ticks[1] - ticks[0]) * (torch.rand(num, 2) - 0.5)


# %%
# The sampler
# -----------
# `GatedSampler` is the default. This sampler mirrors each draw with probability one half. The coin does not need a
# gradient: it is fair for all parameters, and given the coin the draw is differentiable.


class MirroredSampler(GatedSampler):
    """A sampler ``s · f(ε)`` with a fair sign ``s``, symmetric under ``z → -z``."""

    def forward(self, num_samples: int, x: Tensor | None = None) -> Tensor:
        z = super().forward(num_samples, x)
        sign = 2.0 * torch.randint(2, (num_samples, 1), device=z.device) - 1
        return sign * z


# %%
# The fits
# --------
# Both fits use the defaults otherwise.

SAMPLERS: dict[str, Any] = {"gated (default)": "gated", "mirrored (ours)": MirroredSampler}


def branches(z: Tensor) -> tuple[float, float]:
    """Return the share of draws on the positive branch, and on neither, where ``a b`` is five sds too small."""
    positive = (z.sum(-1) > 0).float().mean().item()
    return positive, (z.prod(-1) < PRODUCT - 5 * NOISE).float().mean().item()


pyro.set_rng_seed(options.seed)
truth, other = exact(draws), exact(draws)
fitted: dict[str, Tensor] = {}
print(f"{'sampler':20}{'a > 0':>10}{'between':>10}{'KL(q||p)':>10}{'KL(p||q)':>10}{'seconds':>10}")


def row(name: str, z: Tensor, seconds: float) -> str:
    """Return a line of the table."""
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
    "\nfor exact draws the estimator's noise"
)

# %%
# The picture
# -----------
# Draws over contours of the truth; below, the share of each branch.

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
