"""
Bayesian regression
===================

Compare three regressions of one data set: Normal errors, heavy-tailed errors and a horseshoe prior.

Each is fitted by the defaults and checked against a Gibbs sampler. ArviZ compares the models by leave-one-out
cross-validation.

The data are scikit-learn's diabetes study: ten measurements of 442 patients and the progression of the disease a year
later, all standardised. The errors have variance ``s2`` and the coefficients have the prior ``Normal(0, sqrt(s2 d))``,
with ``d = 1`` or, for the horseshoe, ``d = (tau lam)²``. Every conditional except that of ``nu`` is then known, so
Gibbs is exact up to Monte Carlo error, which a second run shows.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.special import gammaln
from sklearn.datasets import load_diabetes
from torch import Tensor

from implicitvi import AVBSVI, ImplicitGuide, to_arviz

torch.set_num_threads(1)  # the networks are small: a second thread would slow them down


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run."""

    # The defaults of `AVBSVI`, but fewer steps than 2,500: three such fits would take six minutes.
    avb: dict[str, Any] = field(default_factory=lambda: {"num_steps": 600})
    draws: int = 4000
    gibbs: int = 10_000


SMOKE = Sizes(avb={"num_steps": 8, "warm_start": 10}, draws=100, gibbs=50)


def normal(x: Tensor, y: Tensor | None = None) -> None:
    s2 = pyro.sample("s2", dist.InverseGamma(2.0, 1.0))
    with pyro.plate("predictor", x.shape[1]):
        beta = pyro.sample("beta", dist.Normal(0.0, s2.sqrt()))
    with pyro.plate("patient", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, s2.sqrt()), obs=y)


def robust(x: Tensor, y: Tensor | None = None) -> None:
    nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
    s2 = pyro.sample("s2", dist.InverseGamma(2.0, 1.0))
    with pyro.plate("predictor", x.shape[1]):
        beta = pyro.sample("beta", dist.Normal(0.0, s2.sqrt()))
    with pyro.plate("patient", len(x)):
        pyro.sample("y", dist.StudentT(nu, x @ beta, s2.sqrt()), obs=y)


def horseshoe(x: Tensor, y: Tensor | None = None) -> None:
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    s2 = pyro.sample("s2", dist.InverseGamma(2.0, 1.0))
    with pyro.plate("predictor", x.shape[1]):
        lam = pyro.sample("lam", dist.HalfCauchy(1.0))
        beta = pyro.sample("beta", dist.Normal(0.0, s2.sqrt() * tau * lam))
    with pyro.plate("patient", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, s2.sqrt()), obs=y)


PREDICTORS = ["age", "sex", "bmi", "bp", "tc", "ldl", "hdl", "tch", "ltg", "glu"]
MODELS = {"Normal": normal, "Student t": robust, "horseshoe": horseshoe}
COLOURS = {"Normal": "#0072B2", "Student t": "#D55E00", "horseshoe": "#009E73"}


