"""Adversarially learned inference: one adversary of codes and data, no density."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from implicitvi.avb.ratios import Logistic
from implicitvi.errors import check_at_least
from implicitvi.training import Player, Stage
from implicitvi.vae.architectures import ReadyMade
from implicitvi.vae.model import Batch, Scored
from implicitvi.vae.objectives.pairs import codes, rows, slope


class ALI(ReadyMade):
    """An adversarially learned inference model (BiGAN), trained to equal joints ``q(x) q(z | x) = p(z) p(x | z)``.

        adversary:         min  E_q softplus(-T) + E_p softplus(T)                T ≈ log q(x, z) - log p(x, z)
        encoder, decoder:  min  E_q softplus(T) + E_p softplus(-T)  +  λ E_q |x - x'|²

    The second line is the first with the labels swapped, which leaves a gradient where the adversary wins. At the
    optimal adversary the first is worth ``2 log 2 - 2 JS`` and the second
    ``2 log 2 + KL(q ‖ p) + KL(p ‖ q) - 2 JS``, which is least for equal joints. ``x'`` is a draw of the decoder at
    the encoder's code: with ``cycle = λ`` above 0 this is ALICE, whose codes reconstruct their data.

    Data of 0 and 1 need the likelihood ``"straight_through"``.

    Args:
        encoder: ``q(z | x)``: draws with gradients.
        decoder: ``p(x | z)``: draws with gradients.
        prior: ``p(z)``, draws are enough; the number ``D`` for ``N(0, I)``.
        adversary: ``T(z, x)``: codes ``[..., N, D]`` and data ``[N, *x_shape]`` to scores ``[..., N]``.
        cycle: Weight ``λ`` of the squared error of the reconstruction, summed over the entries of a datum.
        penalty: Weight of the adversary's squared slope on encoder pairs; it calms training and biases the log ratio.

    References:
        Adversarially Learned Inference, Vincent Dumoulin et al., 2017.
        Adversarial Feature Learning, Jeff Donahue, Philipp Krähenbühl, Trevor Darrell, 2017.
        ALICE: Towards Understanding Adversarial Learning for Joint Distribution Matching, Chunyuan Li et al., 2017.
    """

    needs = {"prior": {"draws"}, "encoder": {"draws", "gradients"}, "decoder": {"draws", "gradients"}}
    likelihood = "straight_through"
    adversaries = ("pairs",)

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        prior: Any,
        adversary: nn.Module,
        *,
        cycle: float = 0.0,
        penalty: float = 0.0,
    ):
        check_at_least("cycle", cycle, 0)
        check_at_least("penalty", penalty, 0)
        super().__init__(encoder, decoder, prior)
        self.adversary, self.ratio = self.adversary_of("pairs", adversary), Logistic()
        self.cycle, self.penalty = cycle, penalty

    def players(self, batch: Batch) -> list[Player]:
        adversary = self.player("adversary", [self.adversary], self._adversary_loss, batch, adversary=True)
        return [adversary, self.player("model", [self.encoder, self.decoder], self._loss, batch)]

    def _adversary_loss(self, x: Tensor, stage: Stage) -> Scored:
        with torch.no_grad():
            z_q, z_p, x_p = self._draws(x, stage)
        loss = self.ratio.loss(self.adversary(z_q, x), self.adversary(z_p, x_p))
        return (loss + 0.5 * self.penalty * slope(self.adversary, z_q, x) if self.penalty else loss), {}

    def _loss(self, x: Tensor, stage: Stage) -> Scored:
        z_q, z_p, x_p = self._draws(x, stage)
        loss = self.ratio.loss(self.adversary(z_p, x_p), self.adversary(z_q, x))
        if not self.cycle:
            return loss, {}
        error = (self.decoder(z_q).rsample() - x).square().sum() / z_q[..., 0].numel()
        return loss + self.cycle * error, {"squared_error": error}

    def _draws(self, x: Tensor, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes ``z_q [S, B, D]`` of the data, and model pairs ``z_p [S · B, D]``, ``x_p [S · B, *x_shape]``."""
        z_q = self.encoder(x).rsample(torch.Size([stage.num_particles]))
        z_p = codes(self.prior(), len(rows(z_q)))
        return z_q, z_p, self.decoder(z_p).rsample()
