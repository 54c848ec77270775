"""Distributions that an encoder, a decoder or a prior may return besides those of torch.

Each is a module that returns one: ``encoder(x)`` is ``q(z | x)``, ``decoder(z)`` is ``p(x | z)``, ``prior()``
is ``p(z)``. Its methods (``sample``, ``rsample``, ``log_prob``) decide which objectives can use it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent, Normal, constraints, kl_divergence

from implicitvi.errors import ModelError
from implicitvi.nn import bounded_exp

Draw = Callable[[torch.Size], Tensor]


class Implicit(Distribution):
    """A distribution that can be drawn from with gradients, and has no density.

    Args:
        draw: Sample shape to draws ``[*sample_shape, *batch_shape, *event_shape]``, differentiable.
        batch_shape: Shape of the batch.
        event_shape: Shape of one draw.

    >>> Implicit(lambda shape: torch.zeros(*shape, 3, 2), [3], [2]).rsample([5]).shape
    torch.Size([5, 3, 2])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = True

    def __init__(self, draw: Draw, batch_shape: Any = torch.Size(), event_shape: Any = torch.Size()):
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)
        self._draw = draw

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self._draw(torch.Size(sample_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self._draw(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        do = "Use an objective that needs its draws only, or another network."
        raise ModelError(f"An implicit distribution has no density. {do}")


class StraightThroughBernoulli(Bernoulli):
    """A Bernoulli whose draws are 0 or 1 and whose gradient is that of the probabilities.

    The gradient is biased. It lets an adversary of binary data train a decoder, and binary codes train an encoder.

    References:
        Estimating or Propagating Gradients Through Stochastic Neurons, Yoshua Bengio, Nicholas Léonard,
        Aaron Courville, 2013.
    """

    has_rsample = True

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        draws: Tensor = self.sample(torch.Size(sample_shape))
        return draws + (self.probs - self.probs.detach())  # in this order the draws stay 0 and 1


def diagonal_gaussian(outputs: Tensor) -> Distribution:
    """Return the Gaussian of a network's ``outputs [..., 2 D]``: means, then log scales (`bounded_exp`)."""
    loc, log_scale = full_precision(outputs).chunk(2, -1)
    return Independent(Normal(loc, bounded_exp(log_scale), validate_args=False), 1, validate_args=False)


def full_precision(codes: Tensor) -> Tensor:
    """Return codes of any shape in float32 or better: in 16 bits different codes become equal."""
    return codes.float() if codes.dtype in (torch.bfloat16, torch.float16) else codes


def has_density(distribution: Distribution) -> bool:
    """Return whether a distribution scores its own draws."""
    try:
        with torch.no_grad():
            distribution.log_prob(distribution.sample())
    except (NotImplementedError, ModelError):
        return False
    return True


def divergence(q: Distribution, p: Distribution, z: Tensor, log_q: Tensor | None = None) -> Tensor:
    """Return ``KL(q ‖ p)`` in nats: ``[B]`` in closed form if torch has one, else ``[S, B]`` at draws ``z [S, B, D]``.

    ``q`` has batch shape ``[B]``, ``p`` an empty one; ``log_q`` is the log density of the draws if it is known already.
    """
    try:
        kl: Tensor = kl_divergence(q, p.expand(q.batch_shape))
    except NotImplementedError:
        kl = (q.log_prob(z) if log_q is None else log_q) - p.log_prob(z)
    return kl
