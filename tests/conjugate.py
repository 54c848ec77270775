"""How exact the defaults are where the posterior is known: `make conjugate` runs this and writes ``docs/results``.

Five conjugate models, a hierarchy amortized over its groups, and a model amortized over datasets, each fitted
with ``AVBSVI(model, ImplicitGuide(model), seed=seed)`` and nothing else. The same figures judge the Gaussians that
training starts from, which says what it adds, and as many exact draws: no fit can be seen to be better than those.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from implicitvi import AVBSVI, ImplicitGuide
from implicitvi.diagnostics.sbc import band_share

OUTPUT = Path(__file__).parents[1] / "docs" / "results" / "conjugate.json"
DRAWS = 200_000  # a standard error of 0.0022 sd in a mean, and of 0.16 % in the sd of a Gaussian
GROUP_DRAWS = 20_000  # of every group: 0.0071 sd, and 0.5 %
RANKED = 99  # draws behind each rank: 100 ranks
Row = dict[str, Any]
Figures = dict[str, float]

MEAN, SD = "worst error of a mean (sd)", "worst error of an sd"
LOCAL_MEAN, LOCAL_SD = "mean error of a group's mean (sd)", "worst error of a group's sd"
BAND = "ECDF of ranks: {} (of the 95 % band)"
QUANTITIES = ("first", "second", "product", "log likelihood")
TARGETS = {
    MEAN: 0.05,
    SD: 0.05,
    LOCAL_MEAN: 0.1,
    LOCAL_SD: 0.1,
    **{BAND.format(quantity): 1.0 for quantity in QUANTITIES},
}


@dataclass(frozen=True)
class Conjugate:
    """A model of one latent site ``z``, its data, and the exact posterior of ``z``."""

    model: Callable[..., Any]
    args: tuple[Tensor, ...]
    posterior: dist.TorchDistribution


def normal(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(z, 2.0), obs=y)


def binomial(y: Tensor) -> None:
    z = pyro.sample("z", dist.Beta(1.0, 1.0))
    pyro.sample("obs", dist.Binomial(20, z), obs=y)


def poisson(y: Tensor) -> None:
    z = pyro.sample("z", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Poisson(z), obs=y)


def regression(x: Tensor, y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(x @ z, 1.0), obs=y)


def multinomial(y: Tensor) -> None:
    z = pyro.sample("z", dist.Dirichlet(torch.ones(len(y))))
    pyro.sample("obs", dist.Multinomial(probs=z, total_count=int(y.sum())), obs=y)


def conjugates() -> dict[str, Conjugate]:
    """The models that conjugacy solves, with data small enough to leave the posteriors skewed."""
    generator = torch.Generator().manual_seed(1)
    y = 1 + 2 * torch.randn(10, generator=generator)
    precision = len(y) / 4 + 1 / 9
    counts = torch.tensor([0.0, 3.0, 1.0, 0.0, 2.0])
    categories = torch.tensor([12.0, 7.0, 4.0, 2.0, 0.0])
    x = torch.randn(50, 10, generator=generator)
    response = x @ torch.randn(10, generator=generator) + torch.randn(50, generator=generator)
    root = torch.linalg.cholesky(torch.eye(10).double() + x.double().mT @ x.double())
    place = torch.cholesky_solve(x.double().mT @ response.double()[:, None], root)[:, 0]
    return {
        "normal–normal": Conjugate(normal, (y,), dist.Normal(y.double().sum() / 4 / precision, precision**-0.5)),
        "beta–binomial": Conjugate(binomial, (torch.tensor(3.0),), dist.Beta(double(4.0), double(18.0))),
        "gamma–Poisson": Conjugate(poisson, (counts,), dist.Gamma(double(8.0), double(6.0))),
        "linear regression, 10-D": Conjugate(
            regression, (x, response), dist.MultivariateNormal(place, covariance_matrix=torch.cholesky_inverse(root))
        ),
        "Dirichlet–multinomial, 5 categories": Conjugate(
            multinomial, (categories,), dist.Dirichlet(1 + categories.double())
        ),
    }


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def measure(
    judge: Callable[[ImplicitGuide], Figures], model: Callable[..., Any], *args: Any, seed: int, amortize: Any = None
) -> Row:
    """Seconds and figures of a fit, everything by default, and the figures of its warm start."""

    def judged() -> Figures:
        torch.manual_seed(seed)
        return judge(guide)

    torch.manual_seed(seed)
    guide = ImplicitGuide(model, amortize=amortize)
    svi = AVBSVI(model, guide, seed=seed, progress=False)
    began = time.perf_counter()
    svi.setup(*args)
    seconds = time.perf_counter() - began
    start = judged()
    seconds += svi.run(*args).seconds  # on random numbers of its own: looking has not changed it
    return {"seconds": seconds, "figures": judged(), "start": start}


def draw(guide: ImplicitGuide, count: int, *args: Any, chunk: int = 20_000) -> dict[str, Tensor]:
    """``{site: [count, ...]}`` in float64, a chunk at a time."""
    parts = [guide.sample(min(chunk, count - i), *args) for i in range(0, count, chunk)]
    return {name: torch.cat([part[name] for part in parts]).double() for name in parts[0]}


def errors(draws: Tensor, mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """Error of each mean in standard deviations, and ratio of each standard deviation less 1."""
    return (draws.mean(0) - mean) / sd, draws.std(0) / sd - 1


def conjugate(name: str, seed: int) -> Row:
    """One conjugate model."""
    case = conjugates()[name]

    def judge(draws: Tensor) -> Figures:
        place, scale = errors(draws, case.posterior.mean, case.posterior.variance.sqrt())
        return {MEAN: place.abs().max().item(), SD: scale.abs().max().item()}

    row = measure(lambda g: judge(draw(g, DRAWS)["z"]), case.model, *case.args, seed=seed)
    return {**row, "exact": judge(case.posterior.sample((DRAWS,)))}


def hierarchy(y: Tensor) -> None:
    """Means of 4 observations in each group, at most 100 groups a step."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    log_tau = pyro.sample("log_tau", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", len(y), subsample_size=min(len(y), 100)) as i:
        theta = pyro.sample("theta", dist.Normal(mu, log_tau.exp()))
        pyro.sample("obs", dist.Normal(theta, 0.5), obs=y[i])


