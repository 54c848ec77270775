"""
Simulation-based calibration
============================

Is an inference algorithm right, on average over the data that a model can make? Four answers to one model: the exact
posterior, one that is a quarter too narrow, the prior, and an amortized implicit guide.

Draw parameters from the prior, data from the parameters, and ask for the posterior given the data: the parameters are
then one more draw of it. So their rank among its draws is uniform if the draws are right. The difference of the ranks'
ECDF from the uniform one is drawn in a band that holds 95 % of what exact draws would show, from end to end.

The model is the oldest of all: four observations from a Normal whose mean and scale are both unknown. An amortized
guide is what calibration was made for: it is trained once, on data that the model made, and draws the posterior of any
other data at once, so that hundreds of posteriors cost no more than one.

Run it with ``python examples/21_sbc.py``; ``--smoke`` makes it quick and meaningless.

References:
    Validating Bayesian Inference Algorithms with Simulation-Based Calibration, Sean Talts and others, 2018.
    Graphical Test for Discrete Uniformity, Teemu Säilynoja, Paul-Christian Bürkner, Aki Vehtari, 2022.
    Simulation-Based Calibration Checking for Bayesian Computation, Martin Modrák and others, 2023: why the log
    likelihood has to be ranked too.
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
parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the figures")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
torch.set_num_threads(1)  # the networks are small: a second thread costs more than it brings
pyro.set_rng_seed(options.seed)
steps, warm_start, datasets = (8, 10, 200) if options.smoke else (1500, 1000, 500)
EACH, DRAWS = 4, 99

# %%
# The model
# ---------
# A row of ``y`` is a dataset with a mean and a scale of its own. Rows know nothing of each other, so the model of one
# dataset and that of a thousand are the same lines.


def model(y: Tensor, batch: int | None = None) -> None:
    with pyro.plate("dataset", len(y), subsample_size=batch) as rows:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        each = dist.Normal(mean[..., None], scale[..., None]).expand([*mean.shape, EACH])
        pyro.sample("y", each.to_event(1), obs=y[rows])


# %%
# Four posteriors
# ---------------
# Each takes data ``[1, 4]`` and returns 99 draws. The exact one sums over a grid of the log scale, given which the mean
# is Normal.

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
    """Every exact draw a quarter of the way to the average draw."""
    draws = exact(y)
    logs = {"mean": draws["mean"], "scale": draws["scale"].log()}
    narrow = {name: value.mean(0) + 0.75 * (value - value.mean(0)) for name, value in logs.items()}
    return narrow | {"scale": narrow["scale"].exp()}


def prior(y: Tensor) -> dict[str, Tensor]:
    return {"mean": 2 * torch.randn(DRAWS, 1), "scale": torch.randn(DRAWS, 1).exp()}


# %%
# The guide is trained on 10,000 datasets from the prior, 100 at a time; a network is shown the average and the log
# standard deviation of each. Where a sampler ends may depend on what it saw last, so it is tested with other data.


def features(y: Tensor, batch: int | None = None) -> Tensor:
    """Average and log standard deviation of every dataset: ``[N, 2]``."""
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
# `sbc` makes the data, asks, and ranks. A posterior is judged by whether the ECDFs of all three quantities stay within
# their band: 1 is its edge.

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
print(f"\nthe furthest that the ECDF of {datasets} ranks strays, as a share of the 95 % band's half-width")
for name, found in results.items():
    print(f"\n{name}: {found}")

# %%
# The picture
# -----------
# A column for each posterior. A line that rises first and falls later says that the truth is too often among the
# extremes: the draws are too narrow. The prior's ranks are as uniform as the exact ones: the parameters *are* draws of
# it. What gives it away is the log likelihood, as the prior has not seen the data.

REACH = 0.16  # of the axis: a line that leaves it says how far it goes
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
            ax.text(0.98, 0.89, f"as far as {furthest:.2f}", color=colour, fontsize="small", **style)
for row, quantity in zip(axes, QUANTITIES.values(), strict=True):
    row[0].set_ylabel(f"rank of the {quantity}:\nECDF less uniform")
for ax in axes[-1]:
    ax.set(xlabel="share of the draws below", xlim=(0, 1), ylim=(-REACH, REACH))
figure.suptitle(f"Where is the truth among {DRAWS} draws, in {datasets} datasets?  Grey: 95 % of exact posteriors")
options.output.mkdir(parents=True, exist_ok=True)
path = options.output / "sbc.png"
figure.savefig(path, dpi=130)
print(f"\nwrote {path}")
