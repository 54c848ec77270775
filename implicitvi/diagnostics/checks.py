"""Checks that need draws, a score and the record of a run: one function for each row, or group of rows, of a report."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitvi.diagnostics.agreement import R_HAT
from implicitvi.diagnostics.chains import TAIL, MomentDrift, find_missed_modes, moment_drift
from implicitvi.diagnostics.posterior import TrainedFit
from implicitvi.diagnostics.report import Check
from implicitvi.diagnostics.stein import KernelStein, stein_identities
from implicitvi.pyro_model.sites import SiteLayout
from implicitvi.pyro_model.target import Target

CHAINS = 64
BAD_STEPS = 0.01
SCORE_ERROR = 0.15  # sd; see KernelStein.score_error
SITE_ERROR = 0.25
MEAN_ERROR = 0.2  # sd
SD_ERROR = 0.2  # of log sd: 0.82 to 1.22
TAIL_SHARE = 0.03
LEAST_ACCEPTED = 0.2  # of the transitions of chains from the draws; below, their moments mean nothing
FAR_SHARE = 0.04
SIGNIFICANT = 4.0  # standard errors

TRAIN = "Train longer (num_steps), with a larger batch (num_particles), or with a wider adversary."


def check_run(fit: TrainedFit) -> Check:
    """Count skipped turns, and steps that dropped draws, in the record of a run."""
    losses = fit.history["sampler"]
    dropped = int((fit.history["dropped"] > 0).sum())
    bad = max(fit.skipped, dropped, int((losses != losses).sum())) / max(fit.num_steps, 1)
    found = f"{fit.stop_reason}; {fit.skipped} turns skipped, draws dropped in {dropped} of {fit.num_steps} steps"
    advice = (
        "Losses, gradients or log densities were not finite, and the draws left out may be where the posterior is. "
        "Look for overflow in the model, priors that exclude the data, and supports that depend on other sites."
    )
    return Check.of("run", bad, BAD_STEPS, found, failed=bad > BAD_STEPS, advice=advice)


def check_restarts(fit: TrainedFit | None) -> Check:
    """Check that independent fits agree, if there are several."""
    if fit is None or fit.agreement is None:
        why = "There is one fit. AVBSVI(..., restarts=4) shows whether fits agree, and in which modes they lie."
        return Check.left_out("restarts", why)
    found = fit.agreement
    advice = (
        "Fits that differ in nothing but their seeds are not the same posterior, so some of them are wrong. Look at "
        f"fit.agreement and at fit.best(). {TRAIN}"
    )
    return Check.of("restarts", found.worst[1], R_HAT, str(found), failed=not found.ok, advice=advice)


def check_density(finite: Tensor) -> Check:
    """Check that all draws, of a mask ``[S]``, have a finite log density and gradient."""
    share = 1 - finite.double().mean().item()
    found = f"{share:.1%} of the draws have none"
    advice = (
        "Some draws have no finite log density or gradient under the model, so they are not draws of its posterior. "
        "The other checks leave them out."
    )
    return Check.of("finite density", share, 0.0, found, failed=share > 0, advice=advice)


def check_stein(layout: SiteLayout, u: Tensor, score: Tensor, kernel: KernelStein) -> list[Check]:
    """Check the kernel Stein discrepancy, then Stein's identities of every coordinate of ``u [S, D]``."""
    seen = stein_identities(u, score)
    size, errors = torch.cat([seen.mean, seen.spread]), torch.cat([seen.mean_error, seen.spread_error])
    worst = index_of_worst(size, errors)
    wrong = is_off(size, errors, SITE_ERROR).view(2, -1).any(0)
    parts = wrong.split([site.size for site in layout.sites])
    sites = zip(layout.sites, parts, strict=True)
    off = ", ".join(f"{site.name} ({int(part.sum())})" for site, part in sites if part.any())

    error = kernel.score_error
    found = f"score off by {error:.2f} / sd, p = {kernel.p_value:.3f}"
    advice = (
        f"The draws do not follow the gradient of the posterior; the next rows show in which sites and how. {TRAIN}"
    )
    failed = error > SCORE_ERROR and kernel.p_value < 0.01
    discrepancy = Check.of("Stein discrepancy", error, SCORE_ERROR, found, failed=failed, advice=advice)

    identity = f"{'mean' if worst < layout.dim else 'spread'} identity of {layout.coordinates()[worst % layout.dim]}"
    found = f"{identity} off by {size[worst]:+.2f} ({(size / errors)[worst].abs():.0f} standard errors)"
    advice = (
        f"These sites are off, with the number of their entries: {off}. A Stein identity of the spread below 0 means "
        "too narrow a posterior, above 0 too wide a one. If the draws are not from a guide, check transforms, their "
        "Jacobians and the order of the sites."
    )
    failed = bool(wrong.any())
    return [discrepancy, Check.of("sites", size[worst].item(), SITE_ERROR, found, failed=failed, advice=advice)]


