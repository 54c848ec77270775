"""The symmetric variational autoencoder with a contrast: one adversary, of data only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from implicitvi.avb.contrasts import Contrast, GaussianContrast
from implicitvi.avb.ratios import Logistic
from implicitvi.errors import check_at_least
from implicitvi.training import Player, Stage
from implicitvi.vae.distributions import divergence
from implicitvi.vae.model import Batch, LatentModel, Scored
from implicitvi.vae.objectives.pairs import codes


class MarginalASVAE(LatentModel):
    """A symmetric VAE that learns only the density of the data and takes every other density as it is.

        E_q[log p(x | z)] - KL(q(z | x) ‖ p(z))
            - λ E_p[log p(x | z) + log p(z) - log q(z | x) - log r(x) - T(x)]            T ≈ log q(x) - log r(x)

    Of ``KL(p(x, z) ‖ q(x, z))`` only ``q(x)``, the density of the data, is unknown. One adversary learns it against a
    contrast ``r(x)`` that follows the data, as in Adaptive Contrast; at its optimum the objective is the ELBO less
    ``λ KL(p(x, z) ‖ q(x, z))``. Start from an encoder and a decoder that a `VAE` has trained, as for `ASVAE`.

    Args:
        encoder: ``q(z | x)``: draws with gradients, and a density.
        decoder: ``p(x | z)``: draws with gradients, and a density.
        prior: ``p(z)``, with a density; the number ``D`` for ``N(0, I)``.
        adversary: ``T(x)``: standardised data ``[N, *x_shape]`` to scores ``[N]``.
        contrast: ``r(x)``, made from the data of a batch, each in one row; ``None`` for a Gaussian with their moments.
        weight: ``λ``; 0 is the `VAE`.

    References:
        Adversarial Symmetric Variational Autoencoder, Yunchen Pu et al., 2017: the two divergences.
        Adversarial Variational Bayes, Lars Mescheder, Sebastian Nowozin, Andreas Geiger, 2017, section 4: the contrast.
    """

    needs = {"prior": {"draws", "density"}} | dict.fromkeys(("encoder", "decoder"), {"draws", "gradients", "density"})

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        prior: Any,
        adversary: nn.Module,
        *,
        contrast: Contrast | None = None,
        weight: float = 1.0,
    ):
        check_at_least("weight", weight, 0)
        super().__init__(encoder, decoder, prior)
        self.adversary, self.weight, self.ratio = self.adversary_of("data", adversary), weight, Logistic()
        self.contrast = GaussianContrast() if contrast is None else contrast

    def players(self, batch: Batch) -> list[Player]:
        adversary = self.player("adversary", [self.adversary], self._adversary_loss, batch, adversary=True)
        return [adversary, self.player("model", [self.encoder, self.decoder, self.prior], self._loss, batch)]

    def elbo(self, x: Tensor, num_samples: int = 1) -> Tensor:
        """Return the evidence lower bound of each datum ``x [B, *x_shape]``: ``[num_samples, B]`` in nats."""
        self.check_shape(x)
        z = (q := self.encoder(x)).rsample(torch.Size([num_samples]))
        elbo: Tensor = self.decoder(z).log_prob(x) - divergence(q, self.prior(), z)
        return elbo

    def reverse(self, x: Tensor, num_samples: int) -> Tensor:
        """Return ``log p(x, z) - log q(x, z)`` at pairs of the model, ``[num_samples]``; data ``x [B, *x_shape]``."""
        prior = self.prior()
        z = codes(prior, num_samples)
        p = self.decoder(z)
        made, r = p.rsample(), self.contrast(x.flatten(1))
        log_data = r.log_prob(made.flatten(1)) + self._score(made, r)
        log_ratio: Tensor = p.log_prob(made) + prior.log_prob(z) - self.encoder(made).log_prob(z) - log_data
        return log_ratio

    @torch.no_grad()
    def validate(self, x: Tensor) -> dict[str, Tensor]:
        return {"elbo": self.elbo(x).mean()}

    def _score(self, x: Tensor, r: Distribution) -> Tensor:
        """Return ``T`` of data ``x [N, *x_shape]``, in the coordinates of the contrast."""
        standard = self.contrast.standardise(x.flatten(1), r)[:, : x[0].numel()]
        return self.ratio.log_ratio(self.adversary(standard.view_as(x)))

    def _loss(self, x: Tensor, stage: Stage) -> Scored:
        count = stage.num_particles
        elbo, reverse = self.elbo(x, count).mean(), self.reverse(x, count * len(x)).mean()
        return self.weight * reverse - elbo, {"elbo": elbo, "reverse_kl": reverse}

    def _adversary_loss(self, x: Tensor, stage: Stage) -> Scored:
        with torch.no_grad():
            r = self.contrast(x.flatten(1))
            drawn = r.sample(torch.Size([len(x)])).view_as(x)
        return self.ratio.loss(self._score(x, r), self._score(drawn, r)), {}
