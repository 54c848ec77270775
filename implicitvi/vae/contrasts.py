"""Contrast and adversary of an encoder: plain AVB with the prior, or Adaptive Contrast with the encoder's moments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from implicitvi.avb.conditional import MomentContrast
from implicitvi.avb.contrasts import Contrast, DiagonalGaussianContrast, PriorContrast
from implicitvi.avb.objective import AVBObjective
from implicitvi.avb.players import Turn, adversary_players
from implicitvi.avb.samplers import NoiseBasisSampler
from implicitvi.errors import ModelError, check_choice
from implicitvi.numerics.types import LogDensity
from implicitvi.training import Player, Stage
from implicitvi.vae.distributions import Implicit, has_density
from implicitvi.vae.encoders import Encoded


def contrast_of(contrast: str | Contrast, sampler: EncoderSampler, prior: nn.Module, blank: Tensor) -> Contrast:
    """Return a contrast by its name, or the given one unchanged; ``blank`` is a datum of zeros, ``[1, *x_shape]``."""
    if isinstance(contrast, str):
        check_choice("contrast", contrast, ("prior", "gaussian"))
    if contrast == "prior":
        return DrawsOfPrior(prior)
    if not has_density(prior()):
        raise ModelError("The prior must have a density for Adaptive Contrast. Use contrast='prior', which does not.")
    if isinstance(contrast, Contrast):
        return contrast
    q = sampler.encoder(blank)
    in_closed_form = isinstance(q, Encoded) and isinstance(q.sampler, NoiseBasisSampler)
    # a method: a copy of the model takes that of its own sampler
    return MomentContrast(sampler.moments) if in_closed_form else DiagonalGaussianContrast()


def opponents(
    objective: AVBObjective, log_joint: Callable[[Tensor], LogDensity], batch: Callable[[], Tensor]
) -> list[Player]:
    """Return the adversary of an objective as a player, after its contrast if that has parameters."""

    def contrast_losses(stage: Stage) -> Turn:
        for _ in range(stage.adversary_steps):
            yield objective.contrast_loss(stage.num_particles, batch()), {}

    def adversary_losses(stage: Stage) -> Turn:
        x = batch()
        for loss in objective.adversary_losses(stage.num_particles, stage.adversary_steps, log_joint(x), x):
            yield loss, {}

    return adversary_players("adversary", objective, contrast_losses, adversary_losses)


class EncoderSampler:
    """An encoder as a sampler; it keeps its last distribution for a contrast that asks for moments right after."""

    def __init__(self, encoder: nn.Module):
        self.encoder = encoder
        self._last: tuple[Tensor, Encoded] | None = None

    def __call__(self, num_samples: int, x: Tensor) -> Tensor:
        """Return codes ``[num_samples, B, D]`` of data ``x [B, *x_shape]``."""
        q = self.encoder(x)
        if isinstance(q, Encoded):  # only these have moments
            self._last = (x, q)
        z: Tensor = q.rsample(torch.Size([num_samples]))
        return z

    def moments(self, num_samples: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean ``[B, D]`` and covariance ``[B, D, D]`` of ``q(z | x)``; forget the last distribution."""
        last, self._last = self._last, None
        q: Encoded = last[1] if last is not None and last[0] is x else self.encoder(x)
        return q.moments(num_samples)


class DrawsOfPrior(PriorContrast):
    """A prior, a module, that serves as contrast by its draws: all log densities are relative to it."""

    def __init__(self, prior: nn.Module):
        super().__init__(prior())
        self._prior = (prior,)  # a tuple: it belongs to the model

    def forward(self, z: Tensor, x: Tensor | None = None) -> Distribution:
        return _Relative(self._prior[0]())


class _Relative(Implicit):
    """A distribution whose log density relative to itself is 0."""

    def __init__(self, p: Distribution):
        super().__init__(p.sample, p.batch_shape, p.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_zeros(value.shape[:-1])
