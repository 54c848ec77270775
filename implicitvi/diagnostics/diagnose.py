"""`diagnose`: whether draws are those of a model's posterior, told without a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, log, sqrt
from typing import Any, Protocol, cast, runtime_checkable

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.infer import Predictive
from torch import Tensor

from implicitvi.avb.samplers import SemiImplicitSampler
from implicitvi.diagnostics.agreement import R_HAT, Agreement
from implicitvi.diagnostics.chains import TAIL, MomentDrift, find_missed_modes, moment_drift
from implicitvi.diagnostics.posterior import TrainedGuide, is_guide, target_of
from implicitvi.diagnostics.relearned_density import TRUSTED_AUC, RelearnedDensity, psis, relearn_density
from implicitvi.diagnostics.report import Check, Report
from implicitvi.diagnostics.stein import FRAME, kernel_stein, stein_identities
from implicitvi.errors import ImplicitVIError, OptionError, SetupError, ShapeError, check_at_least
from implicitvi.metrics.evidence import semi_implicit_bound
from implicitvi.numerics.types import Draws
from implicitvi.pyro_model.sites import SiteLayout
from implicitvi.pyro_model.target import Target
from implicitvi.pyro_model.tracing import is_deterministic, run_at, unvalidated
from implicitvi.rng import RandomStream
from implicitvi.training import History

LEAST = 200  # draws; fewer say little about anything
STEIN_DRAWS = 1000  # more would find significant what does not matter
AUDIT_DRAWS = 8000
PREDICTIVE_DRAWS = 200
CHAINS = 64

SCORE_ERROR = 0.15  # sd; see KernelStein.score_error
MEAN_ERROR = 0.2  # sd
SD_ERROR = 0.2  # of log sd: 0.82 to 1.22
TAIL_SHARE = 0.03
LEAST_ACCEPTED = 0.2  # of the moves of chains from the draws; below, they have said nothing
FAR_SHARE = 0.04
SITE_ERROR = 0.25
BAD_STEPS = 0.01
LEARNED_AUC = 0.6
LEARNED_GAP = 0.35  # nats
KL = 0.35  # nats
PARETO_K, FLAT_WEIGHTS = 0.7, 0.15
SIGNIFICANT = 4.0  # standard errors

TRAIN = "Train longer (num_steps), with a larger batch (num_particles), or with a wider adversary."


@runtime_checkable
class Trained(Protocol):
    """What a diagnosis reads of a `Fit`."""

    guide: TrainedGuide
    history: History
    num_steps: int
    skipped: int
    stop_reason: str
    agreement: Agreement | None


def diagnose(
    source: TrainedGuide | Trained | Draws,
    model: Callable[..., Any],
    *args: Any,
    num_samples: int = 2000,
    seed: int = 0,
    **kwargs: Any,
) -> Report:
    """Say whether draws can be trusted as those of the posterior, and what to do where not.

    All checks but those of the adversary use the draws and the score of the model only, so they judge draws
    from anywhere. ``docs/diagnose.md`` says what each can see and what it cannot.

    Args:
        source: A fit, a guide that has been trained, or draws ``{site: [S, *site shape]}`` of every continuous latent
            site, constrained and independent (thin a Markov chain). With draws alone the checks that need a sampler are
            left out.
        model: The Pyro model.
        *args: Its arguments, as in training.
        num_samples: Draws that are looked at, of a guide at least two for each dimension; of more, evenly spaced ones.
        seed: Of all that is random; the report is a function of source, arguments and seed.
        **kwargs: Its keyword arguments.

    Returns:
        The report. Print it; ``report.ok`` is whether no check failed.

    Raises:
        SetupError: The guide has not been trained, or is amortized.
        ShapeError: Sites are missing or unknown, have other shapes, or there are too few draws.
        ModelError: Draws lie outside their site's support; the model has other sites than the guide, looks at
            minibatches, or has no log density.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> exact = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> diagnose({"z": exact}, model).ok, diagnose({"z": 0.5 * exact}, model).ok
        (True, False)
    """
    check_at_least("num_samples", num_samples, LEAST)
    guide = source.guide if isinstance(source, Trained) else source
    if not is_guide(guide) and not isinstance(guide, Mapping):
        raise SetupError(
            "there is nothing to diagnose",
            got=type(source).__name__,
            expected="a fit, an ImplicitGuide, or draws {site: [S, *site shape]}",
        )
    if is_guide(guide):
        target = target_of(guide, model, args, kwargs, seed)
        with RandomStream(seed):
            u = guide.sample_unconstrained(max(num_samples, 2 * target.layout.dim))
            pool = guide.sample_unconstrained(max(AUDIT_DRAWS, 40 * target.layout.dim))
    else:
        draws = cast(Draws, guide)
        target = Target.of(model, args, kwargs, _first(draws), seed)
        u, pool = _thin(target.unconstrain(draws), num_samples), None
        _check_count(len(u), target.layout.dim)
    checks = [_check_run(source)] if isinstance(source, Trained) else []
    checks.append(_check_restarts(source if isinstance(source, Trained) else None))
    log_p, score = target.score(u)
    finite = log_p.isfinite() & score.isfinite().all(1)
    checks.append(_check_density(finite))
    if not finite.all() and int(finite.sum()) < max(LEAST // 2, 2 * u.shape[1]):
        return Report(tuple(checks))
    u, score = u[finite], score[finite]
    try:
        checks += _check_stein(target.layout, u, score, pool, seed)
    except ImplicitVIError as error:  # a collapsed fit: draws on a plane, or at a point
        checks.append(Check("Stein discrepancy", "failed", None, None, "not defined", str(error)))
        return Report(tuple(checks))
    checks += _check_moves(target, u, seed)
    checks += _check_sampler(guide, target, pool, seed)
    checks += _check_predictive(target, u, seed)
    return Report(tuple(checks))


def stein_error(
    guide: TrainedGuide,
    model: Callable[..., Any],
    *args: Any,
    num_samples: int = STEIN_DRAWS,
    seed: int = 0,
    **kwargs: Any,
) -> float:
    """`KernelStein.score_error` of a guide's draws: by this restarts are chosen; infinite where it is not defined.

    Args:
        guide: A guide that has been trained.
        model: The Pyro model.
        *args: Its arguments.
        num_samples: Draws that are looked at.
        seed: Of the draws.
        **kwargs: Its keyword arguments.
    """
    target = target_of(guide, model, args, kwargs, seed)
    with RandomStream(seed):
        pool = guide.sample_unconstrained(max(num_samples, FRAME * target.layout.dim))
    u = pool[:num_samples]
    _, score = target.score(u)
    try:
        return kernel_stein(u, score, reference=pool, num_bootstrap=1, seed=seed).score_error
    except OptionError:  # a collapsed fit, or draws without a density
        return inf


def _check_moves(target: Target, u: Tensor, seed: int) -> list[Check]:
    """Chains from the draws, and chains from afar."""
    names = ("mean", "spread", "tails", "other modes")
    if target.log_joint.mode == "loop":
        why = "The model is scored one draw at a time, which takes too long for chains."
        return [Check.left_out(name, why) for name in names]
    change = moment_drift(target, u, seed=seed)
    seen = find_missed_modes(target, u, target.prior_draws(CHAINS, u[0], seed), num_chains=CHAINS, seed=seed)
    ends = target.layout.unpack(seen.ends[seen.is_far][:1])[0] if seen.is_far.any() else {}
    return [
        *_check_change(change, target.layout.coordinates()),
        Check.of(
            "other modes",
            seen.share,
            FAR_SHARE,
            f"{int(seen.is_far.sum())} of {seen.arrived} chains end far away",
            failed=seen.share > FAR_SHARE and int(seen.is_far.sum()) > 1,
            advice="Chains from afar end at a density as high as that of the draws, where there are no draws: "
            f"the fit has lost a mode, at {_values(ends)} for instance. Fit again from other starts (init_loc_fn, "
            "seed) with tempering=0.1, or order the sites that can change places.",
        ),
    ]


def _check_change(change: MomentDrift, where: list[str]) -> list[Check]:
    """What chains from the draws have changed in the coordinates ``where``."""
    if change.acceptance < LEAST_ACCEPTED:
        why = "Chains from the draws cannot move, so they say nothing."
        return [
            Check.left_out("mean", why),
            Check.of(
                "spread",
                change.acceptance,
                LEAST_ACCEPTED,
                f"{change.acceptance:.0%} of the moves of chains accepted",
                failed=True,
                advice="However short their steps, chains from the draws cannot move: the log density falls over "
                "distances that are far smaller than those between the draws. They are much too wide, or lie "
                f"on an edge of it. {TRAIN}",
            ),
            Check.left_out("tails", why),
        ]
    log_sd = change.sd.log()
    i, j = _worst(change.mean, change.mean_error), _worst(log_sd, change.sd_error)
    ratio = change.sd[j].item()
    wide = "narrow" if ratio > 1 else "wide"
    return [
        Check.of(
            "mean",
            change.mean[i].item(),
            MEAN_ERROR,
            f"{change.mean[i]:+.2f} sd in {where[i]}",
            failed=_is_off(change.mean, change.mean_error, MEAN_ERROR),
            advice=f"A few steps of Hamiltonian Monte Carlo carry the mean of {where[i]} away, so the draws are in "
            f"the wrong place. {TRAIN}",
        ),
        Check.of(
            "spread",
            ratio,
            1 + SD_ERROR,
            f"sd times {ratio:.2f} in {where[j]}",
            failed=_is_off(log_sd, change.sd_error, SD_ERROR),
            advice=f"MomentDrift draws have another sd of {where[j]}: the draws are too {wide}. {TRAIN}",
        ),
        Check.of(
            "tails",
            change.tail,
            TAIL_SHARE,
            f"{change.tail:.1%} of the draws move to the outermost {TAIL:.0%}",
            failed=change.tail > TAIL_SHARE and change.tail - TAIL > SIGNIFICANT * change.tail_error,
            advice="The draws leave out the posterior's tails: intervals are too short. Larger batches (num_particles) "
            "bring draws there; fit.polish() moves those that there are.",
        ),
    ]


def _check_predictive(target: Target, u: Tensor, seed: int) -> list[Check]:
    """Share of replicated data whose mean, sd, least and largest value are above those of the data."""
    draws = target.layout.unpack(_thin(u, PREDICTIVE_DRAWS))[0]
    first = {name: value[0] for name, value in draws.items()}
    with torch.no_grad(), RandomStream(seed), unvalidated():
        nodes = run_at(target.model, first, *target.args, **target.kwargs).nodes
        observed = {
            name: node["value"]
            for name, node in nodes.items()
            if node["type"] == "sample"
            and node["is_observed"]
            and name not in draws
            and not is_deterministic(node)
            and not isinstance(node["fn"], Unit)
        }
        if not observed:
            return [Check.left_out("predictive", "The model has no observed site.")]
        free = poutine.condition(poutine.uncondition(target.model), data=first)
        try:
            drawn = Predictive(free, posterior_samples=draws, return_sites=list(observed))(
                *target.args, **target.kwargs
            )
        except (NotImplementedError, RuntimeError, ValueError) as error:
            why = f"The observed sites cannot be drawn: {str(error).splitlines()[0]}."
            return [Check.left_out("predictive", why)]
    shares = {
        f"{name} {what}": share
        for name, value in observed.items()
        for what, share in _predictive_shares(value, drawn[name].reshape(-1, *value.shape)).items()
    }
    if not shares:
        return [Check.left_out("predictive", "The data are not finite.")]
    extreme = min(shares, key=lambda key: min(shares[key], 1 - shares[key]))
    least = min(shares[extreme], 1 - shares[extreme])
    advice = (
        f"Of data made by the model, {shares[extreme]:.1%} have a {extreme} above that of the data. That is a "
        "matter of the model, not of the fit."
        if least < 0.01
        else ""
    )
    found = ", ".join(f"{key} {share:.2f}" for key, share in shares.items())
    return [Check.noted("predictive", least, found, advice)]


def _first(draws: Draws) -> dict[str, Tensor]:
    """The first draw of every site."""
    values = {name: torch.as_tensor(value) for name, value in draws.items()}
    return {name: value[0] for name, value in values.items() if value.dim() and len(value)}


def _check_count(count: int, dim: int) -> None:
    least = max(LEAST, 2 * dim)
    if count < least:
        raise ShapeError("there are too few draws to judge", got=count, expected=f">= {least}")


def _thin(u: Tensor, count: int) -> Tensor:
    """At most ``count`` evenly spaced rows."""
    if len(u) <= count:
        return u
    return u[torch.linspace(0, len(u) - 1, count, dtype=torch.float64).long()]


def _check_run(fit: Trained) -> Check:
    """Turns that were skipped, and steps that dropped draws, in the record of a run."""
    losses = fit.history["sampler"]
    dropped = int((fit.history["dropped"] > 0).sum())
    bad = max(fit.skipped, dropped, int((losses != losses).sum())) / max(fit.num_steps, 1)
    return Check.of(
        "run",
        bad,
        BAD_STEPS,
        f"{fit.stop_reason}; {fit.skipped} turns skipped, draws dropped in {dropped} of {fit.num_steps} steps",
        failed=bad > BAD_STEPS,
        advice="Losses, gradients or log densities were not finite, and what was left out may be where the "
        "posterior is. Look for overflow in the model, priors that exclude the data, and supports that depend on "
        "other sites.",
    )


def _check_restarts(fit: Trained | None) -> Check:
    """Whether independent fits agree, where there are several."""
    if fit is None or fit.agreement is None:
        return Check.left_out(
            "restarts",
            "There is one fit. AVBSVI(..., restarts=4) shows whether fits agree, and in which modes they lie.",
        )
    found = fit.agreement
    return Check.of(
        "restarts",
        found.worst[1],
        R_HAT,
        str(found),
        failed=not found.ok,
        advice="Fits that differ by their seeds alone are not the same posterior, so some of them are wrong. Look at "
        f"fit.agreement and at fit.best(). {TRAIN}",
    )


def _check_density(finite: Tensor) -> Check:
    share = 1 - finite.double().mean().item()
    return Check.of(
        "finite density",
        share,
        0.0,
        f"{share:.1%} of the draws have none",
        failed=share > 0,
        advice="The model gives some draws no finite log density or gradient, so they are not draws of its "
        "posterior. The other checks leave them out.",
    )


def _check_stein(layout: SiteLayout, u: Tensor, score: Tensor, pool: Tensor | None, seed: int) -> list[Check]:
    """Kernel Stein discrepancy, then Stein's identities of every coordinate."""
    kernel = kernel_stein(
        _thin(u, STEIN_DRAWS), _thin(score, STEIN_DRAWS), reference=u if pool is None else pool, seed=seed
    )
    sites = stein_identities(u, score)
    size = torch.cat([sites.mean, sites.spread])
    errors = torch.cat([sites.mean_error, sites.spread_error])
    worst = _worst(size, errors)
    what = "mean" if worst < layout.dim else "spread"
    where = layout.coordinates()[worst % layout.dim]
    is_off = ((size.abs() > SITE_ERROR) & (size.abs() > SIGNIFICANT * errors)).view(2, -1).any(0)
    parts = is_off.split([site.size for site in layout.sites])
    counts = {site.name: int(part.sum()) for site, part in zip(layout.sites, parts, strict=True)}
    off = ", ".join(f"{name} ({count})" for name, count in counts.items() if count)
    return [
        Check.of(
            "Stein discrepancy",
            kernel.score_error,
            SCORE_ERROR,
            f"score off by {kernel.score_error:.2f} / sd, p = {kernel.p_value:.3f}",
            failed=kernel.score_error > SCORE_ERROR and kernel.p_value < 0.01,
            advice="Where the draws are, they do not follow the gradient of the posterior; the next rows say in which "
            f"sites and how. {TRAIN}",
        ),
        Check.of(
            "sites",
            size[worst].item(),
            SITE_ERROR,
            f"{what} identity of {where} off by {size[worst]:+.2f} "
            f"({(size / errors)[worst].abs():.0f} standard errors)",
            failed=any(counts.values()),
            advice=f"Off are, with the number of their entries: {off}. A Stein identity of the spread below 0 is "
            "too narrow a posterior, above 0 too wide a one. If draws come from elsewhere, look at transforms, "
            "their Jacobians and the order of the sites.",
        ),
    ]


