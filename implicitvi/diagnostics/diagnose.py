"""Judge, without a reference, whether draws are those of a model's posterior."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

from implicitvi.diagnostics.amortized_modes import check_lost_modes
from implicitvi.diagnostics.checks import check_chains, check_density, check_restarts, check_run, check_stein
from implicitvi.diagnostics.density_checks import check_sampler
from implicitvi.diagnostics.posterior import (
    ONE,
    Trained,
    TrainedFit,
    TrainedGuide,
    check_model,
    is_guide,
    target_of,
    tensors_of,
    thin,
)
from implicitvi.diagnostics.predictive import check_predictive
from implicitvi.diagnostics.report import Check, Report
from implicitvi.diagnostics.stein import DRAWS_PER_DIM, kernel_stein
from implicitvi.errors import ImplicitVIError, OptionError, SetupError, ShapeError, check_whole
from implicitvi.numerics.doors import with_gradients
from implicitvi.numerics.types import Draws, Model
from implicitvi.pyro_model.target import Target
from implicitvi.rng import RandomStream

LEAST = 200  # draws; fewer are not enough for any check
STEIN_DRAWS = 1000  # with more, differences that do not matter are significant
POOL_DRAWS = 8000  # from which the density is relearned


@with_gradients()
def diagnose(
    source: Trained | Draws, model: Model, *args: Any, num_samples: int = 2000, seed: int = 0, **kwargs: Any
) -> Report:
    """Check whether draws can be trusted as those of the posterior, and advise what to do where not.

    All checks but those of the adversary use only the draws and the score of the model, so they judge draws from any
    source. ``docs/diagnose.md`` describes the reach of each check. Of a fit of an amortized guide, which has many
    posteriors, it reports the record: the run, the restarts, and the data that lose a mode.

    Args:
        source: A fit, a trained guide, or draws ``{site: [S, *site shape]}`` of every continuous latent site,
            constrained and independent (thin a Markov chain): for draws alone, checks of the sampler are left out.
        model: The Pyro model.
        *args: Its arguments, as in training.
        num_samples: Number of draws to judge; of a guide at least two for each dimension. More draws are thinned.
        seed: Random seed; the report is a function of source, arguments and seed.
        **kwargs: Its keyword arguments.

    Returns:
        The report. Print it; ``report.ok`` is true if no check failed.

    Raises:
        SetupError: The guide has not been trained, or is amortized and comes without its fit.
        ShapeError: Sites are missing or unknown, have other shapes, or there are too few draws.
        ModelError: Draws lie outside their site's support; the model has other sites than the guide, uses minibatches,
            or has no log density.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> exact = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> diagnose({"z": exact}, model).ok, diagnose({"z": 0.5 * exact}, model).ok
        (True, False)
    """
    check_whole("num_samples", num_samples, LEAST)
    check_model(model, seed)
    fit = source if isinstance(source, TrainedFit) else None
    guide = source.guide if isinstance(source, TrainedFit) else source
    if fit is not None and fit.guide.amortization is not None:
        others = Check.left_out("draws of one posterior", f"An amortized guide has many posteriors. {ONE}")
        return Report((check_run(fit), check_restarts(fit), check_lost_modes(fit.lost_modes), others))
    if is_guide(guide):
        target = target_of(guide, model, args, kwargs, seed)
        with RandomStream(seed):
            u = guide.sample_unconstrained(max(num_samples, 2 * target.layout.dim))
            pool = guide.sample_unconstrained(max(POOL_DRAWS, 40 * target.layout.dim))
    elif isinstance(guide, Mapping):
        draws = tensors_of(guide)
        first = {name: value[0] for name, value in draws.items()}
        target = Target.of(model, args, kwargs, first, seed)
        u, pool = thin(target.unconstrain(draws), num_samples), None
        if len(u) < (least := max(LEAST, 2 * target.layout.dim)):
            raise ShapeError(f"There must be at least {least} draws, got {len(u)}.")
    else:
        expected = "a fit, an ImplicitGuide, or draws {site: [S, *site shape]}"
        raise SetupError.must_be("source", expected, type(source).__name__)
    checks = [check_restarts(fit)] if fit is None else [check_run(fit), check_restarts(fit)]
    log_p, score = target.score(u)
    finite = log_p.isfinite() & score.isfinite().all(1)
    checks.append(check_density(finite))
    if not finite.all() and int(finite.sum()) < max(LEAST // 2, 2 * u.shape[1]):
        return Report(tuple(checks))
    u, score = u[finite], score[finite]
    try:
        few, slopes = thin(u, STEIN_DRAWS), thin(score, STEIN_DRAWS)
        kernel = kernel_stein(few, slopes, reference=u if pool is None else pool, seed=seed)
        checks += check_stein(target.layout, u, score, kernel)
    except ImplicitVIError as error:  # a collapsed fit: draws on a plane, or at a point
        return Report((*checks, Check("Stein discrepancy", "failed", None, None, "not defined", str(error))))
    checks += check_chains(target, u, seed)
    checks += check_sampler(guide if is_guide(guide) else None, target, pool, seed)
    return Report((*checks, check_predictive(target, u, seed)))


def stein_error(
    guide: TrainedGuide, model: Model, *args: Any, num_samples: int = STEIN_DRAWS, seed: int = 0, **kwargs: Any
) -> float:
    """Return `KernelStein.score_error` of a guide's draws, by which restarts are compared; infinite if not defined."""
    target = target_of(guide, model, args, kwargs, seed)
    with RandomStream(seed):
        pool = guide.sample_unconstrained(max(num_samples, DRAWS_PER_DIM * target.layout.dim))
    u = pool[:num_samples]
    score = target.score(u)[1]
    try:
        return kernel_stein(u, score, reference=pool, num_bootstrap=1, seed=seed).score_error
    except OptionError:  # a collapsed fit, or draws without a density
        return inf
