"""Checks that need a sampler: they relearn its density, and estimate divergence and evidence with it."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from implicitvi.avb.samplers import SemiImplicitSampler
from implicitvi.diagnostics.checks import TRAIN
from implicitvi.diagnostics.posterior import TrainedGuide
from implicitvi.diagnostics.relearned_density import TRUSTED_AUC, RelearnedDensity, psis, relearn_density
from implicitvi.diagnostics.report import Check
from implicitvi.metrics.evidence import semi_implicit_bound
from implicitvi.pyro_model.target import Target

LEARNED_AUC = 0.6
LEARNED_GAP = 0.35  # nats
KL = 0.35  # nats
PARETO_K, FLAT_WEIGHTS = 0.7, 0.15

ROWS = ("learned density", "fresh adversary", "divergence", "Pareto k", "evidence")


def check_sampler(guide: TrainedGuide | None, target: Target, pool: Tensor | None, seed: int) -> list[Check]:
    """Check the density of a guide's sampler, relearned from its draws ``pool [S, D]``."""
    if guide is None or pool is None:
        why = "This check needs a guide, and these are draws alone."
        return [Check.left_out(name, why) for name in ROWS]
    if target.log_joint.mode == "loop":
        why = "The model is scored one draw at a time, which takes too long."
        return [Check.left_out(name, why) for name in ROWS]
    found = relearn_density(pool, target, seed=seed)
    learned, fresh = _check_learned(guide, found, pool), _check_fresh(found)
    if learned.state == "failed" or fresh.state == "left out":
        witness = learned if learned.state == "failed" else fresh
        why = f"It would rest on a learned density, and {witness.name!r} says that none can be trusted here."
        held = [Check.left_out(name, why) for name in ("divergence", "Pareto k")]
        return [learned, fresh, *held, _check_evidence(guide, target, None, why, seed)]
    log_weights = found.log_weights
    # truncated: a few draws in tails that the relearned density does not know must not decide
    cap = log_weights.median() + log(len(pool)) / 2
    log_mean = (log_weights.clamp(max=cap).logsumexp(0) - log(len(pool))).item()
    elbo = log_weights.mean().item()
    evidence = _check_evidence(guide, target, (elbo, log_mean), "", seed)
    return [learned, fresh, *_check_weights(log_weights, log_mean - elbo), evidence]


def _check_weights(log_weights: Tensor, kl: float) -> list[Check]:
    """Check ``KL(q‖p)`` in nats, and the tail of log importance weights ``[S]``."""
    _, k = psis(log_weights)
    limit = min(1 - 1 / log(len(log_weights), 10), PARETO_K)
    advice = f"Importance weights of the draws differ much; modes may have the wrong weights. {TRAIN}"
    divergence = Check.of("divergence", kl, KL, f"KL(q‖p) about {kl:.2f} nats", failed=kl > KL, advice=advice)
    words = f"{k:.2f}, through the fresh adversary" + (", of weights that hardly differ" if kl < FLAT_WEIGHTS else "")
    advice = "A few draws have nearly all the importance weight: the draws miss mass that they should have."
    return [divergence, Check.of("Pareto k", k, limit, words, failed=k > limit and kl >= FLAT_WEIGHTS, advice=advice)]


def _check_learned(guide: TrainedGuide, found: RelearnedDensity, pool: Tensor) -> Check:
    """Compare the density that the fit has learned with the relearned one."""
    if not guide.has_log_density:
        return Check.left_out("learned density", "The guide has no adversary.")
    with torch.no_grad():
        seen = found.compare(guide.get_posterior().log_prob, pool)
    gap, mass = seen.kl_gap, seen.log_mass
    words = f"loss too good by {gap:+.2f} nats, AUC {seen.auc:.2f}, log mass {mass:+.2f}"
    advice = (
        "The fit's adversary and a fresh one do not agree on log q, so its loss means nothing and the sampler followed "
        "a wrong gradient. Give it more steps (adversary_steps), a higher rate (adversary_lr), or a better contrast."
    )
    failed = abs(seen.auc - 0.5) > LEARNED_AUC - 0.5 or not abs(mass) < LEARNED_GAP or abs(gap) > LEARNED_GAP
    return Check.of("learned density", gap, LEARNED_GAP, words, failed=failed, advice=advice)


def _check_fresh(found: RelearnedDensity) -> Check:
    """Check that the relearned density passes its own tests."""
    words = f"AUC {found.auc:.2f}, corrected {found.auc_corrected:.2f}; log mass {found.log_mass:+.2f}; "
    words += f"halves differ by {found.unsure:.1f} nats"
    if found.trusted:
        off = abs(found.auc_corrected - 0.5)
        return Check.of("fresh adversary", off, TRUSTED_AUC, words, failed=False, advice="")
    why = "A density learned from the draws alone is not good enough to weight them. This is not a fault of the fit:"
    return Check.left_out("fresh adversary", f"{why} tails and many dimensions are hard to learn. ({words})")


def _check_evidence(
    guide: TrainedGuide, target: Target, estimates: tuple[float, float] | None, why: str, seed: int
) -> Check:
    """Note the certified bound, and estimates of ELBO and log evidence; ``why``, where these are withheld."""
    words = "estimates withheld"
    if estimates is not None:
        words = f"estimates: ELBO {estimates[0]:.2f}, importance-weighted {estimates[1]:.2f}"
    if isinstance(guide.sampler, SemiImplicitSampler):
        bound, error = semi_implicit_bound(target, guide.sampler, seed=seed)
        return Check.noted("evidence", bound, f"log p(x) >= {bound:.2f} ± {error:.2f} nats, certified; {words}")
    if estimates is None:
        return Check.left_out("evidence", why)
    return Check.noted("evidence", estimates[0], f"log p(x) in nats, {words}")
