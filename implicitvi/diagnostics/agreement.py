"""Compare independent fits of one posterior: R-hat with the fits as chains, and the share of each mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from implicitvi.avb.multimodal import MixtureSampler
from implicitvi.diagnostics.posterior import TrainedGuide

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
