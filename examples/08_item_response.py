"""
Item response theory
====================

Estimate two traits of a thousand persons from their graded answers to twenty items.

Loadings and thresholds are fitted by marginal maximum likelihood, together with an implicit posterior of every person's
traits, with and without importance weights.

In the graded response model the probability of an answer above category ``k`` is ``sigmoid(a · t - b_k)``. The traits
``t`` of a person are latent; the loadings ``a`` and thresholds ``b`` of an item are `pyro.param`. Luo and Ji (2025) fit
it by importance-weighted adversarial variational Bayes, for more traits than quadrature can integrate over. This page
uses two traits, so that quadrature on a grid gives the exact maximum.

The data determine the traits only up to rotation and reflection. Before comparing a solution with the truth, we rotate
it onto the true loadings by orthogonal Procrustes.

References:
    Generative Adversarial Networks for High-Dimensional Item Factor Analysis: A Deep Adversarial Learning Algorithm,
    Nanyu Luo, Feng Ji, 2025.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints, transforms
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from implicitvi import AVBSVI, ImplicitGuide, plots

torch.set_num_threads(1)  # the networks are small: a second thread would slow them down

ITEMS, TRAITS, CATEGORIES = 20, 2, 4


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run."""

    # The defaults of `AVBSVI`, but fewer steps than 2,500: two such fits would take four minutes.
    avb: dict[str, Any] = field(default_factory=lambda: {"num_steps": 1500})
    persons: int = 1000
    batch: int = 100
    draws: int = 2000


SMOKE = Sizes(avb={"num_steps": 8, "warm_start": 10}, persons=200, batch=20, draws=50)


def probabilities(traits: Tensor, loadings: Tensor, thresholds: Tensor) -> Tensor:
    """Return probabilities ``[..., items, categories]`` for persons with traits ``[..., traits]``."""
    above = ((traits @ loadings.T)[..., None] - thresholds).sigmoid()
    one = torch.ones_like(above[..., :1])
    return torch.cat([one, above], -1) - torch.cat([above, 0 * one], -1)


def start() -> tuple[Tensor, Tensor]:
    """Return the starting loadings and thresholds of all fits; equal loadings would be a saddle point."""
    loadings = 0.3 * torch.randn(ITEMS, TRAITS, generator=torch.Generator().manual_seed(1))
    return loadings, torch.tensor([-1.0, 0.0, 1.0]).expand(ITEMS, -1).clone()


def model(answers: Tensor, batch: int | None = None) -> None:
    loadings = pyro.param("loadings", lambda: start()[0])
    thresholds = pyro.param("thresholds", lambda: start()[1], constraint=constraints.ordered_vector)
    with pyro.plate("persons", len(answers), subsample_size=batch) as rows:
        traits = pyro.sample("traits", dist.Normal(0.0, 1.0).expand([TRAITS]).to_event(1))
        chances = probabilities(traits, loadings, thresholds)
        pyro.sample("answers", dist.Categorical(chances).to_event(1), obs=answers[rows])


@dataclass(frozen=True)
class Solution:
    """The parameters of the items, ``[20, 2]`` and ``[20, 3]``, and the mean traits of the persons ``[N, 2]``."""

    loadings: Tensor
    thresholds: Tensor
    traits: Tensor
    draws: Tensor | None = None
    seconds: float = 0.0

    def turned(self, truth: Solution) -> Solution:
        """Return the solution rotated and reflected onto the true loadings."""
        rotation, _ = orthogonal_procrustes(self.loadings.numpy(), truth.loadings.numpy())
        turn = torch.tensor(rotation, dtype=torch.float32)
        draws = None if self.draws is None else self.draws @ turn
        return Solution(self.loadings @ turn, self.thresholds, self.traits @ turn, draws, self.seconds)


