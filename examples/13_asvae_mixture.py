"""
One divergence or two
=====================

Compare a variational autoencoder, its symmetric variants and ALI on five Gaussians in the plane.

The evidence lower bound minimises ``KL(q ‖ p)``, so the model's joint must cover that of the data. It hardly penalises
the decoder at codes between two clusters, so some draws lie between the modes. The adversarial symmetric VAE also
minimises ``KL(p ‖ q)``, which penalises draws where there are no data. This divergence needs the density of the data,
which an adversary learns. ALI uses neither divergence, and no reconstruction.

All fits start from the same short fit of a VAE. The data are ALICE's toy data, five Gaussians of standard deviation 0.2
(ALICE: Towards Understanding Adversarial Learning for Joint Distribution Matching, Chunyuan Li et al., 2017).

Run it with ``python examples/13_asvae_mixture.py``; ``--smoke`` runs a tiny version to check that
it works; its results are meaningless.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from implicitvi.avb.adversaries import GatedAdversary
from implicitvi.nn import mlp
from implicitvi.vae import ALI, ASVAE, VAE, MarginalASVAE
from implicitvi.vae.decoders import Decoder, GaussianLikelihood
from implicitvi.vae.encoders import GaussianEncoder
from implicitvi.vae.model import LatentModel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the figures")
parser.add_argument("--seed", type=int, default=0, help="the first of three seeds")
options = parser.parse_args()
seeds = range(options.seed, options.seed + (1 if options.smoke else 3))
start, epochs = (1, 1) if options.smoke else (50, 80)
torch.set_num_threads(1)  # the networks are small: a second thread would slow them down

MEANS = torch.tensor([[0.0, 0.0], [2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])
SD = 0.2


def mixture(num_rows: int, generator: torch.Generator) -> Tensor:
    """Draw ``[num_rows, 2]`` from the five Gaussians."""
    which = torch.randint(len(MEANS), (num_rows,), generator=generator)
    return MEANS[which] + SD * torch.randn(num_rows, 2, generator=generator)


# %%
# The objectives
# --------------
# All use the same Gaussian encoder, and a Gaussian decoder that learns its scale. `ASVAE` is the published form, with
# two adversaries on pairs. `MarginalASVAE` uses the known densities of encoder and decoder, so that its single
# adversary only learns the density of the data.


def networks() -> tuple[nn.Module, nn.Module]:
    encoder = GaussianEncoder(mlp([2, 128, 128, 4], nn.ReLU))
    decoder = Decoder(mlp([2, 128, 128, 2], nn.ReLU), GaussianLikelihood([2]))
    return encoder, decoder


def of_pairs() -> nn.Module:
    return GatedAdversary(2, context_dim=2)


OBJECTIVES: dict[str, Callable[[nn.Module, nn.Module], LatentModel]] = {
    "VAE": lambda e, d: VAE(e, d, 2),
    "ASVAE": lambda e, d: ASVAE(e, d, 2, of_pairs(), of_pairs()),
    "MarginalASVAE": lambda e, d: MarginalASVAE(e, d, 2, GatedAdversary(2)),
    "ALI": lambda e, d: ALI(e, d, 2, of_pairs(), penalty=0.1),
}
RATES = {"VAE": 4e-3, "ASVAE": 2e-3, "MarginalASVAE": 4e-3, "ALI": 1e-3}
ADVERSARY_STEPS = {"VAE": 0, "ASVAE": 3, "MarginalASVAE": 3, "ALI": 1}  # before each step of the model


@torch.no_grad()
def judged(model: LatentModel, test: Tensor) -> list[float]:
    """Return the share of draws in a mode, the modes with 2 % of them, the smallest share, and the squared error."""
    near, mode = torch.cdist(model.sample(10_000), MEANS).min(1)
    inside = near < 3 * SD
    shares = torch.bincount(mode[inside], minlength=len(MEANS)) / len(near)
    error = (model.reconstruct(test) - test).square().sum(1).mean()
    figures = [inside.float().mean(), (shares > 0.02).sum(), shares.min(), error]
    return [float(figure) for figure in figures]


results: dict[str, list[list[float]]] = {name: [] for name in OBJECTIVES}
fitted: dict[str, LatentModel] = {}
for seed in seeds:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train, test = mixture(2048, generator), mixture(1024, generator)
    settings = {"batch_size": 256, "seed": seed, "progress": False}
    shared = networks()
    VAE(*shared, 2).fit(train, epochs=start, lr=4e-3, **settings)
    for name, objective in OBJECTIVES.items():
        model = objective(*deepcopy(shared))
        began = time.perf_counter()
        model.fit(
            train,
            epochs=epochs,
            adversary_steps=ADVERSARY_STEPS[name],
            lr=(RATES[name], 1e-5),
            adversary_lr=(2e-3, 1e-4),
            **settings,
        )
        seconds = time.perf_counter() - began
        results[name].append([*judged(model, test), seconds])
        if seed == seeds[0]:
            fitted[name] = model

print(f"{'means over seeds':20}{'in a mode':>11}{'modes':>8}{'least':>9}{'error':>10}{'seconds':>10}")
for name, rows in results.items():
    inside, modes, least, error, seconds = np.mean(rows, 0)
    print(f"{name:20}{inside:11.3f}{modes:8.1f}{least:9.3f}{error:10.4f}{seconds:10.1f}")
print(
    "\nshare of draws within 3 sd of a mode; modes with 2 % of the draws, and the smallest share;"
    "\nsquared error of reconstructions\n"
)
for name, rows in results.items():
    print(f"in a mode, seed by seed: {name:16}" + "".join(f"{row[0]:8.3f}" for row in rows))

# %%
# The pictures
# ------------
# Draws of each model, and circles that enclose 99 % of each Gaussian.

figure, axes = plt.subplots(1, len(fitted), figsize=(13, 4.2), layout="constrained", sharey=True)
for ax, (name, model) in zip(axes, fitted.items(), strict=True):
    draws = model.sample(3000)
    ax.scatter(*draws.T.numpy(), s=2, color="#0072B2", alpha=0.5, linewidths=0)
    for centre in MEANS.tolist():
        ax.add_patch(plt.Circle(centre, 3 * SD, fill=False, color="#D55E00", lw=1.2))
    ax.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal", xlabel="$x_1$")
    ax.set_title(f"{name}: {results[name][0][0]:.0%} in a mode", fontsize=10)
axes[0].set_ylabel("$x_2$")
options.output.mkdir(parents=True, exist_ok=True)
path = options.output / "asvae_mixture.png"
figure.savefig(path, dpi=150)
print(f"\nwrote {path}")