def _worst(size: Tensor, errors: Tensor) -> int:
    """The largest of the sizes ``[N]`` that are significant; of all, where none is."""
    return int(size.abs().where(size.abs() > SIGNIFICANT * errors, 1e-9 * size.abs()).argmax())


def _is_off(size: Tensor, errors: Tensor, limit: float) -> bool:
    """Whether one of the sizes ``[N]`` is significant and beyond the limit."""
    return bool(((size.abs() > limit) & (size.abs() > SIGNIFICANT * errors)).any())


SAMPLER_CHECKS = ("learned density", "fresh adversary", "divergence", "Pareto k", "evidence")


def _check_sampler(guide: TrainedGuide | Draws, target: Target, pool: Tensor | None, seed: int) -> list[Check]:
    """The checks that need a sampler: of its density, learned afresh."""
    if pool is None or not is_guide(guide):
        why = "These are bare draws; with a guide it would be made."
        return [Check.left_out(name, why) for name in SAMPLER_CHECKS]
    if target.log_joint.mode == "loop":
        why = "The model is scored one draw at a time, which takes too long."
        return [Check.left_out(name, why) for name in SAMPLER_CHECKS]
    found = relearn_density(pool, target, seed=seed)
    learned = _check_learned(guide, found, pool)
    fresh = _check_fresh(found)
    if learned.state == "failed" or fresh.state == "left out":
        witness = learned if learned.state == "failed" else fresh
        why = f"It would rest on a learned density, and {witness.name!r} says that none can be trusted here."
        held = [Check.left_out(name, why) for name in ("divergence", "Pareto k")]
        return [learned, fresh, *held, _check_evidence(guide, target, None, why, seed)]
    _, k = psis(found.log_weights)
    # truncated: a few draws in tails that the fresh density does not know must not decide
    cap = found.log_weights.median() + log(len(pool)) / 2
    log_mean = (found.log_weights.clamp(max=cap).logsumexp(0) - log(len(pool))).item()
    kl = log_mean - found.log_weights.mean().item()
    limit = min(1 - 1 / log(len(pool), 10), PARETO_K)
    return [
        learned,
        fresh,
        Check.of(
            "divergence",
            kl,
            KL,
            f"KL(q‖p) about {kl:.2f} nats",
            failed=kl > KL,
            advice=f"Importance weights of the draws differ much; modes may have the wrong weights. {TRAIN}",
        ),
        Check.of(
            "Pareto k",
            k,
            limit,
            f"{k:.2f}, through the fresh adversary" + (", of weights that hardly differ" if kl < FLAT_WEIGHTS else ""),
            failed=k > limit and kl >= FLAT_WEIGHTS,
            advice="A few draws have nearly all the importance weight: the draws miss mass that they should have.",
        ),
        _check_evidence(guide, target, (found.log_weights.mean().item(), log_mean), "", seed),
    ]


