"""Encoders: modules from data to ``q(z | x)``, explicit if it has a density and implicit if not.

``encoder(x)`` takes data ``x [B, *x_shape]`` and returns a distribution with batch shape ``[B]`` and event shape
``[D]``. Any such module is an encoder. An implicit one has draws only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent

from implicitvi.avb.samplers import NoiseBasisSampler, Sampler
from implicitvi.errors import OptionError, check_whole
from implicitvi.nn import Injected, concat_context
from implicitvi.vae.distributions import Implicit, StraightThroughBernoulli, diagonal_gaussian, full_precision


class _Encoder(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network


class GaussianEncoder(_Encoder):
    """An explicit diagonal Gaussian, ``N(z; m(x), s(x)²)``.

    Args:
        network: Data ``[B, *x_shape]`` to ``[B, 2 D]``: means, then log scales.

    >>> GaussianEncoder(nn.Linear(4, 6))(torch.zeros(5, 4)).event_shape
    torch.Size([3])
    """

    def forward(self, x: Tensor) -> Distribution:
        return diagonal_gaussian(self.network(x))


class ConditionalGaussian(_Encoder):
    """An explicit diagonal Gaussian given a vector and a datum: `AuxiliaryVAE`'s ``second`` and ``auxiliary``.

    Args:
        network: Vector and features of the datum in one row, ``[..., K + C]``, to ``[..., 2 D]``: means, log scales.
        features: Data ``[B, *x_shape]`` to features ``[B, C]``; ``None`` for the entries of ``x`` in one row.
    """

    def __init__(self, network: nn.Module, features: Callable[[Tensor], Tensor] | None = None):
        super().__init__(network)
        self.features = nn.Flatten() if features is None else features

    def forward(self, given: Tensor, x: Tensor) -> Distribution:
        """Return the Gaussian, batch shape ``[..., B]``, for ``given [..., B, K]`` and ``x [B, *x_shape]``."""
        return diagonal_gaussian(self.network(concat_context(given, self.features(x))))


class DeterministicEncoder(_Encoder):
    """A code for every datum without noise, ``z = f(x)``, and without a density.

    Args:
        network: Data ``[B, *x_shape]`` to codes ``[B, D]``.
    """

    def forward(self, x: Tensor) -> Distribution:
        z = full_precision(self.network(x))
        return Implicit(lambda shape: z.expand(shape + z.shape), z.shape[:1], z.shape[1:])


class BinaryEncoder(_Encoder):
    """An explicit distribution of binary codes, independent bits given ``x``.

    Args:
        network: Data ``[B, *x_shape]`` to logits ``[B, D]``.
        straight_through: Whether draws have gradients (`StraightThroughBernoulli`), for objectives that need them.
    """

    def __init__(self, network: nn.Module, *, straight_through: bool = False):
        super().__init__(network)
        self.bits = StraightThroughBernoulli if straight_through else Bernoulli

    def forward(self, x: Tensor) -> Distribution:
        return Independent(self.bits(logits=self.network(x), validate_args=False), 1, validate_args=False)


class ImplicitEncoder(nn.Module):
    """A `Sampler` given features of a datum: ``z = f(ε, h(x))``.

    The features are computed once for all draws of a datum. With a `NoiseBasisSampler` the distribution also has
    ``moments``, in closed form given ``x``, for Adaptive Contrast (Mescheder et al. 2017, section 4).

    Args:
        sampler: Sampler whose context is the features.
        features: Data ``[B, *x_shape]`` to features ``[B, C]``; ``None`` for the entries of ``x`` in one row.
    """

    def __init__(self, sampler: Sampler, features: nn.Module | None = None):
        super().__init__()
        if not sampler.context_dim:
            raise OptionError("The sampler of an encoder must have a context: context_dim, the number of features.")
        self.sampler = sampler
        self.features = nn.Flatten() if features is None else features

    def forward(self, x: Tensor) -> Distribution:
        return Encoded(self.sampler, self.features(x))


class Encoded(Implicit):
    """An implicit distribution of codes: the draws of a sampler given the features ``[B, C]`` of a batch."""

    def __init__(self, sampler: Sampler, features: Tensor):
        super().__init__(self._sample, features.shape[:1], [sampler.latent_dim])
        self.sampler, self.features = sampler, features

    def moments(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Return conditional mean ``[B, D]`` and covariance ``[B, D, D]`` (`NoiseBasisSampler.moments`)."""
        assert isinstance(self.sampler, NoiseBasisSampler)
        return self.sampler.moments(num_samples, self.features)

    def _sample(self, shape: torch.Size) -> Tensor:
        z: Tensor = self.sampler(shape.numel(), self.features)
        return z.reshape(shape + z.shape[1:])


class InjectedEncoder(_Encoder):
    """An implicit encoder that adds a linear image of one noise vector after each of its layers (`Injected`).

    With convolutions it is the encoder of Mescheder et al. (2017) without Adaptive Contrast.

    Args:
        layers: Layers from ``x`` to the last features, without their activations.
        noise_dim: Dimension of the noise, at least ``D``.
        latent_dim: Dimension ``D`` of a code.
        x_shape: Shape of one datum.
        activation: Applied after the noise has been added.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        noise_dim: int,
        latent_dim: int,
        x_shape: Sequence[int],
        activation: Callable[[Tensor], Tensor] = nn.functional.elu,
    ):
        check_whole("noise_dim", noise_dim, latent_dim)
        super().__init__(Injected(layers, noise_dim, latent_dim, x_shape=x_shape, activation=activation))
        self.noise_dim, self.latent_dim = noise_dim, latent_dim

    def forward(self, x: Tensor) -> Distribution:
        def draw(shape: torch.Size) -> Tensor:
            eps = torch.randn(*shape, len(x), self.noise_dim, dtype=x.dtype, device=x.device)
            return full_precision(self.network(eps, x))

        return Implicit(draw, x.shape[:1], [self.latent_dim])


class FlowEncoder(nn.Module):
    """An explicit flow given features of the datum.

    Args:
        features: Data ``[B, *x_shape]`` to features ``[B, C]``.
        flow: Features to a distribution: `InverseAutoregressiveFlow`, `PlanarFlow`, or a lazy flow of zuko, such as
            ``zuko.flows.MAF(D, C)``, whose draws take a pass for each dimension.
    """

    def __init__(self, features: nn.Module, flow: nn.Module):
        super().__init__()
        self.features, self.flow = features, flow

    def forward(self, x: Tensor) -> Distribution:
        q: Distribution = self.flow(self.features(x))
        return q


class TwoStageEncoder(nn.Module):
    """An implicit encoder, the integral of ``q(a | x) q(z | a, x)`` over ``a``.

    Args:
        first: ``q(a | x)``, a module of ``x``.
        second: ``q(z | a, x)``, a module of ``(a, x)``.
    """

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Distribution:
        q_a = self.first(x)

        def draw(shape: torch.Size) -> Tensor:
            z: Tensor = self.second(q_a.rsample(shape), x).rsample()
            return z

        return Implicit(draw, x.shape[:1], self.second(q_a.sample(), x).event_shape)


def moments_of(q: Any, num_samples: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation ``[B, D]`` of a distribution: its own if it has them, else those of draws."""
    if not isinstance(q, Implicit) and hasattr(type(q), "variance"):
        try:
            return q.mean, q.stddev
        except NotImplementedError:
            pass
    draws = q.sample(torch.Size([num_samples]))
    return draws.mean(0), draws.std(0)
