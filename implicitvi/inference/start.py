"""Find where a fit starts: a point that the model accepts, then a Gaussian close to the posterior, in any units."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor

from implicitvi.errors import ModelError
from implicitvi.inference.gaussian_fit import best_gaussian, gaussian_fit, refine_gaussian
from implicitvi.inference.pathfinder import pathfinder
from implicitvi.numerics.types import LogDensity
from implicitvi.pyro_model.target import Target
from implicitvi.rng import RandomStream

Place = tuple[Tensor, Tensor]  # mean [D] and lower triangular scale [D, D]
TRIES = 100
PATHS, FEW = 32, 4  # paths uphill; of a model that is scored in a loop
PATH_STEPS = 100  # most steps of each
ENTRIES = 4_000_000  # most entries of the inverse Hessians of all paths
SCALE_DRAWS = 100  # of the prior, for the first scale of each coordinate
TRIED = 4  # Gaussians of the paths to refine, if scoring is fast
LOOKS = 8  # minibatches, and draws in each, to compare two Gaussians
WIDEST = 200  # most dimensions in which a Gaussian is refined


def starting_point(log_joint: LogDensity, u: Tensor, describe: Callable[[Tensor], str]) -> Tensor:
    """Return ``u [D]`` if its log density and gradient are finite, else the first such of 100 random points.

    Args:
        log_joint: Log density of points ``[S, D]``.
        u: The point to try first.
        describe: Function that names the sites of a point ``[D]`` that are not finite.

    Raises:
        ModelError: There is no such point; lists the sites and values of the first.
    """
    for attempt in range(TRIES + 1):
        candidate = u if attempt == 0 else torch.rand_like(u) * 4 - 2
        v = candidate.detach()[None].requires_grad_()
        with torch.enable_grad():
            score = log_joint(v).sum()
            if score.isfinite() and torch.autograd.grad(score, v)[0].isfinite().all():
                return candidate
    got = describe(u) or "a finite log density whose gradient is not finite"
    advice = "Look for NaN in the data, observations outside their support, and priors that exclude the data."
    message = f"The log density must be finite at the start or at one of {TRIES} random points, got {got}. {advice}"
    raise ModelError(message, faq="the-log-density-is-not-finite-at-the-start")


def first_gaussian(
    target: Target, start: Tensor, *, parameters: Sequence[Tensor], num_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the Gaussian that a fit starts from, in any units: by paths from a point and from draws of the prior.

    The best Gaussian of the paths is refined by natural gradient (`refine_gaussian`). With parameters, minibatches or
    more than 200 dimensions Adam improves it instead.

    Args:
        target: The target, in its mode of scoring.
        start: A point ``[D]`` with a finite log density.
        parameters: Leaves of the log density to fit with the Gaussian.
        num_steps: Steps of Adam, and most steps of the paths if below 100.

    Returns:
        Mean ``[D]``, lower triangular scale ``[D, D]``, and the ends ``[N, D]`` of the paths.
    """
    noisy, loop, dim = bool(target.log_joint.minibatches), target.log_joint.mode == "loop", len(start)
    log_joint = _pinned(target) if noisy else target
    starts, scale = _starts(target, start, count=FEW if loop else min(PATHS, max(FEW, ENTRIES // dim**2)))
    paths = pathfinder(log_joint, starts, scale, num_steps=min(num_steps, PATH_STEPS))
    place, fit = paths.gaussian(int(paths.elbo.argmax())), None
    if noisy:
        place = _of_minibatches(target, place, (start, torch.diag(scale)))
    if parameters or noisy or dim > WIDEST:
        place = gaussian_fit(target, *place, parameters=parameters, num_steps=num_steps)
    if not noisy and dim <= WIDEST:
        fit = (
            refine_gaussian(target, *place) if parameters else best_gaussian(target, paths, tries=1 if loop else TRIED)
        )
    if fit is not None and fit.arrived:
        place = fit.loc, fit.scale_tril
    elif not noisy and dim <= WIDEST:
        off = "unknown" if fit is None else f"about {fit.slope.abs().max().item():.1g} standard deviations"
        warnings.warn(
            f"The start of the fit has not arrived at the best Gaussian; its mean is off by {off}. Check whether every "
            "prior is proper and the posterior has a mean, and look at fit.diagnose() before you use the draws.",
            stacklevel=7,
        )
    return *place, paths.u


def _pinned(target: Target) -> LogDensity:
    """Return the target with the same minibatch at every look."""

    def log_joint(u: Tensor) -> Tensor:
        with RandomStream(0):
            return target(u)

    return log_joint


def _of_minibatches(target: Target, found: Place, first: Place) -> Place:
    """Return the Gaussian that Adam sets out from where each look at the target sees another minibatch.

    That of one minibatch of ``B`` of ``N`` rows is off by about ``sqrt(N / B)`` standard deviations, so it is made as
    much wider. It must have a higher ELBO than the first guess in other minibatches too: with a control variate the
    density of a single one need not be bounded.
    """
    widths = [sqrt(size / part) for size, part in target.log_joint.minibatches.values() if size]
    found = found[0], found[1] * max(widths, default=1.0)

    def elbo(loc: Tensor, scale_tril: Tensor) -> float:
        eps = torch.randn(LOOKS, LOOKS, len(loc)).to(loc)
        with torch.no_grad():
            log_p = torch.stack([target(loc + each @ scale_tril.mT) for each in eps])
        return float(log_p.nan_to_num(-torch.inf).mean() + scale_tril.diagonal().log().sum())

    return found if elbo(*found) > elbo(*first) else first


def _starts(target: Target, start: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """Return points ``[count, D]``, the start and draws of the prior, and the scales ``[D]`` of the prior.

    Without draws of the prior the points are Stan's, uniform within 2 of the origin.
    """
    draws = target.prior_draws(max(count, SCALE_DRAWS), start, int(torch.randint(2**31, ()).item()))
    scale = torch.ones_like(start)
    if draws is not None:
        draws = draws[draws.isfinite().all(1)]
    if draws is None or not len(draws):
        draws = 4 * torch.rand(count, len(start)).to(start) - 2
    else:
        low, high = draws.quantile(draws.new_tensor([0.16, 0.84]), 0)
        scale = ((high - low) / 2).where(high > low, 1.0)
    return torch.cat([start[None], draws[: count - 1]]), scale
