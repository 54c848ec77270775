"""The adversarial autoencoder: reconstruction, and codes whose distribution over all data resembles the prior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from implicitvi.avb.ratios import Logistic
from implicitvi.training import Player, Stage
from implicitvi.vae.architectures import ReadyMade
from implicitvi.vae.model import Batch, Scored
from implicitvi.vae.objectives.pairs import codes, rows


class AAE(ReadyMade):
    """An adversarial autoencoder, three players in turn.

        encoder, decoder:  max  E_q[log p(x | z)]
        adversary:         min  E_q softplus(-T(z)) + E_p softplus(T(z))          T ≈ log q(z) - log p(z)
        encoder:           min  E_q softplus(T(z))

    Here ``q(z)`` is the distribution of the codes of all data. This is `AVB` with an adversary that does not look at
    ``x`` (Mescheder et al. 2017, section 6.2): it leaves the mutual information of ``x`` and ``z`` out of
    ``KL(q(z | x) ‖ p(z))``, so the objective is not a bound of the evidence.

    Args:
        encoder: ``q(z | x)``: draws with gradients; `DeterministicEncoder` is the usual one.
        decoder: ``p(x | z)``, with a density.
        prior: ``p(z)``, draws are enough; the number ``D`` for ``N(0, I)``.
        adversary: ``T(z)``: codes ``[..., D]`` to scores ``[...]``.

    References:
        Adversarial Autoencoders, Alireza Makhzani, Jonathon Shlens, Navdeep Jaitly, Ian Goodfellow, Brendan Frey, 2015.
    """

    needs = {"prior": {"draws"}, "encoder": {"draws", "gradients"}, "decoder": {"draws", "density"}}
    posterior = "deterministic"
    adversaries = ("codes",)

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: Any, adversary: nn.Module):
        super().__init__(encoder, decoder, prior)
        self.adversary, self.ratio = self.adversary_of("codes", adversary), Logistic()

    def players(self, batch: Batch) -> list[Player]:
        return [
            self.player("model", [self.encoder, self.decoder], self._loss, batch),
            self.player("adversary", [self.adversary], self._adversary_loss, batch, adversary=True),
            self.player("generator", [self.encoder], self._generator_loss, batch),
        ]

    def _codes(self, x: Tensor, stage: Stage) -> Tensor:
        z: Tensor = self.encoder(x).rsample(torch.Size([stage.num_particles]))
        return z

    def _loss(self, x: Tensor, stage: Stage) -> Scored:
        return -self.decoder(self._codes(x, stage)).log_prob(x).mean(), {}

    def _adversary_loss(self, x: Tensor, stage: Stage) -> Scored:
        z = rows(self._codes(x, stage)).detach()
        prior = codes(self.prior(), len(z))
        return self.ratio.loss(self.adversary(z), self.adversary(prior)), {}

    def _generator_loss(self, x: Tensor, stage: Stage) -> Scored:
        return softplus(self.adversary(self._codes(x, stage))).mean(), {}
