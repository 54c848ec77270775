"""
Eight Schools
=============

Two mirrored modes in ten dimensions: an implicit posterior finds both, Gaussian guides cannot.

Every method is compared with exact draws.

The model is from section 5.1 of *Adversarial Variational Bayes* (Mescheder, Nowozin and Geiger, 2017). Its scale
``tau`` may be negative, so the posterior is symmetric under ``(tau, eta) → (-tau, -eta)``. ``KL(q‖p)`` and ``KL(p‖q)``
are estimated from draws of each method and equally many exact draws. The true ``P(tau > 0)`` is 0.5. The accuracy of a
classifier that tries to tell fitted from exact draws (C2ST) is 0.5 at best. The row ``floor`` compares exact draws with
other exact draws. By default the script also runs the paper's own settings, which takes four more minutes; this page
omits that row (``--paper none``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor
from torch.distributions import Normal

from implicitvi import AVBSVI, ImplicitGuide, plots
from implicitvi.avb.adversaries import ResidualAdversary
from implicitvi.datasets import eight_schools
from implicitvi.metrics import c2st, knn_kl

# All networks here are small: a second thread would slow them down. Every method uses one.
torch.set_num_threads(1)

SCHOOLS = eight_schools()

# The settings of the paper, with a smaller adversary: two residual blocks of 128 units; five of 256 take an hour here.
# All 10,000 steps are needed for a fair comparison, because `KL(q‖p)` exceeds 10 nats on the way.
PAPER: dict[str, Any] = {
    "averaging": 0,
    "warm_start": 0,
    "lr": 1e-4,
    "adversary_lr": 2e-4,
    "num_particles": 512,
    "adversary_steps": 2,
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run."""

    avb: dict[str, Any] = field(default_factory=dict)  # empty: the defaults of `AVBSVI`
    paper_steps: int = 10_000
    paper_width: int = 128
    svi_steps: int = 4_000
    nuts_warmup: int = 500
    nuts_draws: int = 2_000
    draws: int = 20_000
    c2st_draws: int = 5_000
    curve_draws: int = 5_000
    curve_points: int = 40
    grid: int = 200


# A tiny run, to check that the script works.
SMOKE = Sizes(
    avb={"num_steps": 8, "warm_start": 10},
    paper_steps=8,
    svi_steps=5,
    nuts_warmup=10,
    nuts_draws=30,
    draws=200,
    c2st_draws=50,
    curve_draws=100,
    curve_points=4,
    grid=20,
)


@dataclass(frozen=True)
class Result:
    """The draws ``[S, 10]`` of one method, their cost, and optionally ``KL(q‖p)`` over time."""

    draws: Tensor
    seconds: float
    curve: tuple[list[float], list[float]] | None = None


class Watch:
    """A callback that records ``KL(q‖p)`` over the seconds of a fit, without the seconds that it takes itself."""

    def __init__(self, guide: ImplicitGuide, exact: Tensor, *, every: int):
        self.guide = guide
        self.exact = exact
        self.every = every
        self.curve: tuple[list[float], list[float]] = ([], [])
        self.own_seconds = 0.0
        self.began = time.perf_counter()

    def __call__(self, trainer: Any) -> None:
        if trainer.step_count % self.every:
            return
        now = time.perf_counter()
        seconds, divergence = self.curve
        seconds.append(now - self.began - self.own_seconds)
        divergence.append(knn_kl(flat(self.guide.sample(len(self.exact))), self.exact))
        self.own_seconds += time.perf_counter() - now


def flat(draws: dict[str, Tensor]) -> Tensor:
    """Join ``{site: [S, ...]}`` into ``[S, 10]``: mu, tau, and the eight eta."""
    sites = [draws[name].detach() for name in ("mu", "tau", "eta")]
    return torch.cat([site.reshape(len(site), -1) for site in sites], dim=1)