def generate(persons: int, seed: int) -> tuple[Tensor, Solution]:
    """Return answers ``[N, 20]`` and the truth; each item loads on one trait, and a little on the other."""
    generator = torch.Generator().manual_seed(seed)
    own = 0.8 + 1.4 * torch.rand(ITEMS, generator=generator)
    loadings = 0.2 * torch.randn(ITEMS, TRAITS, generator=generator)
    loadings[torch.arange(ITEMS), torch.arange(ITEMS) // (ITEMS // TRAITS)] = own
    middle = torch.randn(ITEMS, 1, generator=generator)
    thresholds = middle + torch.tensor([-1.3, 0.0, 1.3])
    traits = torch.randn(persons, TRAITS, generator=generator)
    chances = probabilities(traits, loadings, thresholds).flatten(0, 1)
    answers = torch.multinomial(chances, 1, generator=generator).view(persons, ITEMS)
    return answers, Solution(loadings, thresholds, traits)


class Quadrature:
    """The traits summed out on a grid, exact up to rounding."""

    def __init__(self, answers: Tensor):
        self.axis = torch.linspace(-5.5, 5.5, 37)
        self.grid = torch.cartesian_prod(self.axis, self.axis)
        self.log_prior = -self.grid.square().sum(-1) / 2
        self.log_prior -= self.log_prior.logsumexp(0)
        self.chosen = torch.nn.functional.one_hot(answers, CATEGORIES).flatten(1).float()

    def log_joint(self, loadings: Tensor, thresholds: Tensor) -> Tensor:
        """Return the log joint of every person's answers and each point of the grid, in nats: ``[N, Q]``."""
        logs = probabilities(self.grid, loadings, thresholds).clamp(min=1e-12).log()
        return self.chosen @ logs.flatten(1).T + self.log_prior

    def log_posterior(self, person: int, traits: Tensor, at: Solution) -> Tensor:
        """Return the log posterior of one person's traits ``[..., 2]`` up to a constant, in nats: ``[...]``."""
        logs = probabilities(traits, at.loadings, at.thresholds).clamp(min=1e-12).log()
        return logs.flatten(-2) @ self.chosen[person] - traits.square().sum(-1) / 2

    def log_evidence(self, at: Solution) -> float:
        """Return the log marginal likelihood of all answers, in nats."""
        return self.log_joint(at.loadings, at.thresholds).logsumexp(-1).double().sum().item()

    def moments(self, loadings: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """Return posterior means and sds of all persons' traits, each ``[N, 2]``."""
        weights = self.log_joint(loadings, thresholds).softmax(-1)
        means = weights @ self.grid
        return means, (weights @ self.grid.square() - means.square()).sqrt()

    def maximum(self) -> Solution:
        """Return the items' parameters at the maximum of the marginal likelihood."""
        began = time.perf_counter()
        order = transforms.OrderedTransform()
        loadings, thresholds = start()
        free = [loadings.requires_grad_(), order.inv(thresholds).requires_grad_()]
        optimiser = torch.optim.LBFGS(free, max_iter=300, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = -self.log_joint(free[0], order(free[1])).logsumexp(-1).mean()
            loss.backward()
            return loss

        optimiser.step(closure)
        items = free[0].detach(), order(free[1]).detach()
        return Solution(*items, self.moments(*items)[0], seconds=time.perf_counter() - began)


def fit(answers: Tensor, num_importance: int, sizes: Sizes, seed: int) -> Solution:
    """Fit the items' parameters and draw all persons' traits by adversarial variational Bayes."""
    pyro.clear_param_store()
    guide = ImplicitGuide(model, amortize={"persons": lambda answers, batch=None: answers.float()})
    svi = AVBSVI(model, guide, num_importance=num_importance, seed=seed, progress=False, **sizes.avb)
    done = svi.run(answers, batch=sizes.batch)
    draws = guide.sample(sizes.draws, answers)["traits"]
    items = done.parameters["loadings"], done.parameters["thresholds"]
    return Solution(*items, draws.mean(0), draws, done.seconds)


HEADER = (
    f"{'method':12}{'seconds':>9}{'nats short':>12}{'loadings':>10}{'correl.':>9}{'thresholds':>12}"
    f"{'from exact':>12}{'traits':>9}{'off (sd)':>10}"
)


def row(name: str, found: Solution, exact: Solution, truth: Solution, grid: Quadrature) -> str:
    """Return a line of the table; solutions are rotated onto the truth, except in the last column."""
    turned, best = found.turned(truth), exact.turned(truth)
    short = grid.log_evidence(exact) - grid.log_evidence(found)
    items = (
        rmse(turned.loadings, truth.loadings),
        correlation(turned.loadings, truth.loadings),
        rmse(turned.thresholds, truth.thresholds),
        rmse(turned.loadings, best.loadings),
    )
    means, sds = grid.moments(found.loadings, found.thresholds)
    off = ((found.traits - means) / sds).abs().mean()
    return (
        f"{name:12}{found.seconds:9.1f}{short:12.2f}{items[0]:10.3f}{items[1]:9.3f}{items[2]:12.3f}"
        f"{items[3]:12.3f}{correlation(turned.traits, truth.traits):9.3f}{off:10.3f}"
    )


def rmse(found: Tensor, truth: Tensor) -> float:
    return (found - truth).square().mean().sqrt().item()


def correlation(found: Tensor, truth: Tensor) -> float:
    """Return the mean correlation of corresponding columns."""
    pairs = zip(found.T, truth.T, strict=True)
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean().item()


def compare(sizes: Sizes, seed: int) -> tuple[dict[str, Solution], Solution, Quadrature]:
    """Solve by all methods, print the table and return the solutions by name, the truth and the grid."""
    answers, truth = generate(sizes.persons, seed)
    grid = Quadrature(answers)
    exact = grid.maximum()
    solutions = {"exact": exact}
    print(HEADER, flush=True)
    print(row("exact", exact, exact, truth, grid), flush=True)
    for num_importance in (1, 5):
        name = f"AVB, K = {num_importance}"
        solutions[name] = fit(answers, num_importance, sizes, seed)
        print(row(name, solutions[name], exact, truth, grid), flush=True)
    return solutions, truth, grid


COLOURS = {"exact": "black", "AVB, K = 1": "#0072B2", "AVB, K = 5": "#D55E00"}


def draw(solutions: dict[str, Solution], truth: Solution, grid: Quadrature) -> plt.Figure:
    """Plot loadings and thresholds against the truth, and draws of one person's traits over the exact density."""
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    marks = {"exact": ("o", 7), "AVB, K = 1": ("+", 6), "AVB, K = 5": ("x", 4)}
    for name, solution in solutions.items():
        turned = solution.turned(truth)
        style = {"ls": "", "marker": marks[name][0], "ms": marks[name][1], "mfc": "none"}
        for panel, what in zip(panels, ("loadings", "thresholds"), strict=False):
            x, y = getattr(truth, what).flatten(), getattr(turned, what).flatten()
            panel.plot(x, y, color=COLOURS[name], label=name, **style)
            panel.set_xlabel(f"true {what} (logits{' per sd of the trait' * (what == 'loadings')})")
            panel.set_ylabel(f"estimated {what}")
    for panel in panels[:2]:
        panel.axline((0, 0), slope=1, color="0.6", lw=0.8, zorder=0)
    panels[0].legend(frameon=False)
    person = int(truth.traits.sum(-1).argmax())
    best = solutions["AVB, K = 5"]
    panel, draws = panels[2], best.draws
    assert draws is not None
    plots.draws_on_density(
        draws[:, person],
        lambda z: grid.log_posterior(person, z, best),
        extent=(-0.5, 5.5, -4.0, 2.0),
        num_draws=1000,
        color=COLOURS["AVB, K = 5"],
        ax=panel,
    )
    panel.set_xlabel("first trait (sd)")
    panel.set_ylabel("second trait (sd)")
    panel.set_title("one person's traits; truth for the same items", fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    pyro.set_rng_seed(options.seed)
    solutions, truth, grid = compare(sizes, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(solutions, truth, grid).savefig(options.output / "item_response.png", dpi=150)
    print(f"\nitem_response.png is in {options.output}/")


if __name__ == "__main__":
    main()
