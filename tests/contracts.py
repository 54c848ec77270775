"""The members of each family, in one list each: every one is held to the same laws.

A new sampler, contrast, adversary or ratio loss joins its list here and is tested.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from implicitvi.avb.adversaries import GatedAdversary, ResidualAdversary
from implicitvi.avb.contrasts import (
    Contrast,
    DiagonalGaussianContrast,
    FlowContrast,
    GaussianContrast,
    MixtureContrast,
    PriorContrast,
)
from implicitvi.avb.multimodal import PerModeContrast
from implicitvi.avb.ratios import FGanKL, LeastSquares, Logistic, RatioLoss
from implicitvi.avb.samplers import (
    DenseSampler,
    GatedSampler,
    NoiseBasisSampler,
    ResidualSampler,
    Sampler,
    SemiImplicitSampler,
)

D = 3

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "gated": GatedSampler,
    "dense": DenseSampler,
    "residual": ResidualSampler,
    "noise_basis": NoiseBasisSampler,
    "semi_implicit": SemiImplicitSampler,
}
CONTRASTS: dict[str, Callable[[], Contrast]] = {
    "prior": lambda: PriorContrast(gaussian(seed=5)),
    "diagonal": DiagonalGaussianContrast,
    "gaussian": GaussianContrast,
    "mixture": lambda: MixtureContrast(D, components=3),
    "flow": lambda: FlowContrast(D, hidden=(16,)),
    "modal": lambda: PerModeContrast(
        [GaussianContrast(), MixtureContrast(D, components=2)],
        torch.tensor([0.5, 0.5]),
        torch.tensor([[0.0] * D, [3.0] * D]),
        torch.eye(D).repeat(2, 1, 1),
    ),
}
ADVERSARIES: dict[str, Callable[..., nn.Module]] = {
    "gated": lambda dim, context_dim=0: GatedAdversary(dim, context_dim=context_dim, width=16),
    "residual": lambda dim, context_dim=0: ResidualAdversary(dim, context_dim=context_dim, width=16, blocks=1),
}
RATIOS: dict[str, RatioLoss] = {"logistic": Logistic(), "fgan_kl": FGanKL(), "least_squares": LeastSquares()}


def gaussian(seed: int, dim: int = D) -> MultivariateNormal:
    """A Gaussian with a random mean and a random, well-conditioned covariance, in float64."""
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(dim, generator=generator, dtype=torch.float64)
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return MultivariateNormal(loc, torch.eye(dim, dtype=torch.float64) + 0.3 * root @ root.mT)


class ExplicitSampler(Sampler):
    """A Gaussian dressed as an implicit distribution: its density is known, to the test alone."""

    def __init__(self, q: MultivariateNormal):
        super().__init__(len(q.loc))
        self.double()
        self.shift = nn.Parameter(torch.zeros_like(q.loc))
        self.set_affine(q.loc, q.scale_tril)

    def transform(self, eps: Tensor, x: Tensor | None = None) -> Tensor:
        return eps + self.shift


class OracleContrast(Contrast):
    """Any contrast, remembered for the oracle; leaves the adversary's input as it is."""

    def __init__(self, inner: Contrast):
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor, x: Tensor | None = None) -> torch.distributions.Distribution:
        self.r = self.inner(z)
        return self.r

    def standardise(self, z: Tensor, r: torch.distributions.Distribution) -> Tensor:
        return z


class OracleAdversary(nn.Module):
    """The optimal adversary, ``log q - log r``."""

    def __init__(self, q: MultivariateNormal, contrast: OracleContrast):
        super().__init__()
        self.q = q
        self.contrast = contrast

    def forward(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        log_ratio: Tensor = self.q.log_prob(z) - self.contrast.r.log_prob(z)
        return log_ratio
