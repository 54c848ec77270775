"""Judge between two rounds of training whether draws are good enough to stop."""

from __future__ import annotations

from math import log, sqrt

from torch import Tensor

from implicitvi.diagnostics.chains import moment_drift
from implicitvi.diagnostics.checks import LEAST_ACCEPTED, check_density, check_modes, index_of_worst, is_off
from implicitvi.diagnostics.posterior import thin
from implicitvi.diagnostics.relearned_density import psis
from implicitvi.diagnostics.report import Check, Report
from implicitvi.diagnostics.stein import stein_identities
from implicitvi.pyro_model.target import Target

LIMIT = 0.075  # of a mean in sd, and of a log sd
SPREAD, SPREAD_PER_ROOT = 0.25, 0.1  # nats, of the ELBO of a draw; the larger of the first and √D times the second
MASS = 0.15  # nats
EXPLICIT_SPREAD, PARETO_K, FLAT = 0.1, 0.5, 0.01
SIGNIFICANT = 3.0  # standard errors
TRUNCATED = 3.0  # nats above the median: a few draws in tails that the density does not know must not decide
CHAINED = 1000  # draws that chains set out from
TRANSITIONS, LEAPFROGS = 8, 5
FAR_CHAINS = 32


def judge(target: Target, u: Tensor, log_q: Tensor, log_ratio: Tensor | None = None, *, seed: int = 0) -> Report:
    """Check draws and their density, the cheap checks first; where some fail, the dearer ones are left out.

    Args:
        target: The target.
        u: Draws ``[S, D]`` that have had no part in training.
        log_q: Their log density ``[S]`` in nats, learned or exact.
        log_ratio: The learned ``log q - log r`` of each, ``[S]``; ``None`` if the density is exact.
        seed: Random seed.
    """
    log_p, score = target.score(u)
    finite = log_p.isfinite() & score.isfinite().all(1) & log_q.isfinite()
    checks = [check_density(finite)]
    if 2 * int(finite.sum()) < len(u):
        return Report(tuple(checks))
    u, score, elbo = u[finite], score[finite], (log_p - log_q)[finite].double()
    checks += _check_density(elbo, None if log_ratio is None else log_ratio[finite].double(), u.shape[1])
    checks += _check_weighted(target, u.double(), elbo)
    checks += _check_identities(target, u, score)
    # importance weights of an exact density are honest, and chains would add nothing
    for step in (_check_modes,) if log_ratio is None else (_check_chains, _check_modes):
        if all(check.state == "ok" for check in checks):
            checks += step(target, u, seed)
    return Report(tuple(checks))


def _check_density(elbo: Tensor, log_ratio: Tensor | None, dim: int) -> list[Check]:
    """Check that ``log p - log q [S]`` hardly varies: its spread is that of log importance weights."""
    low, high = elbo.quantile(elbo.new_tensor([0.025, 0.975])).tolist()
    spread = (high - low) / (2 * 1.96)  # the standard deviation of a Gaussian
    if log_ratio is None:
        _, k = psis(elbo)
        words = f"{spread:.2f} nats, Pareto k {k:.2f}"
        # of weights that are equal to rounding, k means nothing
        failed = spread > EXPLICIT_SPREAD or (k > PARETO_K and elbo.std().item() > FLAT)
        advice = "The Gaussians of the start are not the posterior."
        return [Check.of("ELBO spread", spread, EXPLICIT_SPREAD, words, failed=failed, advice=advice)]
    advice = "The learned density or the draws are not yet right. Train longer."
    most = max(SPREAD, SPREAD_PER_ROOT * sqrt(dim))
    checks = [Check.of("ELBO spread", spread, most, f"{spread:.2f} nats", failed=spread > most, advice=advice)]
    mass = ((-log_ratio).logsumexp(0) - log(len(log_ratio))).item()
    words = f"log mass {mass:+.2f} nats"
    return [*checks, Check.of("learned density", mass, MASS, words, failed=not abs(mass) < MASS, advice=advice)]


def _check_weighted(target: Target, u: Tensor, elbo: Tensor) -> list[Check]:
    """Check that importance weights, which see the shares of modes that no chain connects, keep mean and spread."""
    where = target.layout.coordinates()
    weights = len(u) * elbo.clamp(max=elbo.median().item() + TRUNCATED).softmax(0)[:, None]
    centred = (u - u.mean(0)) / u.std(0)
    mean = (weights * centred).mean(0)
    mean_error = (weights * centred).std(0) / sqrt(len(u))
    square = (centred - mean).square()
    spread, spread_error = (weights * square).mean(0).log() / 2, (weights * square).std(0) / (2 * sqrt(len(u)))
    return [
        _worst("weighted mean", "mean", mean, mean_error, where),
        _worst("weighted spread", "sd", spread, spread_error, where),
    ]


def _check_identities(target: Target, u: Tensor, score: Tensor) -> list[Check]:
    """Check Stein's identities of every coordinate."""
    seen, where = stein_identities(u, score), target.layout.coordinates()
    # the identity of the spread is of variances
    rows = (("mean", "mean", seen.mean, seen.mean_error), ("spread", "sd", seen.spread / 2, seen.spread_error / 2))
    return [_worst(f"{name} identity", unit, size, error, where) for name, unit, size, error in rows]


def _check_chains(target: Target, u: Tensor, seed: int) -> list[Check]:
    """Check that short chains from the draws keep mean and spread."""
    drift = moment_drift(target, thin(u, CHAINED), num_steps=TRANSITIONS, num_leapfrog=LEAPFROGS, seed=seed)
    where = target.layout.coordinates()
    if drift.acceptance < LEAST_ACCEPTED:
        words = f"{drift.acceptance:.0%} of the moves of chains accepted"
        return [
            Check.of("spread", drift.acceptance, LEAST_ACCEPTED, words, failed=True, advice="The draws are too wide.")
        ]
    return [
        _worst("mean", "mean", drift.mean, drift.mean_error, where),
        _worst("spread", "sd", drift.sd.log(), drift.sd_error, where),
    ]


def _check_modes(target: Target, u: Tensor, seed: int) -> list[Check]:
    """Check that chains from afar end among the draws."""
    return [check_modes(target, thin(u, CHAINED), FAR_CHAINS, seed)]


def _worst(name: str, unit: str, size: Tensor, error: Tensor, where: list[str]) -> Check:
    """Check that no size ``[D]`` is beyond the limit and significant; name the worst."""
    off, i = is_off(size, error, LIMIT, SIGNIFICANT), index_of_worst(size, error, SIGNIFICANT)
    words = f"{unit} of {where[i]} off by {size[i]:+.2f}"
    advice = f"The {unit} of {where[i]} is not yet that of the posterior."
    return Check.of(name, size[i].item(), LIMIT, words, failed=bool(off.any()), advice=advice)
