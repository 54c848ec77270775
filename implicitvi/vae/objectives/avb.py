"""Adversarial variational Bayes: an implicit posterior, and an adversary that learns its log density."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from implicitvi.avb.adversaries import InformedAdversary
from implicitvi.avb.contrasts import Contrast
from implicitvi.avb.objective import AVBObjective
from implicitvi.avb.ratios import RatioLoss, ratio_of
from implicitvi.numerics.types import LogDensity
from implicitvi.training import Player, Stage
from implicitvi.vae.architectures import Architecture, ReadyMade
from implicitvi.vae.contrasts import EncoderSampler, contrast_of, opponents
from implicitvi.vae.model import Batch, Scored


class AVB(ReadyMade):
    """A latent variable model trained by adversarial variational Bayes, with or without Adaptive Contrast.

        E_q[log p(x, z) - log r(z | x) - T(x, z)]            T ≈ log q(z | x) - log r(z | x)

    Args:
        encoder: ``q(z | x)``: draws with gradients.
        decoder: ``p(x | z)``, with a density.
        prior: ``p(z)``; draws are enough for ``contrast="prior"``. The number ``D`` for ``N(0, I)``.
        adversary: ``T(z, x)``: codes ``[S, B, D]`` and data ``[B, *x_shape]`` to scores ``[S, B]``.
        contrast: ``"prior"`` for plain AVB; ``"gaussian"``, the default of `build`, for Adaptive Contrast: a Gaussian
            with the moments of ``q(z | x)``, in closed form for an encoder that has them, else from the draws of each
            datum (use ``num_particles`` of 8 or more); or a `Contrast`.
        ratio: ``"logistic"``, ``"fgan_kl"`` (the f-GAN form, eq. 6.10), ``"least_squares"``, or a `RatioLoss`.
        informed: Whether ``log p - log r`` is an input of the adversary (`InformedAdversary`).
        averaging: Decay of a running average of the adversary's weights, against which the encoder is trained.
        num_importance: Draws ``K`` in each importance-weighted bound.

    References:
        Adversarial Variational Bayes, Lars Mescheder, Sebastian Nowozin, Andreas Geiger, 2017; eq. 3.6 and 4.2.
    """

    needs = {"prior": {"draws"}, "encoder": {"draws", "gradients"}, "decoder": {"draws", "density"}}
    adversaries = ("pairs",)

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
        self.relative = contrast == "prior"
        sampler: Any = EncoderSampler(self.encoder)
        made = contrast_of(contrast, sampler, self.prior, self.like.new_zeros(1, *self.x_shape))
        network = self.adversary_of("pairs", adversary)
        self.adversary = InformedAdversary(network) if informed else network
        self.contrast = made
        options: Any = {"averaging": averaging, "num_importance": num_importance, "context_dims": len(self.x_shape)}
        self.ratio, self.averaging, self.num_importance = type(ratio_of(ratio)).__name__, averaging, num_importance
        self._objective = AVBObjective(sampler, self.contrast, self.adversary, ratio=ratio_of(ratio), **options)

    @classmethod
    def build(
        cls, networks: Architecture, z_dim: int, *, contrast: str | Contrast = "gaussian", **options: Any
    ) -> Self:
        plain = contrast == "prior"
        options["posterior"] = options.get("posterior") or (networks.noise if plain else "noise_basis")
        return super().build(networks, z_dim, square=plain, contrast=contrast, **options)

    @classmethod
    def faces(cls, z_dim: int = 64, *, contrast: str | Contrast = "prior", **options: Any) -> Self:
        return super().faces(z_dim, contrast=contrast, **options)  # plain AVB, as in the paper's code

    def players(self, batch: Batch) -> list[Player]:
        model = self.player("model", [self.encoder, self.decoder, self.prior], self._loss, batch)
        return [*opponents(self._objective, self._log_joint, batch), model]

    def learned_elbo(self, x: Tensor, num_samples: int = 1) -> Tensor:
        """Estimate the bound of data ``x [B, *x_shape]`` in nats: ``[⌈num_samples / K⌉, B]``."""
        self.check_shape(x)
        return self._objective.elbo(num_samples, self._log_joint(x), x)[0]

    @torch.no_grad()
    def validate(self, x: Tensor) -> dict[str, Tensor]:
        z = self.encode(x)
        return {"learned_elbo": self.learned_elbo(x).mean(), "log_likelihood": self.decoder(z).log_prob(x).mean()}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._objective.average is not None:  # it is not a part of the model
            self._objective.average._apply(fn, recurse)
            self._objective.list_weights()
        return self

    def _log_joint(self, x: Tensor) -> LogDensity:
        """Return ``log p(x, z)``, without ``log p(z)`` if the prior is the contrast and cancels."""
        return lambda z: self.decoder(z).log_prob(x) if self.relative else self.log_joint(z, x)

    def _loss(self, x: Tensor, stage: Stage) -> Scored:
        elbo, dropped = self._objective.elbo(stage.num_particles, self._log_joint(x), x)
        return (-elbo.mean() if len(elbo) else None), {"dropped": dropped}
