"""
Diagnostics of a bad fit
========================

Diagnose one good and two bad fits of the same posterior.

One bad fit has the best loss of all; the other looks healthy wherever it has draws. Their reports name the problem and
a fix.

Three stations hear a source and report its distance, with errors. They stand on a line, so the source is on either side
with the same probability. With two parameters, a sum over a grid gives the exact posterior and evidence.

* *good*: the defaults.
* *collapsed*: the learning rate of the adversary is thousands of times too small. The adversary does not notice that
  the draws contract, so they gather at the maximum of the joint density.
* *one mode*: the search is limited to one mode. Gradients near the draws do not show the other side, but the restarts
  do.

Run it with ``python examples/20_diagnostics_of_a_bad_fit.py``; ``--smoke`` runs a tiny version
to check that it works; its results are meaningless.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from implicitvi import AVBSVI, ImplicitGuide, plots

parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the figures")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
torch.set_num_threads(1)  # the networks are small: a second thread would slow them down
pyro.set_rng_seed(options.seed)
steps, warm_start, draws, looked_at = (8, 10, 500, 200) if options.smoke else (400, 600, 4000, 2000)

# %%
# The model
# ---------
# Positions are in kilometres. North and south are symmetric: a good fit gives each side half of its draws.

STATIONS = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.5, 0.0]])
HEARD = torch.tensor([3.9, 3.3, 3.0])
ERROR = 0.45


def model(heard: Tensor) -> None:
    east = pyro.sample("east", dist.Normal(0.0, 3.0))
    north = pyro.sample("north", dist.Normal(0.0, 3.0))
    gap = torch.stack([east, north], -1)[..., None, :] - STATIONS
    with pyro.plate("station", len(STATIONS)):
        pyro.sample("heard", dist.Normal(gap.square().sum(-1).sqrt(), ERROR), obs=heard)


def log_joint(z: Tensor) -> Tensor:
    """Return the log joint of east and north ``[..., 2]``: ``[...]``, in nats."""
    distance = (z[..., None, :] - STATIONS).square().sum(-1).sqrt()
    prior = dist.Normal(0.0, 3.0).log_prob(z).sum(-1)
    return prior + dist.Normal(distance, ERROR).log_prob(HEARD).sum(-1)


side = torch.linspace(-8, 8, 1601)
grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)
heights = log_joint(grid)
evidence = (heights.flatten().logsumexp(0) + 2 * (side[1] - side[0]).log()).item()
north_share = heights[side > 0].exp().sum().item() / heights.exp().sum().item()

# %%
# The fits
# --------
# Restarts that disagree cause a warning, which is printed below.

TRIED: dict[str, dict[str, Any]] = {
    "good": {},
    "collapsed": {"adversary_lr": 1e-7, "contrast": "prior", "max_modes": 1},
    "one mode": {"max_modes": 1, "restarts": 4},
}
fits, reports, points, warned = {}, {}, {}, ""
for name, tried in TRIED.items():
    svi = AVBSVI(
        model, ImplicitGuide(model), num_steps=steps, warm_start=warm_start, seed=options.seed, progress=False, **tried
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fits[name] = svi.run(HEARD)
        reports[name] = fits[name].diagnose(num_samples=looked_at)
    warned += "".join(f"{name}: {each.message}\n" for each in caught)
    sites = fits[name].guide.sample(draws)
    points[name] = torch.stack([sites["east"], sites["north"]], -1)


def row(name: str, loss: float, z: Tensor, failed: int, seconds: float) -> str:
    """Return a line of the table; the share of draws ``[S, 2]`` in the north is the weight of that mode."""
    spread, share = z[:, 0].std().item(), (z[:, 1] > 0).float().mean().item()
    return f"{name:14}{loss:10.3f}{spread:12.3f}{share:10.3f}{failed:10}{seconds:10.1f}"


cells = torch.distributions.Categorical(logits=heights.flatten()).sample((20_000,))
truth = grid.reshape(-1, 2)[cells]
print(f"{'posterior':14}{'loss':>10}{'sd of east':>12}{'north':>10}{'failed':>10}{'seconds':>10}")
for name, fit in fits.items():
    loss = fit.history.last("sampler", 50)
    print(row(name, loss, points[name], len(reports[name].failed), fit.seconds))
print(row("exact", -evidence, truth, 0, 0.0))
print(
    "\nloss in nats, lower looks better; for the truth minus the log evidence, the minimum of any bound"
    "\nsd of east in km; north: share of the draws; failed: number of failed checks; seconds: of the fit"
)
for name, report in reports.items():
    print(f"\n{name}\n{'=' * len(name)}\n{report}")
print(f"\n{warned}")

# %%
# The picture
# -----------
# Above: the truth, which is unknown in practice. Middle: the loss. Half a posterior is ``log 2`` worse than the
# optimum; a point is far better than the optimum. Below: the checks, which do not use the truth. A check above its
# limit may be ok, if the excess is within the noise.

figure = plt.figure(figsize=(18, 13.6), layout="constrained")
rows = figure.add_gridspec(3, 3, height_ratios=[1.25, 0.75, 1.6])
colours = {"good": plots.GREEN, "collapsed": plots.VERMILION, "one mode": plots.VERMILION}
losses = np.concatenate([fit.losses for fit in fits.values()])
for column, (name, fit) in enumerate(fits.items()):
    above, middle, below = (figure.add_subplot(rows[i, column]) for i in range(3))
    window = (-5.0, 5.0, -5.0, 5.0)
    plots.draws_on_density(points[name], log_joint, extent=window, legend=column == 0, color=plots.BLUE, ax=above)
    if len(fit.fits) > 1:
        last = fit.fits[-1].guide.sample(1000)
        above.plot(last["east"], last["north"], "x", ms=3, mew=0.6, alpha=0.6, color=plots.ORANGE)
        above.text(0, -4.7, "crosses: its last restart", ha="center", color="0.3")
    above.plot(*STATIONS.T, "^", color="black", ms=9, label="station")
    above.set(xlabel="east (km)", ylabel="north (km)", aspect="equal")
    above.set_title(name, weight="bold", fontsize="x-large", color=colours[name])
    plots.loss(fit, ax=middle)
    middle.axhline(-evidence, color="black", ls="--", lw=1.2, label="minus log evidence")
    middle.set_ylim(np.quantile(losses, 0.005) - 0.5, np.quantile(losses, 0.97) + 0.5)
    middle.set_title(f"loss at the end {fit.history.last('sampler', 50):.2f} nats", loc="left")
    if column == 0:
        middle.legend(frameon=False, fontsize="small")
    plots.diagnosis(reports[name], ax=below)
    checks, failed = reports[name].checks, len(reports[name].failed)
    below.set_title(f"failed: {failed} of {sum(c.state in plots.MARKS for c in checks)}", loc="left")
options.output.mkdir(parents=True, exist_ok=True)
path = options.output / "diagnostics_of_a_bad_fit.png"
figure.savefig(path, dpi=110)

# %%
# Restarts
# --------
# R-hat shows that they disagree. Each restart finds a side by chance, and so would a single fit.

shares = [(one.guide.sample(draws)["north"] > 0).float().mean().item() for one in fits["one mode"].fits]
figure, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
labels = [*(f"restart {i}" for i in range(1, len(shares) + 1)), "truth"]
north = np.array([*shares, north_share])
ax.barh(labels, north, color=plots.BLUE, label="north")
ax.barh(labels, 1 - north, left=north, color=plots.VERMILION, label="south")
ax.axvline(north_share, color="black", lw=1)
ax.set(xlim=(0, 1), xlabel="share of the draws")
ax.invert_yaxis()
ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
restarts = options.output / "diagnostics_restarts.png"
figure.savefig(restarts, dpi=150)
print(f"wrote {path} and {restarts}")