def check_chains(target: Target, u: Tensor, seed: int) -> list[Check]:
    """Check chains that start at the draws ``u [S, D]``, and chains that start far away."""
    if target.log_joint.mode == "loop":
        why = "The model is scored one draw at a time, which takes too long for chains."
        return [Check.left_out(name, why) for name in ("mean", "spread", "tails", "other modes")]
    drift = moment_drift(target, u, seed=seed)
    return [*_check_drift(drift, target.layout.coordinates()), check_modes(target, u, CHAINS, seed)]


def check_modes(target: Target, u: Tensor, num_chains: int, seed: int) -> Check:
    """Check that chains end among the draws ``u [S, D]``: half of them start far away, half at draws of the prior."""
    found = find_missed_modes(target, u, target.prior_draws(num_chains, u[0], seed), num_chains=num_chains, seed=seed)
    count = int(found.is_far.sum())
    ends = target.layout.unpack(found.ends[found.is_far][:1])[0] if count else {}
    words = f"{count} of {found.arrived} chains end far away"
    advice = (
        "Chains from far away end where there are no draws, at a density as high as theirs: the fit has lost a mode, "
        f"for instance at {_values(ends)}. Fit again from other starts (init_loc_fn, seed) with tempering=0.1, or "
        "order the sites that can change places."
    )
    failed = found.share > FAR_SHARE and count > 1
    return Check.of("other modes", found.share, FAR_SHARE, words, failed=failed, advice=advice)


def _check_drift(drift: MomentDrift, where: list[str]) -> list[Check]:
    """Check how chains from the draws change the moments of the coordinates ``where``."""
    if drift.acceptance < LEAST_ACCEPTED:
        why = "Chains from the draws cannot move, so their moments mean nothing."
        found = f"{drift.acceptance:.0%} of the moves of chains accepted"
        advice = (
            "However short their steps, chains from the draws cannot move: the log density falls over distances that "
            "are far smaller than those between the draws. The draws are much too wide, or lie on an edge of it. "
            f"{TRAIN}"
        )
        spread = Check.of("spread", drift.acceptance, LEAST_ACCEPTED, found, failed=True, advice=advice)
        return [Check.left_out("mean", why), spread, Check.left_out("tails", why)]
    log_sd = drift.sd.log()
    i, j = index_of_worst(drift.mean, drift.mean_error), index_of_worst(log_sd, drift.sd_error)
    few_steps = "A few steps of Hamiltonian Monte Carlo"

    found = f"{drift.mean[i]:+.2f} sd in {where[i]}"
    advice = f"{few_steps} move the mean of {where[i]}, so the draws are in the wrong place. {TRAIN}"
    failed = bool(is_off(drift.mean, drift.mean_error, MEAN_ERROR).any())
    mean = Check.of("mean", drift.mean[i].item(), MEAN_ERROR, found, failed=failed, advice=advice)

    ratio = drift.sd[j].item()
    found, wrong = f"sd times {ratio:.2f} in {where[j]}", "narrow" if ratio > 1 else "wide"
    advice = f"{few_steps} change the sd of {where[j]}: the draws are too {wrong}. {TRAIN}"
    failed = bool(is_off(log_sd, drift.sd_error, SD_ERROR).any())
    spread = Check.of("spread", ratio, 1 + SD_ERROR, found, failed=failed, advice=advice)

    found = f"{drift.tail:.1%} of the draws move to the outermost {TAIL:.0%}"
    advice = (
        "The draws miss the posterior's tails: intervals are too short. Larger batches (num_particles) reach the tails "
        "in training; fit.polish() moves some of the draws there."
    )
    failed = drift.tail > TAIL_SHARE and drift.tail - TAIL > SIGNIFICANT * drift.tail_error
    return [mean, spread, Check.of("tails", drift.tail, TAIL_SHARE, found, failed=failed, advice=advice)]


def index_of_worst(size: Tensor, errors: Tensor, significant: float = SIGNIFICANT) -> int:
    """Return the index of the largest significant one of the sizes ``[N]``; of all, if none is significant."""
    return int(size.abs().where(size.abs() > significant * errors, 1e-9 * size.abs()).argmax())


def is_off(size: Tensor, errors: Tensor, limit: float, significant: float = SIGNIFICANT) -> Tensor:
    """Return a mask ``[N]`` of sizes beyond the limit and so many standard errors."""
    return (size.abs() > limit) & (size.abs() > significant * errors)


def _values(draw: dict[str, Tensor]) -> str:
    """Format the first entries of one draw of the first three sites."""
    first = {name: value[0].flatten()[:3].tolist() for name, value in list(draw.items())[:3]}
    return ", ".join(f"{name} = {[round(v, 2) for v in values]}" for name, values in first.items())
