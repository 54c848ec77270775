"""
Killed, resumed, loaded
=======================

Kill a process in the middle of a fit and resume it from its checkpoint folder.

Every loss, weight and draw equals that of an uninterrupted run, bit for bit.

A checkpoint therefore holds more than the weights: the moments of both optimisers, the contrast, the running averages,
the step of the schedule, and the states of the random number generators. The model is the classic bioassay: four doses,
five animals each, a logistic curve, and a skewed posterior of its two coefficients.

Run it with ``python examples/22_resume_and_checkpoint.py``; ``--smoke`` runs a tiny version to
check that it works; its results are meaningless.

References:
    A Bayesian Analysis for a Quantal Bioassay, Amy Racine and others, 1986; Bayesian Data Analysis, Andrew Gelman and
    others, 2013, section 3.7.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
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
parser.add_argument("--victim", type=Path, help="folder of a fit to be killed")
options = parser.parse_args()
torch.set_num_threads(1)  # the networks are small: a second thread would slow them down
steps, every, killed_at, warm_start = (20, 5, 13, 10) if options.smoke else (500, 100, 260, 1000)

# %%
# The fit
# -------
# Doses in log grams per millilitre, deaths out of five.

DOSE = torch.tensor([-0.86, -0.30, -0.05, 0.73])
DEATHS = torch.tensor([0.0, 1.0, 3.0, 5.0])


def model(dose: Tensor, deaths: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 15.0))
    with pyro.plate("group", len(dose)):
        logits = level + slope * dose
        pyro.sample("deaths", dist.Binomial(5, logits=logits), obs=deaths)


def new_fit(seed: int = options.seed, **more: Any) -> AVBSVI:
    """Return the fit that each run of the script starts with: the same model, options and seed."""
    return AVBSVI(
        model, ImplicitGuide(model), num_steps=steps, warm_start=warm_start, seed=seed, progress=False, **more
    )


# %%
# The interruption
# ----------------
# A separate process runs the fit with ``checkpoint=folder`` and dies between two checkpoints, without an exception,
# without clean-up, and without writing anything.


def power_cut(trainer: Any) -> None:
    if trainer.step_count == killed_at:
        os._exit(137)  # the process is gone


if options.victim:
    new_fit(callbacks=[power_cut]).run(DOSE, DEATHS, checkpoint=options.victim, every=every)

place = tempfile.TemporaryDirectory()
folder = Path(place.name) / "fit"
command = [sys.executable, sys.argv[0], "--victim", str(folder), "--seed", str(options.seed)]
died = subprocess.run(command + ["--smoke"] * options.smoke, check=False)
kept = AVBSVI.load(folder, model, progress=False).setup(DOSE, DEATHS).fit
print(
    f"the process died after step {killed_at} with exit status {died.returncode}; the folder has step {kept.num_steps}:"
)
for file in sorted(folder.iterdir()):
    print(f"  {file.name:20} {file.stat().st_size / 1024:.0f} KiB")
print()

# %%
# The same call again
# -------------------
# The folder has a later state than the new object, so the run resumes from there. We compare it with an uninterrupted
# fit, with a fit with another seed, to see that the comparison can detect differences, and with a fit loaded from the
# folder into a new object.

straight = new_fit()
whole = straight.run(DOSE, DEATHS)
resumed = new_fit().run(DOSE, DEATHS, checkpoint=folder, every=every)
loaded = AVBSVI.load(folder, model, progress=False).setup(DOSE, DEATHS).fit
other = new_fit(seed=options.seed + 1).run(DOSE, DEATHS)


def draws(fit: Any) -> Tensor:
    """Draw level and slope ``[2000, 2]``, with the same random numbers for every fit."""
    torch.manual_seed(options.seed)
    sites = fit.guide.sample(2000)
    return torch.stack([sites["level"], sites["slope"]], -1)


def log_joint(z: Tensor) -> Tensor:
    """Return the log joint of level and slope ``[..., 2]``: ``[...]``, in nats."""
    prior = dist.Normal(torch.zeros(2), torch.tensor([5.0, 15.0])).log_prob(z).sum(-1)
    logits = z[..., :1] + z[..., 1:] * DOSE
    return prior + dist.Binomial(5, logits=logits).log_prob(DEATHS).sum(-1)


def weights(fit: Any) -> Tensor:
    """Return the state of the guide in one vector."""
    return torch.cat([value.flatten() for value in fit.guide.state_dict().values()])


FITS = {
    "never interrupted": (whole, steps),
    "killed and resumed": (resumed, steps - kept.num_steps),
    "loaded in a new object": (loaded, 0),
    "another seed": (other, steps),
}
print(f"{'fit':24}{'steps here':>12}{'losses':>10}{'weights':>10}{'draws':>10}{'largest gap':>14}")
for name, (fit, taken) in FITS.items():
    losses = float(np.mean(fit.losses == whole.losses))
    same = [(f(fit) == f(whole)).float().mean().item() for f in (weights, draws)]
    gap = np.abs(fit.losses - whole.losses).max()
    shares = "".join(f"{share:10.3f}" for share in (losses, *same))
    print(f"{name:24}{taken:12}{shares}{gap:14.4f}", flush=True)
print(
    "\nlosses, weights, draws: the share that equals, bit for bit, that of the uninterrupted fit"
    "\nlargest gap: the largest difference between losses of the same step, in nats"
)

# %%
# The picture
# -----------
# Above: the losses. The grey steps were run twice, by the killed process and by the resumed one. Below: the difference
# of every loss from that of the uninterrupted fit. Right: the draws over contours of the exact posterior, and the
# dose-response curves of the draws.

BLUE, VERMILION = plots.BLUE, plots.VERMILION
figure = plt.figure(figsize=(14, 7.6), layout="constrained")
cells = figure.add_gridspec(2, 2, width_ratios=[1.7, 1])
above, below = figure.add_subplot(cells[0, 0]), figure.add_subplot(cells[1, 0])
right, curves = figure.add_subplot(cells[0, 1]), figure.add_subplot(cells[1, 1])
at = np.arange(1, steps + 1)

above.plot(at, whole.losses, color="0.75", lw=5, label="never interrupted")
before, after = at <= kept.num_steps, at > kept.num_steps
above.plot(at[before], kept.losses, color=VERMILION, lw=1, label="killed process")
above.plot(at[after], resumed.losses[after], color=BLUE, lw=1, label="resumed process")
low, high = np.quantile(whole.losses, [0.01, 0.985])
above.set(ylabel="loss (nats)", ylim=(low - 0.2 * (high - low), high + 0.45 * (high - low)))
above.set_title("The loss of every step", loc="left", weight="bold")
above.legend(loc="upper right", ncols=3, framealpha=1, edgecolor="white")

for name, colour, width in (("another seed", "0.55", 1), ("killed and resumed", BLUE, 3)):
    gap = np.abs(FITS[name][0].losses - whole.losses)
    below.plot(at, gap, color=colour, lw=width, label=name)
below.set_yscale("symlog", linthresh=1e-3, linscale=0.6)
below.set_ylim(-4e-4, 60)
below.set_yticks([0, 1e-3, 1e-2, 1e-1, 1, 10], ["0", "0.001", "0.01", "0.1", "1", "10"])
below.minorticks_off()
below.set(xlabel="step", ylabel="difference of the losses (nats)")
below.set_title("Difference from the uninterrupted fit", loc="left", weight="bold")
below.legend(loc="upper right", ncols=2, frameon=False)
for ax in (above, below):
    ax.set_xlim(0, steps)
    ax.axvspan(kept.num_steps, killed_at, color="0.9", lw=0, zorder=0)
    ax.axvline(killed_at, color="black", lw=1.5)
    for step in range(every, kept.num_steps + 1, every):
        ax.axvline(step, color="black", lw=0.8, ls=":")
marks = {"transform": above.get_xaxis_transform(), "va": "bottom", "fontsize": "small"}
above.text(killed_at + steps / 100, 0.03, f"killed after step {killed_at}", **marks)
middle = (kept.num_steps + killed_at) / 2
above.text(middle, 0.5, "run twice", ha="center", color="0.35", **marks)
above.text(kept.num_steps - steps / 100, 0.03, f"last checkpoint: {kept.num_steps}", ha="right", **marks)

first, second = draws(whole), draws(resumed)
shown = {"extent": (-2.5, 6.0, -3.0, 45.0), "legend": False}
right.scatter(*first.T, s=24, color="0.8", lw=0, zorder=0, label="never interrupted")
plots.draws_on_density(second, log_joint, masses=(0.5, 0.9), **shown, ax=right)
right.set(xlabel="level (log odds)", ylabel="slope (log odds per log dose)")
right.set_title("2,000 draws of both, over the truth", loc="left", weight="bold")
handles, names = right.get_legend_handles_labels()
names = ["killed and resumed" if name == "draws" else name for name in names]
right.legend(handles, names, loc="upper left", markerscale=2, frameon=False)

dose = torch.linspace(-1.2, 1.2, 200)
risk = torch.sigmoid(second[:, :1] + second[:, 1:] * dose)
for inside, alpha in ((0.95, 0.2), (0.5, 0.5)):
    ends = risk.quantile(torch.tensor([(1 - inside) / 2, (1 + inside) / 2]), 0)
    label = f"{100 * inside:.0f} % of the draws"
    curves.fill_between(dose, *ends, color=BLUE, alpha=alpha, lw=0, label=label)
curves.plot(dose, risk.median(0).values, color=BLUE, label="median")
curves.plot(DOSE, DEATHS / 5, "o", color="black", ms=7, clip_on=False, label="of five animals")
curves.set(xlabel="log dose (g / ml)", ylabel="share that dies", xlim=(-1.2, 1.2), ylim=(0, 1))
curves.set_title("Dose-response curve", loc="left", weight="bold")
curves.legend(loc="lower right", frameon=False)

options.output.mkdir(parents=True, exist_ok=True)
path = options.output / "resume_and_checkpoint.png"
figure.savefig(path, dpi=130)
place.cleanup()
print(f"\nwrote {path}")
