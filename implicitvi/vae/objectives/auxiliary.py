"""The auxiliary variational autoencoder: a posterior made flexible by a variable that is no part of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from implicitvi.errors import ShapeError
from implicitvi.nn import LOG_RANGE, concat_context, mlp
from implicitvi.rng import forked
from implicitvi.training import Player, Stage
from implicitvi.training.player import Metrics
from implicitvi.vae.architectures import Architecture, ReadyMade, size_of
from implicitvi.vae.decoders import Likelihood
from implicitvi.vae.distributions import Implicit
from implicitvi.vae.model import Batch, LatentModel


class AuxiliaryVAE(ReadyMade, LatentModel):
    """The variational autoencoder whose posterior is a mixture over an auxiliary variable ``a``.

        E_q[log p(x | z) + log p(z) + log p(a | x, z) - log q(a | x) - log q(z | a, x)]

    ``q(z | x)`` is the integral of ``q(a | x) q(z | a, x)`` and no longer of the shape of either. The bound is looser
    than the evidence lower bound of that integral by ``KL(q(a | x, z) ‖ p(a | x, z))``; the model of ``x`` and ``z``
    stays what it was. `encode` gives codes, the auxiliary variable stays inside.

    Args:
        encoder: ``q(a | x)``: draws with gradients, and a density; batch shape ``[B]``, event shape ``[A]``.
        decoder: ``p(x | z)``, with a density.
        prior: ``p(z)``, with a density; the number ``D`` for ``N(0, I)``.
        second: ``q(z | a, x)``, a module of ``(a, x)``: draws with gradients, and a density. From ``a [..., B, A]`` and
            ``x [B, *x_shape]`` to a distribution with batch shape ``[..., B]`` and event shape ``[D]``.
        auxiliary: ``p(a | x, z)``, a module of ``(z, x)``, with a density; likewise, with event shape ``[A]``.

    References:
        Auxiliary Deep Generative Models, Lars Maaløe, Casper Kaae Sønderby, Søren Kaae Sønderby, Ole Winther, 2016.
    """

    needs = {
        "prior": {"draws", "density"},
        "encoder": {"draws", "gradients"},
        "decoder": {"draws", "density"},
        "first encoder q(a | x)": {"draws", "gradients", "density"},
        "second encoder q(z | a, x)": {"draws", "gradients", "density"},
        "auxiliary p(a | x, z)": {"draws", "density"},
    }

    encoder: TwoStageEncoder

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: Any, *, second: nn.Module, auxiliary: nn.Module):
        super().__init__(TwoStageEncoder(encoder, second), decoder, prior)
        self.auxiliary = auxiliary
        self._probe_auxiliary()

    @classmethod
    def assemble(
        cls,
        networks: Architecture,
        z_dim: int,
        *,
        auxiliary_dim: int | None = None,
        hidden: Sequence[int] = (64,),
        likelihood: str | Likelihood = "bernoulli",
        prior: Any = None,
    ) -> Self:
        """The system of ready-made networks.

        Args:
            networks: What the encoders and the decoder are made of.
            z_dim: Dimension ``D`` of a code.
            auxiliary_dim: Dimension ``A`` of the auxiliary variable; ``None`` for ``D``.
            hidden: Widths of the layers from features and ``a`` to ``z``, and from features and ``z`` to ``a``.
            likelihood: A key of `LIKELIHOODS`, or a `Likelihood`.
            prior: As for the class; ``None`` for ``N(0, I)``.
        """
        size = z_dim if auxiliary_dim is None else auxiliary_dim

        def conditional(given: int, drawn: int) -> ConditionalGaussian:
            features = networks.features()
            return ConditionalGaussian(mlp([given + size_of(networks, features), *hidden, 2 * drawn]), features)

        return cls(
            networks.encoder(size),
            networks.decoder(z_dim, likelihood),
            z_dim if prior is None else prior,
            second=conditional(size, z_dim),
            auxiliary=conditional(z_dim, size),
        )

    def players(self, batch: Batch) -> list[Player]:
        arrows = [self.encoder, self.decoder, self.prior, self.auxiliary]
        return [self.player("model", arrows, self._loss, batch)]

    def elbo(self, x: Tensor, num_samples: int = 1) -> Tensor:
        """The bound of each datum ``x [B, *x_shape]`` from ``num_samples`` draws each: ``[num_samples, B]`` in nats."""
        q_a = self.encoder.first(x)
        a = q_a.rsample(torch.Size([num_samples]))
        q_z = self.encoder.second(a, x)
        z = q_z.rsample()
        log_q = q_a.log_prob(a) + q_z.log_prob(z)
        elbo: Tensor = self.log_joint(z, x) + self.auxiliary(z, x).log_prob(a) - log_q
        return elbo

    @torch.no_grad()
    def validate(self, x: Tensor) -> dict[str, Tensor]:
        return {"elbo": self.elbo(x).mean()}

    def _loss(self, x: Tensor, stage: Stage) -> tuple[Tensor, Metrics]:
        return -self.elbo(x, stage.num_particles).mean(), {}

    @torch.no_grad()
    def _probe_auxiliary(self) -> None:
        with self._as_is(), forked():
            x = torch.zeros(2, *self.x_shape, device=self.device)
            first = self.encoder.first(x)
            second = self.encoder.second(first.sample(), x)
            auxiliary = self.auxiliary(second.sample(), x)
            parts = (first, second, auxiliary)
            for name, part in zip(list(self.needs)[3:], parts, strict=True):
                self._check_needs(name, part)
            if auxiliary.event_shape != first.event_shape:
                raise ShapeError(
                    "encoder and auxiliary disagree on the dimension of the auxiliary variable",
                    got=f"{first.event_shape[0]} and {auxiliary.event_shape[0]}",
                    expected="the same",
                )


class TwoStageEncoder(nn.Module):
    """``q(z | x)`` as the integral of ``q(a | x) q(z | a, x)`` over ``a``, to be drawn from only.

    Args:
        first: ``q(a | x)``, a module of ``x``.
        second: ``q(z | a, x)``, a module of ``(a, x)``.
    """

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> Distribution:
        """``q(z | x)`` for ``x [B, *x_shape]``."""
        q_a = self.first(x)

        def draw(shape: torch.Size) -> Tensor:
            z: Tensor = self.second(q_a.rsample(shape), x).rsample()
            return z

        event_shape = self.second(q_a.sample(), x).event_shape
        return Implicit(draw, x.shape[:1], event_shape)


class ConditionalGaussian(nn.Module):
    """A diagonal Gaussian given a vector and a datum, side by side: `AuxiliaryVAE`'s ``second`` and ``auxiliary``.

    Args:
        network: Vector and features of the datum in one row, ``[..., K + C]``, to ``[..., 2 D]``: means, log scales.
        features: Data ``[B, *x_shape]`` to features ``[B, C]``; ``None`` for the entries of ``x`` in one row.
    """

    def __init__(self, network: nn.Module, features: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.network = network
        self.features = nn.Flatten() if features is None else features

    def forward(self, given: Tensor, x: Tensor) -> Distribution:
        """The Gaussian, with batch shape ``[..., B]``, for ``given [..., B, K]`` and ``x [B, *x_shape]``."""
        outputs = self.network(concat_context(given, self.features(x)))
        loc, log_scale = outputs.chunk(2, -1)
        scale = (LOG_RANGE * (log_scale / LOG_RANGE).tanh()).exp()
        return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)
