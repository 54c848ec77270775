"""The biadversarial variational autoencoder: an adversary for each half of the evidence lower bound."""

from __future__ import annotations

from math import inf
from typing import Any, Self

import torch
from torch import Tensor, nn

from implicitvi.avb.ratios import RATIOS, RatioLoss, capped_exp
from implicitvi.errors import check_at_least, check_choice, check_positive
from implicitvi.training import Player, Stage
from implicitvi.training.player import Metrics
from implicitvi.vae.architectures import Architecture, ReadyMade
from implicitvi.vae.decoders import Likelihood
from implicitvi.vae.model import Batch, LatentModel
from implicitvi.vae.objectives.pairs import codes, rows


def kl_bound(of_first: Tensor, of_second: Tensor, limit: float = inf) -> Tensor:
    """``1 + E_first[ρ] - E_second[exp ρ]`` in nats, at most ``KL(first ‖ second)`` and equal to it at the log ratio.

    Args:
        of_first: Learned ``log first - log second`` at draws of the first, of any shape.
        of_second: The same at draws of the second.
        limit: Log ratio above which the exponential goes on as its tangent.

    References:
        Estimating Divergence Functionals and the Likelihood Ratio by Convex Risk Minimization, XuanLong Nguyen,
        Martin Wainwright, Michael Jordan, 2010.
    """
    return 1 + of_first.mean() - capped_exp(of_second, limit).mean()


