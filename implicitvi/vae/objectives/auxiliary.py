"""The auxiliary variational autoencoder: a posterior made flexible by a variable that is not part of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from implicitvi.errors import ShapeError
from implicitvi.rng import forked
from implicitvi.training import Player, Stage
from implicitvi.vae.architectures import Architecture, ReadyMade
from implicitvi.vae.decoders import Likelihood
from implicitvi.vae.encoders import TwoStageEncoder
from implicitvi.vae.model import Batch, Scored


class AuxiliaryVAE(ReadyMade):
    """A variational autoencoder whose posterior is a mixture over an auxiliary variable ``a``.

        E_q[log p(x | z) + log p(z) + log p(a | x, z) - log q(a | x) - log q(z | a, x)]

    ``q(z | x)`` is the integral of ``q(a | x) q(z | a, x)``, and `encode` returns codes without ``a``. The bound is
    looser than the ELBO of that integral by ``KL(q(a | x, z) ‖ p(a | x, z))``.

    Args:
        encoder: ``q(a | x)``: draws with gradients, and a density; batch shape ``[B]``, event shape ``[A]``.
        decoder: ``p(x | z)``, with a density.
        prior: ``p(z)``, with a density; the number ``D`` for ``N(0, I)``.
        second: ``q(z | a, x)``, a module of ``(a, x)``: draws with gradients, and a density; for ``a [..., B, A]`` and
            ``x [B, *x_shape]`` batch shape ``[..., B]``, event shape ``[D]``.
        auxiliary: ``p(a | x, z)``, a module of ``(z, x)``, with a density; likewise, with event shape ``[A]``.

    References:
        Auxiliary Deep Generative Models, Lars Maaløe, Casper Kaae Sønderby, Søren Kaae Sønderby, Ole Winther, 2016.
    """

    needs = {
        "prior": {"draws", "density"},
        "decoder": {"draws", "density"},
        "first encoder q(a | x)": {"draws", "gradients", "density"},
        "second encoder q(z | a, x)": {"draws", "gradients", "density"},
        "auxiliary p(a | x, z)": {"draws", "density"},
    }
    encoder: TwoStageEncoder

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: Any, *, second: nn.Module, auxiliary: nn.Module):
        super().__init__(TwoStageEncoder(encoder, second), decoder, prior)
        self.auxiliary = auxiliary
        with self._as_is(), forked(), torch.no_grad():
            first = self.encoder.first(x := self.like.new_zeros(2, *self.x_shape))
            last = self.encoder.second(first.sample(), x)
            parts = first, last, self.auxiliary(last.sample(), x)
        for name, part in zip([*self.needs][2:], parts, strict=True):
            self._check_needs(name, part)
        if (one := parts[0].event_shape) != (other := parts[2].event_shape):
            raise ShapeError.must_be("Dimensions of a in encoder and auxiliary", "equal", f"{one[0]} and {other[0]}")

    @classmethod
    def build(
        cls,
        networks: Architecture,
        z_dim: int,
        *,
        auxiliary_dim: int | None = None,
        hidden: Sequence[int] = (64,),
        likelihood: str | Likelihood | None = None,
        prior: Any = None,
        **encoder: Any,
    ) -> Self:
        size = z_dim if auxiliary_dim is None else auxiliary_dim
        return cls(
            networks.encoder(size, **encoder),
            networks.decoder(z_dim, likelihood or cls.likelihood),
            z_dim if prior is None else prior,
            second=networks.conditional(size, z_dim, hidden),
            auxiliary=networks.conditional(z_dim, size, hidden),
        )

    def players(self, batch: Batch) -> list[Player]:
        return [self.player("model", [self.encoder, self.decoder, self.prior, self.auxiliary], self._loss, batch)]

    def elbo(self, x: Tensor, num_samples: int = 1) -> Tensor:
        """Return the bound of each datum ``x [B, *x_shape]`` at draws of its code: ``[num_samples, B]`` in nats."""
        self.check_shape(x)
        a = (q_a := self.encoder.first(x)).rsample(torch.Size([num_samples]))
        z = (q_z := self.encoder.second(a, x)).rsample()
        log_q = q_a.log_prob(a) + q_z.log_prob(z)
        elbo: Tensor = self.log_joint(z, x) + self.auxiliary(z, x).log_prob(a) - log_q
        return elbo

    @torch.no_grad()
    def validate(self, x: Tensor) -> dict[str, Tensor]:
        return {"elbo": self.elbo(x).mean()}

    def _loss(self, x: Tensor, stage: Stage) -> Scored:
        return -self.elbo(x, stage.num_particles).mean(), {}
