"""The biadversarial variational autoencoder: an adversary for each half of the evidence lower bound."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from implicitvi.avb.ratios import RatioLoss, ratio_of
from implicitvi.errors import check_at_least, check_positive
from implicitvi.training import Player, Stage
from implicitvi.vae.architectures import ReadyMade
from implicitvi.vae.model import Batch, Scored
from implicitvi.vae.objectives.pairs import codes, codes_like, cycle_error, kl_bound, rows


class BiadversarialVAE(ReadyMade):
    """A biadversarial VAE: neither the encoder nor the decoder needs a density.

        V₁ = E_q(x)q(z|x)[T₁(z, x)] - E_q(x)p(z)[exp(T₁(z, x) - 1)]       →  E KL(q(z | x) ‖ p(z))
        V₂ = E_q(x)q(z|x)[T₂(z, x)] - E_q(z)p(x|z)[exp(T₂(z, x) - 1)]     →  E KL(q(x | z) ‖ p(x | z))

    Encoder and decoder minimise ``V₁ + V₂``, each adversary maximises its own. ``V₁`` replaces the divergence in the
    ELBO, ``V₂`` the reconstruction: it punishes a decoder that leaves out a mode, where a Gaussian one blurs modes.
    ``T - 1`` is a log ratio, learned by logistic regression, which is steadier, or as published, ``"fgan_kl"``. The
    formulas follow the publication's text, not its code; it has no results. At the optimum ``V₁ + V₂`` is
    ``-ELBO - H(x) + I(x; z)``: a flexible decoder does best to ignore its codes; ``cycle``, not published, is a remedy.

    Args:
        encoder: ``q(z | x)``: draws with gradients.
        decoder: ``p(x | z)``: draws with gradients.
        prior: ``p(z)``, draws are enough; the number ``D`` for ``N(0, I)``.
        code_adversary: ``T₁(z, x)``: ``[..., N, D]``, ``[N, *x_shape]`` to ``[..., N]``; ``None`` leaves out ``V₁``.
        data_adversary: ``T₂(z, x)``, likewise.
        ratio: ``"logistic"``, ``"fgan_kl"``, ``"least_squares"``, or a `RatioLoss`.
        cycle: Weight ``λ`` of ``λ E_p |z - z'|²`` for ``z ~ p(z)``, ``x ~ p(x | z)``, ``z' ~ q(z | x)``.
        limit: Log ratio in nats above which the exponential, the weight of a draw, continues as its tangent.

    References:
        Biadversarial Variational Autoencoder, Arnaud Fickinger, 2019.
    """

    needs = {"prior": {"draws"}, "encoder": {"draws", "gradients"}, "decoder": {"draws", "gradients"}}
    likelihood = "straight_through"
    adversaries = ("pairs", "pairs")

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        prior: Any,
        code_adversary: nn.Module | None,
        data_adversary: nn.Module,
        *,
        ratio: str | RatioLoss = "logistic",
        cycle: float = 0.0,
        limit: float = 6.0,
    ):
        check_at_least("cycle", cycle, 0)
        check_positive("limit", limit)
        super().__init__(encoder, decoder, prior)
        self.code_adversary: nn.Module | None = None
        if code_adversary is not None:
            self.code_adversary = self.adversary_of("pairs", code_adversary, "code_adversary")
        self.data_adversary = self.adversary_of("pairs", data_adversary, "data_adversary")
        self.ratio, self.cycle, self.limit = ratio_of(ratio), cycle, limit

    def players(self, batch: Batch) -> list[Player]:
        adversaries = [a for a in (self.code_adversary, self.data_adversary) if a is not None]
        adversary = self.player("adversary", adversaries, self._adversary_loss, batch, adversary=True)
        return [adversary, self.player("model", [self.encoder, self.decoder], self._loss, batch)]

    def code_ratios(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the learned ``log q(z | x) - log p(z)`` at codes ``z [S, B, D]`` and at draws of the prior."""
        prior, t = codes_like(z, self.prior()), cast(nn.Module, self.code_adversary)
        return self.ratio.log_ratio(t(z, x)), self.ratio.log_ratio(t(prior, x))

    def data_ratios(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the learned ``log q(x | z) - log p(x | z)`` at data ``x [B, *x_shape]`` and at decoded data."""
        fake, t = self.decoder(rows(z)).rsample(), self.data_adversary
        return self.ratio.log_ratio(t(z, x)), self.ratio.log_ratio(t(rows(z), fake))

    def _loss(self, x: Tensor, stage: Stage) -> Scored:
        z = self.encoder(x).rsample(torch.Size([stage.num_particles]))
        terms = {"data_bound": kl_bound(*self.data_ratios(z, x), self.limit)}
        if self.code_adversary is not None:
            terms["code_bound"] = kl_bound(*self.code_ratios(z, x), self.limit)
        loss = sum(terms.values(), x.new_zeros(()))
        if self.cycle:
            terms["squared_error"] = error = cycle_error(self.encoder, self.decoder, codes(self.prior(), len(x)))
            loss = loss + self.cycle * error
        return loss, {**terms}

    def _adversary_loss(self, x: Tensor, stage: Stage) -> Scored:
        with torch.no_grad():
            z = self.encoder(x).rsample(torch.Size([stage.num_particles]))
            fake, prior = self.decoder(rows(z)).rsample(), codes_like(z, self.prior())
        of_data, of_codes = self.data_adversary, self.code_adversary
        loss = self.ratio.loss(of_data(z, x), of_data(rows(z), fake))
        return (loss if of_codes is None else loss + self.ratio.loss(of_codes(z, x), of_codes(prior, x))), {}
