"""Whether independent fits of one posterior agree: R-hat with the fits as chains, and how they share out the modes."""

from __future__ import annotations

import warnings
from pathlib import Path

from implicitvi.diagnostics.agreement import SHARE, Agreement


def warn_of_disagreement(found: Agreement) -> None:
    """Warn where independent fits do not agree."""
    if found.ok:
        return
    if found.spread > SHARE:
        advice = "take more steps, or one of fit.fits that has every mode; its resample() weighs them anew"
    else:
        advice = "take more steps, or fit.best(), whose draws are nearest to the posterior"
    warnings.warn(f"{found}. At least some of them are wrong: {advice}", stacklevel=3)


def restart_folder(folder: str | Path, key: int) -> Path:
    """Where a fit's folder keeps its restart of this number, counted from 1."""
    return Path(folder) / f"restart-{key}"
