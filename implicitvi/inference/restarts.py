"""Repeat a fit from other random numbers, and warn where the fits disagree."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from implicitvi.avb.multimodal import MixtureSampler
from implicitvi.diagnostics.agreement import SHARE, Agreement
from implicitvi.diagnostics.posterior import TrainedGuide
from implicitvi.inference.fit import Fit
from implicitvi.rng import RandomStream


def together(fit: Fit, *others: Fit) -> Fit:
    """Return a fit with its restarts, and with how far they agree."""
    if not others:
        return fit
    found = None
    if fit.guide.amortization is None:
        with RandomStream(0):  # leaves the random numbers of the process alone
            found = agreement([each.guide for each in (fit, *others)])
    return replace(fit, restarts=others, agreement=found)


def warn_of_disagreement(found: Agreement) -> None:
    """Warn where independent fits do not agree."""
    if found.ok:
        return
    if found.spread > SHARE:
        advice = "take more steps, or one of fit.fits that has every mode; its resample() corrects their weights"
    else:
        advice = "take more steps, or fit.best(), whose draws are nearest to the posterior"
    warnings.warn(f"{found}. At least some of them are wrong: {advice}", stacklevel=3)


@torch.no_grad()
def agreement(guides: Sequence[TrainedGuide], *, num_samples: int = 4000) -> Agreement:
    """Compare guides of one posterior by their draws.

    Args:
        guides: Trained guides of the same model, at least two.
        num_samples: Number of draws of each.

    References:
        Rank-normalization, folding, and localization: An improved R-hat for assessing convergence of MCMC, Aki Vehtari,
        Andrew Gelman, Daniel Simpson, Bob Carpenter, Paul-Christian Bürkner, 2021.
    """
    import arviz

    u = torch.stack([guide.sample_unconstrained(num_samples) for guide in guides])
    r_hat = {
        name: float(arviz.rhat(u[..., i].double().numpy(force=True)))
        for i, name in enumerate(guides[0].layout.coordinates())
    }
    return Agreement(r_hat, _shares(guides, u))


def _shares(guides: Sequence[TrainedGuide], u: Tensor) -> Tensor:
    """Return the share of draws ``u [R, S, D]`` in each mode of the guide with the most modes: ``[R, K]``."""
    most = max(guides, key=lambda guide: guide.num_modes).sampler
    if not isinstance(most, MixtureSampler):
        return u.new_ones(len(u), 1)
    return torch.nn.functional.one_hot(most.modes(u), len(most.weights)).to(u).mean(1)
