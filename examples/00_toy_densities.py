"""
Toy densities
=============

Fit five non-Gaussian densities in two dimensions: a ring, two bent valleys, two modes and a cross.

Each fit uses the defaults, with fewer steps, and is compared with exact draws.

``KL(q‖p)`` and ``KL(p‖q)`` are estimated from draws of the fit and equally many exact draws. The column ``floor``
shows the score of exact draws against other exact draws.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from torch import Tensor

from implicitvi import AVBSVI, ImplicitGuide, plots
from implicitvi.datasets import ToyDensity, toy_densities
from implicitvi.metrics import knn_kl

torch.set_num_threads(1)  # the networks are small: a second thread would slow them down


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run."""

    # The defaults of `AVBSVI`, but fewer steps than 2,500: the plane is small, and five such fits take four minutes.
    avb: dict[str, Any] = field(default_factory=lambda: {"num_steps": 1000})
    draws: int = 20_000
    shown: int = 4_000
    grid: int = 200


SMOKE = Sizes(avb={"num_steps": 8, "warm_start": 10}, draws=200, shown=200, grid=20)


def fit(density: ToyDensity, sizes: Sizes, seed: int) -> tuple[Tensor, float]:
    """Return draws ``[S, 2]`` of the fitted posterior, and the seconds of the fit."""
    guide = ImplicitGuide(density.model)
    svi = AVBSVI(density.model, guide, seed=seed, progress=False, **sizes.avb)
    seconds = svi.run().seconds
    return guide.sample(sizes.draws)["z"], seconds


def compare(sizes: Sizes, seed: int) -> dict[str, Tensor]:
    """Fit every density, print the table and return the draws by name."""
    print(f"{'density':14}{'seconds':>9}{'KL(q||p)':>10}{'KL(p||q)':>10}{'floor':>8}", flush=True)
    fitted = {}
    for name, density in toy_densities().items():
        draws, seconds = fit(density, sizes, seed)
        exact, other = density.sample(sizes.draws), density.sample(sizes.draws)
        numbers = f"{knn_kl(draws, exact):10.3f}{knn_kl(exact, draws):10.3f}{knn_kl(other, exact):8.3f}"
        print(f"{name:14}{seconds:9.1f}{numbers}", flush=True)
        fitted[name] = draws
    return fitted


def true_density(density: ToyDensity, sizes: Sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the density on a grid of its window, for a contour plot."""
    left, right, bottom, top = density.extent
    x, y = torch.linspace(left, right, sizes.grid), torch.linspace(bottom, top, sizes.grid)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    height = (density.log_prob(grid) - density.log_normaliser()).exp()
    return x.numpy(), y.numpy(), height.numpy()


def draw(fitted: dict[str, Tensor], sizes: Sizes) -> plt.Figure:
    """Plot each density, and below it the draws of its fit over its contours."""
    figure, axes = plt.subplots(2, len(fitted), figsize=(13, 5.4), sharex="col", sharey="col", layout="constrained")
    for (above, below), (name, draws) in zip(axes.T, fitted.items(), strict=True):
        density = toy_densities()[name]
        x, y, height = true_density(density, sizes)
        above.contourf(x, y, height, 12, cmap="viridis")
        above.set_title(name.replace("_", "-"))
        plots.draws_on_density(
            draws,
            density.log_prob,
            extent=density.extent,
            grid=sizes.grid,
            num_draws=sizes.shown,
            legend=False,
            ax=below,
        )
        below.set_ylabel("")
        for panel in (above, below):
            panel.set_box_aspect(1)
            panel.locator_params(nbins=5)
    figure.legend(*below.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
    axes[0, 0].set_ylabel("density\n$z_2$")
    axes[1, 0].set_ylabel("draws of the fit\n$z_2$")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    pyro.set_rng_seed(options.seed)
    fitted = compare(sizes, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(fitted, sizes).savefig(options.output / "toy_densities.png", dpi=150)
    print(f"\ntoy_densities.png is in {options.output}/")


if __name__ == "__main__":
    main()