def avb(sizes: Sizes, seed: int, *, sampler: str = "gated", **options: Any) -> Result:
    """Run adversarial variational Bayes, without options by the defaults."""
    guide = ImplicitGuide(SCHOOLS.model, sampler=sampler)
    fit = AVBSVI(SCHOOLS.model, guide, seed=seed, progress=False, **options)
    watch = Watch(
        guide, flat(SCHOOLS.exact_draws(sizes.curve_draws)), every=max(1, fit.schedule.num_steps // sizes.curve_points)
    )
    fit.callbacks = (watch,)
    seconds = fit.run(SCHOOLS.sigma, SCHOOLS.y).seconds - watch.own_seconds
    return Result(flat(guide.sample(sizes.draws)), seconds, watch.curve)


def autoguide(sizes: Sizes, guide: Callable[..., Any], *, lr: float) -> Result:
    """Run one of Pyro's guides with Pyro's SVI; the learning rate falls to a hundredth."""
    pyro.clear_param_store()
    optim = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.01 ** (1 / sizes.svi_steps)})
    loss = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    began = time.perf_counter()
    svi = SVI(SCHOOLS.model, guide, optim, loss)
    for _ in range(sizes.svi_steps):
        svi.step(SCHOOLS.sigma, SCHOOLS.y)
    seconds = time.perf_counter() - began
    with torch.no_grad(), pyro.plate("draws", sizes.draws, dim=-2):
        return Result(flat(guide(SCHOOLS.sigma, SCHOOLS.y)), seconds)


def nuts(sizes: Sizes) -> Result:
    """Run one chain of Pyro's NUTS."""
    began = time.perf_counter()
    mcmc = MCMC(
        NUTS(SCHOOLS.model, jit_compile=False),
        num_samples=sizes.nuts_draws,
        warmup_steps=sizes.nuts_warmup,
        disable_progbar=True,
    )
    mcmc.run(SCHOOLS.sigma, SCHOOLS.y)
    draws = flat(mcmc.get_samples())
    seconds = time.perf_counter() - began
    return Result(draws[torch.randperm(len(draws))], seconds)  # C2ST needs a random order


def paper(sizes: Sizes, seed: int, *, contrast: str) -> Result:
    """Run adversarial variational Bayes with the paper's settings."""
    return avb(
        sizes,
        seed,
        sampler="dense",  # two hidden layers of 128 ELU units, one noise input for each latent
        contrast=contrast,
        adversary=lambda dim: ResidualAdversary(dim, width=sizes.paper_width, blocks=2),
        num_steps=sizes.paper_steps,
        **PAPER,
    )


def methods(sizes: Sizes, seed: int, *, papers: int) -> dict[str, Callable[[], Result]]:
    """Return the methods by name, with the first ``papers`` of the two that use the paper's settings."""
    model = SCHOOLS.model
    cost = f"{sizes.paper_steps:,} steps, width {sizes.paper_width}"
    of_paper: dict[str, Callable[[], Result]] = {
        f"AVB, paper ({cost})": lambda: paper(sizes, seed, contrast="prior"),
        f"AVB + AC, paper ({cost})": lambda: paper(sizes, seed, contrast="diagonal"),
    }
    return {
        "AVB + AC (defaults)": lambda: avb(sizes, seed, **sizes.avb),
        **dict(list(of_paper.items())[:papers]),
        # the Gaussians need the higher rate to converge
        "AutoNormal": lambda: autoguide(sizes, AutoNormal(model), lr=1e-2),
        "AutoMultivariateNormal": lambda: autoguide(sizes, AutoMultivariateNormal(model), lr=1e-2),
        "AutoIAFNormal": lambda: autoguide(sizes, AutoIAFNormal(model, hidden_dim=[64, 64], num_transforms=4), lr=2e-3),
        "NUTS": lambda: nuts(sizes),
    }


def row(name: str, result: Result, exact: Tensor, sizes: Sizes) -> tuple[str, float]:
    """Return the table's line for one method and its ``KL(q‖p)``: its draws against equally many exact draws."""
    q, p = result.draws, exact[: len(result.draws)]
    forward, backward = knn_kl(q, p), knn_kl(p, q)
    share = (q[:, 1] > 0).double().mean().item()
    accuracy = c2st(q[: sizes.c2st_draws], p[: sizes.c2st_draws])
    numbers = f"{forward:10.3f}{backward:10.3f}{share:12.3f}{accuracy:8.3f}"
    return f"{name:40}{result.seconds:9.1f}{len(q):9,}{numbers}", forward


HEADER = f"{'method':40}{'seconds':>9}{'draws':>9}{'KL(q||p)':>10}{'KL(p||q)':>10}{'P(tau > 0)':>12}{'C2ST':>8}"