def _check_learned(guide: TrainedGuide, found: RelearnedDensity, pool: Tensor) -> Check:
    name = "learned density"
    if not guide.has_log_density:
        return Check.left_out(name, "The guide has no adversary beside it.")
    with torch.no_grad():
        seen = found.compare(guide.get_posterior().log_prob, pool)
    return Check.of(
        name,
        seen.kl_gap,
        LEARNED_GAP,
        f"loss too good by {seen.kl_gap:+.2f} nats, AUC {seen.auc:.2f}, log mass {seen.log_mass:+.2f}",
        failed=abs(seen.auc - 0.5) > LEARNED_AUC - 0.5
        or not abs(seen.log_mass) < LEARNED_GAP
        or abs(seen.kl_gap) > LEARNED_GAP,
        advice="The fit's adversary and a fresh one do not agree on log q, so its loss means nothing and the "
        "sampler followed a "
        "wrong gradient. Give it more steps (adversary_steps), a higher rate (adversary_lr), or a better contrast.",
    )


def _check_fresh(found: RelearnedDensity) -> Check:
    words = (
        f"AUC {found.auc:.2f}, corrected {found.auc_corrected:.2f}; log mass {found.log_mass:+.2f}; "
        f"halves differ by {found.unsure:.1f} nats"
    )
    if found.trusted:
        off = abs(found.auc_corrected - 0.5)
        return Check.of("fresh adversary", off, TRUSTED_AUC, words, failed=False, advice="")
    why = (
        "A density learned from the draws alone is not good enough to weigh them by. That is no fault of the fit: "
        "tails and many dimensions are hard to learn."
    )
    return Check.left_out("fresh adversary", f"{why} ({words})")


