"""
Simulation-based calibration
============================

Test whether an inference algorithm is right, on average over data from the model.

The page tests four posteriors of one model: the exact one, one that is a quarter too narrow, the prior, and an
amortized implicit guide.

Draw parameters from the prior and data from the parameters. The parameters are then a draw from the posterior given
these data, so their rank among correct posterior draws is uniform. The plot shows the difference between the ECDF of
the ranks and the uniform one, in a band that contains the whole curve for 95 % of exact posteriors.

The model has four observations from a Normal with unknown mean and scale. An amortized guide suits calibration well: it
is trained once, on data from the model, and then draws the posterior of any other data immediately, so hundreds of
posteriors cost no more than one.

Run it with ``python examples/21_sbc.py``; ``--smoke`` runs a tiny version to check that it works; its results are
meaningless.

References:
    Validating Bayesian Inference Algorithms with Simulation-Based Calibration, Sean Talts and others, 2018.
    Graphical Test for Discrete Uniformity, Teemu Säilynoja, Paul-Christian Bürkner, Aki Vehtari, 2022.
    Simulation-Based Calibration Checking for Bayesian Computation, Martin Modrák and others, 2023, on why
    to rank the log likelihood too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from implicitvi import AVBSVI, ImplicitGuide, plots
from implicitvi.diagnostics.sbc import band_share, sbc

parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the figures")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
torch.set_num_threads(1)  # the networks are small: a second thread would slow them down
pyro.set_rng_seed(options.seed)
steps, warm_start, datasets = (8, 10, 200) if options.smoke else (1500, 1000, 500)
EACH, DRAWS = 4, 99

# %%
# The model
# ---------
# Each row of ``y`` is a dataset with its own mean and scale. Rows are independent, so the same lines model one dataset
# or a thousand.


def model(y: Tensor, batch: int | None = None) -> None:
    with pyro.plate("dataset", len(y), subsample_size=batch) as rows:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        each = dist.Normal(mean[..., None], scale[..., None]).expand([*mean.shape, EACH])
        pyro.sample("y", each.to_event(1), obs=y[rows])


# %%
# Four posteriors
# ---------------
# Each takes data ``[1, 4]`` and returns 99 draws. The exact posterior sums over a grid of the log scale; given the
# scale, the mean is Normal.

GRID = torch.linspace(-6, 6, 6001).double()


def exact(y: Tensor) -> dict[str, Tensor]:
    y, variance = y.double(), (2 * GRID).exp()
    precision = EACH / variance + 1 / 4
    log_joint = -(EACH - 1) * GRID - (y - y.mean()).square().sum() / (2 * variance)
    log_joint += dist.Normal(0.0, (variance / EACH + 4).sqrt()).log_prob(y.mean())
    log_joint += dist.Normal(0.0, 1.0).log_prob(GRID)
    cell = dist.Categorical(logits=log_joint).sample((DRAWS, 1))
    mean = y.sum() / variance[cell] / precision[cell]
    mean = mean + torch.randn(DRAWS, 1) / precision[cell].sqrt()
    jitter = (torch.rand(DRAWS, 1) - 0.5) * (GRID[1] - GRID[0])
    return {"mean": mean.float(), "scale": (GRID[cell] + jitter).exp().float()}


def too_narrow(y: Tensor) -> dict[str, Tensor]:
    """Move every exact draw a quarter of the way to the average draw."""
    draws = exact(y)
    logs = {"mean": draws["mean"], "scale": draws["scale"].log()}
    narrow = {name: value.mean(0) + 0.75 * (value - value.mean(0)) for name, value in logs.items()}
    return narrow | {"scale": narrow["scale"].exp()}


def prior(y: Tensor) -> dict[str, Tensor]:
    return {"mean": 2 * torch.randn(DRAWS, 1), "scale": torch.randn(DRAWS, 1).exp()}


# %%
# The guide is trained on 10,000 datasets from the prior, 100 at a time. Its network takes the average and the log
# standard deviation of each dataset. The test uses other data, because a fit can depend on its last minibatches.


def features(y: Tensor, batch: int | None = None) -> Tensor:
    """Return average and log standard deviation of every dataset: ``[N, 2]``."""
    return torch.stack([y.mean(-1), y.std(-1).log()], -1)


scales, means = torch.randn(10_000, 1).exp(), 2 * torch.randn(10_000, 1)
simulated = means + scales * torch.randn(10_000, EACH)
guide = ImplicitGuide(model, amortize={"dataset": features})
fit = AVBSVI(model, guide, num_steps=steps, warm_start=warm_start, seed=options.seed, progress=False).run(
    simulated, batch=100
)
print(f"the guide was trained in {fit.seconds:.0f} s on {len(simulated):,} datasets", flush=True)

POSTERIORS: dict[str, Callable[[Tensor], Any]] = {
    "exact": exact,
    "a quarter too narrow": too_narrow,
    "the prior": prior,
    "amortized AVB": lambda y: guide.sample(DRAWS, y),
}

# %%
# The test
# --------
# `sbc` draws the data, calls the posterior and computes the ranks. A posterior passes if the ECDFs of all three
# quantities stay within their band, whose edge is 1.

results = {}
QUANTITIES = {"mean[0]": "mean", "scale[0]": "scale", "log likelihood": "log likelihood"}
print(f"\n{'posterior':24}{'mean':>10}{'scale':>10}{'log likelihood':>18}{'seconds':>10}")
for name, posterior in POSTERIORS.items():
    began = time.perf_counter()
    found = results[name] = sbc(
        model,
        lambda _, data, posterior=posterior: posterior(data["y"]),
        torch.zeros(1, EACH),
        num_datasets=datasets,
        num_draws=DRAWS,
        seed=options.seed,
    )
    shares = [band_share(found.ranks[key], DRAWS) for key in QUANTITIES]
    seconds = time.perf_counter() - began
    print(f"{name:24}{shares[0]:10.2f}{shares[1]:10.2f}{shares[2]:18.2f}{seconds:10.1f}", flush=True)
print(f"\nlargest deviation of the ECDF of {datasets} ranks, as a share of the 95 % band's half-width")
for name, found in results.items():
    print(f"\n{name}: {found}")

# %%
# The picture
# -----------
# Each column shows one posterior. A line that first rises and then falls means that the truth is too often among the
# extremes: the draws are too narrow. The ranks of the prior are uniform, because the parameters *are* draws from it.
# Only the log likelihood reveals that the prior ignores the data.

REACH = 0.16  # of the axis: the maximum of a line that leaves it is printed
figure, axes = plt.subplots(3, 4, figsize=(14, 8.6), sharex=True, sharey=True, layout="constrained")
share = torch.arange(1, DRAWS + 1) / (DRAWS + 1)
for column, (name, found) in zip(axes.T, results.items(), strict=True):
    column[0].set_title(name, weight="bold")
    lower, upper = found.band()
    for ax, key in zip(column, QUANTITIES, strict=True):
        difference = found.difference(key)
        good = band_share(found.ranks[key], DRAWS) <= 1
        colour = plots.BLUE if good else plots.VERMILION
        ax.fill_between(share, lower, upper, color="0.88", lw=0, step="mid", label="95 % band")
        ax.axhline(0, color="0.6", lw=0.8)
        ax.step(share, difference, where="mid", color=colour, lw=1.6)
        verdict = "inside" if good else f"OUTSIDE, {band_share(found.ranks[key], DRAWS):.1f} ×"
        style = {"transform": ax.transAxes, "ha": "right", "va": "top", "weight": "bold"}
        ax.text(0.98, 0.97, verdict, color=colour, fontsize="small", **style)
        furthest = difference[difference.abs().argmax()].item()
        if abs(furthest) > REACH:
            ax.text(0.98, 0.89, f"up to {furthest:.2f}", color=colour, fontsize="small", **style)
for row, quantity in zip(axes, QUANTITIES.values(), strict=True):
    row[0].set_ylabel(f"rank of the {quantity}:\nECDF less uniform")
for ax in axes[-1]:
    ax.set(xlabel="share of the draws below", xlim=(0, 1), ylim=(-REACH, REACH))
figure.suptitle(f"Rank of the truth among {DRAWS} draws, in {datasets} datasets.  Grey: 95 % of exact posteriors")
options.output.mkdir(parents=True, exist_ok=True)
path = options.output / "sbc.png"
figure.savefig(path, dpi=130)
print(f"\nwrote {path}")
