"""Adversarial variational Bayes: an implicit posterior, and an adversary that learns what its density would say."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from implicitvi.avb import objective as objectives
from implicitvi.avb.adversaries import InformedAdversary
from implicitvi.avb.conditional import MomentContrast
from implicitvi.avb.contrasts import Contrast, DiagonalGaussianContrast, PriorContrast
from implicitvi.avb.players import Turn, adversary_players
from implicitvi.avb.ratios import RATIOS, RatioLoss
from implicitvi.errors import ModelError, check_choice
from implicitvi.numerics.types import LogDensity
from implicitvi.training import Player, Stage
from implicitvi.training.player import Metrics
from implicitvi.vae.architectures import Architecture, ReadyMade
from implicitvi.vae.decoders import Likelihood
from implicitvi.vae.distributions import Implicit, has_density
from implicitvi.vae.encoders import Encoded
from implicitvi.vae.model import Batch, LatentModel

CONTRASTS = ("prior", "gaussian")


class AVB(ReadyMade, LatentModel):
    """Adversarial variational Bayes of a latent variable model, with or without Adaptive Contrast.

        E_q[log p(x, z) - log r(z | x) - T(x, z)]            T ≈ log q(z | x) - log r(z | x)

    Args:
        encoder: ``q(z | x)``: draws with gradients.
        decoder: ``p(x | z)``, with a density.
        prior: ``p(z)``; draws are enough for ``contrast="prior"``. The number ``D`` for ``N(0, I)``.
        adversary: ``T(z, x)``: codes ``[S, B, D]`` and data ``[B, *x_shape]`` to scores ``[S, B]``.
        contrast: ``"prior"`` for plain AVB; ``"gaussian"`` for Adaptive Contrast: a Gaussian with the moments of
            ``q(z | x)``, in closed form for an encoder that has them, else from the draws of each datum
            (take ``num_particles`` of 8 or more); or a `Contrast`.
        ratio: ``"logistic"``, ``"fgan_kl"`` (the f-GAN form, eq. 6.10), ``"least_squares"``, or a `RatioLoss`.
        informed: Whether the adversary is shown ``log p - log r`` (`InformedAdversary`).
        averaging: Share of a running average of the adversary's weights that outlives each of its steps; the encoder is
            shown the average.
        num_importance: Draws in each importance-weighted bound.

    References:
        Adversarial Variational Bayes, Lars Mescheder, Sebastian Nowozin, Andreas Geiger, 2017; eq. 3.6 and 4.2.
    """

    needs = {"prior": {"draws"}, "encoder": {"draws", "gradients"}, "decoder": {"draws", "density"}}

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        prior: Any,
        adversary: nn.Module,
        *,
        contrast: str | Contrast = "prior",
        ratio: str | RatioLoss = "logistic",
        informed: bool = False,
        averaging: float = 0.0,
        num_importance: int = 1,
    ):
        super().__init__(encoder, decoder, prior)
        if isinstance(ratio, str):
            check_choice("ratio", ratio, RATIOS)
            ratio = RATIOS[ratio]()
        if isinstance(contrast, str):
            check_choice("contrast", contrast, CONTRASTS)
        self.relative = contrast == "prior"
        if not self.relative and not has_density(self.prior()):
            raise ModelError(
                "Adaptive Contrast needs a density of the prior, and it has none",
                do="Use contrast='prior', which needs its draws only.",
            )
        self.adversary = InformedAdversary(adversary) if informed else adversary
        self._draws = _Remembering(self.encoder)
        self.contrast = self._contrast(contrast)
        self._objective = objectives.AVBObjective(
            self._draws,  # type: ignore[arg-type]  # all it asks of a sampler is draws
            self.contrast,
            self.adversary,
            ratio=ratio,
            averaging=averaging,
            num_importance=num_importance,
            context_dims=len(self.x_shape),
        )

    @classmethod
    def assemble(
        cls,
        networks: Architecture,
        z_dim: int,
        *,
        contrast: str | Contrast = "gaussian",
        posterior: str | None = None,
        likelihood: str | Likelihood = "bernoulli",
        prior: Any = None,
        noise_dim: int | None = None,
        num_basis: int | None = None,
        ratio: str | RatioLoss = "logistic",
        informed: bool = False,
        averaging: float = 0.0,
        num_importance: int = 1,
    ) -> Self:
        """The system of ready-made networks.

        Args:
            networks: What encoder, decoder and adversary are made of.
            z_dim: Dimension ``D`` of a code.
            contrast: As for the class, but ``"gaussian"`` where nothing is said.
            posterior: ``"implicit"``, ``"injected"`` or ``"noise_basis"``; see `Architecture.encoder`. ``None`` for a
                noise basis under Adaptive Contrast, and the networks' own kind under the prior.
            likelihood: A key of `LIKELIHOODS`, or a `Likelihood`.
            prior: As for the class; ``None`` for ``N(0, I)``.
            noise_dim: Dimension of the noise; ``None`` for ``2 D``, and at least 8.
            num_basis: Networks of a noise basis; ``None`` for ``D``, and at least 8.
            ratio: As for the class.
            informed: As for the class.
            averaging: As for the class.
            num_importance: As for the class.
        """
        alone = contrast == "prior"
        if posterior is None:
            posterior = networks.noise if alone else "noise_basis"
        return cls(
            *networks.arrows(z_dim, posterior, likelihood, prior, noise_dim=noise_dim, num_basis=num_basis),
            networks.adversary(z_dim, square=alone),
            contrast=contrast,
            ratio=ratio,
            informed=informed,
            averaging=averaging,
            num_importance=num_importance,
        )

    @classmethod
    def faces(cls, z_dim: int = 64, *, contrast: str | Contrast = "prior", **options: Any) -> Self:
        """The system of `face_networks`, with the prior as contrast as in the paper's code; see `ReadyMade.faces`."""
        return super().faces(z_dim, contrast=contrast, **options)

    def players(self, batch: Batch) -> list[Player]:
        objective = self._objective

        def contrast_losses(stage: Stage) -> Turn:
            for _ in range(stage.adversary_steps):
                yield objective.contrast_loss(stage.num_particles, batch()), {}

        def adversary_losses(stage: Stage) -> Turn:
            x = batch()
            for loss in objective.adversary_losses(stage.num_particles, stage.adversary_steps, self._log_joint(x), x):
                yield loss, {}

        arrows = [self.encoder, self.decoder, self.prior]
        opponents = adversary_players("adversary", objective, contrast_losses, adversary_losses)
        return [*opponents, self.player("model", arrows, self._loss, batch)]

    def learned_elbo(self, x: Tensor, num_samples: int = 1) -> Tensor:
        """The objective of each datum ``x [B, *x_shape]``: ``[num_samples, B]`` in nats, an estimate and no bound."""
        return self._objective.elbo(num_samples, self._log_joint(x), x)[0]

    @torch.no_grad()
    def validate(self, x: Tensor) -> dict[str, Tensor]:
        z = self.encode(x)
        return {"learned_elbo": self.learned_elbo(x, 1).mean(), "log_likelihood": self.decoder(z).log_prob(x).mean()}

    def _log_joint(self, x: Tensor) -> LogDensity:
        """``log p(x, z)``, less ``log p(z)`` where the prior is the contrast and cancels."""
        if self.relative:
            return lambda z: self.decoder(z).log_prob(x)
        return lambda z: self.log_joint(z, x)

    def _loss(self, x: Tensor, stage: Stage) -> tuple[Tensor | None, Metrics]:
        elbo, dropped = self._objective.elbo(stage.num_particles, self._log_joint(x), x)
        return (-elbo.mean() if len(elbo) else None), {"dropped": dropped}

    def _contrast(self, contrast: str | Contrast) -> Contrast:
        if isinstance(contrast, Contrast):
            return contrast
        if contrast == "prior":
            return _DrawsOfPrior(self.prior)
        blank = self.encoder(torch.zeros(1, *self.x_shape, device=self.device))
        if isinstance(blank, Encoded) and blank.has_moments:
            return MomentContrast(self._draws.moments)  # a method: a copy of the model takes its own
        return DiagonalGaussianContrast()


