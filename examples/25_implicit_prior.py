"""
A prior that is a simulator
===========================

Fit a model whose prior can be simulated but does not have a density: two particles in a double well.

Their noisy sum is observed once. Plain adversarial variational Bayes needs only draws of the prior.

Each particle is pushed to the bottom of one of two wells, at -1 and 1. The particles attract each other, and noise
makes them jump. The density of their final positions is intractable. With the prior as contrast, ``r = p(z)``, it
cancels from the objective:

    elbo(z) = log p(x, z) - log p(z) - T(z) = log p(x | z) - T(z),    ``T ≈ log q(z) - log p(z)``.

Brute force gives the exact posterior: keep those of many simulations that agree with the observation.

Run it with ``python examples/25_implicit_prior.py``; ``--smoke`` runs a tiny version to check that
it works; its results are meaningless.

References:
    Adversarial Variational Bayes, Lars Mescheder, Sebastian Nowozin, Andreas Geiger, 2017, section 3.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from implicitvi import AVBSVI, ImplicitGuide, plots
from implicitvi.errors import ModelError
from implicitvi.metrics import knn_kl

parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the figures")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
torch.set_num_threads(1)  # the networks are small: a second thread would slow them down
steps, draws, simulations = (8, 500, 20_000) if options.smoke else (1000, 10_000, 200_000)

# %%
# The simulator
# -------------
# Pyro needs a distribution with a support and ``sample``; ``log_prob`` is not defined. Seconds and metres are
# arbitrary.

TIME, STEPS, TEMPERATURE, PULL = 2.0, 20, 0.5, 0.3
START = torch.tensor([0.3, -0.1])
SEEN, NOISE = torch.tensor(0.0), 0.4


class TwoParticles(dist.TorchDistribution):
    """The positions ``[2]`` after ``TIME`` seconds, by the Euler-Maruyama scheme."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector

    def __init__(self) -> None:
        super().__init__(torch.Size(), torch.Size([2]), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        z, dt = START.expand(*sample_shape, 2), TIME / STEPS
        for _ in range(STEPS):
            force = 4 * (torch.tanh(3 * z) - z) + PULL * (z.flip(-1) - z)
            z = z + force * dt + (2 * TEMPERATURE * dt) ** 0.5 * torch.randn(*sample_shape, 2)
        return z


def model(seen: Tensor) -> None:
    z = pyro.sample("z", TwoParticles())
    pyro.sample("sum", dist.Normal(z.sum(-1), NOISE), obs=seen)


# %%
# Options that need a density raise an error
# ------------------------------------------

try:
    AVBSVI(model, ImplicitGuide(model), progress=False).run(SEEN)
except ModelError as error:
    print(f"With the default contrast: {error}\n")

# %%
# The fit
# -------

pyro.set_rng_seed(options.seed)
guide = ImplicitGuide(model)
svi = AVBSVI(model, guide, contrast="prior", num_steps=steps, seed=options.seed, progress=False)
fit = svi.run(SEEN)
fitted = guide.sample(draws)["z"]

# %%
# Brute force
# -----------
# Each simulation is kept with a probability proportional to its likelihood: the kept ones are draws of the posterior.

prior = TwoParticles().sample((simulations,))
kept = prior[torch.rand(simulations) < (-0.5 * ((prior.sum(-1) - SEEN) / NOISE) ** 2).exp()]
one, two = kept[: 2 * draws].chunk(2)
start = TwoParticles().sample((draws,))


def row(name: str, z: Tensor) -> str:
    """Return a line of the table."""
    right = (z[:, 0] > z[:, 1]).float().mean()
    distance = (z[:, 0] - z[:, 1]).abs().mean()
    divergences = f"{knn_kl(z, one):10.3f}{knn_kl(one, z):10.3f}"
    return f"{name:16}{right:12.3f}{distance:12.3f}{z.sum(-1).std():12.3f}{divergences}"


print(f"{'draws of':16}{'z1 > z2':>12}{'distance':>12}{'sd of sum':>12}{'KL(q||p)':>10}{'KL(p||q)':>10}")
print(row("the prior", start))
print(row("the fit", fitted))
print(row("brute force", two))
print(
    f"\nshare of draws with the first particle on the right; mean distance of the two, metres; sd of their sum, metres;"
    f"\ndivergences from the posterior in nats, 0 at best; {len(kept):,} of {simulations:,} simulations kept"
    f"\n{fit}"
)

# %%
# The picture
# -----------
# The prior has a mode for each way to place two particles in two wells. The observation, a sum near 0, leaves the two
# modes with one particle in each well.

figure, axes = plt.subplots(1, 3, figsize=(13, 5.0), layout="constrained", sharex=True, sharey=True)
panels = {
    "prior, simulated": (start, plots.GREEN),
    "posterior, fitted": (fitted, plots.BLUE),
    "posterior, by brute force": (one, plots.BLACK),
}
for ax, (title, (z, colour)) in zip(axes, panels.items(), strict=True):
    ax.scatter(z[:3000, 0], z[:3000, 1], s=4, color=colour, alpha=0.4, linewidths=0)
    ax.axline((0, SEEN.item()), slope=-1, color=plots.VERMILION, lw=1.2, label="observed sum")
    ax.set(xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), title=title, xlabel="first particle (m)")
    ax.set_box_aspect(1)
axes[0].set_ylabel("second particle (m)")
axes[0].legend(loc="upper right", fontsize="small")
options.output.mkdir(parents=True, exist_ok=True)
path = options.output / "implicit_prior.png"
figure.savefig(path, dpi=130)
print(f"\nwrote {path}")