def _check_evidence(
    guide: TrainedGuide, target: Target, estimates: tuple[float, float] | None, why: str, seed: int
) -> Check:
    """The certified bound, and estimates of ELBO and importance sampling; why, where those are withheld."""
    words = "estimates withheld"
    if estimates is not None:
        words = f"estimates: ELBO {estimates[0]:.2f}, importance-weighted {estimates[1]:.2f}"
    if isinstance(guide.sampler, SemiImplicitSampler):
        bound, error = semi_implicit_bound(target, guide.sampler, seed=seed)
        found = f"log p(x) >= {bound:.2f} ± {error:.2f} nats, certified; {words}"
        return Check.noted("evidence", bound, found)
    if estimates is None:
        return Check.left_out("evidence", why)
    return Check.noted("evidence", estimates[0], f"log p(x) in nats, {words}")


def _predictive_shares(value: Tensor, drawn: Tensor) -> dict[str, float]:
    """Share of replicates ``[S, ...]`` with a statistic above that of ``value [...]``, ties for one half."""
    x, y = value.detach().double().flatten(), drawn.detach().double().reshape(len(drawn), -1)
    if not x.isfinite().all() or not y.isfinite().all() or not len(x):
        return {}
    statistics: dict[str, Callable[[Tensor], Tensor]] = {"mean": lambda v: v.mean(-1)}
    if len(x) > 1:
        statistics |= {"sd": lambda v: v.std(-1), "min": lambda v: v.amin(-1), "max": lambda v: v.amax(-1)}
    shares = {}
    for what, statistic in statistics.items():
        ours, theirs = statistic(x), statistic(y)
        rounding = 1e-9 * (1 + sqrt(float(ours) ** 2))
        above, same = theirs > ours + rounding, (theirs - ours).abs() <= rounding
        shares[what] = (above.double() + 0.5 * same.double()).mean().item()
    return shares


def _values(draw: dict[str, Tensor]) -> str:
    """One draw of every site in words, the first entries only."""
    return ", ".join(
        f"{name} = {[round(v, 2) for v in value[0].flatten()[:3].tolist()]}" for name, value in list(draw.items())[:3]
    )