class _Remembering:
    """An encoder as a sampler, which remembers what it has encoded, for the contrast that is asked right after."""

    def __init__(self, encoder: nn.Module):
        self._encoder = encoder
        self._last: tuple[Tensor, Encoded] | None = None

    def __call__(self, num_samples: int, x: Tensor) -> Tensor:
        q = self._encoder(x)
        if isinstance(q, Encoded):  # no one asks for others
            self._last = (x, q)
        z: Tensor = q.rsample(torch.Size([num_samples]))
        return z

    def moments(self, num_samples: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Conditional moments given ``x``, of the last draws where they were of it; they are forgotten."""
        last, self._last = self._last, None
        q = last[1] if last is not None and last[0] is x else self._encoder(x)
        mean, cov = q.moments(num_samples)
        return mean, cov


class _DrawsOfPrior(PriorContrast):
    """The prior as a contrast that is only drawn from: all log densities are relative to it."""

    def __init__(self, prior: nn.Module):
        p = prior()
        super().__init__(p)
        self._prior = (prior,)  # a tuple: it belongs to the model

    def forward(self, z: Tensor, x: Tensor | None = None) -> Distribution:
        return _Relative(self._prior[0]())


class _Relative(Implicit):
    """A distribution whose log density relative to itself is 0."""

    def __init__(self, p: Distribution):
        super().__init__(p.sample, p.batch_shape, p.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_zeros(value.shape[:-1])
