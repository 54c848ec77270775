"""Repeat a fit from other random numbers, and warn where the fits disagree."""

from __future__ import annotations

import warnings
from dataclasses import replace

from implicitvi.diagnostics.agreement import SHARE, Agreement, agreement
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