class BiadversarialVAE(ReadyMade, LatentModel):
    """The biadversarial VAE: neither the encoder nor the decoder needs a density.

        min over encoder and decoder of  V₁ + V₂,  each the greatest over its adversary:

        V₁ = E_q(x)q(z|x)[T₁(z, x)] - E_q(x)p(z)[exp(T₁(z, x) - 1)]       →  E KL(q(z | x) ‖ p(z))
        V₂ = E_q(x)q(z|x)[T₂(z, x)] - E_q(z)p(x|z)[exp(T₂(z, x) - 1)]     →  E KL(q(x | z) ‖ p(x | z))

    ``V₁`` takes the place of the divergence in the evidence lower bound, ``V₂`` that of the reconstruction. The
    divergence of ``V₂`` is the direct one, from the data to the decoder: a decoder that leaves out a mode is punished,
    where a Gaussian one would blur the modes. Real pairs are ``(z ~ q(z | x), x)``, fake ones ``(z, x' ~ p(x | z))`` at
    the same code.

    With ``ratio="fgan_kl"`` these are the formulas above. By default the adversaries learn their log ratios by logistic
    regression, which is steadier, and ``T = 1 + log ratio`` is put into the same formulas.

    The formulas are reconstructed from the words of the publication, whose equations could not be had; the pairs are
    those of the text, which its code does not follow. No results have been published.

    What the sum optimises is not the evidence lower bound: at the optimal adversaries

        V₁ + V₂ = -ELBO - H(x) + I(x; z)

    with the mutual information of data and codes under ``q``. A flexible decoder does best to forget its codes:
    ``q(z | x) = p(z)`` and ``p(x | z) = q(x)`` reach zero. The remedy, no part of the publication, is ``cycle``: a code
    that is drawn from the prior, decoded and encoded again should come back.

    Args:
        encoder: ``q(z | x)``: draws with gradients.
        decoder: ``p(x | z)``: draws with gradients.
        prior: ``p(z)``, of which draws are enough; the number ``D`` for ``N(0, I)``.
        code_adversary: ``T₁(z, x)``: codes ``[..., N, D]`` and data ``[N, *x_shape]`` to scores ``[..., N]``. ``None``
            leaves out ``V₁``, where codes are given and the decoder alone is learned.
        data_adversary: ``T₂(z, x)``, likewise.
        ratio: ``"logistic"``, ``"fgan_kl"`` as published, ``"least_squares"``, or a `RatioLoss`.
        cycle: Weight ``λ`` of ``λ E_p |z - z'|²``, summed over dimensions, where ``z ~ p(z)``, ``x ~ p(x | z)``,
            ``z' ~ q(z | x)``.
        limit: Log ratio, in nats, above which the exponential goes on as its tangent. Each draw of the decoder is
            weighed by that density ratio; this bounds the weight.

    References:
        Biadversarial Variational Autoencoder, Arnaud Fickinger, 2019.
    """

    needs = {"prior": {"draws"}, "encoder": {"draws", "gradients"}, "decoder": {"draws", "gradients"}}

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
        if isinstance(ratio, str):
            check_choice("ratio", ratio, RATIOS)
            ratio = RATIOS[ratio]()
        super().__init__(encoder, decoder, prior)
        self.code_adversary = code_adversary
        self.data_adversary = data_adversary
        self.ratio = ratio
        self.cycle = cycle
        self.limit = limit

    @classmethod
    def assemble(
        cls,
        networks: Architecture,
        z_dim: int,
        *,
        posterior: str = "gaussian",
        likelihood: str | Likelihood = "straight_through",
        prior: Any = None,
        ratio: str | RatioLoss = "logistic",
        cycle: float = 0.0,
    ) -> Self:
        """The system of ready-made networks.

        Args:
            networks: What encoder, decoder and both adversaries are made of.
            z_dim: Dimension ``D`` of a code.
            posterior: See `Architecture.encoder`.
            likelihood: A key of `LIKELIHOODS`, or a `Likelihood`.
            prior: As for the class; ``None`` for ``N(0, I)``.
            ratio: As for the class.
            cycle: As for the class.
        """
        return cls(
            *networks.arrows(z_dim, posterior, likelihood, prior),
            networks.adversary(z_dim),
            networks.adversary(z_dim),
            ratio=ratio,
            cycle=cycle,
        )

    def players(self, batch: Batch) -> list[Player]:
        adversaries = [a for a in (self.code_adversary, self.data_adversary) if a is not None]
        return [
            self.player("adversary", adversaries, self._adversary_loss, batch, adversary=True),
            self.player("model", [self.encoder, self.decoder], self._loss, batch),
        ]

    def code_ratios(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Learned ``log q(z | x) - log p(z)`` in nats, whose `kl_bound` is ``V₁``.

        Args:
            z: Codes of the data, ``[S, B, D]``.
            x: Data ``[B, *x_shape]``.

        Returns:
            At the codes, ``[S, B]``, and at as many draws of the prior, ``[S, B]``.
        """
        assert self.code_adversary is not None
        prior = codes(self.prior(), len(rows(z))).view_as(z)
        return self._log_ratio(self.code_adversary, z, x), self._log_ratio(self.code_adversary, prior, x)

    def data_ratios(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Learned ``log q(x | z) - log p(x | z)`` in nats, whose `kl_bound` is ``V₂``.

        Args:
            z: Codes of the data, ``[S, B, D]``.
            x: Data ``[B, *x_shape]``.

        Returns:
            At the data, ``[S, B]``, and at draws of the decoder at the same codes, ``[S · B]``.
        """
        fake = self.decoder(rows(z)).rsample()
        return self._log_ratio(self.data_adversary, z, x), self._log_ratio(self.data_adversary, rows(z), fake)

    def _log_ratio(self, adversary: nn.Module, z: Tensor, x: Tensor) -> Tensor:
        return self.ratio.log_ratio(adversary(z, x))

    def _loss(self, x: Tensor, stage: Stage) -> tuple[Tensor, Metrics]:
        z = self._codes(x, stage)
        of_data = self._bound(self.data_ratios(z, x))
        loss = of_data
        metrics: Metrics = {"data_bound": of_data}
        if self.code_adversary is not None:
            of_codes = self._bound(self.code_ratios(z, x))
            loss, metrics["code_bound"] = loss + of_codes, of_codes
        if self.cycle:
            prior = codes(self.prior(), len(x))
            again = self.encoder(self.decoder(prior).rsample()).rsample()
            error = (again - prior).square().sum(-1).mean()
            loss, metrics["squared_error"] = loss + self.cycle * error, error
        return loss, metrics

    def _adversary_loss(self, x: Tensor, stage: Stage) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            z = self._codes(x, stage)
            fake = self.decoder(rows(z)).rsample()
            prior = codes(self.prior(), len(rows(z))).view_as(z)
        of_data = self.data_adversary
        loss = self.ratio.loss(of_data(z, x), of_data(rows(z), fake))
        of_codes = self.code_adversary
        if of_codes is not None:
            loss = loss + self.ratio.loss(of_codes(z, x), of_codes(prior, x))
        return loss, {}

    def _codes(self, x: Tensor, stage: Stage) -> Tensor:
        z: Tensor = self.encoder(x).rsample(torch.Size([stage.num_particles]))
        return z

    def _bound(self, ratios: tuple[Tensor, Tensor]) -> Tensor:
        return kl_bound(*ratios, self.limit)
