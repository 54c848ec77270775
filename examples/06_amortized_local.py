"""
Amortized local effects
=======================

One network draws the effects of a thousand groups, trained on minibatches of a hundred groups.

The fit is compared with the exact posterior of each group, and of a hundred groups that it never saw.

Group ``i`` reports the mean ``y`` of few or many observations, so its standard error is large or small, and its effect
is ``Normal(mu, tau)``. Every effect is Normal given ``mu`` and ``tau``, and ``mu`` is Normal given ``tau``, so a sum
over a grid of ``tau`` gives the exact posterior. `ImplicitGuide(model, amortize={"groups": features})` draws ``mu`` and
``tau`` from one implicit posterior, and each effect from a network that takes the group's features and the draw of
both.

The effects are nearly exact. ``mu`` and ``tau`` are harder: minibatches give noisy gradients for them, and the learned
ratios of a thousand groups affect them too.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from torch import Tensor

from implicitvi import AVBSVI, ImplicitGuide

torch.set_num_threads(1)  # the networks are small: a second thread would slow them down

MU, TAU = 1.5, 0.8
Moments = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run."""

    avb: dict[str, Any] = field(default_factory=dict)  # empty: the defaults of `AVBSVI`
    draws: int = 3000


SMOKE = Sizes(avb={"num_steps": 8, "warm_start": 10}, draws=200)


