"""The adversarial symmetric variational autoencoder: both Kullback-Leibler divergences of the two joints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from implicitvi.avb.ratios import Logistic
from implicitvi.training import Player, Stage
from implicitvi.vae.architectures import ReadyMade
from implicitvi.vae.model import Batch, Scored
from implicitvi.vae.objectives.pairs import codes, parted, rows


class ASVAE(ReadyMade):
    """An adversarial symmetric VAE: encoder and decoder exchange their roles in the two halves of the objective.

        E_q[log p(x | z) - T_q(z, x)] + E_p[log q(z | x) - T_p(z, x)]

        T_q ≈ log q(x, z) - log p(x) p(z),        T_p ≈ log p(x, z) - log q(x) q(z)

    At the optimal adversaries the first half is ``E log p(x) - KL(q(x, z) ‖ p(x, z))`` over the data and the second
    ``E log q(z) - KL(p(x, z) ‖ q(x, z))`` over the prior. With the adversaries held fixed, as here, the gradient is
    that of the two divergences. The form is reconstructed from the text of the publication and its reviews.

    Start from an encoder and a decoder that a `VAE` has trained for a while; the constructor takes them unchanged. From
    scratch the log densities pull harder than untrained adversaries (docs/decisions/0003-second-divergence.md).

    Args:
        encoder: ``q(z | x)``: draws with gradients, and a density.
        decoder: ``p(x | z)``: draws with gradients, and a density.
        prior: ``p(z)``, draws are enough; the number ``D`` for ``N(0, I)``.
        encoder_adversary: ``T_q(z, x)``: codes ``[..., N, D]`` and data ``[N, *x_shape]`` to scores ``[..., N]``.
        decoder_adversary: ``T_p(z, x)``, likewise.

    References:
        Adversarial Symmetric Variational Autoencoder, Yunchen Pu et al., 2017.
    """

    needs = {"prior": {"draws"}} | dict.fromkeys(("encoder", "decoder"), {"draws", "gradients", "density"})
    likelihood = "straight_through"
    adversaries = ("pairs", "pairs")

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        prior: Any,
        encoder_adversary: nn.Module,
        decoder_adversary: nn.Module,
    ):
        super().__init__(encoder, decoder, prior)
        self.encoder_adversary = self.adversary_of("pairs", encoder_adversary, "encoder_adversary")
        self.decoder_adversary = self.adversary_of("pairs", decoder_adversary, "decoder_adversary")
        self.ratio = Logistic()

    def players(self, batch: Batch) -> list[Player]:
        adversaries = [self.encoder_adversary, self.decoder_adversary]
        adversary = self.player("adversary", adversaries, self._adversary_loss, batch, adversary=True)
        return [adversary, self.player("model", [self.encoder, self.decoder], self._loss, batch)]

    def terms(self, x: Tensor, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Return the halves of the objective in nats, ``[S, B]`` and ``[S · B]``, with ``S`` codes for each datum."""
        self.check_shape(x)
        z = self.encoder(x).rsample(torch.Size([num_samples]))
        of_data: Tensor = self.decoder(z).log_prob(x) - self.encoder_adversary(z, x)
        z_p, x_p = self._model_pairs(z)
        of_codes: Tensor = self.encoder(x_p).log_prob(z_p) - self.decoder_adversary(z_p, x_p)
        return of_data, of_codes

    def _loss(self, x: Tensor, stage: Stage) -> Scored:
        of_data, of_codes = (term.mean() for term in self.terms(x, stage.num_particles))
        return -of_data - of_codes, {"data_term": of_data, "code_term": of_codes}

    def _adversary_loss(self, x: Tensor, stage: Stage) -> Scored:
        with torch.no_grad():
            z_q = self.encoder(x).sample(torch.Size([stage.num_particles]))
            z_p, x_p = self._model_pairs(z_q)
            z_other = codes(self.prior(), len(z_p))
        t_q, t_p = self.encoder_adversary, self.decoder_adversary
        loss = self.ratio.loss(t_q(z_q, x), t_q(z_other, x_p))
        return loss + self.ratio.loss(t_p(z_p, x_p), t_p(parted(z_q), x)), {}

    def _model_pairs(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return pairs ``z [N, D]``, ``x [N, *x_shape]`` of the model, as many as codes ``like [S, B, D]``."""
        z = codes(self.prior(), len(rows(like)))
        return z, self.decoder(z).rsample()
