"""Compare independent fits of one posterior: R-hat with the fits as chains, and the share of each mode."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from torch import Tensor

R_HAT = 1.01  # above it fits disagree; their means then differ by about 0.15 standard deviations
SHARE = 0.1  # of the draws: a mode whose share differs by more is lost, or found, by some of the fits


@dataclass(frozen=True)
class Agreement:
    """A comparison of independent fits of one posterior.

    Agreement proves little, as all may miss the same mode; disagreement proves that some are wrong.

    Attributes:
        r_hat: Rank-normalised split R-hat of every entry of every latent site, the fits as chains; 1 is best.
        shares: Share of each fit's draws in each far mode, ``[R, K]``; the modes are those of the fit with the most.
    """

    r_hat: dict[str, float]
    shares: Tensor

    @property
    def worst(self) -> tuple[str, float]:
        """Name and R-hat of the entry whose R-hat is largest; one that is not finite comes first."""
        name = max(self.r_hat, key=lambda k: self.r_hat[k] if isfinite(self.r_hat[k]) else 1e30)
        return name, self.r_hat[name]

    @property
    def spread(self) -> float:
        """Largest difference between two fits in the share of a mode."""
        return (self.shares.amax(0) - self.shares.amin(0)).max().item()

    @property
    def ok(self) -> bool:
        """True if every R-hat is at most 1.01 and all fits give each mode the same share, to within 0.1."""
        return self.worst[1] <= R_HAT and self.spread <= SHARE

    def __str__(self) -> str:
        name, value = self.worst
        count, modes = self.shares.shape
        said = f"{count} fits {'agree' if self.ok else 'DISAGREE'}: largest R-hat {value:.3f}, of {name}"
        if modes > 1:
            rows = (" ".join(f"{share:.2f}" for share in row) for row in self.shares.tolist())
            said += f"; shares of {modes} far modes, fit by fit: {', '.join(rows)}"
        return said