def model(y: Tensor, error: Tensor, batch: int | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("groups", len(y), subsample_size=batch) as rows:
        effect = pyro.sample("effect", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(effect, error[rows]), obs=y[rows])


def features(y: Tensor, error: Tensor, batch: int | None = None) -> Tensor:
    """Return the network's input for each group: its mean and the logarithm of its standard error."""
    return torch.stack([y, error.log()], -1)


def generate(groups: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return effects, means and standard errors ``[N]`` of groups of 1 to 49 observations with variance 1."""
    generator = torch.Generator().manual_seed(seed)
    error = (50 ** torch.rand(groups, generator=generator)).floor() ** -0.5
    effect = MU + TAU * torch.randn(groups, generator=generator)
    return effect, effect + error * torch.randn(groups, generator=generator), error


def moments(weight: NDArray[np.float64], mean: Any, variance: Any) -> Moments:
    """Return mean and sd of a mixture: weights ``[T]``, components ``[T, ...]``."""
    centre = np.tensordot(weight, mean, 1)
    return centre, np.sqrt(np.tensordot(weight, variance + (mean - centre) ** 2, 1))


class Exact:
    """The exact posterior given the means and standard errors of the groups, on a grid of ``log tau``."""

    def __init__(self, y: Tensor, error: Tensor):
        self.log_tau = np.linspace(-3.0, 2.0, 1001)
        y, variance = y.double().numpy(), error.double().numpy() ** 2
        whole = np.exp(2 * self.log_tau)[:, None] + variance
        self.precision = (1 / whole).sum(-1) + 1 / 25
        self.mu = (y / whole).sum(-1) / self.precision
        score = -(np.log(whole) + y**2 / whole).sum(-1) - np.log(self.precision)
        score += self.precision * self.mu**2 - self.log_tau**2
        self.weight = np.exp((score - score.max()) / 2)
        self.weight /= self.weight.sum()

    def shared(self) -> dict[str, Moments]:
        """Return means and sds of ``mu`` and ``tau``."""
        tau = np.exp(self.log_tau)
        mu = moments(self.weight, self.mu, 1 / self.precision)
        return {"mu": mu, "tau": moments(self.weight, tau, 0.0 * tau)}

    def effects(self, y: Tensor, error: Tensor) -> Moments:
        """Return means and sds of the effects of groups, the given groups or new ones."""
        y, variance = y.double().numpy(), error.double().numpy() ** 2
        kept = (share := np.exp(2 * self.log_tau)[:, None]) / (share + variance)
        mean = kept * y + (1 - kept) * self.mu[:, None]
        return moments(self.weight, mean, kept * variance + (1 - kept) ** 2 / self.precision[:, None])


def compare(sizes: Sizes, seed: int) -> dict[str, tuple[tuple[Tensor, ...], Moments, Moments]]:
    """Fit, print the table and return the groups with exact and fitted moments, for fitted and new groups."""
    old, new = generate(1000, seed), generate(100, seed + 1)
    guide = ImplicitGuide(model, amortize={"groups": features})
    fit = AVBSVI(model, guide, seed=seed, progress=False, **sizes.avb).run(*old[1:], batch=100)
    exact = Exact(*old[1:])
    draws = {
        name: guide.sample(sizes.draws, *groups[1:])
        for name, groups in (("groups fitted", old), ("groups never seen", new))
    }
    step = (fit.seconds - fit.setup_seconds) / fit.num_steps
    print(f"{fit.seconds:.1f} seconds, {step * 1000:.1f} ms a step of 100 of {len(old[1]):,} groups\n")
    print(f"{'posterior':20}{'error (sd)':>12}{'at most':>10}{'sd ratio':>10}{'from':>10}{'to':>10}")
    for name, moments in exact.shared().items():
        print(row(name, moments, measured(draws["groups fitted"][name])))
    results = {}
    for name, groups in (("groups fitted", old), ("groups never seen", new)):
        found = measured(draws[name]["effect"])
        results[name] = groups, exact.effects(*groups[1:]), found
        print(row(name, *results[name][1:]))
    return results


def measured(draws: Tensor) -> Moments:
    """Return means and sds of draws ``[S, ...]``."""
    return draws.double().mean(0).numpy(), draws.double().std(0).numpy()


def row(name: str, exact: Moments, found: Moments) -> str:
    """Return a line of the table: errors of the means in posterior sds, and ratios of the sds."""
    error, ratio = np.abs(found[0] - exact[0]) / exact[1], found[1] / exact[1]
    spread = f"{ratio.mean():10.3f}{ratio.min():10.3f}{ratio.max():10.3f}"
    return f"{name:20}{error.mean():12.3f}{error.max():10.3f}{spread}"


def draw(results: dict[str, Any]) -> plt.Figure:
    """Plot fitted against exact means and sds of the effects, and the shrinkage of groups towards the common mean."""
    figure, (means, sds, shrinkage) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    styles = {"groups fitted": ("#0072B2", "."), "groups never seen": ("#D55E00", "x")}
    for name, (groups, exact, found) in results.items():
        colour, marker = styles[name]
        for panel, i in ((means, 0), (sds, 1)):
            panel.plot(exact[i], found[i], marker, color=colour, ms=5, alpha=0.7, label=name)
        _, y, error = groups
        ends = zip(y.tolist(), found[0], error.tolist(), strict=True)
        for start, end, size in ends if name == "groups never seen" else ():
            shrinkage.plot([start, end], [size, size], color="0.7", lw=0.8, zorder=0)
    groups, exact, found = results["groups never seen"]
    error = groups[2].numpy()
    shrinkage.plot(groups[1].numpy(), error, "|", color="black", label="reported mean $y$")
    shrinkage.plot(exact[0], error, "o", mfc="none", color="black", ms=6, label="exact")
    shrinkage.plot(found[0], error, "x", color="#D55E00", ms=4, label="fit")
    shrinkage.axvline(MU, color="#009E73", ls="--", lw=1, label="true mean of all groups")
    for panel, name, at in ((means, "mean", MU), (sds, "sd", 0.3)):
        panel.axline((at, at), slope=1, color="black", lw=0.8)
        panel.set_xlabel(f"exact posterior {name} of an effect (unit of $y$)")
        panel.set_ylabel(f"fitted posterior {name} (unit of $y$)")
    means.legend(frameon=False)
    shrinkage.set_yscale("log")
    shrinkage.set_yticks([0.2, 0.5, 1.0], ["0.2", "0.5", "1"])
    shrinkage.minorticks_off()
    shrinkage.set_xlabel("effect of a group never seen (unit of $y$)")
    shrinkage.set_ylabel("standard error of its mean (unit of $y$)")
    shrinkage.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    pyro.set_rng_seed(options.seed)
    results = compare(sizes, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(options.output / "amortized_local.png", dpi=150)
    print(f"\namortized_local.png is in {options.output}/")


if __name__ == "__main__":
    main()