class ExactHierarchy:
    """The posterior of `hierarchy` given ``y [N]``: a grid over ``log τ``, Gaussian in all else."""

    def __init__(self, y: Tensor):
        y = y.double()
        self.log_tau = torch.linspace(-3, 2, 5001, dtype=torch.float64)
        spread = self.log_tau.exp().square() + 0.25
        self.precision = len(y) / spread + 1 / 25
        self.mu = y.sum() / spread / self.precision
        log_weights = -0.5 * (
            len(y) * spread.log()
            + y.square().sum() / spread
            - self.mu.square() * self.precision
            + self.precision.log()
            + self.log_tau.square()
        )
        self.weights = log_weights.softmax(0)
        self.shrink = self.log_tau.exp().square() / spread  # weight of a group's own mean

    def moments(self, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a mixture over the grid, ``[5001]`` or ``[5001, N]``."""
        weights = self.weights.reshape(-1, *[1] * (means.dim() - 1))
        mean = (weights * means).sum(0)
        variance = (weights * (variances + (means - mean).square())).sum(0)
        return mean, variance.sqrt()

    def shared(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation of each shared latent."""
        return {
            "mu": self.moments(self.mu, 1 / self.precision),
            "log_tau": self.moments(self.log_tau, torch.zeros_like(self.log_tau)),
        }

    def local(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent of groups, ``y [M]``: ``[M]``."""
        k = self.shrink[:, None]
        variances = self.shrink * 0.25 + (1 - self.shrink).square() / self.precision
        return self.moments(k * y.double() + (1 - k) * self.mu[:, None], variances[:, None])

    def sample(self, count: int, y: Tensor) -> dict[str, Tensor]:
        """Exact draws of the shared latents and of those of groups."""
        i = torch.multinomial(self.weights, count, replacement=True)
        mu = self.mu[i] + self.precision[i].rsqrt() * torch.randn(count).double()
        k = self.shrink[i, None]
        noise = torch.randn(count, len(y)).double()
        theta = k * y.double() + (1 - k) * mu[:, None] + k.sqrt() * 0.5 * noise
        return {"mu": mu, "log_tau": self.log_tau[i], "theta": theta}


def groups(seed: int) -> Row:
    """A thousand groups, and a hundred that the fit has not seen."""
    generator = torch.Generator().manual_seed(2)
    y = 1.5 + math.sqrt(0.8**2 + 0.25) * torch.randn(1100, generator=generator)
    exact = ExactHierarchy(y[:1000])

    def judge(sample: Callable[[int, Tensor], dict[str, Tensor]]) -> Figures:
        figures = {}
        for which, rows in (("", y[:1000]), (", new groups", y[1000:])):
            draws = sample(GROUP_DRAWS, rows)
            place, scale = errors(draws["theta"], *exact.local(rows))
            figures[LOCAL_MEAN + which] = place.abs().mean().item()
            figures[LOCAL_SD + which] = scale.abs().max().item()
            figures["smallest sd ratio" + which] = 1 + scale.min().item()
            figures["largest sd ratio" + which] = 1 + scale.max().item()
        for name, moments in exact.shared().items():
            place, scale = errors(draws[name], *moments)
            figures[f"error of the mean of {name} (sd)"] = place.item()
            figures[f"sd ratio of {name}"] = 1 + scale.item()
        return figures

    row = measure(
        lambda guide: judge(partial(draw, guide, chunk=500)),
        hierarchy,
        y[:1000],
        seed=seed,
        amortize={"groups": lambda y: y},
    )
    return {**row, "exact": judge(exact.sample)}


NOISE = torch.tensor([[1.0, 0.5], [0.5, 1.0]])


def pair(y: Tensor) -> None:
    """Five observations of two correlated coordinates."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", 5):
        pyro.sample("obs", dist.MultivariateNormal(z, NOISE), obs=y)


def simulate(count: int) -> tuple[Tensor, Tensor]:
    """Latents ``[count, 2]`` and datasets ``[count, 5, 2]`` from the joint distribution of `pair`."""
    z = torch.randn(count, 2)
    noise = dist.MultivariateNormal(torch.zeros(2), NOISE).sample((count, 5))
    return z, z[:, None] + noise


def quantities(z: Tensor, y: Tensor) -> Tensor:
    """What is ranked, for ``z [..., 2]`` and one dataset: `QUANTITIES`, ``[..., 4]``."""
    off = (y.mean(0).double() - z)[..., None, :]
    squared = (off @ NOISE.double().inverse() @ off.mT)[..., 0, 0]
    return torch.stack([z[..., 0], z[..., 1], z.prod(-1), -2.5 * squared], -1)


def rank(truth: Tensor, draws: Tensor, y: Tensor) -> Tensor:
    """How many draws are below the truth, in each of the `QUANTITIES`: ``[4]``."""
    return (quantities(draws, y) < quantities(truth.double(), y)).sum(0)


def pair_posterior(y: Tensor) -> dist.MultivariateNormal:
    """The exact posterior of `pair` given one dataset."""
    precision = NOISE.double().inverse() * len(y)
    covariance = (torch.eye(2).double() + precision).inverse()
    return dist.MultivariateNormal(covariance @ precision @ y.double().mean(0), covariance)


def datasets(seed: int, num_datasets: int = 500) -> Row:
    """Simulation-based calibration of a guide that has learned from 5,000 other datasets.

    The log likelihood is ranked too: the prior would pass every test of the latents alone. ``tests/test_conjugate.py``
    says which faults of a posterior this catches.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration, Sean Talts, Michael Betancourt,
        Daniel Simpson, Aki Vehtari, Andrew Gelman, 2018. Simulation-Based Calibration Checking for Bayesian
        Computation: The Choice of Test Quantities Shapes Sensitivity, Martin Modrák and others, 2023.
    """
    torch.manual_seed(3)
    _, seen = simulate(5000)
    truths, new = simulate(num_datasets)
    posteriors = [pair_posterior(y) for y in new]

    def judge(sample: Callable[[int], Tensor]) -> Figures:
        ranks, places, scales = [], [], []
        for j, (truth, y, posterior) in enumerate(zip(truths, new, posteriors, strict=True)):
            draws = sample(j)
            ranks.append(rank(truth, draws[:RANKED], y))
            place, scale = errors(draws, posterior.mean, posterior.variance.sqrt())
            places.append(place)
            scales.append(scale)
        figures = {
            BAND.format(quantity): band_share(column, RANKED)
            for quantity, column in zip(QUANTITIES, torch.stack(ranks, 1), strict=True)
        }
        figures["mean error of a dataset's mean (sd)"] = torch.stack(places).abs().mean().item()
        figures["mean error of a dataset's sd"] = torch.stack(scales).abs().mean().item()
        return figures

    row = measure(
        lambda guide: judge(lambda j: guide.sample(4000, new[j])["z"].double()),
        pair,
        seen,
        seed=seed,
        amortize=lambda y: y.mean(-2),
    )
    return {**row, "exact": judge(lambda j: posteriors[j].sample((4000,)))}


CHECKS: dict[str, Callable[[int], Row]] = {
    **{name: partial(conjugate, name) for name in conjugates()},
    "hierarchy, amortized over 1,000 groups": groups,
    "2-D Gaussian, amortized over datasets": datasets,
}


def target(figure: str) -> float | None:
    """The target of a figure; those of new groups are those of the others."""
    return TARGETS.get(figure.removesuffix(", new groups"))


def table(result: Row) -> str:
    """The result as a Markdown table: medians over the seeds, with the range; a target is met by the worst of them."""
    head = ["model", "figure", "fit", "its Gaussian start", "exact draws", "target", "", "seeds", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    checks: dict[str, list[Row]] = {}
    for row in result["rows"]:
        checks.setdefault(row["model"], []).append(row)
    for model, rows in checks.items():
        beside = [str(len(rows)), f"{statistics.median(row['seconds'] for row in rows):.0f}"]
        for figure in rows[0]["figures"]:
            values = sorted(row["figures"][figure] for row in rows)
            beyond = [f"{statistics.median(row[kind][figure] for row in rows):.3f}" for kind in ("start", "exact")]
            spread = f" ({values[0]:.3f} to {values[-1]:.3f})" if len(values) > 1 else ""
            goal = target(figure)
            verdict = ["", ""]
            if goal is not None:
                verdict = [f"≤ {goal:g}", "met" if values[-1] <= goal else "**missed**"]
            cells = [model, figure, f"{statistics.median(values):.3f}{spread}", *beyond]
            lines.append("| " + " | ".join([*cells, *verdict, *beside]) + " |")
            model, beside = "", ["", ""]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines += ["", f"{result['date']}, Python {result['python']}, {versions}, one thread."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the checks and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--only", choices=CHECKS, action="append", help="run this check alone, and keep the others' results"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small: more threads cost more than they bring
    packages = ("implicitvi", "torch", "pyro-ppl", "scipy")
    result: Row = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "targets": TARGETS,
        "rows": [],
    }
    if options.only and options.output.exists():
        kept = json.loads(options.output.read_text(encoding="utf-8"))["rows"]
        result["rows"] = [row for row in kept if row["model"] not in options.only]
    for name in options.only or CHECKS:
        for seed in range(options.seeds):
            row = {"model": name, "seed": seed, **CHECKS[name](seed)}
            row["missed"] = [f for f, v in row["figures"].items() if v > (target(f) or math.inf)]
            result["rows"].append(row)
        result["rows"].sort(key=lambda row: list(CHECKS).index(row["model"]))
        print(table(result), flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(table(result), encoding="utf-8")


if __name__ == "__main__":
    main()