def gibbs(name: str, x: np.ndarray, y: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Draw ``[S, P + 1]``, the coefficients and ``s2``; a Student t is a Normal with weights ``w``."""
    rng = np.random.default_rng(seed)
    (n, p), nu, s2, tau2, xi = x.shape, 10.0, 1.0, 1.0, 1.0
    w, d, lam2, aux = np.ones(n), np.ones(p), np.ones(p), np.ones(p)
    kept = []
    for step in range(draws + draws // 10):
        root = np.linalg.inv(np.linalg.cholesky(x.T @ (w[:, None] * x) + np.diag(1 / d))).T
        beta = root @ (root.T @ (x.T @ (w * y)) + np.sqrt(s2) * rng.standard_normal(p))
        error = (y - x @ beta) ** 2
        rate = 1.0 + ((w * error).sum() + (beta**2 / d).sum()) / 2
        s2 = rate / rng.gamma(2.0 + (n + p) / 2)
        if name == "Student t":
            # a Metropolis step on ``log nu`` with ``w`` integrated out, then ``w`` given ``nu``
            other = nu * np.exp(0.5 * rng.standard_normal())
            change = log_nu(other, error / s2) - log_nu(nu, error / s2)
            nu = other if np.log(rng.uniform()) < change else nu
            w = rng.gamma((nu + 1) / 2, 2 / (nu + error / s2))
        if name == "horseshoe":
            # a half-Cauchy is an inverse gamma whose rate is an inverse gamma (Makalic and Schmidt, 2016)
            lam2 = (1 / aux + beta**2 / (2 * tau2 * s2)) / rng.exponential(size=p)
            aux = (1 + 1 / lam2) / rng.exponential(size=p)
            tau2 = (1 / xi + (beta**2 / lam2).sum() / (2 * s2)) / rng.gamma((p + 1) / 2)
            xi = (1 + 1 / tau2) / rng.exponential()
            d = tau2 * lam2
        if step >= draws // 10:
            kept.append([*beta, s2])
    return np.array(kept)


def log_nu(nu: float, error: np.ndarray) -> float:
    """Return the log density of ``log nu`` given squared errors in units of ``s2``, up to a constant."""
    each = gammaln((nu + 1) / 2) - gammaln(nu / 2) - 0.5 * np.log(nu)
    likelihood = (each - (nu + 1) / 2 * np.log1p(error / nu)).sum()
    return float(likelihood + 2.0 * np.log(nu) - 0.1 * nu)  # Gamma(2, 0.1), and log|J|


def fit(name: str, x: Tensor, y: Tensor, sizes: Sizes, seed: int) -> tuple[Any, float]:
    """Return ArviZ's container for one fitted model, and the seconds of the fit."""
    guide = ImplicitGuide(MODELS[name])
    done = AVBSVI(MODELS[name], guide, seed=seed, progress=False, **sizes.avb).run(x, y)
    return to_arviz(guide, MODELS[name], x, y, num_samples=sizes.draws), done.seconds


def flat(idata: Any) -> np.ndarray:
    """Return coefficients and ``s2`` of ArviZ's container: ``[S, P + 1]``."""
    return np.column_stack([idata.posterior["beta"].values[0], idata.posterior["s2"].values[0]])


def numbers(draws: np.ndarray, exact: np.ndarray) -> str:
    """Return errors of the means in posterior sds, mean and largest, and the smallest and largest ratio of the sds."""
    error = np.abs(draws.mean(0) - exact.mean(0)) / exact.std(0)
    ratio = draws.std(0) / exact.std(0)
    return f"{error.mean():12.3f}{error.max():10.3f}{ratio.min():10.3f}{ratio.max():10.3f}"


HEADER = f"{'posterior':16}{'seconds':>9}{'mean error':>12}{'at most':>10}{'sd ratio':>10}{'to':>10}"


def compare(sizes: Sizes, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Fit every model, print the tables and return the draws of the fits and of Gibbs, by name."""
    x, y = load_diabetes(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    data = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    print(HEADER, flush=True)
    fits, exact, fitted = {}, {}, {}
    for name in MODELS:
        idata, seconds = fit(name, *data, sizes, seed)
        began = time.perf_counter()
        exact[name] = gibbs(name, x, y, sizes.gibbs, seed)
        gibbs_seconds = time.perf_counter() - began
        again = gibbs(name, x, y, sizes.gibbs, seed + 1)
        fitted[name], fits[name] = idata, flat(idata)
        print(f"{name:16}{seconds:9.1f}{numbers(fits[name], exact[name])}", flush=True)
        print(f"{'  Gibbs again':16}{gibbs_seconds:9.1f}{numbers(again, exact[name])}", flush=True)
    leave_one_out(fitted)
    return fits, exact


def leave_one_out(fitted: dict[str, Any]) -> None:
    """Print ArviZ's comparison of the models."""
    with warnings.catch_warnings():  # about Pareto's k, which is printed, and ArviZ's about pandas
        warnings.simplefilter("ignore")
        # The draws are independent, so the relative efficiency is 1.
        scores = {k: az.loo(v, reff=1.0, pointwise=True) for k, v in fitted.items()}
        ranking = az.compare(scores)
    worst = max(float(score.pareto_k.max()) for score in scores.values())
    print(f"\nleave-one-out, nats, higher is better; the largest Pareto k is {worst:.2f}")
    print(ranking.to_string())


def draw_forest(fits: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> plt.Figure:
    """Plot the median, 50 % and 90 % interval of each coefficient: fits in colour, Gibbs in black."""
    figure, panel = plt.subplots(figsize=(8, 8), layout="constrained")
    for line, (name, colour) in enumerate(COLOURS.items()):
        for draws, shift, ink, label in ((fits, 0.0, colour, name), (exact, 0.1, "black", None)):
            at = np.arange(len(PREDICTORS)) + 0.27 * (line - 1) + shift
            marks = np.quantile(draws[name][:, :-1], [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
            panel.hlines(at, marks[0], marks[4], color=ink, lw=0.8)
            panel.hlines(at, marks[1], marks[3], color=ink, lw=2.5)
            panel.plot(marks[2], at, "o", color=ink, ms=4, label=label)
    panel.plot([], [], "o-", color="black", ms=4, label="Gibbs, below each")
    panel.axvline(0, color="0.7", lw=0.8, zorder=0)
    panel.set_yticks(range(len(PREDICTORS)), PREDICTORS)
    panel.invert_yaxis()
    panel.set_xlabel("coefficient (sd of progression for one sd of the predictor)")
    panel.set_ylabel("predictor")
    panel.legend(frameon=False)
    return figure


def draw_pairs(fitted: np.ndarray, exact: np.ndarray) -> plt.Figure:
    """Plot the horseshoe's posterior for pairs of four serum measurements: dots for the fit, contours for Gibbs."""
    serum = [PREDICTORS.index(name) for name in ("ldl", "hdl", "tch", "ltg")]
    figure, axes = plt.subplots(4, 4, figsize=(9, 9), sharex="col", layout="constrained", squeeze=False)
    for i, row in enumerate(serum):
        for j, column in enumerate(serum):
            panel = axes[i, j]
            panel.locator_params(nbins=4)
            if j > i:
                panel.set_axis_off()
            elif i == j:
                bins = np.histogram_bin_edges(np.concatenate([fitted[:, row], exact[:, row]]), 40)
                panel.hist(fitted[:, row], bins, density=True, color="#009E73", alpha=0.6)
                panel.hist(exact[:, row], bins, density=True, color="black", histtype="step")
                panel.set_yticks([])
            else:
                panel.plot(*fitted[:2000, [column, row]].T, ".", color="#009E73", ms=2, alpha=0.3)
                height, x, y = np.histogram2d(*exact[:, [column, row]].T, bins=25)
                levels = height.max() * np.exp([-3, -1.5, -0.5])
                middle = (x[1:] + x[:-1]) / 2, (y[1:] + y[:-1]) / 2
                panel.contour(*middle, height.T, levels, colors="black", linewidths=0.8)
            if j == 0 and i:
                panel.set_ylabel(PREDICTORS[row])
            if i == len(serum) - 1:
                panel.set_xlabel(PREDICTORS[column])
    figure.suptitle("horseshoe: coefficients (sd per sd); green the fit, black Gibbs")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to check that it works")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    pyro.set_rng_seed(options.seed)
    fits, exact = compare(sizes, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    forest, pairs = draw_forest(fits, exact), draw_pairs(fits["horseshoe"], exact["horseshoe"])
    forest.savefig(options.output / "regression_forest.png", dpi=150)
    pairs.savefig(options.output / "regression_pairs.png", dpi=150)
    print(f"\nregression_forest.png and regression_pairs.png are in {options.output}/")


if __name__ == "__main__":
    main()