def compare(sizes: Sizes, seed: int, *, papers: int) -> tuple[dict[str, Result], dict[str, float]]:
    """Run every method, print the table and return the results and each ``KL(q‖p)``, by name."""
    exact = flat(SCHOOLS.exact_draws(sizes.draws))
    print(f"log p(y) = {SCHOOLS.log_evidence():.4f} nats, exactly\n\n{HEADER}", flush=True)
    results, divergences = {}, {}
    for name, run in methods(sizes, seed, papers=papers).items():
        pyro.set_rng_seed(seed)
        results[name] = run()
        line, divergences[name] = row(name, results[name], exact, sizes)
        print(line, flush=True)
    results["floor"] = Result(flat(SCHOOLS.exact_draws(sizes.draws)), 0.0)
    line, divergences["floor"] = row("floor", results["floor"], exact, sizes)
    print(line)
    return results, divergences


def log_marginal(z: Tensor) -> Tensor:
    """Return ``log p(tau, mu | y)`` up to a constant, ``[..., 2]`` to ``[...]``, with ``eta`` integrated out."""
    tau, mu = z[..., :1], z[..., 1:]
    sd = (SCHOOLS.sigma.square() + tau.square()).sqrt()
    return Normal(mu, sd).log_prob(SCHOOLS.y).sum(-1) + Normal(0.0, 1.0).log_prob(z).sum(-1)


def draw_densities(results: dict[str, Result], sizes: Sizes) -> plt.Figure:
    """Plot draws of spread and mean effect from three guides and the truth, over contours of the truth."""
    panels = {
        "mean-field Gaussian\nAutoNormal": ("AutoNormal", plots.VERMILION),
        "autoregressive flow\nAutoIAFNormal": ("AutoIAFNormal", plots.GREEN),
        "implicit posterior\nImplicitGuide": ("AVB + AC (defaults)", plots.BLUE),
        "truth\nexact draws": ("floor", "0.25"),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.6), sharex=True, sharey=True, layout="constrained")
    for ax, (title, (name, colour)) in zip(axes, panels.items(), strict=True):
        plots.draws_on_density(
            results[name].draws[:, [1, 0]],
            log_marginal,
            extent=(-2.1, 2.1, -0.5, 2.1),
            grid=sizes.grid,
            num_draws=4000,
            legend=False,
            color=colour,
            ax=ax,
        )
        ax.set(xlabel=r"spread $\tau$ (10 points)", ylabel="", title=title)
    axes[0].set_ylabel(r"mean effect $\mu$ (10 points)")
    return figure


def draw_curves(results: dict[str, Result], divergences: dict[str, float]) -> plt.Figure:
    """Plot ``KL(q‖p)`` over the seconds of the AVB fits, with the final values of the other methods."""
    figure, panel = plt.subplots(figsize=(10, 5), layout="constrained")
    colours = ["#0072B2", "#D55E00", "#009E73"]  # colour-blind readers can distinguish them
    watched = {name: result.curve for name, result in results.items() if result.curve is not None}
    for colour, (name, curve) in zip(colours, watched.items(), strict=False):
        panel.plot(*curve, color=colour, label=name)
    levels = {"AutoNormal": ":", "AutoMultivariateNormal": "-.", "AutoIAFNormal": "--", "floor": "-"}
    for name, style in levels.items():
        panel.axhline(divergences[name], color="0.4", lw=1, ls=style, label=name, zorder=0)
    panel.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    panel.set_yticks(ticks := [0, 0.1, 0.2, 0.5, 1, 2, 5, 10], [f"{tick:g}" for tick in ticks])
    panel.set_ylim(bottom=-0.06)
    panel.minorticks_off()
    panel.set_xlim(left=0)
    panel.set_xlabel("seconds of fitting")
    panel.set_ylabel(r"$\mathrm{KL}(q\,\|\,p)$ in nats (linear below 0.1)")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--paper",
        choices=["none", "plain", "both"],
        default="plain",
        help="also run the paper's settings, without adaptive contrast, or with and without: minutes each",
    )
    options = parser.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    pyro.set_rng_seed(options.seed)
    papers = ["none", "plain", "both"].index(options.paper)
    results, divergences = compare(sizes, options.seed, papers=papers)
    options.output.mkdir(parents=True, exist_ok=True)
    draw_densities(results, sizes).savefig(options.output / "eight_schools.png", dpi=160)
    draw_curves(results, divergences).savefig(options.output / "eight_schools_kl.png", dpi=150)
    print(f"\neight_schools.png and eight_schools_kl.png are in {options.output}/")


if __name__ == "__main__":
    main()
